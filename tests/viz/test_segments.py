"""Segments, norms, attention and foreground of maps that were made to have them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from torch import Tensor

from amradio.errors import OptionError
from amradio.viz import (
    foreground_masks,
    kmeans_segments,
    norm_map,
    segment_picture,
    spectral_segments,
    token_attention,
    token_name,
)
from amradio.viz.colours import distinct_colours
from amradio.viz.foreground import otsu


def blocks(noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A map [8, 12, 16] of three parts, and which part each position is: the largest is 0."""
    labels = torch.zeros(8, 12, dtype=torch.int64)
    labels[:, 7:] = 1
    labels[2:5, 2:5] = 2
    generator = torch.Generator().manual_seed(seed)
    features = torch.eye(16)[labels] + noise * torch.randn(8, 12, 16, generator=generator)
    return features * torch.rand(8, 12, 1, generator=generator).add(0.5), labels  # lengths say nothing


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_the_parts(seed: int) -> None:
    features, labels = blocks(seed=seed)
    assert torch.equal(kmeans_segments([features], 3)[0], labels)
    assert torch.equal(kmeans_segments([features], 3)[0], kmeans_segments([features], 3)[0])


def test_kmeans_is_as_good_as_scikit_learn() -> None:
    features, _ = blocks(noise=0.6)
    rows = torch.nn.functional.normalize(features.flatten(0, 1).double(), dim=-1).numpy()
    for count in (2, 4, 7):
        labels = kmeans_segments([features], count)[0].flatten().numpy()
        cost = sum(((rows[labels == i] - rows[labels == i].mean(0)) ** 2).sum() for i in range(count))
        best = KMeans(count, n_init=10, random_state=0).fit(rows).inertia_
        assert cost < 1.1 * best


def test_kmeans_numbers_mean_the_same_in_all_photos() -> None:
    features, labels = blocks()
    first, second = kmeans_segments([features, features.flip(0)], 3)
    assert torch.equal(first, labels)
    assert torch.equal(second, labels.flip(0))


@pytest.mark.parametrize("seed", range(3))
def test_spectral_finds_the_parts(seed: int) -> None:
    features, labels = blocks(seed=seed)
    assert torch.equal(spectral_segments(features, 3), labels)


def test_spectral_follows_a_chain_that_kmeans_cuts() -> None:
    angle = torch.linspace(0, 1.5, 40)
    chain = torch.stack([angle.cos(), angle.sin(), torch.zeros(40)], -1)  # a quarter of a circle, gradually
    other = torch.tensor([0.1, 0.1, 1.0]).expand(40, 3)
    features = torch.stack([chain, other])  # [2, 40, 3]
    expected = torch.tensor([[0] * 40, [1] * 40])
    assert torch.equal(spectral_segments(features, 2), expected)


def test_pictures_of_segments() -> None:
    labels = torch.tensor([[0, 1], [1, 2]])
    pixels = np.asarray(segment_picture(labels, (4, 6), 3))
    colours = distinct_colours(3)
    assert tuple(pixels[0, 0]) == colours[0]
    assert tuple(pixels[3, 5]) == colours[2]
    assert tuple(pixels[0, 3]) == colours[1]
    guided = np.asarray(segment_picture(labels, (4, 6), 3, method="guided", guide=Image.new("RGB", (6, 4))))
    assert {tuple(p) for p in guided.reshape(-1, 3)} <= set(colours)  # never a mixture


def test_distinct_colours_are_distinct() -> None:
    colours = np.array(distinct_colours(24), float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e3 * np.eye(24)
    assert distances.min() > 25
    assert distances[:8, :8].min() > 70
    assert distinct_colours(24)[:5] == distinct_colours(5)


def test_outliers_are_lengths_far_above_the_median() -> None:
    features = torch.randn(20, 20, 64)
    features[3, 4] *= 8
    found = norm_map(features)
    np.testing.assert_allclose(found.norms, np.linalg.norm(features.numpy(), axis=-1), rtol=1e-5)
    assert found.outliers.nonzero().tolist() == [[3, 4]]
    assert found.share == pytest.approx(1 / 400)
    assert norm_map(torch.ones(3, 3, 2)).share == 0


def test_attention_of_tokens_and_heads() -> None:
    patches = torch.rand(3, 2, 4, 5) / 20
    values, share = token_attention(patches, 1)
    torch.testing.assert_close(values, patches[:, 1].mean(0))
    assert share == pytest.approx(float(values.sum()))
    torch.testing.assert_close(token_attention(patches, 0, 2).values, patches[2, 0])
    assert [token_name(i, 2) for i in range(4)] == ["class token 0", "class token 1", "register 0", "register 1"]
    with pytest.raises(OptionError, match="There is no prefix token 2; the model has 2"):
        token_attention(patches, 2)
    with pytest.raises(OptionError, match="There is no head 3; the block has 3"):
        token_attention(patches, 0, 3)


def slow_otsu(values: np.ndarray) -> float:
    best, threshold = -1.0, float(values.min())
    ordered = np.unique(values)
    for low, high in itertools.pairwise(ordered):
        parts = values[values <= low], values[values > low]
        between = len(parts[0]) * len(parts[1]) * (parts[0].mean() - parts[1].mean()) ** 2
        if between > best + 1e-9:
            best, threshold = between, (low + high) / 2
    return threshold


@pytest.mark.parametrize("seed", range(5))
def test_otsu_equals_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.concatenate([random.normal(0, 1, 30), random.normal(4, 1, 12)]).round(1)
    assert otsu(torch.from_numpy(values)) == pytest.approx(slow_otsu(values))
    assert otsu(torch.full((5,), 2.0)) == 2.0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_keeps_away_from_the_border(sign: int) -> None:
    features = 0.1 * torch.randn(9, 9, 5)
    features[2:7, 3:7, 0] += 3 * sign
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[2:7, 3:7] = True
    assert torch.equal(foreground_masks([features])[0], mask)
    masks = foreground_masks([features, features.flip(0)[:5]])
    assert torch.equal(masks[1], mask.flip(0)[:5])
    assert foreground_masks([torch.ones(3, 3, 4)])[0].all()


def test_refusals() -> None:
    features = torch.randn(2, 2, 4)
    with pytest.raises(OptionError, match="from 2 to the number of positions, 4, got 5"):
        kmeans_segments([features], 5)
    with pytest.raises(OptionError, match="65 x 64 would take very long"):
        spectral_segments(torch.randn(65, 64, 2), 3)
    with pytest.raises(OptionError, match=r"found in maps \[h, w, C\]"):
        foreground_masks([features.flatten(0, 1)])
    with pytest.raises(OptionError, match="not finite"):
        kmeans_segments([features * torch.nan], 2)
    with pytest.raises(OptionError, match="finite features"):
        norm_map(features * torch.inf)
