"""The whole probe on pictures whose classes are colours."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import amradio
from amradio.cli import main
from amradio.errors import CapabilityError, DatasetError, OptionError
from amradio.evals.linear_seg import LinearSegConfig, get_protocol, linear_seg_policy, run, run_linear_seg
from amradio.evals.linear_seg.checkpoint import Checkpoint
from amradio.evals.linear_seg.config import Augmentation, LinearSegProtocol
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.images.segmentation import SegmentationSet
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel

Sets = Callable[..., SegmentationSet]
QUICK = LinearSegProtocol(name="clean", iterations=150, batch_size=4, lr=0.05, warmup=5)
CROPS = LinearSegProtocol(
    name="crops", augmentation=Augmentation(scale=(0.8, 2.0), colours=False), iterations=40, batch_size=4, lr=0.05,
    warmup=2, inference="slide", snapped=False,
)  # fmt: skip


def setup(backbone: Any, resolution: tuple[int, ...] = (24,), **options: Any) -> Setup:
    return Setup(linear_seg_policy(backbone, resolution), ExtractOptions(**{"batch_size": 2, "workers": 2} | options))


def miou(report: Any) -> float:
    return float(report.metrics["miou"].value)


@pytest.mark.parametrize("protocol", [get_protocol("ridge"), QUICK, CROPS], ids=lambda p: p.name)
def test_it_learns_what_features_can_tell(backbone: Any, make_set: Sets, protocol: LinearSegProtocol) -> None:
    train, val = make_set("train", 12, 0), make_set("val", 6, 1)
    config = LinearSegConfig(protocol=protocol)
    report = run_linear_seg(backbone, train, val, config, setup(backbone))
    assert miou(report) > 80  # what is missing lies at borders within patches that are enlarged
    assert set(report.per_class or {}) == {"red", "green", "blue"}
    assert report.protocol.startswith(f"linear segmentation probe, {protocol.name}:")
    assert "masks scored at the size of the mask files" in report.protocol
    again = run_linear_seg(backbone, train, val, config, setup(backbone))
    assert miou(again) == miou(report)
    shuffled = run_linear_seg(backbone, train, val, config, setup(backbone, batch_size=5, workers=1))
    assert miou(shuffled) == pytest.approx(miou(report), abs=0.2)


def test_blind_features_learn_nothing(make_set: Sets, backbone: Any) -> None:
    class Blind(type(backbone)):  # type: ignore[misc]
        def forward(self, images: Tensor, feature_fmt: str = "NLC") -> Any:
            return super().forward(torch.zeros_like(images), feature_fmt)

    blind = Blind()
    report = run_linear_seg(
        blind, make_set("train", 6, 0), make_set("val", 4, 1), LinearSegConfig(protocol=QUICK), setup(blind)
    )
    assert miou(report) < 25  # everything is one class of three


def test_views_and_sizes(backbone: Any, make_set: Sets) -> None:
    train, val = make_set("train", 8, 0), make_set("val", 4, 1)
    ridge = LinearSegConfig(protocol=get_protocol("ridge"))
    several = dataclasses.replace(ridge, scales=(1.0, 2.0), flip=True)
    stretched = setup(backbone, (16, 16))
    found = {
        "plain": miou(run_linear_seg(backbone, train, val, ridge, setup(backbone))),
        "several": miou(run_linear_seg(backbone, train, val, several, setup(backbone))),
        "stretched": miou(run_linear_seg(backbone, train, val, ridge, stretched)),
        "at the size seen": miou(
            run_linear_seg(backbone, train, val, dataclasses.replace(ridge, score_at="evaluated"), stretched)
        ),
    }
    assert min(found.values()) > 60, found
    assert len(set(found.values())) == 4


def test_features_are_computed_once_and_found_again(backbone: Any, make_set: Sets, tmp_path: Path) -> None:
    train, val = make_set("train", 6, 0), make_set("val", 4, 1)
    config = LinearSegConfig(protocol=QUICK)
    first = run_linear_seg(backbone, train, val, config, setup(backbone), cache=tmp_path / "cache")
    assert backbone.seen == 10
    second = run_linear_seg(backbone, train, val, config, setup(backbone), cache=tmp_path / "cache")
    assert backbone.seen == 14
    assert miou(first) == miou(second)
    assert any("were read from" in note for note in second.notes)
    run_linear_seg(backbone, train, val, config, setup(backbone, (16,)), cache=tmp_path / "cache")
    assert backbone.seen == 24  # another size: nothing is taken from the file
    (tmp_path / "cache" / "features" / "features.f16").write_bytes(b"cut off")
    run_linear_seg(backbone, train, val, config, setup(backbone, (16,)), cache=tmp_path / "cache")
    assert backbone.seen == 34


def test_a_head_is_kept(backbone: Any, make_set: Sets, tmp_path: Path) -> None:
    train, val = make_set("train", 6, 0), make_set("val", 4, 1)
    config = LinearSegConfig(protocol=get_protocol("ridge"))
    path = tmp_path / "heads" / "head.safetensors"
    report = run_linear_seg(backbone, train, val, config, setup(backbone), head_out=path)
    seen = backbone.seen
    again = run_linear_seg(backbone, train, val, config, setup(backbone), head_in=path)
    assert miou(again) == miou(report)
    assert backbone.seen == seen + 4
    sliding = LinearSegConfig(protocol=CROPS)
    other = run_linear_seg(backbone, train, val, sliding, setup(backbone, (32,)), head_in=path)
    assert "probe, ridge: ridge regression" in other.protocol
    assert "AdamW" not in other.protocol
    assert "; sliding windows;" in other.protocol
    assert other.details["head_about"]["protocol"]["solver"] == "ridge"
    assert any("fitted at another size: resize.size is [24] in the file and [32] now" in n for n in other.notes)
    other = make_set("other", 2, 5)
    other.class_names = ("red", "green", "violet")
    more = make_set("more", 2, 6)
    more.class_names = ("red", "green", "violet")
    with pytest.raises(OptionError, match=r"belongs to something else: classes is .*blue.* in the file"):
        run_linear_seg(backbone, other, more, config, setup(backbone), head_in=path)
    with pytest.raises(OptionError, match="There is no head"):
        run_linear_seg(backbone, train, val, config, setup(backbone), head_in=tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(OptionError, match="cannot be read as a head"):
        run_linear_seg(backbone, train, val, config, setup(backbone), head_in=tmp_path / "text")


class KilledError(Exception):
    """Somebody ended the run."""


def kill_at(step: int) -> Callable[[int, float], None]:
    def on_step(now: int, loss: float) -> None:
        if now == step:
            raise KilledError

    return on_step


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("protocol", [QUICK, CROPS], ids=lambda p: p.name)
def test_a_killed_training_goes_on_to_the_same_bits(
    backbone: Any, make_set: Sets, tmp_path: Path, protocol: LinearSegProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Checkpoint", functools.partial(Checkpoint, every=7))
    train, val = make_set("train", 6, 0), make_set("val", 2, 1)
    (tmp_path / "train" / "images" / "3.png").write_bytes(b"no picture")
    config = LinearSegConfig(protocol=dataclasses.replace(protocol, iterations=20))

    def probe(name: str, **options: Any) -> Any:
        return run_linear_seg(backbone, train, val, config, setup(backbone), head_out=tmp_path / name, **options)

    whole, steps = probe("whole.safetensors"), []
    state = tmp_path / "states" / "state.safetensors"
    with pytest.raises(KilledError):
        probe("never", checkpoint=state, on_step=kill_at(16))
    resumed = probe("resumed.safetensors", checkpoint=state, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(14, 20))
    assert same_tensors(tmp_path / "resumed.safetensors", tmp_path / "whole.safetensors")
    assert resumed.details["loss"] == whole.details["loss"]
    assert resumed.failed == whole.failed
    assert resumed.metrics == whole.metrics
    probe("done.safetensors", checkpoint=state, on_step=kill_at(0))  # no step is left
    assert same_tensors(tmp_path / "done.safetensors", tmp_path / "whole.safetensors")

    config = dataclasses.replace(config, seed=1)
    with pytest.raises(
        OptionError, match=r"belongs to another training: seed is 0 in the file and 1 now\. Name another"
    ):
        probe("never", checkpoint=state)
    state.write_text("hello")
    with pytest.raises(OptionError, match="cannot be read as the state of a training"):
        probe("never", checkpoint=state)
    assert not (tmp_path / "never").exists()


def test_broken_pictures_are_left_out(backbone: Any, make_set: Sets, tmp_path: Path) -> None:
    train, val = make_set("train", 6, 0), make_set("val", 4, 1)
    (tmp_path / "train" / "images" / "2.png").write_bytes(b"no picture")
    Image.new("L", (5, 5)).save(tmp_path / "val" / "masks" / "1.png")
    for protocol in (get_protocol("ridge"), QUICK, CROPS):
        report = run_linear_seg(backbone, train, val, LinearSegConfig(protocol=protocol), setup(backbone))
        assert (report.dataset["train"]["failed"], report.dataset["eval"]["failed"]) == (1, 1)
        assert miou(report) > 60


def test_what_cannot_be_measured_is_refused(backbone: Any, make_set: Sets, tmp_path: Path) -> None:
    train, val = make_set("train", 2, 0), make_set("val", 2, 1)
    ridge, crops = (LinearSegConfig(protocol=p) for p in (get_protocol("ridge"), CROPS))
    with pytest.raises(OptionError, match="A centre crop leaves out"):
        linear_seg_policy(backbone, (16, 16), "crop")
    with pytest.raises(OptionError, match="give one number as the resolution"):
        run_linear_seg(backbone, train, val, crops, setup(backbone, (16, 16)))
    with pytest.raises(OptionError, match=r"Crops of 18 pixels do not consist of whole patches.* Nearest: 16"):
        run_linear_seg(backbone, train, val, crops, setup(backbone, (18,)))
    with pytest.raises(DatasetError, match="both what is learnt from and what is scored"):
        run_linear_seg(backbone, train, train, ridge, setup(backbone))
    with pytest.raises(CapabilityError, match="does not give features of its blocks"):
        run_linear_seg(backbone, train, val, LinearSegConfig(layers=(-1,)), setup(backbone))
    with pytest.raises(OptionError, match="is in training mode"):
        run_linear_seg(type(backbone)().train(), train, val, ridge, setup(backbone))
    for path in (tmp_path / "train" / "masks").iterdir():
        Image.new("L", (32, 24), 255).save(path)
    with pytest.raises(DatasetError, match="are void, so there is nothing to learn from"):
        run_linear_seg(backbone, train, val, ridge, setup(backbone))


def test_a_few_pictures_choose_the_regularisation_too(backbone: Any, make_set: Sets) -> None:
    config = LinearSegConfig(protocol=get_protocol("ridge"))
    val = make_set("val", 2, 1)
    few = run_linear_seg(backbone, make_set("few", 4, 0), val, config, setup(backbone))
    assert len(few.details["held_out_error"]) == len(config.ridge)
    one = run_linear_seg(backbone, make_set("one", 1, 0), val, config, setup(backbone))
    assert one.details["ridge"] == 1e-2
    assert any("No picture could be held out" in note for note in one.notes)


def test_trainings_that_fail_are_no_result(backbone: Any, make_set: Sets, tmp_path: Path) -> None:
    class Loud(type(backbone)):  # type: ignore[misc]
        def forward(self, images: Tensor, feature_fmt: str = "NLC") -> Any:
            found = super().forward(images, feature_fmt)
            return found._replace(features=found.features * 1e6)

    train, val = make_set("train", 4, 0), make_set("val", 2, 1)
    with pytest.raises(OptionError, match=r"as large as .*e\+0.*, and half precision, .* ends at 65504"):
        run_linear_seg(Loud(), train, val, LinearSegConfig(protocol=QUICK), setup(backbone))
    state = tmp_path / "state"
    config = LinearSegConfig(protocol=CROPS, lr=1e38)
    with pytest.raises(OptionError, match=r"The loss is .* at step \d+, so the training has failed\. Choose a lower"):
        run_linear_seg(backbone, train, val, config, setup(backbone), checkpoint=state)


def test_kept_features_belong_to_a_precision(backbone: Any, make_set: Sets, tmp_path: Path) -> None:
    train, val = make_set("train", 4, 0), make_set("val", 2, 1)
    config, cache = LinearSegConfig(protocol=dataclasses.replace(QUICK, iterations=5)), tmp_path / "cache"
    run_linear_seg(backbone, train, val, config, setup(backbone, autocast=torch.bfloat16), cache=cache)
    again = run_linear_seg(backbone, train, val, config, setup(backbone), cache=cache)
    assert not any("were read from" in note for note in again.notes)


def test_features_that_are_not_finite(make_set: Sets, backbone: Any) -> None:
    class Broken(type(backbone)):  # type: ignore[misc]
        def forward(self, images: Tensor, feature_fmt: str = "NLC") -> Any:
            out = super().forward(images, feature_fmt)
            return out._replace(features=out.features / 0)

    with pytest.raises(OptionError, match="NaN or infinite"):
        run_linear_seg(Broken(), make_set("train", 2, 0), make_set("val", 2, 1), None, setup(backbone))


def test_layers_side_by_side(make_set: Sets) -> None:
    torch.manual_seed(0)
    vit = ViTConfig(embed_dim=16, depth=3, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(4, 4))
    model = RadioModel(RadioConfig(backbone=vit)).eval()
    train, val = make_set("train", 4, 0), make_set("val", 2, 1)
    config = LinearSegConfig(protocol=QUICK, layers=(0, -1))
    report = run_linear_seg(model, train, val, config, setup(model))
    assert "layers [0, -1]" in report.protocol
    images = torch.rand(2, 3, 24, 32)
    from amradio.evals.linear_seg.maps import FrozenMaps

    maps = FrozenMaps(model, ExtractOptions(), (0, -1))(images)
    with torch.inference_mode():
        first, last = model.forward_intermediates(images, [0, 2], norm=True, intermediates_only=True)
    torch.testing.assert_close(maps, torch.cat([first, last], 1).permute(0, 2, 3, 1))


def test_two_processes_measure_what_one_does(make_set: Sets, tmp_path: Path) -> None:
    make_set("train", 7, 0)
    make_set("val", 5, 1)
    (tmp_path / "train" / "images" / "3.png").write_bytes(b"no picture")
    script = Path(__file__).with_name("two_processes.py")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = runpy.run_path(str(script))["measure"](tmp_path, None)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1]
    for name, result in ranks[0].items():
        assert result["failed"] == alone[name]["failed"]
        assert result["loss"] == pytest.approx(alone[name]["loss"], rel=1e-3)
        assert result["metrics"] == pytest.approx(alone[name]["metrics"], abs=0.5)


def save_tiny(path: Path) -> Path:
    torch.manual_seed(0)
    vit = ViTConfig(embed_dim=16, depth=1, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(4, 4))
    model: nn.Module = RadioModel(RadioConfig(backbone=vit)).eval()
    return Path(amradio.save(model, path))


def test_the_command(make_set: Sets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set("train", 4, 0)
    make_set("val", 2, 1)
    model = str(save_tiny(tmp_path / "tiny.safetensors"))
    command = ["eval", "linear-seg", "--train", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "-m", model]
    command += ["--device", "cpu", "--resolution", "24", "--workers", "1"]
    head = str(tmp_path / "head.safetensors")
    assert main([*command, "--protocol", "ridge", "--head-out", head, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "ridge regression" in out
    assert "miou %" in out
    (report,) = (json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json"))
    assert report["task"] == "linear-seg"
    assert main([*command, "--protocol", "ridge", "--head-in", head]) == 0
    assert (
        main([*command, "--iterations", "5", "--scale", "1", "--scale", "2", "--flip", "--cache", str(tmp_path / "c")])
        == 0
    )
    assert main([*command, "--protocol", "ridge", "--cache", str(tmp_path / "c")]) == 1
    assert "--cache is for the protocol clean" in capsys.readouterr().err
    assert main([*command, "--head-out", head, "--resolution", "32"]) == 1
    assert "one --resolution" in " ".join(capsys.readouterr().err.split())
