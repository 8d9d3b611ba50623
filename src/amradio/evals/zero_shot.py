"""Zero-shot classification: pictures are compared with descriptions of the classes, and nothing is learned.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4: a class is
the mean of the embeddings of its name in many templates. RADIO takes an adaptor's summary for the image side and the
adaptor's teacher for the text side.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from amradio.backbones.ablation import skipped_blocks
from amradio.backbones.protocol import Backbone
from amradio.errors import DatasetError
from amradio.evals.classification import ClassificationTally, confusion_detail
from amradio.evals.classifier_cache import ClassifierCache, StoredClassifier
from amradio.evals.report import EvalReport, Metric
from amradio.evals.runner import Measurement, Setup, class_count, labels_of, policy_for
from amradio.evals.streaming import FeaturePass, own_part
from amradio.evals.texts import Calibration, calibration_of, check_text, embed_texts, load_text_in_turn, shared_out
from amradio.text.prompts import IMAGENET, check_templates, load_class_names, load_templates, prompts

if TYPE_CHECKING:
    from amradio.distributed import Group
    from amradio.images.dataset import ImageSet

_ROWS_AT_ONCE = 256
_IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """How to classify by descriptions.

    Attributes:
        templates: ``openai`` (80), ``simple`` (7), ``base`` (1), or the path of a file; see
            `amradio.text.prompts.load_templates`.
        class_names: ``dataset``: its own; ``imagenet``: open_clip's for ImageNet-1k, which published numbers use; the
            path of a file; ``auto``: those of ImageNet for a set that can be told to have its 1000 classes (see
            `resolve_class_names`), else its own.
        drop_span: Blocks of the trunk to leave out; see `amradio.backbones.ablation.skipped_blocks`.
    """

    templates: str = "openai"
    class_names: str = "auto"
    drop_span: tuple[int, ...] = ()


def build_classifier(
    backbone: Backbone,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    group: Group | None = None,
) -> Tensor:
    """Describe classes in the space of a backbone's summaries.

    Args:
        backbone: With a text side.
        class_names: K names.
        templates: Prompt templates; see `amradio.text.prompts`.
        batch_size: Most prompts in one forward pass.
        device: Of the backbone.
        group: Processes among which the classes are shared out. All of them get the whole classifier.

    Returns:
        [K, C] float32 on the CPU: for each class the mean of its prompts' embeddings, each of length 1, scaled to
        length 1 again.

    Raises:
        CapabilityError: The backbone has no text side.
        OptionError: A template has no place for the name of a class.
    """
    check_templates(templates)
    load_text_in_turn(backbone, group)
    step = max(batch_size // len(templates), 1)  # classes at once

    def rows(own: range) -> Tensor:
        means = [torch.zeros(0, backbone.summary_dim)]
        for start in range(own.start, own.stop, step):
            names = class_names[start : min(start + step, own.stop)]
            texts = [text for name in names for text in prompts(templates, name)]
            embeddings = embed_texts(backbone, texts, batch_size=batch_size, device=device)  # [n * T, C]
            means.append(embeddings.unflatten(0, (len(names), len(templates))).mean(1))  # [n, C]
        return F.normalize(torch.cat(means), dim=1)  # [K_r, C]

    return shared_out(len(class_names), group, rows)  # [K, C]


def similarities(summaries: Tensor, classifier: Tensor) -> Tensor:
    """Compare pictures with classes.

    Args:
        summaries: [B, C].
        classifier: [K, C] rows of length 1, on the same device.

    Returns:
        Cosine similarities [B, K] in float32.
    """
    return F.normalize(summaries.float(), dim=1) @ classifier.float().T


def resolve_class_names(images: ImageSet, choice: str = "auto") -> tuple[str, tuple[str, ...]]:
    """Decide by which words the classes of a set are described.

    ``auto`` takes ImageNet's list for a set of 1000 classes that are named by WordNet ids (``n01440764``, as the
    folders of ImageNet are), or that is called ImageNet and has no names or names that mean the same in the same order:
    those that come with such data ("tench, Tinca tinca") are not those of the published protocol.

    Args:
        images: The set.
        choice: See `ZeroShotConfig.class_names`.

    Returns:
        Where the names come from (``dataset``, ``imagenet`` or a path), and the name of each label.

    Raises:
        DatasetError: The set has no names of its own, or another number of classes than there are names.
        OptionError: There is no such file.
    """
    if choice == "auto":
        choice = IMAGENET if _is_imagenet(images) else "dataset"
    if choice == "dataset":
        if images.class_names is None:
            raise DatasetError(
                f"{images.name} has labels, but no names for its classes, and zero-shot classification needs them: "
                f"give a file with a name a line, or say class_names={IMAGENET!r}."
            )
        return choice, images.class_names
    names = load_class_names(choice)
    count = class_count(images)
    # Without names only the largest label is known, and a part of a set need not contain it.
    if count > len(names) or (images.class_names is not None and count != len(names)):
        raise DatasetError(
            f"{images.name} has {count} classes, and the class names of {choice!r} are {len(names)}: the labels do not "
            "belong to these names."
        )
    return choice, names


def run_zero_shot(
    backbone: Backbone,
    evaluation: ImageSet,
    config: ZeroShotConfig | None = None,
    setup: Setup | None = None,
    *,
    text_batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    use_cache: bool = True,
) -> EvalReport:
    """Evaluate a backbone by zero-shot classification.

    Args:
        backbone: With a text side, such as the view of a CLIP adaptor.
        evaluation: The labelled pictures to classify.
        config: The protocol's options.
        setup: Size of the pictures, device, processes.
        text_batch_size: Most prompts in one forward pass of the text side.
        cache_dir: Cache root; see `amradio.hub.cache_root`. Classifiers of models whose content is known by a digest
            or a commit are kept there, and the text side is then not loaded again.
        use_cache: Whether a kept classifier is taken.

    Returns:
        The report, on every process.

    Raises:
        CapabilityError: The backbone has no text side.
        DatasetError: Labels or class names are missing, their numbers do not agree, or no picture worked.
        OptionError: There are no such templates, class names or blocks.
    """
    config = config or ZeroShotConfig()
    setup = setup or Setup(policy_for(backbone))
    check_text(backbone)
    labels = torch.from_numpy(labels_of(evaluation).copy())
    names_from, class_names = resolve_class_names(evaluation, config.class_names)
    templates = load_templates(config.templates)
    measurement = Measurement(backbone, setup)
    device, group = setup.options.device, setup.group
    cache = ClassifierCache.of(backbone, class_names, templates, cache_dir)
    with measurement.stage("classifier"):
        stored = cache.load(group) if use_cache else None
        cached = stored is not None
        if stored is None:
            classifier = build_classifier(
                backbone, class_names, templates, batch_size=text_batch_size, device=device, group=group
            )
            stored = StoredClassifier(classifier, calibration_of(backbone))
            cache.save(stored, group)
    counts = _Counts(stored, len(class_names), device)
    with skipped_blocks(backbone, config.drop_span):
        features = FeaturePass(measurement, evaluation, own_part(len(evaluation), group), "summary")
        for batch in features.batches(_ROWS_AT_ONCE):
            summaries = torch.stack([record.outputs["backbone"].summary for record in batch])  # [B, C]
            counts.update(summaries, labels[[record.position for record in batch]])
    features.finish("eval")
    counts.reduce(group)
    tally = counts.tally
    return measurement.report(
        task="zero-shot",
        protocol="cosine similarity of the summary and the mean embedding of each class's prompts; templates: "
        f"{config.templates} ({len(templates)}), class names: {names_from}" + _dropped_text(config.drop_span),
        config=config,
        metrics={name: Metric(value, "%") for name, value in tally.accuracies().items()},
        per_class=tally.per_class(class_names),
        details={
            "templates": list(templates),
            "class_names_from": names_from,
            "classifier_cached": cached,
            "logit_scale": stored.calibration.logit_scale,
            "logit_bias": stored.calibration.logit_bias,
            "mean_probability_of_true_class": counts.mean_probability,
            "confusion": confusion_detail(tally, class_names),
        },
    )


class _Counts:
    """Counts answers batch by batch; pictures are not kept."""

    def __init__(self, stored: StoredClassifier, num_classes: int, device: torch.device) -> None:
        self.tally = ClassificationTally(num_classes)
        self._classifier = stored.classifier.to(device)  # [K, C]
        has_scale = stored.calibration.logit_scale is not None
        self._calibration: Calibration | None = stored.calibration if has_scale else None
        self._probability = torch.zeros((), dtype=torch.float64)

    def update(self, summaries: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            summaries: [B, C].
            targets: int64 [B].
        """
        scores = similarities(summaries.to(self._classifier.device), self._classifier)  # [B, K]
        self.tally.update(scores, targets)
        if self._calibration is not None:
            own = self._calibration.probabilities(scores).cpu().gather(1, targets[:, None])  # [B, 1]
            self._probability += own.double().sum()

    def reduce(self, group: Group | None) -> None:
        """Add what other processes counted."""
        self.tally.reduce(group)
        if group is not None:
            self._probability = group.all_reduce_sum(self._probability)

    @property
    def mean_probability(self) -> float | None:
        """Of the true class; None if the teacher has no logit scale."""
        return None if self._calibration is None else float(self._probability) / max(self.tally.count, 1)


def _is_imagenet(images: ImageSet) -> bool:
    if class_count(images) != _IMAGENET_CLASSES:
        return False
    names = images.class_names
    if names is None:
        return "imagenet" in images.name.lower()
    if all(map(_WORDNET_ID.fullmatch, names)):
        return list(names) == sorted(names)
    return "imagenet" in images.name.lower() and _mean_the_same(names, load_class_names(IMAGENET))


def _mean_the_same(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether most names have a word in common with their counterpart, as those of other lists of ImageNet have."""
    words = [[set(re.findall(r"\w+", name.lower())) for name in side] for side in (names, others)]
    return sum(bool(a & b) for a, b in zip(*words, strict=True)) > len(names) / 2


def _dropped_text(span: Sequence[int]) -> str:
    return f"; without blocks {span[0]} to {span[-1]}" if span else ""
