"""``amradio eval zero-shot`` and ``amradio eval retrieval``: pictures against texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from amradio.cli.evaluation import EvalCommand

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.captions import CaptionedImages
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.dataset import ImageSet


@dataclass(frozen=True, kw_only=True)
class ZeroShot(EvalCommand):
    """Zero-shot classification: each class is described in words, and the most similar description wins.

    Needs a text side: an adaptor with a CLIP or SigLIP type teacher (--adaptor clip), or an hf: model of these types.
    """

    dataset: Annotated[str, tyro.conf.arg(aliases=["--eval", "--eval-dataset"])]
    """Labelled pictures: folder of class folders, tar shards, list file, Hugging Face dataset, ..."""
    split: Annotated[str | None, tyro.conf.arg(aliases=["--eval-split"])] = None
    """Its part; default validation where there are several."""
    templates: str = "openai"
    """Prompt templates: openai (80), simple (7), base (1), or a file with a template a line."""
    class_names: str = "auto"
    """dataset: its own names; imagenet: those of the published protocol; or a file with a name a line. auto: imagenet
    for data with the 1000 classes of ImageNet, else dataset."""
    drop_span: str = ""
    """Leave out blocks of the model: one number, or FIRST:LAST, both included; negative numbers count from the end."""
    text_batch_size: int = 256
    """Most prompts in one forward pass of the text side."""
    fresh_classifier: bool = False
    """Embed the prompts anew instead of taking an earlier result from the cache."""

    def open(self) -> dict[str, ImageSet]:
        """The pictures, after a check that all have a label and all classes a name."""
        from amradio.evals.runner import labels_of
        from amradio.evals.zero_shot import resolve_class_names

        images = self.open_set(self.dataset, self.split, "validation")
        labels_of(images)
        resolve_class_names(images, self.class_names)  # before a model is loaded
        return {"eval": images}

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.zero_shot import ZeroShotConfig, run_zero_shot

        config = ZeroShotConfig(
            templates=self.templates, class_names=self.class_names, drop_span=_parse_span(self.drop_span)
        )
        return run_zero_shot(
            backbone,
            images["eval"],
            config,
            setup,
            text_batch_size=self.text_batch_size,
            cache_dir=self.cache_dir,
            use_cache=not self.fresh_classifier,
        )


@dataclass(frozen=True, kw_only=True)
class Retrieval(EvalCommand):
    """Zero-shot retrieval: recall@k of captions for pictures and of pictures for captions.

    Needs a text side, as zero-shot does.
    """

    captions: Path
    """A .jsonl file with lines {"path": ..., "captions": [...]}, the captions of COCO, or Karpathy's splits."""
    images: Path | None = None
    """Folder that the paths in it count from; default its own."""
    split: str | None = None
    """Part of Karpathy's splits; default test."""
    k: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """How many of the nearest may hold the right answer; default 1, 5 and 10. Repeat the option for several."""
    captions_per_image: int | None = None
    """Take only the first captions of each picture."""
    text_batch_size: int = 256
    """Most captions in one forward pass of the text side."""

    def open(self) -> dict[str, ImageSet]:
        """The pictures."""
        return {"eval": self._captioned.images}

    def evaluate(self, backbone: Backbone, images: dict[str, ImageSet], setup: Setup) -> EvalReport:
        """One backbone at one size."""
        from amradio.evals.retrieval import RetrievalConfig, run_retrieval

        config = RetrievalConfig(k=self.k or RetrievalConfig.k, captions_per_image=self.captions_per_image)
        return run_retrieval(backbone, self._captioned, config, setup, text_batch_size=self.text_batch_size)

    @cached_property
    def _captioned(self) -> CaptionedImages:
        import numpy as np

        from amradio.evals.captions import load_captions

        captioned = load_captions(self.captions, self.images, self.split)
        if self.limit is None:
            return captioned
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(len(captioned.images))
        return captioned.select(order[: self.limit])


def _parse_span(text: str) -> tuple[int, ...]:
    from amradio.errors import OptionError

    try:
        return tuple(int(word) for word in text.split(":")) if text else ()
    except ValueError:
        raise OptionError(f"--drop-span takes a number or FIRST:LAST, got {text!r}.") from None
