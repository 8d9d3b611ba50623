"""A convolutional way from pixels to tokens: EfficientNet-Lite0 in place of the patch embedding.

A small student has little capacity to spare for edges and textures, and little data to learn them from; it can inherit
them from a teacher. What follows (positions, prefix tokens, blocks) is the same as with plain patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.models.efficientnet import LITE0, STAGE_OF_STRIDE, EfficientNetTrunk

PATCH_SIZE = 16


class EfficientNetStem(nn.Module):
    """Tokens from EfficientNet-Lite0's maps of stride 16 and 32, joined; norms are folded into the convolutions.

    Args:
        embed_dim: Width C of a token.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.network = EfficientNetTrunk(folded=True)
        self.project = nn.Linear(sum(LITE0[i].width for i in STAGE_OF_STRIDE.values()), embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W are multiples of 16.

        Returns:
            Tokens [B, h*w, C] with h = H/16 and w = W/16.
        """
        maps = self.network.maps(images)
        fine = maps[16]  # [B, 112, h, w]
        coarse = F.interpolate(maps[32], scale_factor=2, mode="bilinear")  # [B, 320, 2*ceil(h/2), 2*ceil(w/2)]
        coarse = coarse[..., : fine.shape[-2], : fine.shape[-1]]  # [B, 320, h, w]
        joined = torch.cat([fine, coarse], dim=1).flatten(2).transpose(1, 2)  # [B, h*w, 432]
        return self.project(joined)  # type: ignore[no-any-return]
