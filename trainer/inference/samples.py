"""Generates images from seeded prompts, with adapters at any strength."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.config import Base
from trainer.families import LoadedBase, load_base
from trainer.families.base import PLAIN_READING, Conditioning, denoiser_of, size_multiple
from trainer.inference.request import SampleRequest, StackedAdapter
from trainer.inference.samplers import compatible_samplers, sampler_name
from trainer.lora.apply import Stack, WeightedAdapter
from trainer.lora.formats.reader import AdapterFile, read_adapter
from trainer.lora.textual_inversion import read_beside, with_embeddings
from trainer.models.cpu_threads import use_threads_for
from trainer.models.device import DTYPES, choose_device, choose_precision
from trainer.runs.atomic_files import atomic_write

__all__ = [
    "SampleRequest",
    "Sampler",
    "StackedAdapter",
    "generate",
    "sampler_name",
    "save_sample",
]


def generate(
    base: LoadedBase,
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    inference_steps: int,
    guidance_scale: float,
    width: int = 0,
    height: int = 0,
    sampler: str = "auto",
    texts: Mapping[str, Conditioning] | None = None,
) -> Image.Image:
    """Returns one image from a base that is on its device.

    `width` and `height` are rounded down to the base's smallest step. 0 is the size of the base.
    The noise is drawn on the CPU, so a seed gives the same noise on every device. If `texts`
    contains the encoded prompts, the text encoders may be on another device.
    """
    pipe = base.pipe
    choice = compatible_samplers(pipe)[sampler_name(pipe, sampler)]
    step = size_multiple(pipe)
    base_side = denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor
    width, height = (max(step, (side or base_side) // step * step) for side in (width, height))
    original = pipe.scheduler
    with torch.no_grad():
        # A new scheduler for each image: schedulers have state.
        pipe.scheduler = choice.scheduler.from_config(original.config, **choice.options)
        try:
            latents = pipe(
                **_prompt_arguments(base, prompt, negative_prompt, texts),
                width=width,
                height=height,
                num_inference_steps=inference_steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
            ).images
        finally:
            pipe.scheduler = original
        return _decode(pipe, latents)


def _decode(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """Returns the image of scaled latents.

    The pipeline does not decode them itself, because it would convert the VAE to the dtype of the
    denoiser. The VAE stays in float32.
    """
    config = pipe.vae.config
    latents = latents.to(pipe.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    images: list[Image.Image] = pipe.image_processor.postprocess(
        decoded, output_type="pil", do_denormalize=[True]
    )
    return images[0]


def _prompt_arguments(
    base: LoadedBase,
    prompt: str,
    negative_prompt: str,
    texts: Mapping[str, Conditioning] | None,
) -> dict[str, Any]:
    """Returns the prompts as arguments of the pipeline: as text, or encoded.

    They are encoded if `texts` contains them, or if the pipeline could not encode them as in
    training.
    """
    if texts is None and base.reading == PLAIN_READING:
        return {"prompt": prompt, "negative_prompt": negative_prompt or None}
    if texts is None:
        encoded = base.encode([prompt, negative_prompt])
    else:
        both = texts[prompt], texts[negative_prompt]
        encoded = {}
        for name in both[0]:
            encoded[name] = torch.stack([text[name] for text in both])
    arguments = {}
    for name, tensor in encoded.items():
        on_device = tensor.to(base.denoiser.device)
        arguments[name] = on_device[:1]
        arguments[f"negative_{name}"] = on_device[1:]
    return arguments


def save_sample(
    path: Path,
    image: Image.Image,
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    inference_steps: int,
    guidance_scale: float,
    sampler: str,
    note: str,
) -> None:
    """Writes a PNG with its settings in the format of A1111, which can then repeat the image."""
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    settings = (
        f"Steps: {inference_steps}, Sampler: {sampler}, CFG scale: {guidance_scale:g}, "
        f"Seed: {seed}, Size: {image.width}x{image.height}, RNG: CPU, {note}"
    )
    info = PngInfo()
    info.add_itxt("parameters", f"{prompt}\n{negative}{settings}")
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


class Sampler:
    """Generates samples, and keeps the base and the adapters in memory for the next one."""

    def __init__(self) -> None:
        self._base: tuple[Base, int] | None = None
        self._loaded: LoadedBase | None = None
        self._stack: Stack | None = None
        self._files: dict[tuple[str, int], AdapterFile] = {}
        """By path and time of the last change."""

    def render(self, request: SampleRequest) -> Path:
        """Generates the sample and writes it to its target. Raises TrainerError."""
        base = self._apply(self._load(request.base, request.caption_tokens), request.adapters)
        settings: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "inference_steps": request.inference_steps,
            "guidance_scale": request.guidance_scale,
        }
        image = generate(
            base, **settings, width=request.width, height=request.height, sampler=request.sampler
        )
        note = f"Model: {Path(request.base.model).name}"
        if request.adapters:
            names = [f"{Path(a.file).stem}: {a.strength:g}" for a in request.adapters]
            note += f", Lora: {', '.join(names)}"
        sampler = sampler_name(base.pipe, request.sampler)
        save_sample(Path(request.target), image, **settings, sampler=sampler, note=note)
        return Path(request.target)

    def _load(self, base: Base, caption_tokens: int) -> LoadedBase:
        if self._loaded is None or self._base != (base, caption_tokens):
            # Frees the memory of the old base before the new one is loaded.
            self._loaded = self._stack = None
            device = choose_device()
            dtype = DTYPES[choose_precision(base.precision, device)]
            loaded = load_base(base, dtype, caption_tokens)
            latent_side = denoiser_of(loaded.pipe).config.sample_size
            use_threads_for(loaded.denoiser, device, latent_side)
            loaded.pipe.to(device)
            self._base, self._loaded, self._stack = (base, caption_tokens), loaded, Stack(loaded)
        return self._loaded

    def _apply(self, base: LoadedBase, adapters: Sequence[StackedAdapter]) -> LoadedBase:
        """Returns the base with the adapters, and with the trigger embeddings beside their files.

        An adapter at strength 0 is not applied at all, so the result is identical to the base's.
        """
        weighted = []
        for adapter in adapters:
            text_strength = adapter.text_strength
            if text_strength is None:
                text_strength = adapter.strength
            file = self._read(Path(adapter.file))
            weighted.append(WeightedAdapter(file, adapter.strength, text_strength))
        assert self._stack, "loaded with the base"
        self._stack.apply(weighted)
        # Files that are no longer used are not kept.
        used = {id(adapter.file) for adapter in weighted}
        self._files = {key: file for key, file in self._files.items() if id(file) in used}
        active = [a.file.path for a in weighted if a.strength or a.text_strength]
        return with_embeddings(base, read_beside(active, base.family))

    def _read(self, path: Path) -> AdapterFile:
        key = (str(path.resolve()), path.stat().st_mtime_ns if path.exists() else 0)
        if key not in self._files:
            self._files[key] = read_adapter(path)
        return self._files[key]
