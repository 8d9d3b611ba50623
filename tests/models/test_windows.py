"""ViTDet windows against loops over single tokens and windows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amradio.errors import CapabilityError, OptionError
from amradio.models.radio import RadioModel
from amradio.models.windows import from_windows, global_blocks, to_windows

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


@given(sizes)
def test_from_windows_undoes_to_windows(size: tuple[int, int, int, int, int]) -> None:
    b, rows, cols, window, c = size
    grid = (rows * window, cols * window)
    x = torch.arange(b * grid[0] * grid[1] * c).view(b, -1, c)
    windows = to_windows(x, grid, window)
    assert windows.shape == (b * rows * cols, window**2, c)
    assert torch.equal(from_windows(windows, b, grid, window), x)
    assert torch.equal(from_windows(windows.view(b, -1, c), b, grid, window), x)


@given(sizes)
def test_windows_hold_the_tokens_that_lie_in_them(size: tuple[int, int, int, int, int]) -> None:
    b, rows, cols, window, c = size
    h, w = rows * window, cols * window
    x = torch.arange(b * h * w * c).view(b, h * w, c)
    windows = to_windows(x, (h, w), window).tolist()
    for image in range(b):
        for y in range(h):
            for column in range(w):
                which = image * rows * cols + (y // window) * cols + column // window
                inside = (y % window) * window + column % window
                assert windows[which][inside] == x[image, y * w + column].tolist()


@pytest.mark.parametrize(
    ("depth", "rule", "expected"),
    [
        (12, {"num_global": 4}, (2, 5, 8, 11)),
        (12, {}, (2, 5, 8, 11)),
        (24, {"num_global": 4}, (5, 11, 17, 23)),
        (32, {"num_global": 4}, (7, 15, 23, 31)),
        (32, {"num_windowed": 5}, (5, 11, 17, 23, 29, 31)),
        (32, {"num_windowed": 5, "num_global": 4}, (5, 11, 17, 23, 29, 31)),
        (32, {"num_global": 8}, tuple(range(3, 32, 4))),
        (40, {"num_global": 8}, tuple(range(4, 40, 5))),
        (27, {}, (5, 11, 17, 23, 26)),
        (7, {}, tuple(range(7))),  # a period of one block
        (5, {"num_windowed": 0}, tuple(range(5))),
        (1, {}, (0,)),
        (2, {"num_windowed": 1}, (1,)),
    ],
)
def test_published_schedules(depth: int, rule: dict[str, int], expected: tuple[int, ...]) -> None:
    assert tuple(i for i, is_global in enumerate(global_blocks(depth, **rule)) if is_global) == expected


@given(st.integers(1, 60), st.none() | st.integers(1, 12), st.none() | st.integers(1, 12))
def test_schedule_is_that_of_a_walk(depth: int, num_windowed: int | None, num_global: int | None) -> None:
    """The rule as it is written down: switch to windows when a period begins, and back at its last block."""
    period = num_windowed + 1 if num_windowed is not None else max(depth // (num_global or 4), 1)
    windowed, walked = False, []
    for i in range(depth - 1):
        if i % period == 0 and period > 1:
            windowed = True
        elif i % period == period - 1:
            windowed = False
        walked.append(not windowed)
    assert global_blocks(depth, num_windowed, num_global) == (*walked, True)


@pytest.mark.parametrize("architecture", ["vit_small_patch16_224", "dino_v2_g_student"])
@pytest.mark.parametrize(
    ("depth", "rule", "windowed"),
    [
        (8, {"num_global": 4}, (0, 2, 4, 6)),
        (8, {"num_windowed": 2}, (0, 1, 3, 4, 6)),
        (8, {"num_windowed": 9}, (0, 1, 2, 3, 4, 5, 6)),
        (3, {}, ()),
        (2, {"num_windowed": 5}, (0,)),
    ],
)
@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((6, 3), 3), ((4, 4), 4), ((2, 3), 1)])
@torch.no_grad()
def test_windowed_forward_is_a_loop_over_windows(
    toy: Callable[..., RadioModel],
    by_hand: Callable[..., list[Tensor]],
    architecture: str,
    depth: int,
    rule: dict[str, int],
    windowed: tuple[int, ...],
    grid: tuple[int, int],
    window: int,
) -> None:
    model = toy(architecture, model_kwargs={"depth": depth})
    images = torch.rand(2, 3, grid[0] * model.patch_size, grid[1] * model.patch_size)
    model.set_vitdet(window, **rule)
    last = model.model.norm(by_hand(model, images, windowed)[-1])
    summary, features = model(images)
    prefix = model.num_summary_tokens
    torch.testing.assert_close(features, last[:, prefix:], atol=1e-5, rtol=1e-5)
    by_token = torch.cat([last[:, i] for i in model.summary_idxs.tolist()], dim=-1)
    torch.testing.assert_close(summary, by_token, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_windows_without_prefix_tokens(toy: Callable[..., RadioModel], by_hand: Callable[..., list[Tensor]]) -> None:
    model = toy("vit_small_patch16_224", model_kwargs={"depth": 4, "class_token": False, "global_pool": "avg"})
    assert model.num_summary_tokens == 0
    images = torch.rand(2, 3, 64, 96)
    model.set_vitdet(2, num_windowed=1)
    last = by_hand(model, images, windowed=(0, 2))[-1]
    summary, features = model(images)
    torch.testing.assert_close(features, last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(summary, last.mean(1), atol=1e-5, rtol=1e-5)


def test_published_schedule_is_the_default(toy: Callable[..., RadioModel]) -> None:
    model = toy("vit_small_patch16_224", model_kwargs={"depth": 6})
    object.__setattr__(model.config, "vitdet_num_windowed", 2)
    model.set_vitdet(2)
    assert model.model._global == (False, False, True, False, False, True)
    model.set_vitdet(2, num_global=3)
    assert model.model._global == (False, True, False, True, False, True)


@pytest.mark.parametrize("window", [0, -1])
def test_windows_need_a_side(toy: Callable[..., RadioModel], window: int) -> None:
    with pytest.raises(OptionError, match=rf"^vitdet_window_size must be at least 1, got {window}\.$"):
        toy("vit_small_patch16_224").set_vitdet(window)


def test_eradio_has_no_windows(toy: Callable[..., RadioModel]) -> None:
    with pytest.raises(CapabilityError, match=r"^ERadio has no ViTDet windows; only vision transformers have\.$"):
        toy("eradio").set_vitdet(4)
