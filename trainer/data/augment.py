"""Variants of an image and its caption: other crops, mirrored, other colours, other wordings.

All functions are pure: random ones take their random generator as an argument.
"""

import random
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from trainer import config
from trainer.config import RunConfig
from trainer.data.buckets import Crop, apply_crop
from trainer.data.captions import with_trigger

_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


# Images


@dataclass(frozen=True)
class ImageView:
    """How an image is cut and changed before the VAE encodes it."""

    crop: Crop
    mirrored: bool = False
    """Mirrors the part that `crop` cuts out."""
    colours: tuple[float, ...] = ()
    """Factors of brightness, contrast and saturation; empty for no change."""

    @property
    def cache_key(self) -> dict[str, Any]:
        """The part of a cache key that identifies this view. A plain view's is its crop's."""
        changes = {name: value for name, value in asdict(self).items() if value and name != "crop"}
        return asdict(self.crop) | changes


def image_views(crop: Crop, settings: config.Dataset, rng: random.Random) -> list[ImageView]:
    """Returns every view of an image that is prepared, all of one size.

    The first is the plain one, which validation uses.
    """
    views = [ImageView(crop)]
    if settings.random_crop or settings.colour_jitter:
        views += [_random_view(crop, settings, rng) for _ in range(settings.variants - 1)]
    if settings.flip:
        views += [mirror(view) for view in views]
    return views


def variants_per_image(run: RunConfig) -> int:
    """Returns how many views of an image `image_views` prepares at each resolution."""
    dataset = run.dataset
    variants = dataset.variants if dataset.random_crop or dataset.colour_jitter else 1
    return 2 * variants if dataset.flip else variants


def _random_view(crop: Crop, settings: config.Dataset, rng: random.Random) -> ImageView:
    if settings.random_crop:
        left = rng.randint(0, crop.scaled[0] - crop.bucket[0])
        top = rng.randint(0, crop.scaled[1] - crop.bucket[1])
        crop = replace(crop, left=left, top=top)
    strength = settings.colour_jitter
    if not strength:
        return ImageView(crop)
    colours = tuple(rng.uniform(1 - strength, 1 + strength) for _ in _ENHANCERS)
    return ImageView(crop, colours=colours)


def mirror(view: ImageView) -> ImageView:
    """Returns the mirrored view of the same part of the image."""
    return replace(view, mirrored=True)


def apply_view(image: Image.Image, view: ImageView) -> Image.Image:
    """Returns the image as the VAE sees it."""
    image = apply_crop(image, view.crop)
    for enhancer, factor in zip(_ENHANCERS, view.colours, strict=False):
        image = enhancer(image).enhance(factor)
    return ImageOps.mirror(image) if view.mirrored else image


# Captions


def vary_caption(wording: str, settings: config.Dataset, rng: random.Random | None) -> str:
    """Returns the caption of one training step from all its wordings.

    Without a random generator it is the plain caption: the first line, the first choices, and all
    tags in order.
    """
    if not settings.captions_vary:
        return wording
    caption = _choose_wording(wording, rng) if settings.caption_wildcards else wording
    caption = with_trigger(caption, settings.trigger)
    if rng and (settings.shuffle_tags or settings.tag_dropout):
        caption = _vary_tags(caption, settings, rng)
    return with_trigger(caption, settings.trigger)


def _choose_wording(wording: str, rng: random.Random | None) -> str:
    """Chooses one line, and one of each `{a|b}`, innermost first."""
    lines = wording.split("\n")
    caption = rng.choice(lines) if rng else lines[0]
    while match := _CHOICE.search(caption):
        choices = match[1].split("|")
        choice = rng.choice(choices) if rng else choices[0]
        caption = caption[: match.start()] + choice + caption[match.end() :]
    return re.sub(r"\s+", " ", caption).strip()


def _vary_tags(caption: str, settings: config.Dataset, rng: random.Random) -> str:
    """Shuffles and drops tags, except the first `keep_tags`."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, others = tags[: settings.keep_tags], tags[settings.keep_tags :]
    if settings.shuffle_tags:
        rng.shuffle(others)
    return ", ".join(fixed + [tag for tag in others if rng.random() >= settings.tag_dropout])


def without_trigger(caption: str, settings: config.Dataset) -> str:
    """Returns the caption for something like the subject: class words replace the trigger word.

    Without class words the trigger is removed, together with its article.
    """
    if not settings.trigger:
        return caption
    article = "" if settings.class_words else r"(?:\b(?:an?|the)\s+)?"
    trigger = rf"{article}(?<!\w){re.escape(settings.trigger)}(?!\w)"
    text = re.sub(trigger, lambda _: settings.class_words, caption, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip(" ,")
