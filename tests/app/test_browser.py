"""The page in a real browser: every tab, with photos that are fine, broken, enormous, or too many."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Server = tuple[str, Any, Path]
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LONG_MS = 90_000  # on a loaded machine
_INK = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v).length"


class Page:
    """A page of the app, as a person uses it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.problems: list[str] = []
        page.set_default_timeout(LONG_MS)
        page.on("request", lambda r: self.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        page.on("dialog", lambda d: self.problems.append(f"dialog {d.message}"))
        page.goto(address)
        page.wait_for_selector("#samples")

    def wait(self, selector: str, state: str = "visible") -> Any:
        return self.page.wait_for_selector(selector, state=state)

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def count_becomes(self, selector: str, number: int) -> None:
        until = time.monotonic() + LONG_MS / 1000
        while self.count(selector) != number:
            assert time.monotonic() < until, f"{selector}: {self.count(selector)} and not {number}"
            time.sleep(0.1)

    def tab(self, name: str) -> None:
        tab = self.page.get_by_role("tab", name=name)
        if not tab.is_visible():  # a narrow page has some of them in a menu
            self.page.click(".overflow-menu > button")
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()

    def add(self, files: list[Any]) -> None:
        self.page.set_input_files("#drop input[type=file]", files)

    def drag(self, selector: str, *points: tuple[float, float]) -> None:
        """Press, move, release; points are shares of the element."""
        place = self.page.locator(selector)
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        steps = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*steps[0])
        self.page.mouse.down()
        for step in steps[1:]:
            self.page.mouse.move(*step, steps=4)
        self.page.mouse.up()

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def toasts(self) -> str:
        self.wait(".toast-body")
        return " ".join(self.page.locator(".toast-body").all_inner_texts())


@pytest.fixture
def page(server: Server, browser: Any) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = Page(context.new_page(), server[0])
    yield opened
    context.close()
    assert opened.problems == []
    assert opened.hosts == {server[0].split("/")[2]}


@pytest.fixture
def filled(page: Page, sample_files: list[Path]) -> Page:
    page.add([str(path) for path in sample_files])
    page.count_becomes("#strip .thumb", 4)
    page.count_becomes("#features-grid .layer", 4)
    return page


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG_MS / 1000
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_features(filled: Page, server: Server) -> None:
    first = filled.page.locator("#features-grid .layer").first.get_attribute("src")
    assert "4 of 6" in filled.text("#strip")
    filled.page.click("#layer input")
    filled.page.get_by_role("option", name="layer 1 of 4").click()
    wait_until(lambda: filled.page.locator("#features-grid .layer").first.get_attribute("src") != first)
    with filled.page.expect_download() as found:
        filled.page.click("#download-features")
    archive = zipfile.ZipFile(found.value.path())
    assert found.value.suggested_filename == "amradio-features.zip"
    assert len(archive.namelist()) == 4
    assert Image.open(archive.open(archive.namelist()[0])).format == "PNG"
    filled.page.locator("#features-grid input.blend").fill("30")
    assert filled.page.locator("#features-grid .layer").first.evaluate("n => getComputedStyle(n).opacity") == "0.3"
    filled.page.locator("#strip .thumb").nth(1).hover()
    filled.page.locator("#strip .remove").nth(1).click()
    filled.count_becomes("#strip .thumb", 3)
    filled.count_becomes("#features-grid .layer", 3)
    filled.page.click("#clear")
    filled.count_becomes("#strip .thumb", 0)
    filled.wait("#features-grid .empty")
    assert list(server[2].rglob("*.jpg")) == []  # no upload is left on the disk


def test_the_samples_are_taken(page: Page) -> None:
    page.page.click("#samples")
    page.wait("#features-grid .layer")
    assert page.count("#strip .thumb") >= 4


def test_the_resolution_is_that_of_all_tabs(page: Page, sample_files: list[Path]) -> None:
    """By keys and by a number that is typed, without a pointer; each tab is drawn again when it is seen."""
    page.add([str(path) for path in sample_files[:2]])
    page.count_becomes("#features-grid .layer", 2)
    page.tab("Similarity")
    page.page.locator("#similarity-grid [data-click]").first.click()
    page.count_becomes("#similarity-grid .layer", 2)
    page.tab("Search")
    page.page.get_by_label("my photos").check()
    page.page.locator("#source .pick").nth(1).click()
    page.count_becomes("#found .card", 2)
    shown = {grid: page.page.locator(f"{grid} .grid").inner_html() for grid in ("#similarity-grid", "#found")}
    assert "x 28 patches" in page.page.locator("#features-grid .hint").text_content()
    for _ in range(4):
        page.page.locator("#resolution input[type=range]").press("ArrowLeft")
    wait_until(lambda: page.page.locator("#found .grid").inner_html() != shown["#found"])
    assert page.page.locator("#similarity-grid .grid").inner_html() == shown["#similarity-grid"]  # nobody looks at it
    page.tab("Similarity")
    wait_until(lambda: page.page.locator("#similarity-grid .grid").inner_html() != shown["#similarity-grid"])
    assert page.count("#similarity-grid .mark") == 1
    page.tab("Features")
    wait_until(lambda: "x 20 patches" in page.text("#features-grid .hint"))
    number = page.page.locator("#resolution input[type=number]")
    number.press("Control+a")
    number.press_sequentially("256")
    wait_until(lambda: "x 16 patches" in page.text("#features-grid .hint"))
    page.tab("Similarity")
    before = page.page.locator("#similarity-grid .grid").inner_html()
    page.page.click("#similarity-output input")
    page.page.get_by_role("option", name="minilm").click()
    wait_until(lambda: page.page.locator("#similarity-grid .grid").inner_html() != before)


def test_nothing_is_lost_while_the_model_computes(
    page: Page, server: Server, sample_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drops, one while the other is computed; three clicks, of which the last one counts; another photo chosen."""
    _, house, _ = server
    compute, may_go = house.model.maps, threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        may_go.wait(LONG_MS / 1000)
        return compute(*arguments, **options)

    monkeypatch.setattr(house.model, "maps", slow)
    page.add([str(sample_files[2])])
    page.count_becomes("#strip .thumb", 1)
    page.add([str(sample_files[1]), str(sample_files[0])])
    page.count_becomes("#strip .thumb", 3)
    assert [t.get_attribute("alt") for t in page.page.locator("#strip img").all()] == [
        "astronaut.jpg",
        "coffee.jpg",
        "cat.jpg",
    ]
    page.tab("Segment")
    page.page.locator("#board .pick").nth(1).click()
    page.wait("#board .pick.on[title='coffee.jpg']")
    page.tab("Similarity")
    for i in (0, 2, 1):
        page.page.locator("#similarity-grid [data-click]").nth(i).click()
    wait_until(lambda: any(s.spot is not None and s.spot[0] == 2 for s in house.sessions._sessions.values()))
    may_go.set()
    wait_until(lambda: "clicked here" in page.text("#similarity-grid .card:nth-child(2)"))
    page.count_becomes("#similarity-grid .layer", 3)
    page.tab("Features")
    page.count_becomes("#features-grid .layer", 3)


def test_the_same_photo_twice_in_one_drop(page: Page, picture: Any, server: Server) -> None:
    twin = {"name": "x.png", "mimeType": "image/png", "buffer": picture((64, 48))}
    page.add([twin, dict(twin)])
    page.count_becomes("#strip .thumb", 2)
    page.count_becomes("#features-grid .layer", 2)
    assert page.count("#strip .notes") == 0
    assert list(server[2].rglob("*.png")) == []


def test_a_page_is_told_that_its_photos_are_gone(filled: Page, server: Server) -> None:
    filled.tab("Segment")
    filled.drag("#board canvas.ink", (0.4, 0.4), (0.6, 0.6))
    filled.count_becomes("#segments .layer", 4)
    for name in list(server[1].sessions._sessions):
        server[1].sessions.drop(name)
    filled.tab("Similarity")
    filled.page.locator("#similarity-grid [data-click]").first.click()
    filled.wait("#strip .notes")
    assert "its photos were forgotten. Add them again." in filled.text("#strip")
    assert filled.count("#strip .thumb") == 0
    filled.wait("#similarity-grid .empty")
    filled.tab("Features")
    filled.wait("#features-grid .empty")
    filled.page.click("#samples")
    filled.wait("#features-grid .layer")
    assert filled.count("#strip .notes") == 0
    filled.tab("Segment")
    filled.wait("#board canvas.ink")
    assert not filled.page.locator("#board canvas.ink").evaluate(_INK)
    filled.page.reload()
    filled.wait("#strip .notes")
    assert "Add them again." in filled.text("#strip")
    filled.page.click("#strip .dismiss")
    filled.count_becomes("#strip .notes", 0)


def test_similarity(filled: Page) -> None:
    filled.tab("Similarity")
    filled.wait("#similarity-grid [data-click]")
    assert filled.count("#download-similarity:visible") == 0
    cat = filled.page.locator("#similarity-grid [data-click]").first
    box = cat.bounding_box()
    cat.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.4})
    filled.count_becomes("#similarity-grid .layer", 4)
    mark = filled.page.locator("#similarity-grid .mark")
    assert mark.count() == 1
    place = mark.bounding_box()
    box = filled.page.locator("#similarity-grid [data-click]").first.bounding_box()
    assert (place["x"] + place["width"] / 2 - box["x"]) / box["width"] == pytest.approx(0.4, abs=0.05)
    assert (place["y"] + place["height"] / 2 - box["y"]) / box["height"] == pytest.approx(0.4, abs=0.05)
    filled.page.locator("#similarity-grid [data-click]").nth(2).press("Enter")  # the middle of another one
    wait_until(lambda: filled.text("#similarity-grid .card:nth-child(3)").startswith("clicked here"))


def test_words(filled: Page) -> None:
    filled.tab("Words")
    filled.count_becomes("#bars .words", 4)
    values = [float(v) for v in filled.page.locator("#bars .words:nth-child(1) .value").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    filled.page.fill("#labels textarea", "dog, cat, house")
    filled.page.click("#compare")
    filled.count_becomes("#bars .words:nth-child(1) .bar", 3)
    filled.page.fill("#where input", "dog")
    filled.page.locator("#bars .bar[data-word=cat]").first.click()
    filled.count_becomes("#where-grid .layer", 4)
    assert "Where is “cat”?" in filled.text("#where-grid")
    assert filled.page.input_value("#where input") == "cat"
    with filled.page.expect_download() as found:
        filled.page.click("#download-words")
    assert found.value.suggested_filename == "words.csv"
    assert Path(found.value.path()).read_bytes().startswith(b"photo,dog,cat,house\r\n")
    filled.page.fill("#labels textarea", " , ")
    filled.page.click("#compare")
    assert "Type what could be on the photos" in filled.toasts()


def test_segment(filled: Page, tmp_path: Path) -> None:
    filled.tab("Segment")
    filled.wait("#board canvas.ink")
    filled.drag("#board canvas.ink", (0.4, 0.4), (0.6, 0.6))
    filled.count_becomes("#segments .layer", 4)
    assert "Paint some background too" in filled.text("#segments")
    before = filled.page.locator("#segments .layer").first.get_attribute("src")
    filled.page.click("#board [data-label='0']")
    filled.drag("#board canvas.ink", (0.02, 0.02), (0.98, 0.02))
    wait_until(lambda: "Paint some background" not in filled.text("#segments"))
    assert filled.page.locator("#board canvas.ink").evaluate(_INK) > 1000
    plain = filled.page.locator("#segments .layer").first.get_attribute("src")
    assert plain != before
    filled.page.locator("#fungi input").check()
    wait_until(lambda: filled.page.locator("#segments .layer").first.get_attribute("src") != plain)
    filled.page.click("#forget")
    filled.wait("#segments .empty")
    wait_until(lambda: filled.page.locator("#board canvas.ink").evaluate(_INK) == 0)
    filled.page.locator("#fungi input").uncheck()
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 15:45] = 255
    width, height = Image.open(io.BytesIO(_content(filled))).size
    Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    filled.page.set_input_files("input[type=file][accept*='png']", str(tmp_path / "mask.png"))
    filled.count_becomes("#segments .layer", 4)
    assert "now belongs to cat.jpg" in filled.toasts()


def _content(page: Page) -> bytes:
    import base64

    url = page.page.locator("#board .stage .photo").get_attribute("src")
    return base64.b64decode(url.split(",", 1)[1])


def test_search(filled: Page) -> None:
    filled.tab("Search")
    filled.wait("#source .boxes")
    filled.page.get_by_label("my photos").check()
    filled.page.locator("#source .pick").nth(1).click()
    wait_until(lambda: filled.text("#found").startswith("Most similar first: coffee.jpg"))
    assert filled.text("#found .card .title >> nth=0") == "coffee.jpg"
    filled.drag("#source .boxes", (0.3, 0.2), (0.6, 0.6))
    filled.count_becomes("#found .mark", 4)
    assert filled.page.locator("#source .box").is_visible()
    filled.page.locator("#source .boxes").click(position={"x": 40, "y": 40})  # no box: the whole photo
    filled.count_becomes("#found .mark", 0)
    assert not filled.page.locator("#source .box").is_visible()
    filled.drag("#source .boxes", (0.3, 0.2), (0.6, 0.6))
    filled.count_becomes("#found .mark", 4)
    filled.page.get_by_label("the collection").check()
    wait_until(lambda: filled.count("#found .badge") == 0 and filled.count("#found .mark") == 4)
    filled.page.fill("#wanted input", "cat")
    filled.page.click("#find")
    wait_until(lambda: "“cat”" in filled.text("#found"))
    filled.count_becomes("#found .card", 4)


def test_the_collection_needs_no_photos(page: Page) -> None:
    page.tab("Search")
    page.page.fill("#wanted input", "rocket")
    page.page.press("#wanted input", "Enter")
    page.count_becomes("#found .card", 4)
    assert "The collection has 4 pictures." in page.text("#scope")


def test_broken_and_enormous_files(page: Page, bomb: bytes, picture: Any, server: Server) -> None:
    page.add(
        [
            {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8\xff\xe0" + bytes(100)},
            {"name": "bomb.png", "mimeType": "image/png", "buffer": bomb},
            {"name": "fine.png", "mimeType": "image/png", "buffer": picture((320, 200))},
        ]
    )
    page.count_becomes("#strip .thumb", 1)
    said = page.text("#strip .notes")
    assert "Left out: broken.jpg: the JPEG data is broken" in said
    assert "Left out: bomb.png" in said
    assert str(server[2]) not in said
    page.count_becomes("#features-grid .layer", 1)


def test_a_file_above_the_limit_is_not_sent(page: Page) -> None:
    page.add([{"name": "large.png", "mimeType": "image/png", "buffer": bytes(2 * 2**20)}])
    assert "maximum" in page.toasts()
    assert page.count("#strip .thumb") == 0


def test_twenty_at_once(page: Page, picture: Any) -> None:
    files = [
        {"name": f"photo-{i}.png", "mimeType": "image/png", "buffer": picture((240, 160 + i), seed=i)}
        for i in range(20)
    ]
    page.add(files)
    page.count_becomes("#strip .thumb", 6)
    assert "14 photos were left out: a page holds 6. Remove some first." in page.text("#strip .notes")
    page.count_becomes("#features-grid .layer", 6)


def test_twenty_are_taken_where_they_fit(model: Any, browser: Any, picture: Any, leftovers: Any) -> None:
    """With the limits that the app has."""
    from amradio.app.limits import Limits
    from amradio.app.server import running
    from amradio.app.sessions import Sessions
    from amradio.app.visit import House

    house = House(model, Sessions(Limits(), on_drop=model.cache.drop), Limits())
    names = [f"photo-{i}.png" for i in range(20)]
    with leftovers(), running(house, port=0) as address:
        context = browser.new_context()
        page = Page(context.new_page(), address)
        number = page.page.locator("#resolution input[type=number]")
        number.fill("224")
        page.add(
            [
                {"name": name, "mimeType": "image/png", "buffer": picture((240, 160 + i), seed=i)}
                for i, name in enumerate(names)
            ]
        )
        page.count_becomes("#strip .thumb", 20)
        assert [t.get_attribute("alt") for t in page.page.locator("#strip img").all()] == names
        assert "20 of 24" in page.text("#strip")
        assert page.count("#strip .notes") == 0
        page.count_becomes("#features-grid .layer", 20)
        context.close()
    assert page.problems == []


def test_names_are_only_names(page: Page, picture: Any) -> None:
    name = "<img src=x onerror=alert(1)> {{constructor}} ${alert(1)} `x`.png"
    page.add([{"name": name, "mimeType": "image/png", "buffer": picture((64, 48))}])
    page.count_becomes("#strip .thumb", 1)
    page.count_becomes("#features-grid .layer", 1)
    title = page.text("#features-grid .title")
    assert "alert" in title
    assert page.count("#features-grid img[src=x]") == 0


def test_closing_the_page_forgets_the_photos(server: Server, browser: Any, picture: Any) -> None:
    address, house, folder = server
    before = len(house.sessions)
    context = browser.new_context()
    page = Page(context.new_page(), address)
    page.add([{"name": "a.png", "mimeType": "image/png", "buffer": picture((64, 48))}])
    page.count_becomes("#strip .thumb", 1)
    page.count_becomes("#features-grid .layer", 1)
    assert len(house.sessions) >= 1
    names = set(house.sessions._sessions)
    context.close()
    wait_until(lambda: len(set(house.sessions._sessions) & names) < len(names) or len(house.sessions) <= before)
    assert [p for p in folder.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_dark(server: Server, browser: Any, scheme: str, sample_files: list[Path]) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 780}, color_scheme=scheme, has_touch=True, is_mobile=True
    )
    page = Page(context.new_page(), server[0])
    page.add([str(sample_files[0]), str(sample_files[2])])
    page.count_becomes("#features-grid .layer", 2)
    for name in ("Features", "Similarity", "Words", "Segment", "Search"):
        page.tab(name)
        time.sleep(0.3)
        assert page.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360], name
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(v) for v in background.removeprefix("rgb(").rstrip(")").split(",")]
    assert (sum(channels) < 200) == (scheme == "dark")
    context.close()
    assert page.problems == []
