"""Small models for tests of FUNGI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from amradio.models.configs import RadioConfig, ViTConfig
from amradio.models.radio import RadioModel


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Toy models take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
