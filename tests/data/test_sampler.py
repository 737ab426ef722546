"""Batches and seeds: pure functions of their position, and the same numbers in every version."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.sampler import batch_at, epoch_batches
from trainer.models.seeds import generator_for, seed_for

BUCKET_SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def numbered(sizes):
    """Returns buckets of these sizes with consecutive numbers."""
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@given(BUCKET_SIZES, st.integers(1, 5), st.integers(0, 99), st.integers(0, 3))
def test_each_epoch_has_each_image_once_and_no_mixed_shapes(sizes, batch_size, seed, epoch):
    buckets = numbered(sizes)
    batches = epoch_batches(buckets, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(sum(sizes)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert any(set(batch) <= set(bucket) for bucket in buckets)


@given(BUCKET_SIZES, st.integers(1, 5), st.integers(0, 99))
def test_a_microbatch_is_found_without_the_ones_before_it(sizes, batch_size, seed):
    buckets = numbered(sizes)
    in_order = []
    for epoch in range(3):
        in_order += epoch_batches(buckets, batch_size, seed, epoch)
    assert [batch_at(buckets, batch_size, seed, i) for i in range(len(in_order))] == in_order


def test_epochs_and_seeds_have_different_orders():
    buckets = [list(range(20))]
    orders = [epoch_batches(buckets, 4, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 1))]
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]


def test_positions_have_different_seeds():
    seeds = {seed_for(42, purpose, i) for purpose in ("draws", "dropout") for i in range(500)}
    assert len(seeds) == 1000


# Golden values. A run of an earlier version resumes with these numbers: if one changes, the run
# would go on with other images and other noise. Never update them to make a test pass.


@pytest.mark.parametrize(
    ("position", "seed"),
    [
        ((42,), 2376719381931921175),
        ((42, "epoch", 0), 7337094828528208855),
        ((42, "draws", 7), 7018079400930402562),
        ((0, "looks", "a/b.png"), 2135959429145320047),
    ],
)
def test_seed_of_a_position_never_changes(position, seed):
    assert seed_for(*position) == seed


def test_draws_of_a_position_never_change():
    rng = generator_for(42, "draws", 7)
    assert rng.initial_seed() == 7018079400930402562
    assert rng.device.type == "cpu"
    expected = torch.tensor([0.5630658268928528, 0.7063600420951843, 0.3694967031478882])
    torch.testing.assert_close(torch.rand(3, generator=rng), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("seed", "epoch", "batches"),
    [
        (42, 0, [[4, 0], [7, 5], [2], [1, 3], [8], [6]]),
        (42, 1, [[1, 0], [7], [5, 6], [4], [3, 2], [8]]),
        (7, 0, [[3, 2], [4, 0], [8], [6], [7, 5], [1]]),
    ],
)
def test_batches_of_an_epoch_never_change(seed, epoch, batches):
    assert epoch_batches([[0, 1, 2, 3, 4], [5, 6, 7], [8]], 2, seed, epoch) == batches


@pytest.mark.parametrize(
    ("microbatch", "images"), [(0, [4, 0]), (5, [6]), (6, [1, 0]), (11, [8]), (600, [5, 7])]
)
def test_images_of_a_microbatch_never_change(microbatch, images):
    assert batch_at([[0, 1, 2, 3, 4], [5, 6, 7], [8]], 2, 42, microbatch) == images
