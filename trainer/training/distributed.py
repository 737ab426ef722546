"""Distributed training: several processes that take the steps of one.

Every process holds the whole model. The microbatches of a step do not depend on the number of
processes; each process takes its share, the gradients are summed, and all take the same optimiser
step, so their weights stay equal. Only rank 0 writes files.

The other ranks wait for rank 0 on a CPU connection (gloo) with a timeout of hours, which reports
at once if a process ends. The collectives of the devices (NCCL) start only when all processes have
arrived, so their short timeout never expires.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import ConfigError, ProcessLost

TIMEOUT = timedelta(hours=24)
"""How long other ranks wait for rank 0, which may be caching a large dataset."""
MAX_TEXT_BYTES = 4096
"""The limit of a path in Linux."""


@dataclass(frozen=True)
class World:
    """The processes of a training, seen from one of them. By default there is one."""

    rank: int = 0
    size: int = 1
    device_group: "dist.ProcessGroup | None" = None
    """The process group that sums gradients. None: the default group, on the CPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shares(self, microbatches: int) -> list[tuple[int, int, int]]:
        """Returns this process's part of a step as (microbatch, piece, pieces).

        Microbatches stay whole if they can be distributed evenly. Otherwise each is split into as
        few pieces as needed.
        """
        pieces = self.size // math.gcd(self.size, microbatches)
        all_shares = [
            (microbatch, piece, pieces)
            for microbatch in range(microbatches)
            for piece in range(pieces)
        ]
        return all_shares[self.rank :: self.size]

    def check(self, batch_size: int, microbatches: int) -> None:
        """Raises ConfigError if a step has fewer images than there are processes."""
        images = batch_size * microbatches
        if self.size > images:
            raise ConfigError(
                f"{self.size} processes cannot share a step of {images} images; start fewer, "
                "or raise training.batch_size or training.gradient_accumulation_steps."
            )

    def agree(self, value: bool) -> bool:
        """Returns rank 0's value on every rank. Raises ProcessLost."""
        if self.size == 1:
            return value
        return bool(self._from_main(torch.tensor([int(value)]))[0])

    def agree_on_text(self, text: str) -> str:
        """Returns rank 0's text, of at most MAX_TEXT_BYTES in UTF-8, on every rank.

        Raises ProcessLost.
        """
        if self.size == 1:
            return text
        # A buffer of one size for all ranks: the length, then the bytes.
        content = text.encode("utf-8")
        buffer = torch.zeros(1 + MAX_TEXT_BYTES, dtype=torch.int64)
        buffer[0] = len(content)
        buffer[1 : 1 + len(content)] = torch.tensor(list(content), dtype=torch.int64)
        length, *received = self._from_main(buffer).tolist()
        return bytes(received[:length]).decode("utf-8")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block on rank 0 first, then on the others, which find its files on the disk."""
        if not self.is_main:
            self.meet()
        yield
        if self.is_main:
            self.meet()

    def meet(self) -> None:
        """Waits until all processes have arrived. Raises ProcessLost."""
        if self.size > 1:
            with self._reporting_lost_processes():
                dist.barrier()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: Tensor) -> Tensor:
        """Replaces every gradient by its sum over all processes. Returns the sum of the losses.

        A parameter without a gradient on any rank has none afterwards, as with one process, so the
        optimiser skips it. Raises ProcessLost.
        """
        if self.size == 1:
            return loss
        # One buffer for one collective: all gradients (float32) in the order of the parameters,
        # whether each exists, and the loss.
        exists = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
        gradients = [_gradient(parameter).reshape(-1) for parameter in parameters]
        buffer = torch.cat([*gradients, exists, loss.reshape(1)])
        self.meet()
        with self._reporting_lost_processes():
            dist.all_reduce(buffer, group=self.device_group)
        sizes = [parameter.numel() for parameter in parameters]
        *sums, exists, total = buffer.split([*sizes, len(parameters), 1])
        for parameter, summed, count in zip(parameters, sums, exists.tolist(), strict=True):
            if parameter.grad is not None:
                # In place, because a CUDA graph refers to this memory.
                parameter.grad.copy_(summed.view_as(parameter))
            elif count:
                parameter.grad = summed.view_as(parameter).clone()
        return total[0]

    def _from_main(self, values: Tensor) -> Tensor:
        with self._reporting_lost_processes():
            dist.broadcast(values, 0)
        return values

    @contextmanager
    def _reporting_lost_processes(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what every backend raises when a connection closes
            raise ProcessLost(
                f"One of the {self.size} processes of this training ended; the log contains its "
                "last message. The checkpoint is kept; press Resume to go on from there."
            ) from error


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def join() -> World:
    """Joins the processes that torchrun or accelerate started.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and no file that
    `accelerate config` left on the machine. Raises ConfigError if there are too few GPUs.
    """
    rank, size, local_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"This machine has {torch.cuda.device_count()} GPUs, too few for process "
            f"{local_rank + 1}. Start as many processes as there are GPUs (training.devices)."
        )
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    if not on_gpu:
        return World(rank, size)
    torch.cuda.set_device(local_rank)
    return World(rank, size, dist.new_group(backend="nccl"))
