"""Zero-shot classification with a text adaptor, under the options of the published RADIO script.

python examples/zero_shot_imagenet.py
torchrun --nproc-per-node 8 examples/zero_shot_imagenet.py --resolution 378 --dataset imagenet_sketch --split train
"""

from __future__ import annotations

from official_options import evaluate, parser, print_accuracy, words


def main() -> None:
    made = parser("Zero-shot classification with a text adaptor.", "imagenet-1k", 128, [378])
    made.add_argument("-a", "--adaptor-name", default="clip", help="adaptor with a text side")
    made.add_argument("--split", default="validation", help="part of the dataset")
    made.add_argument("--templates", default="openai", help="openai (80 prompts), simple (7), base (1), or a file")
    made.add_argument("--drop-span", type=int, nargs="+", help="leave out a block, or blocks FIRST to LAST")
    made.add_argument("--invalidate-cache", action="store_true", help="embed the prompts anew")
    options = made.parse_args()
    span = None if options.drop_span is None else ":".join(map(str, options.drop_span))
    more = words(
        options, adaptor=options.adaptor_name, split=options.split, templates=options.templates, drop_span=span
    )
    print_accuracy(evaluate("zero-shot", more + ["--fresh-classifier"] * options.invalidate_cache))


if __name__ == "__main__":
    main()
