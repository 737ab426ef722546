"""Files of adapters: their check, their hash, and what a run writes."""

import hashlib
import math
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.lora.helpers import CONV, QUERY, lora, random_pair
from tests.lora.test_export import GOLDEN_TEXT, GOLDEN_UNET
from trainer.cli.describe import describe
from trainer.errors import ModelError
from trainer.families import FAMILIES
from trainer.lora import writer
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.models.safetensors_header import read_header
from trainer.runs import run_folder, run_requests, run_status
from trainer.training import loop
from trainer.training.runner import run_in

FAMILY = FAMILIES["sd1"]
OTHER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def modules():
    return [lora(QUERY, *random_pair(seed=1)), lora(OTHER, *random_pair(seed=2))]


@pytest.fixture
def save(tmp_path):
    """Returns a function that saves modules to a kohya file in float32."""

    def make(*saved):
        path = tmp_path / "a.safetensors"
        writer.save_adapter(path, "kohya", saved, FAMILY, torch.float32, {})
        return path

    return make


def with_error(module: AdaptedModule, error: float) -> AdaptedModule:
    """Returns the module with a relative error of delta W."""
    up = module.tensors["lora_up.weight"] * (1 + error)
    return replace(module, tensors=module.tensors | {"lora_up.weight": up})


@pytest.mark.parametrize("error", [0.0, 0.019, -0.019])
def test_verify_accepts_an_error_up_to_two_percent(modules, save, error):
    file = writer.verify(save(modules[0], with_error(modules[1], error)), modules)
    assert len(file.modules) == 2


@pytest.mark.parametrize("error", [0.021, -0.021, 0.5, -0.5, -1.0])
def test_verify_refuses_a_larger_error_of_any_module(modules, save, error):
    path = save(modules[0], with_error(modules[1], error))
    message = f"attn2.to_k differs by {abs(error):.1%}, and the limit is 2%"
    with pytest.raises(ModelError, match=message):
        writer.verify(path, modules)


def test_verify_refuses_a_missing_module(modules, save):
    with pytest.raises(ModelError, match="lacks 1 of 2 modules, such as unet.mid_block"):
        writer.verify(save(modules[0]), modules)


def test_verify_refuses_a_surplus_module_that_changes_something(modules, save):
    path = save(*modules)
    with pytest.raises(ModelError, match="changes unet.mid_block.*attn2.to_k, which was not"):
        writer.verify(path, modules[:1])


def test_verify_accepts_a_surplus_module_that_changes_nothing(modules, save):
    idle = lora(OTHER, torch.ones(2, 16), torch.zeros(16, 2))
    assert len(writer.verify(save(modules[0], idle), modules[:1]).modules) == 2


def test_verify_compares_a_negligible_module_with_the_largest_one(modules, save):
    """A thousandth of the largest delta W may be lost, but not a tenth."""
    large = modules[0]
    for size, is_accepted in ((1e-5, True), (0.1, False)):
        small = lora(OTHER, *(math.sqrt(size) * part for part in random_pair(seed=1)))
        path = save(large, with_error(small, -1.0))
        if is_accepted:
            writer.verify(path, [large, small])
        else:
            with pytest.raises(ModelError, match="attn2.to_k differs by 100"):
                writer.verify(path, [large, small])


@pytest.mark.parametrize(("error", "is_accepted"), [(0.019, True), (0.021, False), (0.5, False)])
def test_verify_compares_the_norms_of_a_dora(save, error, is_accepted):
    module = lora(QUERY, *random_pair())
    norms = torch.rand(16, 1) + 1
    trained = replace(module, kind="dora", tensors=module.tensors | {"dora_scale": norms})
    wrong = replace(trained, tensors=trained.tensors | {"dora_scale": norms * (1 + error)})
    path = save(wrong)
    if is_accepted:
        writer.verify(path, [trained])
    else:
        with pytest.raises(ModelError, match="differs by"):
            writer.verify(path, [trained])


def test_verify_refuses_a_dora_without_its_norms(save):
    module = lora(QUERY, *random_pair())
    tensors = module.tensors | {"dora_scale": torch.ones(16, 1)}
    with pytest.raises(ModelError, match="does not do what was trained"):
        writer.verify(save(module), [replace(module, kind="dora", tensors=tensors)])


def test_verify_compares_convolutions(save):
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, 3, 3, generator=draw), torch.randn(16, 2, 1, 1, generator=draw)
    conv = lora(CONV, down, up)
    writer.verify(save(conv), [conv])
    with pytest.raises(ModelError, match="differs by 50"):
        writer.verify(save(with_error(conv, 0.5)), [conv])


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_number_that_is_not_finite_in_the_file_is_not_saved(tmp_path, value):
    """1e6 is infinite in fp16."""
    module = lora("x", torch.ones(1, 2), torch.full((2, 1), value))
    path = tmp_path / "a.safetensors"
    with pytest.raises(ModelError, match="not finite"):
        writer.save_adapter(path, "kohya", [module], FAMILY, torch.float16, {})
    assert not list(tmp_path.iterdir())


def hash_of_tensors(content: bytes) -> str:
    header_length = struct.unpack("<Q", content[:8])[0]
    return hashlib.sha256(content[8 + header_length :]).hexdigest()


def test_the_hash_is_computed_from_the_bytes_after_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    module = lora("x", torch.ones(1, 3), torch.ones(2, 1))
    writer.save_adapter(path, "kohya", [module], FAMILY, torch.float32, {"k": "v"})
    metadata = read_header(path).metadata
    assert metadata["sshs_model_hash"] == hash_of_tensors(path.read_bytes())
    assert metadata["k"] == "v"
    assert oct(path.stat().st_mode & 0o777) == "0o644"


def test_a_copy_with_more_metadata_has_the_same_tensors_and_hash(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    module = lora("x", torch.ones(1, 3), torch.ones(2, 1))
    writer.save_adapter(source, "kohya", [module], FAMILY, torch.float32, {"k": "v"})
    writer.copy_adapter(source, target, {"new": "ż"})
    before, after = read_header(source).metadata, read_header(target).metadata
    assert after == before | {"new": "ż"}
    assert after["sshs_model_hash"] == hash_of_tensors(target.read_bytes())
    original, copied = load_file(source), load_file(target)
    assert original.keys() == copied.keys()
    assert all(torch.equal(original[name], copied[name]) for name in original)


@pytest.mark.parametrize(
    ("request_name", "file_format"), [("stop", "kohya"), ("save", "diffusers")]
)
def test_a_run_can_be_saved_after_its_first_step(tiny_run, monkeypatch, request_name, file_format):
    run = tiny_run(
        {
            "training.learning_rate": 1e-6,
            "saving.dialects": [file_format],
            "adapter.rank": 4,
            "adapter.alpha": 1.0,
        }
    )
    folder, real_step = run_folder.create(run), loop.optimizer_step

    def step_and_request(*arguments):
        result = real_step(*arguments)
        run_requests.request(folder, request_name)
        return result

    monkeypatch.setattr(loop, "optimizer_step", step_and_request)
    run_in(folder)
    status = run_status.read_status(folder)
    assert status.state == {"stop": "stopped", "save": "finished"}[request_name], status.message
    assert 1 in [saved.step for saved in status.adapters]


def test_a_finished_run_leaves_a_file_with_its_description(train_tiny):
    folder = train_tiny({"training.text_encoder_learning_rate": 1e-3, "dataset.trigger": "zorbit"})
    file = folder / run_status.read_status(folder).finished.file
    tensors = load_file(file)
    keys = {name.rsplit(".lora_", 1)[0].removesuffix(".alpha") for name in tensors}
    assert keys == set(GOLDEN_UNET + GOLDEN_TEXT)
    weights = [tensor for name, tensor in tensors.items() if not name.endswith("alpha")]
    assert {weight.dtype for weight in weights} == {torch.float16}
    description = describe(file)
    assert (description["rank"], description["alpha"], description["trigger"]) == (
        "2",
        "4",
        "zorbit",
    )
    assert description["modules"] == "32 in the UNet, 8 in the text encoder"
