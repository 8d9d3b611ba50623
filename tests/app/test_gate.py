"""What is let in, without Gradio: an app inside that answers everything with what it got."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from amradio.app.gate import Gate
from amradio.app.limits import Limits
from amradio.app.uploads import Uploads

JOIN = "/gradio_api/queue/join"
OWN = "127.0.0.1:7860"
LIMITS = Limits(request_bytes=2000, upload_bytes=5000, disk_bytes=8000)
Ask = Callable[..., tuple[int, dict[str, str], bytes]]


def in_a_thread(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run it in a thread of its own: in this one, a browser's driver may keep an event loop running."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, coroutine).result()


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    (tmp_path / "uploads" / "abc").mkdir(parents=True)
    (tmp_path / "uploads" / "abc" / "cat.jpg").write_bytes(b"x" * 1000)
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "uploads"


@pytest.fixture
def ask(uploads: Path) -> Ask:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = [(b"access-control-allow-origin", b"*"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    gate = Gate(inner, LIMITS, uploads, frozenset({"127.0.0.1", "localhost", "::1"}), frozenset({0, 7}), Uploads())

    def call(
        method: str = "GET",
        path: str = "/",
        content: Any = None,
        headers: dict[str, str] | None = None,
        chunks: list[bytes] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        sent = {"host": OWN, "content-length": str(len(body)), **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(k.encode(), v.encode()) for k, v in sent.items() if v != "-"],
        }
        parts = [body] if chunks is None else chunks
        waiting = [
            {"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)
        ]
        answers: list[Any] = []

        async def receive() -> Any:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answers.append(message)

        in_a_thread(gate(scope, receive, send))
        found = {k.decode(): v.decode() for k, v in answers[0]["headers"]}
        return answers[0]["status"], found, b"".join(a.get("body", b"") for a in answers[1:])

    return call


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/assets/index-DphvyggB.js", "/static/img/logo.svg", "/theme.css", "/gradio_api/queue/data"),
        *("/gradio_api/heartbeat/abc123", "/gradio_api/upload_progress", "/favicon.ico"),
    ],
)
def test_what_the_page_needs_is_there(ask: Ask, path: str) -> None:
    status, headers, _ = ask(path=path)
    assert status == 200
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("HEAD", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://169.254.169.254/"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/monitoring"),
        ("GET", "/assets/../../secret.txt"),
        ("GET", "/gradio_api/heartbeat/../file=x"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/predict"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/login"),
        ("PUT", "/"),
        ("DELETE", "/gradio_api/upload"),
        ("OPTIONS", JOIN),
    ],
)
def test_nothing_else_is_there(ask: Ask, method: str, path: str) -> None:
    assert ask(method, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[bad"])
def test_another_name_of_this_machine_is_refused(ask: Ask, host: str) -> None:
    assert ask(headers={"host": host})[0] == 403


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:7860"])
def test_names_of_this_machine_are_fine(ask: Ask, host: str) -> None:
    assert ask(headers={"host": host})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_pages_cannot_ask(ask: Ask, headers: dict[str, str]) -> None:
    status, _, body = ask("POST", JOIN, {"data": [], "fn_index": 0}, headers)
    assert status == 403
    assert json.loads(body)["detail"] == "Requests come from this server's own page only."


def test_the_own_page_can_ask(ask: Ask) -> None:
    headers = {"origin": f"http://{OWN}", "sec-fetch-site": "same-origin"}
    status, _, body = ask("POST", JOIN, {"data": [1], "fn_index": 7}, headers)
    assert (status, json.loads(body)) == (200, {"data": [1], "fn_index": 7})


def file(path: str, **more: Any) -> dict[str, Any]:
    return {"fn_index": 0, "data": [[{"path": path, "meta": {"_type": "gradio.FileData"}, **more}]]}


def test_an_upload_can_be_named(ask: Ask, uploads: Path) -> None:
    path = str(uploads / "abc" / "cat.jpg")
    assert ask("POST", JOIN, file(path))[0] == 200
    assert ask("POST", JOIN, file(path, url=f"http://{OWN}/gradio_api/file={path}"))[0] == 200
    assert ask("POST", JOIN, file(path, url=None))[0] == 200


def test_no_other_file_and_no_address_can_be_named(ask: Ask, uploads: Path) -> None:
    (uploads / "abc" / "link.jpg").symlink_to(uploads.parent / "secret.txt")
    upload = str(uploads / "abc" / "cat.jpg")
    names: list[Any] = [
        *("/etc/passwd", "http://169.254.169.254/latest", "https://example.org/a.jpg", "file:///etc/passwd", "cat.jpg"),
        *(str(uploads.parent / "secret.txt"), f"{uploads}/abc/../../secret.txt", f"{uploads}/abc/link.jpg"),
        *(f"{uploads}/abc", f"{uploads}/abc/none.jpg", f"{upload}\0", "", 5, None, [upload]),
    ]
    for name in names:
        status, _, body = ask("POST", JOIN, file(name))
        assert (status, json.loads(body)["detail"]) == (
            403,
            "Only files that were uploaded on this page can be used.",
        ), name
    deep: Any = {"a": [{"b": {"path": "/etc/passwd"}}]}
    assert ask("POST", JOIN, {"data": [], "fn_index": 0, "event_data": deep})[0] == 403
    for url in ("http://169.254.169.254/", f"http://{OWN}/elsewhere", "file:///etc/passwd", 7, "http://[bad"):
        status, _, body = ask("POST", JOIN, file(upload, url=url))
        assert (status, json.loads(body)["detail"]) == (403, "Addresses are not taken from the page."), url


@pytest.mark.parametrize("number", [9999, -1, 1, None, "0", True, [0], 0.5])
def test_events_that_are_not_on_the_page(ask: Ask, number: Any) -> None:
    status, _, body = ask("POST", JOIN, {"data": [], "fn_index": number})
    assert (status, json.loads(body)["detail"]) == (404, "There is no such event on this page.")
    assert ask("POST", JOIN, [])[0] == 404
    assert ask("POST", "/gradio_api/cancel", {"session_hash": "a"})[0] == 200


def test_large_requests_are_not_read(ask: Ask) -> None:
    assert ask("POST", JOIN, b"x" * 2001)[0] == 413
    assert ask("POST", JOIN, b"{}", {"content-length": "-"})[0] == 411
    assert ask("POST", JOIN, b"{}", {"content-length": "-5"})[0] == 411
    assert ask("POST", JOIN, b"{}", {"content-length": "10"}, chunks=[b"x" * 1500, b"x" * 1500])[0] == 413


def test_what_is_no_json_is_refused(ask: Ask) -> None:
    assert ask("POST", JOIN, b"{")[0] == 400
    assert ask("POST", JOIN, b"[" * 1900)[0] == 400
    assert ask("POST", JOIN, b"", {"content-length": "7"}, chunks=[])[0] == 400


def test_uploads_have_limits(ask: Ask, uploads: Path) -> None:
    assert ask("POST", "/gradio_api/upload", b"x" * 4000)[0] == 200
    status, _, body = ask("POST", "/gradio_api/upload", b"x" * 5001)
    assert status == 413
    assert "at most 0 MB at a time" in json.loads(body)["detail"]
    (uploads / "abc" / "more").write_bytes(b"x" * 6500)
    assert ask("POST", "/gradio_api/upload", b"x" * 1000)[0] == 507


def test_web_sockets_are_not_answered(uploads: Path) -> None:
    async def inner(*_: Any) -> None:
        pytest.fail("it got through")

    in_a_thread(Gate(inner, LIMITS, uploads, None, frozenset(), Uploads())({"type": "websocket"}, inner, inner))


def test_uploads_at_the_same_time_share_the_room(uploads: Path) -> None:
    """Five uploads of 3000 bytes, where 1000 are there already and 8000 fit; none has written anything yet."""
    statuses: list[int] = []
    waiting: list[asyncio.Event] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await waiting[0].wait()
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"[]"})

    coming = Uploads()
    gate = Gate(inner, LIMITS, uploads, None, frozenset(), coming)
    headers = [(b"host", OWN.encode()), (b"content-length", b"3000")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 2000, "more_body": False}  # less than was declared

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def together() -> None:
        waiting[:] = [asyncio.Event()]
        tasks = [asyncio.create_task(gate(dict(scope), receive, send)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert statuses == [507, 507, 507]
        waiting[0].set()
        await asyncio.gather(*tasks)
        assert statuses == [507, 507, 507, 200, 200]
        await gate(dict(scope), receive, send)
        assert statuses[-1] == 200  # nothing is reserved any more

    in_a_thread(together())


def test_a_file_of_two_uploads_is_removed_after_the_second(uploads: Path) -> None:
    path, coming = uploads / "abc" / "cat.jpg", Uploads()
    for _ in range(2):
        assert coming.begin(10, uploads, 10**6)
        coming.end(10, [str(path)])
    assert coming.take(str(path), 2000) == b"x" * 1000
    assert path.exists()
    assert coming.begin(10, uploads, 10**6)  # this one could be about to write it again
    assert len(coming.take(str(path), 99)) == 100
    assert path.exists()
    coming.end(10)
    assert not path.parent.exists()
    assert coming.take(str(path), 2000) == b""


def test_a_file_that_is_uploaded_again_stays(uploads: Path) -> None:
    path, coming = uploads / "abc" / "cat.jpg", Uploads()
    assert coming.begin(10, uploads, 10**6)
    coming.end(0, [str(path)])
    assert coming.begin(10, uploads, 10**6)
    coming.take(str(path), 2000)
    coming.end(0, [str(path)])
    assert path.exists()
    assert coming.take(str(path), 2000) == b"x" * 1000
    assert not path.exists()
