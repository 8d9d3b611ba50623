"""``amradio features``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import (
    DEFAULT_MODEL,
    PictureOptions,
    device_of,
    dtype_of,
    exit_code,
    print_failures,
    progress_bar,
    split_names,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from amradio.features import FeatureRecord


@dataclass(frozen=True, kw_only=True)
class Features(PictureOptions):
    """Compute a summary and a feature map for each picture and write them to a folder.

    The folder gets features/ID.safetensors (or .npz) for each picture and index.parquet with path, status and sizes.
    A broken picture is reported and skipped; the exit code is then 3. For many pictures, use `amradio embed`.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively) and glob patterns."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write to."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = DEFAULT_MODEL
    """Backbone: version key, repository, path, timm:NAME, hf:REPO, ...; amradio-tiny comes with the package."""
    adaptors: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-a"])] = ()
    """Adaptor to run besides the backbone. Repeat the option, or separate names by commas."""
    resolution: Size = ()
    """One number: shortest side, aspect kept. Two: scaled to cover height and width, centre cut out. None: the
    picture's own size. Sides are rounded to what the model supports."""
    pca: bool = False
    """Also write pca/ID.png: the photo beside a picture of its feature map."""
    pca_of: str = "backbone"
    """Whose features the picture shows: backbone or an adaptor."""
    pca_skip: int = 0
    """Leading principal components to leave out of the picture."""
    batch_size: int = 8
    """Most pictures in one forward pass; halved by itself when memory runs out."""
    format: Literal["safetensors", "npz"] = "safetensors"
    """File format of the features."""
    store: Literal["float32", "float16"] = "float32"
    """Number format of the stored features."""
    overwrite: bool = False
    """Replace an earlier run in the same folder."""
    json: bool = False
    """Print one JSON object instead of text, and no progress bar."""

    def run(self) -> int:
        """Compute and write; returns the exit code."""
        from amradio.features import WriterOptions, run_job
        from amradio.images import ResizePolicy, expand

        images = expand(self.images)
        adaptors = split_names(self.adaptors)
        self._check(adaptors)
        device = device_of(self.device)
        model = self.load_model(self.model, adaptors, device, progress=not self.json)
        mode = None if self.mode == "auto" else self.mode
        policy = ResizePolicy.parse(self.resolution, mode, self.resize_multiple or model.min_resolution_step)
        writer = WriterOptions(
            dtype=dtype_of(self.store),
            file_format=self.format,
            draw={"pca": _drawer(self.pca_of, self.pca_skip)} if self.pca else {},
            overwrite=self.overwrite,
        )
        failures: list[dict[str, str]] = []
        with progress_bar(len(images), "features", enabled=not self.json) as advance:

            def on_record(record: FeatureRecord) -> None:
                if record.reason is not None:
                    failures.append({"path": record.source.location, "reason": record.reason})
                advance(1)

            options = self.extract_options(device)
            result = run_job(images, model, policy, self.output, options, writer, on_record)
        result |= {"model": model.identity.version or model.identity.source, "failures": failures}
        print(json.dumps(result, indent=2)) if self.json else _print(result)
        return exit_code(result["images"], result["failed"], self.max_failed)

    def _check(self, adaptors: Sequence[str]) -> None:
        """Refuse contradictions before a model is loaded."""
        from amradio.errors import OptionError

        if self.pca and self.pca_of not in ("backbone", *adaptors):
            raise OptionError(
                f"--pca-of {self.pca_of!r} is neither 'backbone' nor a chosen adaptor. Add --adaptors {self.pca_of}."
            )


def _drawer(of: str, skip: int) -> Callable[[FeatureRecord], Image]:
    """Draws the photo as the model saw it beside the principal components of its features."""

    def draw(record: FeatureRecord) -> Image:
        from PIL import Image

        from amradio.viz.pca import pca_rgb, side_by_side, to_picture

        assert record.image is not None  # the writer draws successful pictures only
        photo = record.image.permute(1, 2, 0).contiguous()  # [H, W, 3]
        features = record.outputs[of].features.permute(1, 2, 0)  # [h, w, D]
        colours = to_picture(pca_rgb(features, skip=skip), (photo.shape[0], photo.shape[1]))
        return side_by_side([Image.fromarray(photo.numpy()), colours])

    return draw


def _print(result: dict[str, Any]) -> None:
    print_failures(result["failures"], result["failed"])
    print(
        f"{result['ok']} of {result['images']} pictures in {result['wall_s']:.1f} s ({result['images_per_s']:.1f} "
        f"images/s), {result['policy']}; slowest stage: {result['bottleneck']}"
    )
    print(f"features, index.parquet and pictures are in {result['folder']}")
