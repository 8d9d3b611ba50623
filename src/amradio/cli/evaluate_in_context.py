"""``amradio eval in-context``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.fungi import DenseFungiOptions
from amradio.cli.segmentation import SegmentationOptions
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.in_context import InContextConfig, Sheet
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.resize import ResizePolicy


@dataclass(frozen=True, kw_only=True)
class InContext(DenseFungiOptions, SegmentationOptions):
    """In-context segmentation: patches are looked up among patches of labelled pictures, which vote for a class.

    Nothing is trained. Pictures with masks are a folder or a tar archive in the layout of Pascal VOC, ADE20K,
    Cityscapes or COCO, or of images, masks and a list of classes; `amradio data check` says what is there.
    """

    protocol: Literal["clean", "hbird-2.0", "fungi-paper"] = "clean"
    """clean: right. Others: as published code does it, with what is wrong in it, so that numbers can be compared."""
    resolution: tyro.conf.UseAppendAction[tuple[Size, ...]] = ()
    """Size that pictures are stretched to: one number for a square, or height and width. Under --mode shortest or
    longest, their shortest or longest side, aspect kept. Default: the model's preferred resolution."""
    k: int = 30
    """Neighbours that vote for each patch."""
    temperature: float = 0.02
    """Of the softmax over the neighbours' cosines."""
    memory_size: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Patches in the memory, chosen evenly over pictures and in favour of rare classes; 0 or default: all. Repeat the
    option for several: all come from one run."""
    augmentation_epochs: int = 1
    """How often each picture goes into the memory, each time cropped anew."""
    augmentation: Literal["crop-jitter", "none"] = "crop-jitter"
    """none: pictures go into the memory as they are segmented, without random crops and colours."""
    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the features in the memory."""
    score_at: Literal["evaluated", "original"] = "evaluated"
    """Score at the size that the model sees, or at that of the mask files."""
    layer: int | None = None
    """Take the features of this block, from 0, or from -1 backwards."""
    layer_norm: bool = True
    """Apply the model's last norm to the features of --layer."""
    search: str = "exact"
    """exact, scann, or faiss: with a factory string, such as faiss:IVF1024,Flat."""
    num_leaves: int | None = None
    """Of scann: partitions of the memory; default 512."""
    num_leaves_to_search: int | None = None
    """Of scann: how many of them a patch is looked up in; default 32."""
    num_reordering_candidates: int | None = None
    """Of scann: of so many, exact scores are computed; default 120."""
    anisotropic_quantization_threshold: float | None = None
    """Of scann; default 0.2."""
    dimensions_per_block: int | None = None
    """Of scann: features that one code stands for; default 4, under hbird-2.0 2."""
    nprobe: int | None = None
    """Of faiss:IVF: lists that a patch is looked up in."""
    stream_batch: int | None = None
    """Under hbird-2.0 and fungi-paper: the batch size of the run that is repeated; default 64 and 32."""
    memory_out: Path | None = None
    """Write the memory to this .safetensors file, with its protocol."""
    memory_in: Path | None = None
    """Use a memory that --memory-out wrote."""
    pictures: int = 0
    """Draw contact sheets of so many pictures: picture, truth, prediction, and the neighbours of some patches."""
    pictures_out: Path = Path("in-context-pictures")
    """Folder for these."""

    @property
    def variant(self) -> Literal["clean", "hbird"]:
        """The other protocols read masks as published code does."""
        return "clean" if self.protocol == "clean" else "hbird"

    def policy(self, backbone: Backbone, resolution: Size | tuple[()]) -> ResizePolicy:
        """Pictures are stretched, so that all of each is scored."""
        from amradio.evals.in_context import in_context_policy

        mode = None if self.mode == "auto" else self.mode
        return in_context_policy(backbone, resolution, mode, self.resize_multiple)

    def amount(self, images: dict[str, Any], backbone: Backbone) -> int:
        """Training pictures once for each epoch, and once more for FUNGI's support index."""
        train = len(images["train"]) * self.augmentation_epochs
        return (0 if self.memory_in else train) + self.support_passes(train) + len(images["eval"])

    def evaluate(self, backbone: Backbone, images: dict[str, Any], setup: Setup) -> list[EvalReport]:
        """One backbone at one size, with all memories."""
        from amradio.evals.in_context import SheetOptions, run_in_context

        sheets = SheetOptions(self.pictures) if self.pictures else None
        config = self._config()
        if self.fungi:  # at each size anew, for the support index is made of patches of that size
            backbone = self.with_gradients(backbone, images["train"], config, setup)
        return run_in_context(
            backbone,
            images["train"],
            images["eval"],
            config,
            setup,
            memory_in=self.memory_in,
            memory_out=self.memory_out,
            sheets=sheets,
            on_sheet=self._draw,
        )

    def _config(self) -> InContextConfig:
        from amradio.evals.in_context import InContextConfig, get_protocol

        names = (
            "num_leaves",
            "num_leaves_to_search",
            "num_reordering_candidates",
            "anisotropic_quantization_threshold",
            "dimensions_per_block",
            "nprobe",
        )
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return InContextConfig(
            protocol=get_protocol(self.protocol),
            k=self.k,
            temperature=self.temperature,
            memory_sizes=tuple(size or None for size in self.memory_size) or (None,),
            augmentation_epochs=self.augmentation_epochs,
            augmentation=self.augmentation,
            storage=self.storage,
            score_at=self.score_at,
            layer=self.layer,
            layer_norm=self.layer_norm,
            search=self.search,
            search_options=chosen,
            seed=self.seed,
            stream_batch=self.stream_batch,
        )

    def check(self) -> None:
        """Refuse options that do not fit together before anything is read."""
        self._config()
        several = len(self.model) > 1 or len(self.resolution) > 1
        if several and (self.memory_out is not None or self.memory_in is not None):
            raise OptionError(
                "A memory belongs to one model at one resolution: --memory-out and --memory-in take one --model and "
                "one --resolution."
            )
        self.check_gradients(self.protocol)
        if self.fungi and self.layer is not None:
            raise OptionError("--fungi takes gradients of the whole backbone, so it cannot be combined with --layer.")
        if self.pictures < 0:
            raise OptionError(f"--pictures must be at least 0, got {self.pictures}.")

    def _draw(self, sheet: Sheet) -> None:
        from amradio.viz.contact_sheet import contact_sheet

        self.pictures_out.mkdir(parents=True, exist_ok=True)
        page = contact_sheet(sheet)
        for i in itertools.count(1):  # another model, size or memory does not replace what is there
            path = self.pictures_out / (f"{sheet.id}.png" if i == 1 else f"{sheet.id}-{i}.png")
            try:
                with path.open("xb") as file:
                    page.save(file, "PNG")
                return
            except FileExistsError:
                continue

    def _print(self, reports: Sequence[EvalReport]) -> None:
        if not self.json:
            for words in dict.fromkeys(report.protocol for report in reports):
                print(words)
            print()
        super()._print(reports)
        if self.pictures and not self.json:
            print(f"\ncontact sheets are in {self.pictures_out}", file=sys.stderr)
