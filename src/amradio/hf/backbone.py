"""`RadioModel` as a backbone of transformers: maps of chosen blocks, for detectors and segmenters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amradio.hf.base import AmradioPreTrainedModel
from amradio.hf.configuration import AmradioConfig
from amradio.hf.library import BackboneMixin, BackboneOutput, capture_outputs
from amradio.hf.modeling import select, warn_of_attentions
from amradio.models.configs import ERadioConfig
from amradio.models.output import arrange


class AmradioBackbone(BackboneMixin, AmradioPreTrainedModel):  # type: ignore[misc]
    """The trunk of a RADIO model, which returns maps.

    Args:
        config: What to build, and in ``out_features`` or ``out_indices`` which maps it returns.
    """

    def __init__(self, config: AmradioConfig) -> None:
        super().__init__(config)
        trunk = self.radio.config.backbone
        if isinstance(trunk, ERadioConfig):
            self.num_features = [trunk.dim * 2**i for i in range(len(trunk.depths))]
        else:
            self.num_features = [trunk.embed_dim] * len(self.stage_names)
        self.has_attentions = not config.is_hybrid
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, output_hidden_states: Any = None, **kwargs: Any) -> Any:
        """Compute the maps of the chosen stages.

        Args:
            pixel_values: [B, 3, H, W] in [0, 1]; see `AmradioModel.forward`.
            output_hidden_states: See `AmradioModel.forward`.
            **kwargs: See `AmradioModel.forward`.

        Returns:
            A ``BackboneOutput``; ``feature_maps`` has one [B, C, h, w] for each of ``out_features``. ``stem`` is the
            embedded image, ``stage1`` the first block, and so on: what `RadioModel.forward_intermediates` gives,
            standardised by stored statistics if the model has any. Of E-RADIO the map after each stage.

        Raises:
            ResolutionError: The image size is not supported.
            OptionError: There is no such hidden state.
        """
        warn_of_attentions(self, kwargs)
        found = self.radio.forward_hidden_states(pixel_values)
        patch = self.radio.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        indices = [i for i, name in enumerate(self.stage_names) if name in self.out_features]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(self._map(found.states[i], i, grid) for i in indices),
            hidden_states=None if wanted is None or wanted is False else select(found, wanted),
        )

    def _map(self, state: Tensor, index: int, grid: tuple[int, int]) -> Tensor:
        """The map [B, C, h, w] of a stage."""
        if self.config.is_hybrid:
            return state
        patches = state[:, self.radio.model.num_prefix_tokens :]  # [B, L, C]
        normalizer = self.radio.inter_feature_normalizer
        if normalizer is not None and index > 0:
            patches, alpha = normalizer(patches, index - 1)
            patches = alpha * patches
        return arrange(patches, grid, "NCHW")
