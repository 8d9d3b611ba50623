"""Vision models of transformers as backbones, against the models themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amradio
from amradio.backbones.protocol import HasIntermediates, HasText
from amradio.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    LayoutError,
    OfflineError,
    OptionError,
    UnknownModelError,
)

SIZES = [(32, 32), (48, 24)]
MLP = {"intermediate_size": 256}
KINDS: dict[str, dict[str, Any]] = {
    "Dinov2": {},
    "Dinov2WithRegisters": {"num_register_tokens": 3},
    "DINOv3ViT": {"num_register_tokens": 4, **MLP},
    "ViT": {"layer_norm_eps": 1e-6, **MLP},
    "CLIPVision": MLP,
    "SiglipVision": MLP,
}
PREFIX = {"Dinov2": 1, "Dinov2WithRegisters": 4, "DINOv3ViT": 5, "ViT": 1, "CLIPVision": 1, "SiglipVision": 0}
Save = Callable[..., Path]


def run(model: Any, kind: str, images: Tensor) -> Any:
    switch = {} if kind.startswith("DINO") or kind.startswith("Dino") else {"interpolate_pos_encoding": True}
    return model(images, output_hidden_states=True, **switch)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_models_own(
    kind: str, size: tuple[int, int], toy: Any, saved: Save, standardised: Callable[[Tensor], Tensor]
) -> None:
    theirs = toy(kind, **KINDS[kind])
    ours = amradio.load_backbone(f"hf:{saved(theirs)}")
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        expected, found = run(theirs, kind, standardised(images)), ours(images)
        final, blocks = ours.forward_intermediates(images, [-1, 0], output_fmt="NLC")
    summary = expected.last_hidden_state[:, 0] if kind == "ViT" else expected.pooler_output
    torch.testing.assert_close(found.summary, summary)
    torch.testing.assert_close(found.features, expected.last_hidden_state[:, PREFIX[kind] :])
    torch.testing.assert_close(final, found)
    for block, state in zip(blocks, (expected.hidden_states[-1], expected.hidden_states[1]), strict=True):
        torch.testing.assert_close(block, state[:, PREFIX[kind] :])
    assert (ours.summary_dim, ours.embed_dim, ours.patch_size) == (128, 128, 8)
    assert ours(images, "NCHW").features.shape == (2, 128, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "CLIPVision"])
def test_the_norm_of_the_last_block_is_the_final_one(kind: str, toy: Any, saved: Save) -> None:
    ours = amradio.load_backbone(f"hf:{saved(toy(kind, **KINDS[kind]))}")
    with torch.inference_mode():
        final, (last,) = ours.forward_intermediates(torch.rand(1, 3, 32, 32), 1, norm=True)
    torch.testing.assert_close(last, final.features)


def test_clip_has_no_norm_for_its_patches(toy: Any, saved: Save) -> None:
    ours = amradio.load_backbone(f"hf:{saved(toy('CLIPVision', **MLP))}")
    with pytest.raises(CapabilityError, match="normalises its class token only"):
        ours.forward_intermediates(torch.rand(1, 3, 32, 32), 1, norm=True)


def test_siglip_without_its_head_gives_the_mean(toy: Any, saved: Save) -> None:
    ours = amradio.load_backbone(f"hf:{saved(toy('SiglipVision', vision_use_head=False, **MLP))}")
    with torch.inference_mode():
        summary, features = ours(torch.rand(2, 3, 32, 16))
    torch.testing.assert_close(summary, features.mean(dim=1))


def test_clip_vision_with_its_projection(toy: Any, saved: Save, standardised: Callable[[Tensor], Tensor]) -> None:
    theirs = toy("CLIPVision", "ModelWithProjection", projection_dim=20, **MLP)
    ours = amradio.load_backbone(f"hf:{saved(theirs)}")
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images).summary, theirs(standardised(images)).image_embeds)
    assert ours.summary_dim == 20


# ---- models with a text half ----

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "cat", "dog"]


def build_dual(kind: str) -> Any:
    import transformers

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, **MLP}
    vision |= {"num_patches": 16} if kind == "Siglip2" else {"image_size": 32}
    special = {"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text = {**TEXT, **special, "max_position_embeddings": 6}
    more = {"projection_dim": 20} if kind == "CLIP" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)


def image_side(model: Any, kind: str, images: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "CLIP":
        output = model.vision_model(images, interpolate_pos_encoding=True)
        return model.visual_projection(output.pooler_output), output.last_hidden_state[:, 1:]
    if kind == "Siglip":
        output = model.vision_model(images, interpolate_pos_encoding=True)
    else:
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        patches = torch.stack([torch.from_numpy(convert_image_to_patches(i.numpy(), 8)) for i in images])
        grid = torch.tensor([[images.shape[2] // 8, images.shape[3] // 8]] * len(images))
        output = model.vision_model(patches, torch.ones(patches.shape[:2], dtype=torch.int64), grid)
    return output.pooler_output, output.last_hidden_state


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Siglip2"])
def test_a_dual_encoder_embeds_images_and_texts_in_one_space(
    kind: str, size: tuple[int, int], saved: Save, standardised: Callable[[Tensor], Tensor], capfd: Any
) -> None:
    theirs = build_dual(kind)
    folder = saved(theirs)
    save_tokenizer(folder)
    capfd.readouterr()
    ours = amradio.load_backbone(f"hf:{folder}")
    assert "UNEXPECTED" not in "".join(capfd.readouterr())  # the text half is passed over without a word
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        summary, features = image_side(theirs, kind, standardised(images))
        torch.testing.assert_close(ours(images), amradio.RadioOutput(summary, features))
        tokens = ours.tokenizer(["a cat", "dog"])
        ids = tokens if isinstance(tokens, Tensor) else tokens["input_ids"]
        embedded = theirs.get_text_features(input_ids=ids)
        texts = ours.encode_text(tokens)
    expected = embedded if isinstance(embedded, Tensor) else embedded.pooler_output
    torch.testing.assert_close(texts, expected)
    assert texts.shape[1] == ours.summary_dim == summary.shape[1]
    assert isinstance(ours, HasText)
    assert ours.text.logit_scale == pytest.approx(theirs.logit_scale.item())
    assert not [name for name in ours.state_dict() if "text" in name]


def test_models_without_a_text_half_have_no_text_side(toy: Any, saved: Save) -> None:
    ours = amradio.load_backbone(f"hf:{saved(toy('Dinov2'))}")
    assert not isinstance(ours, HasText)
    assert isinstance(ours, HasIntermediates)


# ---- what it says about itself ----


def test_it_is_a_frozen_backbone(toy: Any, saved: Save) -> None:
    folder = saved(toy("Dinov2"))
    ours = amradio.load_backbone(f"hf:{folder}", dtype=torch.bfloat16)
    assert isinstance(ours, amradio.Backbone)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.identity.source == str(folder)
    assert ours.get_nearest_supported_resolution(30, 3) == (32, 8)
    assert ours(torch.rand(1, 3, 16, 16)).features.dtype == torch.bfloat16
    assert ours.input_conditioner.norm_mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"crop_size": {"height": 24, "width": 40}, "size": {"shortest_edge": 64}}, (24, 40)),
        ({"size": {"shortest_edge": 61}}, (64, 64)),
        ({"size": 16}, (16, 16)),
        ({}, (32, 32)),
    ],
)
def test_the_preferred_resolution_is_the_processors(
    described: dict[str, Any], expected: tuple[int, int], toy: Any, saved: Save
) -> None:
    folder = saved(toy("Dinov2"), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **described})
    assert amradio.load_backbone(f"hf:{folder}").preferred_resolution == expected


def test_the_processor_may_be_described_in_the_newer_file(toy: Any, saved: Save) -> None:
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}
    ours = amradio.load_backbone(f"hf:{saved(toy('Dinov2'), nested, 'processor_config.json')}")
    torch.testing.assert_close(ours.input_conditioner.norm_mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_a_processor_that_does_not_standardise(toy: Any, saved: Save) -> None:
    ours = amradio.load_backbone(f"hf:{saved(toy('Dinov2'), {'do_normalize': False})}")
    assert isinstance(ours.input_conditioner, torch.nn.Identity)


# ---- refusals ----


def test_without_a_processor_the_statistics_must_be_given(toy: Any, saved: Save) -> None:
    folder = saved(toy("Dinov2"), {})
    with pytest.raises(OptionError, match=r"no preprocessor_config.json.*Pass mean=\(r, g, b\) and std=\(r, g, b\)"):
        amradio.load_backbone(f"hf:{folder}")
    with pytest.raises(OptionError, match="must be given together"):
        amradio.load_backbone(f"hf:{folder}", mean=(0.5, 0.5, 0.5))
    ours = amradio.load_backbone(f"hf:{folder}", mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3))
    torch.testing.assert_close(ours.input_conditioner.norm_std.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_another_scale_of_pixels_is_refused(toy: Any, saved: Save) -> None:
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}
    with pytest.raises(CapabilityError, match=r"scales pixels by 0.00784314 and not to \[0, 1\]"):
        amradio.load_backbone(f"hf:{saved(toy('Dinov2'), processor)}")


def test_types_whose_layout_is_unknown_are_refused(tmp_path: Path) -> None:
    import transformers

    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(CapabilityError, match=r"type 'bert'.*Known types: dinov2, .*a callable that returns"):
        amradio.load_backbone(f"hf:{tmp_path}")


def test_code_in_a_repository_is_never_executed(tmp_path: Path) -> None:
    described = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    with pytest.raises(CapabilityError, match="which is never executed here"):
        amradio.load_backbone(f"hf:{tmp_path}")


def test_weights_of_another_model_are_refused(toy: Any, saved: Save) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(toy("Dinov2"))
    tensors = load_file(folder / "model.safetensors")
    lost = {k: v for k, v in tensors.items() if "encoder.layer.1" not in k}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointKeyError, match=r"lack \d+ tensors of Dinov2Model, such as encoder.layer.1"):
        amradio.load_backbone(f"hf:{folder}")
    save_file(tensors | {"layernorm.bias": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointShapeError, match=r"layernorm.bias has shape \[3\], and should have \[128\]"):
        amradio.load_backbone(f"hf:{folder}")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        amradio.load_backbone(f"hf:{folder}")


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"has no config\.json"):
        amradio.load_backbone(f"hf:{tmp_path}")
    with pytest.raises(UnknownModelError, match="neither a folder nor a repository on the hub"):
        amradio.load_backbone(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(OfflineError, match="no copy of the configuration of facebook/dinov2-small in the cache"):
        amradio.load_backbone("hf:facebook/dinov2-small", local_files_only=True, cache_dir=tmp_path)


def test_unsupported_sizes_are_refused(toy: Any, saved: Save) -> None:
    ours = amradio.load_backbone(f"hf:{saved(toy('Dinov2'))}")
    with pytest.raises(amradio.AmradioError, match=r"needs multiples of 8 pixels, got 30x32.*supported size is 32x32"):
        ours(torch.rand(1, 3, 30, 32))
