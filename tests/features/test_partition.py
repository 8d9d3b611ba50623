import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.features.partition import Partition, balanced_shard_size


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 9))
def test_processes_share_all_positions_and_none_twice(count, size, world_size):
    partition = Partition(count, size)
    parts = [partition.stream(range(rank, len(partition), world_size)).tolist() for rank in range(world_size)]
    assert sorted(p for part in parts for p in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= size
    for part in parts:  # borders of shards are where the stream's position is a multiple of the size
        for i, position in enumerate(part):
            assert i % size == position % size


@given(st.integers(1, 2_000_000), st.integers(1, 256))
def test_balanced_shards(count, batch_size):
    size = balanced_shard_size(count, batch_size)
    assert size % batch_size == 0
    assert batch_size <= size <= max(1024, 4 * batch_size)
    if count >= 64 * batch_size:
        assert size >= 4 * batch_size


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(80, 32, 2), (1000, 128, 8), (3000, 128, 4)])
def test_small_sets_are_shared_out_too(count, batch_size, world_size):
    partition = Partition(count, balanced_shard_size(count, batch_size))
    counts = [len(partition.stream(range(rank, len(partition), world_size))) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 2 * batch_size
    assert min(counts) > 0


@pytest.mark.parametrize("world_size", [2, 8, 32, 64])
def test_50000_pictures_are_split_nearly_evenly(world_size):
    partition = Partition(50_000, balanced_shard_size(50_000, 32))
    counts = [len(partition.stream(range(rank, len(partition), world_size))) for rank in range(world_size)]
    assert max(counts) <= 1.5 * 50_000 / world_size


def test_a_shard_must_have_pictures():
    with pytest.raises(OptionError, match="A shard must have at least 1 picture, got 0"):
        Partition(3, 0)
