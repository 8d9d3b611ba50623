"""What exported files (ONNX, AOTInductor packages) say of themselves, and what the backbones made from them share."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from amradio import __version__
from amradio.backbones.adapter import Adapter, Geometry, map_to_tokens
from amradio.errors import (
    CapabilityError,
    LayoutError,
    OptionError,
    ResolutionError,
    UnknownAdaptorError,
    nearest_names,
)
from amradio.hub import HubOptions
from amradio.models.configs import Resolution, from_json, to_json
from amradio.models.output import RadioOutput, arrange, check_feature_fmt
from amradio.text.towers import has_text_side, load_text_tower
from amradio.weights.checkpoint import Identity, torch_dtype

FORMAT = "amradio-export"
FORMAT_VERSION = 1
BACKBONE = "backbone"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""What an exported network computes in, and the dtype that it shows to the outside."""


@dataclass(frozen=True, kw_only=True)
class OutputInfo:
    """One summary and one map of features in an exported file.

    Attributes:
        name: ``backbone`` or an adaptor's.
        summary_dim: Width C of the summary.
        embed_dim: Width D of the features.
        dtype: Of both, such as ``float32``.
        upsample_factor: Rows and columns of features for each patch row and column.
        teacher: The teacher's record, for its text side.
    """

    name: str
    summary_dim: int
    embed_dim: int
    dtype: str = "float32"
    upsample_factor: int = 1
    teacher: Mapping[str, Any] | None = None

    @property
    def summary(self) -> str:
        """Name of the graph's output with the summary [B, C]."""
        return "summary" if self.name == BACKBONE else f"{self.name}_summary"

    @property
    def features(self) -> str:
        """Name of the graph's output with the features."""
        return "features" if self.name == BACKBONE else f"{self.name}_features"

    def is_possible(self, patch_size: int) -> bool:
        """Whether an export could say this.

        Args:
            patch_size: The backbone's.
        """
        return (
            min(self.summary_dim, self.embed_dim, self.upsample_factor) >= 1
            and patch_size % self.upsample_factor == 0
            and self.dtype in {_name(dtype) for dtype in PRECISIONS.values()}
        )


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """All that must be known of an exported network to use it.

    Attributes:
        precision: A key of `PRECISIONS`.
        patch_size: Pixels between two positions of the backbone's features.
        step: What both image sides must be multiples of, in pixels.
        size: The only (height, width) that it takes; None for every multiple of `step`.
        max_side: Largest side that it takes, in pixels; None for no limit.
        batch: The only number of images that it takes at once; None for any.
        feature_fmt: ``NLC`` or ``NCHW``: how its features are laid out.
        outputs: What comes out, in this order.
        preferred_resolution: (height, width) in pixels that suits summaries best, if known.
        window_size: Side of the ViTDet windows in patches, None for global attention.
        version: Of the model, as in the catalog.
        license: Of the weights.
        source: Where the weights came from.
        source_sha256: Digest of the file that they came from.
        revision: Commit of the repository that they came from.
        data_files: Files beside it that hold its weights, and their SHA-256.
        environment: What it was made with, and where it can run.
    """

    precision: str
    patch_size: int
    step: int
    size: Resolution | None = None
    max_side: int | None = None
    batch: int | None = None
    feature_fmt: Literal["NLC", "NCHW"] = "NLC"
    outputs: tuple[OutputInfo, ...]
    preferred_resolution: Resolution | None = None
    window_size: int | None = None
    version: str | None = None
    license: str | None = None
    source: str | None = None
    source_sha256: str | None = None
    revision: str | None = None
    data_files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What the network shows to the outside."""
        return PRECISIONS[self.precision]

    @property
    def is_possible(self) -> bool:
        """Whether an export could say this: what `from_metadata` reads may have been edited or damaged."""
        names = [output.name for output in self.outputs]
        sides = [side for size in (self.size, self.preferred_resolution) if size is not None for side in size]
        optional = [count for count in (self.batch, self.max_side, self.window_size) if count is not None]
        return (
            self.precision in PRECISIONS
            and BACKBONE in names
            and len(names) == len(set(names))
            and min(self.patch_size, self.step, *sides, *optional) >= 1
            and all(output.is_possible(self.patch_size) for output in self.outputs)
        )

    def output(self, name: str | None) -> OutputInfo:
        """One output by name, the backbone's by default.

        Raises:
            UnknownAdaptorError: There is none of this name.
        """
        by_name = {output.name: output for output in self.outputs}
        if (name or BACKBONE) not in by_name:
            raise UnknownAdaptorError(
                f"The exported file has no output {name!r}, only {list(by_name)}. Export the model again with this "
                f"adaptor. {nearest_names(str(name), by_name)}"
            )
        return by_name[name or BACKBONE]

    def geometry(self, output: OutputInfo) -> Geometry:
        """Sizes of the backbone that one output makes."""
        return Geometry(
            patch_size=self.patch_size // output.upsample_factor,
            embed_dim=output.embed_dim,
            summary_dim=output.summary_dim,
            min_resolution_step=self.step,
            preferred_resolution=self.size or self.preferred_resolution,
            fixed=self.size is not None,
        )

    def identity(self, path: Path, layout: str, sha256: str) -> Identity:
        """What reports say of a file with this description."""
        return Identity(
            source=str(path),
            layout=layout,
            version=self.version,
            sha256=sha256,
            revision=self.revision,
            license=self.license,
        )

    def to_metadata(self) -> dict[str, str]:
        """As strings by name, for the metadata of a file; the inverse is `from_metadata`."""
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "amradio_version": __version__,
            "export": json.dumps(to_json(self)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path, otherwise: str) -> ExportInfo:
        """Read the metadata of a file.

        Args:
            metadata: Strings by name.
            path: The file, for messages.
            otherwise: What to say of a file that amradio did not write.

        Returns:
            The description.

        Raises:
            LayoutError: amradio did not write the file, or a newer one did, or its metadata is damaged.
        """
        if metadata.get("format") != FORMAT:
            raise LayoutError(f"{path} was not written by amradio: its metadata has no format={FORMAT!r}. {otherwise}")
        writer, version = metadata.get("amradio_version", "an unknown version"), metadata.get("format_version", "")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise LayoutError(
                f"{path} was written by amradio {writer} in version {version or '?'} of the format; amradio "
                f"{__version__} reads up to version {FORMAT_VERSION}. Upgrade amradio."
            )
        try:
            info = from_json(cls, json.loads(metadata.get("export", "")), "export")
        except (ValueError, RecursionError) as e:  # of which ConfigError is one
            raise LayoutError(
                f"{path} (written by amradio {writer}) has damaged metadata: {e}. Export the model again."
            ) from e
        if not info.is_possible:
            raise LayoutError(f"{path} (written by amradio {writer}) has metadata that no export has: {info}.")
        return info


class ExportedBackbone(Adapter):
    """An exported network as a backbone. Its weights are in the file, and none of them are torch's.

    Args:
        info: What the file says of itself.
        identity: Of the file.
        output: Whose summary and features are wanted; default the backbone's.
        hub: How the hub is asked for an adaptor's text side, should a text need it.

    Attributes:
        info: What the file says of itself.
        output: Whose summary and features a call returns.
        adaptors: After `with_adaptors`: those that calls return beside the backbone.
        file_sha256: Digest of the file [32]. In the state dict, so that whatever tells models apart by their state
            tells files apart.

    Raises:
        UnknownAdaptorError: There is no such output.
    """

    file_sha256: Tensor

    def __init__(
        self, info: ExportInfo, identity: Identity, output: str | None = None, hub: HubOptions | None = None
    ) -> None:
        chosen = info.output(output)
        super().__init__(info.geometry(chosen), identity)
        self.info = info
        self.output = chosen
        self.adaptors: tuple[str, ...] = ()
        digest = torch.frombuffer(bytearray.fromhex(identity.sha256 or ""), dtype=torch.uint8)
        self.register_buffer("file_sha256", digest)
        self._hub = hub or HubOptions()
        self._text: list[Any] = []  # in a list, so that a tower never becomes a part of the module's state

    @property
    def dtype(self) -> torch.dtype:
        """What the network shows to the outside; a quantised one shows float32."""
        return self.info.dtype

    def with_adaptors(self, names: Sequence[str]) -> ExportedBackbone:
        """Let calls return a dict of the backbone's output and adaptors', as a `RadioModel` with adaptors does.

        Args:
            names: Which of the file's adaptors; none for the chosen output alone.

        Returns:
            The same backbone.

        Raises:
            UnknownAdaptorError: The file has no such adaptor.
        """
        self.adaptors = tuple(self.info.output(name).name for name in dict.fromkeys(names) if name != BACKBONE)
        return self

    def view(self, name: str) -> ExportedBackbone:
        """A backbone that gives one output, of the same file.

        Args:
            name: ``backbone`` or an adaptor's.

        Raises:
            UnknownAdaptorError: There is no such output.
        """
        one = copy.copy(self)
        one.output = self.info.output(name)
        one.geometry = self.info.geometry(one.output)
        one.adaptors, one._text = (), []
        return one

    def get_extra_state(self) -> str:
        """The chosen output's name. In the state dict, as the file's digest is: outputs may have the same sizes."""
        return self.output.name

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> Any:
        """Compute the chosen output, or after `with_adaptors` several by name; see `forward_all`."""
        if self.adaptors:
            wanted = [self.info.output(name) for name in (BACKBONE, *self.adaptors)]
            return self._outputs(images, feature_fmt, wanted)
        return self._outputs(images, feature_fmt, (self.output,))[self.output.name]

    def forward_all(self, images: Tensor, feature_fmt: str = "NLC") -> dict[str, RadioOutput]:
        """Compute all outputs of the file in one pass.

        Args:
            images: [B, 3, H, W] in [0, 1], of a supported size, on any device, of any floating point dtype. B may be
                0. A file for a fixed number of images is run as often as needed, with the last image repeated to fill
                it up.
            feature_fmt: ``NLC``: features [B, L, D]; ``NCHW``: [B, D, h, w]; ``NHWC``: [B, h, w, D].

        Returns:
            Summary and features by output name, on the images' device.

        Raises:
            OptionError: `feature_fmt` is unknown, or the images are not floating point.
            ResolutionError: The image size is not supported; the message names the nearest one that is.
        """
        return self._outputs(images, feature_fmt, self.info.outputs)

    @abstractmethod
    def _compute(self, images: Tensor, wanted: Sequence[OutputInfo]) -> list[RadioOutput]:
        """Run once: contiguous float32 images [b, 3, H, W] to outputs with features as they are stored."""

    @abstractmethod
    def _check_device(self, device: torch.device) -> None:
        """Refuse a device that the file cannot run on."""

    def _outputs(self, images: Tensor, feature_fmt: str, wanted: Sequence[OutputInfo]) -> dict[str, RadioOutput]:
        check_feature_fmt(feature_fmt)
        self._check_images(images)
        if len(images):
            parts = [self._compute(part, wanted) for part in self._batches(images.detach().float())]
        else:  # nothing to compute, which runtimes stumble over
            parts = [[self._allocated(output, images) for output in wanted]]
        height, width = images.shape[-2:]
        found = {}
        for i, output in enumerate(wanted):
            summary = torch.cat([part[i].summary for part in parts])[: len(images)]  # [B, C]
            features = torch.cat([part[i].features for part in parts])[: len(images)]  # as stored
            tokens = map_to_tokens(features) if self.info.feature_fmt == "NCHW" else features  # [B, L, D]
            stride = self.info.patch_size // output.upsample_factor
            found[output.name] = RadioOutput(summary, arrange(tokens, (height // stride, width // stride), feature_fmt))
        return found

    def _allocated(self, output: OutputInfo, images: Tensor) -> RadioOutput:
        """Memory for one output, as it is stored, on the images' device."""
        count, stride = len(images), self.info.patch_size // output.upsample_factor
        h, w = images.shape[-2] // stride, images.shape[-1] // stride
        d = output.embed_dim
        shape = (count, d, h, w) if self.info.feature_fmt == "NCHW" else (count, h * w, d)
        options: dict[str, Any] = {"dtype": torch_dtype(output.dtype), "device": images.device}
        return RadioOutput(torch.empty(count, output.summary_dim, **options), torch.empty(shape, **options))

    def _batches(self, images: Tensor) -> list[Tensor]:
        """Images in parts that the file takes; the last part is filled up with its last image."""
        count = self.info.batch
        if count is None:
            return [images.contiguous()]
        missing = -len(images) % count
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        return [part.contiguous() for part in filled.split(count)]

    def _check_images(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise OptionError(
                f"Images must be floating point in [0, 1], got {images.dtype}. For bytes, pass images.float() / 255."
            )
        self.geometry.check(images, self.identity.source)
        limit = self.info.max_side
        if limit is not None and max(images.shape[-2:]) > limit:
            height, width = images.shape[-2:]
            raise ResolutionError(
                f"{self.identity.source} takes sides of at most {limit} pixels, got {height}x{width} (height x width)."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedBackbone:
        """What `to`, `half`, `cuda` and so on come down to: the file stays as it is, so only what it is is accepted."""
        placed = fn(torch.empty(0, dtype=self.dtype))
        if placed.dtype != self.dtype:
            raise OptionError(
                f"{self.identity.source} was exported in {self.info.precision} and shows {_name(self.dtype)}; it "
                f"cannot be cast to {_name(placed.dtype)}. Leave dtype out, or export the model again."
            )
        self._check_device(placed.device)
        return self

    # ---- text ----

    @property
    def text(self) -> Any:
        """The text side of the chosen adaptor, loaded at the first use.

        Raises:
            CapabilityError: It has none.
        """
        if not self._text:
            teacher = self.output.teacher
            if teacher is None or not has_text_side(teacher):
                raise CapabilityError(
                    f"The output {self.output.name!r} of {self.identity.source} has no text side; choose an adaptor "
                    f"that has one."
                )
            hub = self._hub
            tower = load_text_tower(
                teacher, token=hub.token, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only
            )
            self._text.append(tower)
        return self._text[0]

    @property
    def tokenizer(self) -> Any:
        """A list of strings to tokens; see `text`."""
        return self.text.tokenizer

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokenized text in the space of the chosen adaptor's summary: [N, C], on the CPU; see `text`."""
        embedded: Tensor = self.text.encode_text(tokens, normalize=normalize)
        return embedded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
