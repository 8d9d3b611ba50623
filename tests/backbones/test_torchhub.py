"""Entries of a hubconf.py as backbones: nothing runs without the caller's word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import amradio
from amradio.errors import CapabilityError, DownloadError, MissingDependencyError, OptionError, UnknownModelError

HUBCONF = """
from pathlib import Path

import torch

Path(__file__).with_name("executed").touch()

class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.proj = torch.nn.Conv2d(3, width, 16, 16)

    def forward(self, images):
        return self.proj(images)

class Dino(Net):
    num_register_tokens = 4
    patch_size = 16

    def forward(self, images):
        return self.proj(images).mean((2, 3))

    def forward_features(self, images):
        tokens = self.proj(images).flatten(2).mT
        return {"x_norm_clstoken": tokens.amax(1), "x_norm_patchtokens": tokens}

def net(width=8):
    return Net(width)

def dino():
    return Dino()

def number():
    return 3

def ready():
    import amradio
    return amradio.load_backbone(Net())
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    return tmp_path


def test_nothing_is_executed_without_consent(repo: Path) -> None:
    with pytest.raises(
        OptionError, match=r"executes the hubconf.py of .* with all your rights. Pass trust_remote_code"
    ):
        amradio.load_backbone(f"torchhub:{repo}:net")
    assert not (repo / "executed").exists()


def test_weights_that_need_no_code_are_named() -> None:
    with pytest.raises(OptionError, match="The same weights are loaded without it by the name 'dinov2_vitb14'"):
        amradio.load_backbone("torchhub:facebookresearch/dinov2:dinov2_vitb14")


def test_a_module_that_gives_a_map(repo: Path) -> None:
    spec = f"torchhub:{repo}:net"
    backbone = amradio.load_backbone(
        spec, trust_remote_code=True, entry_options={"width": 5}, mean=[0.5] * 3, std=[2] * 3
    )
    assert (repo / "executed").exists()
    assert isinstance(backbone, amradio.Backbone)
    assert (backbone.embed_dim, backbone.patch_size) == (5, 16)
    assert (backbone.identity.source, backbone.identity.layout) == (spec, "torchhub")
    assert not any(p.requires_grad for p in backbone.parameters())
    images = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(backbone(images, "NCHW").features, backbone.fn((images - 0.5) / 2))


def test_a_module_of_the_dinov2_type_gives_its_tokens(repo: Path) -> None:
    backbone = amradio.load_backbone(f"torchhub:{repo}:dino", trust_remote_code=True)
    images = torch.rand(2, 3, 32, 16)
    expected = backbone.fn.module.forward_features(images)
    torch.testing.assert_close(backbone(images).summary, expected["x_norm_clstoken"])
    torch.testing.assert_close(backbone(images).features, expected["x_norm_patchtokens"])


def test_a_backbone_is_taken_as_it_is(repo: Path) -> None:
    backbone = amradio.load_backbone(f"torchhub:{repo}:ready", trust_remote_code=True)
    assert backbone.identity.layout == "callable"


def test_what_cannot_be_a_backbone_is_refused(repo: Path) -> None:
    with pytest.raises(CapabilityError, match=r"returned a int and not a torch\.nn\.Module"):
        amradio.load_backbone(f"torchhub:{repo}:number", trust_remote_code=True)


def test_wrong_names_are_refused(repo: Path) -> None:
    for spec, message in (
        (f"{repo}:nets", "has no entry 'nets'"),
        (f"{repo / 'nothing'}:net", "There is no folder"),
        ("net", "names no entry: write torchhub:OWNER/REPO:ENTRY"),
    ):
        with pytest.raises(UnknownModelError, match=message):
            amradio.load_backbone(f"torchhub:{spec}", trust_remote_code=True)
    (repo / "empty").mkdir()
    with pytest.raises(UnknownModelError, match=r"has no hubconf\.py"):
        amradio.load_backbone(f"torchhub:{repo / 'empty'}:net", trust_remote_code=True)


def test_missing_packages_are_named(repo: Path) -> None:
    (repo / "hubconf.py").write_text("dependencies = ['not_a_package']\ndef net(): pass\n")
    with pytest.raises(MissingDependencyError, match="not_a_package"):
        amradio.load_backbone(f"torchhub:{repo}:net", trust_remote_code=True)


def test_github_is_not_asked_offline() -> None:
    with pytest.raises(DownloadError, match="would be fetched from GitHub, and HF_HUB_OFFLINE is set"):
        amradio.load_backbone("torchhub:owner/repo:net", trust_remote_code=True)


@pytest.mark.parametrize("option", [{"token": "x"}, {"revision": "main"}, {"cache_dir": "there"}])
def test_options_that_torch_hub_has_not_are_refused(option: dict[str, str], repo: Path) -> None:
    with pytest.raises(OptionError, match=f"torch.hub takes no {next(iter(option))}="):
        amradio.load_backbone(f"torchhub:{repo}:net", trust_remote_code=True, **option)
