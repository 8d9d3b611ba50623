"""The options that the two published scripts of FUNGI's dense experiments have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amradio.evals.in_context import InContextConfig
    from amradio.evals.runner import Setup
    from amradio.images.segmentation import SegmentationSet

SCANN = {
    "num_leaves": 512,
    "num_leaves_to_search": 32,
    "num_reordering_candidates": 120,
    "anisotropic_quantization_threshold": 0.2,
    "dimensions_per_block": 4,
}
SPLITS = {"train": ("trainaug", "train"), "val": ("val",)}


def parser(description: str, batch_size: int) -> argparse.ArgumentParser:
    """Make a parser of the common options."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", required=True, help="dino_vits16, dino_vitb16, ..., or any other backbone")
    made.add_argument("--data-dir", default="VOCSegmentation", help="Pascal VOC, or a data set in its layout")
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--batch-size", type=int, default=batch_size)
    made.add_argument("--input-size", type=int, default=224, help="side in pixels")
    made.add_argument("--patch-size", type=int, default=16, help="side of the backbone's patches, for a check")
    made.add_argument("--memory-size", type=int, help="patches in the memory; default all")
    made.add_argument("--augmentation-epochs", type=int, default=1)
    made.add_argument("--num-train-samples", type=int, help="use so many training pictures, drawn by the seed")
    made.add_argument("--num-neighbors", type=int, default=30)
    made.add_argument("--search", default="exact", help="exact, scann, or faiss:...")
    for name, value in SCANN.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="of scann")
    return made


def search_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the chosen search is told."""
    return {name: getattr(options, name) for name in SCANN} if options.search == "scann" else {}


def memory_options(options: argparse.Namespace) -> InContextConfig:
    """The protocol of the published code, with the options of the command."""
    from amradio.evals.in_context import InContextConfig, get_protocol

    return InContextConfig(
        protocol=get_protocol("fungi-paper"),
        k=options.num_neighbors,
        temperature=getattr(options, "temperature", 0.02),
        memory_sizes=(options.memory_size,),
        augmentation_epochs=options.augmentation_epochs,
        search=options.search,
        search_options=search_options(options),
        seed=options.seed,
        stream_batch=options.batch_size,
    )


def setup_for(options: argparse.Namespace, backbone: Any, *, half: bool = False) -> Setup:
    """Size of the pictures, and where they are computed."""
    import torch

    from amradio.evals.in_context import in_context_policy
    from amradio.evals.runner import Setup
    from amradio.features import ExtractOptions

    if backbone.patch_size != options.patch_size:
        raise SystemExit(
            f"error: {options.model} has patches of {backbone.patch_size} pixels, not {options.patch_size}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone.to(device)
    autocast = torch.float16 if half and device.type == "cuda" else None
    extract = ExtractOptions(batch_size=options.batch_size, device=device, autocast=autocast)
    return Setup(in_context_policy(backbone, (options.input_size,)), extract)


def voc(options: argparse.Namespace, part: str) -> SegmentationSet:
    """The training or the validation pictures."""
    from amradio.images.segmentation import open_segmentation, segmentation_splits

    known = segmentation_splits(Path(options.data_dir))
    split = next((name for name in SPLITS[part] if name in known), None)
    images = open_segmentation(options.data_dir, split, variant="hbird")
    if part == "train" and options.num_train_samples:
        images = images.subset(min(options.num_train_samples, len(images)), options.seed)  # all, where there are fewer
    return images
