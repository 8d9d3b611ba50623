"""Tiny, randomly initialised text towers, saved to disk by transformers itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["a", "photo", "of", "cat", "dog", "ice", "cream", "the"]
TRUNK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def word_tokenizer(begin: str | None, end: str) -> Any:
    """One token a word, without a normaliser: what canonicalisation does not do, nothing does."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<unk>", *([begin] if begin else []), *WORDS, end]  # as in CLIP, the end has the highest id
    ids = {word: i for i, word in enumerate(special)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin + ' ' if begin else ''}$A {end}",
        special_tokens=[(t, ids[t]) for t in (begin, end) if t],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token=begin, eos_token=end
    )


def letter_tokenizer() -> Any:
    """transformers' own SigLIP2 tokenizer, with a byte-pair vocabulary of letters."""
    import transformers
    from tokenizers import processors

    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz!?,.CD", "ca", "cat"]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab={t: i for i, t in enumerate(letters)}, merges=[("c", "a"), ("ca", "t")]
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def build_full(kind: str) -> tuple[Any, Any]:
    """A whole model and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    vision = {**TRUNK, "patch_size": 8}
    if kind == "clip":
        tokenizer = word_tokenizer("<start>", "<end>")
        text = {**TRUNK, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_dim": 77}
        text |= {"eos_token_id": len(tokenizer) - 1, "bos_token_id": 2}
        config: Any = transformers.CLIPConfig(
            text_config=text, vision_config={**vision, "image_size": 16}, projection_dim=20
        )
        model: Any = transformers.CLIPModel(config)
    else:
        siglip2 = kind == "siglip2"
        tokenizer = letter_tokenizer() if siglip2 else word_tokenizer(None, "<end>")
        text = {**TRUNK, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 24}
        text |= {"eos_token_id": 1, "bos_token_id": 2}
        vision |= {"num_patches": 16} if siglip2 else {"image_size": 16}
        prefix = "Siglip2" if siglip2 else "Siglip"
        config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision)
        model = getattr(transformers, f"{prefix}Model")(config)
        model.logit_bias.data.fill_(-16.5)
    model.logit_scale.data.fill_(4.625)
    for parameter in model.parameters():  # the initial values are so small that mistakes would hide in the tolerance
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of whole models: clip, siglip, siglip2."""
    places = {}
    for kind in ("clip", "siglip", "siglip2"):
        places[kind] = tmp_path_factory.mktemp(kind)
        model, tokenizer = build_full(kind)
        model.save_pretrained(places[kind])
        tokenizer.save_pretrained(places[kind])
    return places


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing in this environment asked for offline mode (nothing is fetched all the same)."""
    import huggingface_hub

    for name in ("AMRADIO_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub_cache(tmp_path: Path) -> Callable[..., Path]:
    """Lay a directory's files into a Hugging Face cache, as a download would have left them."""

    def lay(repo: str, files: Path, revision: str = "main") -> Path:
        root = tmp_path / "hub"
        place = root / f"models--{repo.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(files, place / "snapshots" / commit)
        return root

    return lay
