from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import amradio
from amradio.distill.config import DistillConfig, parse_config
from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig, ViTConfig
from amradio.models.radio import RadioModel

PATCH = 8
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(amradio.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of 24 pictures of smooth random colours."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(24):
        small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 52), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def teacher_model(seed: int, embed_dim: int) -> RadioModel:
    backbone = ViTConfig(
        embed_dim=embed_dim,
        depth=2,
        num_heads=2,
        mlp_hidden_dim=2 * embed_dim,
        patch_size=PATCH,
        position_grid=(8, 8),
        num_registers=1,
    )
    torch.manual_seed(seed)
    model = RadioModel(RadioConfig(backbone=backbone)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that pictures differ
    return model


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> list[str]:
    """Two small RADIO models with random weights, in files: features of width 12 and 10."""
    folder = tmp_path_factory.mktemp("teachers")
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for seed, path in enumerate(paths):
        amradio.save(teacher_model(seed, 12 - 2 * seed), path)
    return [str(p) for p in paths]


def nested(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        target, *rest = key.split("__")
        if rest:
            inner = data[int(target)] if isinstance(data, list) else data.setdefault(target, {})
            nested(inner, {"__".join(rest): value})
        elif isinstance(data, list):
            data[int(target)] = value
        else:
            data[target] = value
    return data


@pytest.fixture
def settings(photos, teachers):
    """Settings of a small run as plain data, with changes such as ``schedule__steps=3``."""

    def make(**changes: Any) -> dict[str, Any]:
        data = {
            "name": "test",
            "data": {"sources": [{"path": str(photos)}], "workers": 2, "decode": "full"},
            "student": {
                "model": {
                    "backbone": {
                        "embed_dim": 16,
                        "depth": 2,
                        "num_heads": 2,
                        "mlp_hidden_dim": 32,
                        "patch_size": PATCH,
                        "position_grid": [8, 8],
                        "num_registers": 1,
                    }
                },
                "ema": 0.9,
            },
            "teachers": [
                {"name": "one", "backbone": teachers[0]},
                {
                    "name": "two",
                    "backbone": teachers[1],
                    "resolution": 32,
                    "summary": {"loss": "balanced-angle"},
                    "features": {"loss": "cosine-smooth-l1", "balancing": "per-channel", "upsample": 2},
                },
            ],
            "partitions": [{"sizes": [24, 32], "batch_size": 4}],
            "schedule": {"steps": 6, "warmup": 2},
            "run": {"statistics": 16, "log_steps": 1, "tensorboard": False},
        }
        return nested(data, changes)

    return make


@pytest.fixture
def config(settings):
    """The configuration of a small run, with changes such as ``schedule__steps=3``."""

    def make(**changes: Any) -> DistillConfig:
        return parse_config(settings(**changes))

    return make


@pytest.fixture
def head():
    """An adaptor's description."""

    def make(width: int, summary: int, features: int, slot: int = 0) -> AdaptorConfig:
        return AdaptorConfig(
            head_idx=slot,
            summary=HeadConfig(input_dim=width, hidden_dim=width, output_dim=summary),
            features=HeadConfig(input_dim=width, hidden_dim=width, output_dim=features),
        )

    return make


@pytest.fixture
def environment() -> dict[str, str]:
    """Of processes that run the package."""
    return ENVIRONMENT


@pytest.fixture
def amradio_command():
    """Run the command line in processes of its own, under torchrun if there are several."""

    def run(*words: Any, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*start, "-m", "amradio", *map(str, words)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run
