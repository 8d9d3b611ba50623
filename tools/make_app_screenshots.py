"""Take the pictures of the app that the documentation shows: docs/assets/app-*.jpg.

Needs `pip install 'amradio[app,demo]' scikit-learn playwright` and a Chromium (AMRADIO_CHROMIUM says where, if it is
not on PATH). The photos are those of `PHOTOS`, whose terms are known.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

from amradio.app.limits import Limits
from amradio.app.model import load_app_model
from amradio.app.server import running
from amradio.app.sessions import Sessions
from amradio.app.visit import House
from amradio.backbones.load import load

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
WIDTH, HIGHEST, MOST_BYTES = 1180, 1500, 200_000
WAIT_MS = 120_000
PHOTOS = {
    # Name on the page: package and file. Whose they are, and under which terms, is in the table of docs/how-to/app.md.
    "cat.png": ("skimage", "data/chelsea.png"),
    "coffee.png": ("skimage", "data/coffee.png"),
    "astronaut.png": ("skimage", "data/astronaut.png"),
    "rocket.jpg": ("skimage", "data/rocket.jpg"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg"),
    "cat-mirrored.png": ("skimage", "data/chelsea.png"),
}
CLOSER = (120, 20, 420, 270)  # left, top, right, bottom of the mirrored cat


def main() -> None:
    """Open the app, do what a person would do, and take pictures."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", type=Path, default=ASSETS)
    folder: Path = arguments.parse_args().output
    model = load_app_model("amradio-tiny", lambda n, a: load(n, a).requires_grad_(False), None, torch.device("cpu"))
    house = House(model, Sessions(Limits(), on_drop=model.cache.drop), Limits())
    with running(house, port=0) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for scheme, wanted in (("light", ("features", "similarity", "segment", "search")), ("dark", ("words",))):
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(WAIT_MS)
            page.goto(address)
            page.set_input_files("#drop input[type=file]", photos())
            page.wait_for_selector("#features-grid .layer")
            for name in wanted:
                page.get_by_role("tab", name=name.capitalize()).click()
                time.sleep(1)  # until what is on it listens
                STEPS[name](page)
                page.mouse.move(5, 5)
                time.sleep(1.5)
                save(page.screenshot(full_page=True), folder / f"app-{name}.jpg")
            page.close()
        browser.close()


def chromium() -> str | None:
    """Where Chromium is; None: where Playwright keeps its own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("AMRADIO_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def photos() -> list[Any]:
    """The photos, as a browser takes them: names and contents."""
    found = []
    for name, (package, file) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package} is not installed, which has {file}.")
        picture = Image.open(Path(spec.submodule_search_locations[0], file)).convert("RGB")
        if "mirrored" in name:
            picture = ImageOps.mirror(picture).crop(CLOSER)
        data = io.BytesIO()
        picture.save(data, "PNG")
        found.append({"name": name, "mimeType": "image/png", "buffer": data.getvalue()})
    return found


def features(page: Page) -> None:
    """Nothing to do: they are shown by themselves."""
    page.wait_for_selector("#features-grid .layer")


def similarity(page: Page) -> None:
    """Click on an eye of the cat."""
    photo = page.locator("#similarity-grid [data-click]").first
    box = measured(photo)
    photo.click(position={"x": box["width"] * 0.39, "y": box["height"] * 0.36})
    page.wait_for_selector("#similarity-grid .layer")


def words(page: Page) -> None:
    """Ask where the cat is."""
    page.wait_for_selector("#bars .words")
    page.locator("#bars .bar[data-word=cat]").first.click()
    page.wait_for_selector("#where-grid .layer")


def segment(page: Page) -> None:
    """Paint over the cat, and over the sofa around it."""
    page.wait_for_selector("#board canvas.ink")
    stroke(page, "#board canvas.ink", (0.35, 0.3), (0.5, 0.5), (0.6, 0.75))
    page.wait_for_selector("#segments .layer")
    page.click("#board [data-label='0']")
    stroke(page, "#board canvas.ink", (0.05, 0.1), (0.06, 0.6))
    stroke(page, "#board canvas.ink", (0.9, 0.08), (0.96, 0.4))
    page.wait_for_selector("#segments .hint", state="detached")  # it asks for background
    time.sleep(10)


def search(page: Page) -> None:
    """Look for an eye of the cat."""
    page.locator("#source .pick").first.click()
    page.wait_for_selector("#found .card")
    stroke(page, "#source .boxes", (0.32, 0.26), (0.47, 0.46))
    page.wait_for_selector("#found .mark")


def stroke(page: Page, selector: str, *points: tuple[float, float]) -> None:
    """Press, move, release; points are shares of the element."""
    place = page.locator(selector)
    place.scroll_into_view_if_needed()
    box = measured(place)
    steps = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*steps[0])
    page.mouse.down()
    for step in steps[1:]:
        page.mouse.move(*step, steps=6)
    page.mouse.up()


def measured(place: Any) -> dict[str, float]:
    """Where an element is on the page, in pixels."""
    box: dict[str, float] | None = place.bounding_box()
    if box is None:
        raise SystemExit(f"{place} is not on the page.")
    return box


def save(content: bytes, path: Path) -> None:
    """Write a picture as JPEG, as good as fits the size that the documentation allows."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(picture.height, HIGHEST)))
    for quality in range(88, 40, -4):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality, optimize=True)
        if data.tell() <= MOST_BYTES:
            break
    path.write_bytes(data.getvalue())
    print(f"{path} ({picture.width} x {picture.height}, {data.tell() // 1024} KB, quality {quality})")


STEPS = {"features": features, "similarity": similarity, "words": words, "segment": segment, "search": search}

if __name__ == "__main__":
    main()
