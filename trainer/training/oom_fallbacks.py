"""What a run does when memory runs out: a fixed fallbacks of measures, each of which trades time for room.

The failed piece of work is done again from its beginning, at the same step and with the same draws. A measure that alters
numbers is written as an event, and a resumed run takes it again at the same place, so that it stays the run it was.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from trainer.config import RunConfig
from trainer.errors import OutOfMemory
from trainer.models.device import is_out_of_memory
from trainer.runs.events import Event, EventLog, MemoryRelieved, RolledBack
from trainer.training.estimate import VAE_TILES

T = TypeVar("T")

FREE, TILE, CHECKPOINT, SPLIT, EIGHT_BIT = (
    "free caches",
    "VAE tiling",
    "gradient checkpointing",
    "smaller microbatches",
    "8-bit optimiser",
)
FALLBACKS_BY_PHASE = {
    "load": (FREE,),
    "cache": (FREE, TILE),
    "step": (FREE, CHECKPOINT, SPLIT, EIGHT_BIT),
    "validate": (FREE, SPLIT),
    "sample": (FREE, TILE),
}
"""The measures that can help in each phase, in the order in which they are taken."""

SENTENCES = {
    FREE: "unused memory was given back",
    TILE: "the VAE works in slices and tiles from here on",
    CHECKPOINT: "gradient checkpointing is on from here on: slower, with far less memory",
    SPLIT: "each batch goes through the model in smaller pieces from here on; what a step learns from is the same",
    EIGHT_BIT: "the optimiser keeps its memory in 8 bits from here on, and begins it anew",
}


@dataclass
class Fallbacks:
    """The measures that a run has taken, by phase. `use` is told how to take one that needs the loaded model."""

    run: RunConfig
    log: EventLog
    replay: list[MemoryRelieved] = field(default_factory=list)
    """What earlier lives of the run took, to be taken again at the same step."""
    pieces: dict[str, int] = field(default_factory=lambda: {"step": 1, "validate": 1})
    """Into how many forward passes a microbatch is cut."""
    tiled: set[str] = field(default_factory=set)
    """Phases in which the VAE works in tiles."""
    use: Callable[[str], bool] = lambda rung: False
    """Takes a measure on the model or the optimiser; says whether that was possible."""

    def attempt(self, phase: str, step: int, work: Callable[[], T], largest: int = 1) -> T:
        """What `work` gives. Where memory runs out it is done again after each measure of the phase; raises OutOfMemory after the last.

        `largest` is the number of pictures in a forward pass, which cannot be cut into more pieces.
        """
        rungs = iter(FALLBACKS_BY_PHASE[phase])
        rung = ""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Only here, when the traceback has let go of the tensors that did not fit, can memory be given back.
            if not (rung == SPLIT and self._take(rung, phase, largest)):
                rung = next((r for r in rungs if self._take(r, phase, largest)), "")
            if not rung:
                raise OutOfMemory(advice(self.run)) from None
            release()
            self.log.append(
                MemoryRelieved(
                    step, phase, rung, f"Memory ran out ({phase}, step {step}): {SENTENCES[rung]}."
                )
            )

    def catch_up(self, phase: str, step: int) -> None:
        """Takes what an earlier life of the run had taken by this step."""
        for event in [e for e in self.replay if e.phase == phase and e.step <= step]:
            self.replay.remove(event)
            self._take(event.rung, phase, 2**30)

    def _take(self, rung: str, phase: str, largest: int) -> bool:
        """Whether the measure could be taken and may help."""
        if rung == FREE:
            self.use(rung)
            return True
        if rung == TILE:
            is_new = phase not in self.tiled
            self.tiled.add(phase)
            return is_new
        if rung == SPLIT:
            can_split = self.pieces[phase] < largest
            self.pieces[phase] *= 2 if can_split else 1
            return can_split
        return self.use(rung)


def earlier(events: Iterable[Event]) -> list[MemoryRelieved]:
    """The measures in a run's events. Where the run went back, those taken before count from the step that it went back to."""
    found: list[MemoryRelieved] = []
    for event in events:
        if isinstance(event, MemoryRelieved):
            found.append(event)
        elif isinstance(event, RolledBack):
            found = [replace(measure, step=min(measure.step, event.step)) for measure in found]
    return found


def set_tiling(vae: Any, tiled: bool) -> None:
    """The VAE on one picture after another, each in tiles of half its own side; or as it was.

    diffusers would take tiles as large as the pictures the VAE was made for, which leaves just those pictures whole.
    """
    for name in ("slicing", "tiling"):
        switch = getattr(vae, f"{'enable' if tiled else 'disable'}_{name}", None)
        if switch is not None:
            switch()
    side = vae.config.sample_size // VAE_TILES
    vae.tile_sample_min_size, vae.tile_latent_min_size = (
        side,
        side // 2 ** (len(vae.config.block_out_channels) - 1),
    )


def release() -> None:
    """Gives memory back that nothing uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def advice(run: RunConfig) -> str:
    """What is left to the person when every measure is taken."""
    side = run.dataset.resolution
    smaller = [f"dataset.resolution to {side * 3 // 4 // 64 * 64 or max(16, side // 2 // 8 * 8)}"]
    smaller += [f"adapter.rank to {run.adapter.rank // 2}"] if run.adapter.rank > 1 else []
    return (
        f"The device ran out of memory, and every measure against it is taken. Close other programs that use it, "
        f"or set {' or '.join(smaller)} in a new run; the last state is kept, and Resume goes on where there is more memory."
    )
