"""Counting labels, choosing patches, and what a memory is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from amradio.errors import OptionError, ResolutionError
from amradio.evals.in_context.memory import MemoryBank, patch_counts, patches_per_picture, sampling_scores
from amradio.evals.in_context.store import check_same, load_memory, save_memory


def slow_counts(mask: np.ndarray, size: int, classes: int, void: str) -> np.ndarray:
    found = []
    for top in range(0, mask.shape[0], size):
        for left in range(0, mask.shape[1], size):
            ids = mask[top : top + size, left : left + size]
            counts = [int((ids == c).sum()) for c in range(classes)]
            if void == "class-0":
                counts[0] += int((ids == 255).sum())
            found.append(counts)
    return np.array(found)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_counts_are_those_of_loops(size: int, h: int, w: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, classes, (2, h * size, w * size)).astype(np.uint8)
    masks[rng.random(masks.shape) < 0.2] = 255
    for void in ("exclude", "class-0"):
        found = patch_counts(torch.from_numpy(masks), size, classes, void)  # type: ignore[arg-type]
        assert np.array_equal(found.numpy(), [slow_counts(m, size, classes, void) for m in masks])


def test_counts_of_large_patches_do_not_overflow() -> None:
    found = patch_counts(torch.zeros(1, 200, 200, dtype=torch.uint8), 200, 1)
    assert found.item() == 40_000
    assert patch_counts(torch.zeros(1, 16, 16, dtype=torch.uint8), 16, 255).dtype == torch.int16


def test_masks_that_are_no_whole_patches_are_refused() -> None:
    with pytest.raises(ResolutionError, match=r"A mask of 57 x 60 .* whole patches of 14 pixels. Nearest: 56 x 56."):
        patch_counts(torch.zeros(1, 57, 60, dtype=torch.uint8), 14, 3)


def slow_scores(counts: np.ndarray, noise: np.ndarray) -> list[float]:
    occurs = [[c for c, n in enumerate(patch) if n] for patch in counts.tolist()]
    frequency = {c: sum(c in classes for classes in occurs) for c in range(counts.shape[1])}
    return [
        float(np.float32(sum(frequency[c] for c in classes)) * u) if classes else float("inf")
        for classes, u in zip(occurs, noise, strict=True)
    ]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_scores_are_those_of_loops(patches: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, (2, patches, classes)) * rng.integers(0, 2, (2, patches, classes))
    noise = rng.random((2, patches), dtype=np.float32)
    found = sampling_scores(torch.from_numpy(counts), torch.from_numpy(noise))
    assert found.tolist() == [slow_scores(c, u) for c, u in zip(counts, noise, strict=True)]


def test_rare_classes_are_preferred() -> None:
    counts = torch.zeros(1, 10, 2, dtype=torch.int16)
    counts[0, :9, 0] = 16
    counts[0, 9, 1] = 16
    noise = torch.rand(200, 10, generator=torch.Generator().manual_seed(0))
    first = sampling_scores(counts.expand(200, -1, -1), noise).argmin(1)
    assert (first == 9).float().mean() > 0.4  # by chance it would be 0.1


def test_a_memory_must_hold_a_patch_of_each_picture() -> None:
    assert patches_per_picture(105, 10, 16, 2) == 5
    with pytest.raises(OptionError, match="A memory of 19 patches cannot hold one of each of 10 pictures x 2 epochs"):
        patches_per_picture(19, 10, 16, 2)


@pytest.fixture
def bank() -> MemoryBank:
    generator = torch.Generator().manual_seed(0)
    return MemoryBank(
        features=torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1),
        counts=torch.tensor([[4, 0], [2, 2], [0, 4], [1, 0], [0, 1], [3, 1]], dtype=torch.int16),
        item=torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32),
        patch=torch.tensor([3, 1, 2, 0, 2, 1], dtype=torch.int32),
        rank=torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32),
        pictures=torch.zeros(2, 8, dtype=torch.int32),
        jitter=torch.full((2, 4), float("nan")),
        about={"protocol": {"name": "clean"}, "classes": ["a", "b"], "size": [1, 2]},
    )


def test_labels_are_shares(bank: MemoryBank) -> None:
    assert bank.labels.tolist() == [[1, 0], [0.5, 0.5], [0, 1], [1, 0], [0, 1], [0.75, 0.25]]


def test_a_smaller_memory_holds_the_first_choices(bank: MemoryBank) -> None:
    small = bank.limited(2)
    assert small.patch.tolist() == [3, 1, 0, 2]
    assert torch.equal(small.features, bank.features[[0, 1, 3, 4]])
    assert bank.limited(3) is bank


def test_spare_rows_are_zeros(bank: MemoryBank) -> None:
    padded = bank.padded(8)
    assert len(padded) == 8
    assert padded.features[6:].abs().sum() == 0
    assert padded.labels[6:].abs().sum() == 0
    assert padded.item[6:].tolist() == [-1, -1]
    assert bank.padded(3) is bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_memories_are_the_same(bank: MemoryBank, replaced: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    bank = replaced(bank, features=bank.features.to(dtype))
    path = save_memory(bank, tmp_path / "new" / "memory.safetensors")
    again = load_memory(path)
    for name in ("features", "counts", "item", "patch", "rank", "pictures"):
        assert torch.equal(getattr(again, name), getattr(bank, name))
        assert getattr(again, name).dtype == getattr(bank, name).dtype
    assert again.jitter.isnan().all()
    assert again.about == bank.about
    check_same(again, {"size": (1, 2)}, path)
    with pytest.raises(
        OptionError, match=r"was made in another way: classes is \['a', 'b'\] in the file and \['a'\] now"
    ):
        check_same(again, {"classes": ["a"], "size": (1, 2)}, path)


def test_files_that_are_no_memory_are_refused(bank: MemoryBank, replaced: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"There is no memory .*missing"):
        load_memory(tmp_path / "missing")
    (tmp_path / "text").write_text("no memory")
    with pytest.raises(OptionError, match="cannot be read as a memory"):
        load_memory(tmp_path / "text")
    save_file({"features": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match="not a memory of this version: its format is None"):
        load_memory(tmp_path / "other.safetensors")
    for wrong in ({"rank": bank.rank[:2]}, {"item": bank.item + 1}, {"features": bank.counts.clone()}):
        save_memory(replaced(bank, **wrong), tmp_path / "wrong.safetensors")
        with pytest.raises(OptionError, match="do not fit together, so it is no memory"):
            load_memory(tmp_path / "wrong.safetensors")
