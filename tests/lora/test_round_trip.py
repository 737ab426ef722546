"""What was trained, saved, read and applied again has the same effect."""

from itertools import product

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.bases import predict
from tests.lora.helpers import with_random_adapter
from trainer import config
from trainer.errors import ConfigError, ModelError
from trainer.lora import writer
from trainer.lora.apply import Stack, WeightedAdapter
from trainer.lora.formats.reader import read_adapter
from trainer.runs import run_status

ALL_FORMATS = ("kohya", "diffusers", "peft")
FORMATS_OF = {"loha": ("kohya", "peft"), "lokr": ("kohya",)}
"""The formats that can contain a kind. The others can be written in every format."""
CASES = [
    *product(["sd1"], ["rslora", "varying", "dora", "loha", "lokr"]),
    ("sdxl", "varying"),
    ("sdxl", "rslora"),
    ("sd3", "lora"),
]


def saved(folder, file_format, modules, family, dtype=torch.float32):
    name = "peft" if file_format == "peft" else f"{file_format}.safetensors"
    writer.save_adapter(folder / name, file_format, modules, family, dtype, {})
    return folder / name


def assert_same(base, expected):
    torch.testing.assert_close(predict(base.family, base.pipe), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_saved_file_has_the_trained_effect_in_a_new_base(load, tmp_path, family, kind):
    base = load(family)
    plain = predict(base.family, base.pipe)
    trained, modules = with_random_adapter(base, kind)
    assert (trained - plain).norm() > 0.02 * plain.norm()
    other = load(family)
    stack = Stack(other)
    for file_format in FORMATS_OF.get(kind, ALL_FORMATS):
        file = writer.verify(saved(tmp_path, file_format, modules, base.family), modules)
        assert file.file_format == file_format
        # A file without alphas gets a note about the assumption, apart from one with metadata.
        assert bool(file.notes) == (file_format == "diffusers")
        stack.apply([WeightedAdapter(file, 1.0, 1.0)])
        assert_same(other, trained)
        stack.clear()
        assert torch.equal(predict(other.family, other.pipe), plain)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_diffusers_loads_the_files_of_the_kinds_that_it_supports(load, tmp_path, family, kind):
    """It ignores the dora_scale of kohya files, and the kohya keys of Stable Diffusion 3."""
    formats = {"loha": (), "lokr": (), "dora": ("diffusers",)}.get(kind, ("kohya", "diffusers"))
    base = load(family)
    trained, modules = with_random_adapter(base, kind)
    for file_format in formats if family != "sd3" else ("diffusers",):
        other = load(family)
        other.pipe.load_lora_weights(str(saved(tmp_path, file_format, modules, base.family)))
        assert_same(other, trained)


@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "varying"), ("sdxl", "rslora"), ("sd1", "loha")]
)
def test_peft_loads_the_folders(load, tmp_path, family, kind):
    base = load(family)
    trained, modules = with_random_adapter(base, kind)
    other = load(family)
    for folder in saved(tmp_path, "peft", modules, base.family).iterdir():
        PeftModel.from_pretrained(getattr(other.pipe, folder.name), folder)
    assert_same(other, trained)


@pytest.mark.parametrize(("kind", "file_format"), [("loha", "diffusers"), ("lokr", "peft")])
def test_a_format_that_cannot_contain_the_kind_is_refused(load, tmp_path, kind, file_format):
    base = load("sd1")
    _, modules = with_random_adapter(base, kind)
    with pytest.raises(ModelError, match="kohya"):
        saved(tmp_path, file_format, modules, base.family)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["rslora", "varying"])
def test_a_kohya_file_has_one_alpha(load, tmp_path, kind):
    """Some readers use the alpha of one module for all of them."""
    base = load("sd1")
    _, modules = with_random_adapter(base, kind)
    tensors = load_file(saved(tmp_path, "kohya", modules, base.family))
    assert len({float(tensors[name]) for name in tensors if name.endswith(".alpha")}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes_the_check_of_the_saved_file(load, tmp_path, dtype):
    base = load("sd1")
    _, modules = with_random_adapter(base, "dora")
    file = writer.verify(saved(tmp_path, "kohya", modules, base.family, dtype), modules)
    assert f"torch.{file.dtype}" == str(dtype)


def test_several_adapters_are_applied_each_at_its_two_strengths(load, tmp_path):
    """Compared with weights that were merged by hand."""
    files = []
    for kind in ("varying", "dora"):
        other = load("sd1")
        _, modules = with_random_adapter(other, kind)
        (tmp_path / kind).mkdir()
        files.append(read_adapter(saved(tmp_path / kind, "kohya", modules, other.family)))
    strengths = [(0.7, -0.3), (0.0, 1.4)]

    merged, original = load("sd1"), load("sd1")
    for file, (strength, text_strength) in zip(files, strengths, strict=True):
        for module in file.modules:
            is_text = module.component == "text_encoder"
            weight = merged.components[module.component].get_submodule(module.name).weight
            plain = original.components[module.component].get_submodule(module.name).weight
            change = module.change(plain.detach())
            weight.data += (text_strength if is_text else strength) * change

    base = load("sd1")
    before = predict(base.family, base.pipe)
    stack = Stack(base)
    stack.apply([WeightedAdapter(file, *both) for file, both in zip(files, strengths, strict=True)])
    result, expected = predict(base.family, base.pipe), predict(merged.family, merged.pipe)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    stack.apply([WeightedAdapter(file, 0.0, 0.0) for file in files])
    assert torch.equal(predict(base.family, base.pipe), before)


def test_a_run_writes_each_requested_format(train_tiny):
    folder = train_tiny(
        {
            "saving.dialects": ["diffusers", "peft", "kohya"],
            "training.steps": 2,
            "saving.saves": 1,
            "saving.precision": "fp32",
        }
    )
    main = run_status.read_status(folder).finished.file
    files = [read_adapter(folder / name) for name in (main, "tiny-kohya.safetensors", "tiny-peft")]
    assert [file.file_format for file in files] == ["diffusers", "kohya", "peft"]
    deltas = [{module.name: module.delta for module in file.modules} for file in files]
    for other in deltas[1:]:
        torch.testing.assert_close(other, deltas[0])


def test_peft_cannot_be_the_only_format():
    with pytest.raises(ConfigError, match="contains only peft"):
        config.replace(config.RunConfig(), {"saving.dialects": ["peft"]})
