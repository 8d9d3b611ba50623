"""The how-to on fine-tuning does what it says: it learns, trains only what it means to, and keeps the result."""

import re
from pathlib import Path

import pytest
import torch

import amradio
from amradio.errors import LayoutError
from amradio.models.configs import RadioConfig, Resolution, ViTConfig

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),  # peft asks the hub about a model in memory
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "finetune.md"
CHANCE = 0.25


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """What a reader of the page has in the end, and the state of the adapted model before and after training."""
    text = PAGE.read_text(encoding="utf-8").split("## On a labelled set", 1)[1]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names = {"__name__": "documentation"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reader"))
        names["folder"] = Path.cwd()
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_fine_tuning_learns(reader):
    assert reader["losses"][-1] < 0.6 * reader["losses"][0]
    found = reader["accuracy"](reader["model"], reader["val_images"], reader["val_labels"])
    assert found > CHANCE + 0.15


def test_the_frozen_part_stays(reader):
    original, tuned = amradio.load("amradio-tiny").state_dict(), reader["model"].backbone.state_dict()
    changed = {k for k, v in original.items() if not torch.equal(v, tuned[k])}
    assert not [k for k in changed if "embedder" in k]
    assert any("blocks.0.attn.qkv" in k for k in changed)


def test_adapters_learn(reader):
    assert reader["lora_losses"][-1] < 0.6 * reader["lora_losses"][0]
    found = reader["accuracy"](reader["again"], reader["val_images"], reader["val_labels"])
    assert found > CHANCE + 0.15


def test_only_adapters_and_the_head_are_trained(reader):
    lora = reader["lora"]
    trained = {n for n, p in lora.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    blocks = len(amradio.load("amradio-tiny").model.blocks)
    assert sum("lora_A" in n for n in trained) == 4 * blocks
    base = {k.replace(".base_layer", "").removeprefix("base_model.model.backbone."): v
            for k, v in lora.state_dict().items() if "backbone." in k and "lora_" not in k}  # fmt: skip
    original = amradio.load("amradio-tiny").state_dict()
    assert base.keys() == original.keys()
    assert all(torch.equal(base[k], v) for k, v in original.items())


def test_adapters_are_small_and_come_back(reader):
    files = list((reader["folder"] / "adapter").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 2**20
    fresh = amradio.load("amradio-tiny")
    again = reader["PeftModel"].from_pretrained(reader["Classifier"](fresh, classes=4), reader["folder"] / "adapter")
    images = reader["val_images"][:4]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), reader["lora"].eval()(images))


def test_a_merged_model_is_a_plain_one_and_the_same(reader):
    images = reader["val_images"][:4]
    tuned, merged, lora = reader["tuned"], reader["merged"].eval(), reader["lora"].eval()
    with torch.no_grad():
        assert torch.equal(tuned(images).features, merged.backbone(images).features)
        torch.testing.assert_close(merged(images), lora(images), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(tuned(images).features, amradio.load("amradio-tiny")(images).features, atol=1e-3)
    assert not [n for n, _ in tuned.named_parameters() if "lora" in n]


def test_a_merged_model_goes_into_the_same_layouts_as_the_original(reader):
    """A transformer of patches goes into all of them; the small model's convolutions have a place in one only."""
    for layout in ("official", "huggingface", "transformers", "timm"):
        for model in (amradio.load("amradio-tiny"), reader["merged"].backbone):
            with pytest.raises(LayoutError):
                amradio.save(model, reader["folder"] / layout, layout=layout)


@pytest.mark.parametrize("layout", ["native", "official", "huggingface", "transformers", "timm"])
def test_a_merged_transformer_goes_into_every_layout(tmp_path, layout):
    import peft

    vit = ViTConfig(embed_dim=16, depth=2, num_heads=2, mlp_hidden_dim=32, patch_size=8, position_grid=(8, 8))
    model = amradio.RadioModel(RadioConfig(backbone=vit, preferred_resolution=Resolution(32, 32)))
    pattern = r"model\.model\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
    holder = torch.nn.ModuleDict({"model": model})
    lora = peft.get_peft_model(holder, peft.LoraConfig(r=2, target_modules=pattern, init_lora_weights=False))
    images = torch.rand(2, 3, 32, 32)
    adapted = model.eval()(images)
    plain = lora.merge_and_unload()["model"]
    torch.testing.assert_close(plain(images).features, adapted.features, rtol=1e-3, atol=1e-4)
    path = tmp_path / {"official": "x.pth.tar", "native": "x.safetensors"}.get(layout, "x")
    amradio.save(plain, path, layout=layout)
    found = amradio.load(str(path))(images)
    assert torch.equal(found.features, plain(images).features)
    assert torch.equal(found.summary, plain(images).summary)
