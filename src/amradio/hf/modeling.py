"""`RadioModel` as a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amradio.errors import OptionError
from amradio.hf.base import AmradioPreTrainedModel
from amradio.hf.configuration import AmradioConfig
from amradio.hf.library import ModelOutput, capture_outputs
from amradio.models.output import HiddenStates, RadioOutput

LORA_TARGETS = ("qkv", "proj", "fc1", "fc2", "w12", "w3")
"""Linear layers of the transformer blocks by name, for ``target_modules`` of PEFT: attention, then either MLP.

Heads of adaptors have layers of these names too; ``exclude_modules=r".*\\badaptors\\b.*"`` leaves them out.
"""


@dataclass
class AmradioModelOutput(ModelOutput):  # type: ignore[misc]
    """What `AmradioModel` computes.

    Attributes:
        last_hidden_state: The final sequence, class and register tokens before patches: [B, P + L, C]. Of E-RADIO,
            which has no tokens, the features.
        pooler_output: The summary, under the name that transformers has for it.
        hidden_states: The embedded image, then the sequence after each block: [B, P + L, C] each. Of E-RADIO the map
            after each stage, [B, C_i, h_i, w_i]. Only if asked for.
        attentions: Attention weights of each block [B, H, N, N], of windowed ones [B * windows, H, n, n]. Only if asked
            for.
        summary: [B, summary_dim].
        features: [B, L, D], or as ``feature_fmt`` says; standardised by stored statistics if the model has any.
        adaptors: Summary and features of each adaptor by name, float32; None if the model has none.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    summary: Tensor | None = None
    features: Tensor | None = None
    adaptors: dict[str, RadioOutput] | None = None


class AmradioModel(AmradioPreTrainedModel):
    """A RADIO model with any number of adaptors, as a model of transformers.

    Args:
        config: What to build; weights are random.
    """

    def __init__(self, config: AmradioConfig) -> None:
        super().__init__(config)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        feature_fmt: str = "NLC",
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> AmradioModelOutput:
        """Compute summary, features and the sequences that they are taken from.

        Args:
            pixel_values: [B, 3, H, W] in [0, 1]; H and W are multiples of the patch size (times the window size).
            feature_fmt: ``NLC``, ``NCHW`` or ``NHWC``; see `RadioModel.forward`.
            output_hidden_states: Whether to return the sequence after each block; numbers return those only, and None
                in place of the others.
            **kwargs: ``output_attentions`` (of use with the eager implementation of attention only) and ``return_dict``
                as everywhere in transformers; others are not used.

        Returns:
            The outputs; the same numbers as `RadioModel.forward`.

        Raises:
            OptionError: ``feature_fmt`` is unknown, or there is no such hidden state.
            ResolutionError: The image size is not supported; the message names the nearest one that is.
        """
        warn_of_attentions(self, kwargs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep = wanted is not None and wanted is not False
        found = self.radio.forward_hidden_states(pixel_values, feature_fmt, keep=keep)
        outputs = found.outputs if isinstance(found.outputs, dict) else {"backbone": found.outputs}
        backbone = outputs["backbone"]
        return AmradioModelOutput(
            last_hidden_state=found.last,
            pooler_output=backbone.summary,
            hidden_states=select(found, wanted) if keep else None,
            summary=backbone.summary,
            features=backbone.features,
            adaptors={k: v for k, v in outputs.items() if k != "backbone"} or None,
        )


def select(found: HiddenStates, wanted: Any) -> tuple[Any, ...]:
    """The states asked for, None in place of the others.

    Args:
        found: All states.
        wanted: True for all of them, an index, or several.

    Returns:
        One entry a state.

    Raises:
        OptionError: There is no such state.
    """
    states = found.states
    if wanted is True:
        return states
    count = len(states)
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    if bad := [i for i in indices if not -count <= i < count]:
        raise OptionError(f"There is no hidden state {bad[0]}: they go from 0 to {count - 1}, or from -{count} to -1.")
    chosen = {i % count for i in indices}
    return tuple(state if i in chosen else None for i, state in enumerate(states))


def warn_of_attentions(model: AmradioPreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Say why attention weights that were asked for will be missing, as transformers' own models do: in the log, once.

    Args:
        model: The model.
        kwargs: Of its forward pass.
    """
    if not kwargs.get("output_attentions", model.config.output_attentions):
        return
    name = model.config._attn_implementation
    if model.config.is_hybrid:
        reason = "E-RADIO's attention weights are not available; only vision transformers' are."
    elif name == "eager":
        return
    else:
        reason = (
            f"Attention weights are computed only by the eager implementation, and {name!r} is in use. Load the model "
            f"with attn_implementation='eager', or call model.set_attn_implementation('eager')."
        )
    from transformers.utils import logging

    logging.get_logger(__name__).warning_once(reason)
