"""What cannot be evaluated is refused in words, and broken pictures do not stop the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.errors import CapabilityError, DatasetError, OptionError, ResolutionError
from amradio.evals.in_context import InContextConfig, get_protocol, in_context_policy, run_in_context
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.images import ResizePolicy

PLAIN = InContextConfig(k=5, augmentation="none")


def run(backbone: Any, sets: Any, config: InContextConfig = PLAIN, resolution: tuple[int, ...] = (16, 24), **more: Any):
    setup = Setup(in_context_policy(backbone, resolution), ExtractOptions(batch_size=2))
    return run_in_context(backbone, *sets, config, setup, **more)


def test_a_memory_larger_than_all_patches_is_capped_with_a_warning(backbone: Any, sets: Any, replaced: Any) -> None:
    config = replaced(PLAIN, memory_sizes=(400,))
    with pytest.warns(
        UserWarning, match=r"A memory of 400 patches is larger than all there are: 7 pictures x 1 epochs"
    ):
        (report,) = run(backbone, sets, config)
    assert any("= 168. It holds these." in note for note in report.notes)
    (all_patches,) = run(backbone, sets)
    assert report.metrics["miou"].value == pytest.approx(all_patches.metrics["miou"].value)


@pytest.mark.parametrize("name", ["hbird-2.0", "fungi-paper"])
def test_the_cap_holds_under_other_protocols(backbone: Any, sets: Any, replaced: Any, name: str) -> None:
    with pytest.warns(UserWarning, match="larger than all there are"):
        (report,) = run(backbone, sets, replaced(PLAIN, protocol=get_protocol(name), memory_sizes=(400,)))
    assert report.config["memory_rows"] == 168


def test_pictures_with_fewer_patches_than_asked_for(backbone: Any, make_set: Any, masks: Any, replaced: Any) -> None:
    train = make_set("train", [masks(1, i, size)[0] for i, size in enumerate([(20, 28), (20, 60)])])
    val = make_set("val", masks(2, 9), 1)
    setup = Setup(in_context_policy(backbone, (16,), "shortest"), ExtractOptions())
    config = replaced(PLAIN, memory_sizes=(60,))
    with pytest.warns(UserWarning, match="would take 30 of each picture, and 1 of 2 pictures have fewer"):
        (report,) = run_in_context(backbone, train, val, config, setup)
    assert report.config["memory_rows"] < 60


@pytest.mark.parametrize("name", ["clean", "hbird-2.0", "fungi-paper"])
def test_a_memory_smaller_than_the_number_of_pictures(backbone: Any, sets: Any, replaced: Any, name: str) -> None:
    config = replaced(PLAIN, protocol=get_protocol(name), memory_sizes=(6,), k=3)
    with pytest.raises(
        OptionError, match=r"A memory of 6 patches cannot hold one of each of 7 pictures.* at least 7 and"
    ):
        run(backbone, sets, config)
    assert backbone.pictures == 0


def test_k_larger_than_the_memory(backbone: Any, sets: Any, replaced: Any) -> None:
    with pytest.raises(OptionError, match=r"k is 29, and the memory has only 14 patches. Choose a smaller k"):
        run(backbone, sets, replaced(PLAIN, memory_sizes=(20,), k=29))
    assert backbone.pictures == 0  # found before anything was computed


def test_sizes_that_are_no_multiple_of_the_patch(backbone: Any, sets: Any) -> None:
    with pytest.raises(ResolutionError, match=r"Pictures of 57 x 58 .* takes multiples of 4. Nearest: 56 x 56."):
        run(backbone, sets, resolution=(57, 58))


def test_centre_crops(backbone: Any, sets: Any) -> None:
    with pytest.raises(OptionError, match="A centre crop leaves out what is to be scored"):
        in_context_policy(backbone, (16, 16), "crop")
    setup = Setup(ResizePolicy("crop", (16, 16), 4), ExtractOptions())
    with pytest.raises(OptionError, match="A centre crop"):
        run_in_context(backbone, *sets, PLAIN, setup)


@pytest.mark.parametrize("options", [{"decode": "draft"}, {"resizer": "torch"}])
def test_shortcuts_of_decoding(backbone: Any, sets: Any, options: dict[str, Any]) -> None:
    setup = Setup(in_context_policy(backbone, (16, 24)), ExtractOptions(**options))
    with pytest.raises(OptionError, match="Pictures and masks must match pixel by pixel"):
        run_in_context(backbone, *sets, PLAIN, setup)


def test_missing_and_unusable_masks_are_failures(backbone: Any, sets: Any, tmp_path: Path) -> None:
    (tmp_path / "val" / "masks" / "p01.png").unlink()
    Image.new("RGB", (28, 20)).save(tmp_path / "train" / "masks" / "p00.png")
    Image.new("L", (5, 5)).save(tmp_path / "train" / "masks" / "p03.png")
    (tmp_path / "train" / "images" / "p05.png").write_bytes(b"no picture")
    (report,) = run(backbone, sets)
    failures = {f["path"].rsplit("/", 1)[1]: f["reason"] for d in report.dataset.values() for f in d["failures"]}
    assert sorted(failures) == ["p00.png", "p01.png", "p03.png", "p05.png"]
    assert (report.dataset["train"]["failed"], report.dataset["eval"]["failed"]) == (3, 1)
    assert "p01" in failures["p01.png"]
    assert report.failed_fraction == pytest.approx(4 / 10)


def test_no_usable_picture(backbone: Any, sets: Any, tmp_path: Path) -> None:
    for mask in (tmp_path / "val" / "masks").iterdir():
        mask.write_bytes(b"no mask")
    with pytest.raises(DatasetError, match=r"None of the 3 pictures of .*val could be used"):
        run(backbone, sets)


def test_void_everywhere(backbone: Any, make_set: Any, masks: Any) -> None:
    void, real = [np.full((20, 28), 255, np.uint8)] * 2, masks(2, 0)
    with pytest.raises(DatasetError, match=r"No patch of the 2 training pictures of .*train has a class"):
        run(backbone, (make_set("train", void), make_set("val", real, 1)))
    with pytest.raises(DatasetError, match="No pixel of the evaluation set has a class"):
        run(backbone, (make_set("train2", real, 2), make_set("val2", void, 3)))


def test_a_picture_of_void_alone_changes_nothing(backbone: Any, make_set: Any, masks: Any) -> None:
    real, void = masks(3, 0), np.full((20, 28), 255, np.uint8)
    train, val = make_set("train", real), make_set("val", masks(2, 5), 1)
    with_void = make_set("train2", [*real, void]), make_set("val2", [*masks(2, 5), void], 1)
    values = [r.metrics["miou"].value for s in ((train, val), with_void) for r in run(backbone, s)]
    assert values[0] == pytest.approx(values[1])


class Broken(torch.nn.Module):
    """Gives NaN for bright pictures."""

    def __init__(self, base: Any, threshold: float) -> None:
        super().__init__()
        self.base, self.threshold = base, threshold
        self.patch_size = self.min_resolution_step = 4
        self.embed_dim, self.summary_dim, self.preferred_resolution = 7, 7, None
        self.get_nearest_supported_resolution = base.get_nearest_supported_resolution
        self.eval()

    def forward(self, images: Any, feature_fmt: str = "NLC") -> Any:
        out = self.base(images, feature_fmt)
        bright = images.mean((1, 2, 3)) > self.threshold
        features = out.features.clone()
        features[bright, 3] = float("nan")
        return out._replace(features=features)


@pytest.mark.parametrize(("bad", "name"), [("train", "p01"), ("val", "p00")])
def test_features_that_are_not_finite(backbone: Any, make_set: Any, bad: str, name: str) -> None:
    dark, red = np.zeros((16, 24), np.uint8), np.ones((16, 24), np.uint8)
    train = make_set("train", [dark, red if bad == "train" else dark])
    val = make_set("val", [red if bad == "val" else dark], 1)
    message = rf"features of 1 of \d pictures of .*{bad} are NaN or infinite, first those of {name}"
    with pytest.raises(OptionError, match=message):
        run(Broken(backbone, 0.35), (train, val))


def test_sets_that_do_not_belong_together(backbone: Any, sets: Any, make_set: Any, masks: Any) -> None:
    train, val = sets
    with pytest.raises(DatasetError, match="are the same 7 pictures of"):
        run(backbone, (train, train))
    other = make_set("other", masks(2, 3), classes=("dark", "red", "green"))
    with pytest.raises(DatasetError, match="are not the same: class 2 is 'blue' and 'green'"):
        run(backbone, (train, other))
    with pytest.raises(DatasetError, match="has no pictures"):
        run(backbone, (train.head(0), val))


def test_pictures_in_both_sets_are_warned_of(backbone: Any, sets: Any) -> None:
    train = sets[0]
    with pytest.warns(UserWarning, match="2 of the 3 pictures to segment are in the memory too, first p04"):
        (report,) = run(backbone, (train.select(range(6)), train.select([4, 6, 5])))
    assert any("so the score is too good" in note for note in report.notes)


def test_models_in_training_mode_and_models_without_layers(backbone: Any, sets: Any, replaced: Any) -> None:
    with pytest.raises(CapabilityError, match="does not give features of its blocks"):
        run(backbone, sets, replaced(PLAIN, layer=1))
    backbone.train()
    with pytest.raises(OptionError, match="in training mode"):
        run(backbone, sets)


def test_similarities_need_the_exact_search(backbone: Any, sets: Any, replaced: Any) -> None:
    backbone.similarity = lambda queries, rows: queries @ rows.T
    pytest.importorskip("faiss")
    with pytest.raises(OptionError, match="not compared by an inner product"):
        run(backbone, sets, replaced(PLAIN, search="faiss:Flat"))


def test_memories_of_other_runs(backbone: Any, sets: Any, replaced: Any, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    run(backbone, sets, replaced(PLAIN, memory_sizes=(35,)), memory_out=path)
    with pytest.raises(OptionError, match=r"was made in another way: .*seed is 0 in the file and 1 now"):
        run(backbone, sets, replaced(PLAIN, memory_sizes=(35,), seed=1), memory_in=path)
    with pytest.raises(OptionError, match=r"resize\.size is \[16, 24\] in the file and \[16, 16\] now"):
        run(backbone, sets, replaced(PLAIN, memory_sizes=(35,)), (16, 16), memory_in=path)
    with pytest.raises(OptionError, match="holds 5 patches of each picture, and 10 patches of each picture were asked"):
        run(backbone, sets, replaced(PLAIN, memory_sizes=(70,)), memory_in=path)
    with pytest.raises(OptionError, match="and all patches were asked for"):
        run(backbone, sets, PLAIN, memory_in=path)


def test_streams_of_random_numbers_have_conditions(backbone: Any, sets: Any, replaced: Any) -> None:
    hbird = get_protocol("hbird-2.0")
    with pytest.raises(OptionError, match="cannot share a run"):
        replaced(PLAIN, protocol=hbird, memory_sizes=(None, 50))
    setup = Setup(in_context_policy(backbone, (16,), "shortest"), ExtractOptions())
    with pytest.raises(OptionError, match=r"The protocol hbird-2.0 needs one size for all pictures"):
        run_in_context(backbone, *sets, replaced(PLAIN, protocol=hbird), setup)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k and augmentation_epochs must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"memory_sizes": (5, 5)}, "memory_sizes must be one or several different numbers"),
        ({"memory_sizes": ()}, "memory_sizes must be"),
        ({"storage": "int8"}, "storage must be one of"),
        ({"augmentation": "none", "augmentation_epochs": 2}, "would put the same patches into the memory"),
        ({"stream_batch": 0}, "stream_batch must be at least 1"),
        ({"stream_batch": 5}, "Under the protocol clean no result depends on a batch size"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        InContextConfig(**options)


def test_unknown_protocols() -> None:
    with pytest.raises(OptionError, match=r"There is no protocol 'hbird'. Nearest names: hbird-2.0"):
        get_protocol("hbird")
