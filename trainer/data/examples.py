"""Training examples: images and captions that are cropped and encoded, or read from the cache."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.data import latent_cache
from trainer.data.augment import ImageView, image_views, vary_caption
from trainer.data.images import open_alpha, open_image
from trainer.data.scan import DatasetItem, crop_of, held_out_count, resolutions
from trainer.errors import DatasetError, ModelError
from trainer.families import LoadedBase
from trainer.families.base import Conditioning, SizeIds
from trainer.models.seeds import generator_for, seed_for
from trainer.runs.events import Event, EventLog, Progress, Warned

BLACK_MASK = (
    "its mask is entirely black in the part that is seen. Paint the parts to learn white, or "
    "remove the mask."
)
VALIDATED_TRAINING_IMAGES = 8  # training images validated if the dataset is too small to split


@dataclass(frozen=True)
class View:
    """One encoded view of an image."""

    mean: Tensor
    """Mean of the latents, [C, h, w], unscaled."""
    std: Tensor
    """Standard deviation of the latents, [C, h, w], unscaled."""
    size_ids: SizeIds
    mask: Tensor | None
    """Weight of each latent in the loss, [1, h, w] in 0..1; None if all count alike."""


@dataclass(frozen=True)
class Example:
    """An image at one resolution, ready for training."""

    name: str
    """Path relative to the dataset."""
    resolution: int
    caption: str
    """The plain caption, with the trigger word."""
    wording: str
    """All wordings of the caption, from which each step takes one (`augment.vary_caption`)."""
    views: tuple[View, ...]
    """All of one shape. The first is the plain one."""
    repeats: int
    fingerprint: str
    """Changes if the image, its views or its caption change."""

    @property
    def mean(self) -> Tensor:
        """The latents of the plain view."""
        return self.views[0].mean


def make_examples(
    run: RunConfig,
    base: LoadedBase,
    items: Sequence[DatasetItem],
    root: Path,
    vae_hash: str,
    log: EventLog,
) -> list[Example]:
    """Returns every image at every resolution. The VAE must be on its device.

    An image that fails at one resolution is left out at all of them, with a warning. Raises
    `DatasetError` if no image remains.
    """
    report = throttled(log.append)
    examples: list[Example] = []
    for done, item in enumerate(items):
        report(Progress("caching", done, len(items)))
        name = item.path.relative_to(root).as_posix()
        try:
            examples += [
                _make_example(run, base, item, name, resolution, vae_hash)
                for resolution in resolutions(run)
            ]
        except DatasetError as error:
            log.append(Warned(f"{name} is left out: {error}"))
    log.append(Progress("caching", len(items), len(items)))
    if not examples:
        raise DatasetError(
            f"No image in {root} can be trained on; the warnings give the reason for each."
        )
    return examples


def _make_example(
    run: RunConfig, base: LoadedBase, item: DatasetItem, name: str, resolution: int, vae_hash: str
) -> Example:
    settings = run.dataset
    crop = crop_of(item, settings.model_copy(update={"resolution": resolution}))
    # "looks" is the position's old name: another word would change the crops of old runs.
    rng = random.Random(seed_for(run.training.seed, "looks", name))
    keys: list[str] = []
    views: list[View] = []
    for view in image_views(crop, settings, rng):
        key = latent_cache.latents_key(item.sha256, view.cache_key, vae_hash)
        latents = latent_cache.cached(key, partial(_encode, base.pipe.vae, item, view))
        if not all(torch.isfinite(tensor).all() for tensor in latents.values()):
            raise DatasetError(
                "the VAE encodes it to values that are not finite. Save the image again, or leave "
                "it out."
            )
        mask_key, mask = _cached_mask(run, item, view, latents["mean"].shape)
        if mask is not None and not mask.any():
            if views:
                continue  # a random crop may miss the white part of the mask
            raise DatasetError(BLACK_MASK)
        views.append(View(latents["mean"], latents["std"], size_ids(item, view), mask))
        keys.append(key + mask_key)
    return Example(
        name,
        resolution,
        vary_caption(item.caption, settings, None),
        item.caption,
        tuple(views),
        item.repeats,
        f"{' '.join(keys)}:{item.caption}",
    )


def _encode(vae: Any, item: DatasetItem, view: ImageView) -> dict[str, Tensor]:
    return latent_cache.encode_image(vae, latent_cache.to_pixels(item.path, view))


def size_ids(item: DatasetItem, view: ImageView) -> SizeIds:
    """Returns SDXL's size conditioning: original size, crop position, and target size."""
    crop = view.crop
    width, height = crop.bucket
    left = crop.scaled[0] - width - crop.left if view.mirrored else crop.left
    return item.height, item.width, crop.top, left, height, width


def _cached_mask(
    run: RunConfig, item: DatasetItem, view: ImageView, shape: torch.Size
) -> tuple[str, Tensor | None]:
    """Returns the cache key and the mask for latents of a shape, or ("", None) without a mask."""
    kind, outside = run.dataset.masked_loss, run.dataset.mask_outside
    file = item.mask if kind == "mask" else None
    if kind == "off" or (kind == "mask" and file is None):
        return "", None
    source = latent_cache.file_hash(file) if file else item.sha256
    key = latent_cache.mask_key(kind, source, view.cache_key)

    def make() -> dict[str, Tensor]:
        image = open_image(file)[0].convert("L") if file else open_alpha(item.path)
        return {"mask": latent_cache.to_mask(image, view, (shape[1], shape[2]))}

    return key, outside + (1 - outside) * latent_cache.cached(key, make)["mask"]


def hold_out(run: RunConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Splits the examples into those to train on and the validation set.

    An image of the validation set is trained at no resolution, and validated at the first. If the
    dataset is too small to split, all images are trained, and some of them are validated.
    """
    names = list(dict.fromkeys(example.name for example in examples))
    at_first = {e.name: e for e in examples if e.resolution == run.dataset.resolution}
    count = held_out_count(run, len(names))
    rng = generator_for(run.training.seed, "hold out")
    order = torch.randperm(len(names), generator=rng).tolist()
    if count == 0:
        chosen = sorted(order[:VALIDATED_TRAINING_IMAGES])
        return examples, [at_first[names[i]] for i in chosen]
    held_out = {names[i] for i in order[:count]}
    trained = [example for example in examples if example.name not in held_out]
    return trained, [at_first[name] for name in names if name in held_out]


# Captions


def encode_texts(
    base: LoadedBase, texts: Iterable[str], encoder_hash: str
) -> dict[str, Conditioning]:
    """Returns the conditioning of each text, without a batch dimension, from the cache if possible.

    Raises `ModelError` if a text encoder returns values that are not finite.
    """
    return {text: _conditioning(base, text, encoder_hash) for text in dict.fromkeys(texts)}


def _conditioning(base: LoadedBase, caption: str, encoder_hash: str) -> Conditioning:
    def make() -> Conditioning:
        with torch.no_grad():
            encoded = {name: tensor[0] for name, tensor in base.encode([caption]).items()}
        if not all(torch.isfinite(tensor).all() for tensor in encoded.values()):
            raise ModelError(
                f"The base's text encoders return values that are not finite numbers for "
                f"{caption[:80]!r} in the number format of this run; use base.precision = fp32."
            )
        return encoded

    return latent_cache.cached(latent_cache.conditioning_key(caption, encoder_hash), make)


# Progress


def throttled(append: Callable[[Event], Any], seconds: float = 0.5) -> Callable[[Event], None]:
    """Returns a function that appends an event at most once per `seconds` and drops the others."""
    last = 0.0

    def report(event: Event) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            append(event)

    return report
