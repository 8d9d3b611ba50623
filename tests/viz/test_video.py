"""Frames beside their feature maps, in one basis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from amradio.errors import OptionError
from amradio.features import FeatureMap
from amradio.images import ResizePolicy
from amradio.viz import PCABasis, fit_basis, to_picture
from amradio.viz import video as video_module
from amradio.viz.basis_file import NamedBasis, basis_of, load_bases, save_bases
from amradio.viz.video import ClipPainter, fit_clip_bases

SHORTEST = ResizePolicy("shortest", (64,))


def maps(count: int, panels: int = 1, grid: tuple[int, int] = (4, 6), width: int = 8) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(*grid, width, generator=generator) for _ in range(panels)] for _ in range(count)]


def feature_map(features: Tensor, size: tuple[int, int] = (64, 96)) -> FeatureMap:
    return FeatureMap(Image.new("RGB", size[::-1]), features, features.mean((0, 1)))


def painter(heads: Sequence[str] = ("a",), **options) -> ClipPainter:
    basis = fit_basis(maps(1)[0])
    policies = options.pop("policies", [SHORTEST] * len(heads))
    return ClipPainter((90, 134), heads, [basis] * len(heads), policies, **options)


def same(a: PCABasis, b: PCABasis) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("matrix", "minimum", "maximum"))


# ---- the basis ----


def test_the_basis_of_a_clip_is_that_of_all_its_maps() -> None:
    frames = maps(5)
    (found,) = fit_clip_bases(frames, ["model"], count=5)
    assert same(found, fit_basis([m for (m,) in frames]))
    (skipped,) = fit_clip_bases(frames, ["model"], count=5, skip=1)
    torch.testing.assert_close(skipped.matrix[:, 0], found.matrix[:, 1])


def test_panels_of_one_space_share_a_basis() -> None:
    frames = maps(4, panels=3)
    bases = fit_clip_bases(frames, ["a", "b", "a"])
    assert same(bases[0], bases[2])
    assert not same(bases[0], bases[1])
    assert same(bases[1], fit_basis([m[1] for m in frames]))
    assert same(bases[0], fit_basis([m[i] for m in frames for i in (0, 2)]))


def test_a_large_clip_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [[torch.arange(8.0 * 10).view(8, 10, 1).repeat(1, 1, 4)] for _ in range(6)]
    taken: list[Tensor] = []
    monkeypatch.setattr(video_module, "MOST_VALUES", 6 * 4 * 20)
    monkeypatch.setattr(video_module, "fit_basis", lambda rows, skip: taken.extend(rows))
    fit_clip_bases(frames, ["a"], count=6)
    assert [len(rows) for rows in taken] == [20] * 6
    assert {int(v) for rows in taken for v in rows[:, 0]} == set(range(80))  # no place is always left out
    assert all(rows.untyped_storage().nbytes() == rows.numel() * 4 for rows in taken)  # no hidden whole map


def test_a_basis_needs_frames() -> None:
    with pytest.raises(OptionError, match="no features"):
        fit_clip_bases([], ["a"])


# ---- painting ----


def test_the_map_is_painted_beside_the_frame() -> None:
    features = maps(1)[0][0]
    basis = fit_basis(features)
    paint = ClipPainter((90, 134), ["a"], [basis], [SHORTEST], captions=False, upsampling="nearest")
    frame = Image.effect_noise((134, 90), 50).convert("RGB")
    page = paint.paint(frame, [feature_map(features)])
    assert (page.height, page.width) == paint.size == (90, 2 * 134 + 4)
    np.testing.assert_array_equal(page.crop((0, 0, 134, 90)), frame)
    expected = to_picture(basis.rgb(features), (90, 134), "nearest")
    np.testing.assert_array_equal(page.crop((138, 0, 272, 90)), expected)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear", "bicubic", "guided"])
def test_upsampling(upsampling: str) -> None:
    paint = painter(upsampling=upsampling)
    pages = [paint.paint(Image.effect_noise((134, 90), 50).convert("RGB"), [feature_map(maps(1)[0][0])])]
    assert all(page.size == paint.size[::-1] for page in pages)


@pytest.mark.parametrize("columns", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("height", [None, 31, 64])
@pytest.mark.parametrize("captions", [False, True])
def test_sizes_are_even_and_everything_is_inside(columns: int | None, height: int | None, captions: bool) -> None:
    heads = ["one", "a head that is much too long for its picture", "three"]
    paint = painter(heads, columns=columns, height=height, captions=captions)
    assert all(side % 2 == 0 for side in paint.size)
    white = [feature_map(torch.full((4, 6, 8), 1e6)) for _ in heads]
    page = np.asarray(paint.paint(Image.new("RGB", (134, 90), (250, 0, 250)), white))
    rows = -(-3 // min(columns or 3, 3)) if columns else 1
    cell = 90 if height is None else height
    painted = (page == (250, 0, 250)).all(-1).sum()
    assert painted == rows * cell * round(134 * cell / 90)


def test_captions_are_written_above() -> None:
    page = np.asarray(
        painter(["resolution"], height=60).paint(Image.new("RGB", (134, 90)), [feature_map(maps(1)[0][0])])
    )
    head = page[:14]
    assert (head > 180).all(-1).any()
    assert not np.array_equal(head[:, : page.shape[1] // 2], head[:, page.shape[1] // 2 :])


def test_a_centre_crop_is_painted_where_it_belongs() -> None:
    policy = ResizePolicy("crop", (64, 64))
    paint = ClipPainter((90, 180), ["a"], [fit_basis(maps(1)[0])], [policy], captions=False)
    frame = Image.new("RGB", (180, 90), (200, 100, 40))
    page = np.asarray(paint.paint(frame, [feature_map(maps(1, grid=(4, 4))[0][0], (64, 64))]))
    panel = page[:, 184:]
    dimmed = panel[45, 20]
    np.testing.assert_allclose(dimmed, np.array([200, 100, 40]) * 0.25, atol=1)
    assert (panel[:, :45] == dimmed).all()
    assert (panel[:, -45:] == dimmed).all()
    assert not (panel[:, 45:135] == dimmed).all(-1).any()


def test_the_same_picture_each_time() -> None:
    frame, found = Image.effect_noise((134, 90), 50).convert("RGB"), [feature_map(maps(1)[0][0])]
    assert painter().paint(frame, found).tobytes() == painter().paint(frame, found).tobytes()


def test_what_cannot_be_painted() -> None:
    with pytest.raises(OptionError, match="Each panel needs a head, a basis and a policy, got 2, 2 and 1"):
        painter(["a", "b"], policies=[SHORTEST])
    with pytest.raises(OptionError, match="from 16 to 4096 pixels high, got 8"):
        painter(height=8)
    features = maps(1)[0][0]
    features[0, 0, 0] = float("nan")
    with pytest.raises(OptionError, match="features that are not finite"):
        painter().paint(Image.new("RGB", (134, 90)), [feature_map(features)])


# ---- bases in files ----


def test_bases_come_back(tmp_path: Path) -> None:
    bases = [NamedBasis({"model": n, "layer": None}, fit_basis(m[0])) for n, m in zip("ab", maps(2), strict=True)]
    save_bases(tmp_path / "colours.safetensors", bases)
    loaded = load_bases(tmp_path / "colours.safetensors")
    assert [dict(one.about) for one in loaded] == [dict(one.about) for one in bases]
    assert all(same(a.basis, b.basis) for a, b in zip(bases, loaded, strict=True))
    assert same(basis_of({"layer": None, "model": "b"}, loaded, "x"), bases[1].basis)
    with pytest.raises(
        OptionError, match=r"x has no colours for model c, layer 2\. It has those of: model a; model b\."
    ):
        basis_of({"model": "c", "layer": 2}, loaded, "x")


def test_files_without_colours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "file.safetensors"
    with pytest.raises(OptionError, match=r"There is no file .* with colours"):
        load_bases(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(OptionError, match="holds no colours of feature maps"):
        load_bases(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(OptionError, match="cannot be read as colours of feature maps"):
        load_bases(path)
    save_bases(path, [NamedBasis({}, PCABasis(torch.zeros(4, 2), torch.zeros(3), torch.zeros(3)))])
    with pytest.raises(OptionError, match="tensors of other shapes"):
        load_bases(path)
