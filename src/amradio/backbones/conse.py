"""EfficientNet-Lite0 as a text-aligned backbone, by the convex combination of semantic embeddings (ConSE).

An ImageNet classifier is turned into a point of a text space: the embeddings of the names of its ten most probable
classes, weighted by their probabilities (Norouzi et al., arXiv 1312.5650, section 3.2; T = 10). The text space is that
of all-MiniLM-L6-v2. The same recipe at every position of the last map gives features in that space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amradio.backbones.adapter import Adapter, Geometry, map_to_tokens
from amradio.backbones.efficientnet import CLASSIFIER, DISTRIBUTION, HALF, STEP, packaged_tensors, renamed
from amradio.errors import CheckpointKeyError
from amradio.hub import HubOptions
from amradio.models.configs import Resolution
from amradio.models.efficientnet import HEAD_WIDTH, EfficientNetLite
from amradio.text.prompts import load_class_names
from amradio.text.sentence import EMBED_DIM, SentenceTower
from amradio.weights.checkpoint import Identity, KeyReport

NAME = "efficientnet-lite0-conse"
TOP_CLASSES = 10


class ConseBackbone(Adapter):
    """Summary and features in the space of sentence embeddings.

    Args:
        network: EfficientNet-Lite0.
        classifier: From its pooled vector [B, 1280] to the logits of classes [B, K].
        embeddings: Unit vectors of the names of the classes [K, 384].
        text: The text side.
        identity: Where the weights came from.
        top_classes: Number T of classes that are combined.
    """

    embeddings: Tensor

    def __init__(
        self,
        network: EfficientNetLite,
        classifier: nn.Linear,
        embeddings: Tensor,
        text: SentenceTower,
        identity: Identity,
        top_classes: int = TOP_CLASSES,
    ) -> None:
        geometry = Geometry(
            patch_size=network.stride,
            embed_dim=EMBED_DIM,
            summary_dim=EMBED_DIM,
            min_resolution_step=STEP,
            preferred_resolution=Resolution(224, 224),
        )
        super().__init__(geometry, identity, HALF, HALF)
        self.network = network
        self.classifier = classifier
        self.top_classes = top_classes
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.text = text

    @property
    def tokenizer(self) -> object:
        """Texts to tokens; see `amradio.text.TextTower`."""
        return self.text.tokenizer

    def encode_text(self, tokens: object, normalize: bool = False) -> Tensor:
        """Embed texts [N, 384]; see `amradio.text.TextTower`."""
        return self.text.encode_text(tokens, normalize)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.network.head(self.network.maps(images)[32])  # [B, 1280, h, w]
        return self.combined(maps.mean(dim=(2, 3))), self.combined(map_to_tokens(maps))

    def combined(self, vectors: Tensor) -> Tensor:
        """Combine the embeddings of the most probable classes.

        Args:
            vectors: [..., 1280], pooled or at positions.

        Returns:
            [..., 384], of length at most 1: the shorter, the less certain.
        """
        logits = self.classifier(vectors)  # [..., K]
        top = logits.topk(self.top_classes, dim=-1)  # the normaliser over all classes cancels
        weights = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(dim=-1))  # [..., K]
        return weights @ self.embeddings.to(weights.dtype)  # [..., 384]


def load_conse(name: str = NAME, *, hub: HubOptions | None = None) -> ConseBackbone:
    """Load EfficientNet-Lite0 with its classifier, in the space of all-MiniLM-L6-v2.

    Args:
        name: ``efficientnet-lite0-conse``.
        hub: How the hub is asked for the text model, should a text need it.

    Returns:
        The backbone. Its feature map has stride 32.

    Raises:
        MissingDependencyError: The package with the weights is not installed.
        CheckpointError: The weights are damaged.
    """
    stored, path, sha256 = packaged_tensors()
    network = EfficientNetLite(32)
    missing, unexpected = network.load_state_dict(renamed(stored), strict=False)
    wanted = [f"{CLASSIFIER}{part}" for part in ("weight", "bias")]
    missing += [name for name in wanted if name not in stored]
    if missing or unexpected:
        raise CheckpointKeyError(KeyReport(tuple(missing), tuple(unexpected)).describe(str(path)))
    classes = load_class_names("imagenet")
    classifier = nn.Linear(HEAD_WIDTH, len(classes))
    classifier.load_state_dict({part: stored[f"{CLASSIFIER}{part}"] for part in ("weight", "bias")})
    text = SentenceTower(hub)
    identity = Identity(
        source=f"{DISTRIBUTION} (PyPI), classes as all-MiniLM-L6-v2 embeds their names",
        layout="package",
        version=name,
        sha256=sha256,
        license="Apache License 2.0",
    )
    return ConseBackbone(network, classifier, text.encode_text(classes, normalize=True), text, identity)
