"""Golden cases of FUNGI, small models with known weights, and slow references by plain autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity, build_model
from amradio.weights.dino import to_checkpoint

GOLDENS = Path(__file__).resolve().parent.parent / "goldens" / "hbird_fungi"
INDEX = json.loads((GOLDENS / "index.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in INDEX["cases"]}
HBIRD_STD = (0.229, 0.224, 0.255)


class Golden:
    """One case: its stored tensors and values, and comparison within their tolerances."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        self.settings: dict[str, Any] = self.case["settings"]
        self.tensors = load_file(GOLDENS / self.case["file"]) if self.case["file"] else {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def signs(self, outputs: int) -> Tensor:
        """The sign matrix int8 [E, H, H + 1]."""
        count = outputs * (outputs + 1)
        bits = np.unpackbits(self["projection_bits"].numpy(), axis=1)[:, :count]
        return torch.from_numpy(bits.astype(np.int8) * 2 - 1).view(-1, outputs, outputs + 1)

    def check(self, name: str, found: Tensor) -> None:
        described, expected = self.case["tensors"][name], self[name]
        assert tuple(found.shape) == tuple(expected.shape), name
        if described.get("compare") == "exact":
            assert torch.equal(found.to(expected.dtype), expected), name
            return
        allowed = described["atol"] + described["rtol"] * expected.abs()
        excess = ((found - expected).abs() - allowed).max()
        assert excess <= 0, f"{name}: {float((found - expected).abs().max()):.3g} exceeds {described['atol']:.3g}"

    def check_value(self, name: str, found: Any) -> None:
        described = self.case["values"][name]
        np.testing.assert_allclose(
            np.asarray(found, dtype=float), np.asarray(described["value"], dtype=float), rtol=0, atol=described["atol"]
        )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Toy models take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """``golden("B_dense_p16_b1")``."""
    return Golden


@pytest.fixture
def golden_model() -> Callable[..., RadioModel]:
    """``golden_model("dino_p16", std)``: a model of the index in our own trunk."""

    def load(name: str, std: tuple[float, ...] = (0.229, 0.224, 0.225)) -> RadioModel:
        described = INDEX["models"][name]
        args, tensors = described["args"], load_file(GOLDENS / described["file"])
        tensors = {k: v.float() for k, v in tensors.items()}
        registers = args.get("reg_tokens", 0)
        if registers:
            tensors["register_tokens"] = tensors.pop("reg_token")
        if args.get("no_embed_class"):
            tensors["pos_embed"] = torch.cat([torch.zeros_like(tensors["pos_embed"][:, :1]), tensors["pos_embed"]], 1)
        side = args["img_size"] // args["patch_size"]
        trunk = ViTConfig(
            embed_dim=args["embed_dim"],
            depth=args["depth"],
            num_heads=args["num_heads"],
            mlp_hidden_dim=4 * args["embed_dim"],
            patch_size=args["patch_size"],
            layer_scale=1.0 if "init_values" in args else None,
            final_norm=True,
            position="resize",
            position_grid=(side, side),
            position_offset=0.1,
            num_registers=registers,
            patch_bias=True,
        )
        model, report = build_model(to_checkpoint(tensors, trunk, Identity(source=name, layout="golden")))
        assert not report
        model.input_conditioner.norm_std.copy_(torch.tensor(std).view(3, 1, 1))
        return model.eval().requires_grad_(False)

    return load


@pytest.fixture
def tiny() -> Callable[..., RadioModel]:
    """``tiny(**changes)``: a small random RADIO model whose tokens differ from one another."""

    def build(config: dict[str, Any] | None = None, **changes: Any) -> RadioModel:
        trunk = {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "mlp_hidden_dim": 64,
            "patch_size": 8,
            "position_grid": (8, 8),
        }
        torch.manual_seed(7)
        model = RadioModel(RadioConfig(backbone=ViTConfig(**{**trunk, **changes}), **(config or {})))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.2)
        return model.eval().requires_grad_(False)

    return build
