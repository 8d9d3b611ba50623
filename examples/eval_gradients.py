"""In-context segmentation with dense FUNGI features, under the options of the published script.

python examples/eval_gradients.py --model dino_vits16 --input-size 512 --patch-size 16 --data-dir VOCSegmentation \
    --gradients-layer backbone.blocks.11.attn.proj --latent-dim 96 --num-negative-neighbors 2 \
    --negative-batch-percent 0.5 --memory-bank support_index/features.pth --scann-index support_index/index \
    --memory-size 102400

The protocol is fungi-paper, with every quirk of the published code. The memory is searched exactly unless
--search scann is given; the support index is searched as create_memory_bank.py was told.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from create_memory_bank import INDEX_FILE
from hummingbird_options import memory_options, parser, setup_for, voc


def main() -> None:
    made = parser("In-context segmentation with FUNGI features.", batch_size=32)
    made.add_argument("--gradients-layer", required=True, help="linear layer whose gradients are taken")
    made.add_argument("--latent-dim", type=int, required=True, help="width of the latents that are contrasted")
    made.add_argument("--num-negative-neighbors", "--n-neighbors", type=int, default=5, help="negatives of each patch")
    made.add_argument("--negative-batch-percent", type=float, default=1.0, help="share of the negatives that is used")
    made.add_argument("--temperature", type=float, default=0.02, help="of the vote of the neighbours")
    made.add_argument("--memory-bank", type=Path, required=True, help="features of the support index")
    made.add_argument("--scann-index", type=Path, required=True, help="folder that create_memory_bank.py made")
    made.add_argument("--projection-matrix", help="not supported: the matrix is drawn from the seed")
    made.add_argument("--use-fp16", action="store_true", help="float16 mixed precision, on a GPU")
    options = made.parse_args()
    if options.projection_matrix:
        made.error("--projection-matrix is not supported: the projection is drawn from --seed")

    import amradio
    from amradio.cli.fungi import DenseFungiOptions
    from amradio.errors import AmradioError
    from amradio.evals.in_context import run_in_context

    try:
        neighbours, search, search_options = read_index(options.scann_index / INDEX_FILE)
        fungi = DenseFungiOptions(
            fungi=True,
            fungi_layer=options.gradients_layer,
            fungi_latent_dim=options.latent_dim,
            fungi_negatives=negatives(options.num_negative_neighbors, neighbours),
            fungi_keep=options.negative_batch_percent,
            fungi_support_neighbours=neighbours,
            fungi_support=options.memory_bank,
        )
        train, config = voc(options, "train"), memory_options(options)
        backbone = amradio.load_backbone(options.model)
        setup = setup_for(options, backbone, half=options.use_fp16)
        wrapped = fungi.with_gradients(backbone, train, config, setup, search=search, search_options=search_options)
        (report,) = run_in_context(wrapped, train, voc(options, "val"), config, setup)
    except AmradioError as error:
        raise SystemExit(f"error: {error}") from None
    print(report.protocol)
    print(f"mIoU: {report.metrics['miou'].value:.2f}")


def read_index(path: Path) -> tuple[int, str, dict[str, Any]]:
    """What create_memory_bank.py noted: how many neighbours the index gives, how it is searched, with which options."""
    if not path.is_file():
        raise SystemExit(f"error: {path.parent} has no {path.name}: run create_memory_bank.py first")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return int(about["num_neighbors"]), str(about["search"]), dict(about["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path} cannot be read ({error}): run create_memory_bank.py again") from None


def negatives(asked: int, neighbours: int) -> int:
    """How many negatives each patch gets: no more than the index has neighbours."""
    if asked <= neighbours:
        return asked
    warnings.warn(
        f"{asked} negatives of each patch were asked for, and the support index gives {neighbours} neighbours, so "
        f"{neighbours} are used. In the published commands a variable is overwritten: where they say --n-neighbors, 2 "
        "negatives were meant. Give --num-negative-neighbors 2.",
        stacklevel=2,
    )
    return neighbours


if __name__ == "__main__":
    main()
