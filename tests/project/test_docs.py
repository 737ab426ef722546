"""Numbers and file names in the docs, checked against the program and the public configurations."""

import re
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from trainer import config
from trainer.config import presets
from trainer.lora import targets
from trainer.models.pipelines import DENOISERS, PIPELINES
from trainer.models.safetensors_header import TensorInfo
from trainer.models.single_file import template_config
from trainer.training import estimate

PAGE = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
MODELS = {
    "sd15": "Stable Diffusion 1.5",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "Stable Diffusion XL",
    "sd3m": "Stable Diffusion 3 Medium",
    "sd35m": "Stable Diffusion 3.5 Medium",
    "sd35l": "Stable Diffusion 3.5 Large",
}
PARTS = {**DENOISERS, "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
PUBLISHED = {  # counted by others in the published files
    ("sd15", "unet"): 859_520_964,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd21", "unet"): 865_910_724,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
}
BY_HAND = {
    ("sd15", "unet"): 16 * 2 * 4,  # transformer blocks x attentions x projections
    ("sd15", "text_encoder"): 12 * 4,  # layers x projections
    ("sd21", "unet"): 16 * 2 * 4,
    ("sdxl", "unet"): 70 * 2 * 4,
    ("sd3m", "transformer"): 24 * 8 - 1,  # two streams; the last block returns no text
    ("sd35m", "transformer"): 24 * 8 - 1 + 13 * 4,  # and a second attention in thirteen blocks
    ("sd35l", "transformer"): 38 * 8 - 1,
}


def trained_parts(model):
    """Returns the parts that can have an adapter, the denoiser first."""
    pipeline = template_config(model, "model_index.json")["_class_name"]
    return [part for part in PIPELINES[pipeline] if part in PARTS]


@cache
def weights(model, part):
    """Returns the shape of each weight of a full-size part, without allocating it."""
    library, name = template_config(model, "model_index.json")[part]
    settings = template_config(model, f"{part}/config.json")
    with torch.device("meta"):
        if library == "diffusers":
            module = getattr(diffusers, name).from_config(settings)
        else:
            kind = getattr(transformers, name)
            module = kind(kind.config_class.from_dict(settings))
    return {name: TensorInfo("F16", tuple(p.shape)) for name, p in module.named_parameters()}


def numbers(model, part):
    return sum(info.numel for info in weights(model, part).values())


def adapter_of(model, part, rank):
    return estimate.adapter_parameters(
        config.Adapter(rank=rank, alpha=rank), part, weights(model, part)
    )


@pytest.mark.parametrize(
    "model, part", [(model, part) for model in MODELS for part in trained_parts(model)]
)
def test_table_of_modules_and_parameters(model, part):
    chosen = targets.choose_targets(
        config.Adapter(), part, targets.projections(weights(model, part))
    )
    ranks = " | ".join(f"{adapter_of(model, part, rank):,}" for rank in (4, 8, 16, 32))
    row = (
        f"| {MODELS[model]} | {PARTS[part]} | {numbers(model, part):,} | {len(chosen)} | {ranks} |"
    )
    assert row in PAGE
    assert PUBLISHED.get((model, part)) in (None, numbers(model, part))
    assert BY_HAND.get((model, part)) in (None, len(chosen))


@pytest.mark.parametrize("model", MODELS)
def test_table_of_fractions_and_file_sizes(model):
    denoiser, *encoders = trained_parts(model)
    cells = []
    for rank in (4, 8, 16, 32):
        alone = adapter_of(model, denoiser, rank)
        whole = alone + sum(adapter_of(model, part, rank) for part in encoders)
        share = f"{100 * alone / numbers(model, denoiser):.3f} %"
        cells.append(f"{share}, {alone * 2 / 1e6:.1f} MB, {whole * 2 / 1e6:.1f} MB")
    row = f"| {MODELS[model]} | {' | '.join(cells)} |"
    assert row in PAGE


def test_module_counts_in_the_text():
    assert f"{BY_HAND['sd15', 'unet']} of them" in PAGE
    assert f"{BY_HAND['sd15', 'text_encoder']} in its text encoder" in PAGE


@pytest.mark.parametrize(
    "kind, label", [("lora", "LoRA, rsLoRA"), ("dora", "DoRA"), ("loha", "LoHa"), ("lokr", "LoKr")]
)
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_table_of_the_other_adapter_kinds(model, kind, label):
    counts = [
        estimate.adapter_parameters(
            config.Adapter(kind=kind, rank=8, alpha=8, targets=choice),
            "unet",
            weights(model, "unet"),
        )
        for choice in targets.DENOISER
    ]
    cells = " | ".join(f"{count:,}, {count * 2 / 1e6:.1f} MB" for count in counts)
    assert f"| {MODELS[model]} | {label} | {cells} |" in PAGE


@pytest.mark.parametrize("name", ["subject", "character", "object", "style"])
def test_the_guide_lists_the_presets(name):
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    preset = presets.load_preset(f"sd15-{name}")
    assert re.search(rf"^\| {preset.title} \| [^|]+ \| {preset.pictures} \|$", guide, re.MULTILINE)


@pytest.mark.parametrize("page", ["lora.md", "guide.md", "architecture.md", "formats.md"])
def test_every_named_source_file_exists(page):
    root = Path(__file__).parents[2]
    for path in re.findall(
        r"`((?:tests|trainer|app|benchmarks)/[\w/.]+\.py)`",
        (root / "docs" / page).read_text(encoding="utf-8"),
    ):
        assert (root / path).is_file(), path
