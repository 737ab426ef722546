"""Seeded prompts to pictures, with adapters at any strength. The same request gives the same picture."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError

from trainer.config import Base
from trainer.errors import ModelError, TrainerError
from trainer.families import LoadedBase, load_base
from trainer.families.base import PLAIN_READING, Conditioning, denoiser_of, pixel_step
from trainer.lora.apply import Stack, WeightedAdapter
from trainer.lora.formats.reader import AdapterFile, read_adapter
from trainer.lora.textual_inversion import put_on, read_beside
from trainer.models.device import DTYPES, choose_device, choose_precision
from trainer.runs.atomic_files import atomic_write

# By the names of A1111. Without a choice the first: a way through flow matching is nearly straight, and Euler's steps do; elsewhere
# DPM++ needs fewer.
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}
FLOW_SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Euler": (FlowMatchEulerDiscreteScheduler, {}),
    "Heun": (FlowMatchHeunDiscreteScheduler, {}),
}
ZERO_SNR = "rescale_betas_zero_snr"
"""What a schedule that ends in pure noise says in its settings; a sampler that does not take it would begin at another noise."""


@dataclass(frozen=True)
class StackedAdapter:
    file: str
    strength: float = 1.0
    text_strength: float | None = None
    """In the text encoders; None: as in the denoiser."""


@dataclass(frozen=True)
class SampleRequest:
    """One picture. A width or height of 0 is the base's own."""

    prompt: str
    target: str
    base: Base = Base()
    adapters: list[StackedAdapter] = field(default_factory=list)
    negative_prompt: str = ""
    seed: int = 1
    inference_steps: int = 20
    guidance_scale: float = 7.0
    width: int = 0
    height: int = 0
    sampler: str = "auto"
    caption_tokens: Literal[75, 150, 225] = 75
    """How much of the prompts is read: as much as of the captions that the adapter was trained on."""


def samplers_of(pipe: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Those that fit the base, by name; the first is taken where none is chosen."""
    if type(pipe.scheduler).__name__.startswith("FlowMatch"):
        return FLOW_SAMPLERS
    if not pipe.scheduler.config.get(ZERO_SNR):
        return SAMPLERS
    return {
        name: (kind, options)
        for name, (kind, options) in SAMPLERS.items()
        if ZERO_SNR in signature(kind.__init__).parameters
    }


def sampler_name(pipe: Any, wanted: str = "auto") -> str:
    """Raises ModelError for one that the base cannot use."""
    fitting = samplers_of(pipe)
    if wanted != "auto" and wanted not in fitting:
        raise ModelError(
            f"The sampler {wanted} does not fit this base. There are: {', '.join(fitting)}."
        )
    return next(iter(fitting)) if wanted == "auto" else wanted


@torch.no_grad()
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
    """One picture from a base on its device; sides are rounded down to whole latents, 0 is the base's own size.

    The noise is drawn on the CPU, so that a seed means the same everywhere. Where `texts` has the prompts encoded already, the text
    encoders may lie elsewhere.
    """
    pipe = base.pipe
    kind, options = samplers_of(pipe)[sampler_name(pipe, sampler)]
    own_scheduler = pipe.scheduler
    pipe.scheduler = kind.from_config(
        own_scheduler.config, **options
    )  # fresh: schedulers keep state
    step, own = pixel_step(pipe), denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor
    width, height = (max(step, (side or own) // step * step) for side in (width, height))
    try:
        latents = pipe(
            **read_prompts(base, prompt, negative_prompt, texts),
            width=width,
            height=height,
            num_inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).images
    finally:
        pipe.scheduler = own_scheduler
    # Decoded here, since the VAE stays in float32 while the denoiser may not.
    latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + (
        pipe.vae.config.shift_factor or 0
    )
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pil", do_denormalize=[True])[0]


def read_prompts(
    base: LoadedBase,
    prompt: str,
    negative_prompt: str,
    texts: Mapping[str, Conditioning] | None = None,
) -> dict[str, Any]:
    """The prompts as the pipeline takes them: as text, or encoded where that was done before, or is done as the pipeline does not know."""
    if texts is None and base.reading == PLAIN_READING:
        return {"prompt": prompt, "negative_prompt": negative_prompt or None}
    if texts is None:
        encoded = base.encode([prompt, negative_prompt])
    else:
        encoded = {
            name: torch.stack([each[name] for each in (texts[prompt], texts[negative_prompt])])
            for name in texts[prompt]
        }
    encoded = {name: tensor.to(base.denoiser.device) for name, tensor in encoded.items()}
    return {name: tensor[:1] for name, tensor in encoded.items()} | {
        f"negative_{name}": tensor[1:] for name, tensor in encoded.items()
    }


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
    """A PNG with its settings in A1111's text, so that the picture can be repeated there."""
    info = PngInfo()
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    info.add_itxt(
        "parameters",
        f"{prompt}\n{negative}Steps: {inference_steps}, Sampler: {sampler}, CFG scale: {guidance_scale:g}, Seed: {seed}, "
        f"Size: {image.width}x{image.height}, RNG: CPU, {note}",
    )
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


class Sampler:
    """Keeps the base and the adapters it has read, so that only the denoising is left to do for the next picture."""

    def __init__(self) -> None:
        self._base: tuple[Base, int] | None = None
        self._loaded: LoadedBase | None = None
        self._stack: Stack | None = None
        self._files: dict[tuple[str, int], AdapterFile] = {}
        """By path and time of the last change."""

    def render(self, request: SampleRequest) -> Path:
        """Makes the picture and writes it to its target. Raises TrainerError."""
        base = self._lay(self._load(request.base, request.caption_tokens), request.adapters)
        settings = {
            name: getattr(request, name)
            for name in ("prompt", "negative_prompt", "seed", "inference_steps", "guidance_scale")
        }
        image = generate(
            base, **settings, width=request.width, height=request.height, sampler=request.sampler
        )
        names = ", ".join(f"{Path(a.file).stem}: {a.strength:g}" for a in request.adapters)
        note = f"Model: {Path(request.base.model).name}" + (f", Lora: {names}" if names else "")
        save_sample(
            Path(request.target),
            image,
            **settings,
            sampler=sampler_name(base.pipe, request.sampler),
            note=note,
        )
        return Path(request.target)

    def _load(self, base: Base, caption_tokens: int) -> LoadedBase:
        if self._loaded is None or self._base != (base, caption_tokens):
            self._loaded = self._stack = None  # the old one goes before the new one comes
            device = choose_device()
            loaded = load_base(
                base, DTYPES[choose_precision(base.precision, device)], caption_tokens
            )
            loaded.pipe.to(device)
            self._base, self._loaded, self._stack = (base, caption_tokens), loaded, Stack(loaded)
        return self._loaded

    def _lay(self, base: LoadedBase, adapters: list[StackedAdapter]) -> LoadedBase:
        """The base with the adapters, and with the trigger's embedding where one lies beside.

        A strength of 0 is left out altogether, so that it gives the base to the bit.
        """
        layers = []
        for adapter in adapters:
            text_strength = (
                adapter.strength if adapter.text_strength is None else adapter.text_strength
            )
            layers.append(
                WeightedAdapter(self._read(Path(adapter.file)), adapter.strength, text_strength)
            )
        assert self._stack, "loaded with the base"
        self._stack.apply(layers)
        self._files = {
            key: file
            for key, file in self._files.items()
            if any(file is layer.file for layer in layers)
        }  # no more than in use
        return put_on(
            base,
            read_beside(
                (layer.file.path for layer in layers if layer.strength or layer.text_strength),
                base.family,
            ),
        )

    def _read(self, path: Path) -> AdapterFile:
        key = (str(path.resolve()), path.stat().st_mtime_ns if path.exists() else 0)
        if key not in self._files:
            self._files[key] = read_adapter(path)
        return self._files[key]


def parse_request(data: Any) -> SampleRequest:
    """Raises ModelError naming what is wrong with a request."""
    try:
        return TypeAdapter(SampleRequest).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(
            f"The sample cannot be made: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None


def serve(requests: TextIO = sys.stdin, replies: TextIO = sys.stdout) -> None:
    """Answers one JSON request a line with one JSON reply a line, until the input ends."""
    sampler = Sampler()
    for line in requests:
        started = time.monotonic()
        try:
            reply = {
                "file": str(sampler.render(parse_request(json.loads(line)))),
                "seconds": round(time.monotonic() - started, 2),
            }
        except TrainerError as error:
            reply = {"error": str(error)}
        except torch.OutOfMemoryError:
            reply = {
                "error": (
                    "The device has too little free memory for this picture. Choose a smaller size, or wait until the training is done."
                )
            }
        except (ValueError, RuntimeError, OSError) as error:
            print(f"preview failed: {error!r}", file=sys.stderr, flush=True)
            reply = {
                "error": f"The picture could not be made: {(str(error).splitlines() or ['unknown error'])[0][:200]}"
            }
        print(json.dumps(reply), file=replies, flush=True)
