"""The libraries around transformers: accelerate, PEFT, torchao. Each test is skipped where its library is not there."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.13")

from transformers import AutoModel

import amradio
from amradio.errors import LayoutError
from amradio.hf import LORA_TARGETS, AmradioModel
from amradio.models.radio import RadioModel

Make = Callable[[str], RadioModel]
Same = Callable[[Any, Any], None]


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(make_radio: Make, images: Tensor, same: Same, tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    radio = make_radio("adaptors")
    AmradioModel.from_radio(radio).save_pretrained(tmp_path)
    same(radio(images), AutoModel.from_pretrained(tmp_path, device_map=device_map)(images))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # it does not know that a buffer is meant
def test_blocks_on_disk(make_radio: Make, images: Tensor, same: Same, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    radio = make_radio("vit")
    AmradioModel.from_radio(radio).save_pretrained(tmp_path)
    on_cpu = ("input_conditioner", "summary_idxs", "model.patch_generator", "model.norm", "model.blocks.0")
    places = {f"radio.{name}": "cpu" for name in on_cpu}
    places |= {"radio.model.blocks.1": "disk", "radio.model.blocks.2": "disk"}
    model = AutoModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert model.radio.model.blocks[2].attn.qkv.weight.is_meta
    same(radio(images), model(images))


def test_blocks_are_not_split(make_radio: Make) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = AmradioModel.from_radio(make_radio("vit"))
    memory = {0: 60_000, "cpu": 10**9}
    places = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
    assert set(places.values()) == {0, "cpu"}
    assert not [name for name in places if name.startswith(("radio.model.blocks.0.", "radio.model.patch_generator."))]


@pytest.mark.filterwarnings("ignore")  # torchao and PEFT warn of each other's versions
def test_lora(make_radio: Make, images: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    radio = make_radio("vit")
    config = peft.LoraConfig(target_modules=list(LORA_TARGETS), r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(AmradioModel.from_radio(radio), config)
    tuned(pixel_values=images).features.square().mean().backward()
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 4 * 3  # A and B of qkv, proj, fc1, fc2 in three blocks
    assert all("lora_" in name for name in trained)
    tuned.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = tuned(pixel_values=images)
        again = peft.PeftModel.from_pretrained(AmradioModel.from_radio(make_radio("vit")), tmp_path).eval()
        assert torch.equal(again(pixel_values=images).features, wanted.features)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(images).features, wanted.features, rtol=1e-4, atol=1e-5)
        assert torch.equal(merged.to_radio()(images).features, merged(images).features)
        assert not torch.allclose(wanted.features, make_radio("vit")(images).features)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_with_activation_checkpointing(reentrant: bool) -> None:
    peft = pytest.importorskip("peft")
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    grads = []
    for saving in (False, True):
        model = AmradioModel.from_pretrained("amradio-tiny")
        if saving:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=list(LORA_TARGETS), r=2, init_lora_weights=False)
        tuned = peft.get_peft_model(model, config)
        tuned(pixel_values=images).features.square().mean().backward()
        grads.append({name: p.grad for name, p in tuned.named_parameters() if p.grad is not None})
    plain, saved = grads
    assert sorted(plain) == sorted(saved)
    assert len(plain) == 2 * 4 * model.config.num_hidden_layers  # A and B of qkv, proj, fc1, fc2
    for name, grad in plain.items():
        torch.testing.assert_close(saved[name], grad)


@pytest.mark.filterwarnings("ignore")
def test_lora_of_blocks_alone(make_radio: Make) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": list(LORA_TARGETS), "exclude_modules": r".*\badaptors\b.*", "r": 2}
    tuned = peft.get_peft_model(AmradioModel.from_radio(make_radio("adaptors")), peft.LoraConfig(**options))
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 4 * 3
    assert not any("adaptors" in name for name in names)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_transformers_own(make_radio: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AmradioModel.from_radio(make_radio("vit"))
    model.add_adapter(peft.LoraConfig(target_modules=["qkv"], r=2))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_int8_weights(make_radio: Make, images: Tensor, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    radio = make_radio("adaptors")
    path = amradio.save(radio, tmp_path / "m.safetensors")
    model = AmradioModel.from_pretrained(
        path,
        adaptor_names=["clip", "sam"],
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    )
    weight = model.radio.model.blocks[0].attn.qkv.weight
    assert "Int8" in type(weight).__name__ or "AffineQuantized" in type(weight).__name__
    plain = radio(images)
    for found, wanted in (
        (model(images).features, plain["backbone"].features),
        (model(images).adaptors["sam"].features, plain["sam"].features),
    ):
        error = (found - wanted).norm() / wanted.norm()
        assert 0 < error < 0.02
    model.save_pretrained(tmp_path / "int8")
    again = AutoModel.from_pretrained(tmp_path / "int8")
    assert torch.equal(again(images).features, model(images).features)
    with pytest.raises(LayoutError, match=r"are quantised, as its config\.json says, and only transformers can read"):
        amradio.load(tmp_path / "int8")


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_transformers() -> None:
    program = """
import sys
sys.modules["transformers"] = None
import amradio.hf, amradio.hf.modeling, amradio.hf.image_processing
import amradio.hf.backbone, amradio.hf.configuration, amradio.hf.tower
from amradio.errors import MissingDependencyError
hf = amradio.hf
uses = (
    lambda: hf.AmradioModel,
    lambda: hf.modeling.AmradioModel(None),
    lambda: hf.modeling.AmradioModel.from_pretrained("amradio-tiny"),
    lambda: hf.backbone.AmradioBackbone.from_radio(None),
    lambda: hf.configuration.AmradioConfig(),
    lambda: hf.configuration.AmradioConfig.from_pretrained("amradio-tiny"),
    lambda: hf.tower.AmradioTower.from_pretrained("amradio-tiny"),
    lambda: hf.image_processing.AmradioImageProcessor.from_pretrained("amradio-tiny"),
)
for i, use in enumerate(uses):
    try:
        use()
    except MissingDependencyError as e:
        assert "need the package transformers, 5.13 or newer" in str(e), e
        assert "Install it with `pip install -U 'amradio[hf]'`." in str(e), e
    else:
        raise SystemExit(f"nothing was said by {i}")
"""
    run(program)


@pytest.mark.parametrize("name", ["amradio.hf", "amradio.hf.modeling"])
@pytest.mark.parametrize("version", ["4.57.1", "5.12.0", "5.9.0.dev0"])
def test_a_transformers_that_is_too_old(name: str, version: str) -> None:
    run(f"""
import sys, types
sys.modules["transformers"] = types.ModuleType("transformers")
sys.modules["transformers"].__version__ = {version!r}
import amradio
from amradio.errors import MissingDependencyError
try:
    import {name}
except MissingDependencyError as e:
    wanted = "need the package transformers, 5.13 or newer, which cannot be imported: version {version} is installed."
    assert wanted in str(e) and "'amradio[hf]'" in str(e), e
else:
    raise SystemExit("nothing was said")
""")
