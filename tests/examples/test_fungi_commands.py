"""Every command that the README of FUNGI's dense experiments prints, unchanged, on a small set in the layout of VOC."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import amradio
from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel

# The variables as the README sets them, for both experiments; NUM_NEIGHBORS of the first evaluation is set twice there.
COMMON = """
SEED=42 PATCH_SIZE=16 IMAGE_SIZE=512 BACKBONE=dino_vits16 DATASET_DIRECTORY=./VOCSegmentation NUM_LEAVES=512
ANISOTROPIC_QUANTIZATION_THRESHOLD=0.2 DIMENSIONS_PER_BLOCK=4 LATENT_DIM=96 NEGATIVE_BATCH_PERCENT=0.5
LAYER_PATH=backbone.blocks.11.attn.proj MEMORY_BANK_SIZE=102400 TRAIN_SAMPLES=83 NUM_NEGATIVE_NEIGHBORS=2
"""
CREATE = """
python create_memory_bank.py --seed $SEED --batch-size $BATCH_SIZE --input-size $IMAGE_SIZE
    --data-dir $DATASET_DIRECTORY --model $BACKBONE --memory-bank $BASE_DIR/features.pth
    --memory-bank-labels $BASE_DIR/labels.pth --scann-index $BASE_DIR/index {MEMORY} --patch-size $PATCH_SIZE
    --augmentation-epochs $AUGMENTATION_EPOCHS --num-neighbors $NUM_NEIGHBORS --num-leaves $NUM_LEAVES
    --num-leaves-to-search $NUM_LEAVES_TO_SEARCH --num-reordering-candidates $NUM_RERANK_CANDIDATES
    --anisotropic-quantization-threshold $ANISOTROPIC_QUANTIZATION_THRESHOLD
    --dimensions-per-block $DIMENSIONS_PER_BLOCK {SAMPLES}
"""
EVALUATE = """
python eval_gradients.py --seed $SEED --use-fp16 --batch-size $BATCH_SIZE --input-size $IMAGE_SIZE
    --patch-size $PATCH_SIZE --gradients-layer $LAYER_PATH --data-dir $DATASET_DIRECTORY --model $BACKBONE
    {NEGATIVES} --memory-bank $SUPPORT_DIR/features.pth --scann-index $SUPPORT_DIR/index {MEMORY}
    --latent-dim $LATENT_DIM --negative-batch-percent $NEGATIVE_BATCH_PERCENT --temperature $TEMPERATURE
    --num-neighbors $NUM_NEIGHBORS --num-leaves $NUM_LEAVES --num-leaves-to-search $NUM_LEAVES_TO_SEARCH
    --num-reordering-candidates $NUM_RERANK_CANDIDATES
    --anisotropic-quantization-threshold $ANISOTROPIC_QUANTIZATION_THRESHOLD
    --dimensions-per-block $DIMENSIONS_PER_BLOCK {SAMPLES}
"""
INDEX = "NUM_NEIGHBORS=5 NUM_LEAVES_TO_SEARCH=32 NUM_RERANK_CANDIDATES=120 BATCH_SIZE=32"
FULL = {
    "create": (f"{INDEX} BASE_DIR=support_index AUGMENTATION_EPOCHS=1", "--memory-size $MEMORY_BANK_SIZE", ""),
    "evaluate": (
        "NUM_NEIGHBORS=30 NUM_LEAVES_TO_SEARCH=32 NUM_RERANK_CANDIDATES=120 BATCH_SIZE=4 SUPPORT_DIR=support_index "
        "TEMPERATURE=0.02",
        "--memory-size $MEMORY_BANK_SIZE",
        "--n-neighbors $NUM_NEIGHBORS",
    ),
}
EFFICIENT = {
    "create": (f"{INDEX} BASE_DIR=support_index_efficient AUGMENTATION_EPOCHS=8", "", ""),
    "evaluate": (
        "NUM_NEIGHBORS=90 NUM_LEAVES_TO_SEARCH=256 NUM_RERANK_CANDIDATES=1800 BATCH_SIZE=4 "
        "SUPPORT_DIR=support_index_efficient TEMPERATURE=0.1",
        "",
        "--num-negative-neighbors $NUM_NEGATIVE_NEIGHBORS",
    ),
}


def words(template: str, setting: tuple[str, str, str], samples: str) -> list[str]:
    variables = dict(pair.split("=") for pair in f"{COMMON} {setting[0]}".split())
    text = template.format(MEMORY=setting[1], NEGATIVES=setting[2], SAMPLES=samples)
    return shlex.split(re.sub(r"\$(\w+)", lambda m: variables[m[1]], text))[1:]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with four pictures in the layout of VOC: coloured squares with borders of void."""
    root = tmp_path / "VOCSegmentation"
    for folder in ("images", "SegmentationClass", "SegmentationClassAug", "sets"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"p{i}" for i in range(4)]
    for i, name in enumerate(names):
        pixels = rng.integers(0, 60, (90, 120, 3))
        mask = np.zeros((90, 120), np.uint8)
        for c in (1 + i % 3, 7):
            y, x = rng.integers(5, 40), rng.integers(5, 70)
            pixels[y : y + 40, x : x + 40] = rng.integers(0, 60, 3) + 40 * np.array([c % 3, c % 2, c % 5])
            mask[y - 2 : y + 42, x - 2 : x + 42] = 255
            mask[y : y + 40, x : x + 40] = c
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{name}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            palette = Image.fromarray(mask, "P")
            palette.putpalette(list(range(256)) * 3)
            palette.save(root / folder / f"{name}.png")
    (root / "sets" / "trainaug.txt").write_text("\n".join(names[:3]) + "\n")
    (root / "sets" / "val.txt").write_text(names[3] + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every backbone that is loaded is a narrow ViT of 12 blocks; the names asked for are listed."""
    torch.manual_seed(0)
    trunk = ViTConfig(embed_dim=16, depth=12, num_heads=2, mlp_hidden_dim=16, final_norm=True, position_grid=(8, 8))
    model = RadioModel(RadioConfig(backbone=trunk)).eval().requires_grad_(False)
    names: list[str] = []

    def load(name: str) -> Any:
        names.append(name)
        return model

    monkeypatch.setattr(amradio, "load_backbone", load, raising=False)
    return names


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    monkeypatch.syspath_prepend(str(root / "examples"))

    def runs(command: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(root / "examples" / command[0]), run_name="__main__")

    return runs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A memory of 102,400 patches is larger")
@pytest.mark.parametrize(("setting", "samples"), [(FULL, ""), (EFFICIENT, "--num-train-samples $TRAIN_SAMPLES")])
def test_runs_unchanged(
    here: Path,
    asked: list[str],
    run: Callable[[list[str]], None],
    capsys: pytest.CaptureFixture[str],
    setting: dict[str, tuple[str, str, str]],
    samples: str,
) -> None:
    run(words(CREATE, setting["create"], samples))
    out = capsys.readouterr().out
    folder = here / ("support_index_efficient" if samples else "support_index")
    features = torch.load(folder / "features.pth", weights_only=True)
    labels = torch.load(folder / "labels.pth", weights_only=True)
    capacity = 3 * 1024 * (8 if samples else 1)
    # All patches there are; the size that was asked for is filled up with rows of zeros as in the published code.
    assert len(features) == len(labels) == (capacity if samples else len(features))
    assert "search: exact" in out
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(words(EVALUATE, setting["evaluate"], samples))
    capped = [str(w.message) for w in caught if "2 negatives were meant" in str(w.message)]
    assert len(capped) == (0 if samples else 1)
    out = capsys.readouterr().out
    assert "protocol fungi-paper" in out
    assert "search exact" in out
    assert 0 <= float(out.splitlines()[-1].removeprefix("mIoU: ")) <= 100
    assert asked == ["dino_vits16"] * 2


def test_what_is_wrong_is_said_in_a_line(here: Path, asked: list[str], run: Callable[[list[str]], None]) -> None:
    create = words(CREATE, FULL["create"], "")
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        run([w.replace("./VOCSegmentation", "./nowhere") for w in create])
    evaluate = words(EVALUATE, FULL["evaluate"], "")
    with pytest.raises(SystemExit, match=r"has no index\.json: run create_memory_bank\.py first"):
        run(evaluate)
    with pytest.raises(SystemExit, match="has patches of 16 pixels, not 14"):
        run([*create, "--patch-size", "14"])


def short(command: list[str], **changes: str) -> list[str]:
    """A published command with a few options given another value."""
    return [*command, *(w for name, value in changes.items() for w in (f"--{name.replace('_', '-')}", value))]


QUICK = {"input_size": "64", "memory_size": "40"}


def test_the_support_index_is_searched_as_it_was_made(
    here: Path, asked: list[str], run: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    import amradio.search

    built: list[tuple[str, int]] = []
    real = amradio.search.build_index

    def build(rows: Any, spec: str = "exact", **options: Any) -> Any:
        built.append((spec, len(rows)))
        return real(rows, spec, **options)

    monkeypatch.setattr(amradio.search, "build_index", build)
    monkeypatch.setattr("amradio.evals.in_context.score.build_index", build)
    run(short(words(CREATE, FULL["create"], ""), **QUICK, search="faiss:Flat"))
    assert built == []  # rows alone are written; an index of them would be thrown away
    evaluate = short(words(EVALUATE, FULL["evaluate"], ""), **QUICK, num_negative_neighbors="2")
    run([w for w in evaluate if w != "--use-fp16"])
    assert built == [("faiss:Flat", 40)]  # that of the support index; the memory is searched exactly


def test_the_batch_size_is_in_the_printed_protocol(
    here: Path, asked: list[str], run: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run(short(words(CREATE, FULL["create"], ""), **QUICK))
    run(short(words(EVALUATE, FULL["evaluate"], ""), **QUICK, num_negative_neighbors="2", batch_size="3"))
    assert "random numbers in one shuffled-stream, batches of 3;" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", '{"num_neighbors": 5}', '{"num_neighbors": "x", "search": "exact"}'])
def test_a_damaged_index_is_said_in_a_line(
    here: Path, asked: list[str], run: Callable[[list[str]], None], content: str
) -> None:
    (here / "support_index" / "index").mkdir(parents=True)
    (here / "support_index" / "index" / "index.json").write_text(content)
    with pytest.raises(SystemExit, match=r"error: .*index\.json cannot be read \(.*run create_memory_bank\.py again"):
        run(words(EVALUATE, FULL["evaluate"], ""))
