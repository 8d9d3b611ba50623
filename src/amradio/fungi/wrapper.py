"""What both kinds of FUNGI backbones share: everything about the backbone inside that stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError
from amradio.models.configs import Resolution
from amradio.models.radio import RadioModel
from amradio.weights.checkpoint import Identity


class Wrapper(nn.Module):
    """A backbone around a backbone.

    Args:
        backbone: The one inside; shared, and never changed. Of a RADIO model with adaptors the backbone's own output
            is taken.

    Raises:
        CapabilityError: It is no backbone.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise CapabilityError(
                f"FUNGI wraps a backbone, as amradio.load_backbone returns it, got a {type(backbone).__name__}."
            )
        if isinstance(backbone, RadioModel) and backbone.adaptors:
            backbone = backbone.view("backbone")
        self.base = backbone
        self.training = bool(getattr(backbone, "training", False))

    @property
    def _inner(self) -> Backbone:
        return cast(Backbone, self.base)

    @property
    def patch_size(self) -> int:
        """Pixels between two feature positions."""
        return self._inner.patch_size

    @property
    def min_resolution_step(self) -> int:
        """What both image sides must be multiples of, in pixels."""
        return self._inner.min_resolution_step

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self._inner.embed_dim

    @property
    def summary_dim(self) -> int:
        """Width C of the summary."""
        return self._inner.summary_dim

    @property
    def preferred_resolution(self) -> Resolution | None:
        """(height, width) in pixels that suits the backbone best, if known."""
        return self._inner.preferred_resolution

    @property
    def identity(self) -> Identity:
        """Where the weights came from; the version says that there are gradients in the features."""
        base = getattr(self.base, "identity", None)
        if not isinstance(base, Identity):
            base = Identity(source=type(self.base).__name__, layout="fungi")
        return dataclasses.replace(base, version=f"{base.version or base.source} + {self.description}")

    @property
    def description(self) -> str:
        """What was added, in a few words for reports."""
        raise NotImplementedError

    @property
    def record(self) -> dict[str, Any]:
        """Everything that was added to the backbone inside and that features depend on, as JSON can hold it.

        Evaluations put it into their reports, and compare it before features that were kept are used again.
        """
        raise NotImplementedError

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size in pixels to the nearest (height, width) that the backbone accepts."""
        return self._inner.get_nearest_supported_resolution(height, width)


def tensor_digest(*tensors: Tensor) -> str:
    """SHA-256, in hexadecimal, of the dtypes, shapes and contents of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def public_settings(part: object) -> dict[str, Any]:
    """The public numbers and words, and lists of these, that an object holds."""
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        several = list(value) if isinstance(value, (tuple, list)) else [value]
        plain = all(v is None or isinstance(v, (bool, int, float, str)) for v in several)
        if plain and not name.startswith("_") and name != "training":
            found[name] = several if isinstance(value, (tuple, list)) else value
    return found


def settings_of(part: object) -> dict[str, Any]:
    """The kind of a part (an objective, a projection), its `public_settings`, and a digest of its tensors."""
    state = sorted(part.state_dict().items()) if isinstance(part, nn.Module) else []
    listed = [v for value in vars(part).values() if isinstance(value, (tuple, list)) for v in value]
    tensors = [v for v in (*(t for _, t in state), *listed) if isinstance(v, Tensor)]
    digest = {"sha256": tensor_digest(*tensors)} if tensors else {}
    return {"kind": type(part).__qualname__, **public_settings(part), **digest}
