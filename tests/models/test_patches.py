"""Patch and position embedding against slow numpy references, and the cache of resized positions."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amradio.errors import OptionError, ResolutionError
from amradio.models.cache import TensorCache
from amradio.models.configs import ViTConfig
from amradio.models.patches import POSITION_DROPOUT, PatchGenerator
from amradio.models.radio import RadioModel

Array = np.ndarray[Any, Any]


def generator(position: str = "cpe", interpolation: str = "half_pixel", **fields: Any) -> PatchGenerator:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"embed_dim": 6, "depth": 1, "num_heads": 1, "mlp_hidden_dim": 4, "patch_size": 4}
    config = ViTConfig(**sizes | {"position": position, "position_grid": (5, 5), "num_registers": 2} | fields)
    return PatchGenerator(config, interpolation).eval()  # type: ignore[arg-type]


def resize(source: Array, rows: int, cols: int, align_corners: bool) -> Array:
    """Bilinear resizing of [h, w, C], one output pixel at a time."""

    def neighbours(i: int, n_in: int, n_out: int) -> tuple[int, int, float]:
        if align_corners:
            at = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        else:
            at = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        low = min(int(at), n_in - 1)
        return low, min(low + 1, n_in - 1), at - low

    out = np.zeros((rows, cols, source.shape[2]))
    for i in range(rows):
        y0, y1, fy = neighbours(i, source.shape[0], rows)
        for j in range(cols):
            x0, x1, fx = neighbours(j, source.shape[1], cols)
            top = (1 - fx) * source[y0, x0] + fx * source[y0, x1]
            bottom = (1 - fx) * source[y1, x0] + fx * source[y1, x1]
            out[i, j] = (1 - fy) * top + fy * bottom
    return out


def slow_positions(g: PatchGenerator, h: int, w: int) -> Tensor:
    """What the position embedding is meant to be, [1, h*w, C] in float64."""
    grid = g.pos_embed.detach().double().numpy().reshape(*g.config.position_grid, -1)
    align = g.interpolation == "align_corners"
    if (h, w) != g.config.position_grid:
        if g.config.position == "cpe":
            grid = resize(grid, max(h, w), max(h, w), align)[:h, :w]
        else:
            grid = grid[:h, :w]
            grid = grid if grid.shape[:2] == (h, w) else resize(grid, h, w, align)
    return torch.from_numpy(grid.reshape(1, h * w, -1))


def assert_right(g: PatchGenerator, grid: tuple[int, int], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        g.positions(1, grid).detach().double(), slow_positions(g, *grid), atol=tolerance, rtol=tolerance
    )


# ---- inference ----


@pytest.mark.parametrize("position", ["cpe", "window"])
@pytest.mark.parametrize("interpolation", ["half_pixel", "align_corners"])
@given(h=st.integers(1, 9), w=st.integers(1, 9))
@settings(max_examples=25)
def test_positions_are_the_resized_and_cropped_grid(position: str, interpolation: str, h: int, w: int) -> None:
    g = generator(position, interpolation)
    with torch.no_grad():
        assert_right(g, (h, w))
    assert_right(g, (h, w))  # with gradients nothing is kept


def test_the_grid_s_own_size_is_taken_as_it_is() -> None:
    g = generator()
    assert torch.equal(g.positions(1, (5, 5)), g.pos_embed)


def test_patches_are_cut_in_channel_row_column_order() -> None:
    g = generator()
    images = torch.rand(2, 3, 8, 12)
    got = g.embed_patches(images)
    for b in range(2):
        for row in range(2):
            for col in range(3):
                patch = images[b, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4].flatten()
                torch.testing.assert_close(got[b, row * 3 + col], g.embedder.weight @ patch)


def test_prefix_tokens_come_first_and_have_no_position() -> None:
    g = generator()
    tokens = g(torch.zeros(2, 3, 8, 12))
    assert g.cls_token is not None
    assert torch.equal(tokens[:, :3], g.cls_token.token.expand(2, -1, -1))
    torch.testing.assert_close(tokens[0, 3:].double(), slow_positions(g, 2, 3)[0], atol=1e-5, rtol=1e-5)


def test_prefix_tokens_of_a_plain_vit_have_positions() -> None:
    g = generator("fixed", position_of_prefix=True)
    assert g.pos_embed.shape == (1, 28, 6)
    tokens = g(torch.zeros(1, 3, 20, 20))
    assert g.cls_token is not None
    assert torch.equal(tokens, torch.cat([g.cls_token.token[None], torch.zeros(1, 25, 6)], 1) + g.pos_embed)


def test_a_fixed_position_embedding_refuses_other_sizes() -> None:
    with pytest.raises(ResolutionError) as raised:
        generator("fixed", position_grid=(5, 6))(torch.zeros(1, 3, 20, 20))
    assert str(raised.value) == (
        "This model has a fixed position embedding for 20x24 images (height x width), got 20x20. Resize the images to "
        "20x24."
    )


def test_half_precision_positions_are_resized_in_float32() -> None:
    g = generator().to(torch.bfloat16)
    with torch.no_grad():
        got = g.positions(1, (7, 3))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), slow_positions(g, 7, 3), atol=1e-2, rtol=1e-2)
    exact = slow_positions(g, 7, 3).to(torch.bfloat16)
    assert (got == exact).float().mean() > 0.99  # rounded once, at the end


# ---- training ----


def slow_crops(g: PatchGenerator, size: Tensor, origin: Tensor, h: int, w: int) -> Tensor:
    """Bilinear samples of the grid inside boxes (x, y), with corners on the grid's corners and zeros outside."""
    rows, cols = g.config.position_grid
    grid = g.pos_embed.detach().double().reshape(rows, cols, -1)
    out = torch.zeros(len(size), h, w, grid.shape[-1], dtype=torch.float64)
    for n in range(len(size)):
        for i in range(h):
            for j in range(w):
                x = (origin[n, 0] + size[n, 0] * (j / (w - 1) if w > 1 else 0.0)).item() * (cols - 1)
                y = (origin[n, 1] + size[n, 1] * (i / (h - 1) if h > 1 else 0.0)).item() * (rows - 1)
                for yy in (math.floor(y), math.floor(y) + 1):
                    for xx in (math.floor(x), math.floor(x) + 1):
                        if 0 <= yy < rows and 0 <= xx < cols:
                            out[n, i, j] += (1 - abs(y - yy)) * (1 - abs(x - xx)) * grid[yy, xx]
    return out.flatten(1, 2)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (7, 2), (9, 9)])
@pytest.mark.parametrize("frames", [1, 2])
def test_training_crops(grid: tuple[int, int], frames: int) -> None:
    g = generator().train()
    n = 6 // frames
    torch.manual_seed(5)
    scale = math.sqrt(0.1) + (1 - math.sqrt(0.1)) * torch.rand(n)
    aspect = torch.exp(torch.rand(n) * 2 * math.log(4 / 3) - math.log(4 / 3))
    size = torch.stack([scale * aspect, scale / aspect], -1).clamp(0, 1)
    origin = torch.rand(n, 2) * (1 - size)
    torch.manual_seed(5)
    with g.video_mode(frames):
        got = g.training_positions(6, grid)
    want = slow_crops(g, size, origin, *grid).repeat_interleave(frames, 0)
    torch.testing.assert_close(got.detach().double(), want, atol=1e-4, rtol=1e-4)


def test_boxes_lie_inside_the_grid_and_have_the_stated_shapes() -> None:
    """A grid whose values are its own coordinates shows the boxes."""
    g = generator(position_grid=(11, 11)).train()
    ramp = torch.linspace(0, 1, 11)
    with torch.no_grad():
        g.pos_embed.view(11, 11, 6)[..., 0] = ramp[None, :]
        g.pos_embed.view(11, 11, 6)[..., 1] = ramp[:, None]
        boxes = g.training_positions(2000, (2, 2))[..., :2]  # [B, 4, (x, y)]
    low, high = boxes[:, 0], boxes[:, 3]
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    width, height = (high - low).unbind(-1)
    whole = (width < 0.999) & (height < 0.999)  # not clamped
    aspect = (width / height)[whole]
    assert aspect.min() >= 9 / 16 - 1e-3
    assert aspect.max() <= 16 / 9 + 1e-3
    scale = (width * height)[whole].sqrt()
    assert scale.min() >= math.sqrt(0.1) - 1e-3
    assert abs(aspect.log().mean()) < 0.05
    assert abs(scale.mean() - (math.sqrt(0.1) + 0.85) / 2) < 0.06


@pytest.mark.parametrize("grid", [(3, 4), (5, 5)])
def test_one_image_in_ten_gets_no_position(grid: tuple[int, int]) -> None:
    g = generator().train()
    dropped = (g.positions(4000, grid) == 0).flatten(1).all(1).float().mean()
    assert abs(dropped - POSITION_DROPOUT) < 0.02


def test_nothing_is_drawn_for_the_grid_s_own_size_or_without_cpe() -> None:
    assert torch.equal(generator().train().training_positions(3, (5, 5)), generator().pos_embed)
    g = generator("window").train()
    assert torch.equal(g.training_positions(3, (2, 3)), g.eval().positions(1, (2, 3)))


def test_draws_can_come_from_elsewhere() -> None:
    """Rows of a batch get what they would get in it, if they are given its numbers; torch's own are left alone."""
    g = generator().train()
    shapes: list[tuple[int, ...]] = []

    def rows(start: int) -> Callable[[tuple[int, ...]], torch.Tensor]:
        own = torch.Generator().manual_seed(3)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            shapes.append(shape)
            return torch.rand((4, *shape[1:]), generator=own)[start : start + shape[0]]

        return draw

    state = torch.get_rng_state()
    with g.drawing_from(rows(0)):
        whole = g.positions(4, (3, 4))
    assert shapes == [(4, 1, 1), (4, 1, 1), (4, 1, 1, 2), (4, 1, 1)]
    with g.drawing_from(rows(1)):
        part = g.positions(2, (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(part, whole[1:3])
    assert not torch.equal(g.positions(4, (3, 4)), whole)  # which draws from torch again


def test_frames_of_a_video_share_their_crop() -> None:
    g = generator().train()
    with g.video_mode(3):
        assert g.num_video_frames == 3
        crops = g.training_positions(6, (3, 4))
    assert torch.equal(crops[0], crops[1])
    assert torch.equal(crops[3], crops[5])
    assert not torch.equal(crops[2], crops[3])
    assert g.num_video_frames is None


def test_video_mode_is_left_after_an_error_and_nests() -> None:
    g = generator().train()
    with g.video_mode(2):
        with pytest.raises(RuntimeError, match="stop"), g.video_mode(4):
            raise RuntimeError("stop")
        assert g.num_video_frames == 2
    assert g.num_video_frames is None


def test_video_mode_errors() -> None:
    g = generator().train()
    with pytest.raises(OptionError) as raised, g.video_mode(4):
        g(torch.zeros(6, 3, 8, 12))
    assert str(raised.value) == (
        "Video mode has 4 frames a video, but the batch of 6 images is not a multiple of that. Pass whole videos."
    )
    with pytest.raises(OptionError, match=r"^A video has at least one frame, got 0\.$"), g.video_mode(0):
        pass
    with torch.no_grad(), g.video_mode(4):
        assert g.eval()(torch.zeros(6, 3, 8, 12)).shape == (6, 9, 6)  # no effect outside training


# ---- the cache ----

GRIDS = [(3, 4), (7, 2), (5, 5), (9, 9)]


def warm(g: PatchGenerator) -> None:
    with torch.no_grad():
        for grid in GRIDS:
            g.positions(1, grid)


def change_by_state_dict(g: PatchGenerator) -> None:
    g.load_state_dict({k: v + 1 for k, v in g.state_dict().items()})


def change_by_assigned_state_dict(g: PatchGenerator) -> None:
    g.load_state_dict({k: v + 1 for k, v in g.state_dict().items()}, assign=True)


def change_by_optimizer(g: PatchGenerator) -> None:
    optimizer = torch.optim.SGD(g.parameters(), lr=3.0)
    g(torch.rand(2, 3, 12, 16)).square().sum().backward()
    optimizer.step()


def change_in_place(g: PatchGenerator) -> None:
    with torch.no_grad():
        g.pos_embed.mul_(-2)


def change_in_inference_mode(g: PatchGenerator) -> None:
    with torch.inference_mode():
        g.pos_embed.mul_(-2)


def change_by_new_parameter(g: PatchGenerator) -> None:
    g.pos_embed = torch.nn.Parameter(g.pos_embed.detach() * 3)


def change_by_new_data(g: PatchGenerator) -> None:
    g.pos_embed.data = g.pos_embed.detach() * 3


def change_by_reset(g: PatchGenerator) -> None:
    torch.nn.init.normal_(g.pos_embed)


CHANGES = [v for k, v in list(globals().items()) if k.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_follow_the_parameter(change: Callable[[PatchGenerator], None], mode: Callable[[], Any]) -> None:
    g = generator()
    warm(g)
    before = g.pos_embed.detach().clone()
    change(g)
    assert not torch.equal(g.pos_embed, before)
    with mode():
        for grid in GRIDS:
            assert_right(g, grid)


def test_positions_follow_the_dtype() -> None:
    g = generator()
    warm(g)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        g.to(dtype)
        with torch.no_grad():
            for grid in GRIDS:
                assert g.positions(1, grid).dtype == dtype
                assert_right(g, grid, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_positions_follow_the_interpolation() -> None:
    g = generator()
    warm(g)
    g.interpolation = "align_corners"
    with torch.no_grad():
        assert_right(g, (3, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies_have_a_cache_of_their_own(copied: Callable[[PatchGenerator], PatchGenerator]) -> None:
    g = generator()
    warm(g)
    other = copied(g)
    assert other._cache is not g._cache
    assert not other._cache._entries
    change_in_place(other)
    with torch.no_grad():
        for model in (g, other):
            assert_right(model, (3, 4))


def test_results_are_kept_and_bounded() -> None:
    g = generator()
    g._cache = TensorCache(capacity=3)
    with torch.no_grad():
        first = g.positions(1, (1, 2))
        assert g.positions(1, (1, 2)).data_ptr() == first.data_ptr()
        for side in range(2, 8):
            g.positions(1, (side, 3))
            assert g.positions(4, (1, 2)).data_ptr() == first.data_ptr()  # recently used ones stay
            assert len(g._cache._entries) <= 3
    assert "_cache" not in "".join(g.state_dict())
    assert len(g.state_dict()) == 3


def test_what_inference_mode_kept_is_of_use_elsewhere() -> None:
    g = generator()
    images = torch.rand(2, 3, 12, 16)
    with torch.inference_mode():
        inside = g(images).clone()
    with torch.no_grad():
        assert torch.equal(g(images), inside)
        assert not g.positions(1, (3, 4)).is_inference()
    tokens = g(images)
    assert torch.equal(tokens, inside)
    tokens.sum().backward()
    assert g.pos_embed.grad is not None


def test_parameters_made_in_inference_mode_are_not_kept() -> None:
    with torch.inference_mode():
        g = generator()
        g.positions(1, (3, 4))
        change_in_place(g)  # has no version to notice this by
        assert_right(g, (3, 4))


@pytest.mark.parametrize("grid", GRIDS)
def test_gradient_after_inference_is_that_of_the_resize(grid: tuple[int, int]) -> None:
    g = generator()
    warm(g)
    weight = torch.randn(1, grid[0] * grid[1], 6)
    (g.positions(1, grid) * weight).sum().backward()
    # The resize is linear, so its transpose, found from what it does to each grid cell, carries the gradient.
    cells = generator(embed_dim=25)
    with torch.no_grad():
        cells.pos_embed.copy_(torch.eye(25)[None])
    matrix = slow_positions(cells, *grid)[0]  # [h*w, rows*cols]
    assert g.pos_embed.grad is not None
    torch.testing.assert_close(g.pos_embed.grad[0].double(), matrix.T @ weight[0].double(), atol=1e-5, rtol=1e-5)


def test_training_after_inference_moves_positions(make_toy_step: Callable[[], tuple[Tensor, Tensor]]) -> None:
    cold, warmed = make_toy_step()
    torch.testing.assert_close(warmed, cold, atol=0, rtol=0)
    assert cold.any()


@pytest.fixture
def make_toy_step(toy: Callable[..., RadioModel]) -> Callable[[], tuple[Tensor, Tensor]]:
    """The gradient of one training step on pos_embed, without and with inference before it."""

    def step() -> tuple[Tensor, Tensor]:
        images = torch.rand(2, 3, 32, 48)
        found = []
        for infer_before in (False, True):
            model = toy("vit_small_patch16_224")
            if infer_before:
                with torch.inference_mode():
                    model(images)
            model.train()
            torch.manual_seed(0)
            model(images).features.square().sum().backward()
            found.append(model.model.patch_generator.pos_embed.grad)
        return found[0], found[1]

    return step
