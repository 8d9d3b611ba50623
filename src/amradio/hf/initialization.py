"""Random weights, in the way that transformers asks for: module by module, never over what was loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amradio.models.adaptors import ATTN_LAYER_SCALE, AttentionHead
from amradio.models.configs import RadioConfig
from amradio.models.eradio_bias import PositionBias, relative_coords, relative_index
from amradio.models.eradio_blocks import AttentionBlock
from amradio.models.normalizers import (
    CLIP_MEAN,
    CLIP_STD,
    FeatureNormalizer,
    InputConditioner,
    InterFeatureNormalizer,
)
from amradio.models.radio import RadioModel
from amradio.models.vit import Block, DynamicTanh, LayerScale, VisionTransformer

DYT_ALPHA = 0.5


def initialize(module: nn.Module, radio: RadioConfig, std: float) -> None:
    """Fill the tensors that a module has itself, those of its parts excepted, unless they were loaded.

    Args:
        module: Any module of a `RadioModel`.
        radio: The whole model's description.
        std: Standard deviation of weights.
    """
    from transformers import initialization as init

    values = _values(module, radio)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        value = values.get(name)
        if value is None:
            init.trunc_normal_(tensor, std=std)
        elif isinstance(value, Tensor):
            init.copy_(tensor, value.to(tensor.device, tensor.dtype))
        else:
            init.constant_(tensor, value)
    if isinstance(module, AttentionHead):  # whose blocks do not have the trunk's layer scale
        for block in module.blocks:
            assert isinstance(block, Block)
            for scale in (block.ls1, block.ls2):
                assert scale is not None  # these blocks have them
                init.constant_(scale.gamma, ATTN_LAYER_SCALE)


def _values(module: nn.Module, radio: RadioConfig) -> dict[str, Any]:
    """What the tensors of a module begin as, where that is not random: a number, or a tensor."""
    scale = getattr(radio.backbone, "layer_scale", None)
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        return {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return {"bias": 0.0}
    if isinstance(module, LayerScale):
        return {"gamma": scale or ATTN_LAYER_SCALE}
    if isinstance(module, AttentionBlock):
        return {"gamma1": scale, "gamma2": scale}
    if isinstance(module, DynamicTanh):
        return {"alpha": DYT_ALPHA, "gamma": 1.0, "beta": 0.0}
    if isinstance(module, InputConditioner):
        return {"norm_mean": torch.tensor(CLIP_MEAN).view(-1, 1, 1), "norm_std": torch.tensor(CLIP_STD).view(-1, 1, 1)}
    if isinstance(module, FeatureNormalizer):
        return {"mean": 0.0, "tx": torch.eye(len(module.tx))}
    if isinstance(module, InterFeatureNormalizer):
        eye = torch.eye(module.rotation.shape[-1]).expand(module.rotation.shape)
        return {"alphas": 1.0, "means": 0.0, "rotation": eye}
    if isinstance(module, PositionBias):
        window = module.trained_window
        return {
            "relative_coords_table": relative_coords(window, window),
            "relative_position_index": relative_index(window),
            "relative_bias": 0.0,
        }
    if isinstance(module, RadioModel):
        return {"summary_idxs": torch.tensor(radio.summary_idxs)}
    if isinstance(module, VisionTransformer):
        return {"reg_token": 0.0}
    return {}
