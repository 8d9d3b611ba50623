"""Small models with random weights, and their exports, which are made once: tracing takes seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from amradio.models.configs import AdaptorConfig, ERadioConfig, HeadConfig, RadioConfig, Resolution, ViTConfig
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity

WIDTH = 32
ERADIO = ERadioConfig(
    dim=16,
    in_dim=8,
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_size=(None, None, (2, 2), 2),
    full_features_head_dim=32,
    cpb_mlp_hidden=16,
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Toy models take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(adaptors: Sequence[str] = (), backbone: Any = None, **trunk: Any) -> RadioModel:
    """A model whose every parameter matters: a ViT with registers, or another backbone."""
    vit = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 64, "patch_size": 8, **trunk}
    backbone = backbone or ViTConfig(**{"position_grid": (9, 9), "num_cls_tokens": 3, "num_registers": 2, **vit})
    head = HeadConfig(input_dim=WIDTH, hidden_dim=16, output_dim=20)
    finer = HeadConfig(version="attn", input_dim=WIDTH, hidden_dim=16, output_dim=4 * 6, upsample_factor=2)
    config = RadioConfig(
        backbone=backbone,
        summary_idxs=(0, 1) if isinstance(backbone, ViTConfig) else (0,),
        adaptors={
            "clip": AdaptorConfig(head_idx=0, summary=head, features=head),
            "sam": AdaptorConfig(head_idx=int(isinstance(backbone, ViTConfig)), summary=head, features=finer),
        },
        teachers=({"name": "clip", "type": "generic"}, {"name": "sam", "type": "sam"}),
        preferred_resolution=Resolution(64, 64),
        version="toy",
    )
    torch.manual_seed(1)
    model = RadioModel(config, adaptors).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.startswith("input_conditioner"):
            tensor.add_(0.1 * (torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)))
    model.identity = Identity(source="toy.safetensors", layout="native", version="toy", sha256="ab" * 32, license="MIT")
    return model


@pytest.fixture(scope="session")
def toy() -> Callable[..., RadioModel]:
    """``toy(adaptors=(), **trunk)``: see `build`."""
    return build


@pytest.fixture(scope="session")
def eradio() -> Callable[..., RadioModel]:
    """``eradio(adaptors=())``: a small E-RADIO."""
    return lambda adaptors=(): build(adaptors, ERADIO)


@pytest.fixture(scope="session")
def whole() -> RadioModel:
    """A ViT with registers and two adaptors, one of which upsamples."""
    return build(["clip", "sam"])


@pytest.fixture(scope="session")
def whole_file(whole: RadioModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX file for any size and number of images."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from amradio.export import export_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of what exporters say of themselves may reach the user
        return export_onnx(whole, tmp_path_factory.mktemp("onnx") / "whole.onnx")
