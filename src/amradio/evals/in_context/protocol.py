"""Where published code differs from what is right, as switches with names, and the three settings of them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from amradio.errors import OptionError, nearest_names

VoidRule = Literal["exclude", "class-0"]
Miou = Literal["present", "all", "hungarian", "many-to-one-iou", "many-to-one-precision"]
Randomness = Literal["picture", "stream", "shuffled-stream"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HBIRD_STD = (0.229, 0.224, 0.255)
"""The last number is a slip in the published code, for 0.225."""


@dataclass(frozen=True, kw_only=True)
class InContextProtocol:
    """How in-context segmentation is measured, where code bases differ.

    Attributes:
        name: ``clean``, ``hbird-2.0``, ``fungi-paper``, or one of your own.
        void: What pixels without a class are in the memory. ``exclude``: they do not count, a patch's classes are
            shares of its other pixels, and patches of void alone are left out. ``class-0``: class 0.
        miou: Which mean is ``miou``; see `amradio.evals.in_context.metrics.mean_iou`.
        input_std: ``imagenet``: pictures are handed on as they are. ``hbird``: they are changed such that a backbone
            that divides by ImageNet's standard deviation computes with that of the published code.
        nearest: Which pixel of a mask stands for one of a resized mask: the one at its ``centre``, as for the picture,
            or at its upper left ``corner``, which shifts masks against pictures by up to half a pixel.
        randomness: On what crops, colours and choices of patches depend. ``picture``: on seed, id of the picture and
            epoch alone. ``stream``: on one random number generator, used picture after picture in the order of the
            published code without worker processes. ``shuffled-stream``: likewise, in an order drawn from it.
        stream_batch: Pictures in a batch of that code, on which the order of a stream depends.
        spare_rows: What happens to rows of the memory that are left over when its size is no multiple of the number of
            pictures: ``none``: there are none; ``zeros``: features and labels that are zero, which can be found.
        scann_dimensions_per_block: Of the ScaNN index unless chosen.
    """

    name: str
    void: VoidRule = "exclude"
    miou: Miou = "present"
    input_std: Literal["imagenet", "hbird"] = "imagenet"
    nearest: Literal["centre", "corner"] = "centre"
    randomness: Randomness = "picture"
    stream_batch: int = 64
    spare_rows: Literal["none", "zeros"] = "none"
    scann_dimensions_per_block: int = 4

    def __post_init__(self) -> None:
        for field, kind in (("void", VoidRule), ("miou", Miou), ("randomness", Randomness)):
            if getattr(self, field) not in get_args(kind):
                raise OptionError(f"{field} must be one of {list(get_args(kind))}, got {getattr(self, field)!r}.")
        if self.stream_batch < 1:
            raise OptionError(f"stream_batch must be at least 1, got {self.stream_batch}.")

    @property
    def is_stream(self) -> bool:
        """Whether what is drawn for a picture depends on the pictures before it."""
        return self.randomness != "picture"

    def __str__(self) -> str:
        void = "void left out of the memory" if self.void == "exclude" else "void is class 0 in the memory"
        mean = {
            "present": "mIoU over classes that occur",
            "all": "mIoU over all classes",
            "hungarian": "mIoU over all classes, predictions matched to classes (Hungarian)",
            "many-to-one-iou": "mIoU over all classes, each predicted class counted as the one of highest IoU",
            "many-to-one-precision": "mIoU over all classes, each predicted class counted as its most frequent one",
        }[self.miou]
        quirks = [
            f"std {HBIRD_STD}" if self.input_std == "hbird" else "",
            "masks sampled at corners" if self.nearest == "corner" else "",
            f"random numbers in one {self.randomness}, batches of {self.stream_batch}" if self.is_stream else "",
            "spare rows are zeros" if self.spare_rows == "zeros" else "",
        ]
        return "; ".join([f"{self.name}: {void}", mean, *filter(None, quirks)])


PROTOCOLS = {
    p.name: p
    for p in (
        InContextProtocol(name="clean"),
        InContextProtocol(
            name="hbird-2.0",
            void="class-0",
            miou="hungarian",
            input_std="hbird",
            nearest="corner",
            randomness="stream",
            stream_batch=64,
            scann_dimensions_per_block=2,
        ),
        InContextProtocol(
            name="fungi-paper",
            void="class-0",
            miou="hungarian",
            input_std="hbird",
            nearest="corner",
            randomness="shuffled-stream",
            stream_batch=32,
            spare_rows="zeros",
        ),
    )
}
"""The named protocols: what is right; open-hummingbird-eval 2.0.0; the code of the FUNGI paper (arXiv 2407.10964)."""


def get_protocol(name: str) -> InContextProtocol:
    """Find a named protocol.

    Raises:
        OptionError: There is none of this name.
    """
    if name not in PROTOCOLS:
        raise OptionError(f"There is no protocol {name!r}. {nearest_names(name, PROTOCOLS)}")
    return PROTOCOLS[name]
