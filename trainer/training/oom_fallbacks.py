"""Fallbacks against out-of-memory, each of which trades time for memory.

When memory runs out, the work is repeated from its beginning, at the same step and with the same
random draws. A fallback that changes numbers is written as an event, and a resumed run applies it
again at the same step, so it gives the same adapter.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from trainer.config import RunConfig
from trainer.errors import OutOfMemory
from trainer.models.device import is_out_of_memory
from trainer.runs.events import Event, EventLog, MemoryRelieved, RolledBack
from trainer.training.estimate import VAE_TILES

T = TypeVar("T")

# The names are written into events, so they must not change.
FREE = "free caches"
TILE = "VAE tiling"
CHECKPOINT = "gradient checkpointing"
SPLIT = "smaller microbatches"
EIGHT_BIT = "8-bit optimiser"

FALLBACKS_BY_PHASE = {
    "load": (FREE,),
    "cache": (FREE, TILE),
    "step": (FREE, CHECKPOINT, SPLIT, EIGHT_BIT),
    "validate": (FREE, SPLIT),
    "sample": (FREE, TILE),
}
"""The fallbacks that can help in each phase, in the order in which they are tried."""

DESCRIPTIONS = {
    FREE: "unused memory was released",
    TILE: "from now on the VAE works in slices and tiles",
    CHECKPOINT: "from now on gradient checkpointing is on: slower, with far less memory",
    SPLIT: (
        "from now on each batch goes through the model in smaller pieces; "
        "a step still learns from the same images"
    ),
    EIGHT_BIT: "from now on the optimiser stores its moments in 8 bits, and they start at zero",
}
UNLIMITED = 2**30  # images in a forward pass, for a fallback that is applied again


@dataclass
class Fallbacks:
    """The fallbacks that a run has applied, by phase."""

    run: RunConfig
    log: EventLog
    replay: list[MemoryRelieved] = field(default_factory=list)
    """Fallbacks from before the run was resumed, to be applied again at the same step."""
    pieces: dict[str, int] = field(default_factory=lambda: {"step": 1, "validate": 1})
    """Forward passes into which a batch is split."""
    tiled: set[str] = field(default_factory=set)
    """Phases in which the VAE works in tiles."""
    apply_to_model: Callable[[str], bool] = lambda fallback: False
    """Applies a fallback to the loaded model or optimiser; returns whether that was possible."""

    def attempt(self, phase: str, step: int, work: Callable[[], T], images: int = 1) -> T:
        """Returns the result of `work`, repeated after each fallback if memory runs out.

        `images` is the number of images in a forward pass, which limits the pieces. Raises
        OutOfMemory when no fallback is left.
        """
        remaining = iter(FALLBACKS_BY_PHASE[phase])
        fallback = ""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of `except`: there the traceback still holds the tensors that did not fit.
            fallback = self._next(fallback, remaining, phase, images)
            if not fallback:
                raise OutOfMemory(advice(self.run)) from None
            release_memory()
            description = f"Memory ran out ({phase}, step {step}): {DESCRIPTIONS[fallback]}."
            self.log.append(MemoryRelieved(step, phase, fallback, description))

    def catch_up(self, phase: str, step: int) -> None:
        """Applies again what the run had applied by this step before it was resumed."""
        due = [event for event in self.replay if event.phase == phase and event.step <= step]
        for event in due:
            self.replay.remove(event)
            self._apply(event.rung, phase, UNLIMITED)

    def _next(self, last: str, remaining: Iterator[str], phase: str, images: int) -> str:
        """Applies the next fallback and returns its name, or "" if none is left."""
        # A batch may be split again and again.
        if last == SPLIT and self._apply(SPLIT, phase, images):
            return SPLIT
        for fallback in remaining:
            if self._apply(fallback, phase, images):
                return fallback
        return ""

    def _apply(self, fallback: str, phase: str, images: int) -> bool:
        """Applies a fallback. Returns whether it may help."""
        if fallback == FREE:
            self.apply_to_model(fallback)
            return True
        if fallback == TILE:
            is_new = phase not in self.tiled
            self.tiled.add(phase)
            return is_new
        if fallback == SPLIT:
            if self.pieces[phase] >= images:
                return False
            self.pieces[phase] *= 2
            return True
        return self.apply_to_model(fallback)


def earlier_fallbacks(happened: Iterable[Event]) -> list[MemoryRelieved]:
    """Returns the fallbacks in a run's events.

    After a rollback, fallbacks of later steps count from the step to which the run went back.
    """
    found: list[MemoryRelieved] = []
    for event in happened:
        if isinstance(event, MemoryRelieved):
            found.append(event)
        elif isinstance(event, RolledBack):
            found = [replace(each, step=min(each.step, event.step)) for each in found]
    return found


def set_tiling(vae: Any, tiled: bool) -> None:
    """Makes the VAE process one image after another in tiles of half its own side, or undoes that.

    diffusers' default tile is as large as the images that the VAE was made for, and so saves
    nothing on them.
    """
    for name in ("slicing", "tiling"):
        switch = getattr(vae, f"{'enable' if tiled else 'disable'}_{name}", None)
        if switch is not None:
            switch()
    levels = len(vae.config.block_out_channels)
    side = vae.config.sample_size // VAE_TILES
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // 2 ** (levels - 1)


def release_memory() -> None:
    """Returns unused memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def advice(run: RunConfig) -> str:
    """Returns what the user can do when no fallback is left."""
    changes = [f"dataset.resolution to {_smaller_resolution(run.dataset.resolution)}"]
    if run.adapter.rank > 1:
        changes.append(f"adapter.rank to {run.adapter.rank // 2}")
    return (
        "The device ran out of memory, and no fallback is left. Close other programs that use it, "
        f"or set {' or '.join(changes)} in a new run. The last checkpoint is kept, so you can "
        "also resume where there is more memory."
    )


def _smaller_resolution(side: int) -> int:
    """Returns three quarters of a resolution as a multiple of 64, or half of a small one."""
    return side * 3 // 4 // 64 * 64 or max(16, side // 2 // 8 * 8)
