"""The server as it runs, asked by what is no browser."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest

from amradio.app.server import is_loopback, running
from amradio.errors import MissingDependencyError, OptionError

Server = tuple[str, Any, Path]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def ask(
    address: str, path: str, data: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
) -> tuple[int, bytes]:
    body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    kind = {} if isinstance(data, bytes) or data is None else {"content-type": "application/json"}
    request = urllib.request.Request(address.rstrip("/") + path, body, {**kind, **(headers or {})})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(address: str, name: str, content: bytes) -> tuple[int, Any]:
    edge = uuid.uuid4().hex
    head = f'--{edge}\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    status, answer = ask(address, "/gradio_api/upload", body, {"content-type": f"multipart/form-data; boundary={edge}"})
    return status, json.loads(answer) if status == 200 else answer.decode()


def index_of(address: str, function: str) -> tuple[int, Any]:
    """The number of an event of the page, and the page's description."""
    config = json.loads(ask(address, "/config")[1])
    found = next(d for d in config["dependencies"] if function in (d.get("api_name") or ""))
    return found["id"], config


def call(address: str, function: str, data: list[Any], event: Any = None) -> tuple[int, list[dict[str, Any]]]:
    """Do what the page does: join the queue, and listen until it is done."""
    number, _ = index_of(address, function)
    session = uuid.uuid4().hex[:10]
    body = {"data": ["", *data], "fn_index": number, "session_hash": session, "event_data": event}
    status, answer = ask(address, "/gradio_api/queue/join", body)
    if status != 200:
        return status, [json.loads(answer)]
    messages = []
    url = f"{address.rstrip('/')}/gradio_api/queue/data?session_hash={session}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=120) as stream:
        until = time.monotonic() + 120
        for line in stream:
            assert time.monotonic() < until, messages
            if line.startswith(b"data:"):
                messages.append(json.loads(line[5:]))
                if messages[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return 200, messages


def described(path: str) -> dict[str, Any]:
    return {"path": path, "orig_name": "cat.png", "meta": {"_type": "gradio.FileData"}}


def test_an_upload_is_read_and_removed(server: Server, picture: Any) -> None:
    address, _, folder = server
    status, (path,) = upload(address, "../../cat.png", picture((64, 48)))
    assert status == 200
    assert Path(path).parent.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    status, messages = call(address, "add_uploads", [[described(path)]])
    assert status == 200
    assert messages[-1]["success"]
    strip, *_, stamp = messages[-1]["output"]["data"]
    assert stamp.endswith(":1")
    assert 'title="cat.png"' in strip
    assert str(folder) not in json.dumps(messages)
    assert [p for p in folder.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "http://127.0.0.1:1/a.png", "https://example.org/a.png", "cat.png", __file__, "/proc/self/environ"],
)
@pytest.mark.parametrize("function", ["add_uploads", "take_mask"])
def test_forged_calls_with_paths_and_addresses_are_refused(server: Server, path: str, function: str) -> None:
    address, _, _ = server
    status, messages = call(address, function, [[described(path)]])
    assert (status, messages) == (403, [{"detail": "Only files that were uploaded on this page can be used."}])


def test_uploads_cannot_be_fetched_again(server: Server, picture: Any) -> None:
    address, _, _ = server
    _, (path,) = upload(address, "cat.png", picture())
    for place in (
        f"/gradio_api/file={path}",
        f"/file={path}",
        f"/gradio_api/file/{path}",
        "/gradio_api/file=/etc/passwd",
    ):
        assert ask(address, place)[0] == 404
    os.unlink(path)
    os.rmdir(os.path.dirname(path))


def test_too_large_an_upload_is_refused(server: Server) -> None:
    address, _, folder = server
    status, answer = upload(address, "large.png", bytes(2**20 + 1))
    assert status == 413
    assert "maximum allowed size" in answer
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_errors_are_plain_words(server: Server) -> None:
    address, _, _ = server
    for function, data, event, said in [
        ("ask", [], {"photo": 77, "x": 0, "y": 0}, "This photo is no longer there."),
        ("take_strokes", [], {"photo": 1}, "This photo is no longer there."),
        ("download_tab", [], None, "There is nothing to download yet."),
        ("ask_words", [""], None, "Type what you look for."),
    ]:
        status, messages = call(address, function, data, event)
        assert status == 200
        assert not messages[-1]["success"]
        assert said in (messages[-1]["output"]["error"] or "")
        assert "preprocess" not in json.dumps(messages)
        assert "Traceback" not in json.dumps(messages)


def test_what_nobody_foresaw_is_said_without_details(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address, house, _ = server

    def broken(name: str) -> Any:
        raise ZeroDivisionError("secret of the house")

    monkeypatch.setattr(house.sessions.__class__, "get", lambda self, name, stamp: broken(name))
    status, messages = call(address, "add_samples", [])
    assert status == 200
    assert messages[-1]["output"]["error"].startswith("Something went wrong in the app.")
    assert "secret" not in json.dumps(messages)
    assert "secret of the house" in caplog.text


def test_an_unknown_event_is_refused_quietly(server: Server, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    body = {"data": [], "fn_index": 9999, "session_hash": "abc"}
    status, answer = ask(server[0], "/gradio_api/queue/join", body)
    assert (status, json.loads(answer)["detail"]) == (404, "There is no such event on this page.")
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_another_address_of_this_machine(server: Server, leftovers: Any) -> None:
    _, house, _ = server
    with leftovers(), running(house, "127.0.0.2", 0) as address:
        assert address.startswith("http://127.0.0.2:")
        assert ask(address, "/config")[0] == 200
        assert ask(address, "/config", headers={"host": "127.0.0.3"})[0] == 403


def test_the_page_asks_nobody_else(server: Server) -> None:
    address, _, _ = server
    page = ask(address, "/")[1].decode()
    _, config = index_of(address, "add_samples")
    assert config["analytics_enabled"] is False
    assert "fonts.googleapis.com" not in page
    assert config["stylesheets"] == []
    assert all(d["api_visibility"] == "private" for d in config["dependencies"])
    assert str(Path.cwd()) not in json.dumps(config)


def test_a_port_that_is_taken(server: Server) -> None:
    _, house, _ = server
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"cannot listen at 127.0.0.1, port {port}"), running(house, port=port):
            pytest.fail("it ran")
    with pytest.raises(OptionError, match="from 0 to 65535"), running(house, port=70_000):
        pytest.fail("it ran")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_which_addresses_are_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_gradio_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from amradio.app.wiring import import_gradio

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match="amradio\\[app\\]"):
        import_gradio()
