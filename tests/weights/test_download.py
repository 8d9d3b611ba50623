"""Downloads, against a local server that behaves like the hub: HEAD, redirect of large files to a CDN, LFS headers."""

import errno
import hashlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from amradio.errors import DownloadError, GatedRepoError, IntegrityError, OfflineError, OptionError
from amradio.weights import cache, hub, transfer
from amradio.weights.download import fetch_hub_file, fetch_hub_model, fetch_url
from amradio.weights.trust import safe_name

REPO = "nvidia/RADIO"
FILE = "radio_v9.pth.tar"
URL = f"https://huggingface.co/{REPO}/resolve/main/{FILE}?download=true"
TOKEN = "hf_" + "s3cr3t" * 5
C1, C2 = "1" * 40, "2" * 40
BODY = bytes(i * i % 251 for i in range(300_000))
LARGE = (".pth.tar", ".safetensors")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):  # clients that hang up are part of the tests
        pass


class FakeHub:
    """State and knobs of the two servers: the hub, and the CDN that it redirects large files to."""

    def __init__(self):
        self.commits = {}  # (repo, commit) -> {filename: bytes}
        self.refs = {}  # (repo, revision) -> commit
        self.plain = {}  # path -> (bytes, etag), on the CDN
        self.requests = []  # (server, method, path, headers)
        self.cuts = []  # bytes after which the next bodies break off
        self.statuses = []  # what the next answers are instead, as (server, method, status, headers)
        self.gate = None  # (status, error code) without the right token
        self.damage = False  # the CDN sends other bytes than announced
        self.announce_lfs = True
        self.ranges = True
        self.slowly = threading.Event()  # bodies wait for it
        self.slowly.set()
        self.servers = {}
        for name in ("hub", "cdn"):
            server = _Server(("127.0.0.1", 0), type(name, (_Handler,), {"state": self, "server_name": name}))
            self.servers[name] = server
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def address(self, name):
        host = {"hub": "127.0.0.1", "cdn": "localhost"}[name]  # another host, as on the real hub
        return f"http://{host}:{self.servers[name].server_port}"

    def put(self, files, commit=C1, repo=REPO, revision="main"):
        self.commits[repo, commit] = files
        self.refs[repo, revision] = commit

    def bodies(self, server="cdn"):
        return [r for r in self.requests if r[0] == server and r[1] == "GET"]


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    server_name: str

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        state, name = self.state, self.server_name
        state.requests.append((name, self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        for i, (server, method, status, headers) in enumerate(state.statuses):
            if (server, method) == (name, self.command):
                del state.statuses[i]
                return self._reply(status, headers)
        return self._hub() if name == "hub" else self._cdn()

    def _reply(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _hub(self):
        state = self.state
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/moved/"):  # a repository that was renamed
            return self._reply(307, {"Location": "/nvidia/" + path.removeprefix("/moved/")})
        organisation, repo, _, revision, filename = path.lstrip("/").split("/", 4)
        repo = f"{organisation}/{repo}"
        if state.gate and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, code = state.gate
            return self._reply(status, {"X-Error-Code": code} if code else {})
        if not any(r == repo for r, _ in state.commits):
            return self._reply(404, {"X-Error-Code": "RepoNotFound"})
        commit = state.refs.get((repo, revision), revision)
        if (repo, commit) not in state.commits:
            return self._reply(404, {"X-Error-Code": "RevisionNotFound"})
        if filename not in state.commits[repo, commit]:
            return self._reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = state.commits[repo, commit][filename]
        if filename.endswith(LARGE) and state.announce_lfs:
            etag = f'"{sha256(data)}"'
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
            location = f"{state.address('cdn')}/lfs/{repo}/{commit}/{filename}?signature=abc"
            return self._reply(302, {**headers, "Location": location})
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return self._reply(200, {"X-Repo-Commit": commit, "ETag": f'"{git}"'}, data)

    def _cdn(self):
        state, path = self.state, urlsplit(self.path).path
        if path.startswith("/lfs/"):
            _, _, a, b, commit, filename = path.split("/", 5)
            data, etag = state.commits[f"{a}/{b}", commit][filename], '"cdn"'
            data = b"X" * len(data) if state.damage else data
        elif path in state.plain:
            data, etag = state.plain[path]
        else:
            return self._reply(404, {})
        start, status = 0, 200
        wanted = self.headers.get("Range") if state.ranges else None
        if wanted and self.headers.get("If-Range", etag) == etag:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(data):
                return self._reply(416, {"Content-Range": f"bytes */{len(data)}"})
        cut = state.cuts.pop(0) if state.cuts and self.command == "GET" else None
        body = data[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            state.slowly.wait(30)
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
        return None


@pytest.fixture
def server(monkeypatch, tmp_path):
    state = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", state.address("hub"))
    for name in ("AMRADIO_CACHE", "AMRADIO_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    huggingface_hub.close_session()
    state.put({FILE: BODY, "config.json": b"{}"})
    yield state
    huggingface_hub.close_session()
    state.close()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def parts(root):
    return sorted((root / "amradio" / "partial").glob("*.part"))


def records(root):
    return sorted((root / "amradio" / "trust").glob("*.json"))


def full_text(error):
    return "".join(traceback.format_exception(error))


# --- the first use, and later ones ---------------------------------------------------------------------------------


def test_official_url_is_fetched_once_and_recorded(server, root):
    first = fetch_url(URL, cache_dir=root, progress=False)
    assert first.path.read_bytes() == BODY
    assert first.path.name == FILE
    assert (first.sha256, first.size, first.revision) == (sha256(BODY), len(BODY), C1)
    assert first.source == f"{server.address('hub')}/{REPO}/resolve/{C1}/{FILE}"
    assert not first.from_cache
    [record] = records(root)
    known = json.loads(record.read_text())
    assert (known["sha256"], known["commit"], known["digest_from"]) == (sha256(BODY), C1, "hub")
    assert parts(root) == []

    asked = len(server.requests)
    again = fetch_url(URL, cache_dir=root, progress=False)
    assert again.from_cache
    assert (again.path, again.sha256, again.revision) == (first.path, first.sha256, C1)
    assert len(server.requests) == asked  # nobody is asked again


def test_small_files_are_recorded_with_our_own_digest(server, root):
    fetched = fetch_hub_file(REPO, "config.json", cache_dir=root, progress=False)
    assert fetched.sha256 == sha256(b"{}")
    assert json.loads(records(root)[0].read_text())["digest_from"] == "computed"


def test_cache_has_the_layout_of_the_hub(server, root):
    fetched = fetch_url(URL, cache_dir=root, progress=False)
    assert huggingface_hub.try_to_load_from_cache(REPO, FILE, cache_dir=root) == str(fetched.path)
    assert fetched.path.parent == root / "models--nvidia--RADIO" / "snapshots" / C1
    assert (root / "models--nvidia--RADIO" / "refs" / "main").read_text() == C1
    assert fetched.path.resolve().name == sha256(BODY)


def test_without_links_the_file_itself_lies_in_the_snapshot(server, root, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("A required privilege is not held by the client")  # what Windows says

    monkeypatch.setattr(Path, "symlink_to", refuse)
    fetched = fetch_url(URL, cache_dir=root, progress=False)
    assert not fetched.path.is_symlink()
    assert fetched.path.read_bytes() == BODY
    assert list((root / "models--nvidia--RADIO" / "blobs").iterdir()) == []
    assert fetch_url(URL, cache_dir=root, progress=False).from_cache


def test_a_cache_filled_by_the_hub_library_is_used_and_checked(server, root, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.hf_hub_download(REPO, FILE, cache_dir=root, endpoint=server.address("hub"), token=False)
    bodies = len(server.bodies())
    fetched = fetch_hub_file(REPO, FILE, cache_dir=root, progress=False)
    assert fetched.from_cache
    assert len(server.bodies()) == bodies
    records(root)[0].unlink()
    assert fetch_hub_file(REPO, FILE, cache_dir=root, local_files_only=True).sha256 == sha256(BODY)
    records(root)[0].unlink()
    fetched.path.resolve().write_bytes(BODY[:-1])
    with pytest.raises(IntegrityError, match=f"but {sha256(BODY)} was announced by the hub"):
        fetch_hub_file(REPO, FILE, cache_dir=root, local_files_only=True)


def test_renamed_repository_is_followed(server, root):
    fetched = fetch_hub_file("moved/RADIO", FILE, cache_dir=root, progress=False, token=TOKEN)
    assert fetched.path.read_bytes() == BODY


def test_default_cache(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    assert fetch_url(URL, progress=False).path.is_relative_to(tmp_path / "hf")
    monkeypatch.setenv("AMRADIO_CACHE", str(tmp_path / "own"))
    assert fetch_url(URL, progress=False).path.is_relative_to(tmp_path / "own")
    assert fetch_url(URL, progress=False, cache_dir=tmp_path / "given").path.is_relative_to(tmp_path / "given")


def test_verified_files_are_not_hashed_again(server, root, monkeypatch):
    path = fetch_url(URL, cache_dir=root, progress=False).path
    hashed = []
    monkeypatch.setattr("amradio.weights.download.sha256_of", lambda p: hashed.append(p) or sha256(p.read_bytes()))
    fetch_url(URL, cache_dir=root)
    assert hashed == []
    os.utime(path, ns=(1, 1))
    fetch_url(URL, cache_dir=root)
    fetch_url(URL, cache_dir=root)
    assert hashed == [path]  # once, then the new modification time is known


# --- integrity ------------------------------------------------------------------------------------------------------


def test_damaged_cached_file_is_refused(server, root):
    fetched = fetch_url(URL, cache_dir=root, progress=False)
    damaged = BODY[:-1] + b"!"
    fetched.path.resolve().write_bytes(damaged)
    os.utime(fetched.path, ns=(5, 5))
    first_use = json.loads(records(root)[0].read_text())["first_use"]
    with pytest.raises(IntegrityError) as e:
        fetch_url(URL, cache_dir=root, progress=False)
    assert str(e.value) == (
        f"{fetched.source} is not what it should be: sha256 {sha256(damaged)} (in the cache at {fetched.path}), "
        f"but {sha256(BODY)} was recorded at its first use ({first_use}). "
        f"Delete {fetched.path.resolve()} and run again to fetch it anew."
    )
    fetched.path.resolve().unlink()
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY  # the advice works


def test_content_that_is_not_what_the_hub_announced(server, root):
    server.damage = True
    with pytest.raises(IntegrityError) as e:
        fetch_url(URL, cache_dir=root, progress=False)
    assert sha256(b"X" * len(BODY)) in str(e.value)
    assert f"but {sha256(BODY)} was announced by the hub. The transfer was damaged." in str(e.value)
    assert parts(root) == records(root) == []
    assert not list(root.glob("models--*/snapshots/*/*"))


def test_digest_given_by_the_caller(server, root):
    right, wrong = sha256(BODY), "0" * 64
    with pytest.raises(IntegrityError, match=f"but {wrong} was asked for"):
        fetch_url(URL, cache_dir=root, progress=False, sha256=wrong)
    assert server.bodies() == []  # the hub's announcement was enough to refuse
    assert fetch_url(URL, cache_dir=root, progress=False, sha256=right.upper()).sha256 == right
    with pytest.raises(IntegrityError, match=f"but {wrong} was asked for"):
        fetch_url(URL, cache_dir=root, progress=False, sha256=wrong)


def test_a_moved_branch_does_not_change_what_the_name_means(server, root):
    first = fetch_url(URL, cache_dir=root, progress=False)
    server.put({FILE: b"new weights"}, commit=C2)
    assert fetch_url(URL, cache_dir=root, progress=False).sha256 == first.sha256
    first.path.resolve().unlink()  # someone emptied the cache: the recorded commit is fetched
    again = fetch_url(URL, cache_dir=root, progress=False)
    assert (again.sha256, again.revision) == (first.sha256, C1)
    assert fetch_url(URL, cache_dir=root, progress=False, revision=C2).path.read_bytes() == b"new weights"


def test_content_changed_upstream_after_the_first_use(server, root):
    first = fetch_url(URL, cache_dir=root, progress=False)
    first.path.resolve().unlink()
    del server.commits[REPO, C1]  # history rewritten
    server.put({FILE: b"new weights"}, commit=C2)
    bodies = len(server.bodies())
    with pytest.raises(IntegrityError) as e:
        fetch_url(URL, cache_dir=root, progress=False)
    [record] = records(root)
    assert f"sha256 {sha256(b'new weights')} (announced by {server.address('hub')})" in str(e.value)
    assert f"but {first.sha256} was recorded at its first use" in str(e.value)
    assert f"If you know that the change is right, delete the record {record} and run again" in str(e.value)
    assert len(server.bodies()) == bodies
    record.unlink()
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == b"new weights"


def test_rewritten_history_with_the_same_content_is_fine(server, root):
    first = fetch_url(URL, cache_dir=root, progress=False)
    first.path.resolve().unlink()
    del server.commits[REPO, C1]
    server.put({FILE: BODY}, commit=C2)
    again = fetch_url(URL, cache_dir=root, progress=False)
    assert (again.sha256, again.revision) == (first.sha256, C2)
    assert fetch_url(URL, cache_dir=root, local_files_only=True).path == again.path


def test_small_file_changed_upstream_is_found_by_our_own_digest(server, root):
    path = fetch_hub_file(REPO, "config.json", cache_dir=root, progress=False).path
    path.resolve().unlink()
    server.put({"config.json": b'{"changed": 1}'})
    with pytest.raises(IntegrityError, match="It was changed upstream, or the connection is not to be trusted"):
        fetch_hub_file(REPO, "config.json", cache_dir=root, progress=False)


def test_damaged_record_is_not_taken_for_a_first_use(server, root):
    fetch_url(URL, cache_dir=root, progress=False)
    [record] = records(root)
    record.write_text("{")
    with pytest.raises(IntegrityError, match=r"The trust record .* cannot be read"):
        fetch_url(URL, cache_dir=root, progress=False)


def test_unwritable_record_is_logged(server, root, monkeypatch, caplog):
    def refuse(path, text):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("amradio.weights.trust.write_atomically", refuse)
    with caplog.at_level(logging.WARNING, "amradio"):
        assert fetch_url(URL, cache_dir=root, progress=False).sha256 == sha256(BODY)
    assert "cannot be written" in caplog.text


# --- resuming --------------------------------------------------------------------------------------------------------


def test_cut_connection_is_resumed_within_a_call(server, root):
    server.cuts = [100_000, 50_000]
    fetched = fetch_url(URL, cache_dir=root, progress=False)
    assert fetched.path.read_bytes() == BODY
    ranges = [r[3].get("range") for r in server.bodies()]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_download_is_resumed_by_a_later_call(server, root, monkeypatch):
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    server.cuts = [123_456]
    with pytest.raises(DownloadError, match="what has been fetched is kept and the next try continues from it"):
        fetch_url(URL, cache_dir=root, progress=False)
    assert [p.stat().st_size for p in parts(root)] == [123_456]
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert server.bodies()[-1][3]["range"] == "bytes=123456-"
    assert parts(root) == []


def test_complete_part_needs_no_further_request(server, root, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_url(URL, cache_dir=root, progress=False)
    bodies = len(server.bodies())
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert len(server.bodies()) == bodies


def test_damaged_part_is_thrown_away_and_fetched_afresh(server, root, monkeypatch):
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    server.cuts = [1000]
    with pytest.raises(DownloadError):
        fetch_url(URL, cache_dir=root, progress=False)
    parts(root)[0].write_bytes(b"?" * 1000)
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY


def test_server_without_ranges_starts_over(server, root):
    server.ranges, server.cuts = False, [1000]
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert len(server.bodies()) == 2


@pytest.fixture
def half_a_file(server, root, plain, monkeypatch):
    """A partial file from an earlier run, of an address outside the hub."""
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "ATTEMPTS", 1)
        server.cuts = [1000]
        with pytest.raises(DownloadError):
            fetch_url(plain, cache_dir=root, progress=False)
    return parts(root)[0]


def test_part_longer_than_the_content_is_thrown_away(server, root, plain, half_a_file):
    half_a_file.write_bytes(b"?" * (len(BODY) + 1))  # the server answers 416
    assert fetch_url(plain, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert [r[3].get("range") for r in server.bodies()] == [None, f"bytes={len(BODY) + 1}-", None]


@pytest.mark.parametrize(
    "headers", [{"Content-Range": "bytes 0-9/10"}, {"Content-Range": "bytes 1000-9/10", "Content-Encoding": "gzip"}, {}]
)
def test_another_range_than_asked_for_is_not_appended(server, root, plain, half_a_file, headers):
    server.statuses = [("cdn", "GET", 206, headers)]
    assert fetch_url(plain, cache_dir=root, progress=False).path.read_bytes() == BODY


def test_size_that_is_not_the_announced_one(server, root):
    server.statuses = [("cdn", "GET", 200, {"Content-Length": "0"})]
    with pytest.raises(DownloadError, match=f"should have {len(BODY)} bytes, but the server sends 0"):
        fetch_url(URL, cache_dir=root, progress=False)


def test_redirect_from_https_to_http_is_refused(server, tmp_path, monkeypatch):
    server.plain["/a.bin"] = (BODY, None)
    real = huggingface_hub.utils.get_session()

    class Downgraded:  # a TLS server is more than this needs: what counts is where the answer came from
        def stream(self, method, url, **kwargs):
            return real.stream(method, url.replace("https://", "http://"), **kwargs)

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Downgraded)
    url = server.address("cdn").replace("http://", "https://") + "/a.bin"
    with pytest.raises(DownloadError, match="redirects from https to unencrypted http; refused"):
        fetch_url(url, cache_dir=tmp_path, progress=False)


def test_other_write_errors(server, root, monkeypatch):
    class BadDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(transfer, "_open_at", lambda part, start: BadDisk(part, "wb"))
    with pytest.raises(DownloadError, match=r"\.part cannot be written: Input/output error\."):
        fetch_url(URL, cache_dir=root, progress=False)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 400_000), max_size=6))
def test_any_sequence_of_cuts_gives_the_right_content(tmp_path_factory, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BACKOFF_S", 0.0)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        state = FakeHub()
        try:
            state.plain["/a.bin"] = (BODY, '"v1"')
            state.cuts = list(cuts)
            part = tmp_path_factory.mktemp("any") / "a.part"
            transfer.transfer(transfer.Source(url=state.address("cdn") + "/a.bin", name="a"), part, progress=False)
            assert part.read_bytes() == BODY
        finally:
            huggingface_hub.close_session()
            state.close()


# --- retries ---------------------------------------------------------------------------------------------------------


def test_transient_answers_are_tried_again(server, root):
    server.statuses = [
        ("hub", "HEAD", 503, {}),
        ("hub", "HEAD", 429, {"Retry-After": "0"}),
        ("cdn", "GET", 500, {}),
        ("cdn", "GET", 504, {}),
    ]
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert server.statuses == []


def test_giving_up_says_what_and_what_to_do(server, root):
    server.statuses = [("hub", "HEAD", 502, {})] * 9
    with pytest.raises(DownloadError) as e:
        fetch_url(URL, cache_dir=root, progress=False)
    assert str(e.value) == (
        f"Asking {server.address('hub')} about {REPO} failed 5 times in a row: the hub answered 502. Check the "
        "connection and, if there is one, the proxy (HTTPS_PROXY, HTTP_PROXY, NO_PROXY); what has been fetched is kept "
        "and the next try continues from it. A file fetched by other means can be given by its path."
    )


def test_unreachable_server(server, root, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(DownloadError, match="failed 5 times in a row: ConnectError"):
        fetch_url(URL, cache_dir=root, progress=False)


def test_something_that_is_not_a_hub(server, root):
    server.statuses = [("hub", "HEAD", 200, {})]
    with pytest.raises(DownloadError, match="does not answer like a Hugging Face hub: commit None, entity tag None"):
        fetch_url(URL, cache_dir=root, progress=False)


@pytest.mark.parametrize("etag", ['"../../outside"', '"a/b"', '""'])
def test_entity_tag_that_is_no_file_name_is_refused(server, root, etag):
    server.statuses = [("hub", "HEAD", 200, {"X-Repo-Commit": C1, "ETag": etag})]
    with pytest.raises(DownloadError, match="does not answer like a Hugging Face hub"):
        fetch_url(URL, cache_dir=root, progress=False)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, ""), (401, "RepoNotFound")])
def test_gated_repository(server, root, gate):
    server.gate = gate
    with pytest.raises(GatedRepoError) as e:
        fetch_url(URL, cache_dir=root, progress=False)
    assert str(e.value) == (
        f"nvidia/RADIO refuses 'radio_v9.pth.tar' (HTTP {gate[0]}): no token was sent. The repository is gated, "
        "private or does not exist.\n"
        f"  1. Open {server.address('hub')}/nvidia/RADIO in a browser, log in and, if it asks, accept its conditions.\n"
        f"  2. Make a token with read access at {server.address('hub')}/settings/tokens.\n"
        "  3. Run 'hf auth login', set HF_TOKEN, or pass token=.\n"
        "A file fetched in the browser can be given by its path instead."
    )
    with pytest.raises(GatedRepoError, match="a token was sent, but it does not give access"):
        fetch_url(URL, cache_dir=root, progress=False, token="hf_wrong")
    assert fetch_url(URL, cache_dir=root, progress=False, token=TOKEN).path.read_bytes() == BODY


def test_token_of_the_machine(server, root, monkeypatch):
    server.gate = (401, "GatedRepo")
    with pytest.raises(OptionError, match="token=True needs a saved token"):
        fetch_url(URL, cache_dir=root, progress=False, token=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(GatedRepoError):
        fetch_url(URL, cache_dir=root, progress=False, token=False)
    assert fetch_url(URL, cache_dir=root, progress=False).sha256 == sha256(BODY)


def test_missing_file_revision_repository(server, root):
    with pytest.raises(hub.FileNotInRepoError) as e:
        fetch_hub_file(REPO, "nothing.bin", cache_dir=root, progress=False)
    assert str(e.value) == "nvidia/RADIO at revision 'main' has no file 'nothing.bin' (HTTP 404). Check the name."
    with pytest.raises(
        DownloadError, match=r"nvidia/RADIO has no revision 'v7' \(HTTP 404\), so 'radio_v9.pth.tar' cannot"
    ):
        fetch_hub_file(REPO, FILE, revision="v7", cache_dir=root, progress=False)
    with pytest.raises(DownloadError, match=r"no repository no/body at revision 'main' with a file 'radio_v9.pth.tar'"):
        fetch_hub_file("no/body", FILE, cache_dir=root, progress=False)
    assert not list(root.rglob("*.part"))


def test_token_goes_to_the_hub_only_and_is_never_shown(server, root, monkeypatch, caplog, capfd):
    monkeypatch.setattr(transfer, "ATTEMPTS", 2)
    server.cuts = [1000]
    with caplog.at_level(logging.DEBUG):
        fetch_url(URL, cache_dir=root, token=TOKEN)
        to_hub = [r[3].get("authorization") for r in server.requests if r[0] == "hub"]
        assert to_hub == [f"Bearer {TOKEN}"] * len(to_hub)
        assert all("authorization" not in r[3] for r in server.requests if r[0] == "cdn")
        assert server.bodies("cdn")
        errors = []
        server.statuses = [("hub", "HEAD", 500, {})] * 2
        for revision in ("v1", "v2"):
            with pytest.raises(DownloadError) as e:
                fetch_url(URL, cache_dir=root, token=TOKEN, revision=revision)
            errors.append(e.value)
        server.gate = (403, "GatedRepo")
        with pytest.raises(GatedRepoError) as e:
            fetch_url(URL, cache_dir=root, token=TOKEN + "x", revision="v3")
        errors.append(e.value)
        server.gate, server.cuts = None, [10, 0, 0, 0]
        with pytest.raises(DownloadError) as e:
            fetch_hub_file(REPO, FILE, cache_dir=root / "other", token=TOKEN)
        errors.append(e.value)
    shown = "".join(map(full_text, errors)) + caplog.text + "".join(capfd.readouterr())
    assert "s3cr3t" not in shown
    kept = b"".join(p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix in (".json", ".validator"))
    assert b"s3cr3t" not in kept
    assert b"signature" not in kept


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.com/a.pth", "is not an http"),
        ("file:///etc/passwd", "is not an http"),
        ("https:///a.pth", "is not an http"),
        ("https://user:s3cr3t@example.com/a.pth?key=s3cr3t", "contains a user name or password"),
    ],
)
def test_addresses_that_are_refused(server, root, url, message):
    with pytest.raises(OptionError, match=message) as e:
        fetch_url(url, cache_dir=root)
    assert "s3cr3t" not in str(e.value)


@pytest.mark.parametrize(
    ("repo", "filename", "revision"),
    [
        (REPO, "../outside", None),
        (REPO, "/etc/passwd", None),
        (REPO, "a\\..\\b", None),
        (REPO, "c:/a", None),
        (REPO, FILE, "../main"),
        ("a/b/c", FILE, None),
        ("../..", FILE, None),
    ],
)
def test_names_that_leave_the_repository_are_refused(server, root, repo, filename, revision):
    with pytest.raises(OptionError, match="is not a"):
        fetch_hub_file(repo, filename, revision=revision, cache_dir=root)
    assert server.requests == []


# --- offline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "AMRADIO_OFFLINE", "HF_HUB_OFFLINE", "constant"])
def test_offline(server, root, monkeypatch, how):
    kwargs = {"cache_dir": root, "progress": False}
    fetched = fetch_hub_file(REPO, "config.json", **kwargs)
    asked = len(server.requests)
    reason = f"{how} is set"
    if how == "argument":
        kwargs["local_files_only"] = True
        reason = "local_files_only=True"
    elif how == "constant":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reason = "huggingface_hub is in offline mode"
    else:
        monkeypatch.setenv(how, "1")
    assert fetch_hub_file(REPO, "config.json", **kwargs).path == fetched.path
    with pytest.raises(OfflineError) as e:
        fetch_url(URL, **kwargs)
    assert str(e.value) == (
        f"'radio_v9.pth.tar' of nvidia/RADIO at revision 'main' is not in the cache, and {reason}. Looked in "
        f"{root / 'models--nvidia--RADIO' / 'snapshots' / 'main'}. Fetch it once with a connection, or give the path "
        "of a file."
    )
    with pytest.raises(OfflineError, match=r"http://example.com/a.bin is not in the cache, and .* Looked for "):
        fetch_url("http://example.com/a.bin?key=1", **kwargs)
    assert len(server.requests) == asked


# --- disk ------------------------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_fetching(server, root, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1234)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError) as e:
        fetch_url(URL, cache_dir=root, progress=False)
    assert str(e.value) == (
        f"nvidia/RADIO/radio_v9.pth.tar needs {len(BODY)} more bytes but {root / 'amradio' / 'partial'} has only 1234 "
        "free. Free some space, or choose another place with cache_dir= or the environment variable AMRADIO_CACHE."
    )
    assert parts(root) == []


def test_disk_that_fills_up_keeps_what_was_fetched(server, root, monkeypatch):
    room = 70_000

    class FullDisk(io.FileIO):
        def write(self, data):
            left = room - self.tell()
            if left <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:left])

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_open_at", lambda part, start: FullDisk(part, "wb"))
        with pytest.raises(DownloadError) as e:
            fetch_url(URL, cache_dir=root, progress=False)
    assert f"The disk is full: {len(BODY) - room} bytes are still needed" in str(e.value)
    assert f"The {room} bytes fetched so far are kept" in str(e.value)
    assert [p.stat().st_size for p in parts(root)] == [room]
    assert fetch_url(URL, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert server.bodies()[-1][3]["range"] == f"bytes={room}-"


def test_cache_directory_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot be made: .* Choose another with cache_dir= or AMRADIO_CACHE"):
        fetch_url(URL, cache_dir=tmp_path / "file" / "cache", progress=False)


def test_cache_that_cannot_be_written(server, root, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "blobs")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        DownloadError, match=r"The cache .* cannot be written: .*Permission denied.* choose another place"
    ):
        fetch_url(URL, cache_dir=root, progress=False)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hub", "plain"])
def test_two_processes_at_once_fetch_one_body(server, root, kind):
    server.plain["/a.bin"] = (BODY, '"v1"')
    url = URL if kind == "hub" else server.address("cdn") + "/a.bin"
    code = (
        "import sys; from amradio.weights.download import fetch_url; "
        "f = fetch_url(sys.argv[1], cache_dir=sys.argv[2], progress=False); print(f.sha256, f.from_cache)"
    )
    env = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server.slowly.clear()
    processes = [
        subprocess.Popen([sys.executable, "-c", code, url, str(root)], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(2)
    ]
    locks = root / "amradio" / "locks"
    try:
        asked_by_both = threading.Event()
        for _ in range(1000):  # until both are past the question and one holds the body
            heads = sum(r[0] == "hub" for r in server.requests)
            if server.bodies() and (kind == "plain" or heads >= 3):
                break
            asked_by_both.wait(0.01)
        assert locks.exists()
        asked_by_both.wait(0.2)
    finally:
        server.slowly.set()
        outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert sorted(outputs) == [f"{sha256(BODY)} False\n", f"{sha256(BODY)} True\n"]
    assert len(server.bodies()) == 1


def test_lock_is_respected(root):
    entered = []
    with cache.locked(root, "a/b:c"):
        thread = threading.Thread(target=lambda: _enter(root, entered))
        thread.start()
        thread.join(0.2)
        assert entered == []
    thread.join(10)
    assert entered == [True]


def _enter(root, entered):
    with cache.locked(root, "a/b:c"):
        entered.append(True)


# --- whole models ----------------------------------------------------------------------------------------------------


def test_model_with_one_file(server, root):
    server.put({"config.json": b"{}", "model.safetensors": BODY, "other.py": b"import os"})
    directory = fetch_hub_model(REPO, cache_dir=root, progress=False)
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert (directory / "model.safetensors").read_bytes() == BODY
    asked = len(server.requests)
    assert fetch_hub_model(REPO, cache_dir=root) == directory
    assert fetch_hub_model(REPO, cache_dir=root, local_files_only=True) == directory
    assert len(server.requests) == asked


def sharded(weight_map):
    shards = {"a-1.safetensors": BODY[:1000], "a-2.safetensors": BODY[1000:]}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {"config.json": b"{}", "model.safetensors.index.json": index, **shards}


def test_sharded_model(server, root):
    server.put(sharded({"x": "a-1.safetensors", "y": "a-2.safetensors", "z": "a-2.safetensors"}))
    directory = fetch_hub_model(REPO, cache_dir=root, progress=False)
    assert sorted(p.name for p in directory.iterdir()) == [
        "a-1.safetensors", "a-2.safetensors", "config.json", "model.safetensors.index.json",
    ]  # fmt: skip
    assert (directory / "a-2.safetensors").read_bytes() == BODY[1000:]
    assert len(server.bodies()) == 2
    assert fetch_hub_model(REPO, cache_dir=root, local_files_only=True) == directory


def test_all_files_of_a_model_are_of_one_commit(server, root):
    server.put({"config.json": b"{}", "model.safetensors": BODY})
    fetch_hub_file(REPO, "config.json", cache_dir=root, progress=False)
    server.put({"config.json": b'{"v": 2}', "model.safetensors": b"other"}, commit=C2)
    directory = fetch_hub_model(REPO, cache_dir=root, progress=False)
    assert directory.name == C1
    assert (directory / "model.safetensors").read_bytes() == BODY
    assert fetch_hub_model(REPO, cache_dir=root, progress=False, revision=C2).name == C2


@pytest.mark.parametrize("name", ["../evil.safetensors", "/a.safetensors", "weights.bin", "a\\b.safetensors", 3])
def test_index_that_names_something_else_is_refused(server, root, name):
    server.put(sharded({"x": name}))
    with pytest.raises(DownloadError, match=r"only '\*.safetensors' beside it are allowed"):
        fetch_hub_model(REPO, cache_dir=root, progress=False)


@pytest.mark.parametrize("index", [b"[]", b"{", b'{"weight_map": 3}', b"{}"])
def test_broken_index(server, root, index):
    server.put({"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(DownloadError, match="is not an index of safetensors shards"):
        fetch_hub_model(REPO, cache_dir=root, progress=False)


def test_model_without_safetensors(server, root):
    server.put({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(
        DownloadError, match=r"neither 'model.safetensors' nor .* Pickled weights \(pytorch_model.bin\)"
    ):
        fetch_hub_model(REPO, cache_dir=root, progress=False)
    with pytest.raises(OfflineError, match=r"'model.safetensors' of nvidia/RADIO"):
        fetch_hub_model(REPO, cache_dir=root, local_files_only=True)


# --- addresses outside the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def plain(server):
    server.plain["/models/radio.pth.tar"] = (BODY, '"v1"')
    return server.address("cdn") + "/models/radio.pth.tar?key=s3cr3t"


def test_plain_url(server, root, plain):
    fetched = fetch_url(plain, cache_dir=root, progress=False)
    assert fetched.path.name == "radio.pth.tar"
    assert fetched.path.read_bytes() == BODY
    assert (fetched.sha256, fetched.revision, fetched.etag) == (sha256(BODY), None, '"v1"')
    assert fetched.source == server.address("cdn") + "/models/radio.pth.tar"
    asked = len(server.requests)
    assert fetch_url(plain, cache_dir=root, local_files_only=True) == fetch_url(plain, cache_dir=root)
    assert len(server.requests) == asked
    assert not any("s3cr3t" in str(p) or (p.is_file() and b"s3cr3t" in p.read_bytes()) for p in root.rglob("*"))


def test_plain_url_is_resumed_only_if_nothing_changed(server, root, plain, monkeypatch):
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    server.cuts = [1000]
    with pytest.raises(DownloadError):
        fetch_url(plain, cache_dir=root, progress=False)
    changed = BODY[::-1]
    server.plain["/models/radio.pth.tar"] = (changed, '"v2"')
    assert fetch_url(plain, cache_dir=root, progress=False).path.read_bytes() == changed
    assert (server.bodies()[-1][3]["range"], server.bodies()[-1][3]["if-range"]) == ("bytes=1000-", '"v1"')


def test_plain_url_with_a_weak_tag_starts_over(server, root, plain, monkeypatch):
    server.plain["/models/radio.pth.tar"] = (BODY, 'W/"v1"')
    server.cuts = [1000]
    assert fetch_url(plain, cache_dir=root, progress=False).path.read_bytes() == BODY
    assert [r[3].get("range") for r in server.bodies()] == [None, None]


def test_plain_url_changed_after_the_first_use(server, root, plain):
    fetched = fetch_url(plain, cache_dir=root, progress=False)
    fetched.path.unlink()
    server.plain["/models/radio.pth.tar"] = (b"other", '"v2"')
    with pytest.raises(IntegrityError, match=rf"{sha256(b'other')} .fetched., but {fetched.sha256} was recorded"):
        fetch_url(plain, cache_dir=root, progress=False)
    assert not fetched.path.exists()
    records(root)[0].unlink()
    assert fetch_url(plain, cache_dir=root, progress=False).path.read_bytes() == b"other"


def test_plain_url_wrong_digest(server, root, plain):
    with pytest.raises(IntegrityError, match=f"but {'0' * 64} was asked for"):
        fetch_url(plain, cache_dir=root, progress=False, sha256="0" * 64)
    assert parts(root) == records(root) == []


@pytest.mark.parametrize(("status", "hint"), [(404, ""), (401, " It wants a login."), (403, " It wants a login.")])
def test_plain_url_refused(server, root, plain, status, hint):
    server.statuses = [("cdn", "GET", status, {})]
    with pytest.raises(DownloadError) as e:
        fetch_url(plain, cache_dir=root, progress=False)
    where = server.address("cdn") + "/models/radio.pth.tar"
    assert str(e.value) == f"Fetching radio.pth.tar failed: {where} answered {status}.{hint}"


def test_hub_options_do_not_apply_elsewhere(server, root, plain, monkeypatch):
    for options in ({"token": TOKEN}, {"token": True}, {"revision": "main"}):
        with pytest.raises(OptionError, match="are for the Hugging Face hub"):
            fetch_url(plain, cache_dir=root, progress=False, **options)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch_url(plain, cache_dir=root, progress=False)
    assert "authorization" not in server.requests[-1][3]


def test_endless_redirects(server, root, plain):
    server.statuses = [("cdn", "GET", 302, {"Location": plain})] * 50
    with pytest.raises(DownloadError, match="TooManyRedirects"):
        fetch_url(plain, cache_dir=root, progress=False)


def test_proxy_of_the_environment_is_used(server, root, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.address("cdn"))
    huggingface_hub.close_session()
    server.plain["/through/proxy.bin"] = (BODY, '"v1"')
    fetched = fetch_url("http://weights.invalid/through/proxy.bin", cache_dir=root, progress=False)
    assert fetched.path.read_bytes() == BODY
    assert server.requests[-1][2] == "http://weights.invalid/through/proxy.bin"


# --- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (URL, (REPO, FILE, "main")),
        (f"https://hf.co/{REPO}/blob/v1/sub/a%20b.bin", (REPO, "sub/a b.bin", "v1")),
        ("https://huggingface.co/nvidia/RADIO/resolve/refs%2Fpr%2F1/a.bin", (REPO, "a.bin", "refs/pr/1")),
        ("https://huggingface.co/datasets/a/b/resolve/main/c.bin", None),
        ("https://huggingface.co/nvidia/RADIO", None),
        ("https://huggingface.co.evil.com/nvidia/RADIO/resolve/main/a.bin", None),
        ("https://example.com/nvidia/RADIO/resolve/main/a.bin", None),
    ],
)
def test_parse_url(url, expected):
    file = hub.parse_url(url)
    assert (file and (file.repo, file.filename, file.revision)) == expected


@given(st.text(min_size=1), st.text(min_size=1))
def test_safe_names_are_legal_and_distinct(a, b):
    name = safe_name(a)
    assert len(name) <= 93
    assert not set(name) & set('/\\:*?"<>| ')
    assert name.isascii()
    assert (name == safe_name(b)) == (a == b)


def test_progress_bar_is_optional(server, root, capfd):
    fetch_url(URL, cache_dir=root, progress=False)
    assert capfd.readouterr().err == ""
    fetch_url(URL, cache_dir=root / "b", progress=True)
    assert "nvidia/RADIO/radio_v9.pth.tar" in capfd.readouterr().err
