"""Whether an exported file computes what the model does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amradio.backbones.exported import BACKBONE, ExportedBackbone
from amradio.errors import LayoutError
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput
from amradio.models.radio import RadioModel

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference from the model in float32 over the largest value. For int8 there is none to promise."""

_STEPS = ((2, 3), (3, 1), (4, 4))  # sizes to compare at, in resolution steps: wide, tall and square
_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near an exported file is to the model that it was made from.

    Attributes:
        sizes: (height, width) of the random images that both were given.
        difference: Largest difference of each output over its largest value, by output name; infinite where the model
            or the file gave a value that is no finite number.
        cosine: Smallest cosine of the vectors of each output, by output name; -1 where the difference is infinite.
    """

    sizes: tuple[Resolution, ...]
    difference: dict[str, float]
    cosine: dict[str, float]

    def require(self, precision: str, path: str) -> None:
        """Refuse a file that is off by more than its precision explains, or whose values are not finite.

        Args:
            precision: Of the file.
            path: Of the file, for the message.

        Raises:
            LayoutError: It is.
        """
        broken = [name for name, difference in self.difference.items() if not math.isfinite(difference)]
        if broken:
            raise LayoutError(
                f"{path} does not compute what the model does: {', '.join(broken)} is not finite (NaN or infinity) "
                f"there or in the model. In {precision} a value may be too large, as float16 ends at 65504; do not use "
                f"the file, and try another precision."
            )
        tolerance = TOLERANCE.get(precision)
        name, worst = max(self.difference.items(), key=lambda item: item[1])
        if tolerance is not None and worst > tolerance:
            raise LayoutError(
                f"{path} does not compute what the model does: {name} differs by {worst:.2g} of the largest value, "
                f"more than the {tolerance:.0e} that {precision} explains. Do not use the file; try another precision."
            )


def compare(model: RadioModel, exported: ExportedBackbone, sizes: Sequence[Sequence[int]] | None = None) -> Agreement:
    """Give the same random images to a model and to the file that was made from it.

    Args:
        model: The model, in float32, as it was exported.
        exported: The file, loaded.
        sizes: (height, width) in pixels of images; default the file's only size, or a few small ones.

    Returns:
        How near they are.
    """
    info = exported.info
    if sizes is None:
        sizes = [info.size] if info.size else [[side * info.step for side in steps] for steps in _STEPS]
    random = torch.Generator().manual_seed(0)
    place = next(model.parameters()).device
    difference: dict[str, float] = {}
    cosine: dict[str, float] = {}
    with torch.inference_mode():
        for size in sizes:
            images = torch.rand(info.batch or _BATCH, 3, *size, generator=random).to(place)
            output = model(images)
            expected = {BACKBONE: output} if isinstance(output, RadioOutput) else output
            for name, found in exported.forward_all(images).items():
                for part, a, b in zip(RadioOutput._fields, found, expected[name], strict=True):
                    key = f"{name} {part}"
                    difference[key] = max(difference.get(key, 0.0), _difference(a, b))
                    cosine[key] = min(cosine.get(key, 1.0), _cosine(a, b))
    return Agreement(sizes=tuple(Resolution(*size) for size in sizes), difference=difference, cosine=cosine)


def _difference(a: Tensor, b: Tensor) -> float:
    if not _finite(a, b):  # max() would pass over NaN
        return math.inf
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))


def _cosine(a: Tensor, b: Tensor) -> float:
    if not _finite(a, b):
        return -1.0
    return float(F.cosine_similarity(a.float(), b.float(), dim=-1).min())


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
