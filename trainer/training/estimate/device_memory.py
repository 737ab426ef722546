"""Memory of the training device at the peak of each phase (docs/estimates.md)."""

from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.data.scan import resolutions
from trainer.training.estimate.costs import Size, size_of
from trainer.training.estimate.parameters import trainable_parameters
from trainer.training.estimate.steps import images_per_pass

# Coefficients of every kind of model, read from the libraries' code.
LIBRARIES_BYTES = {"cuda": 0.7e9, "cpu": 0.9e9}
"""torch, its kernels and the context of the device."""
FRAGMENTATION = 1.08
"""Factor on activations for memory that the allocator cannot use."""
ADAPTER_BYTES = 16
"""Per trained parameter: weight, gradient and two moments of AdamW, all float32."""
ADAPTER_PARAMETERS_PER_MILLION = 200
"""Per rank, of a million parameters of the denoiser, as in the published models."""
TEXT_ENCODER_ACTIVATIONS = 0.4
"""Bytes of activations that a trained text encoder stores per parameter and image."""
INFERENCE_ACTIVATIONS = 12
"""As `Costs.activations`, without gradients."""
GUIDED_IMAGES = 2
"""Images in a forward pass of classifier-free guidance: with and without the prompt."""
VAE_ENCODE_MAPS, VAE_DECODE_MAPS = 5, 8
"""Float32 feature maps of full size and first width at the peak of the VAE."""
VAE_TILES = 2
"""Tiles along a side of an image of the VAE's own size."""
FLOAT32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.52}
"""Per weight. 4 bits include their scales, which are 8-bit (Dettmers et al. 2023,
arXiv:2305.14314)."""
PHASES = ("load", "cache", "step", "sample")


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device at the peak of each phase.

    On a CPU all parts of the model stay in the same memory.
    """

    load: float
    cache: float
    step: float
    sample: float

    @property
    def peak(self) -> float:
        return max(self.load, self.cache, self.step, self.sample)

    @property
    def worst(self) -> str:
        """The name of the phase that needs the most."""
        return max(PHASES, key=lambda phase: float(getattr(self, phase)))


def memory(run: RunConfig, device: str) -> Memory:
    """Returns the bytes at the peak of each phase on a "cuda" or "cpu" device.

    The sum of weights at their precision, the adapter with its optimiser, and activations, which
    grow with latent positions x width x images. Raises TrainerError if the base cannot be read.
    """
    size = size_of(run)
    weights = _weights(run, size, device)
    adapter = _adapter_parameters(run, size) * ADAPTER_BYTES
    libraries = LIBRARIES_BYTES[device]
    encoding, decoding = _vae_activations(run, size)
    activations = _step_activations(run, size, device)
    per_pixel = _bytes_per_pixel(run, size, device)
    denoising = GUIDED_IMAGES * INFERENCE_ACTIVATIONS * per_pixel * run.dataset.resolution**2
    sampling = max(denoising, decoding)
    if device == "cpu":
        everything = libraries + sum(weights.values())
        return Memory(
            load=everything,
            cache=everything + encoding,
            step=everything + adapter + activations,
            sample=everything + adapter + sampling,
        )
    # Without trained encoders and changing captions, all texts are encoded before the training.
    keeps_text_encoders = _trains_text(run) or run.dataset.captions_vary
    text = weights["text"] if keeps_text_encoders else 0
    resident = libraries + weights["denoiser"] + adapter
    return Memory(
        load=libraries,
        cache=libraries + max(weights["vae"] + encoding, weights["text"]),
        step=resident + text + activations,
        sample=resident + text + weights["vae"] + sampling,
    )


def _weights(run: RunConfig, size: Size, device: str) -> dict[str, float]:
    """Returns the bytes of the base's weights: "denoiser", "text" (encoders) and "vae"."""
    bytes_each = _bytes_per_weight(run, device)
    linear_bytes = QUANTIZED_BYTES.get(run.base.quantization, bytes_each)
    linear_share = size.costs.linear_share
    denoiser_bytes = linear_share * linear_bytes + (1 - linear_share) * bytes_each
    return {
        "denoiser": size.denoiser * denoiser_bytes,
        "text": size.text_encoders * bytes_each,
        "vae": size.parameters.get("vae", 0) * FLOAT32_BYTES,
    }


def _bytes_per_weight(run: RunConfig, device: str) -> int:
    default = BYTES["bf16"] if device == "cuda" else BYTES["fp32"]
    return BYTES.get(run.base.precision, default)


def _bytes_per_pixel(run: RunConfig, size: Size, device: str) -> float:
    """Returns the bytes per pixel of one activation of the denoiser's first level."""
    return size.width * _bytes_per_weight(run, device) * FRAGMENTATION / size.latent_step**2


def _vae_activations(run: RunConfig, size: Size) -> tuple[float, float]:
    """Returns the bytes for encoding an image and for decoding a sample, perhaps in tiles."""
    side = run.dataset.resolution
    tile = size.vae_side // VAE_TILES if run.sampling.vae_tiling else side
    feature_map = size.vae_width * FLOAT32_BYTES * FRAGMENTATION  # bytes per pixel
    encoding = VAE_ENCODE_MAPS * max(resolutions(run)) ** 2 * feature_map
    decoding = VAE_DECODE_MAPS * min(tile, side) ** 2 * feature_map
    return encoding, decoding


def _step_activations(run: RunConfig, size: Size, device: str) -> float:
    """Returns the bytes that a forward pass stores for the backward pass."""
    activations = size.costs.activations
    if run.training.gradient_checkpointing:
        activations = size.costs.activations_checkpointed
    pixels = max(resolutions(run)) ** 2
    trained_text = size.text_encoders if _trains_text(run) else 0
    per_image = activations * _bytes_per_pixel(run, size, device) * pixels
    per_image += trained_text * TEXT_ENCODER_ACTIVATIONS
    return images_per_pass(run) * per_image


def _trains_text(run: RunConfig) -> bool:
    rates = map(run.training.rate_of, ("text_encoder", "text_encoder_2"))
    return bool(run.adapter.trigger_vectors) or any(rates)


def _adapter_parameters(run: RunConfig, size: Size) -> float:
    """Counts the trained parameters, or guesses them if the base is not on this machine."""
    counted = trainable_parameters(run)
    if counted is not None:
        return counted
    return size.denoiser / 1e6 * ADAPTER_PARAMETERS_PER_MILLION * run.adapter.rank
