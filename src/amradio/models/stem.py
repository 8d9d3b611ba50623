"""A convolutional way from pixels to tokens: EfficientNet-Lite0 in place of the patch embedding.

A small student has little capacity to spare for edges and textures, and little data to learn them from; it can inherit
them from a teacher. The network's pooled vector goes into the class tokens, which would otherwise have to gather in a
few blocks what the convolutions know of the whole picture. What follows (positions, blocks) is the same as with plain
patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.models.efficientnet import HEAD_WIDTH, LITE0, STAGE_OF_STRIDE, EfficientNetLite

PATCH_SIZE = 16


class EfficientNetStem(nn.Module):
    """Tokens from EfficientNet-Lite0's maps of stride 16 and 32, joined; norms are folded into the convolutions.

    Args:
        embed_dim: Width C of a token.
        num_cls_tokens: Class tokens, to each of which the pooled vector adds something of its own.
    """

    def __init__(self, embed_dim: int, num_cls_tokens: int) -> None:
        super().__init__()
        self.num_cls_tokens = num_cls_tokens
        self.network = EfficientNetLite(folded=True)
        self.project = nn.Linear(sum(LITE0[i].width for i in STAGE_OF_STRIDE.values()), embed_dim)
        self.project_pooled = nn.Linear(HEAD_WIDTH, num_cls_tokens * embed_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W are multiples of 16.

        Returns:
            Tokens [B, h*w, C] with h = H/16 and w = W/16, and what is added to the class tokens [B, num_cls, C].
        """
        maps = self.network.maps(images)
        fine = maps[16]  # [B, 112, h, w]
        coarse = F.interpolate(maps[32], scale_factor=2, mode="bilinear")  # [B, 320, 2*ceil(h/2), 2*ceil(w/2)]
        coarse = coarse[..., : fine.shape[-2], : fine.shape[-1]]  # [B, 320, h, w]
        joined = torch.cat([fine, coarse], dim=1).flatten(2).transpose(1, 2)  # [B, h*w, 432]
        # Normalised, for the vector's length says more of contrast than of content.
        pooled = F.layer_norm(self.network.pooled(maps[32]), (HEAD_WIDTH,))  # [B, 1280]
        whole = self.project_pooled(pooled).unflatten(1, (self.num_cls_tokens, -1))  # [B, num_cls, C]
        return self.project(joined), whole
