"""SAM from folders and from the hub, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from amradio.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    LayoutError,
    MissingDependencyError,
    OfflineError,
    UnknownModelError,
)
from amradio.hub import HubOptions
from amradio.sam import Sam3Decoder, SamDecoder, load_sam


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_both_kinds(folders: dict[str, Path], sam_models: dict[str, Any]) -> None:
    for kind, expected in (("sam", SamDecoder), ("sam3", Sam3Decoder)):
        loaded = load_sam(folders[kind])
        assert type(loaded.decoder) is expected
        decoder: Any = loaded.decoder
        assert (decoder.grid, decoder.mask_side, decoder.adaptor) == (8, 32, kind)
        assert not decoder.training
        assert not any(p.requires_grad for p in decoder.parameters())
        assert loaded.vision.identity.source == str(folders[kind])
        theirs = sam_models[kind].mask_decoder.state_dict()
        assert all(torch.equal(v, theirs[n]) for n, v in decoder.mask_decoder.state_dict().items())


def test_sam3_as_it_is_published_whole(tmp_path: Path) -> None:
    """The layout of facebook/sam3: a detector and a tracker, which share one image encoder."""
    transformers = pytest.importorskip("transformers", minversion="5.13")
    trunk = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    trunk |= {"image_size": 112, "patch_size": 14, "window_size": 4, "global_attn_indexes": [1]}
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": {"model_type": "sam3_vit_model", "pretrain_image_size": 56, **trunk},
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }
    small = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "projection_dim": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    memory = {f"memory_attention_{n}": 16 for n in ("hidden_size", "feed_forward_hidden_size")}
    memory |= {"memory_encoder_hidden_size": 16, "memory_encoder_output_channels": 4, "mask_downsampler_embed_dim": 16}
    memory |= {"memory_fuser_embed_dim": 16, "memory_fuser_intermediate_dim": 16, "memory_attention_num_layers": 1}
    config = transformers.Sam3VideoConfig(
        detector_config={
            "model_type": "sam3",
            "vision_config": vision,
            "text_config": text,
            "geometry_encoder_config": small,
            "detr_encoder_config": small,
            "detr_decoder_config": {**small, "num_queries": 4},
            "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2},
        },
        tracker_config={
            "model_type": "sam3_tracker_video",
            "vision_config": vision,
            "image_size": 112,
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 112, "patch_size": 14, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            },
            "memory_attention_rope_feat_sizes": [8, 8],
            "memory_attention_num_attention_heads": 1,
            **memory,
        },
    )  # fmt: skip
    whole = transformers.Sam3VideoModel(config)
    whole.save_pretrained(tmp_path / "sam3")
    loaded = load_sam(tmp_path / "sam3")
    decoder, vision_model = cast(Any, loaded.decoder), loaded.vision
    for ours, theirs in (
        (decoder.prompt_encoder, whole.tracker_model.prompt_encoder),
        (decoder.mask_decoder, whole.tracker_model.mask_decoder),
        (decoder.neck, whole.tracker_neck),
        (vision_model.encoder, whole.detector_model.vision_encoder.backbone),
    ):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert torch.equal(decoder.no_memory, whole.tracker_model.no_memory_embedding)
    # The maps that the whole model hands to its tracker are those that ours reads, but for "no memory".
    pixels = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        maps, _ = whole.get_vision_features_for_tracker(whole.detector_model.get_vision_features(pixels * 2 - 1))
        found = decoder.embed(vision_model(pixels, feature_fmt="NCHW").features)
    expected_maps = [m.permute(1, 2, 0).view_as(f) for m, f in zip(maps, found, strict=True)]
    expected_maps[-1] = expected_maps[-1] + whole.tracker_model.no_memory_embedding.view(1, -1, 1, 1)
    for ours, theirs in zip(found, expected_maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_encoder_can_be_cast_and_dropped(folders: dict[str, Path]) -> None:
    decoder, vision = load_sam(folders["sam"])
    vision.to(torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    assert vision(torch.rand(1, 3, 64, 64)).features.dtype == torch.bfloat16


def test_places_without_a_sam(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="'nothing' is neither a folder nor a repository on the hub"):
        load_sam("nothing")
    with pytest.raises(LayoutError, match=r"has no config.json: it is no model that save_pretrained wrote"):
        load_sam(tmp_path)
    with pytest.raises(OfflineError, match="facebook/sam-vit-huge"):
        load_sam("facebook/sam-vit-huge", hub=HubOptions(cache_dir=tmp_path, local_files_only=True))
    other = copied(folders["sam"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "sam2"}))
    with pytest.raises(CapabilityError, match=r"is a model of type 'sam2'; here are the decoders of SAM \(sam\) and"):
        load_sam(other)
    (other / "config.json").write_text(json.dumps({**config, "model_type": "no-such-thing"}))
    with pytest.raises(LayoutError, match=r"The config.json of .*other cannot be read"):
        load_sam(other)


def test_weights_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sam"], tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    key = "mask_decoder.iou_token.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointKeyError, match=rf"lack 1 tensors of SamModel, such as {key}"):
        load_sam(folder)
    save_file({**tensors, key: torch.zeros(2, 16)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointShapeError, match=rf"{key} has shape \[2, 16\], and should have \[1, 16\]"):
        load_sam(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_sam(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")  # a pickle, which is not opened
    with pytest.raises(CheckpointError, match=r"only pickled weights \['pytorch_model.bin'\], which are not read"):
        load_sam(folder)


def test_without_the_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'amradio\[hf\]'"):
        load_sam(folders["sam"])
