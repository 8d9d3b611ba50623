"""What several commands share."""

from __future__ import annotations

from typing import Any

import pytest

from amradio.cli import main
from amradio.cli.common import options_of
from amradio.errors import OptionError


def test_options_of_a_backbone() -> None:
    words = ["stride=16", "trust-remote-code=true", "mean=[0.5, 0.5, 0.5]", "name = x", "entry=a=b", "none="]
    expected: dict[str, Any] = {
        "stride": 16,
        "trust_remote_code": True,
        "mean": [0.5, 0.5, 0.5],
        "name": "x",
        "entry": "a=b",
        "none": None,
    }
    assert options_of(words) == expected


@pytest.mark.parametrize("word", ["stride", "=3", "a b=1", "x=[1"])
def test_options_of_another_form(word: str) -> None:
    with pytest.raises(OptionError, match="must be NAME=VALUE"):
        options_of([word])


def test_options_that_a_backbone_does_not_have(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    words = ["embed", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "o"), "-m", "efficientnet-lite0"]
    assert main([*words, "--model-option", "strid=16"]) == 1
    assert "efficientnet-lite0 has no option 'strid'. Nearest names: stride" in capsys.readouterr().err
