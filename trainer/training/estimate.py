"""What a run will take: steps, parameters, bytes and time, worked out before it starts and without torch.

The trainer uses the very same functions, so that what the page says is what happens.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from trainer import config
from trainer.config import Adapter, RunConfig
from trainer.data.images import IMAGE_SUFFIXES
from trainer.data.splits import held_out_count, looks_per_image, resolutions
from trainer.errors import ConfigError, ModelError
from trainer.lora import targets
from trainer.models.model_files import T5_PARTS, BaseFiles, inspect, locate
from trainer.models.safetensors_header import TensorInfo
from trainer.runs import run_status

TOKEN_TABLE = "token_embedding"  # of CLIP, in every layout of its weights
FILE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def total_steps(run: RunConfig, views: int) -> int:
    """Optimiser steps of a run whose training pictures count `views` per pass (repeats included)."""
    training = run.training
    if training.steps:
        return training.steps
    return max(
        1,
        math.ceil(
            views
            * training.views_per_picture
            / (training.batch_size * training.gradient_accumulation_steps)
        ),
    )


def steps_for(run: RunConfig, repeats: Sequence[int]) -> int:
    """Optimiser steps for a dataset, those held out not counted; `repeats` of each picture. Which are held out is drawn later."""
    trained = 1 - held_out_count(run, len(repeats)) / max(1, len(repeats))
    return total_steps(run, round(sum(repeats) * trained) * len(resolutions(run)))


def save_steps(total: int, saves: int) -> list[int]:
    """The steps after which the adapter is saved: `saves` equal parts, the last one at the end."""
    return sorted({max(1, round(total * part / saves)) for part in range(1, saves + 1)})


def trainable_parameters(run: RunConfig) -> int | None:
    """All weights of the adapter; None where the base is not on this machine yet. Raises ConfigError where a setting fits no module."""
    parts = parameters_by_component(run)
    return None if parts is None else sum(parts.values()) + trigger_parameters(run)


def parameters_by_component(run: RunConfig) -> dict[str, int] | None:
    """Weights of the adapter: {"unet": ..., "text_encoder": ...}; None where the base is not on this machine yet.

    Raises ConfigError where a setting fits no module.
    """
    folder = locate(run.base)
    if folder is None:
        return None
    base, training = inspect(folder, run.base.t5), run.training
    parts = [
        part for part in (base.denoiser, *base.trainable_text_encoders) if training.rate_of(part)
    ]
    shapes = {part: targets.projections(base.tensors[part]) for part in parts}
    targets.check_names(run.adapter, shapes)
    return {part: adapter_parameters(run.adapter, part, base.tensors[part]) for part in parts}


def trigger_parameters(run: RunConfig) -> int:
    """Numbers of the trigger word's vectors, where they are learned; 0 also where the base is not on this machine yet."""
    folder = locate(run.base) if run.adapter.trigger_vectors else None
    if folder is None:
        return 0
    base = inspect(folder, run.base.t5)
    tables = [
        info
        for part in base.trainable_text_encoders
        for name, info in base.tensors[part].items()
        if TOKEN_TABLE in name
    ]
    return run.adapter.trigger_vectors * sum(table.shape[1] for table in tables)


def base_parameters(base: BaseFiles, component: str) -> int:
    return sum(info.numel for info in base.tensors[component].values())


def adapter_parameters(adapter: Adapter, component: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Of one component: for LoRA rank x (inputs + outputs) for each adapted projection (Hu et al. 2021, section 4.1)."""
    chosen = targets.choose_targets(adapter, component, targets.projections(tensors))
    return sum(targets.adapter_parameters(adapter, target) for target in chosen)


def file_bytes(run: RunConfig) -> int | None:
    """Size of the finished file, its header of some kilobytes not counted."""
    parameters = trainable_parameters(run)
    return None if parameters is None else parameters * FILE_BYTES[run.saving.precision]


def disk_bytes(run: RunConfig) -> float:
    """What a run will write: its states (three at a time), adapters, samples and cache. A little too much rather than too little."""
    try:
        parameters = trainable_parameters(run) or 0
    except ModelError:  # told where the base is loaded
        parameters = 0
    pictures = sum(
        path.suffix.lower() in IMAGE_SUFFIXES for path in Path(run.dataset.folder).rglob("*")
    )
    area, saves = run.dataset.resolution**2, run.saving.saves + 1
    seen = looks_per_image(run) * sum(side**2 for side in resolutions(run))
    states = (
        3 * 4 * parameters * (3 + (1 if run.training.ema_decay else 0))
    )  # weights and two moments in float32
    adapters = saves * parameters * FILE_BYTES[run.saving.precision]
    cached = pictures * (
        seen / 64 * 16 * 2 * 4 + 2 * 77 * 4096 * 4
    )  # latents of up to 16 channels, embeddings of up to 4096 numbers
    return states + adapters + saves * max(2, len(run.sampling.prompts)) * area * 3 + cached + 2**22


def measured_seconds_per_step(run: RunConfig, runs: Iterable[Path]) -> float | None:
    """Seconds per step of the latest run with the same base, size and batch on this machine; None without one."""
    for folder in runs:
        try:
            other = config.load(folder / "run.toml")
        except ConfigError:
            continue
        if _speed_key(other) == _speed_key(run):
            speed = run_status.read_status(folder).seconds_per_step
            if speed is not None:
                return speed
    return None


def _speed_key(run: RunConfig) -> Sequence[object]:
    training = run.training
    return (
        run.base,
        resolutions(run),
        passes_per_image(run),
        training.batch_size,
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        training.activation_offload,
        training.rate_of("text_encoder") > 0,
        training.rate_of("text_encoder_2") > 0,
        run.adapter.trigger_vectors > 0,
        training.learning_rate > 0,
        training.devices,
    )


@dataclass(frozen=True)
class Costs:
    """What one image costs in a kind of model, in units that do not depend on its size.

    Counted with torch's flop counter and saved-tensor hooks on the full-size models; the parameters are those of the published ones,
    for a model that is not on this machine yet.
    """

    kept: float
    """Numbers that a training step keeps per latent position and channel of the denoiser's first level."""
    kept_checkpointed: float
    """The same with gradient checkpointing, at the peak."""
    operations: float
    """Of a LoRA step, per latent position and parameter of the denoiser (a multiply-add is two)."""
    operations_checkpointed: float
    parameters: dict[str, float]
    width: int
    linear_share: float
    """Of the denoiser's weights, those in linear layers: only these can be kept in 8 or 4 bits."""
    vae_side: int
    """Pixels along a side of the pictures that the VAE was made for."""
    latent_step: int = 8
    """Pixels per latent position along a side."""
    named: tuple[str, ...] = ()
    """Words, one of which is in the name of a model of this kind; without any it is the kind of all other names."""


COSTS = {
    "StableDiffusionPipeline": Costs(
        305, 80, 0.51, 0.68, {"unet": 860e6, "text_encoder": 123e6, "vae": 84e6}, 320, 0.31, 512
    ),
    "StableDiffusion3Pipeline": Costs(
        154,
        15,
        0.71,
        0.99,
        {
            "transformer": 2243e6,
            "text_encoder": 123e6,
            "text_encoder_2": 695e6,
            "text_encoder_3": 4762e6,
            "vae": 84e6,
        },
        1536,
        1.0,
        1024,
        named=("stable-diffusion-3", "sd3"),
    ),
    "StableDiffusionXLPipeline": Costs(
        535,
        58,
        0.35,
        0.47,
        {"unet": 2567e6, "text_encoder": 123e6, "text_encoder_2": 695e6, "vae": 84e6},
        320,
        0.87,
        1024,
        named=("xl",),
    ),
}
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
VAE_WIDTH = 128
VAE_TILES = 2  # along a side of a picture of the VAE's own size, where it works tile by tile
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
QUANTIZED_BYTES = {
    "8bit": 1.0,
    "4bit": 0.52,
}  # with the scales of 4 bits, which are themselves in 8 (Dettmers et al. 2023, arXiv:2305.14314)
OPERATIONS_PER_SECOND = {
    "cuda": 25e12,
    "cpu": 5e10,
}  # what a step reaches on a middling card, and on one core; only until a step was measured
STEP_OVERHEAD = {"cuda": 0.12, "cpu": 0.12}  # seconds


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


@dataclass(frozen=True)
class Size:
    """The base model in numbers."""

    costs: Costs
    parameters: dict[str, float]
    """By component."""
    width: int
    latent_step: int
    vae_side: int
    vae_width: int = VAE_WIDTH

    @property
    def denoiser(self) -> float:
        return self.parameters.get("unet", 0) + self.parameters.get("transformer", 0)

    @property
    def text_encoders(self) -> float:
        return sum(
            count for part, count in self.parameters.items() if part.startswith("text_encoder")
        )


def size_of(run: RunConfig) -> Size:
    """Measured from the tensor headers; for a model that is not on this machine, that of its kind, told by its name."""
    folder = locate(run.base)
    if folder is None:
        costs = COSTS[kind_by_name(run.base.model)]
        parameters = {
            part: count
            for part, count in costs.parameters.items()
            if run.base.t5 or part not in T5_PARTS
        }
        return Size(costs, parameters, costs.width, costs.latent_step, costs.vae_side)
    return _measured_size(inspect(folder, run.base.t5))


def kind_by_name(model: str) -> str:
    """The pipeline of a model that is not on this machine."""
    found = (
        pipeline
        for pipeline, costs in COSTS.items()
        if any(word in model.lower() for word in costs.named)
    )
    return next(found, "StableDiffusionPipeline")


def _measured_size(base: BaseFiles) -> Size:
    costs = COSTS[base.pipeline]
    counted = {
        part: float(sum(info.numel for info in tensors.values()))
        for part, tensors in base.tensors.items()
    }
    levels = base.configs["vae"].get("block_out_channels") or [VAE_WIDTH] * 4
    denoiser = base.configs.get("transformer") or base.configs.get("unet") or {}
    widths = denoiser.get("block_out_channels") or [costs.width]
    if "transformer" in base.configs:
        widths = [int(denoiser["num_attention_heads"]) * int(denoiser["attention_head_dim"])]
    side = base.configs["vae"].get("sample_size", costs.vae_side)
    return Size(costs, counted, int(widths[0]), 2 ** (len(levels) - 1), int(side), int(levels[0]))


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


def images_per_pass(run: RunConfig) -> int:
    """Pictures in a forward pass of one device: several cut a microbatch where they cannot deal out whole ones (`World.shares`)."""
    training = run.training
    pieces = training.devices // math.gcd(training.devices, training.gradient_accumulation_steps)
    return math.ceil(training.batch_size / pieces)


def passes_per_image(run: RunConfig) -> int:
    """Of a step, each forward and backward: of the picture, its class picture, and its caption without the trigger."""
    return 1 + bool(run.dataset.regularisation_folder) + bool(run.objective.prior_preservation)


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


def expected_seconds_per_step(run: RunConfig, device: str, cores: int = 1) -> float:
    """A first guess from counted operations, good to a factor of two or three; only until a step was measured."""
    size, training = size_of(run), run.training
    each = (
        size.costs.operations_checkpointed
        if training.gradient_checkpointing
        else size.costs.operations
    )
    positions = fmean(side**2 for side in resolutions(run)) / size.latent_step**2
    passes, images = (
        training.gradient_accumulation_steps * passes_per_image(run),
        training.batch_size,
    )
    operations = each * positions * size.denoiser * images * passes
    speed = OPERATIONS_PER_SECOND[device] * (max(1, cores) ** 0.8 if device == "cpu" else 1)
    return (operations / speed + STEP_OVERHEAD[device] * passes) / training.devices
