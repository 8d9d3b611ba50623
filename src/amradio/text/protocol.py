"""What every text tower can do, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class TextTower(Protocol):
    """Texts go in as tokens, embeddings comparable with an adaptor's summary come out.

    Attributes:
        embed_dim: Width C of an embedding.
        tokenizer: One text or a sequence of texts to tokens of the fixed length L that the tower was trained with. The
            tokens have a ``.to(device)``: an int64 tensor [N, L] for CLIP, for SigLIP a batch object with
            ``input_ids`` [N, L].
        logit_scale: Natural logarithm of the factor on cosine similarities, as learnt by the teacher; None if not
            stored.
        logit_bias: Bias added after scaling, learnt by SigLIP-type teachers; None if there is none or it is not stored.
    """

    tokenizer: Callable[..., Any]
    embed_dim: int
    logit_scale: float | None
    logit_bias: float | None

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokens.

        Args:
            tokens: What `tokenizer` returned, on the tower's device.
            normalize: Scale every embedding to length 1.

        Returns:
            Embeddings [N, C] in the tower's dtype.
        """
        ...

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device or dtype, as `torch.nn.Module.to`."""
        ...
