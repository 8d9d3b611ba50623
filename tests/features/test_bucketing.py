import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.features.bucketing import batches_by_shape, in_order

STREAMS = st.lists(st.integers(0, 4), max_size=60)


@given(STREAMS, st.integers(1, 7), st.integers(1, 20))
def test_laws(shapes, batch_size, look_ahead):
    read = 0

    def stream():
        nonlocal read
        for item in enumerate(shapes):
            read += 1
            yield item

    seen = []
    for batch in batches_by_shape(stream(), lambda item: item[1], batch_size, look_ahead):
        assert 1 <= len(batch) <= batch_size
        assert len({shape for _, shape in batch}) == 1
        assert [p for p, _ in batch] == sorted(p for p, _ in batch)
        if read < len(shapes):  # before the end, nobody waits longer than promised
            assert read - 1 - batch[0][0] <= look_ahead
        seen += [p for p, _ in batch]
    assert sorted(seen) == list(range(len(shapes)))


@given(STREAMS, st.integers(1, 7), st.integers(1, 20))
def test_order_comes_back_with_bounded_memory(shapes, batch_size, look_ahead):
    given_out = 0
    worst = 0

    def results():
        nonlocal given_out, worst
        for batch in batches_by_shape(enumerate(shapes), lambda item: item[1], batch_size, look_ahead):
            for item in batch:
                given_out += 1
                yield item

    for count, item in enumerate(in_order(results(), lambda item: item[0])):
        assert item == (count, shapes[count])
        worst = max(worst, given_out - count)
    assert worst <= look_ahead + batch_size


def test_one_odd_shape_does_not_hold_up_the_stream():
    shapes = [9] + [1] * 100
    batches = batches_by_shape(enumerate(shapes), lambda item: item[1], batch_size=4, look_ahead=8)
    sizes = [(b[0][1], len(b)) for b in batches]
    assert sizes.index((9, 1)) <= 2


def test_full_batches_where_shapes_alternate():
    batches = list(batches_by_shape(enumerate([0, 1] * 8), lambda item: item[1], batch_size=4, look_ahead=16))
    assert [len(b) for b in batches] == [4, 4, 4, 4]


@pytest.mark.parametrize("items", [[], [3]])
def test_short_streams(items):
    assert list(batches_by_shape(items, lambda i: i, 2, 2)) == [[i] for i in items]
    assert list(in_order([], lambda i: i)) == []
