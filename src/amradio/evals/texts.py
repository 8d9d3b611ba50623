"""The text side of a backbone: texts embedded in batches and shared out over processes, and what logits are made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from amradio.backbones.protocol import Backbone, HasText
from amradio.errors import CapabilityError, ConfigError
from amradio.evals.runner import model_record
from amradio.models.radio import RadioModel

if TYPE_CHECKING:
    from amradio.distributed import Group


@dataclass(frozen=True)
class Calibration:
    """How a teacher turns cosine similarities into logits. Neither number changes which class is the best.

    Attributes:
        logit_scale: Natural logarithm of the factor; None if the teacher does not have it.
        logit_bias: What is added then, by SigLIP-type teachers; None for CLIP-type ones.
    """

    logit_scale: float | None = None
    logit_bias: float | None = None

    def logits(self, similarities: Tensor) -> Tensor:
        """Scale and shift cosine similarities of any shape; without a scale they stay what they are."""
        scaled = similarities if self.logit_scale is None else similarities * math.exp(self.logit_scale)
        return scaled if self.logit_bias is None else scaled + self.logit_bias

    def probabilities(self, similarities: Tensor) -> Tensor:
        """Turn cosine similarities into probabilities, as the teacher was trained to.

        Args:
            similarities: [..., K] of pictures and K texts.

        Returns:
            [..., K]: with a bias (SigLIP) each pair's own probability, which need not sum to 1; otherwise (CLIP) those
            of a choice between the K texts.

        Raises:
            CapabilityError: There is no scale, so there are no probabilities.
        """
        if self.logit_scale is None:
            raise CapabilityError("The text side has no logit scale stored, so similarities give no probabilities.")
        logits = self.logits(similarities)
        return logits.softmax(-1) if self.logit_bias is None else logits.sigmoid()


def check_text(backbone: Backbone) -> HasText:
    """Refuse a backbone without a text side, without loading the text side of one that has it.

    Raises:
        CapabilityError: There is none.
    """
    # Looked up without running it: in some Python versions isinstance() with a protocol would load the text tower.
    if inspect.getattr_static(backbone, "encode_text", None) is not None:
        return cast(HasText, backbone)
    hint = "Backbones with one: adaptors of CLIP and SigLIP type teachers, and hf: models of these types."
    if isinstance(backbone, RadioModel):
        known = ", ".join(backbone.config.adaptors) or "none"
        hint = f"Choose an adaptor whose teacher has one; the checkpoint has the adaptors: {known}."
    raise CapabilityError(
        f"{model_record(backbone)['name']} has no text side, so its summaries cannot be compared with texts. {hint}"
    )


def calibration_of(backbone: Backbone) -> Calibration:
    """Read the logit scale and bias of a backbone's text side; loads it."""
    text = getattr(backbone, "text", backbone)  # a backbone may be its own text side
    return Calibration(_number(text, "logit_scale"), _number(text, "logit_bias"))


def embed_texts(
    backbone: Backbone, texts: Sequence[str], *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Tensor:
    """Embed texts in the space of the summaries.

    Args:
        backbone: With a text side, which computes in its own precision.
        texts: Any number.
        batch_size: Most texts in one forward pass.
        device: Of the backbone.

    Returns:
        [N, C] float32 on the CPU, each of length 1.

    Raises:
        CapabilityError: The backbone has no text side.
        ConfigError: The embeddings are not as wide as the summaries.
    """
    text_side = check_text(backbone)
    rows = [torch.zeros(0, backbone.summary_dim)]
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            tokens = text_side.tokenizer(list(texts[start : start + batch_size])).to(device)
            embeddings = text_side.encode_text(tokens).float()  # [n, C]
            if embeddings.shape[1] != backbone.summary_dim:
                raise ConfigError(
                    f"The text side of {model_record(backbone)['name']} embeds texts in {embeddings.shape[1]} "
                    f"dimensions, and its summaries have {backbone.summary_dim}: it is not the text side of this "
                    "teacher."
                )
            rows.append(normalize(embeddings, dim=1).cpu())
        return torch.cat(rows)


def shared_out(count: int, group: Group | None, compute: Callable[[range], Tensor]) -> Tensor:
    """Compute rows on all processes, each its own part.

    Args:
        count: N.
        group: The processes.
        compute: Gives the rows of a range of numbers; called once in each process, maybe with an empty range.

    Returns:
        [N, ...] on every process.
    """
    if group is None:
        return compute(range(count))
    own = compute(range(count * group.rank // group.world_size, count * (group.rank + 1) // group.world_size))
    return torch.cat(group.all_gather_rows(own))


def load_text_in_turn(backbone: Backbone, group: Group | None) -> None:
    """Load the text side; the first process of each machine downloads, the others find the files there."""
    check_text(backbone)
    if group is not None and group.local_rank != 0:
        group.barrier()
    getattr(backbone, "text", None)
    if group is not None and group.local_rank == 0:
        group.barrier()


def _number(text: Any, name: str) -> float | None:
    value = getattr(text, name, None)
    return None if value is None else float(value)
