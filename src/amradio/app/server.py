"""The server of the app: Gradio behind `amradio.app.gate`, on this machine only unless asked otherwise."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amradio.app.gate import Gate
from amradio.app.page import asset, build_page, theme
from amradio.app.visit import House
from amradio.app.wiring import import_gradio
from amradio.errors import OptionError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_START_S = 60.0
_ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def running(house: House, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Run the app while the block runs.

    Args:
        house: What it shows.
        host: Address to listen at. Any but a loopback one lets others use the app, and this machine's time.
        port: 0 takes any that is free.

    Yields:
        Where the page is.

    Raises:
        MissingDependencyError: Gradio is not installed.
        OptionError: The address or port cannot be used.
    """
    import uvicorn

    with _uploads() as uploads, _bound(host, port) as listening:
        config = uvicorn.Config(
            make_app(house, uploads, LOOPBACK | {host} if is_loopback(host) else None),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="amradio-app", daemon=True)
        thread.start()
        try:
            _wait(lambda: server.started or not thread.is_alive())
            if not server.started:
                raise OptionError(f"The server could not be started at {host}.")
            yield _address(host, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=15)


def make_app(house: House, uploads: Path, hosts: frozenset[str] | None) -> Any:
    """The app as a server runs it (ASGI).

    Args:
        house: What it shows.
        uploads: Folder that uploads are written to until they are read.
        hosts: See `amradio.app.gate.Gate`.
    """
    gr = import_gradio()
    from fastapi import FastAPI

    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = build_page(house)
    gr.mount_gradio_app(
        inner,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[],
        show_error=False,  # errors for people are `gradio.Error`, which is shown in any case
        max_file_size=house.limits.file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=asset("style.css"),
    )
    return Gate(inner, house.limits, uploads, hosts, frozenset(page.fns), house.uploads)


@contextmanager
def _uploads() -> Iterator[Path]:
    """A folder of its own for what Gradio writes to disk, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="amradio-app-")).resolve()
    wanted = {**_ENVIRONMENT, "GRADIO_TEMP_DIR": str(folder)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    if not 0 <= port < 2**16:
        raise OptionError(f"A port is a number from 0 to 65535, got {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise OptionError(
                f"The app cannot listen at {host}, port {port}: {error.strerror or error}. Choose another --port."
            ) from error
        yield listening
    finally:
        listening.close()


def _address(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


def _wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + _START_S
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
