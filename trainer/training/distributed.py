"""Several processes that train as one: what each does of a step, how their gradients become one, and how they stay together.

Every process holds the whole model. The microbatches of a step are a list that does not depend on the number of processes; each takes
its share, the gradients are summed, and all take the same optimiser step, so that their weights stay equal. The first process ("rank 0")
alone writes; the others wait for it where it must be alone, on a connection of the CPU's that has hours of patience and notices at once
when a process ends. The device's collectives are entered only when all have arrived, so that their short patience is never tried.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import ConfigError, ProcessLost

PATIENCE = timedelta(
    hours=24
)  # with rank 0, which may be caching a large dataset; a process that ends is noticed at once
TEXT_BYTES = 4096


@dataclass(frozen=True)
class World:
    """The processes of a training as one of them sees it; by itself there is one, and nothing here does anything."""

    rank: int = 0
    size: int = 1
    of_devices: Any = None
    """The process group that sums the gradients; None: the default one, of the CPUs."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shares(self, microbatches: int) -> list[tuple[int, int, int]]:
        """What this process does of a step: (microbatch, piece, pieces) each.

        Whole microbatches where they can be dealt out evenly; else each is cut into as few pieces as that takes.
        """
        pieces = self.size // math.gcd(self.size, microbatches)
        every = [(part, piece, pieces) for part in range(microbatches) for piece in range(pieces)]
        return every[self.rank :: self.size]

    def check(self, batch_size: int, microbatches: int) -> None:
        """Raises ConfigError where a step has too few pictures to be shared."""
        if self.size > batch_size * microbatches:
            raise ConfigError(
                f"{self.size} processes cannot share a step of {batch_size * microbatches} pictures; start fewer, or raise "
                "training.batch_size or training.gradient_accumulation_steps."
            )

    def agree(self, value: bool) -> bool:
        """The value of rank 0, known to all. Waits until all have asked. Raises ProcessLost."""
        if self.size == 1:
            return value
        return bool(self._from_main(torch.tensor([int(value)]))[0])

    def agree_on_text(self, text: str) -> str:
        """The text of rank 0, up to 4096 bytes of UTF-8."""
        if self.size == 1:
            return text
        content = text.encode("utf-8")
        said = torch.zeros(TEXT_BYTES + 1, dtype=torch.int64)
        said[0] = len(content)
        said[1 : 1 + len(content)] = torch.tensor(list(content), dtype=torch.int64)
        heard = self._from_main(said).tolist()
        return bytes(heard[1 : 1 + heard[0]]).decode("utf-8")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block while the others wait; then they do, and find what it left on the disk."""
        if not self.is_main:
            self.meet()
        yield
        if self.is_main:
            self.meet()

    def meet(self) -> None:
        """Waits until all processes have come here. Raises ProcessLost."""
        if self.size > 1:
            with self._all_there():
                dist.barrier()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: Tensor) -> Tensor:
        """Puts the sum over all processes into every gradient, and returns the sum of the losses. Raises ProcessLost.

        One buffer: all gradients (float32) in the order of the parameters, whether each is there, and the loss. A parameter without a
        gradient in any process has none afterwards, as in a training by one process, where the optimiser then leaves it alone.
        """
        if self.size == 1:
            return loss
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
        flat = torch.cat([*(_gradient(p).reshape(-1) for p in parameters), there, loss.reshape(1)])
        self.meet()
        with self._all_there():
            dist.all_reduce(flat, group=self.of_devices)
        *sums, there, total = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
        for parameter, summed, count in zip(parameters, sums, there.tolist(), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(
                    summed.view_as(parameter)
                )  # in its own memory, which a CUDA graph knows
            elif count:
                parameter.grad = summed.view_as(parameter).clone()
        return total[0]

    def _from_main(self, values: Tensor) -> Tensor:
        with self._all_there():
            dist.broadcast(values, 0)
        return values

    @contextmanager
    def _all_there(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what every backend raises when a connection closes
            raise ProcessLost(
                f"One of the {self.size} processes of this training ended; what it said is in the log. "
                "The state is kept; press Resume to go on from there."
            ) from error


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def join() -> World:
    """Joins the processes that torchrun or accelerate started, as told by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Nothing else is read: no configuration that `accelerate config` left on the machine. Raises ConfigError.
    """
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"There are {torch.cuda.device_count()} GPUs here, too few for process {local + 1} of this machine. "
            "Start as many processes as there are GPUs (training.devices)."
        )
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=PATIENCE)
    if on_gpu:
        torch.cuda.set_device(local)
    return World(rank, size, dist.new_group(backend="nccl") if on_gpu else None)
