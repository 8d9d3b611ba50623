"""``amradio visualize``: one inner command a kind of picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from amradio.cli.visualize_maps import PCA, Attention, Norms, Segments
from amradio.cli.visualize_relations import Match, Similarity, Text
from amradio.cli.visualize_video import Video


@dataclass(frozen=True, kw_only=True)
class Visualize:
    """Draw what models see in photos and videos.

    Several models, adaptors, layers and resolutions, given by repeating the option, stand side by side. The same
    command always gives the same file.
    """

    picture: (
        Annotated[PCA, tyro.conf.subcommand("pca")]
        | Annotated[Similarity, tyro.conf.subcommand("similarity")]
        | Annotated[Match, tyro.conf.subcommand("match")]
        | Annotated[Text, tyro.conf.subcommand("text")]
        | Annotated[Segments, tyro.conf.subcommand("segments")]
        | Annotated[Attention, tyro.conf.subcommand("attention")]
        | Annotated[Norms, tyro.conf.subcommand("norms")]
        | Annotated[Video, tyro.conf.subcommand("video")]
    )

    @property
    def json(self) -> bool:
        """Whether errors are printed as JSON."""
        return self.picture.json

    def run(self) -> int:
        """Draw; returns the exit code."""
        return self.picture.run()
