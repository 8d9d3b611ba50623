"""``amradio app``."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from amradio.cli.common import DEFAULT_MODEL, BackboneOptions, check_counts, device_of, progress_bar, split_names

if TYPE_CHECKING:
    from amradio.app.collection import Collection
    from amradio.app.model import AppModel


@dataclass(frozen=True, kw_only=True)
class App(BackboneOptions):
    """Open a page in the browser: drop photos, and see feature maps, what looks alike, words, segments, neighbours.

    Everything runs on this machine, and nobody else can reach it. Needs `pip install 'amradio[app]'`.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = DEFAULT_MODEL
    """Backbone: version key, repository, path, timm:NAME, hf:REPO, ...; amradio-tiny comes with the package."""
    adaptors: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-a"])] = ()
    """Adaptor to offer besides the backbone, instead of all. Repeat the option, or separate names by commas."""
    collection: str | None = None
    """Pictures to search in: folder, pattern, list file, tar shards, ... They are embedded once."""
    collection_cache: Path | None = None
    """Where the embeddings of the collection are kept; default in the cache folder."""
    collection_resolution: int = 448
    """Longest side in pixels at which the model sees the pictures of the collection."""
    host: str = "127.0.0.1"
    """Address to listen at. With 0.0.0.0 everybody on the network can use the app."""
    port: int = 7860
    """Port to listen at; 0 takes any that is free."""
    no_browser: bool = False
    """Do not open the page in a browser."""

    def run(self) -> int:
        """Serve the page until it is interrupted; returns the exit code."""
        from amradio.app.limits import Limits
        from amradio.app.server import is_loopback, running
        from amradio.app.sessions import Sessions
        from amradio.app.visit import House
        from amradio.app.wiring import import_gradio

        import_gradio()
        limits = Limits()
        model = self._model(limits.cache_bytes)
        collection = None if self.collection is None else self._collection(self.collection, model)
        house = House(model, Sessions(limits, on_drop=model.cache.drop), limits, collection)
        if not is_loopback(self.host):
            print(f"note: everybody who can reach this machine on the network can use the app ({self.host})")
        with ExitStack() as stack:
            address = stack.enter_context(running(house, self.host, self.port))
            print(f"amradio app is at {address} - stop it with Ctrl+C", flush=True)
            if not self.no_browser:
                _open(address)
            _until_interrupted()
        print("\nstopped")
        return 0

    def _model(self, cache_bytes: int) -> AppModel:
        from amradio.app.model import load_app_model

        device = device_of(self.device)
        return load_app_model(
            self.model,
            lambda name, adaptors: self.load_model(name, adaptors, device, progress=True),
            split_names(self.adaptors) or None,
            device,
            cache_bytes,
        )

    def _collection(self, spec: str, model: AppModel) -> Collection:
        from amradio.app.collection import open_collection
        from amradio.hub import cache_root

        text = model.text_output
        adaptors = [text] if text not in (None, "backbone") else []
        device = device_of(self.device)
        small: Any = self.load_model(self.model, adaptors, device, progress=False)  # no output more than is searched
        folder = self.collection_cache or cache_root(self.cache_dir) / "amradio" / "collections"
        with ExitStack() as stack:

            def start(count: int, place: str) -> Any:
                print(f"{count:,} pictures of {spec}; their embeddings are kept in {place}")
                return stack.enter_context(progress_bar(count, "embed"))

            check_counts(collection_resolution=self.collection_resolution)
            collection, said = open_collection(
                spec, self.model, small, device, folder, resolution=self.collection_resolution, on_start=start
            )
        for sentence in said:
            print(f"note: {sentence}")
        return collection


def _open(address: str) -> None:
    """Open the page, in a thread: some browsers keep their caller waiting."""
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def _until_interrupted() -> None:
    """Wait for Ctrl+C, or to be told to end, so that what is on the disk can be removed."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    try:
        while not over.wait(1.0):  # without a limit, Windows would not notice Ctrl+C
            pass
    except KeyboardInterrupt:
        return
