"""Which images a step sees: pure functions of (seed, microbatch number).

A resumed run therefore needs no loader state, and nothing else (sampling, validation) can change
the order. The numbers are part of the contract with old runs: a run that resumes must see the
images that it would have seen.
"""

import random
from collections.abc import Sequence

from trainer.models.seeds import seed_for


def epoch_batches(
    buckets: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Returns the batches of one epoch, in random order.

    `buckets` holds the indices of the images of each shape. Every image appears once, and a batch
    contains images of one shape only. The last batch of a bucket may be smaller.
    """
    rng = random.Random(seed_for(seed, "epoch", epoch))
    batches = []
    for bucket in buckets:
        shuffled = rng.sample(bucket, len(bucket))
        for start in range(0, len(shuffled), batch_size):
            batches.append(shuffled[start : start + batch_size])
    rng.shuffle(batches)
    return batches


def batch_at(
    buckets: Sequence[Sequence[int]], batch_size: int, seed: int, microbatch: int
) -> list[int]:
    """Returns the images of a microbatch, counted from the start of training."""
    per_epoch = sum(-(-len(bucket) // batch_size) for bucket in buckets)
    epoch, number = divmod(microbatch, per_epoch)
    return epoch_batches(buckets, batch_size, seed, epoch)[number]
