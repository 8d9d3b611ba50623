"""What is on the page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from importlib import resources
from typing import Any

from amradio.app import features, find, gallery, segment, similarity, words
from amradio.app.downloads import download
from amradio.app.markup import empty, escaped
from amradio.app.model import BACKBONE, HIGHEST_RESOLUTION, LOWEST_RESOLUTION, RESOLUTION_STEP
from amradio.app.redraw import Shown, redraw, show_photos
from amradio.app.visit import KEEP, House, Visit
from amradio.app.wiring import MODEL, PHOTOS, Wiring, import_gradio

TITLE = "amradio"
FIRST_RESOLUTION = 448

_SWEEP_S = (300, 900)  # every 5 minutes, uploads that nobody used for 15 minutes are removed
_MOVED = "(files) => [files, null]"
# The slider changes with each step of the pointer or a key, and while a number is typed; what it says counts when it
# rests. Both the last value that was seen and the last one that rested are kept at the element of the slider.
_RESTED = """(value) => new Promise((done) => {
  const slider = document.querySelector('#resolution');
  slider.rested ??= %d;
  slider.seen = value;
  setTimeout(() => {
    const rests = slider.seen === value && value >= %d && value <= %d;
    if (rests) slider.rested = value;
    done(slider.rested);
  }, 300);
})"""
_SAVE = """(file) => {
  if (!file || !file.data) return [];
  const bytes = Uint8Array.from(atob(file.data), (c) => c.charCodeAt(0));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([bytes], { type: file.type }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  return [];
}"""


def asset(name: str) -> str:
    """A file that comes with the app, as text."""
    return (resources.files("amradio.app") / "assets" / name).read_text(encoding="utf-8")


def theme() -> Any:
    """Colours and type. Only fonts of the system: nothing is fetched from other places."""
    gr = import_gradio()
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=sans, font_mono=mono
    ).set(
        body_background_fill="*background_fill_primary",
        block_background_fill="*background_fill_primary",
        block_shadow="none",
        block_title_background_fill="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_weight="600",
        block_title_padding="0",
        block_label_background_fill="transparent",
        block_label_text_color="*body_text_color",
        block_title_background_fill_dark="transparent",
        block_label_background_fill_dark="transparent",
        input_background_fill="*neutral_50",
        input_border_color="*border_color_primary",
        input_shadow="none",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
        checkbox_shadow="none",
        button_primary_shadow="none",
        button_secondary_shadow="none",
        button_secondary_background_fill="*neutral_50",
        button_secondary_border_color="*border_color_primary",
        button_border_width="1px",
    )


def build_page(house: House) -> Any:
    """Make the page.

    Args:
        house: What all pages share.

    Returns:
        A `gradio.Blocks`.
    """
    gr = import_gradio()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=_SWEEP_S) as page:
        parts = _Parts(house)
        parts.build()
        page.unload(parts.on_unload())
    page.queue(max_size=house.limits.queue, default_concurrency_limit=1, api_open=False)
    return page


class _Parts:
    """Builds the page part by part, inside a `gradio.Blocks`."""

    def __init__(self, house: House) -> None:
        self._gr = import_gradio()
        self._house = house
        self._buttons: list[tuple[Any, str]] = []
        self._model = house.model

    def build(self) -> None:
        gr = self._gr
        gr.HTML(_head(self._house), elem_id="head")
        self._photos()
        tabs = (
            ("Features", features.TAB, self._features),
            ("Similarity", similarity.TAB, self._similarity),
            ("Words", words.TAB, self._words),
            ("Segment", segment.TAB, self._segment),
            ("Search", find.TAB, self._search),
        )
        with gr.Tabs(elem_id="tabs"):
            self._tabs = []
            for title, name, fill in tabs:
                with gr.Tab(title, id=name) as tab:
                    fill()
                self._tabs.append((tab, name))
        # What the page remembers, and nobody sees.
        self._seen = gr.Textbox(features.TAB, visible="hidden", elem_id="seen")
        self._stamp = gr.Textbox("", visible="hidden", elem_id="stamp")
        self._rested = gr.Number(FIRST_RESOLUTION, visible="hidden", elem_id="rested")
        self._dropped = _file_input(gr.File, file_count="multiple", visible="hidden", elem_id="dropped")
        self._saved = gr.JSON(visible="hidden", elem_id="saved")
        self._wiring = Wiring(self._house, self._stamp)
        self._on = self._wiring.on
        self._connect()

    def on_unload(self) -> Any:
        """What is called when the page is closed."""
        return self._wiring.on_unload()

    def _photos(self) -> None:
        gr = self._gr
        with gr.Row(elem_id="photos"):
            with gr.Column(scale=2, min_width=280):
                self._drop = _file_input(
                    gr.File,
                    label="Your photos",
                    file_count="multiple",
                    file_types=["image"],
                    height=172,
                    elem_id="drop",
                )
            with gr.Column(scale=3, min_width=320):
                self._strip = self._html(elem_id="strip")
                with gr.Row():
                    self._samples = gr.Button(
                        "Take the sample photos", variant="primary", elem_id="samples", size="md", scale=2
                    )
                    self._clear = gr.Button("Remove all", variant="secondary", elem_id="clear", size="md", scale=1)
                self._resolution = gr.Slider(
                    LOWEST_RESOLUTION,
                    HIGHEST_RESOLUTION,
                    value=FIRST_RESOLUTION,
                    step=RESOLUTION_STEP,
                    label="Resolution",
                    info="Longest side in pixels. More shows finer things, and takes longer.",
                    elem_id="resolution",
                )

    def _features(self) -> None:
        gr = self._gr
        with gr.Row():
            self._output = self._outputs("output")
            self._layer = gr.Dropdown(
                features.layer_choices(self._model.depth),
                label="Layer",
                elem_id="layer",
                visible=self._model.depth > 0,
                filterable=False,
            )
            self._colours = gr.Dropdown(
                [features.SHARED, features.OWN, features.SUBJECT],
                label="Colours",
                elem_id="colours",
                filterable=False,
            )
            self._drawing = gr.Dropdown(
                [features.SMOOTH, features.EDGES, features.PATCHES],
                label="Drawn",
                elem_id="drawing",
                filterable=False,
            )
        self._features_grid = self._html(
            empty("See what the model sees", "Drop photos above, or take the sample photos.", "◐"),
            elem_id="features-grid",
        )
        self._download_button(features.TAB)

    def _similarity(self) -> None:
        with self._gr.Row():
            self._similarity_output = self._outputs("similarity-output")
        self._similarity_grid = self._html(
            empty("What looks alike?", "Drop photos above, or take the sample photos; then click on something.", "◎"),
            elem_id="similarity-grid",
        )
        self._download_button(similarity.TAB)

    def _words(self) -> None:
        gr = self._gr
        with gr.Row():
            self._labels = gr.Textbox(
                words.FIRST_WORDS,
                label="What could it be?",
                info="Words with commas between them.",
                lines=2,
                max_lines=6,
                scale=5,
                elem_id="labels",
            )
            self._compare = gr.Button("Compare", variant="primary", elem_id="compare", elem_classes="beside", size="md",
                                      scale=1, min_width=120)  # fmt: skip
        text = "Drop photos above, or take the sample photos." if self._model.text_output else (
            f"{self._model.name} has no text side, so its features cannot be compared with words.")  # fmt: skip
        self._bars = self._html(empty("Say what you see", text, "Aa"), elem_id="bars")
        self._download_button(words.TAB)
        with gr.Row():
            self._where = gr.Textbox(
                "cat", label="Where is it?", info="One thing at a time.", max_lines=1, scale=5, elem_id="where"
            )
            self._look = gr.Button("Show me", variant="primary", elem_id="look", elem_classes="beside", size="md",
                                   scale=1, min_width=120)  # fmt: skip
        self._where_grid = self._html(elem_id="where-grid")
        self._download_button(words.WHERE)

    def _segment(self) -> None:
        gr = self._gr
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._board = self._html(
                    empty("Paint once, see it everywhere", "Drop photos above, or take the sample photos.", "✎"),
                    elem_id="board",
                )
                with gr.Row():
                    self._strict = gr.Checkbox(
                        True,
                        label="Only what is clearly alike",
                        info="Leave out what resembles none of the things.",
                        elem_id="strict",
                    )
                    self._gradients = gr.Checkbox(
                        label="FUNGI", info="Gradients beside the features: slow, helps some models.", elem_id="fungi"
                    )
                self._segment_output = self._outputs("segment-output")
                with gr.Row():
                    self._mask = _file_input(
                        gr.UploadButton, label="Give a mask (PNG)", file_types=[".png"], size="sm", elem_id="mask"
                    )
                    self._forget = gr.Button("Begin anew", size="sm", elem_id="forget")
            with gr.Column(scale=3, min_width=320):
                self._segments = self._html(
                    empty("Nothing painted yet", "Pick a colour, and draw over something on the photo.", "✎"),
                    elem_id="segments",
                )
                self._download_button(segment.TAB)

    def _search(self) -> None:
        gr = self._gr
        collection = self._house.collection
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._source = self._html(
                    empty("Search by picture", "Drop photos above, or take the sample photos.", "⌕"), elem_id="source"
                )
                self._wanted = gr.Textbox(
                    label="Or type it", max_lines=1, placeholder="a cat", elem_id="wanted",
                    visible=self._model.text_output is not None,
                )  # fmt: skip
                self._find = gr.Button("Search", variant="primary", elem_id="find", size="md",
                                       visible=self._model.text_output is not None)  # fmt: skip
                names = [find.OWN] if collection is None else [find.COLLECTION, find.OWN]
                info = "" if collection is None else f"The collection has {len(collection):,} pictures."
                self._scope = gr.Radio(
                    names, value=names[0], label="Search in", info=info, elem_id="scope", visible=collection is not None
                )
            with gr.Column(scale=3, min_width=320):
                self._found = self._html(
                    empty(
                        "Nothing looked for yet",
                        "Click on a photo, draw a box around a part of it, or type words.",
                        "⌕",
                    ),
                    elem_id="found",
                )
                self._download_button(find.TAB)

    def _connect(self) -> None:
        """Say what happens on which event. An event only remembers what was asked; `redraw` does what takes time."""
        gr, on = self._gr, self._on
        strip = [self._strip, self._similarity_grid, self._board, self._source]
        # The place for uploads is empty again at once, so that more can be dropped while these are read.
        moved = self._drop.upload(None, [self._drop], [self._dropped, self._drop], js=_MOVED, api_visibility="private")
        seen: dict[str, Any] = {"show_progress": "full", "show_progress_on": [self._strip]}
        on(moved.then, _with_photos(gallery.add_uploads), [self._dropped], strip, queue=PHOTOS, begins=True, **seen)
        on(self._samples.click, _with_photos(gallery.add_samples), [], strip, queue=PHOTOS, begins=True, **seen)
        on(self._clear.click, _with_photos(gallery.remove_all), [], strip, queue=PHOTOS)
        on(self._strip.remove, _with_photos(gallery.remove_photo), [], strip)
        on(self._strip.dismiss, gallery.dismiss, [], [self._strip])
        on(self._strip.reopened, gallery.forgotten, [], [self._strip], begins=True)

        on(self._similarity_grid.spot, similarity.ask)
        for listen in (self._compare.click, self._labels.submit):
            on(listen, words.compare, [self._labels])
        for listen in (self._look.click, self._where.submit, self._bars.word):
            on(listen, words.look, [self._where], [self._where])
        on(self._board.choose, segment.choose, [], [self._board])
        on(self._board.paint, segment.take_strokes)
        on(self._mask.upload, segment.take_mask, [self._mask], [self._board])
        on(self._forget.click, segment.forget, [], [self._board])
        on(self._source.choose, find.choose, [], [self._source])
        on(self._source.region, find.ask_part)
        for listen in (self._find.click, self._wanted.submit):
            on(listen, find.ask_words, [self._wanted])

        for button, tab in self._buttons:
            ready = on(button.click, _download_of(tab), [], [self._saved])
            ready.success(None, [self._saved], None, js=_SAVE, api_visibility="private")

        for tab, name in self._tabs:
            tab.select(None, None, [self._seen], js=f"() => '{name}'", api_visibility="private")
        rests = _RESTED % (FIRST_RESOLUTION, LOWEST_RESOLUTION, HIGHEST_RESOLUTION)
        self._resolution.change(
            None, [self._resolution], [self._rested], js=rests, api_visibility="private", trigger_mode="multiple"
        )
        settings = [self._rested, self._output, self._layer, self._colours, self._drawing, self._similarity_output,
                    self._segment_output, self._gradients, self._strict, self._scope]  # fmt: skip
        drawn = [self._features_grid, self._similarity_grid, self._bars, self._where_grid, self._segments, self._found]
        changes = [component.change for component in (self._stamp, self._seen, *settings)]
        on(
            partial(gr.on, changes),
            redraw,
            [self._seen, *settings],
            [self._strip, self._board, self._source, *drawn],
            queue=MODEL,
            trigger_mode="always_last",
            show_progress="full",
            show_progress_on=drawn,
        )

    def _html(self, value: str = "", elem_id: str = "") -> Any:
        return self._gr.HTML(value, js_on_load=asset("page.js"), elem_id=elem_id)

    def _outputs(self, elem_id: str) -> Any:
        names = list(self._model.outputs)
        return self._gr.Dropdown(
            [(_label(n), n) for n in names], value=BACKBONE, label="Model output", elem_id=elem_id, filterable=False,
            visible=len(names) > 1,
        )  # fmt: skip

    def _download_button(self, tab: str) -> None:
        button = self._gr.Button("Download", size="sm", elem_id=f"download-{tab}", elem_classes="download")
        self._buttons.append((button, tab))


def _with_photos(change: Callable[..., str]) -> Callable[..., Any]:
    """What changes the photos, and then shows them everywhere."""

    @wraps(change)
    def changed(visit: Visit, *values: Any) -> tuple[Shown, ...]:
        before = tuple(visit.session.photos)
        strip = change(visit, *values)
        return show_photos(visit) if tuple(visit.session.photos) != before else (strip, KEEP, KEEP, KEEP)

    return changed


def _download_of(tab: str) -> Any:
    def download_tab(visit: Visit) -> dict[str, Any]:
        return download(visit, tab)

    return download_tab


def _file_input(kind: Any, **options: Any) -> Any:
    """A component of Gradio that takes files, and hands over where they are without opening them."""

    def uploads(payload: Any) -> list[gallery.Upload]:
        files: Any = getattr(payload, "root", payload)
        one_by_one = files if isinstance(files, (list, tuple)) else [files]
        return [gallery.Upload(f.path, f.orig_name or f.path) for f in one_by_one if f is not None]

    component = kind(**options)
    component.preprocess = uploads  # not by a subclass: Gradio writes a file beside the source of each one
    return component


def _label(output: str) -> str:
    return "the model itself" if output == BACKBONE else f"{output} (what this teacher would see)"


def _head(house: House) -> str:
    return (
        '<div class="head"><h1>amradio</h1><p>See what a vision model sees in your photos.</p>'
        f'<span class="chip">{escaped(house.model.name)} on {escaped(str(house.model.device))}</span></div>'
    )
