"""Tiny vision models of transformers, and their weights in the names of the official DINO code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TRUNK = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

_RENAMED = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("attention.o_proj.", "attn.proj."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.down_proj.", "mlp.w3."),
    ("layernorm.", "norm."),
)
_JOINED = (
    ("attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("mlp.w12", ("mlp.gate_proj", "mlp.up_proj")),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Toy models take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy() -> Callable[..., Any]:
    """``toy("Dinov2", **config)``: a model of transformers in evaluation mode, every parameter random."""

    def build(name: str, suffix: str = "Model", arguments: dict[str, Any] | None = None, **config: Any) -> Any:
        import transformers

        described = getattr(transformers, f"{name}Config")(**{**TRUNK, **config})
        model = getattr(transformers, f"{name}{suffix}")(described, **(arguments or {}))
        return randomised(model)

    return build


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """Saves a model as its publishers would, with the description of its image processor."""

    def save(model: Any, processor: dict[str, Any] | None = None, file: str = "preprocessor_config.json") -> Path:
        model.save_pretrained(tmp_path)
        described = {"image_mean": MEAN, "image_std": STD} if processor is None else processor
        if described:
            (tmp_path / file).write_text(json.dumps(described))
        return tmp_path

    return save


@pytest.fixture
def official_names() -> Callable[[Any], dict[str, Tensor]]:
    """The weights of a DINOv2 or ViT model of transformers by the names of the official DINO code."""

    def rename(model: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if name.startswith("layers."):
                name = f"blocks.{name.removeprefix('layers.')}"
            for theirs, official in _RENAMED:
                name = name.replace(theirs, official)
            found[name] = tensor.clone()
        for joined, parts in _JOINED:
            for first in [n for n in found if f".{parts[0]}." in n]:
                pieces = [found.pop(first.replace(parts[0], part)) for part in parts]
                found[first.replace(parts[0], joined)] = torch.cat(pieces)
        return found

    return rename


@pytest.fixture
def standardised() -> Callable[[Tensor], Tensor]:
    """Images as the saved processor would standardise them."""
    return lambda images: (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
