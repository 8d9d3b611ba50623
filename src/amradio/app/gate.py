"""What is let in: the outermost layer of the server, before Gradio sees a request.

Gradio can do much more than this app needs: read files that a request names, fetch URLs, serve files. What is not
needed is not reachable here: only the addresses of `_OPEN` exist, requests come from the page itself or not at all,
their size is bounded before they are read, and a file may only be named by the name that its upload just got.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from amradio.app.limits import Limits
from amradio.app.uploads import Uploads

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"

_OPEN = {
    "GET": re.compile(
        r"/|/config/?|/favicon\.ico|/manifest\.json|/(gradio_api/)?theme\.css|/(assets|static)/[\w./-]+"
        r"|/gradio_api/(queue/data|upload_progress|startup-events|heartbeat/\w+)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel|reset/?|upload)"),
}
_HEADERS = {
    # Gradio's page is made of inline scripts, and makes functions from texts that the server sent with the page.
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data:; "
    "manifest-src 'self'; worker-src 'self' blob:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_REPLACED = frozenset(name.encode() for name in (*_HEADERS, "access-control-allow-origin"))


class RefusedError(Exception):
    """A request that is not let in.

    Args:
        status: Of the answer.
        reason: For people.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Gate:
    """Lets requests of the page through to an app.

    Args:
        app: The app inside.
        limits: How large requests may be.
        uploads: The folder that uploads are written to.
        hosts: Names by which the server may be called; None: any. A page of another site can make a browser call a
            server on this machine, but not under its own name.
        functions: Numbers of the events of the page.
        coming: What is being uploaded.
    """

    def __init__(
        self,
        app: Asgi,
        limits: Limits,
        uploads: Path,
        hosts: frozenset[str] | None,
        functions: frozenset[int],
        coming: Uploads,
    ) -> None:
        self._app = app
        self._limits = limits
        self._uploads = uploads
        self._hosts = hosts
        self._functions = functions
        self._coming = coming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no part of the page uses a web socket
            return
        try:
            self._check(scope)
            if scope["method"] == "POST":
                length = self._length(scope)
                if scope["path"] == UPLOAD:
                    await self._upload(scope, receive, send, length)
                    return
                receive = await self._checked_body(scope, receive)
        except RefusedError as refused:
            await _answer(send, refused)
            return
        await self._app(scope, receive, _with_headers(send))

    def _check(self, scope: Scope) -> None:
        method, path = scope["method"], scope["path"]
        known = _OPEN.get("GET" if method == "HEAD" else method)
        if known is None or not known.fullmatch(path) or ".." in path:
            raise RefusedError(404, "There is nothing here.")
        host = _header(scope, b"host") or ""
        if self._hosts is not None and _split(f"//{host}").hostname not in self._hosts:
            raise RefusedError(403, "This server answers on this machine only.")
        origin = _header(scope, b"origin")
        foreign = origin is not None and _split(origin).netloc != host
        if foreign or (method == "POST" and _header(scope, b"sec-fetch-site") in ("cross-site", "same-site")):
            raise RefusedError(403, "Requests come from this server's own page only.")

    def _length(self, scope: Scope) -> int:
        length = _header(scope, b"content-length") or ""
        if not length.isdigit():
            raise RefusedError(411, "The length of the request is missing.")
        is_upload = scope["path"] == UPLOAD
        if is_upload and int(length) > self._limits.upload_bytes:
            raise RefusedError(413, f"Choose fewer files: at most {self._limits.upload_bytes // 2**20} MB at a time.")
        if not is_upload and int(length) > self._limits.request_bytes:
            raise RefusedError(413, "The request is too large.")
        return int(length)

    async def _upload(self, scope: Scope, receive: Receive, send: Send, length: int) -> None:
        """Let files in, if there is room for all that are on their way; note which files they became."""
        if not self._coming.begin(length, self._uploads, self._limits.disk_bytes):
            raise RefusedError(507, "Too many uploads at the same time. Try again in a minute.")
        missing, answer, over = length, bytearray(), False

        async def counted() -> Message:
            nonlocal missing
            message = await receive()
            size = min(len(message.get("body", b"")), missing)
            self._coming.arrived(size)
            missing -= size
            return message

        async def overheard(message: Message) -> None:
            answer.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                finish()  # before the page can ask for the files
            await send(message)

        def finish() -> None:
            nonlocal over
            if not over:
                over = True
                self._coming.end(missing, [path for path in _names(bytes(answer)) if self._is_upload(path)])

        try:
            await self._app(scope, counted, _with_headers(overheard))
        finally:
            finish()

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        body = await _read(receive, self._limits.request_bytes)
        content = _json(body)
        if scope["path"] == JOIN and not self._is_known(content):
            raise RefusedError(404, "There is no such event on this page.")
        self._check_files(content, _header(scope, b"host") or "")
        return _again(body, receive)

    def _is_known(self, content: Any) -> bool:
        number = content.get("fn_index") if isinstance(content, dict) else None
        return isinstance(number, int) and not isinstance(number, bool) and number in self._functions

    def _check_files(self, content: Any, host: str) -> None:
        """Refuse a request that names anything but a file that was uploaded through the page."""
        for record in _records(content):
            if "path" in record and not self._is_upload(record["path"]):
                raise RefusedError(403, "Only files that were uploaded on this page can be used.")
            # Gradio's page repeats the address at which it would serve an upload; nothing here reads it.
            if record.get("url") is not None and not _is_own_address(record["url"], host):
                raise RefusedError(403, "Addresses are not taken from the page.")

    def _is_upload(self, path: Any) -> bool:
        if not isinstance(path, str) or "\0" in path:
            return False
        relative = os.path.relpath(os.path.normpath(path), self._uploads) if os.path.isabs(path) else ".."
        parts = Path(relative).parts
        return len(parts) == 2 and parts[0] != ".." and os.path.isfile(path) and not os.path.islink(path)


def _is_own_address(url: Any, host: str) -> bool:
    parts = _split(url if isinstance(url, str) else "")
    return parts.scheme in ("http", "https") and parts.netloc == host and parts.path.startswith("/gradio_api/file=")


def _split(url: str) -> SplitResult:
    """The parts of an address; none of what is no address."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _records(content: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a JSON value."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body or b"null")
    except (ValueError, RecursionError):
        raise RefusedError(400, "The request is no JSON.") from None


def _names(answer: bytes) -> list[str]:
    """The files in the answer to an upload; none if it was refused."""
    try:
        found = json.loads(answer)
    except ValueError:
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _read(receive: Receive, most: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "The request broke off.")
        body += message.get("body", b"")
        if len(body) > most:
            raise RefusedError(413, "The request is too large.")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read to the app inside, then whatever comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _with_headers(send: Send) -> Send:
    async def extended(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in _REPLACED]
            message["headers"] = kept + [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
        await send(message)

    return extended


async def _answer(send: Send, refused: RefusedError) -> None:
    body = json.dumps({"detail": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    extended = _with_headers(send)
    await extended({"type": "http.response.start", "status": refused.status, "headers": headers})
    await extended({"type": "http.response.body", "body": body})
