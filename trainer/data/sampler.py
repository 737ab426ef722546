"""Which pictures a step sees, and with which random draws: pure functions of (seed, step, microbatch).

So a resumed run needs no loader state, and no call elsewhere (sampling, validating) can disturb the order.
"""

import random
from collections.abc import Sequence

from trainer.models.seeds import seed_for


def epoch_batches(
    buckets: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one pass: every picture once, only pictures of one shape together, in random order.

    `buckets` holds the indices of the pictures of each shape. The last batch of a bucket may be smaller.
    """
    order = random.Random(seed_for(seed, "epoch", epoch))
    batches = []
    for bucket in buckets:
        shuffled = order.sample(bucket, len(bucket))
        batches += [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    order.shuffle(batches)
    return batches


def batch_at(
    buckets: Sequence[Sequence[int]], batch_size: int, seed: int, microbatch: int
) -> list[int]:
    """The pictures of the microbatch with this number, counted from the start of the training."""
    per_epoch = sum(-(-len(bucket) // batch_size) for bucket in buckets)
    return epoch_batches(buckets, batch_size, seed, microbatch // per_epoch)[microbatch % per_epoch]
