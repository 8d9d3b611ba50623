"""A vision transformer without some of its blocks: how much does a model depend on them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from amradio.backbones.protocol import Backbone
from amradio.errors import CapabilityError, OptionError
from amradio.models.radio import RadioModel
from amradio.models.view import RadioView


@contextmanager
def skipped_blocks(backbone: Backbone, span: Sequence[int]) -> Iterator[None]:
    """Replace blocks of the trunk by the identity while the context lasts.

    Args:
        backbone: A RADIO model with a vision transformer, or a view of one.
        span: One block, or the first and the last one to skip, both included; negative numbers count from the end.
            Empty: none.

    Raises:
        CapabilityError: The backbone is of another kind.
        OptionError: There are no such blocks.
    """
    if not span:
        yield
        return
    model = backbone.radio if isinstance(backbone, RadioView) else backbone
    if not isinstance(model, RadioModel):
        raise CapabilityError(f"Blocks can be skipped in RADIO models only, not in a {type(backbone).__name__}.")
    blocks = model.blocks
    skipped = _indices(span, len(blocks))
    originals = {i: blocks[i] for i in skipped}
    try:
        for i in skipped:
            blocks[i] = nn.Identity()
        yield
    finally:
        for i, block in originals.items():
            blocks[i] = block


def _indices(span: Sequence[int], depth: int) -> range:
    if len(span) > 2 or not all(-depth <= i < depth for i in span):
        raise OptionError(
            f"A span of blocks is one number, or the first and the last, each from {-depth} to {depth - 1}, got "
            f"{list(span)}."
        )
    first, last = span[0] % depth, span[-1] % depth
    if last < first:
        raise OptionError(f"The span of blocks {list(span)} ends (at block {last}) before it begins (at {first}).")
    return range(first, last + 1)
