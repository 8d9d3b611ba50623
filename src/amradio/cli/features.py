"""``amradio features``."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL.Image import Image

    from amradio.features import FeatureRecord

_SHOWN_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class Features:
    """Compute a summary and a feature map for each picture and write them to a folder.

    The folder gets features/ID.safetensors (or .npz) for each picture and index.parquet with path, status and sizes.
    A broken picture is reported and skipped; the exit code is then 3.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively) and glob patterns."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write to."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = ""
    """Version key, Hugging Face repository, or path; empty for the default version."""
    adaptors: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-a"])] = ()
    """Adaptor to run besides the backbone. Repeat the option, or separate names by commas."""
    resolution: Size = ()
    """One number: shortest side, aspect kept. Two: scaled to cover height and width, centre cut out. None: the
    picture's own size. Sides are rounded to what the model supports."""
    mode: Literal["auto", "shortest", "longest", "crop", "exact", "nearest"] = "auto"
    """How the resolution is meant; auto as said there."""
    vitdet_window_size: int | None = None
    """Side in patches of ViTDet attention windows."""
    pca: bool = False
    """Also write pca/ID.png: the photo beside a picture of its feature map."""
    pca_of: str = "backbone"
    """Whose features the picture shows: backbone or an adaptor."""
    pca_skip: int = 0
    """Leading principal components to leave out of the picture."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Cast the model; auto keeps the published dtype."""
    autocast: Literal["off", "bfloat16", "float16"] = "off"
    """Compute in mixed precision."""
    batch_size: int = 8
    """Most pictures in one forward pass; halved by itself when memory runs out."""
    workers: int | None = None
    """Decoding threads; default one for each CPU core, up to 8."""
    format: Literal["safetensors", "npz"] = "safetensors"
    """File format of the features."""
    store: Literal["float32", "float16"] = "float32"
    """Number format of the stored features."""
    overwrite: bool = False
    """Replace an earlier run in the same folder."""
    position_interpolation: Literal["half_pixel", "align_corners", "published", "torch_hub"] | None = None
    """How the position grid is resized; default as the official code does today."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""
    cache_dir: Path | None = None
    """Where downloads are kept."""
    offline: bool = False
    """Never use the network."""
    json: bool = False
    """Print one JSON object instead of text, and no progress bar."""

    def run(self) -> int:
        """Compute and write; returns the exit code."""
        from amradio.features import ExtractOptions, WriterOptions, run_job
        from amradio.images import ResizePolicy, expand

        images = expand(self.images)
        self._check()
        model = self._load()
        policy = ResizePolicy.parse(
            self.resolution, None if self.mode == "auto" else self.mode, model.min_resolution_step
        )
        options = ExtractOptions(
            batch_size=self.batch_size,
            workers=self.workers,
            device=_device(self.device),
            autocast=_dtype(self.autocast),
        )
        store = _dtype(self.store)
        assert store is not None  # both choices are dtypes
        writer = WriterOptions(
            dtype=store,
            file_format=self.format,
            draw={"pca": _drawer(self.pca_of, self.pca_skip)} if self.pca else {},
            overwrite=self.overwrite,
        )
        failures: list[dict[str, str]] = []
        with _progress(len(images), enabled=not self.json) as advance:

            def on_record(record: FeatureRecord) -> None:
                if record.reason is not None:
                    failures.append({"path": record.source.location, "reason": record.reason})
                advance()

            result = run_job(images, model, policy, self.output, options, writer, on_record)
        result |= {"model": model.identity.version or model.identity.source, "failures": failures}
        print(json.dumps(result, indent=2)) if self.json else _print(result)
        return 1 if result["failed"] == result["images"] else 3 if result["failed"] else 0

    def _check(self) -> None:
        """Refuse contradictions before a model is loaded."""
        from amradio.errors import OptionError

        if self.pca and self.pca_of not in ("backbone", *self._adaptor_names()):
            raise OptionError(
                f"--pca-of {self.pca_of!r} is neither 'backbone' nor a chosen adaptor. Add --adaptors {self.pca_of}."
            )

    def _adaptor_names(self) -> list[str]:
        return [name for word in self.adaptors for name in word.split(",") if name]

    def _load(self) -> Any:
        from amradio.backbones.load import load

        return load(
            self.model,
            self._adaptor_names(),
            vitdet_window_size=self.vitdet_window_size,
            device=_device(self.device),
            dtype=_dtype(self.dtype),
            position_interpolation=self.position_interpolation,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            progress=not self.json,
        )


def _device(name: str) -> Any:
    import torch

    from amradio.errors import OptionError

    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise OptionError(f"--device {name!r} is no device: {str(e).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"--device {name!r}: this torch ({torch.__version__}) sees no GPU. `amradio doctor` shows the devices."
        )
    return device


def _dtype(name: str) -> Any:
    import torch

    return None if name in ("auto", "off") else getattr(torch, name)


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


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[], object]]:
    """A progress bar on standard error, or nothing; yields what advances it by one."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", desc="features", disable=not enabled, file=sys.stderr) as bar:
        yield bar.update


def _print(result: dict[str, Any]) -> None:
    for failure in result["failures"][:_SHOWN_FAILURES]:
        print(f"failed: {failure['path']}: {failure['reason']}", file=sys.stderr)
    more = len(result["failures"]) - _SHOWN_FAILURES
    if more > 0:
        print(f"failed: {more} more, all in the index", file=sys.stderr)
    print(
        f"{result['ok']} of {result['images']} pictures in {result['wall_s']:.1f} s ({result['images_per_s']:.1f} "
        f"images/s), "
        f"{result['policy']}; slowest stage: {result['bottleneck']}"
    )
    print(f"features, index.parquet and pictures are in {result['folder']}")
