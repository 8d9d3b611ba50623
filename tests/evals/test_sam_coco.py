"""SAM-COCO: against slow references, with a decoder that can be read by eye and with a random SAM."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from amradio.errors import DatasetError, OptionError
from amradio.evals.report import EvalReport
from amradio.evals.runner import Setup
from amradio.evals.sam_coco import IouMeans, SamCocoConfig, mask_ious, run_sam_coco, sam_policy
from amradio.features import ExtractOptions
from amradio.images.segmentation.objects import CocoInstances, draw_region, open_coco_instances
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput

NAMES = ("person", "kite", "cup")


@pytest.fixture(scope="module")
def parts(root: Path) -> Any:
    """The stand-ins of the tests of `amradio.sam`."""
    spec = importlib.util.spec_from_file_location("sam_parts", root / "tests" / "sam" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MeanColours(nn.Module):
    """A backbone with patches of 8 pixels; it counts its forward passes and can run out of memory."""

    patch_size = min_resolution_step = 8
    embed_dim = summary_dim = 3
    preferred_resolution = Resolution(128, 128)

    def __init__(self, most: int = 99) -> None:
        super().__init__()
        self.most, self.batches = most, list[int]()

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        return Resolution(128, 128)

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        if len(images) > self.most:
            raise RuntimeError("CUDA out of memory")
        self.batches.append(len(images))
        maps = F.avg_pool2d(images, 8)
        return RadioOutput(images.mean((2, 3)), maps if feature_fmt == "NCHW" else maps.flatten(2).mT)


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number: int, image: int, category: int, region: Any, box: Any, **more: Any) -> dict[str, Any]:
    area = more.pop("area", box[2] * box[3])
    fields = {"id": number, "image_id": image, "category_id": category, "segmentation": region, "bbox": box}
    return {**fields, "area": area, "iscrowd": 0, **more}


SIZES = {1: (64, 128), 2: (128, 128), 3: (128, 64), 4: (64, 64)}  # height, width


def annotations() -> list[dict[str, Any]]:
    crowd = {"size": [128, 128], "counts": [0, 128 * 32, 128 * 96]}  # the left quarter
    return [
        annotation(1, 1, 10, rectangle(8, 8, 32, 16), [8, 8, 32, 16]),
        annotation(2, 1, 30, [[64, 8, 96, 8, 96, 40]], [64, 8, 32, 32], area=512),  # half of its box
        annotation(3, 2, 10, rectangle(8, 8, 96, 96), [8, 8, 96, 96]),  # right on the border of sizes
        annotation(4, 2, 20, rectangle(64, 64, 40, 40), [64, 64, 40, 40]),
        annotation(5, 2, 20, crowd, [0, 0, 128, 128], iscrowd=1, area=128 * 32),
        annotation(6, 3, 30, rectangle(8, 16, 32, 32), [8, 16, 32, 32]),  # right on the border too
        annotation(7, 3, 30, [[5, 5, 5.1, 5, 5.1, 5.1]], [5, 5, 0.1, 0.1]),  # no pixel
    ]


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., Path]:
    """``coco(annotations)``: a folder in the layout of COCO; picture 4 has no object."""

    def write(items: list[dict[str, Any]] | None = None, sizes: dict[int, tuple[int, int]] = SIZES) -> Path:
        folder = tmp_path / "coco"
        (folder / "val2017").mkdir(parents=True)
        (folder / "annotations").mkdir()
        rng = np.random.default_rng(0)
        for i, size in sizes.items():
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "val2017" / f"{i:012}.png")
        record = {
            "images": [{"id": i, "file_name": f"{i:012}.png", "height": h, "width": w} for i, (h, w) in sizes.items()],
            "categories": [
                {"id": 10 * (i + 1), "name": name, "supercategory": f"kind{i % 2}"} for i, name in enumerate(NAMES)
            ],
            "annotations": annotations() if items is None else items,
        }
        (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(record))
        return folder

    return write


def setup_of(backbone: Any, decoder: Any, **options: Any) -> Setup:
    return Setup(sam_policy(backbone, decoder), ExtractOptions(batch_size=2, workers=2, **options))


def run(parts: Any, folder: Path, backbone: Any = None, **config: Any) -> EvalReport:
    backbone, decoder = backbone or MeanColours(), parts.ColourDecoder()
    data = open_coco_instances(folder)
    return run_sam_coco(backbone, decoder, data, SamCocoConfig(**config), setup_of(backbone, decoder))


def test_means_against_plain_python(coco: Callable[..., Path], parts: Any) -> None:
    """The decoder gives the box itself: each object's IoU is the share of its box that it fills."""
    report = run(parts, coco())
    half = draw_region([[64, 8, 96, 8, 96, 40]], 64, 128).sum() / 32**2
    assert half in (33 / 64, 31 / 64)  # the centres of the diagonal's pixels are on the edge: all or none is inside
    ious = {1: 1.0, 2: half, 3: 1.0, 4: 1.0, 6: 1.0}
    values = {name: m.value for name, m in report.metrics.items()}
    assert values["miou"] == pytest.approx(100 * sum(ious.values()) / 5)
    # 1 and 2 are small, 4 and 6 (an area right on the border) medium, 3 (likewise) large.
    assert values["miou_small"] == pytest.approx(100 * (1 + ious[2]) / 2)
    assert values["miou_medium"] == values["miou_large"] == pytest.approx(100)
    assert report.per_class == pytest.approx({"person": 100, "kite": 100, "cup": 100 * (ious[2] + 1) / 2})
    assert values["miou_classes"] == pytest.approx(np.mean(list(report.per_class.values())))
    assert report.details == {"instances": 5, "instances_of_size": {"small": 2, "medium": 2, "large": 1}}
    assert report.notes == ("1 annotated objects have no pixel, and were left out.",)
    assert report.task == "sam-coco"
    assert report.config["resize"] == {"mode": "longest", "size": [128], "multiple": 1}
    assert "crowds left out; longest side 128, padded" in report.protocol
    assert report.dataset["eval"]["count"] == 4
    assert EvalReport.from_dict(json.loads(json.dumps(report.to_dict()))).metrics == report.metrics


def test_the_published_protocol_counts_crowds_and_borders_twice(coco: Callable[..., Path], parts: Any) -> None:
    folder = coco()
    clean, published = run(parts, folder), run(parts, folder, protocol="efficientvit")
    assert published.details["instances"] == 6
    total = clean.metrics["miou"].value * 5 + 100 * 0.25  # the crowd is a quarter of its box
    assert published.metrics["miou"].value == pytest.approx(total / 6)
    assert published.details["instances_of_size"] == {"small": 3, "medium": 4, "large": 1}
    assert "crowds included" in published.protocol


def test_one_mask_or_the_best_of_three(coco: Callable[..., Path], parts: Any) -> None:
    folder = coco()

    class Inverted(parts.ColourDecoder):  # type: ignore[misc, name-defined]
        """Scores the second of three masks highest, which is all but the box."""

        def __call__(self, embedding: Any, prompts: Any, multimask: bool) -> Any:
            found = super().__call__(embedding, prompts, multimask)
            return found._replace(scores=found.scores.flip(1)) if multimask else found

    decoder, backbone = Inverted(), MeanColours()
    decoder.score = 0.3
    data = open_coco_instances(folder)
    config = SamCocoConfig(mask="best")
    best = run_sam_coco(backbone, decoder, data, config, setup_of(backbone, decoder))
    assert "of three masks the one that is scored highest" in best.protocol
    assert best.metrics["miou"].value < 50
    single = run_sam_coco(backbone, decoder, data, SamCocoConfig(), setup_of(backbone, decoder))
    assert single.metrics["miou"].value == run(parts, folder).metrics["miou"].value


def test_pictures_that_fail_are_counted(coco: Callable[..., Path], parts: Any) -> None:
    folder = coco()
    (folder / "val2017" / "000000000003.png").write_bytes(b"nonsense")
    Image.new("RGB", (30, 40)).save(folder / "val2017" / "000000000001.png")
    seen: list[Any] = []
    backbone, decoder = MeanColours(), parts.ColourDecoder()
    setup = dataclasses.replace(setup_of(backbone, decoder), on_record=seen.append)
    report = run_sam_coco(backbone, decoder, open_coco_instances(folder), setup=setup)
    assert report.failed == 2
    reasons = [f["reason"] for f in report.dataset["eval"]["failures"]]
    assert "is 128 x 64 pixels (width x height), and its picture is 30 x 40" in reasons[0]
    assert "not a picture" in reasons[1] or "text" in reasons[1]
    assert len(seen) == 4
    assert report.details["instances"] == 2


def test_a_region_of_another_picture(coco: Callable[..., Path], parts: Any) -> None:
    items = annotations()
    items[5]["segmentation"] = {"size": [64, 128], "counts": [0, 64 * 128]}
    report = run(parts, coco(items))
    (failure,) = report.dataset["eval"]["failures"]
    assert "damaged: a region is drawn for a picture of height and width [64, 128]" in failure["reason"]


def test_batches_are_halved_when_memory_runs_out(coco: Callable[..., Path], parts: Any) -> None:
    folder = coco()
    tight = MeanColours(most=1)
    report = run(parts, folder, tight)
    assert report.metrics == run(parts, folder).metrics
    assert tight.batches == [1, 1, 1]  # the picture without objects is not encoded


def test_what_is_refused(coco: Callable[..., Path], parts: Any) -> None:
    folder = coco()
    backbone, decoder = MeanColours(), parts.ColourDecoder()
    data = open_coco_instances(folder)
    with pytest.raises(OptionError, match=r"decodes in full \(--decode full\)"):
        run_sam_coco(backbone, decoder, data, setup=setup_of(backbone, decoder, decode="draft"))
    decoder.score = math.nan
    with pytest.raises(OptionError, match="are not finite numbers, so MeanColours does not work in this precision"):
        run_sam_coco(backbone, decoder, data, setup=setup_of(backbone, decoder))
    empty = CocoInstances(data.pictures, data.category_names, dict.fromkeys(data.pictures.names, ()))
    with pytest.raises(DatasetError, match="have no objects to ask for"):
        run_sam_coco(backbone, parts.ColourDecoder(), empty, setup=setup_of(backbone, decoder))


def test_streaming_means() -> None:
    rng = np.random.default_rng(0)
    ious, classes, areas = rng.random(200), rng.integers(0, 5, 200), rng.uniform(1, 20000, 200)
    means = IouMeans(7)
    for start in range(0, 200, 17):
        part = slice(start, start + 17)
        means.update(torch.from_numpy(ious[part]), classes[part].tolist(), areas[part].tolist())
    found = {name: m.value / 100 for name, m in means.metrics().items()}
    small, large = areas < 1024, areas >= 9216
    assert found["miou"] == pytest.approx(ious.mean())
    assert found["miou_small"] == pytest.approx(ious[small].mean())
    assert found["miou_medium"] == pytest.approx(ious[~small & ~large].mean())
    assert found["miou_large"] == pytest.approx(ious[large].mean())
    of_classes = [ious[classes == c].mean() for c in range(5)]
    assert found["miou_classes"] == pytest.approx(np.mean(of_classes))
    assert list(means.class_means()) == list(range(5))
    assert means.count == 200


def test_several_processes_add_up() -> None:
    class Double:
        """Two processes with the same objects."""

        def all_reduce_sum(self, values: Tensor) -> Tensor:
            return 2 * values

    means = IouMeans(2)
    means.update(torch.tensor([0.5, 1.0]), [0, 1], [10.0, 5000.0])
    before = means.metrics()
    means.reduce(Double())  # type: ignore[arg-type]
    assert means.metrics() == before
    assert means.count == 4
    means.reduce(None)
    assert means.count == 4


@pytest.mark.slow
def test_two_processes_measure_what_one_does(coco: Callable[..., Path]) -> None:
    folder = coco()
    (folder / "val2017" / "000000000004.png").write_bytes(b"no picture")
    script = Path(__file__).with_name("sam_two_processes.py")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]
    alone = runpy.run_path(str(script))["measure"](folder, None)
    assert ranks[0] == ranks[1] == alone
    assert alone["failed"] == 1


def test_overlaps() -> None:
    a, b = torch.rand(3, 9, 9) > 0.5, torch.rand(3, 9, 9) > 0.5
    expected = [float((x & y).sum()) / float((x | y).sum()) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(mask_ious(a, b), torch.tensor(expected))


def test_a_random_sam_on_its_own_encoder(coco: Callable[..., Path], parts: Any) -> None:
    """The whole evaluation, against a loop over objects that uses `transformers` alone."""
    from amradio.sam import SamDecoder, SamVision

    torch.manual_seed(1)
    model = parts.make_sam()
    vision, decoder = SamVision(model, "tiny"), SamDecoder(model)
    sizes = {**SIZES, 1: (50, 131), 3: (97, 64)}  # that fit the square at no round scale
    items = [a for a in annotations() if not a["iscrowd"] and a["id"] != 7]
    folder = coco(items, sizes)
    report = run_sam_coco(vision, decoder, open_coco_instances(folder), setup=setup_of(vision, decoder))
    ious = []
    for item in items:
        size = sizes[item["image_id"]]
        image = Image.open(folder / "val2017" / f"{item['image_id']:012}.png")
        scale = 64 / max(size)
        inner = tuple(int(s * scale + 0.5) for s in size)
        pixels = np.array(image.resize(inner[::-1], Image.Resampling.BILINEAR)) / np.float32(255)
        values = np.zeros((64, 64, 3), dtype=np.float32)
        values[: inner[0], : inner[1]] = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32(
            [0.229, 0.224, 0.225]
        )
        x, y, w, h = item["bbox"]
        factor = torch.tensor([inner[1] / size[1], inner[0] / size[0]]).repeat(2)
        box = torch.tensor([[[x, y, x + w, y + h]]]) * factor
        out = model(
            pixel_values=torch.from_numpy(values).permute(2, 0, 1)[None], input_boxes=box, multimask_output=False
        )
        mask = F.interpolate(out.pred_masks[0], (64, 64), mode="bilinear")[..., : inner[0], : inner[1]]
        mask = F.interpolate(mask, size, mode="bilinear")[0, 0] > 0
        truth = torch.from_numpy(draw_region(item["segmentation"], *size))
        ious.append(float((mask & truth).sum() / (mask | truth).sum()))
    assert report.metrics["miou"].value == pytest.approx(100 * np.mean(ious), abs=1e-3)
    assert 0 < report.metrics["miou"].value < 100
    assert report.model["name"] == "tiny"


def test_the_command(coco: Callable[..., Path], parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import amradio
    from amradio.cli import main

    torch.manual_seed(1)
    parts.make_sam().save_pretrained(tmp_path / "sam")
    radio = parts.radio.__wrapped__()(8)
    amradio.save(radio, tmp_path / "radio.safetensors")
    folder = str(coco())
    words = ["eval", "sam", "--data", folder, "--sam", str(tmp_path / "sam"), "--device", "cpu", "--workers", "1"]
    code = main(
        [
            *words,
            "--model",
            "sam",
            "--model",
            str(tmp_path / "radio.safetensors"),
            "-o",
            str(tmp_path / "out"),
            "--json",
        ]
    )
    capsys_out = capsys.readouterr()
    assert code == 0, capsys_out
    own, ours = json.loads(capsys_out.out)["reports"]
    assert own["model"]["name"] == str(tmp_path / "sam")
    assert ours["model"]["adaptor"] == "sam"
    assert ours["config"]["sam"] == str(tmp_path / "sam")
    assert own["details"]["instances"] == ours["details"]["instances"] == 5
    assert len(list((tmp_path / "out").glob("sam-coco-*.json"))) == 2
    assert main([*words, "--model", str(tmp_path / "radio.safetensors"), "--limit", "2", "--mask", "best"]) == 0
    assert "miou %" in capsys.readouterr().out
    assert main(words) == 1
    assert "Name a backbone with an adaptor that imitates SAM" in capsys.readouterr().err
    assert main([*words, "--model", "sam", "--vitdet-window-size", "16", "--split", "train"]) == 1
    assert "train" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_size_follows_from_grid_and_patches(parts: Any) -> None:
    policy = sam_policy(SimpleNamespace(patch_size=14), parts.ColourDecoder("stretch"))  # type: ignore[arg-type]
    assert (policy.mode, policy.size) == ("exact", (224, 224))


def test_recipes_and_the_page_have_the_published_numbers(root: Path) -> None:
    from amradio.evals.recipes import load_recipe, recipe_names
    from amradio.weights.catalog import entries

    published = {e.version: e.metrics["sam_coco_percent"] for e in entries() if "sam_coco_percent" in e.metrics}
    names = [name for name in recipe_names() if name.startswith("sam-coco-table-")]
    recipes = [load_recipe(name) for name in names]
    assert {r.checkpoint: r.runs[0].expected["miou"] for r in recipes} == published
    page = (root / "docs" / "how-to" / "sam.md").read_text(encoding="utf-8")
    assert all(f"| `{version}` | {value:.2f} |" in page for version, value in published.items())
