"""Frozen features: images to patch features, and a file that keeps those of a whole set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amradio.backbones.protocol import Backbone, HasIntermediates
from amradio.errors import CapabilityError, OptionError, ResolutionError
from amradio.features.runner import ExtractOptions, is_out_of_memory
from amradio.weights.files import atomic_file

_FORMAT = 1


class FrozenMaps:
    """Runs a backbone over images for its patch features alone.

    Args:
        backbone: In evaluation mode, on the device of the options.
        options: Device, precision and so on.
        layers: Blocks whose features are put side by side; empty: the backbone's own features.
        layer_norm: Whether the norm after the last block is applied to the features of `layers`.

    Raises:
        OptionError: The backbone is in training mode.
        CapabilityError: It does not give features of its blocks, and `layers` asks for them.
    """

    def __init__(
        self, backbone: Backbone, options: ExtractOptions, layers: Sequence[int] = (), *, layer_norm: bool = True
    ) -> None:
        if getattr(backbone, "training", False):
            raise OptionError("The model is in training mode, in which features are random. Call model.eval() first.")
        if layers and not isinstance(backbone, HasIntermediates):
            raise CapabilityError(
                f"A {type(backbone).__name__} does not give features of its blocks, so no layers can be chosen."
            )
        self._backbone: Any = backbone
        self._call: Any = torch.compile(backbone, dynamic=True) if options.compile and not layers else backbone
        self._options = options
        self._layers = list(layers)
        self._norm = layer_norm

    def __call__(self, images: Tensor) -> Tensor:
        """Patch features.

        Args:
            images: uint8, or float in [0, 1]: [B, 3, H, W], whose sides the backbone supports.

        Returns:
            float32 [B, h, w, D] on the device.

        Raises:
            OptionError: Memory ran out, or features are not finite.
            ResolutionError: The backbone does not take images of this size.
        """
        options = self._options
        x = images.to(options.device, non_blocking=True)
        x = (x.float().div_(255) if x.dtype == torch.uint8 else x).to(options.dtype)
        try:
            with (
                torch.no_grad(),  # not inference mode, whose tensors no head could be trained on
                torch.autocast(options.device.type, options.autocast, enabled=options.autocast is not None),
            ):
                maps = self._maps(x).float()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            height, width = images.shape[-2:]
            raise OptionError(
                f"Out of memory for {len(images)} images of {height} x {width} pixels. Choose a smaller batch or a "
                "smaller resolution."
            ) from error
        if not bool(maps.isfinite().all()):
            raise OptionError(
                "Features are NaN or infinite, so the model does not work in this precision. Choose float32, or "
                "bfloat16 instead of float16."
            )
        return maps

    def _maps(self, images: Tensor) -> Tensor:
        if not self._layers:
            found: Tensor = self._call(images, feature_fmt="NHWC").features  # [B, h, w, D]
            return found
        blocks = self._backbone.forward_intermediates(
            images, indices=self._layers, norm=self._norm, output_fmt="NCHW", intermediates_only=True
        )
        maps = [b.features if hasattr(b, "features") else b for b in blocks]
        if len({tuple(m.shape[-2:]) for m in maps}) > 1:
            raise ResolutionError("The chosen layers have grids of different sizes; choose layers of one stage.")
        return torch.cat(maps, dim=1).permute(0, 2, 3, 1)  # [B, h, w, D]


class FeatureFile:
    """Patch features and label counts of many pictures, in two flat files that are read where they lie.

    Args:
        folder: Where the files are, or are to be.
        about: What the features depend on; files that say something else are not used.

    Attributes:
        dim: D, once there are features.
        classes: C, likewise.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._about = json.loads(json.dumps(about))
        self._rows: dict[int, tuple[int, int]] = {}
        self._end = 0
        self.dim = 0
        self.classes = 0
        self._features: np.ndarray | None = None
        self._counts: np.ndarray | None = None

    @property
    def _index(self) -> Path:
        return self._folder / "index.json"

    def load(self) -> bool:
        """Open files that an earlier run finished; returns whether there are any for the same features."""
        try:
            index = json.loads(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if index.get("format") != _FORMAT or index.get("about") != self._about:
            return False
        self.dim, self.classes, self._end = index["dim"], index["classes"], index["patches"]
        if not self._open():
            return False
        self._rows = {int(p): (start, count) for p, start, count in index["rows"]}
        return True

    def write(self, pictures: Any) -> None:
        """Write features as they come, and open them.

        Args:
            pictures: (position, features [P, D], counts [P, C]) of each.

        Raises:
            OptionError: A feature is too large for half precision.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._index.unlink(missing_ok=True)
        self._end = 0
        with (self._folder / "features.f16").open("wb") as features, (self._folder / "counts.i32").open("wb") as counts:
            for position, maps, found in pictures:
                self.dim, self.classes = maps.shape[1], found.shape[1]
                kept = maps.half()
                if not bool(kept.isfinite().all()):
                    raise OptionError(
                        f"Features are as large as {float(maps.abs().max()):.3g}, and half precision, in which they "
                        "are kept, ends at 65504. Choose the protocol ridge, which keeps none, or one with crops."
                    )
                features.write(kept.cpu().numpy().tobytes())
                counts.write(found.int().cpu().numpy().tobytes())
                self._rows[position] = (self._end, len(maps))
                self._end += len(maps)
        index = {
            "format": _FORMAT,
            "about": self._about,
            "dim": self.dim,
            "classes": self.classes,
            "patches": self._end,
            "rows": [[p, *rows] for p, rows in self._rows.items()],
        }
        with atomic_file(self._index) as part:
            Path(part).write_text(json.dumps(index), encoding="utf-8")
        self._open()

    @property
    def positions(self) -> frozenset[int]:
        """Of the pictures that are there."""
        return frozenset(self._rows)

    def read(self, position: int) -> tuple[Tensor, Tensor]:
        """Features float32 [P, D] and counts int32 [P, C] of one picture."""
        assert self._features is not None
        assert self._counts is not None
        start, count = self._rows[position]
        rows = slice(start, start + count)
        return torch.from_numpy(self._features[rows].astype(np.float32)), torch.from_numpy(self._counts[rows].copy())

    def _open(self) -> bool:
        if not self._end:
            return True
        sizes = {"features.f16": 2 * self._end * self.dim, "counts.i32": 4 * self._end * self.classes}
        for name, size in sizes.items():
            path = self._folder / name
            if not path.is_file() or os.path.getsize(path) != size:
                return False
        self._features = np.memmap(self._folder / "features.f16", np.float16, "r", shape=(self._end, self.dim))
        self._counts = np.memmap(self._folder / "counts.i32", np.int32, "r", shape=(self._end, self.classes))
        return True
