"""``amradio demo``."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from amradio.cli.common import DEFAULT_MODEL, device_of
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.viz.page import Page

_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")  # of scikit-image
_TEXT_ADAPTOR = "minilm"
_TEMPLATE = "a photo of a {}."
_WORDS = [
    *("cat", "dog", "person", "coffee", "rocket", "motorcycle", "car", "bicycle", "flower", "tree", "bird", "horse"),
    *("house", "food", "mountain", "beach", "city", "computer", "book", "fish", "boat", "airplane", "chair"),
]
_MOST_PHOTOS = 12
_MAP_SIDE = 448  # of the shorter side of a photo, in pixels
_MOST_ASPECT = 4  # of sides: a photo that is longer gets a map of this many times the side at most
_ABOUT_FUNGI = (
    "Gradients help some backbones and cost others: on photos of CamVid and COCO they take 3 to 5 points of mIoU from "
    "amradio-tiny, and add about 1 to a DINOv2-like network, as the benchmarks of the documentation show. A dozen "
    "made-up scenes decide nothing."
)
_SCENES = {"train": 12, "val": 6}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Show what features are good for: maps, words, neighbours, segmentation by example; one page, offline.

    Without --images the photos are those of scikit-image, if it is installed.
    """

    images: Path | None = None
    """Folder with photos of your own."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo-output")
    """Folder for the page."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = DEFAULT_MODEL
    """RADIO model: a version key, a path, or the one that comes with the package."""
    words: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Word to compare photos with, instead of a few common ones. Repeat the option for several."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""

    def run(self) -> int:
        """Make the page; returns the exit code."""
        from amradio.backbones.dispatch import is_radio
        from amradio.backbones.load import load
        from amradio.viz.page import Page

        start = time.perf_counter()
        if not is_radio(self.model):
            raise OptionError(
                f"The demo shows what a RADIO model can do, and {self.model} is none. Name one (`amradio models` lists "
                "them) or leave --model out; `amradio visualize`, `amradio features` and `amradio eval` take any "
                "backbone."
            )
        photos = self._photos()
        model: Any = load(self.model.removeprefix("radio:")).to(device_of(self.device)).requires_grad_(False)
        has_text = _TEXT_ADAPTOR in model.config.adaptors
        page = Page(f"What {self.model} sees")
        page.text("Everything here was computed on this machine, offline. Nothing was trained for it.")
        if photos:
            self._maps(page, model, photos)
            if has_text:
                self._zero_shot(page, photos)
        with tempfile.TemporaryDirectory() as folder:
            self._scenes(page, model, Path(folder))
        page.text(f"Made in {time.perf_counter() - start:.0f} seconds.")
        self.output.mkdir(parents=True, exist_ok=True)
        print(f"\nthe report is {page.save(self.output / 'report.html').resolve()}")
        return 0

    def _photos(self) -> list[tuple[str, Any]]:
        """Names and pictures; a broken file is said and left out."""
        from amradio.errors import ImageError
        from amradio.images import MAX_PIXELS, WHITE, expand

        if self.images is not None:
            sources = list(expand([self.images]))
        else:
            found = importlib.util.find_spec("skimage")
            if found is None or not found.submodule_search_locations:
                print("scikit-image is not installed, so there are no photos; name a folder with --images")
                return []
            data = Path(found.submodule_search_locations[0], "data")
            sources = list(expand([data / name for name in _PHOTOS if (data / name).is_file()]))
        photos = []
        for source in sources[:_MOST_PHOTOS]:
            try:
                photos.append((source.id, source.decode(max_pixels=MAX_PIXELS, background=WHITE)))
            except ImageError as error:
                print(f"failed: {source.location}: {error}")
        if not photos:
            raise OptionError(f"None of the {len(sources)} photos could be read.")
        return photos

    def _maps(self, page: Page, model: Any, photos: list[tuple[str, Any]]) -> None:
        """Photos beside their feature maps, in colours that mean the same in all of them."""
        from amradio.features import feature_map
        from amradio.viz import pca_pictures, side_by_side

        found = []
        for name, photo in photos:
            policy = _map_policy(photo, model.min_resolution_step)
            if policy.mode == "longest":
                shape = f"{photo.width} x {photo.height}"
                print(f"drawn smaller: {name} is {shape}, more than {_MOST_ASPECT} times as long as wide")
            found.append(feature_map(model, photo, policy))
        drawn = pca_pictures([one.features for one in found], [one.photo for one in found])
        page.heading("Feature maps")
        page.text(
            "The three strongest directions of the feature maps as red, green and blue. One basis serves all photos, "
            "so equal colours mean similar features."
        )
        for (name, _), one, colours in zip(photos, found, drawn, strict=True):
            page.picture(side_by_side([one.photo, colours]), name, photo=True)

    def _zero_shot(self, page: Page, photos: list[tuple[str, Any]]) -> None:
        """The words that photos are most similar to."""
        from amradio.backbones.dispatch import load_backbone
        from amradio.features import feature_maps
        from amradio.images import ResizePolicy
        from amradio.viz import similarity_map

        view: Any = load_backbone(self.model, adaptor=_TEXT_ADAPTOR, device=device_of(self.device))
        words = list(self.words) or _WORDS
        text = view.encode_text(view.tokenizer([_TEMPLATE.format(word) for word in words]), normalize=True)
        policy = ResizePolicy.parse([224, 224], "crop", multiple=view.min_resolution_step)
        rows = []
        for (name, _), one in zip(photos, feature_maps(view, [photo for _, photo in photos], policy), strict=True):
            best = similarity_map(text[None], one.summary)[0].topk(min(3, len(words)))  # of [1, words]
            answers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            rows.append([name, ", ".join(f"{words[i]} ({value:.2f})" for i, value in answers)])
        page.heading("In words")
        page.text(
            f"Of {len(words)} words, the three whose sentence embedding is most similar to the summary of the photo, "
            "with the cosine. No classifier was trained on these words."
        )
        page.table(["photo", "words"], rows)

    def _scenes(self, page: Page, model: Any, folder: Path) -> None:
        """Measure on made-up scenes: k-NN, and segmentation by example with and without gradients."""
        from amradio.evals.in_context import InContextConfig, SheetOptions, in_context_policy, run_in_context
        from amradio.evals.knn import KnnConfig, run_knn
        from amradio.evals.runner import Setup, policy_for
        from amradio.features import ExtractOptions
        from amradio.fungi import DenseConfig, DenseFungiBackbone
        from amradio.images import open_images
        from amradio.images.scenes import SHAPES, write_scenes
        from amradio.images.segmentation import open_segmentation
        from amradio.viz.contact_sheet import contact_sheet

        write_scenes(folder, _SCENES)
        kinds = [open_images(folder / "kinds", part) for part in _SCENES]
        options = ExtractOptions(batch_size=8, device=device_of(self.device))
        backbone = model.view("backbone") if model.adaptors else model
        knn = run_knn(backbone, kinds[0], kinds[1], KnnConfig(k=(5,)), Setup(policy_for(backbone, (224, 224)), options))
        train, val = (open_segmentation(folder / part) for part in _SCENES)
        setup = Setup(in_context_policy(backbone, (224,)), options)
        config = InContextConfig(augmentation="none")
        sheets: list[Any] = []
        plain = run_in_context(backbone, train, val, config, setup, sheets=SheetOptions(2), on_sheet=sheets.append)[0]
        gradients = DenseFungiBackbone(backbone, DenseConfig(projection="tensor-sketch")).fit(
            train.images, policy=setup.policy, options=options
        )
        fungi = run_in_context(gradients, train, val, config, setup)[0]
        page.heading("Measured")
        page.text(
            f"Made-up scenes: {', '.join(SHAPES)} with random textures; {len(train)} to learn from, {len(val)} to "
            "answer. Chance is 25 % for the kind of shape."
        )
        page.table(
            ["protocol", "result"],
            [
                ["kind of shape, by its 5 nearest neighbours", f"{knn.metrics['top1'].value:.1f} % right"],
                ["segmentation by example, mIoU", f"{plain.metrics['miou'].value:.1f} %"],
                ["the same with gradient features (FUNGI), mIoU", f"{fungi.metrics['miou'].value:.1f} %"],
            ],
        )
        page.text(_ABOUT_FUNGI)
        for sheet in sheets:
            page.picture(contact_sheet(sheet), "scene, truth, prediction, and the neighbours of some patches")
        print(f"k-NN: {knn.metrics['top1'].value:.1f} %, segmentation: {plain.metrics['miou'].value:.1f} % mIoU, "
              f"with FUNGI {fungi.metrics['miou'].value:.1f} %")  # fmt: skip


def _map_policy(photo: Any, multiple: int) -> Any:
    """At which size a photo's map is computed: the shorter side is the same in all, but for strips, which get smaller.

    Args:
        photo: Anything with a width and a height in pixels.
        multiple: What sides are rounded to.
    """
    from amradio.images import ResizePolicy

    if max(photo.width, photo.height) <= _MOST_ASPECT * min(photo.width, photo.height):
        return ResizePolicy.parse([_MAP_SIDE], "shortest", multiple=multiple)
    return ResizePolicy.parse([_MOST_ASPECT * _MAP_SIDE], "longest", multiple=multiple)
