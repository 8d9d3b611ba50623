"""Zero-shot classifiers on disk: to embed 80,000 prompts takes minutes, to read the result takes none."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amradio.backbones.protocol import Backbone
from amradio.evals.runner import model_record
from amradio.evals.texts import Calibration
from amradio.hub import cache_root
from amradio.weights.files import atomic_file

if TYPE_CHECKING:
    from amradio.distributed import Group

_FORMAT = 1  # of the file, and of how a classifier is computed
_CONTENT = ("sha256", "revision", "sha256_of_weights")  # what tells that a model is the same, wherever it lies


@dataclass(frozen=True)
class StoredClassifier:
    """A classifier and what the text side says about its logits.

    Attributes:
        classifier: [K, C] float32 on the CPU.
        calibration: Of the text side.
    """

    classifier: Tensor
    calibration: Calibration


@dataclass(frozen=True)
class ClassifierCache:
    """The place of one classifier, named by a digest of all that it depends on.

    Attributes:
        path: Of the file; None for a model whose content nothing tells, for which nothing is kept.
        key: What the classifier depends on, as JSON.
        shape: (K, C).
    """

    path: Path | None
    key: str
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        class_names: Sequence[str],
        templates: Sequence[str],
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> ClassifierCache:
        """Find the place.

        Args:
            backbone: Its digest, commit and adaptor count.
            class_names: The classes.
            templates: The templates.
            cache_dir: Cache root; see `amradio.hub.cache_root`.
        """
        record = model_record(backbone)
        identity: dict[str, Any] = {name: record.get(name) for name in (*_CONTENT, "adaptor")}
        known = any(identity[name] for name in _CONTENT)
        if identity["sha256_of_weights"]:  # which says nothing of the text side; that is read from the same place
            identity["source"] = record.get("source")
        key = json.dumps(
            {"format": _FORMAT, **identity, "templates": list(templates), "class_names": list(class_names)}
        )
        digest = hashlib.sha256(key.encode()).hexdigest()
        path = cache_root(cache_dir) / "amradio" / "zero-shot" / f"{digest}.safetensors" if known else None
        return cls(path, key, (len(class_names), backbone.summary_dim))

    def load(self, group: Group | None = None) -> StoredClassifier | None:
        """Read the classifier.

        Args:
            group: Either all its processes find it, or none does: machines may have caches of their own.

        Returns:
            The classifier; None if there is none, or the file is damaged.
        """
        stored = self._read()
        everywhere = [stored is not None] if group is None else group.all_gather_objects(stored is not None)
        return stored if all(everywhere) else None

    def save(self, stored: StoredClassifier, group: Group | None = None) -> None:
        """Keep a classifier, once on each machine. A cache that cannot be written gives a warning."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.path is None or (group is not None and group.local_rank != 0):
            return
        metadata = {"key": self.key, "calibration": json.dumps(asdict(stored.calibration))}
        try:
            with atomic_file(self.path) as part:
                save_file({"classifier": stored.classifier.contiguous()}, str(part), metadata)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"The classifier could not be kept in {self.path}: {error}", RuntimeWarning, stacklevel=3)

    def _read(self) -> StoredClassifier | None:
        from safetensors import SafetensorError, safe_open

        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(str(self.path), framework="pt") as file:
                metadata, classifier = file.metadata() or {}, file.get_tensor("classifier")
        except (OSError, SafetensorError):
            return None
        if metadata.get("key") != self.key or tuple(classifier.shape) != self.shape:
            return None
        return StoredClassifier(classifier, Calibration(**json.loads(metadata["calibration"])))
