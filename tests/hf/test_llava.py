"""The LLaVA family with a tower of ours: it trains, generates, is saved and read, and counts tokens right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from amradio.errors import OptionError
from amradio.hf import AmradioModel, AmradioTower, assemble_llava, llava_processor
from amradio.models.configs import RadioConfig, Resolution, ViTConfig
from amradio.models.radio import RadioModel

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "what", "colour", "is", "this", "red", "green", "blue", "?"]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def language_model(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS),
        bos_token_id=1, eos_token_id=2, pad_token_id=3, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tower() -> AmradioTower:
    return AmradioTower.from_encoder("amradio-tiny", reduction="pixel_shuffle", image_size=64).requires_grad_(False)


def picture(colour: str, size: tuple[int, int] = (80, 64)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., ["red", "green", "blue"].index(colour)] += 190
    return Image.fromarray(pixels)


def test_it_learns_to_name_colours_and_says_them(tower: AmradioTower, tmp_path: Path) -> None:
    words = tokenizer()
    processor = llava_processor(tower.config, words)
    model = assemble_llava(tower, language_model(), words.convert_tokens_to_ids("<image>"))
    colours = ["red", "green", "blue"]
    question = "<image> what colour is this ?"
    batch = processor(
        images=[picture(c) for c in colours], text=[f"{question} {c}" for c in colours], return_tensors="pt"
    )
    assert (batch["input_ids"] == model.config.image_token_index).sum(1).tolist() == [4, 4, 4]
    assert model.config.image_seq_length == 4
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) < len(list(model.parameters()))
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(100):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.5
    assert losses[-1] < 0.3
    assert all(p.grad is None for p in tower.parameters())

    model.eval()
    asked = processor(images=[picture(c) for c in colours], text=[question] * 3, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert [words.decode(answer[-1]) for answer in said] == colours

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    reread = AutoProcessor.from_pretrained(tmp_path)(
        images=[picture(c) for c in colours], text=[question] * 3, return_tensors="pt"
    )
    assert torch.equal(reread["pixel_values"], asked["pixel_values"])
    assert torch.equal(reread["input_ids"], asked["input_ids"])
    with torch.no_grad():
        assert torch.equal(again(**reread).logits, model(**asked).logits)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, [-3, -1]])
def test_layers_prefix_tokens_and_any_size(layer: int | list[int]) -> None:
    words = tokenizer()
    tower = AmradioTower.from_encoder("amradio-tiny", prefix_tokens="summary", reduction="average", image_size=64)
    processor = llava_processor(tower.config, words)
    model = assemble_llava(tower, language_model(), words.convert_tokens_to_ids("<image>"), layer).eval()
    batch = processor(
        images=picture("red"), text="<image> what", size={"height": 96, "width": 160}, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (1, 3, 96, 160)
    kept = len(tower.config.prefix_indices)
    assert kept > 0
    assert int((batch["input_ids"] == model.config.image_token_index).sum()) == kept + 3 * 5
    layers = [layer] if isinstance(layer, int) else layer
    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    wanted = model.model.multi_modal_projector(torch.cat([states[i] for i in layers], -1))
    found = model.get_image_features(**{"pixel_values": batch["pixel_values"]}).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), wanted)
    assert model(**batch).logits.isfinite().all()


@torch.no_grad()
def test_tiles_of_llava_next(tower: AmradioTower) -> None:
    config = LlavaNextConfig(
        vision_config=tower.config, text_config=language_model().config, image_token_index=5,
        image_grid_pinpoints=[[64, 128], [128, 64]], vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    tiles = torch.rand(1, 3, 3, 64, 64)  # the whole and two tiles
    features = model.get_image_features(tiles, torch.tensor([[60, 128]])).pooler_output
    assert features[0].shape[1] == 32
    count = len(features[0])
    assert 4 + 8 <= count <= 4 + 2 * (4 + 1)  # the whole, and the tiles' rows with a token for each line's end
    ids = torch.tensor([[1, *[5] * count, 4]])
    assert model(input_ids=ids, pixel_values=tiles, image_sizes=torch.tensor([[60, 128]])).logits.isfinite().all()


def test_activations_can_be_recomputed() -> None:
    words = tokenizer()
    tower = AmradioTower.from_encoder(AmradioModel.from_radio(small_radio()))
    model = assemble_llava(tower, language_model(), 5).train()
    ids = torch.tensor([[1, *[5] * 16, 4]])
    pixels = torch.rand(1, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.activation_checkpointing_enable() if enable else model.activation_checkpointing_disable()
        assert tower.gradient_checkpointing is tower.encoder.gradient_checkpointing is enable
        model.zero_grad()
        torch.manual_seed(0)  # positions are cropped at random
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    words.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    llava_processor(tower.config, words)
    assert "<|end|>" in words.all_special_tokens


def small_radio() -> RadioModel:
    trunk = ViTConfig(embed_dim=24, depth=2, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(8, 8))
    return RadioModel(RadioConfig(backbone=trunk, preferred_resolution=Resolution(32, 32)))


@torch.no_grad()
def test_tiles_of_llava_onevision(tower: AmradioTower) -> None:
    config = LlavaOnevisionConfig(
        vision_config=tower.config, text_config=language_model().config, image_token_index=5,
        image_grid_pinpoints=[[64, 128], [128, 64]], vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    features = model.get_image_features(torch.rand(1, 3, 3, 64, 64), torch.tensor([[60, 128]])).pooler_output
    ids = torch.tensor([[1, *[5] * len(features[0]), 4]])
    tiles = torch.rand(1, 3, 3, 64, 64)
    assert model(input_ids=ids, pixel_values=tiles, image_sizes=torch.tensor([[60, 128]])).logits.isfinite().all()


def test_parts_are_shared_and_the_vocabulary_grows_only_if_it_must(tower: AmradioTower) -> None:
    words = language_model(tie_word_embeddings=True)
    model = assemble_llava(tower, words, 5)
    assert model.lm_head.weight is words.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert words.config.vocab_size == len(WORDS)
    assert model.model.vision_tower is tower
    assert not any(p.is_meta for p in model.parameters())
    assert assemble_llava(tower, language_model(), 12).lm_head.weight.shape[0] == 64
    with pytest.raises(OptionError, match=r"tower is in torch.float32 and the language model in torch.bfloat16"):
        assemble_llava(tower, language_model().to(torch.bfloat16), 5)
    with pytest.raises(OptionError, match="A LlamaModel predicts no words"):
        assemble_llava(tower, LlamaModel(words.config), 5)
