"""Sweeps over resolutions: values against NumPy, and synthetic backbones that switch, or do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amradio.errors import DatasetError, OptionError
from amradio.evals.mode_switching import (
    CURVE_COLUMNS,
    Agreement,
    ModeSwitchingConfig,
    StripMap,
    run_mode_switching,
    supported,
    sweep_of,
    teacher_side,
)
from amradio.evals.pairs import PaddedBackbone, fixed_resolution, resized_to
from amradio.evals.report import EvalReport
from amradio.evals.runner import Setup
from amradio.images import open_images
from amradio.images.resize import ResizePolicy
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput

SWEEP = tuple(range(256, 1025, 64))
DIM = 8


class Synthetic(nn.Module):
    """Features are a random linear function of patch colours; something may happen to them above a resolution."""

    summary_dim = embed_dim = DIM

    def __init__(
        self,
        patch: int = 32,
        *,
        change: Callable[[Tensor, int], Tensor] = lambda x, side: x,
        fixed: int | None = None,
        dim: int = DIM,
    ) -> None:
        super().__init__()
        self.patch_size = self.min_resolution_step = patch
        self.embed_dim = self.summary_dim = dim
        self.preferred_resolution = Resolution(224, 224)
        self.change, self.fixed = change, fixed
        self.weight = torch.randn(dim, 3, generator=torch.Generator().manual_seed(1))
        self.sides: list[tuple[int, int]] = []
        self.eval()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        if self.fixed is not None:
            return Resolution(self.fixed, self.fixed)
        p = self.patch_size
        return Resolution(*(max(round(side / p) * p, p) for side in (height, width)))

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        self.sides.append(tuple(images.shape[-2:]))
        colours = nn.functional.avg_pool2d(images, self.patch_size) - 0.5  # [B, 3, h, w]
        maps = self.change(torch.einsum("dc,bchw->bdhw", self.weight, colours), images.shape[-1])
        return RadioOutput(maps.mean((2, 3)), maps if feature_fmt == "NCHW" else maps.flatten(2).mT)


def rotated_above(limit: int) -> Callable[[Tensor, int], Tensor]:
    """Features in another order from a resolution on, and a smooth trend towards small ones."""

    def change(x: Tensor, side: int) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(side)) * 4 / side
        return (x.roll(1, dims=1) if side > limit else x) + noise

    return change


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 255, (6, 7 + i % 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((70 + 10 * (i % 2), 60)).save(folder / f"{i}.png")
    return open_images(str(folder))


# ---- verdicts ----


def test_a_switch_at_720_is_found(images) -> None:
    report = run_mode_switching(
        Synthetic(change=rotated_above(720)), Synthetic(), images, ModeSwitchingConfig(resolutions=SWEEP)
    )
    (switch,) = report.details["switches"]["switches"]
    assert (switch["low"], switch["high"]) == (704, 768)
    assert switch["size"] > 0.3
    assert report.metrics["switches"].value == 1
    assert report.metrics["largest_change_above"].value == 704
    assert report.notes[0].startswith("Switch between 704 and 768 px: the error goes from")


def test_a_trend_alone_is_no_switch(images) -> None:
    report = run_mode_switching(
        Synthetic(change=rotated_above(9999)), Synthetic(), images, ModeSwitchingConfig(resolutions=SWEEP)
    )
    assert report.metrics["switches"].value == 0
    assert report.notes[0].startswith("No switch between")


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_a_switch_shows_against_the_student_itself(images, measure: str) -> None:
    config = ModeSwitchingConfig(resolutions=SWEEP, measure=measure, reference=256)
    report = run_mode_switching(Synthetic(change=rotated_above(720)), None, images, config)
    (switch,) = report.details["switches"]["switches"]
    assert (switch["low"], switch["high"]) == (704, 768)
    assert report.config["teacher_resolution"] == 256
    at_reference = report.details["curve"][SWEEP.index(256)]
    assert at_reference["mse"] == 0
    assert at_reference["fidelity"] is None  # it would be infinite
    assert at_reference["one_minus_cosine"] == pytest.approx(0, abs=1e-12)


# ---- values ----


def test_values_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randn(4, 3, 5, generator=generator) + 1 for _ in range(2)) for _ in range(6)]
    agreement = Agreement(4)
    for i, (student, teacher) in enumerate(pairs):
        agreement.update(i, student, teacher)
    s, t = (np.stack([pair[k].flatten(1).T.double().numpy() for pair in pairs]) for k in (0, 1))  # [N, L, D]
    cosines = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)  # [N, L]
    mse = ((s - t) ** 2).mean()
    found = agreement.values()
    assert found["one_minus_cosine"] == pytest.approx(1 - cosines.mean())
    assert found["one_minus_cosine_se"] == pytest.approx((1 - cosines.mean(1)).std(ddof=1) / np.sqrt(6))
    assert found["mse"] == pytest.approx(mse)
    assert found["student_variance"] == pytest.approx(s.reshape(-1, 4).var(0).mean())
    assert found["teacher_variance"] == pytest.approx(t.reshape(-1, 4).var(0).mean())
    assert found["fidelity"] == pytest.approx(t.reshape(-1, 4).var(0).mean() / mse)


def test_a_student_that_says_the_mean_has_a_fidelity_of_one() -> None:
    teacher = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    agreement = Agreement(3)
    agreement.update(0, teacher.mean((1, 2), keepdim=True).expand_as(teacher), teacher)
    assert agreement.values()["fidelity"] == pytest.approx(1)
    assert agreement.values()["one_minus_cosine_se"] is None


def test_the_teacher_is_resized_corner_on_corner() -> None:
    ramp = torch.arange(5.0)[None, None].expand(2, 5, 5)
    assert torch.equal(resized_to(ramp, (3, 9))[0, 0], torch.arange(0, 4.5, 0.5))
    assert resized_to(ramp, (5, 5)) is ramp


def test_the_curve_has_all_columns_and_survives_a_file(images, tmp_path: Path) -> None:
    config = ModeSwitchingConfig(resolutions=(64, 128, 192))
    asked: list[ResizePolicy] = []

    def accuracies(policy: ResizePolicy) -> dict[str, float]:
        asked.append(policy)
        return {"knn_top1": 50.0}

    report = run_mode_switching(Synthetic(), Synthetic(), images, config, accuracies=accuracies)
    assert [tuple(row) for row in report.details["curve"]] == [(*CURVE_COLUMNS, "knn_top1")] * 3
    assert [p.size for p in asked] == [(64, 64), (128, 128), (192, 192)]
    assert report.size_label == "64-192"
    path, _ = report.save(tmp_path / "sweep")
    assert EvalReport.load(path) == EvalReport.from_dict(json.loads(json.dumps(report.to_dict())))


# ---- which pictures the teacher sees ----


def test_the_teacher_sees_as_many_patches(images) -> None:
    student, teacher = Synthetic(16), Synthetic(14)
    run_mode_switching(student, teacher, images, ModeSwitchingConfig(resolutions=(64, 160)))
    assert set(student.sides) == {(64, 64), (160, 160)}
    assert set(teacher.sides) == {(56, 56), (140, 140)}


def test_a_teacher_of_one_size_is_run_once(images) -> None:
    teacher = Synthetic(32, fixed=128)
    report = run_mode_switching(Synthetic(), teacher, images, ModeSwitchingConfig(resolutions=(64, 128, 256)))
    assert set(teacher.sides) == {(128, 128)}
    assert len(teacher.sides) == 1  # one batch of all pictures
    assert [row["teacher_resolution"] for row in report.details["curve"]] == [128] * 3
    teacher.sides.clear()
    run_mode_switching(Synthetic(), teacher, images, ModeSwitchingConfig(resolutions=(64, 128)), cache_bytes=100)
    assert len(teacher.sides) == 2


def test_a_fixed_teacher_resolution(images) -> None:
    teacher = Synthetic(16)
    config = ModeSwitchingConfig(resolutions=(64, 128), teacher_resolution=100)
    run_mode_switching(Synthetic(), teacher, images, config)
    assert set(teacher.sides) == {(96, 96)}


def test_a_padded_teacher_sees_the_picture_in_the_corner(images) -> None:
    teacher = Synthetic(32, fixed=256)
    config = ModeSwitchingConfig(resolutions=(64, 128, 256), teacher_fit="pad")
    report = run_mode_switching(Synthetic(), teacher, images, config)
    assert set(teacher.sides) == {(256, 256)}
    assert [row["mse"] for row in report.details["curve"]] == pytest.approx([0, 0, 0], abs=1e-12)
    with pytest.raises(OptionError, match="takes pictures of 256x256 at most, and a student at 512 px asks for 512"):
        run_mode_switching(Synthetic(), teacher, images, ModeSwitchingConfig(resolutions=(512,), teacher_fit="pad"))


def test_padding() -> None:
    padded = PaddedBackbone(Synthetic(4, fixed=16))
    assert padded.get_nearest_supported_resolution(9, 100) == (8, 16)
    assert fixed_resolution(padded) is None
    image = torch.rand(1, 3, 8, 12)
    features = padded(image).features
    assert torch.allclose(features, Synthetic(4)(image).features, atol=1e-6)
    assert padded(image, feature_fmt="NCHW").features.shape == (1, DIM, 2, 3)
    with pytest.raises(OptionError, match="accepts pictures of several sizes, so there is no size to pad to"):
        PaddedBackbone(Synthetic())


def test_an_upsampling_adaptor_asks_for_a_finer_teacher() -> None:
    config = ModeSwitchingConfig(resolutions=(64,))
    assert teacher_side(64, Synthetic(8), Synthetic(16), config) == 128


# ---- strips, failures, refusals ----


def test_strips_of_some_pictures_at_some_resolutions(images) -> None:
    found: list[StripMap] = []
    config = ModeSwitchingConfig(resolutions=(64, 96, 128, 160, 192), strip_pictures=2, strip_resolutions=3)
    run_mode_switching(Synthetic(), Synthetic(), images, config, on_strip=found.append)
    assert [(s.resolution, s.picture) for s in found] == [(64, 0), (64, 1), (128, 0), (128, 1), (192, 0), (192, 1)]
    assert found[-1].features.shape == (6, 6, DIM)
    assert found[-1].pixels.shape == (3, 192, 192)


def test_a_broken_picture_is_counted_once(images, tmp_path: Path) -> None:
    for i in range(len(images)):
        (tmp_path / f"{i}.png").write_bytes(Path(images[i].location).read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    report = run_mode_switching(
        Synthetic(), None, open_images(str(tmp_path)), ModeSwitchingConfig(resolutions=(64, 128))
    )
    assert report.dataset["eval"]["count"] == 4
    assert report.dataset["eval"]["failed"] == 1
    assert [row["pictures"] for row in report.details["curve"]] == [3, 3]
    for i in range(len(images)):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DatasetError, match="None of the 1 pictures"):
        run_mode_switching(Synthetic(), None, open_images(str(tmp_path)), ModeSwitchingConfig(resolutions=(64,)))


def test_features_that_are_not_finite(images) -> None:
    student = Synthetic(change=lambda x, side: x / 0)
    with pytest.raises(OptionError, match="are not finite numbers, so Synthetic does not work in this precision"):
        run_mode_switching(student, Synthetic(), images, ModeSwitchingConfig(resolutions=(64,)))


def test_widths_must_agree(images) -> None:
    with pytest.raises(OptionError, match=r"student's features are 8 wide and the teacher's 5.*now none"):
        run_mode_switching(Synthetic(), Synthetic(dim=5), images, ModeSwitchingConfig(resolutions=(64,)))


def test_sweeps_are_of_squares(images) -> None:
    setup = Setup(ResizePolicy("shortest", (64,)))
    with pytest.raises(OptionError, match="choose the mode 'crop' or 'exact'"):
        run_mode_switching(Synthetic(), None, images, ModeSwitchingConfig(resolutions=(64,)), setup)


def test_resolutions_of_a_sweep() -> None:
    assert sweep_of(196, 1536, 16, 16)[0] == 192
    assert sweep_of(196, 1536, 16, 16)[-1] == 1536
    assert len(sweep_of(196, 1536, 16, 16)) == 85
    assert sweep_of(100, 300, 90, 16) == (96, 192, 288, 304)
    assert sweep_of(5, 5, 1, 16) == (16,)
    assert supported([60, 66, 100], Synthetic()) == (64, 96)
    with pytest.raises(OptionError, match="0 < from <= to"):
        sweep_of(300, 200, 16, 16)


@pytest.mark.parametrize("resolutions", [(), (64, 64), (128, 64), (0, 64)])
def test_resolutions_must_ascend(resolutions: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="Resolutions must be ascending numbers of pixels"):
        ModeSwitchingConfig(resolutions=resolutions)
