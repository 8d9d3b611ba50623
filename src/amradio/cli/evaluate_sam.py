"""``amradio eval sam``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from amradio.cli.arguments import Size
from amradio.cli.common import dtype_of
from amradio.cli.evaluation import EvalCommand
from amradio.errors import OptionError

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.resize import ResizePolicy
    from amradio.images.segmentation.objects import CocoInstances
    from amradio.sam import MaskDecoder

OWN = "sam"
"""The word that stands for SAM's own image encoder among models."""

_VAL_SPLITS = ("val2017", "val", "val2014")


@dataclass(frozen=True, kw_only=True)
class Sam(EvalCommand):
    """SAM-COCO: segment objects by their boxes, with SAM's decoder on the features of a backbone.

    `--model sam` measures SAM's own image encoder, to compare with.
    """

    model: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-m"])] = ()
    """Backbone with an adaptor that imitates SAM, or any other whose features the decoder takes; sam: SAM's own image
    encoder. Repeat the option for several."""
    adaptor: Annotated[str | None, tyro.conf.arg(aliases=["--adaptor-name", "-a"])] = None
    """Whose features the decoder gets; of RADIO models the default is sam, or sam3 for SAM 3."""
    data: Path
    """COCO: a folder or tar archive with val2017 and annotations/instances_val2017.json."""
    split: str | None = None
    """Part of it; default val, where there are several."""
    sam: str = "facebook/sam-vit-huge"
    """Whose decoder: a folder that save_pretrained wrote, or a repository; facebook/sam3 for an adaptor sam3."""
    sam_revision: str | None = None
    """Branch, tag or commit of its repository."""
    protocol: Literal["clean", "efficientvit"] = "clean"
    """clean: crowds are left out. efficientvit: as published, with them."""
    mask: Literal["single", "best"] = "single"
    """single: the decoder's one mask for a box, as published; best: of its three, the one that it scores highest."""
    list_file: Path | None = None
    """Take the pictures that this file names, one a line."""
    batch_size: int = 8
    """Most pictures in one forward pass; halved by itself when memory runs out."""
    resolution: tyro.conf.Suppress[tuple[Size, ...]] = ()
    mode: tyro.conf.Suppress[Literal["auto"]] = "auto"
    resize_multiple: tyro.conf.Suppress[int | None] = None
    compile: tyro.conf.Suppress[bool] = False
    decode: tyro.conf.Suppress[Literal["full"]] = "full"
    resizer: tyro.conf.Suppress[Literal["pillow"]] = "pillow"
    label_column: tyro.conf.Suppress[str | None] = None
    image_column: tyro.conf.Suppress[str | None] = None
    _parts: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def open(self) -> dict[str, CocoInstances]:
        """Pictures with their objects."""
        from amradio.images.segmentation import segmentation_splits
        from amradio.images.segmentation.objects import open_coco_instances

        if not self.model:
            raise OptionError(
                f"Name a backbone with an adaptor that imitates SAM, such as --model radio_v2.5-h, or --model {OWN} "
                "for SAM's own image encoder."
            )
        split = self.split
        if split is None:
            known = segmentation_splits(self.data, "coco-instances")
            split = next((name for name in _VAL_SPLITS if name in known), None)
        data = open_coco_instances(self.data, split, list_file=self.list_file)
        return {"eval": data if self.limit is None else data.head(self.limit, self.seed)}

    def load_backbone(self, spec: str, adaptor: str | None, device: Any, *, progress: bool) -> Backbone:
        """Load the backbone, and SAM when it is first needed; of a RADIO model the adaptor that imitates this SAM."""
        from amradio.backbones.dispatch import is_radio

        decoder = self._decoder(device, progress)
        if spec == OWN:
            own: Backbone = self._parts["vision"].to(device=device, dtype=dtype_of(self.dtype))
            return own
        if adaptor is None and is_radio(spec):
            adaptor = decoder.adaptor
        return super().load_backbone(spec, adaptor, device, progress=progress)

    def policy(self, backbone: Backbone, resolution: Size | tuple[()]) -> ResizePolicy:
        """The size that the decoder's grid asks for."""
        from amradio.evals.sam_coco import sam_policy

        return sam_policy(backbone, self._parts["decoder"])

    def evaluate(self, backbone: Backbone, images: dict[str, Any], setup: Setup) -> EvalReport:
        """One backbone."""
        from amradio.evals.sam_coco import SamCocoConfig, run_sam_coco

        config = SamCocoConfig(protocol=self.protocol, mask=self.mask, sam=self.sam)
        return run_sam_coco(backbone, self._parts["decoder"], images["eval"], config, setup)

    def _decoder(self, device: Any, progress: bool) -> MaskDecoder:
        """SAM's decoder, loaded at the first use; its image encoder is kept only if it is evaluated too."""
        from amradio.hub import HubOptions
        from amradio.sam import load_sam

        if not self._parts:
            hub = HubOptions(
                revision=self.sam_revision,
                cache_dir=self.cache_dir,
                local_files_only=self.offline,
                progress=progress,
            )
            decoder, vision = load_sam(self.sam, hub=hub)
            self._parts["decoder"] = decoder.to(device)
            if OWN in self.model:
                self._parts["vision"] = vision
        found: MaskDecoder = self._parts["decoder"]
        return found
