"""Zero-shot retrieval: find the captions of a picture and the picture of a caption, by cosine similarity.

Recall@k of Karpathy and Fei-Fei 2015, as CLIP-like models report it on COCO and Flickr30k: the share of queries with a
right answer among the k nearest. A picture has several captions, and any of them is a right answer for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from amradio.backbones.protocol import Backbone
from amradio.errors import OptionError
from amradio.evals.captions import CaptionedImages
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, policy_for
from amradio.evals.texts import check_text, embed_texts, load_text_in_turn, shared_out
from amradio.search import top_k

if TYPE_CHECKING:
    from amradio.distributed import Group


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is counted.

    Attributes:
        k: How many of the nearest may hold the right answer.
        captions_per_image: Take only the first captions of each picture; None takes all. COCO has up to 7, and
            published numbers mostly use 5.
    """

    k: tuple[int, ...] = (1, 5, 10)
    captions_per_image: int | None = None

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise OptionError(f"k must be one or several different numbers of at least 1, got {list(self.k)}.")
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise OptionError(f"captions_per_image must be at least 1, got {self.captions_per_image}.")


def recalls(
    images: Tensor,
    texts: Tensor,
    image_of: Tensor,
    k: Sequence[int] = (1, 5, 10),
    *,
    device: torch.device | str | None = None,
    group: Group | None = None,
) -> dict[str, float]:
    """Recall in both directions.

    Answers of equal similarity are ranked by their number, so that results do not depend on the device.

    Args:
        images: [N, C] embeddings of pictures, each of length 1.
        texts: [T, C] embeddings of texts, likewise.
        image_of: int64 [T] the row of each text's picture.
        k: Ranks to look at.
        device: Where similarities are computed.
        group: Processes that share out the queries; all have all rows.

    Returns:
        In percent: ``image_to_text_r1``, ``text_to_image_r1`` and so on.
    """

    def hits_of_images(own: range) -> Tensor:
        found = _nearest(images, texts, own, max(k), device)  # [n, k] texts
        return (image_of[found] == torch.arange(own.start, own.stop)[:, None]).byte()

    def hits_of_texts(own: range) -> Tensor:
        found = _nearest(texts, images, own, max(k), device)  # [n, k] pictures
        return (found == image_of[own.start : own.stop, None]).byte()

    values: dict[str, float] = {}
    for name, count, compute in (
        ("image_to_text", len(images), hits_of_images),
        ("text_to_image", len(texts), hits_of_texts),
    ):
        hits = shared_out(count, group, compute)  # [count, k]
        values |= {f"{name}_r{n}": 100 * float(hits[:, :n].any(1).double().mean()) for n in k}
    return values


def run_retrieval(
    backbone: Backbone,
    captioned: CaptionedImages,
    config: RetrievalConfig | None = None,
    setup: Setup | None = None,
    *,
    text_batch_size: int = 256,
) -> EvalReport:
    """Evaluate a backbone by retrieval between pictures and captions.

    Args:
        backbone: With a text side, such as the view of a CLIP adaptor.
        captioned: The pictures and their captions; see `amradio.evals.captions.load_captions`. Pictures that fail are
            left out together with their captions.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.
        text_batch_size: Most texts in one forward pass.

    Returns:
        The report, on every process.

    Raises:
        CapabilityError: The backbone has no text side.
        DatasetError: No picture worked.
    """
    config = config or RetrievalConfig()
    setup = setup or Setup(policy_for(backbone))
    check_text(backbone)
    if config.captions_per_image is not None:
        captioned = captioned.first(config.captions_per_image)
    measurement = Measurement(backbone, setup)
    device, group = setup.options.device, setup.group
    table = measurement.features("eval", captioned.images)
    row_of = torch.full((len(captioned.images),), -1)
    row_of[table.positions] = torch.arange(len(table.positions))
    rows = row_of[torch.from_numpy(captioned.image_of)]  # [T] -1: the picture failed
    captions = [c for c, row in zip(captioned.captions, rows.tolist(), strict=True) if row >= 0]
    with measurement.stage("texts"):
        load_text_in_turn(backbone, group)
        texts = shared_out(
            len(captions),
            group,
            lambda own: embed_texts(
                backbone, captions[own.start : own.stop], batch_size=text_batch_size, device=device
            ),
        )  # [T, C]
    with measurement.stage("search"):
        images = normalize(table.summaries["backbone"].float(), dim=1)  # [N, C]
        values = recalls(images, texts, rows[rows >= 0], config.k, device=device, group=group)
    return measurement.report(
        task="retrieval",
        protocol="recall@k by cosine similarity of summaries and captions; a picture is found by any of its captions",
        config=config,
        metrics={name: Metric(value, "%") for name, value in values.items()},
        details={"captions": len(captions), "captions_sha256": captioned.fingerprint},
    )


def _nearest(queries: Tensor, database: Tensor, own: range, k: int, device: torch.device | str | None) -> Tensor:
    """The nearest rows [n, min(k, N)] of the database for some of the queries."""
    rows = queries[own.start : own.stop]
    return top_k(rows, database, min(k, len(database)), device=device).indices.cpu()
