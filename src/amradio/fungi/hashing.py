"""Random numbers that belong to an image, not to its place in a batch, an epoch's order or a worker process.

Numbers come from a counter-based generator (SplitMix64, Steele et al. 2014) keyed by a seed and the content of the
image. It is integer arithmetic on the device: equal everywhere, and without waiting for the device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def image_keys(images: Tensor, seed: int = 0, epoch: int = 0) -> Tensor:
    """A key for each image, from its content.

    Args:
        images: [B, 3, H, W] in [0, 1]; rounded to 255 levels, so that equal pictures have equal keys in any dtype that
            holds these levels.
        seed: Of the run.
        epoch: Other epochs have other keys for the same picture.

    Returns:
        int64 [B].
    """
    levels = (images.float() * 255).round().to(torch.int64).flatten(1)  # [B, n]
    places = torch.arange(levels.shape[1], device=levels.device) * _signed(_GOLDEN)  # [n]
    start = _signed(_mix_int(_mix_int(seed) + epoch))
    return _mixed(_mixed(levels + places).sum(1) + start)


def uniform(keys: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), a row for each key.

    Args:
        keys: int64 [B].
        count: Numbers in a row. A longer row begins with the shorter one.

    Returns:
        float32 [B, count], multiples of 2^-24.
    """
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _mixed(keys[:, None] + steps)  # [B, count]
    return _shifted(bits, 40).float() * 2.0**-24


def picture_seed(picture: Tensor, *parts: int | str) -> int:
    """A seed from the content of a picture and whatever else it shall depend on.

    Args:
        picture: uint8 [3, H, W] on the CPU.
        *parts: The seed of the run, the name of a purpose, ...

    Returns:
        A whole number below 2^63.
    """
    digest = hashlib.blake2b(repr((tuple(picture.shape), parts)).encode(), digest_size=8)
    digest.update(picture.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in arithmetic modulo 2^64."""
    x = (x ^ _shifted(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shifted(x, 27)) * _signed(_MIX[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Right shift that fills up with zeros."""
    return (x >> count).bitwise_and(2 ** (64 - count) - 1)


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MIX[1]) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return x - 2**64 if x >= 2**63 else x
