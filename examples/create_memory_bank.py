"""The support index of dense FUNGI, under the options of the published script.

python examples/create_memory_bank.py --model dino_vits16 --input-size 512 --data-dir VOCSegmentation \
    --memory-bank support_index/features.pth --memory-bank-labels support_index/labels.pth \
    --scann-index support_index/index --memory-size 102400 --num-neighbors 5

The rows and their labels are written where --memory-bank and --memory-bank-labels say. Search is exact unless
--search scann is given; the folder --scann-index gets a file that says how eval_gradients.py is to search the rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from hummingbird_options import memory_options, parser, search_options, setup_for, voc

INDEX_FILE = "index.json"


def main() -> None:
    made = parser("Make the support index of FUNGI: patch features of training pictures.", batch_size=32)
    made.add_argument("--memory-bank", type=Path, required=True, help="file for the features")
    made.add_argument("--memory-bank-labels", type=Path, required=True, help="file for the labels")
    made.add_argument("--scann-index", type=Path, required=True, help="folder that says how to search")
    options = made.parse_args()

    import torch

    import amradio
    from amradio.errors import AmradioError
    from amradio.evals.in_context import build_memory
    from amradio.weights.files import atomic_file

    try:
        backbone = amradio.load_backbone(options.model)
        bank = build_memory(backbone, voc(options, "train"), memory_options(options), setup_for(options, backbone))
    except AmradioError as error:
        raise SystemExit(f"error: {error}") from None
    for path, rows in ((options.memory_bank, bank.features), (options.memory_bank_labels, bank.labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path)
    options.scann_index.mkdir(parents=True, exist_ok=True)
    about = {"num_neighbors": options.num_neighbors, "search": options.search, "options": search_options(options)}
    with atomic_file(options.scann_index / INDEX_FILE) as part:
        part.write_text(json.dumps({**about, "rows": len(bank)}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(bank):,} patches in {options.memory_bank}; search: {options.search}")


if __name__ == "__main__":
    main()
