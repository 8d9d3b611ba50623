from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.app.limits import Limits
from amradio.app.model import AppModel, load_app_model
from amradio.app.sessions import Sessions
from amradio.app.visit import House, Visit
from amradio.backbones.load import load
from amradio.images.scenes import scene

LIMITS = Limits(photos=6, file_bytes=2**20, file_pixels=4_000_000, sessions=3, queue=16)


@pytest.fixture(scope="session")
def model() -> AppModel:
    """The model of the package, with all that it can do."""
    return load_app_model("amradio-tiny", lambda n, a: load(n, a).requires_grad_(False), None, torch.device("cpu"))


@pytest.fixture
def house(model: AppModel) -> House:
    return House(model, Sessions(LIMITS, on_drop=model.cache.drop), LIMITS)


class Asked(Visit):
    """A visit that remembers what the page would have shown."""

    notices: list[str]
    progress: list[tuple[float, str]]


@pytest.fixture
def visit(house: House, request: pytest.FixtureRequest) -> Callable[..., Asked]:
    """Make a visit of the page of this test, with the fields of an event."""
    name = f"session-of-{request.node.name}"

    def make(**event: Any) -> Asked:
        notices: list[str] = []
        progress: list[tuple[float, str]] = []
        made = Asked(house, house.sessions.get(name), event, lambda s, w: progress.append((s, w)), notices.append)
        object.__setattr__(made, "notices", notices)
        object.__setattr__(made, "progress", progress)
        return made

    return make


@pytest.fixture
def with_photos(visit: Callable[..., Asked]) -> Callable[..., Asked]:
    """The same, with three photos there: two of discs, one of a cross, one of them upright."""
    session = visit().session
    for i, (shape, size) in enumerate([(0, (160, 160)), (0, (120, 160)), (3, (160, 112))]):
        session.add(f"scene-{i}.png", scene(shape, seed=i, side=160)[0].resize((size[1], size[0])))
    return visit


def png(size: tuple[int, int] = (48, 32), seed: int = 0) -> bytes:
    """A PNG file of (width, height) with noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return png


@pytest.fixture(scope="session")
def bomb() -> bytes:
    """A file of some 100 KB that becomes 900 megapixels."""
    data = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="session")
def sample_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real photos as files: those of scikit-image, made small."""
    skimage = pytest.importorskip("skimage.data", reason="the photos of scikit-image are not installed")
    folder = tmp_path_factory.mktemp("samples")
    paths = []
    for name in ("cat", "coffee", "astronaut", "rocket"):
        path = folder / f"{name}.jpg"
        photo = Image.fromarray(getattr(skimage, name)())
        photo.thumbnail((320, 320))
        photo.save(path, quality=90)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def collection(model: AppModel, sample_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The sample photos as a collection."""
    from amradio.app.collection import open_collection

    cache = tmp_path_factory.mktemp("cache")
    small = load("amradio-tiny", ["minilm"]).requires_grad_(False)
    found, said = open_collection(str(sample_files[0].parent), "amradio-tiny", small, torch.device("cpu"), cache)
    assert list(said) == []
    return found


@pytest.fixture(scope="session")
def server(model: AppModel, collection: Any) -> Iterator[tuple[str, House, Path]]:
    """The app as it runs: its address, what it shares, and its folder of uploads."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'amradio[app]'")
    from amradio.app.server import running

    house = House(model, Sessions(LIMITS, on_drop=model.cache.drop), LIMITS, collection)
    with contextlib.ExitStack() as stack:
        with _what_gradio_leaves_open():
            address = stack.enter_context(running(house, port=0))
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        yield address, house, folder
        with _what_gradio_leaves_open():
            stack.close()
        assert not folder.exists()


@contextlib.contextmanager
def _what_gradio_leaves_open() -> Iterator[None]:
    """Gradio makes event loops that it never closes; they are collected here, and not in the middle of a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()


@pytest.fixture
def leftovers() -> Any:
    """See `_what_gradio_leaves_open`."""
    return _what_gradio_leaves_open


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("AMRADIO_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium: `apt-get install chromium`, or say where it is in AMRADIO_CHROMIUM")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()
