"""Batches are a pure function of their place, and no picture is lost."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.data.sampler import batch_at, epoch_batches
from trainer.models.seeds import generator_for, seed_for

BUCKETS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def numbered(sizes):
    numbers = iter(range(sum(sizes)))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@given(BUCKETS, st.integers(1, 5), st.integers(0, 99), st.integers(0, 3))
def test_every_pass_shows_every_picture_once_and_mixes_no_shapes(sizes, batch_size, seed, epoch):
    buckets = numbered(sizes)
    batches = epoch_batches(buckets, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(sum(sizes)))
    assert all(
        1 <= len(batch) <= batch_size and any(set(batch) <= set(bucket) for bucket in buckets)
        for batch in batches
    )


@given(BUCKETS, st.integers(1, 5), st.integers(0, 99))
def test_a_microbatch_is_found_without_those_before_it(sizes, batch_size, seed):
    buckets = numbered(sizes)
    straight = [
        batch for epoch in range(3) for batch in epoch_batches(buckets, batch_size, seed, epoch)
    ]
    assert [batch_at(buckets, batch_size, seed, i) for i in range(len(straight))] == straight


def test_passes_and_seeds_differ():
    buckets = [list(range(20))]
    assert (
        epoch_batches(buckets, 4, 1, 0)
        != epoch_batches(buckets, 4, 1, 1)
        != epoch_batches(buckets, 4, 2, 1)
    )


def test_seeds_are_stable_and_far_apart():
    assert seed_for(42, "draws", 7) == seed_for(42, "draws", 7)
    assert (
        len({seed_for(42, purpose, i) for purpose in ("draws", "dropout") for i in range(500)})
        == 1000
    )
    assert generator_for(1).initial_seed() == seed_for(1)
