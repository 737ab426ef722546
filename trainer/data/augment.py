"""How else a picture and its caption can be seen: cut elsewhere, mirrored, in other colours, in other words.

Pure functions: whatever is random comes from the draws that are handed over.
"""

import random
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from trainer import config
from trainer.config import RunConfig
from trainer.data.buckets import Crop, apply_crop
from trainer.data.scan import with_trigger

_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")


@dataclass(frozen=True)
class Look:
    """What is done to a picture before the VAE sees it."""

    crop: Crop
    mirrored: bool = False
    colours: tuple[float, ...] = ()
    """Factors of brightness, contrast and saturation; empty where they stay."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the key of a cache entry; of a plain look those of its crop alone."""
        return asdict(self.crop) | {
            name: value for name, value in asdict(self).items() if value and name != "crop"
        }


def looks(crop: Crop, settings: config.Dataset, draws: random.Random) -> list[Look]:
    """Everything that is prepared of one picture, all of one size. The first is the plain one, which is also measured with."""
    found = [Look(crop)]
    if settings.random_crop or settings.colour_jitter:
        found += [_drawn(crop, settings, draws) for _ in range(settings.variants - 1)]
    return found + [mirrored(look) for look in found] if settings.flip else found


def _drawn(crop: Crop, settings: config.Dataset, draws: random.Random) -> Look:
    if settings.random_crop:
        crop = replace(
            crop,
            left=draws.randint(0, crop.scaled[0] - crop.bucket[0]),
            top=draws.randint(0, crop.scaled[1] - crop.bucket[1]),
        )
    strength = settings.colour_jitter
    return Look(
        crop,
        colours=tuple(draws.uniform(1 - strength, 1 + strength) for _ in range(3))
        if strength
        else (),
    )


def variants_per_image(run: RunConfig) -> int:
    """Returns how many versions of an image are cached at each resolution (see `augment.looks`)."""
    dataset = run.dataset
    return (dataset.variants if dataset.random_crop or dataset.colour_jitter else 1) * (
        2 if dataset.flip else 1
    )


def mirrored(look: Look) -> Look:
    """The same part of the picture; `crop` stays as it was before the mirroring."""
    return replace(look, mirrored=True)


def apply_look(image: Image.Image, look: Look) -> Image.Image:
    image = apply_crop(image, look.crop)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color),
        look.colours,
        strict=False,
    ):
        image = enhance(image).enhance(factor)
    return ImageOps.mirror(image) if look.mirrored else image


# Words


def vary_caption(wording: str, settings: config.Dataset, draws: random.Random | None) -> str:
    """The caption of one view. Without draws the plain one: the first line, the first choices, every tag in its place."""
    if not settings.captions_vary:
        return wording
    caption = wording
    if settings.caption_wildcards:
        lines = wording.split("\n")
        caption = draws.choice(lines) if draws else lines[0]
        while found := _CHOICE.search(caption):
            choices = found[1].split("|")
            caption = (
                caption[: found.start()]
                + (draws.choice(choices) if draws else choices[0])
                + caption[found.end() :]
            )
        caption = re.sub(r"\s+", " ", caption).strip()
    caption = with_trigger(caption, settings.trigger)
    if draws and (settings.shuffle_tags or settings.tag_dropout):
        tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
        kept, others = tags[: settings.keep_tags], tags[settings.keep_tags :]
        if settings.shuffle_tags:
            draws.shuffle(others)
        caption = ", ".join(
            kept + [tag for tag in others if draws.random() >= settings.tag_dropout]
        )
    return with_trigger(caption, settings.trigger)


def without_trigger(caption: str, settings: config.Dataset) -> str:
    """The caption of something like the subject: the words for its class in the place of the trigger, where there is one."""
    if not settings.trigger:
        return caption
    article = "" if settings.class_words else r"(?:\b(?:an?|the)\s+)?"  # which would be left alone
    trigger = rf"{article}(?<!\w){re.escape(settings.trigger)}(?!\w)"
    text = re.sub(trigger, lambda _: settings.class_words, caption, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip(" ,")
