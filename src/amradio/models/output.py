"""What every backbone returns."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from amradio.errors import OptionError

FeatureFormat = Literal["NLC", "NCHW", "NHWC"]
FEATURE_FORMATS: tuple[str, ...] = get_args(FeatureFormat)


class RadioOutput(NamedTuple):
    """A summary vector and a map of spatial features for each image.

    Attributes:
        summary: One vector an image, [B, C].
        features: One vector a position: [B, L, D] (``NLC``), [B, D, h, w] (``NCHW``) or [B, h, w, D] (``NHWC``).
    """

    summary: Tensor
    features: Tensor

    def to(self, *args: Any, **kwargs: Any) -> RadioOutput:
        """Move or cast both tensors, with the arguments of `torch.Tensor.to`. A member that is None stays None."""
        members: tuple[Tensor | None, ...] = self
        moved: list[Any] = [None if t is None else t.to(*args, **kwargs) for t in members]
        return RadioOutput(*moved)


class HiddenStates(NamedTuple):
    """What a model computes, and the sequences on the way.

    Attributes:
        outputs: What `RadioModel.forward` gives.
        last: The final sequence, class and register tokens before patches: [B, P + L, C]. Of E-RADIO, which has no
            tokens, the features [B, L, D].
        states: The embedded image and then the sequence after each block, [B, P + L, C] each; of E-RADIO the map
            after each stage, [B, C_i, h_i, w_i]. Empty unless they were asked for.
    """

    outputs: RadioOutput | dict[str, RadioOutput]
    last: Tensor
    states: tuple[Tensor, ...]


def check_feature_fmt(feature_fmt: str, name: str = "feature_fmt", known: tuple[str, ...] = FEATURE_FORMATS) -> None:
    """Refuse an unknown feature format before any work is done.

    Args:
        feature_fmt: The format asked for.
        name: How the option is called at the place of use.
        known: The valid values.

    Raises:
        OptionError: The format is unknown.
    """
    if feature_fmt not in known:
        raise OptionError(f"Unsupported {name}: {feature_fmt!r}. Must be one of {list(known)}.")


def arrange(features: Tensor, grid: tuple[int, int], feature_fmt: str) -> Tensor:
    """Bring row-major tokens into a feature format, as a view.

    Args:
        features: [B, L, D] with L = h * w.
        grid: (h, w).
        feature_fmt: ``NLC``, ``NCHW`` or ``NHWC``.

    Returns:
        [B, L, D], [B, D, h, w] or [B, h, w, D].
    """
    if feature_fmt == "NLC":
        return features
    maps: Tensor = features.unflatten(1, grid)  # [B, h, w, D]
    return maps if feature_fmt == "NHWC" else maps.permute(0, 3, 1, 2)  # [B, D, h, w]
