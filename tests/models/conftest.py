"""Toy models of every architecture, and the network run block by block with plain loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from amradio.models.configs import AdaptorConfig, HeadConfig, RadioConfig
from amradio.models.eradio import ERADIO_VARIANTS
from amradio.models.radio import RadioModel
from amradio.weights import official
from amradio.weights.args import head_position

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
ERADIO = {
    "dim": 16,
    "in_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "window_size": (None, None, (2, 2), 2),
    "full_features_head_dim": 32,
    "cpb_mlp_hidden": 16,
}
TEACHERS = [
    {"name": "clip"},
    {"name": "dino_v2"},
    {"name": "sam", "use_summary": False, "fd_upsample_factor": 2, "spatial_mlp_version": "attn"},
]


def toy_args(name: str, model_kwargs: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
    """Official training arguments of a small model of an architecture."""
    if name in ERADIO_VARIANTS:
        common: dict[str, Any] = {"cpe_max_size": None, "cls_token_per_teacher": False}
        sizes = {"return_full_features": True, **ERADIO}
    else:
        common = {"cpe_max_size": 8 * (14 if "patch14" in name or "dino" in name else 16), "register_multiple": 4}
        sizes = VIT
    return {"model": name, "model_kwargs": sizes | (model_kwargs or {}), "teachers": TEACHERS} | common | args


def toy_config(name: str, **args: Any) -> RadioConfig:
    """The description of a small model, with two adaptors, one of which upsamples and has an attention head."""
    args = toy_args(name, **args)
    config = official.describe(args, {})
    width = config.backbone.embed_dim
    summary = HeadConfig(input_dim=width, hidden_dim=24, output_dim=20, num_inner=1)
    plain = HeadConfig(input_dim=width, hidden_dim=16, output_dim=12)
    finer = HeadConfig(version="attn", input_dim=width, hidden_dim=16, output_dim=4 * 6, upsample_factor=2)
    adaptors = {
        "clip": AdaptorConfig(head_idx=0, summary=summary, features=plain),
        "sam": AdaptorConfig(head_idx=head_position(args, config.backbone, "sam"), summary=plain, features=finer),
    }
    return dataclasses.replace(config, adaptors=adaptors)


def randomise(model: torch.nn.Module) -> None:
    """Move parameters and statistics away from where they start, so that every one of them matters."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("input_conditioner"):
                tensor.add_(0.1 * (torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toy models take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy() -> Callable[..., RadioModel]:
    """Builds a toy model with random weights: ``toy(architecture, adaptors=(), **args)``."""

    def build(name: str, adaptors: Sequence[str] = (), **args: Any) -> RadioModel:
        torch.manual_seed(1)
        model = RadioModel(toy_config(name, **args), adaptors).eval()
        randomise(model)
        return model

    return build


@pytest.fixture
def make_args() -> Callable[..., dict[str, Any]]:
    """Makes official training arguments of a toy model."""
    return toy_args


def _windows(grid: tuple[int, int], size: int) -> list[list[int]]:
    """The patch indices of each window, one by one."""
    h, w = grid
    return [
        [y * w + x for y in range(top, top + size) for x in range(left, left + size)]
        for top in range(0, h, size)
        for left in range(0, w, size)
    ]


@pytest.fixture
def by_hand() -> Callable[..., list[Tensor]]:
    """Runs the blocks of a vision transformer one after the other; ViTDet windows one after the other as well.

    ``by_hand(model, images, windowed=())`` returns the tokens after each block, [B, prefix + L, C]. The blocks in
    `windowed` see one window at a time and leave the prefix tokens as they are.
    """

    def run(model: RadioModel, images: Tensor, windowed: Sequence[int] = ()) -> list[Tensor]:
        trunk = model.model
        grid = (images.shape[-2] // trunk.patch_size, images.shape[-1] // trunk.patch_size)
        x = trunk.patch_generator(model.input_conditioner(images).to(model.dtype))
        states = []
        for i, block in enumerate(trunk.blocks):
            if i in windowed:
                y = x.clone()
                for window in _windows(grid, trunk.window_size):
                    where = torch.tensor(window) + trunk.num_prefix_tokens
                    y[:, where] = block(x[:, where])
                x = y
            else:
                x = block(x)
            states.append(x)
        return states

    return run
