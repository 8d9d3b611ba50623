"""What is on the page."""

from __future__ import annotations

from importlib import resources
from typing import Any

from amradio.app import features, find, gallery, segment, similarity, words
from amradio.app.downloads import download
from amradio.app.markup import empty, escaped
from amradio.app.model import BACKBONE, HIGHEST_RESOLUTION, LOWEST_RESOLUTION, RESOLUTION_STEP
from amradio.app.visit import House, Visit
from amradio.app.wiring import Wiring, import_gradio

TITLE = "amradio"
FIRST_RESOLUTION = 448

_SWEEP_S = (300, 900)  # every 5 minutes, uploads that nobody used for 15 minutes are removed
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
        page.unload(Wiring(house).on_unload())
    page.queue(max_size=house.limits.queue, default_concurrency_limit=1, api_open=False)
    return page


class _Parts:
    """Builds the page part by part, inside a `gradio.Blocks`."""

    def __init__(self, house: House) -> None:
        self._gr = import_gradio()
        self._house = house
        self._buttons: list[tuple[Any, str]] = []
        self._model = house.model
        self._wiring = Wiring(house)
        self._on = self._wiring.on

    def build(self) -> None:
        gr = self._gr
        gr.HTML(_head(self._house), elem_id="head")
        self._photos()
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Features", id="features"):
                self._features()
            with gr.Tab("Similarity", id="similarity"):
                self._similarity()
            with gr.Tab("Words", id="words"):
                self._words()
            with gr.Tab("Segment", id="segment"):
                self._segment()
            with gr.Tab("Search", id="search"):
                self._search()
        self._saved = gr.JSON(visible="hidden", elem_id="saved")
        self._connect()

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
        self._download_button("where")

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
                        label="FUNGI", info="Gradients beside the features: slower, often sharper.", elem_id="fungi"
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
        """Say what happens on which event."""
        on, slow = self._on, {"show_progress": "full"}
        whole = [self._resolution, self._output, self._layer, self._colours, self._drawing]
        for listen, function, inputs in (
            (self._drop.upload, gallery.add_uploads, [self._drop]),
            (self._samples.click, gallery.add_samples, []),
            (self._clear.click, gallery.remove_all, []),
            (self._strip.remove, gallery.remove_photo, []),
        ):
            added = on(listen, function, inputs, [self._strip], show_progress_on=[self._strip])
            others = [self._drop, self._similarity_grid, self._where_grid, self._board, self._segments, self._source]
            others.append(self._found)
            shown = on(added.then, _refreshed, [], others, show_progress="hidden")
            drawn = on(shown.then, features.show_features, whole, [self._features_grid], **slow)
            if self._model.text_output:
                on(drawn.then, words.show_bars, [self._labels, self._resolution], [self._bars], **slow)
        for changed in (self._resolution.release, self._output.change, self._layer.change, self._colours.change,
                        self._drawing.change):  # fmt: skip
            on(changed, features.show_features, whole, [self._features_grid], trigger_mode="always_last", **slow)

        places = [self._resolution, self._similarity_output]
        on(self._similarity_grid.spot, similarity.show_similarity, places, [self._similarity_grid], **slow)

        for listen in (self._compare.click, self._labels.submit):
            on(listen, words.show_bars, [self._labels, self._resolution], [self._bars], **slow)
        asked = [self._where, self._resolution]
        for listen in (self._look.click, self._where.submit):
            on(listen, words.show_where, asked, [self._where_grid], **slow)
        on(self._bars.word, words.show_where_of_bar, asked, [self._where, self._where_grid], **slow)

        how = [self._resolution, self._segment_output, self._gradients, self._strict]
        on(self._board.choose, segment.choose, [], [self._board], show_progress="hidden")
        on(self._board.paint, segment.take_strokes, how, [self._segments], trigger_mode="always_last", **slow)
        taken = on(self._mask.upload, segment.take_mask, [self._mask, *how], [self._segments], **slow)
        on(taken.then, segment.show_board, [], [self._board], show_progress="hidden")
        for listen in (self._gradients.change, self._segment_output.change, self._strict.change):
            on(listen, segment.carry_over, how, [self._segments], trigger_mode="always_last", **slow)
        forgotten = on(self._forget.click, segment.forget, [], [self._segments], show_progress="hidden")
        on(forgotten.then, segment.show_board, [], [self._board], show_progress="hidden")

        where = [self._scope, self._resolution]
        chosen = on(self._source.choose, find.choose, [], [self._source], show_progress="hidden")
        on(chosen.then, find.find_again, where, [self._found], **slow)
        on(self._source.region, find.find_part, where, [self._found], **slow)
        on(self._scope.change, find.find_again, where, [self._found], **slow)
        for listen in (self._find.click, self._wanted.submit):
            on(listen, find.find_words, [self._wanted, *where], [self._found], **slow)

        for button, tab in self._buttons:
            ready = on(button.click, _download_of(tab), [], [self._saved], show_progress="hidden")
            ready.success(None, [self._saved], None, js=_SAVE, api_visibility="private")

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


def _refreshed(visit: Visit) -> tuple[Any, ...]:
    """Everything that shows photos, after they changed; the place for uploads is empty again."""
    return (
        None,
        similarity.show_photos(visit),
        "",
        segment.show_board(visit),
        segment.forgotten(visit),
        find.show_source(visit),
        find.nothing_yet(visit),
    )


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
