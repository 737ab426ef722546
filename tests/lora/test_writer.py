"""The file: exact keys, exact effect in a fresh pipeline, metadata that other programs read."""

import base64
import hashlib
import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer import config
from trainer.cli.describe import describe
from trainer.errors import ModelError
from trainer.families import FAMILIES, load_base
from trainer.lora import export, inject, writer
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import read_adapter
from trainer.lora.metadata import metadata_for, metadata_of_tool
from trainer.models.safetensors_header import read_header
from trainer.runs import run_folder, run_requests, run_status
from trainer.training import loop
from trainer.training.runner import run_in

FAMILY = FAMILIES["sd1"]
UNET_BLOCKS = (
    "down_blocks_0_attentions_0",
    "mid_block_attentions_0",
    "up_blocks_1_attentions_0",
    "up_blocks_1_attentions_1",
)
GOLDEN_UNET = [
    f"lora_unet_{block}_transformer_blocks_0_{attention}_{projection}"
    for block in UNET_BLOCKS
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out_0")
]
GOLDEN_TEXT = [
    f"lora_te_text_model_encoder_layers_{layer}_self_attn_{projection}"
    for layer in (0, 1)
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
]


def trained_base(tiny_base, parts, **adapter):
    """A base with an adapter whose weights are random, as if trained."""
    base = load_base(config.Base(model=str(tiny_base)), torch.float32)
    components = {part: getattr(base.pipe, part) for part in parts}
    generator = torch.Generator().manual_seed(3)
    for part, module in components.items():
        inject.inject(
            module,
            part,
            config.Adapter(**({"rank": 3, "alpha": 5.0} | adapter)),
            seed=1,
        )
        for parameter in inject.trainable(module).values():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return base, components


def lora(name, down, up, scale):
    return AdaptedModule(
        "unet", name, "lora", {"lora_down.weight": down, "lora_up.weight": up}, scale
    )


def predict(pipe):
    with torch.no_grad():
        embeds = FAMILY.encode_prompts(pipe, ["a red star, żółć"])["prompt_embeds"]
        return pipe.unet(
            torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            400,
            encoder_hidden_states=embeds.expand(2, -1, -1),
        ).sample


@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder"), ("text_encoder",)])
def test_the_keys_are_the_golden_list(tiny_base, parts):
    _, components = trained_base(tiny_base, parts)
    tensors = export.to_kohya(inject.adapted_modules(components), FAMILY, torch.float16)
    golden = (GOLDEN_UNET if "unet" in parts else []) + (
        GOLDEN_TEXT if "text_encoder" in parts else []
    )
    assert set(tensors) == {
        f"{key}.{end}" for key in golden for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert all(
        float(t) == 5.0 and t.shape == () for name, t in tensors.items() if name.endswith("alpha")
    )


@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder")])
@pytest.mark.parametrize("rank, alpha", [(3, 5.0), (4, 4.0), (2, 1.0)])
def test_a_fresh_diffusers_pipeline_does_what_was_trained(tiny_base, tmp_path, parts, rank, alpha):
    base, components = trained_base(tiny_base, parts, rank=rank, alpha=alpha)
    trained = predict(base.pipe)
    path = tmp_path / "a.safetensors"
    writer.save_adapter(
        path, "kohya", list(inject.adapted_modules(components)), FAMILY, torch.float32, {}
    )
    fresh = FAMILY.pipeline_class.from_pretrained(
        tiny_base, safety_checker=None, requires_safety_checker=False
    )
    plain = predict(fresh)
    fresh.load_lora_weights(str(path))
    assert (trained - plain).norm() > 0.05 * plain.norm()
    torch.testing.assert_close(predict(fresh), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 2.0, -1.0])
def test_strength_scales_delta_w(tiny_base, tmp_path, strength):
    """At strength s every weight is W + s delta W; checked against weights merged by hand."""
    base, components = trained_base(tiny_base, ("unet",))
    merged = load_base(config.Base(model=str(tiny_base)), torch.float32)
    for module in inject.adapted_modules(components):
        merged.pipe.unet.get_submodule(module.name).weight.data += strength * module.delta
    loaded = load_base(config.Base(model=str(tiny_base)), torch.float32)
    loaded.pipe.load_lora_weights(
        export.to_kohya(inject.adapted_modules(components), FAMILY, torch.float32), adapter_name="x"
    )
    loaded.pipe.set_adapters(["x"], [strength])
    torch.testing.assert_close(predict(loaded.pipe), predict(merged.pipe), rtol=0, atol=2e-5)


def test_scales_that_vary_are_folded_into_one_alpha():
    def module(rank, scale):
        return lora(f"block.{rank}", torch.ones(rank, 3), torch.ones(2, rank), scale)

    modules = [module(2, 3.0), module(4, 0.25)]
    tensors = export.to_kohya(modules, FAMILY, torch.float32)
    assert {float(t) for name, t in tensors.items() if name.endswith("alpha")} == {6.0}
    for wanted in modules:
        key = FAMILY.kohya_key("unet", wanted.name)
        delta = (
            6.0
            / wanted.rank
            * tensors[f"{key}.lora_up.weight"]
            @ tensors[f"{key}.lora_down.weight"]
        )
        torch.testing.assert_close(delta, wanted.delta)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-3, 1.0])
def test_fp16_holds_the_adapter_of_the_first_steps_too(tmp_path, dialect, size):
    """B is about as large as the learning rate then, and fp16 has no number between 0 and 6e-8."""
    draws = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 32, generator=draws) / 5, size * torch.randn(32, 4, generator=draws)
    modules = [lora("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", down, up, 0.25)]
    writer.save_adapter(
        tmp_path / "young.safetensors", dialect, modules, FAMILIES["sd1"], torch.float16, {}
    )
    assert writer.verify(tmp_path / "young.safetensors", modules)


@pytest.mark.parametrize("wish, dialect", [("stop", "kohya"), ("save", "diffusers")])
def test_a_run_can_be_stopped_and_saved_after_its_first_step(tiny_run, monkeypatch, wish, dialect):
    run = tiny_run(
        {
            "training.learning_rate": 1e-6,
            "saving.dialects": [dialect],
            "adapter.rank": 4,
            "adapter.alpha": 1.0,
        }
    )
    folder, taken = run_folder.create(run), loop.optimizer_step
    monkeypatch.setattr(
        loop, "optimizer_step", lambda *given: (taken(*given), run_requests.request(folder, wish))[0]
    )
    run_in(folder)
    status = run_status.read_status(folder)
    assert status.state == ("stopped" if wish == "stop" else "finished"), status.message
    assert 1 in [saved.step for saved in status.adapters]


def test_no_number_that_is_not_finite_is_saved(tmp_path):
    broken = lora("x", torch.ones(1, 2), torch.full((2, 1), float("nan")), 1.0)
    too_large = lora("x", torch.ones(1, 2), torch.full((2, 1), 1e6), 1.0)
    for module in (broken, too_large):
        with pytest.raises(ModelError, match="not finite"):
            writer.save_adapter(
                tmp_path / "a.safetensors", "kohya", [module], FAMILY, torch.float16, {}
            )
    assert not list(tmp_path.iterdir())


def metadata(run):
    return metadata_for(
        run,
        FAMILY,
        modules=[lora("conv_in", torch.ones(16, 3, 1, 1), torch.ones(2, 16, 1, 1), 1.0)],
        step=6,
        total_steps=6,
        sizes=[(512, 512), (512, 512), (640, 448)],
        captions=["a red star, night", "a red star"],
        base_hash="abc",
        prediction_type="epsilon",
        started=1.0,
        finished=2.0,
    )


def test_metadata_is_what_other_programs_read():
    run = config.replace(
        config.RunConfig(),
        {
            "dataset.folder": "/home/someone/secret",
            "dataset.trigger": "zorbit",
            "sampling.prompts": ["private words"],
            "preset": "embedded-subject",
        },
    )
    values = metadata(run)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in values.items())
    assert (
        values["ss_base_model_version"] == "sd_v1"
        and values["ss_network_module"] == "networks.lora"
        and values["ss_network_dim"] == "16"
    )
    assert (
        values["modelspec.architecture"] == "stable-diffusion-v1/lora"
        and values["modelspec.trigger_phrase"] == "zorbit"
        and values["atelier_preset_hash"]
    )
    everything = json.dumps(values)
    assert not any(word in everything for word in ("secret", "someone", "private words", "night"))
    assert json.loads(values["ss_bucket_info"])["buckets"]["1"] == {
        "resolution": [640, 448],
        "count": 1,
    }
    assert (
        json.loads(values["ss_network_args"]) == {"conv_dim": "16"}
        and values["ss_num_train_images"] == "3"
    )


def test_each_field_is_told_only_where_the_person_says_so(monkeypatch):
    """Captions, folders, settings: three switches; the home folder is never in."""
    monkeypatch.setenv("HOME", "/home/someone")
    run = config.replace(
        config.RunConfig(),
        {
            "dataset.folder": "/home/someone/pics/secret",
            "base.model": "/home/someone/models/mine",
            "sampling.prompts": ["private words"],
        },
    )

    def told(**switches):
        return metadata(
            config.replace(
                run, {f"saving.include_{name}": value for name, value in switches.items()}
            )
        )

    captions = told(captions=True)
    assert json.loads(captions["ss_tag_frequency"]) == {"dataset": {"a red star": 2, "night": 1}}
    assert "private words" in captions["atelier_config"] and "secret" not in json.dumps(captions)
    folders = told(folders=True)
    assert (
        json.loads(folders["ss_dataset_dirs"]) == {"secret": {"n_repeats": 1, "img_count": 3}}
        and "ss_tag_frequency" not in folders
    )
    settings = json.loads(folders["atelier_config"])
    assert (settings["dataset"]["folder"], settings["base"]["model"]) == (
        "~/pics/secret",
        "~/models/mine",
    )
    assert "atelier_config" in told() and "atelier_config" not in told(config=False)
    for values in (captions, folders, told()):
        assert "someone" not in json.dumps(values)


def test_the_settings_in_the_file_repeat_the_run():
    run = config.replace(config.RunConfig(), {"adapter.rank": 7})
    assert config.from_dict(json.loads(metadata(run)["atelier_config"])) == run


def test_the_hash_is_of_the_bytes_after_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    writer.save_adapter(
        path,
        "kohya",
        [lora("x", torch.ones(1, 3), torch.ones(2, 1), 1.0)],
        FAMILY,
        torch.float32,
        {"k": "v"},
    )
    content = path.read_bytes()
    body = content[8 + struct.unpack("<Q", content[:8])[0] :]
    assert read_header(path).metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert oct(path.stat().st_mode & 0o777) == "0o644"


def test_a_finished_run_leaves_files_that_say_what_they_are(train_tiny):
    folder = train_tiny({"training.text_encoder_learning_rate": 1e-3, "dataset.trigger": "zorbit"})
    file = folder / run_status.read_status(folder).finished.file
    tensors = load_file(file)
    assert {name.rsplit(".lora_", 1)[0].removesuffix(".alpha") for name in tensors} == set(
        GOLDEN_UNET + GOLDEN_TEXT
    )
    assert all(
        t.dtype == torch.float16 for name, t in tensors.items() if not name.endswith("alpha")
    )
    facts = describe(file)
    assert (
        facts["rank"] == "2"
        and facts["alpha"] == "4"
        and facts["trigger"] == "zorbit"
        and facts["modules"] == "32 in the UNet, 8 in the text encoder"
    )


def test_what_is_no_adapter_is_refused(tmp_path, tiny_base):
    with pytest.raises(ModelError, match="is not a LoRA"):
        read_adapter(tiny_base / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {"lora_unet_a.lora_up.weight": torch.tensor([[float("inf")]])}, tmp_path / "inf.safetensors"
    )
    with pytest.raises(ModelError, match="not finite"):
        read_adapter(tmp_path / "inf.safetensors")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_thumbnail_of_the_save_is_in_the_file_where_it_is_wanted(train_tiny, wanted):
    folder = train_tiny({"saving.include_thumbnail": wanted})
    status = run_status.read_status(folder)
    finished = folder / status.finished.file
    saved = folder / next(
        adapter.file for adapter in status.adapters if adapter.step == status.finished.file_step
    )
    thumbnail = read_header(finished).metadata.get("modelspec.thumbnail", "")
    assert "modelspec.thumbnail" not in read_header(saved).metadata and bool(thumbnail) == wanted
    plain, shown = load_file(saved), load_file(finished)
    assert plain.keys() == shown.keys() and all(
        torch.equal(plain[name], shown[name]) for name in plain
    )
    assert describe(finished)  # and every reader of ours still knows it
    if wanted:
        kind, _, content = thumbnail.partition(",")
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        sample = next(
            sample for sample in status.samples if sample.step == status.finished.file_step
        )
        assert (
            kind == "data:image/jpeg;base64"
            and picture.format == "JPEG"
            and not picture.info.get("exif")
        )
        drawn = Image.open(folder / sample.file).convert("RGB")
        rough = [
            np.asarray(image.resize((4, 4), Image.Resampling.BOX), float)
            for image in (picture, drawn)
        ]  # JPEG blurs colours
        assert picture.size == drawn.size and abs(rough[0] - rough[1]).max() < 6
        hashed = finished.read_bytes()
        digest = hashlib.sha256(hashed[8 + struct.unpack("<Q", hashed[:8])[0] :]).hexdigest()
        assert read_header(finished).metadata["sshs_model_hash"] == digest
        modules = read_adapter(finished).modules
        assert "modelspec.thumbnail" not in metadata_of_tool(
            "other", modules, [read_adapter(finished)], FAMILY
        )
