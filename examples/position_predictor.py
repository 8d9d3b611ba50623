"""Predict where a patch lies from its feature, under the options of the published RADIO script.

torchrun --nproc-per-node 8 examples/position_predictor.py
"""

from __future__ import annotations

from official_options import evaluate, parser, words


def main() -> None:
    made = parser("Predict where a patch lies from its feature.", "food101", 32, [378, 378])
    made.add_argument("--eval-dataset", help="measure on another dataset")
    made.add_argument("--train-split", default="train", help="part that the predictor learns from")
    made.add_argument("--eval-split", default="validation", help="part that it is measured on")
    made.add_argument("-e", "--num-epochs", type=int, default=5, help="passes over the train split")
    made.add_argument("-lr", "--learning-rate", type=float, default=1e-2, help="of Adam")
    options = made.parse_args()
    report = evaluate(
        "position",
        words(
            options,
            eval_dataset=options.eval_dataset,
            train_split=options.train_split,
            eval_split=options.eval_split,
            epochs=options.num_epochs,
            learning_rate=options.learning_rate,
        ),
    )
    if report is not None:
        for name, metric in report.metrics.items():
            print(f"{name}: {metric.value:.4f}")


if __name__ == "__main__":
    main()
