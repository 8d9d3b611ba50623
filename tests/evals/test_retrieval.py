"""Retrieval: recall counted by plain loops, several captions a picture, ties, whole runs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from amradio.errors import CapabilityError, OptionError
from amradio.evals.captions import load_captions
from amradio.evals.retrieval import RetrievalConfig, recalls, run_retrieval

TinyTextBackbone: Any = runpy.run_path(str(Path(__file__).parent / "two_processes.py"))["TinyTextBackbone"]


def slow_recalls(images: np.ndarray, texts: np.ndarray, image_of: list[int], k: tuple[int, ...]) -> dict[str, float]:
    scores = images @ texts.T
    values = {}
    for n in k:
        found = [
            any(image_of[t] == i for t in sorted(range(len(texts)), key=lambda t: (-scores[i, t], t))[:n])
            for i in range(len(images))
        ]
        values[f"image_to_text_r{n}"] = 100 * float(np.mean(found))
    for n in k:
        found = [
            image_of[t] in sorted(range(len(images)), key=lambda i: (-scores[i, t], i))[:n] for t in range(len(texts))
        ]
        values[f"text_to_image_r{n}"] = 100 * float(np.mean(found))
    return values


@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_recall_is_what_plain_loops_count(seed: int, count: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    image_of = np.sort(np.concatenate([np.arange(count), rng.integers(0, count, rng.integers(0, 20))]))
    if ties:  # few distinct values that float32 holds exactly
        images, texts = rng.integers(-1, 2, (count, 3)), rng.integers(-1, 2, (len(image_of), 3))
    else:
        images, texts = rng.normal(size=(count, 4)), rng.normal(size=(len(image_of), 4))
    a, b = torch.tensor(images, dtype=torch.float32), torch.tensor(texts, dtype=torch.float32)
    found = recalls(a, b, torch.tensor(image_of), (1, 3, 10))
    assert found == pytest.approx(slow_recalls(a.numpy(), b.numpy(), image_of.tolist(), (1, 3, 10)))


def test_perfect_embeddings() -> None:
    images = normalize(torch.randn(30, 8), dim=1)
    image_of = torch.arange(30).repeat_interleave(5)
    assert set(recalls(images, images[image_of], image_of).values()) == {100.0}


@pytest.fixture
def captioned(pictures):
    folder = pictures("captioned", 2, broken=1)
    lines = []
    for c in range(6):
        for i in (0, 1):
            captions = [f"class{c} number {i}", f"this is class{c}", "  "]
            lines.append(json.dumps({"path": f"class{c}/{i}.png", "captions": captions}))
    lines.insert(1, json.dumps({"path": "class0/broken0.png", "captions": ["never seen"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return load_captions(folder / "captions.jsonl")


def test_a_run(captioned) -> None:
    colours = np.random.default_rng(99).uniform(40, 215, (6, 3)) / 255 - 0.5
    backbone = TinyTextBackbone({f"class{c}": colours[c].tolist() for c in range(6)})
    report = run_retrieval(backbone, captioned, text_batch_size=5)
    assert list(report.metrics) == [f"{d}_r{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert report.details["captions"] == 24
    assert report.failed == 1
    assert max(backbone.batches) <= 5
    good = [i for i in range(13) if i != 1]
    from amradio.images import ResizePolicy, to_tensor

    summaries = []
    for i in good:
        image = captioned.images[i].decode(max_pixels=10**6, background=(255, 255, 255))
        summaries.append(to_tensor(ResizePolicy.parse((16, 16), multiple=4).apply(image)).mean((1, 2)) - 0.5)
    texts = [c for c, i in zip(captioned.captions, captioned.image_of, strict=True) if i != 1]
    expected = slow_recalls(
        normalize(torch.stack(summaries), dim=1).numpy(),
        normalize(backbone.encode_text(backbone.tokenizer(texts)), dim=1).numpy(),
        [n for n in range(12) for _ in range(2)],
        (1, 5, 10),
    )
    assert {name: m.value for name, m in report.metrics.items()} == pytest.approx(expected)
    assert report.metrics["text_to_image_r5"].value > report.metrics["text_to_image_r1"].value


def test_only_the_first_captions(captioned) -> None:
    report = run_retrieval(TinyTextBackbone(), captioned, RetrievalConfig(k=(1, 2), captions_per_image=1))
    assert report.details["captions"] == 12
    assert report.config["captions_per_image"] == 1


def test_a_backbone_without_texts(captioned, backbone) -> None:
    with pytest.raises(CapabilityError, match="TinyBackbone has no text side"):
        run_retrieval(backbone, captioned)


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"k must be one or several different numbers of at least 1, got \[0\]"):
        RetrievalConfig(k=(0,))
    with pytest.raises(OptionError, match="captions_per_image must be at least 1, got 0"):
        RetrievalConfig(captions_per_image=0)
