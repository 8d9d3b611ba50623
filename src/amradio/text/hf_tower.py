"""Text towers through ``transformers``: CLIP, SigLIP and SigLIP2, from a directory or from the hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from amradio.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    LayoutError,
    MissingDependencyError,
    OptionError,
    UnsafeCheckpointError,
)
from amradio.hub import HubOptions
from amradio.text.canonicalize import canonicalize
from amradio.text.hub import fetch_description, fetch_first

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_INSTALL = "Install it with `pip install 'amradio[text]'`."


class _Family(NamedTuple):
    """A text tower class of transformers.

    Attributes:
        text_model: Name of the class.
        output: Field of its output with the embeddings.
        logits: Scalars of the full model that a zero-shot classifier needs, and their shape.
        canonical: Whether texts are canonicalised and returned as a batch object (SigLIP), or neither (CLIP).
    """

    text_model: str
    output: str
    logits: Mapping[str, tuple[int, ...]]
    canonical: bool


_CLIP = _Family("CLIPTextModelWithProjection", "text_embeds", {"logit_scale": ()}, False)
_SIGLIP = _Family("SiglipTextModel", "pooler_output", {"logit_scale": (1,), "logit_bias": (1,)}, True)
_SIGLIP2 = _SIGLIP._replace(text_model="Siglip2TextModel")
# Keyed by config.json's model_type: the full model's, then the text half's. The fixed-size SigLIP2 models say "siglip".
_FULL = {"clip": _CLIP, "siglip": _SIGLIP, "siglip2": _SIGLIP2}
_TEXT_ONLY = {"clip_text_model": _CLIP, "siglip_text_model": _SIGLIP, "siglip2_text_model": _SIGLIP2}


@dataclass(frozen=True)
class HFTokenizer:
    """Texts to ids of a fixed length, padded and truncated on the right.

    Attributes:
        tokenizer: A tokenizer of transformers.
        context_length: Number L of tokens a text.
        canonical: Canonicalise first, and return a batch object instead of a tensor.
    """

    tokenizer: Any
    context_length: int
    canonical: bool

    def __call__(self, texts: str | Sequence[str]) -> Any:
        """Tokenise.

        Args:
            texts: One text or several.

        Returns:
            int64 ids [N, L], or a batch object with ``input_ids`` [N, L] if `canonical`.

        Raises:
            OptionError: There is no text, or something else than a text.
        """
        batch: Any = [texts] if isinstance(texts, str) else texts  # callers without a type checker pass anything
        if not isinstance(batch, Sequence) or not batch or not all(isinstance(t, str) for t in batch):
            raise OptionError(f"The tokenizer takes a str or a non-empty sequence of str, got {texts!r:.100}.")
        tokens = self.tokenizer(
            [canonicalize(t) for t in batch] if self.canonical else batch,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            # No mask: SigLIP was trained attending to its padding, and CLIP's causal text tower never sees what follows
            # the end.
            return_attention_mask=False,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return tokens if self.canonical else tokens["input_ids"]


class HFTextTower(nn.Module):
    """The text half of a CLIP, SigLIP or SigLIP2 model of ``transformers`` (a `amradio.text.TextTower`).

    Args:
        text_model: The text model.
        output: Field of its output with the embeddings.
        tokenizer: Texts to tokens.
        embed_dim: Width C of the embeddings.
        logit_scale: As in `amradio.text.TextTower`.
        logit_bias: As in `amradio.text.TextTower`.
    """

    def __init__(
        self,
        text_model: nn.Module,
        *,
        output: str,
        tokenizer: HFTokenizer,
        embed_dim: int,
        logit_scale: float | None = None,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.text_model = text_model
        self.output = output
        self.tokenizer: Callable[..., Any] = tokenizer
        self.embed_dim = embed_dim
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokens.

        Args:
            tokens: Ids [N, L], or a mapping with ``input_ids`` [N, L].
            normalize: Scale every embedding to length 1.

        Returns:
            Embeddings [N, C] in the tower's dtype.
        """
        input_ids = tokens if isinstance(tokens, Tensor) else tokens["input_ids"]
        embeddings: Tensor = getattr(self.text_model(input_ids=input_ids), self.output)  # [N, C]
        return F.normalize(embeddings, dim=-1) if normalize else embeddings


def load_hf_tower(source: str, options: HubOptions, hidden_act: str | None = None) -> HFTextTower:
    """Load the text half of a model in the layout of transformers; the image half is neither built nor read.

    Args:
        source: A local directory, or a repository on the hub (``organisation/name``).
        options: How the hub is asked.
        hidden_act: Activation function in the MLPs, if another than config.json says is wanted.

    Returns:
        The tower on the CPU, in the dtype in which it is stored.

    Raises:
        MissingDependencyError: transformers, or what the tokenizer needs, is not installed.
        LayoutError: There is no config.json.
        CapabilityError: The model is not CLIP, SigLIP or SigLIP2.
        CheckpointError: The weights do not fit.
        DownloadError: Files cannot be fetched; offline and gated repositories have their own subclasses.
    """
    transformers = import_transformers()
    directory = Path(source).expanduser()
    if not directory.is_dir():
        directory = fetch_description(source, options)
        # The same commit for the weights, even if the branch moves meanwhile.
        commit = HubOptions(
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            revision=directory.name,
        )
        fetch_weights(source, commit)
    elif not (directory / "config.json").is_file():
        raise LayoutError(
            f"{directory} has no config.json: a text tower is read from a directory in the layout of transformers "
            "(config.json, weights, tokenizer files, as save_pretrained writes them)."
        )
    config = _load_config(transformers, directory, source)
    family, text_config = _text_side(config, source)
    if hidden_act is not None:
        text_config.hidden_act = hidden_act
    tokenizer = _load_tokenizer(transformers, directory)
    model, scalars = _load_weights(transformers, family, directory, text_config, with_logits=config.model_type in _FULL)
    return HFTextTower(
        model,
        output=family.output,
        tokenizer=HFTokenizer(tokenizer, text_config.max_position_embeddings, family.canonical),
        embed_dim=_embed_dim(family, text_config),
        **scalars,
    )


def import_transformers() -> Any:
    """The package ``transformers``.

    Raises:
        MissingDependencyError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as e:
        raise MissingDependencyError(
            f"This text tower needs the package transformers, which cannot be imported: {e}. {_INSTALL}"
        ) from e


def fetch_weights(repo: str, options: HubOptions) -> None:
    """Fetch a repository's weights, all shards of them, beside its configuration.

    Args:
        repo: ``organisation/name``.
        options: How the hub is asked.

    Raises:
        DownloadError: They cannot be fetched.
    """
    path = fetch_first(repo, _WEIGHTS, options)
    if path.suffix == ".json":
        for shard in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
            fetch_first(repo, [shard], options)


def _load_config(transformers: Any, directory: Path, source: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except ValueError as e:
        raise CapabilityError(f"{source} is a model of a type that transformers does not know: {e}") from e
    except OSError as e:
        raise LayoutError(f"The config.json of {source} cannot be read: {e}") from e


def _text_side(config: Any, source: str) -> tuple[_Family, Any]:
    kind = config.model_type
    if kind in _TEXT_ONLY:
        return _TEXT_ONLY[kind], config
    if kind not in _FULL:
        raise CapabilityError(
            f"{source} is a model of type {kind!r}; text towers are read from models of type "
            f"{', '.join([*_FULL, *_TEXT_ONLY])}."
        )
    text_config = config.text_config
    if kind == "clip":  # the full model's width counts: many published files leave a default in the text part
        text_config.projection_dim = config.projection_dim
    return _FULL[kind], text_config


def _embed_dim(family: _Family, text_config: Any) -> int:
    return int(text_config.projection_size if family.canonical else text_config.projection_dim)


def _load_tokenizer(transformers: Any, directory: Path) -> Any:
    # transformers makes up a tokenizer without words where the files are missing, so they are looked for first.
    vocabularies = [n for n in _VOCABULARIES if (directory / n).is_file()]
    if not vocabularies:
        raise LayoutError(f"{directory} has no tokenizer: none of the files {', '.join(_VOCABULARIES)} is there.")
    # Only the tokenizer: a processor would bring the image side, and with it torchvision.
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except ImportError as e:
        raise MissingDependencyError(
            f"The tokenizer in {directory} needs a package that cannot be imported: {e}. {_INSTALL}"
        ) from e
    except Exception as e:  # the tokenizers package raises bare Exception for a broken file
        if (
            not {"tokenizer.json", "vocab.json"} & set(vocabularies)
            and importlib.util.find_spec("sentencepiece") is None
        ):
            raise MissingDependencyError(
                f"The tokenizer in {directory} is a SentencePiece model, and the package sentencepiece is not "
                f"installed. {_INSTALL}"
            ) from e
        raise LayoutError(f"transformers cannot read the tokenizer in {directory}: {e!s:.300}") from e
    # Training padded on the right. transformers' own SigLIP2 class pads on the left unless the files say otherwise, and
    # the embedding is read at the last position.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _load_weights(
    transformers: Any, family: _Family, directory: Path, text_config: Any, with_logits: bool
) -> tuple[nn.Module, dict[str, float | None]]:
    logits = family.logits if with_logits else {}

    class TextHalf(getattr(transformers, family.text_model)):  # type: ignore[misc]
        """The text model, with the scalars that belong to both halves; everything of the image half is passed over."""

        _keys_to_ignore_on_load_unexpected = (
            r"^vision_model\.",
            r"^visual_projection\.",
            r"^logit_",
            r"\.position_ids$",
        )

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name, shape in logits.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    try:
        model, info = TextHalf.from_pretrained(
            str(directory),
            config=text_config,
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported; they are refused below
        )
    except pickle.UnpicklingError as e:
        raise UnsafeCheckpointError(
            f"The weights in {directory} are not a pickle of plain tensors, and nothing of them was executed: {e}"
        ) from e
    except (OSError, RuntimeError, SafetensorError) as e:
        raise CheckpointError(f"The weights in {directory} cannot be read: {e}") from e
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointShapeError(
            f"The weights in {directory} contradict its config.json: {name} has shape {list(stored)}, and should have "
            f"{list(expected)} ({len(info['mismatched_keys'])} tensors of a wrong shape)."
        )
    missing = set(info["missing_keys"])
    absent = sorted(missing - set(logits))
    if absent:
        raise CheckpointKeyError(
            f"The weights in {directory} lack {len(absent)} tensors of the text tower ({family.text_model}), such as "
            f"{', '.join(absent[:3])}. They belong to another model, or to the image half only."
        )
    scalars: dict[str, float | None] = {}
    for name in logits:
        value = getattr(model, name)
        scalars[name] = None if name in missing else float(value.detach())
        delattr(model, name)
    return model, scalars
