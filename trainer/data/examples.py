"""Pictures and captions made ready for training: cut, encoded, or found in the cache."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.config import RunConfig
from trainer.data import latent_cache
from trainer.data.augment import Look, looks, vary_caption
from trainer.data.images import open_alpha, open_image
from trainer.data.scan import DatasetItem, crop_of, held_out_count, resolutions
from trainer.errors import DatasetError, ModelError
from trainer.families import LoadedBase
from trainer.families.base import Conditioning, SizeIds
from trainer.models.seeds import generator_for, seed_for
from trainer.runs.events import Event, EventLog, Progress, Warned

BLACK = "its mask is black all over in the part that is seen. Paint what is to be learned white, or remove the mask."
MEASURED_WITHOUT_HOLD_OUT = (
    8  # training pictures that are measured where too few are there to keep some out
)


@dataclass(frozen=True)
class View:
    """One way to see a picture."""

    mean: Tensor
    """Of its latents, [C, h, w], unscaled."""
    std: Tensor
    size_ids: SizeIds
    mask: Tensor | None
    """How much each place counts, [1, h, w] in 0..1; None where all count alike."""


@dataclass(frozen=True)
class Example:
    """A picture at one resolution, ready for training."""

    name: str
    """Path relative to the dataset."""
    resolution: int
    caption: str
    """With the trigger word; of several wordings the first."""
    wording: str
    """All that its caption may become."""
    views: tuple[View, ...]
    """Of one shape. The first is the plain one."""
    repeats: int
    fingerprint: str
    """Changes when the picture, its views or its caption do."""

    @property
    def mean(self) -> Tensor:
        return self.views[0].mean


def make_examples(
    run: RunConfig,
    base: LoadedBase,
    items: Sequence[DatasetItem],
    root: Path,
    vae_hash: str,
    log: EventLog,
) -> list[Example]:
    """Every picture at every resolution; those that come to nothing at one of them are named. The VAE must be on its device."""
    report, found = throttled(log.append), []
    for done, item in enumerate(items):
        report(Progress("caching", done, len(items)))
        name = item.path.relative_to(root).as_posix()
        try:
            found += [
                _example(run, base, item, name, resolution, vae_hash)
                for resolution in resolutions(run)
            ]
        except DatasetError as error:
            log.append(Warned(f"{name} is left out: {error}"))
    log.append(Progress("caching", len(items), len(items)))
    if not found:
        raise DatasetError(
            f"No picture in {root} can be trained on; the warnings name each and say why."
        )
    return found


def _example(
    run: RunConfig, base: LoadedBase, item: DatasetItem, name: str, resolution: int, vae_hash: str
) -> Example:
    settings = run.dataset
    crop = crop_of(item, settings.model_copy(update={"resolution": resolution}))
    keys: list[str] = []
    views: list[View] = []
    for look in looks(crop, settings, random.Random(seed_for(run.training.seed, "looks", name))):
        key = latent_cache.latents_key(item.sha256, look.facts, vae_hash)
        latents = latent_cache.cached(key, partial(_encode, base.pipe.vae, item.path, look))
        if not all(torch.isfinite(tensor).all() for tensor in latents.values()):
            raise DatasetError(
                "the base turns it into numbers that are not finite. Save the picture anew, or leave it out."
            )
        mask_key, mask = _mask(run, item, look, latents["mean"].shape)
        if mask is not None and not mask.any():
            if views:
                continue  # a random cut may miss what is painted white
            raise DatasetError(BLACK)
        views.append(View(latents["mean"], latents["std"], size_ids(item, look), mask))
        keys.append(key + mask_key)
    caption = vary_caption(item.caption, settings, None)
    return Example(
        name,
        resolution,
        caption,
        item.caption,
        tuple(views),
        item.repeats,
        f"{' '.join(keys)}:{item.caption}",
    )


def _encode(vae: Any, path: Path, look: Look) -> dict[str, Tensor]:
    return latent_cache.encode_image(vae, latent_cache.to_pixels(path, look))


def size_ids(item: DatasetItem, look: Look) -> SizeIds:
    width, height = look.crop.bucket
    left = look.crop.scaled[0] - width - look.crop.left if look.mirrored else look.crop.left
    return item.height, item.width, look.crop.top, left, height, width


def _mask(
    run: RunConfig, item: DatasetItem, look: Look, shape: torch.Size
) -> tuple[str, Tensor | None]:
    """Its cache key and the mask."""
    kind, outside = run.dataset.masked_loss, run.dataset.mask_outside
    drawn = item.mask if kind == "mask" else None
    if kind == "off" or (kind == "mask" and drawn is None):
        return "", None
    key = latent_cache.mask_key(
        kind, latent_cache.file_hash(drawn) if drawn else item.sha256, look.facts
    )

    def make() -> dict[str, Tensor]:
        image = open_image(drawn)[0].convert("L") if drawn else open_alpha(item.path)
        return {"mask": mask_pixels(image, look, shape[1:])}

    return key, outside + (1 - outside) * latent_cache.cached(key, make)["mask"]


def mask_pixels(image: Image.Image, look: Look, size: Sequence[int]) -> Tensor:
    """The share of white under each latent, [1, h, w], of a grey picture of any size with the shape of the picture."""
    seen = latent_cache.apply_look(image, Look(look.crop, look.mirrored))
    height, width = size
    array = np.asarray(seen.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(array / 255).unsqueeze(0)


def hold_out(run: RunConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """The pictures to train on, and those to measure with: kept out where there are enough, else some of the same.

    A picture is kept out at every resolution, and measured at the first.
    """
    names = list(dict.fromkeys(example.name for example in examples))
    plain = {e.name: e for e in examples if e.resolution == run.dataset.resolution}
    count = held_out_count(run, len(names))
    order = torch.randperm(
        len(names), generator=generator_for(run.training.seed, "hold out")
    ).tolist()
    if count == 0:
        return examples, [plain[names[i]] for i in sorted(order[:MEASURED_WITHOUT_HOLD_OUT])]
    kept = {names[i] for i in order[:count]}
    return [e for e in examples if e.name not in kept], [
        plain[name] for name in names if name in kept
    ]


def encode_texts(
    base: LoadedBase, texts: Iterable[str], encoder_hash: str
) -> dict[str, Conditioning]:
    """The conditioning of each text, without a batch, from the cache where it is there."""
    return {text: _conditioning(base, text, encoder_hash) for text in dict.fromkeys(texts)}


def _conditioning(base: LoadedBase, caption: str, encoder_hash: str) -> Conditioning:
    @torch.no_grad()
    def make() -> Conditioning:
        made = {name: tensor[0] for name, tensor in base.encode([caption]).items()}
        if not all(torch.isfinite(tensor).all() for tensor in made.values()):
            raise ModelError(
                f"The base's text encoders give no finite numbers for {caption[:80]!r} in the number format of this run; "
                "use base.precision = fp32."
            )
        return made

    return latent_cache.cached(latent_cache.conditioning_key(caption, encoder_hash), make)


def throttled(append: Callable[[Event], Any], seconds: float = 0.5) -> Callable[[Event], None]:
    last = 0.0

    def report(event: Event) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            append(event)

    return report
