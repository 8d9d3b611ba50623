"""Whole evaluations on small pictures, against loops, and what their results do not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from amradio.errors import MissingDependencyError
from amradio.evals.in_context import (
    InContextConfig,
    Sheet,
    SheetOptions,
    get_protocol,
    in_context_policy,
    load_memory,
    run_in_context,
)
from amradio.evals.report import EvalReport
from amradio.evals.runner import Setup
from amradio.features import ExtractOptions
from amradio.images.segmentation import SegmentationSet
from amradio.models.configs import RadioConfig, Resolution, ViTConfig
from amradio.models.radio import RadioModel

Sets = tuple[SegmentationSet, SegmentationSet]
PLAIN = InContextConfig(k=5, temperature=0.1, augmentation="none")


def setup_for(backbone: Any, resolution: tuple[int, ...] = (16, 24), mode: Any = None, **options: Any) -> Setup:
    return Setup(in_context_policy(backbone, resolution, mode), ExtractOptions(**{"batch_size": 2, **options}))


def numbers(reports: list[EvalReport]) -> list[dict[str, float]]:
    return [{name: m.value for name, m in r.metrics.items()} for r in reports]


# ---- against loops ----


def slow_features(backbone: Any, sample: Any, size: tuple[int, int]) -> torch.Tensor:
    with Image.open(sample.image.path) as picture:
        resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    return backbone(pixels).features[0]  # [P, D]


def slow_mask(sample: Any, size: tuple[int, int]) -> np.ndarray:
    mask = sample.mask.read()
    rows = [int((i + 0.5) * mask.shape[0] / size[0]) for i in range(size[0])]
    columns = [int((j + 0.5) * mask.shape[1] / size[1]) for j in range(size[1])]
    return np.array([[mask[i, j] for j in columns] for i in rows])


def slow_miou(backbone: Any, sets: Sets, size: tuple[int, int], config: InContextConfig) -> float:
    """The clean protocol without augmentation, patch by patch and pixel by pixel."""
    train, val = sets
    rows, labels = [], []
    for sample in train:
        mask, p = slow_mask(sample, size), backbone.patch_size
        features = slow_features(backbone, sample, size)
        for number, feature in enumerate(features):
            i, j = divmod(number, size[1] // p)
            ids = mask[i * p : (i + 1) * p, j * p : (j + 1) * p].ravel().tolist()
            ids = [c for c in ids if c != 255]
            if ids:
                rows.append(feature / feature.norm())
                labels.append([ids.count(c) / len(ids) for c in range(len(train.class_names))])
    memory, shares = torch.stack(rows).double(), torch.tensor(labels).double()
    hits = np.zeros((len(train.class_names),) * 2, int)
    for sample in val:
        mixed = []
        for feature in slow_features(backbone, sample, size).double():
            cosines = memory @ (feature / feature.norm())
            best = cosines.argsort(descending=True)[: config.k]
            mixed.append((cosines[best] / config.temperature).softmax(0) @ shares[best])
        grid = size[0] // backbone.patch_size, size[1] // backbone.patch_size
        maps = torch.stack(mixed).T.unflatten(1, grid)[None]
        truth = sample.mask.read() if config.score_at == "original" else slow_mask(sample, size)
        predicted = F.interpolate(maps, truth.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        for t, found in zip(truth.ravel().tolist(), predicted.flatten().tolist(), strict=True):
            if t != 255:
                hits[t, found] += 1
    each = [hits[c, c] / (hits[c].sum() + hits[:, c].sum() - hits[c, c]) for c in range(len(hits)) if hits[c].sum()]
    return 100 * float(np.mean(each))


@pytest.mark.parametrize("score_at", ["evaluated", "original"])
@pytest.mark.parametrize("size", [(16, 24), (8, 8)])
def test_the_score_is_that_of_loops(
    backbone: Any, sets: Sets, replaced: Any, score_at: str, size: tuple[int, int]
) -> None:
    config = replaced(PLAIN, score_at=score_at)
    (report,) = run_in_context(backbone, *sets, config, setup_for(backbone, size))
    assert report.metrics["miou"].value == pytest.approx(slow_miou(backbone, sets, size, config), abs=0.05)
    assert 20 < report.metrics["miou"].value < 100
    assert report.metrics["pixel_accuracy"].unit == "%"
    assert report.failed == 0


def test_the_report_says_what_was_done(backbone: Any, sets: Sets, replaced: Any) -> None:
    config = replaced(PLAIN, memory_sizes=(50, None), augmentation="crop-jitter")
    small, all_patches = run_in_context(backbone, *sets, config, setup_for(backbone))
    assert small.task == "in-context"
    assert "memory of 50 patches of 7 pictures" in small.protocol
    assert "protocol clean: void left out of the memory; mIoU over classes that occur" in small.protocol
    assert (small.config["memory_size"], small.config["memory_rows"]) == (50, 49)
    assert small.metrics["memory_patches"].value == 49
    assert all_patches.config["memory_size"] is None
    assert small.config["protocol"]["name"] == "clean"
    assert small.config["resize"] == {"mode": "exact", "size": [16, 24], "multiple": 4}
    assert set(small.per_class or {}) == {"dark", "red", "blue"}
    assert small.dataset["train"]["classes"] == 3
    assert small.dataset["train"]["fingerprint"] == sets[0].fingerprint
    assert {"train_forward_s", "memory_s", "eval_forward_s", "search_s", "propagate_s", "score_s"} <= set(small.timing)
    table = small.details["confusion"]["true_predicted_count"]
    scored = sum(int((slow_mask(s, (16, 24)) != 255).sum()) for s in sets[1])
    assert sum(count for *_, count in table) == scored
    assert EvalReport.from_dict(small.to_dict()) == small
    assert "in-context" in small.to_markdown()


# ---- what results do not depend on ----


def test_batches_threads_and_order_do_not_matter(backbone: Any, sets: Sets, replaced: Any) -> None:
    train, val = sets
    config = replaced(PLAIN, augmentation="crop-jitter", memory_sizes=(60, None), seed=3)
    expected = numbers(run_in_context(backbone, train, val, config, setup_for(backbone)))
    for options in ({"batch_size": 1, "workers": 1}, {"batch_size": 5, "workers": 3, "look_ahead": 1}):
        assert numbers(run_in_context(backbone, train, val, config, setup_for(backbone, **options))) == expected
    turned = train.select(range(len(train) - 1, -1, -1)), val.select([2, 0, 1])
    found = numbers(run_in_context(backbone, *turned, config, setup_for(backbone)))
    assert [list(f.values()) for f in found] == [pytest.approx(list(e.values())) for e in expected]


def test_seeds_matter(backbone: Any, sets: Sets, replaced: Any, tmp_path: Path) -> None:
    crops = []
    for seed, name in ((0, "a"), (1, "b"), (0, "c")):
        config = replaced(PLAIN, augmentation="crop-jitter", seed=seed, memory_sizes=(49,))
        path = tmp_path / f"{name}.safetensors"
        run_in_context(backbone, *sets, config, setup_for(backbone), memory_out=path)
        bank = load_memory(path)
        crops.append((bank.pictures.tolist(), bank.patch.tolist(), bank.features.sum().item()))
    assert crops[0] == crops[2]
    assert all(a != b for a, b in zip(crops[0], crops[1], strict=True))


def test_epochs_are_cropped_anew(backbone: Any, sets: Sets, replaced: Any, tmp_path: Path) -> None:
    config = replaced(PLAIN, augmentation="crop-jitter", augmentation_epochs=2)
    path = tmp_path / "memory.safetensors"
    (report,) = run_in_context(backbone, *sets, config, setup_for(backbone), memory_out=path)
    pictures = load_memory(path).pictures
    assert pictures[:, :2].tolist() == [[i, e] for e in range(2) for i in range(7)]
    assert not torch.equal(pictures[:7, 4:], pictures[7:, 4:])
    assert backbone.pictures == 2 * 7 + 3
    assert "2 epochs" in report.protocol


def test_several_memories_come_from_one_run(backbone: Any, sets: Sets, replaced: Any) -> None:
    sizes = (14, 70, None, 35)
    together = run_in_context(backbone, *sets, replaced(PLAIN, memory_sizes=sizes), setup_for(backbone))
    assert backbone.pictures == 7 + 3
    for size, report in zip(sizes, together, strict=True):
        (alone,) = run_in_context(backbone, *sets, replaced(PLAIN, memory_sizes=(size,)), setup_for(backbone))
        assert numbers([report]) == numbers([alone])
    assert [r.config["memory_rows"] for r in together[:2]] == [14, 70]
    assert any("all 4 memory sizes" in note for note in together[0].notes)


def test_pictures_keep_their_aspect_if_asked_to(backbone: Any, make_set: Any, masks: Any, replaced: Any) -> None:
    sizes = [(20, 28), (30, 20), (20, 28), (24, 24)]
    train = make_set("train", [masks(1, i, size)[0] for i, size in enumerate(sizes)])
    val = make_set("val", [masks(1, 9 + i, size)[0] for i, size in enumerate(sizes[:3])], 5)
    config = replaced(PLAIN, memory_sizes=(None, 40), score_at="original")
    setup = setup_for(backbone, (16,), "shortest")
    reports = run_in_context(backbone, train, val, config, setup)
    assert 30 < reports[0].metrics["miou"].value < 100
    assert reports[1].config["memory_rows"] == 40
    assert numbers(run_in_context(backbone, train, val, config, setup_for(backbone, (16,), "shortest", batch_size=1)))


# ---- protocols ----


@pytest.mark.parametrize("name", ["hbird-2.0", "fungi-paper"])
def test_protocols_of_published_code(backbone: Any, sets: Sets, replaced: Any, name: str, tmp_path: Path) -> None:
    config = replaced(PLAIN, protocol=get_protocol(name), augmentation="crop-jitter", memory_sizes=(50,))
    path = tmp_path / "memory.safetensors"
    (report,) = run_in_context(backbone, *sets, config, setup_for(backbone), memory_out=path)
    assert list(report.metrics) == ["miou", "pixel_accuracy", "miou_present", "miou_all", "memory_patches"]
    assert report.metrics["miou"].value >= report.metrics["miou_all"].value - 1e-9
    assert "Hungarian" in report.protocol
    bank = load_memory(path)
    assert (bank.counts.sum(1) == 16).all()  # void counts as class 0
    assert report.config["memory_rows"] == (50 if name == "fungi-paper" else 49)
    order = bank.pictures[:, 0].tolist()
    assert (order == list(range(7))) == (name == "hbird-2.0")
    assert sorted(order) == list(range(7))
    again = run_in_context(backbone, *sets, config, setup_for(backbone, batch_size=5, workers=1))
    assert numbers(again) == numbers([report])
    other = run_in_context(backbone, *sets, replaced(config, stream_batch=2), setup_for(backbone))
    assert other[0].config["stream_batch"] == 2


def test_void_is_left_out(backbone: Any, make_set: Any, tmp_path: Path) -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[:, 8:] = 255
    mask[:4, 8:10] = 1
    train = make_set("train", [mask, np.full_like(mask, 255)])
    val = make_set("val", [mask], 4)
    path = tmp_path / "memory.safetensors"
    run_in_context(backbone, train, val, PLAIN, setup_for(backbone), memory_out=path)
    bank = load_memory(path)
    assert bank.patch.tolist() == [0, 1, 2, 6, 7, 12, 13, 18, 19]
    assert bank.labels[2].tolist() == [0, 1, 0]  # 8 of its 16 pixels have a class, and it is theirs
    assert bank.counts[2].tolist() == [0, 8, 0]


# ---- backbones ----


def trunk(**changes: Any) -> RadioModel:
    config = ViTConfig(
        embed_dim=32, depth=3, num_heads=2, mlp_hidden_dim=64, patch_size=4, position_grid=(6, 6), **changes
    )
    torch.manual_seed(0)
    return RadioModel(RadioConfig(backbone=config)).eval().requires_grad_(False)


def test_layers(sets: Sets, replaced: Any) -> None:
    model = trunk(num_registers=2)
    last = numbers(run_in_context(model, *sets, PLAIN, setup_for(model)))
    config = replaced(PLAIN, layer=-1)
    assert numbers(run_in_context(model, *sets, config, setup_for(model))) == last
    assert numbers(run_in_context(model, *sets, replaced(PLAIN, layer=2), setup_for(model))) == last
    (first,) = run_in_context(model, *sets, replaced(PLAIN, layer=0), setup_for(model))
    assert numbers([first]) != last
    assert first.config["layer"] == 0


@pytest.mark.parametrize("projection", ["sign", "exact-kernel"])
def test_gradients_beside_tokens_are_features_too(sets: Sets, replaced: Any, projection: str) -> None:
    from amradio.fungi import DenseConfig, DenseFungiBackbone

    model = trunk(num_registers=1)
    dense = DenseFungiBackbone(model, DenseConfig(projection=projection, latent_dim=12))
    dense.fit(sets[0].images, policy=in_context_policy(model, (16, 24)))
    config = replaced(PLAIN, memory_sizes=(70, None))
    found = run_in_context(dense, *sets, config, setup_for(dense))
    assert numbers(found) != numbers(run_in_context(model, *sets, config, setup_for(model)))
    assert "dense FUNGI" in found[0].model["name"]
    assert found[0].model["embed_dim"] == dense.embed_dim
    again = run_in_context(dense, *sets, config, setup_for(dense, batch_size=3))
    for a, b in zip(numbers(found), numbers(again), strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), abs=0.2)


# ---- storage and search ----


def test_half_precision_storage(backbone: Any, sets: Sets, replaced: Any, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    config = replaced(PLAIN, storage="float16")
    (half,) = run_in_context(backbone, *sets, config, setup_for(backbone), memory_out=path)
    (full,) = run_in_context(backbone, *sets, PLAIN, setup_for(backbone))
    assert load_memory(path).features.dtype == torch.float16
    assert half.metrics["miou"].value == pytest.approx(full.metrics["miou"].value, abs=2)


def test_memories_are_read_again(backbone: Any, sets: Sets, replaced: Any, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    config = replaced(PLAIN, memory_sizes=(70, 35), augmentation="crop-jitter")
    first = run_in_context(backbone, *sets, config, setup_for(backbone), memory_out=path)
    before = backbone.pictures
    second = run_in_context(backbone, *sets, config, setup_for(backbone), memory_in=path)
    assert numbers(first) == numbers(second)
    assert backbone.pictures == before + 3
    assert any("The memory was read from" in note for note in second[0].notes)
    small = run_in_context(backbone, *sets, replaced(config, memory_sizes=(35,)), setup_for(backbone), memory_in=path)
    assert numbers(small) == numbers(first)[1:]


def test_approximate_search(backbone: Any, sets: Sets, replaced: Any) -> None:
    exact = run_in_context(backbone, *sets, PLAIN, setup_for(backbone))
    try:
        flat = run_in_context(backbone, *sets, replaced(PLAIN, search="faiss:Flat"), setup_for(backbone))
    except MissingDependencyError:
        pytest.skip("FAISS is not installed")
    assert flat[0].metrics["miou"].value == pytest.approx(exact[0].metrics["miou"].value, abs=1)
    options = {"nprobe": 3}
    config = replaced(PLAIN, search="faiss:IVF4,Flat", search_options=options)
    (report,) = run_in_context(backbone, *sets, config, setup_for(backbone))
    assert "search faiss:IVF4,Flat (nprobe 3)" in report.protocol


def test_scann_gets_its_parameters(backbone: Any, sets: Sets, replaced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from amradio.evals.in_context import score
    from amradio.search import build_index

    asked: list[dict[str, Any]] = []

    def build(rows: Any, spec: str, **options: Any) -> Any:
        asked.append({"spec": spec, **options})
        return build_index(rows)

    monkeypatch.setattr(score, "build_index", build)
    monkeypatch.setattr(score, "import_scann", lambda: None)
    options = {
        "num_leaves": 4,
        "num_leaves_to_search": 2,
        "num_reordering_candidates": 9,
        "anisotropic_quantization_threshold": 0.3,
        "dimensions_per_block": 3,
    }
    config = replaced(PLAIN, search="scann", search_options=options)
    run_in_context(backbone, *sets, config, setup_for(backbone))
    hbird = get_protocol("hbird-2.0")
    for protocol in (get_protocol("clean"), hbird):
        config = replaced(PLAIN, protocol=protocol, search="scann", search_options={"num_leaves": None})
        run_in_context(backbone, *sets, config, setup_for(backbone))
    assert asked == [{"spec": "scann", **options}] + [{"spec": "scann", "dimensions_per_block": n} for n in (4, 2)]


# ---- contact sheets ----


@pytest.mark.parametrize("score_at", ["evaluated", "original"])
def test_sheets_show_what_happened(backbone: Any, sets: Sets, replaced: Any, score_at: str) -> None:
    sheets: list[Sheet] = []
    config = replaced(PLAIN, score_at=score_at, augmentation="crop-jitter")
    run_in_context(
        backbone, *sets, config, setup_for(backbone), sheets=SheetOptions(2, patches=3, neighbours=2),
        on_sheet=sheets.append,
    )  # fmt: skip
    assert [sheet.id for sheet in sheets] == [sets[1][0].id, sets[1][2].id]
    for sheet in sheets:
        assert sheet.image.shape == (16, 24, 3)
        assert sheet.truth.shape == sheet.prediction.shape == ((20, 28) if score_at == "original" else (16, 24))
        assert len(sheet.patches) == 3
        for patch in sheet.patches:
            top, left, height, width = patch.box
            assert top % 4 == left % 4 == 0
            assert (height, width) == (4, 4)
            first, second = patch.neighbours
            assert first.weight >= second.weight
            # The neighbour's pixels are those that were looked up: its colour is close to the query's.
            query = sheet.image[top : top + 4, left : left + 4].mean((0, 1))
            t, x, h, w = first.box
            found = first.pixels[t : t + h, x : x + w].mean((0, 1))
            assert np.abs(query - found).max() < 60


def test_default_size_is_the_preferred_one(backbone: Any, sets: Sets) -> None:
    assert isinstance(backbone.preferred_resolution, Resolution)
    (report,) = run_in_context(backbone, *sets, PLAIN)
    assert report.config["resize"]["size"] == [16, 24]


def test_progress_is_told(backbone: Any, sets: Sets, replaced: Any) -> None:
    seen: list[str] = []
    setup = replaced(setup_for(backbone), on_record=lambda record: seen.append(record.source.id))
    run_in_context(backbone, *sets, PLAIN, setup)
    assert sorted(seen) == sorted([s.id for s in sets[0]] + [s.id for s in sets[1]])
