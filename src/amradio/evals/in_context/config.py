"""The options of in-context segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from amradio.errors import OptionError
from amradio.evals.in_context.protocol import InContextProtocol, get_protocol

Augmentation = Literal["crop-jitter", "none"]
Storage = Literal["float32", "bfloat16", "float16"]
ScoreAt = Literal["evaluated", "original"]


@dataclass(frozen=True, kw_only=True)
class InContextConfig:
    """How to segment by example.

    Attributes:
        protocol: What is done about the quirks of published code.
        k: Neighbours that vote for each patch.
        temperature: Of the softmax over their cosines.
        memory_sizes: Patches in the memory; None: all patches of all pictures. Several are evaluated in one run, from
            the same features: a smaller memory holds a part of a larger one.
        augmentation_epochs: How often each training picture goes into the memory, each time cropped anew.
        augmentation: ``crop-jitter``: as published: jittered colours, and a random part of at least half the area
            resized. ``none``: pictures as they are evaluated; one epoch then says it all.
        storage: Precision of the features in the memory.
        score_at: ``evaluated``: at the size that the backbone sees. ``original``: at the size of the mask file.
        layer: Block whose features are taken, from 0, or from -1 backwards; None: the backbone's own features.
        layer_norm: Whether the norm that follows the last block is applied to another block's features too.
        search: ``exact``, or an index of `amradio.search.build_index`: ``faiss:...`` or ``scann``.
        search_options: Of that index, such as ``num_leaves``; None stands for its default.
        seed: Of crops, colours and choices of patches.
        stream_batch: Instead of the protocol's.
    """

    protocol: InContextProtocol = field(default_factory=lambda: get_protocol("clean"))
    k: int = 30
    temperature: float = 0.02
    memory_sizes: tuple[int | None, ...] = (None,)
    augmentation_epochs: int = 1
    augmentation: Augmentation = "crop-jitter"
    storage: Storage = "float32"
    score_at: ScoreAt = "evaluated"
    layer: int | None = None
    layer_norm: bool = True
    search: str = "exact"
    search_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    stream_batch: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1 or self.augmentation_epochs < 1:
            raise OptionError(
                f"k and augmentation_epochs must be at least 1, got {self.k} and {self.augmentation_epochs}."
            )
        if not self.temperature > 0:
            raise OptionError(f"temperature must be above 0, got {self.temperature}.")
        sizes = self.memory_sizes
        if not sizes or len(set(sizes)) != len(sizes) or any(s is not None and s < 1 for s in sizes):
            raise OptionError(
                "memory_sizes must be one or several different numbers of at least 1, or None for all patches, got "
                f"{list(sizes)}."
            )
        for name, kind in (("augmentation", Augmentation), ("storage", Storage), ("score_at", ScoreAt)):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(f"{name} must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")
        if self.stream_batch is not None and self.stream_batch < 1:
            raise OptionError(f"stream_batch must be at least 1, got {self.stream_batch}.")
        if self.stream_batch is not None and not self.protocol.is_stream:
            raise OptionError(
                f"Under the protocol {self.protocol.name} no result depends on a batch size, so there is no "
                "stream_batch to choose. Leave it out, or choose hbird-2.0 or fungi-paper."
            )
        if self.augmentation == "none" and self.augmentation_epochs > 1:
            raise OptionError(
                f"{self.augmentation_epochs} epochs without augmentation would put the same patches into the memory "
                "again and again. Choose one epoch, or augmentation='crop-jitter'."
            )
        if self.protocol.is_stream and len({s is None for s in sizes}) > 1:
            raise OptionError(
                f"Under the protocol {self.protocol.name} a memory of all patches and one of limited size draw "
                "different random numbers, so they cannot share a run. Evaluate them one after the other."
            )

    @property
    def used_protocol(self) -> InContextProtocol:
        """The protocol with the batch size that was chosen."""
        return self.protocol if self.stream_batch is None else replace(self.protocol, stream_batch=self.stream_batch)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of the features in the memory."""
        dtype: torch.dtype = getattr(torch, self.storage)
        return dtype

    @property
    def limited(self) -> bool:
        """Whether patches must be chosen."""
        return any(size is not None for size in self.memory_sizes)
