"""What every test runs under: fixed seeds, deterministic algorithms, an empty cache, and no network but loopback."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import tempfile
from collections.abc import Iterator
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
