from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import OptionError
from amradio.search import regions
from amradio.search.regions import best_positions, region_query


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31), st.sampled_from([1, 3, 2**16]))
def test_the_best_position_of_each_picture(counts: list[int], seed: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(n, 6, generator=generator) for n in counts]
    query = torch.randn(6, generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_TOKENS_AT_ONCE", chunk)
        found = best_positions(torch.cat(maps), offsets, query)
    expected = [F.cosine_similarity(m.double(), query.double()[None]) for m in maps]
    torch.testing.assert_close(found.scores.double(), torch.stack([e.max() for e in expected]), rtol=0, atol=1e-6)
    assert found.indices.tolist() == [int(e.argmax()) for e in expected]


def test_of_equal_positions_the_first_counts() -> None:
    row = torch.tensor([[1.0, 0.0]])
    tokens = torch.cat([-row, row, 2 * row, row]).half()
    found = best_positions(tokens, torch.tensor([0, 3, 4]), torch.tensor([3.0, 0.0]))
    assert found.scores.tolist() == [1.0, 1.0]
    assert found.indices.tolist() == [1, 0]
    assert best_positions(torch.zeros(0, 2), torch.tensor([0]), row[0]).scores.shape == (0,)


def test_a_region_is_the_mean_of_its_patches() -> None:
    features = torch.randn(4, 6, 5)
    unit = F.normalize(features, dim=2)
    whole = F.normalize(unit.flatten(0, 1).mean(0), dim=0)
    torch.testing.assert_close(region_query(features), whole)
    torch.testing.assert_close(region_query(features, (0.0, 0.0, 1.0, 1.0)), whole)
    corner = F.normalize(unit[2:, 3:].flatten(0, 1).mean(0), dim=0)
    torch.testing.assert_close(region_query(features, (0.5, 0.5, 1.0, 1.0)), corner)


@pytest.mark.parametrize("box", [(0.4, 0.3, 0.4, 0.3), (0.40, 0.30, 0.41, 0.31)])
def test_a_tiny_region_is_one_patch(box: tuple[float, float, float, float]) -> None:
    features = torch.randn(4, 6, 5)
    torch.testing.assert_close(region_query(features, box), F.normalize(features[1, 2], dim=0))
    torch.testing.assert_close(region_query(features, (1.0, 1.0, 1.0, 1.0)), F.normalize(features[3, 5], dim=0))


@pytest.mark.parametrize("box", [(0.5, 0.0, 0.4, 1.0), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, float("nan"))])
def test_boxes_that_cannot_be(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(OptionError, match="left, top, right, bottom from 0 to 1"):
        region_query(torch.ones(2, 2, 3), box)
