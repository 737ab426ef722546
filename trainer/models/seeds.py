"""Random seeds derived from a position in the training.

A resumed run needs no generator state: the same position gives the same draws. Nothing else that
draws random numbers (sampling, validation) can disturb them.
"""

import hashlib

import torch


def seed_for(*position: object) -> int:
    """Returns a 63-bit seed for a position: `seed_for(42, "noise", step, microbatch)`."""
    digest = hashlib.sha256(repr(position).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*position: object) -> torch.Generator:
    """Returns a seeded CPU generator, so that the draws are the same on every device."""
    return torch.Generator("cpu").manual_seed(seed_for(*position))
