"""Small random models of every kind, and a hub on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from amradio.models.configs import (
    AdaptorConfig,
    ERadioConfig,
    HeadConfig,
    InterNormalizerConfig,
    RadioConfig,
    ViTConfig,
)
from amradio.models.radio import RadioModel

VIT = ViTConfig(
    embed_dim=32, depth=3, num_heads=2, mlp_hidden_dim=40, patch_size=8, position_grid=(9, 9), num_cls_tokens=3,
    num_registers=2, layer_scale=1e-5, final_norm=True,
)  # fmt: skip
ERADIO = ERadioConfig(
    dim=8, in_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=(None, None, (2, 2), 2),
    full_features_head_dim=32, cpb_mlp_hidden=16, layer_scale=1e-5,
)  # fmt: skip
HEADS = {
    "clip": AdaptorConfig(
        head_idx=0,
        summary=HeadConfig(input_dim=32, hidden_dim=24, output_dim=20, num_inner=1),
        features=HeadConfig(version="v1", input_dim=32, hidden_dim=16, output_dim=12),
    ),
    "sam": AdaptorConfig(
        head_idx=2,
        summary=HeadConfig(input_dim=32, hidden_dim=24, output_dim=20, pre_norm=True),
        features=HeadConfig(version="attn", input_dim=32, hidden_dim=16, output_dim=4 * 6, upsample_factor=2),
    ),
}
CONFIGS = {
    "vit": RadioConfig(backbone=VIT, summary_idxs=(0, 2)),
    "adaptors": RadioConfig(
        backbone=VIT,
        summary_idxs=(1,),
        adaptors=HEADS,
        teachers=({"name": "clip"}, {"name": "dino"}, {"name": "sam"}),
        feature_normalizer=True,
        inter_normalizer=InterNormalizerConfig(num_intermediates=3, rotation_per_layer=True),
    ),
    "dyt": RadioConfig(
        backbone=ViTConfig(
            embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=24, patch_size=8, position_grid=(9, 9), norm="dyt",
            mlp="swiglu", patch_bias=True, unused_reg_tokens=2, position="window",
        ),
    ),
    "mean": RadioConfig(
        backbone=ViTConfig(
            embed_dim=32, depth=2, num_heads=2, mlp_hidden_dim=24, patch_size=8, position_grid=(9, 9), pool="avg",
            num_cls_tokens=0, mlp_norm=True, scaled_norm=True, patch_norm=True,
        ),
    ),
    "eradio": RadioConfig(
        backbone=ERADIO,
        adaptors={"clip": AdaptorConfig(head_idx=0, summary=HEADS["clip"].summary, features=HEADS["clip"].features)},
        teachers=({"name": "clip"},),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def make_radio() -> Callable[[str], RadioModel]:
    """``make_radio("adaptors")``: a model in evaluation mode of which no tensor is at its initial value."""

    def make(kind: str) -> RadioModel:
        generator = torch.Generator().manual_seed(0)
        config = CONFIGS[kind]
        model = RadioModel(config, list(config.adaptors)).eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and "relative_" not in name:
                    tensor.copy_(torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=generator))
                if name.endswith(("running_var", "norm_std")):
                    tensor.abs_().add_(0.3)
        return model

    return make


@pytest.fixture(params=sorted(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a kind of model."""
    return str(request.param)


@pytest.fixture
def radio(kind: str, make_radio: Callable[[str], RadioModel]) -> RadioModel:
    """A model of each kind."""
    return make_radio(kind)


@pytest.fixture
def images() -> torch.Tensor:
    """[2, 3, 64, 96], which every kind takes."""
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """``same(radio(images), model(images))``: the outputs of both are equal to the bit, in dtype too."""

    def check(plain: Any, wrapped: Any) -> None:
        plain = plain if isinstance(plain, dict) else {"backbone": plain}
        assert list(wrapped.adaptors or {}) == [name for name in plain if name != "backbone"]
        for name, output in plain.items():
            found = wrapped if name == "backbone" else wrapped.adaptors[name]
            for part in ("summary", "features"):
                wanted, got = getattr(output, part), getattr(found, part)
                assert got.dtype == wanted.dtype, (name, part)
                assert torch.equal(got, wanted), (name, part)

    return check


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, Path], None]]:
    """A hub that serves folders as repositories: ``hub("nvidia/C-RADIOv2-B", folder)``."""
    import huggingface_hub
    from huggingface_hub import constants

    commit, folders = "5" * 40, {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            organisation, name, _, _, file = unquote(urlsplit(self.path).path).lstrip("/").split("/", 4)
            path = folders[f"{organisation}/{name}"] / file
            body, headers = b"", {"X-Repo-Commit": commit}
            if path.is_file():
                body = path.read_bytes()
                git = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
                headers["ETag"] = f'"{git}"'
            else:
                headers["X-Error-Code"] = "EntryNotFound"
            self.send_response(200 if path.is_file() else 404)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AMRADIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    huggingface_hub.close_session()
    yield folders.__setitem__
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
