import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.search import Neighbours, recall_at_k


def neighbours(indices):
    indices = torch.tensor(indices)
    return Neighbours(torch.zeros(indices.shape), indices)


def test_recall_is_the_share_of_true_neighbours():
    exact = neighbours([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert recall_at_k(exact, exact) == 1.0
    assert recall_at_k(neighbours([[3, 2, 9, 8], [5, 9, 10, 11]]), exact) == 3 / 8
    assert recall_at_k(neighbours([[0, -1, -1, -1], [-1, -1, -1, -1]]), exact) == 1 / 8
    assert recall_at_k(neighbours([[0, 1, 2, 3, 9], [4, 5, 6, 7, 8]]), exact) == 1.0


@given(st.lists(st.lists(st.integers(0, 20), min_size=5, max_size=5, unique=True), min_size=2, max_size=6))
def test_recall_equals_that_of_sets(rows):
    found, exact = rows[: len(rows) // 2], rows[-(len(rows) // 2) :]
    expected = sum(len(set(f) & set(e)) for f, e in zip(found, exact, strict=True)) / (5 * len(found))
    assert recall_at_k(neighbours(found), neighbours(exact)) == pytest.approx(expected)


def test_answers_to_other_queries_are_refused():
    with pytest.raises(OptionError, match=r"same queries, got \(1, 2\) found and \(2, 2\) exact"):
        recall_at_k(neighbours([[0, 1]]), neighbours([[0, 1], [2, 3]]))
