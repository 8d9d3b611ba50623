"""k-NN classification of summaries, under the options of the published RADIO script.

python examples/knn_classification.py --dataset food101
torchrun --nproc-per-node 8 examples/knn_classification.py --dataset imagenet-1k
"""

from __future__ import annotations

from official_options import evaluate, parser, print_accuracy, words


def main() -> None:
    made = parser("k-NN classification of summaries.", "imagenet-1k", 128, [378, 378])
    made.add_argument("-a", "--adaptor-name", help="classify this adaptor's summaries")
    made.add_argument("--eval-dataset", help="classify another dataset than the one that is searched")
    made.add_argument("--train-split", default="train", help="part that is searched")
    made.add_argument("--eval-split", default="validation", help="part that is classified")
    made.add_argument("-k", type=int, default=20, help="neighbours")
    options = made.parse_args()
    more = words(
        options,
        adaptor=options.adaptor_name,
        eval_dataset=options.eval_dataset,
        train_split=options.train_split,
        eval_split=options.eval_split,
        k=options.k,
    )
    print_accuracy(evaluate("knn", more))


if __name__ == "__main__":
    main()
