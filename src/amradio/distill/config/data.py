"""Pictures and what is cut out of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from amradio.distill.crops import CropOptions
from amradio.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of pictures.

    Attributes:
        path: Anything that `amradio.images.open_images` opens.
        split: Which part of it.
        limit: Take only the first so many pictures.
        repeat: How often each picture counts in an epoch.
    """

    path: str
    split: str | None = None
    limit: int | None = None
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures and what is cut out of them.

    Attributes:
        sources: Where pictures are; all together are one set.
        crops: How a view of a picture is drawn.
        fixed_views: Number of views of each picture that are ever shown; None draws new ones for ever. Targets of fixed
            views can be cached.
        cache_dir: Where targets of fixed views are kept; None keeps none.
        workers: Decoding threads in each process.
        decode: ``draft`` decodes large JPEGs at a fraction of their size.
    """

    sources: tuple[SourceConfig, ...]
    crops: CropOptions = field(default_factory=CropOptions)
    fixed_views: int | None = None
    cache_dir: str | None = None
    workers: int = 4
    decode: Literal["full", "draft"] = "draft"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one set of pictures.")
        if self.fixed_views is not None and self.fixed_views < 1:
            raise ConfigError(f"data.fixed_views must be at least 1, got {self.fixed_views}.")
        if self.cache_dir is not None and self.fixed_views is None:
            raise ConfigError("data.cache_dir needs data.fixed_views: only targets of fixed views can be cached.")
