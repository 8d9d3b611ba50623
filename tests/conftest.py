"""What every test runs under: fixed seeds, deterministic algorithms, an empty cache, and no network but loopback."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads its environment once. Tests of downloads switch the network on
# again, towards a server of their own.
_CACHE = tempfile.TemporaryDirectory(prefix="amradio-tests-")
for _name in [n for n in os.environ if n.startswith(("AMRADIO_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
    del os.environ[_name]
os.environ.update(
    HF_HOME=_CACHE.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="120",
)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile(
    "amradio",
    deadline=None,  # a loaded machine is no failure
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
hypothesis.settings.load_profile("amradio")

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores already
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """The same random numbers and the same kernels in every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails, wherever it runs."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise AssertionError(f"A test tried to connect to {address[0]}:{address[1]}.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder with checkpoints in the official formats and the outputs that the official code gives for them."""
    return Path(__file__).resolve().parent / "goldens" / "radio"


class HbirdGolden:
    """A case of the originals of HummingBird and FUNGI: what they gave, and comparison within the case's tolerances."""

    def __init__(self, folder: Path, index: dict[str, Any], name: str) -> None:
        from safetensors.torch import load_file

        self.case: dict[str, Any] = index["cases"][name]
        self.settings: dict[str, Any] = self.case["settings"]
        self.tensors: dict[str, torch.Tensor] = load_file(folder / self.case["file"]) if self.case["file"] else {}
        self._folder, self._index = folder, index

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def inputs(self) -> HbirdGolden:
        """The case that holds the inputs of this one."""
        name = self.settings.get("inputs")
        return self if name is None else HbirdGolden(self._folder, self._index, name)

    def signs(self, outputs: int) -> torch.Tensor:
        """The sign matrix int8 [E, H, H + 1] of a projection."""
        count = outputs * (outputs + 1)
        bits = np.unpackbits(self["projection_bits"].numpy(), axis=1)[:, :count]
        return torch.from_numpy(bits.astype(np.int8) * 2 - 1).view(-1, outputs, outputs + 1)

    def check(self, name: str, found: torch.Tensor) -> None:
        """Compare a tensor."""
        described, expected = self.case["tensors"][name], self[name]
        assert tuple(found.shape) == tuple(expected.shape), name
        if described.get("compare") == "exact":
            assert torch.equal(found.to(expected.dtype), expected), name
            return
        assert torch.isfinite(found).all(), name
        allowed = described["atol"] + described["rtol"] * expected.abs()
        excess = ((found - expected).abs() - allowed).max()
        assert excess <= 0, f"{name}: {float((found - expected).abs().max()):.3g} exceeds {described['atol']:.3g}"

    def check_value(self, name: str, found: Any, atol: float | None = None) -> None:
        """Compare a number, or several."""
        described = self.case["values"][name]
        pairs = (np.asarray(numbers, dtype=float) for numbers in (found, described["value"]))
        np.testing.assert_allclose(*pairs, rtol=0, atol=described["atol"] if atol is None else atol, err_msg=name)

    def value(self, name: str) -> Any:
        """A number as it is stored."""
        return self.case["values"][name]["value"]


@pytest.fixture(scope="session")
def hbird_goldens() -> Path:
    """The folder with what the originals of HummingBird and FUNGI gave."""
    return Path(__file__).resolve().parent / "goldens" / "hbird_fungi"


@pytest.fixture(scope="session")
def hbird_index(hbird_goldens: Path) -> dict[str, Any]:
    """Its index, with the cases by name."""
    index: dict[str, Any] = json.loads((hbird_goldens / "index.json").read_text(encoding="utf-8"))
    return {**index, "cases": {case["name"]: case for case in index["cases"]}}


@pytest.fixture(scope="session")
def hbird_golden(hbird_goldens: Path, hbird_index: dict[str, Any]) -> Callable[[str], HbirdGolden]:
    """``hbird_golden("A_voc_p16")``."""
    return lambda name: HbirdGolden(hbird_goldens, hbird_index, name)


@pytest.fixture(scope="session")
def hbird_model(hbird_goldens: Path, hbird_index: dict[str, Any]) -> Callable[..., Any]:
    """``hbird_model("dino_p16", std)``: a model of the index in our own trunk."""

    def load(name: str, std: Sequence[float] = (0.229, 0.224, 0.225)) -> Any:
        from safetensors.torch import load_file

        from amradio.models.configs import ViTConfig
        from amradio.weights.checkpoint import Identity, build_model
        from amradio.weights.dino import to_checkpoint

        described = hbird_index["models"][name]
        args = described["args"]
        tensors = {k: v.float() for k, v in load_file(hbird_goldens / described["file"]).items()}
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
        model.input_conditioner.norm_std.copy_(torch.as_tensor(std).view(3, 1, 1))
        return model.eval().requires_grad_(False)

    return load


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    """``make_clip(path, pictures, fps=10)``: write uint8 [H, W, 3] as a video, with PyAV."""
    pytest.importorskip("av")

    def write(
        path: Path,
        pictures: Sequence[np.ndarray],
        fps: int = 10,
        *,
        codec: str = "libx264",
        pixel_format: str = "yuv444p",
        options: dict[str, str] | None = None,
        sound: str | None = None,
        times_ms: Sequence[int] | None = None,
        **attributes: Any,
    ) -> Path:
        from fractions import Fraction

        import av

        with av.open(str(path), "w") as file:
            stream = file.add_stream(codec, rate=fps, options=options or ({"crf": "0"} if codec == "libx264" else {}))
            stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixel_format
            for name, value in attributes.items():
                setattr(stream.codec_context, name, value)
            if times_ms is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            audio = file.add_stream(sound, rate=48000) if sound else None
            for i, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(format=pixel_format)
                if times_ms is not None:
                    frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
                file.mux(stream.encode(frame))
                for k in range(0, 48000 // fps if audio else 0, 960):
                    tone = np.sin((np.arange(960) + k) / 10, dtype=np.float32)[None] / 4
                    sample = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                    sample.rate, sample.pts, sample.time_base = 48000, i * 48000 // fps + k, Fraction(1, 48000)
                    file.mux(audio.encode(sample))
            for one in (stream, audio):
                file.mux(one.encode(None) if one else [])
        return path

    return write
