"""Bytes on the training device at the peak of each phase."""

import importlib.util
from dataclasses import dataclass

from trainer import config
from trainer.config import RunConfig
from trainer.data.scan import resolutions
from trainer.training.estimate.costs import (
    Size,
    size_of,
)
from trainer.training.estimate.parameters import (
    trainable_parameters,
)
from trainer.training.estimate.steps import (
    images_per_pass,
)

# Coefficients that hold for every kind. Assumed from the libraries' code; to be replaced by measurements.
LIBRARIES_BYTES = {"cuda": 0.7e9, "cpu": 0.9e9}  # torch, its kernels and the context of the device

FRAGMENTS = 1.08  # what the allocator cannot use, as a factor on activations

ADAPTER_BYTES = 16  # per parameter: weight, gradient and two moments of AdamW, all float32

TEXT_KEPT = 0.4  # bytes that a trained text encoder keeps per parameter and image

FORWARD_KEPT = 12  # as Costs.kept, where no gradient is wanted

VAE_ENCODE, VAE_DECODE = (
    5,
    8,
)  # feature maps of full size and first width (float32) alive at the peak

VAE_TILES = 2  # along a side of a picture of the VAE's own size, where it works tile by tile

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

QUANTIZED_BYTES = {
    "8bit": 1.0,
    "4bit": 0.52,
}  # with the scales of 4 bits, which are themselves in 8 (Dettmers et al. 2023, arXiv:2305.14314)


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device at the peak of each phase. On a CPU all parts stay in the same memory."""

    load: float
    cache: float
    step: float
    sample: float

    @property
    def peak(self) -> float:
        return max(self.load, self.cache, self.step, self.sample)

    @property
    def worst(self) -> str:
        return max(("load", "cache", "step", "sample"), key=lambda phase: getattr(self, phase))


def memory(run: RunConfig, device: str) -> Memory:
    """Bytes at the peak of each phase on a "cuda" or "cpu" device.

    Weights at their precision, 16 bytes per trained number, and activations that grow with latent positions x width x images
    (see COSTS). Raises TrainerError for a base that cannot be read.
    """
    size, training = size_of(run), run.training
    bytes_each = BYTES.get(run.base.precision, 2 if device == "cuda" else 4)
    linear = QUANTIZED_BYTES.get(run.base.quantization, bytes_each)
    linear_share = size.costs.linear_share
    per_weight = linear_share * linear + (1 - linear_share) * bytes_each
    weights = {
        "denoiser": size.denoiser * per_weight,
        "text": size.text_encoders * bytes_each,
        "vae": size.parameters.get("vae", 0) * 4,
    }
    side, largest = run.dataset.resolution, max(resolutions(run))
    per_pixel = size.width * bytes_each * FRAGMENTS / size.latent_step**2
    feature_map = size.vae_width * 4 * FRAGMENTS  # bytes by pixel
    tile = size.vae_side // VAE_TILES if run.sampling.vae_tiling else side
    encoding = VAE_ENCODE * largest**2 * feature_map
    decoding = VAE_DECODE * min(tile, side) ** 2 * feature_map
    kept = size.costs.kept_checkpointed if training.gradient_checkpointing else size.costs.kept
    learned = run.adapter.trigger_vectors or any(
        map(training.rate_of, ("text_encoder", "text_encoder_2"))
    )
    trained_text = size.text_encoders if learned else 0
    adapter = _adapter_parameters(run, size) * ADAPTER_BYTES
    base = LIBRARIES_BYTES[device]
    resident = base + weights["denoiser"] + adapter
    text = (
        weights["text"] if learned or run.dataset.captions_vary else 0
    )  # else all texts are encoded once
    activations = images_per_pass(run) * (kept * per_pixel * largest**2 + trained_text * TEXT_KEPT)
    drawing = max(2 * FORWARD_KEPT * per_pixel * side**2, decoding)
    if device == "cpu":
        everything = base + sum(weights.values())
        return Memory(
            everything,
            everything + encoding,
            everything + adapter + activations,
            everything + adapter + drawing,
        )
    return Memory(
        load=base,
        cache=base + max(weights["vae"] + encoding, weights["text"]),
        step=resident + text + activations,
        sample=resident + text + weights["vae"] + drawing,
    )


def _adapter_parameters(run: RunConfig, size: Size) -> float:
    """Counted where the base is here; else about rank x 200 per million parameters, as in the published models."""
    counted = trainable_parameters(run)
    return size.denoiser / 1e6 * 200 * run.adapter.rank if counted is None else counted


def fit(run: RunConfig, device: str, available: float) -> dict[str, object]:
    """The fewest changes, by dotted path, that bring a run under so many bytes; what costs no quality goes first.

    The batch that the optimiser sees stays the same: what a smaller batch takes away, accumulation gives back. Where even the last
    rung is too large all of them are returned; ask `memory` again.
    """
    changes: dict[str, object] = {}

    def needs() -> Memory:
        return memory(config.replace(run, changes), device)

    def fits() -> bool:
        return needs().peak <= available

    if not fits() and needs().worst == "sample":
        changes["sampling.vae_tiling"] = True
    if not fits() and run.base.precision == "fp32" and device == "cuda":
        changes["base.precision"] = "auto"
    if not fits() and not run.training.gradient_checkpointing:
        changes["training.gradient_checkpointing"] = True
    effective = run.training.batch_size * run.training.gradient_accumulation_steps
    batch = run.training.batch_size
    while not fits() and batch > 1:
        batch = max(n for n in range(1, batch) if effective % n == 0)
        changes |= {
            "training.batch_size": batch,
            "training.gradient_accumulation_steps": effective // batch,
        }
    if device == "cuda" and can_quantize(run):
        for how in ("8bit", "4bit"):
            if not fits():
                changes["base.quantization"] = how
    if not fits() and device == "cpu" and run.base.precision in ("auto", "fp32"):
        changes["base.precision"] = "bf16"
    return changes


def can_quantize(run: RunConfig) -> bool:
    """Whether the base may be held in fewer bits than it is."""
    is_here = importlib.util.find_spec("bitsandbytes") is not None
    return is_here and run.base.quantization == "none" and run.adapter.kind in ("lora", "rslora")
