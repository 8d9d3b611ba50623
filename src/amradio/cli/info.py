"""``amradio info``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a published model, or a checkpoint file or directory, without loading it onto a device."""

    name: tyro.conf.Positional[str]
    """Version key, Hugging Face repository, or path."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Print the description; returns the exit code."""
        from amradio.backbones.locate import find_entry, locate

        entry = find_entry(self.name)
        record = _of_file(locate(self.name).path) if entry is None else _of_entry(entry)
        if self.json:
            print(json.dumps(record, indent=2))
            return 0
        for key, value in record.items():
            for line in _lines(key, value):
                print(line)
        return 0


def _of_entry(entry: Any) -> dict[str, Any]:
    size = entry.preferred_resolution
    return {
        "version": entry.version,
        "architecture": entry.architecture,
        "parameters": entry.params,
        "teachers": list(entry.teachers),
        "adaptors": list(entry.adaptors),
        "license": entry.license.name,
        "license url": entry.license.url,
        "commercial use": entry.commercial,
        "checkpoint": entry.url,
        "hugging face": entry.hf_repo,
        "timm": entry.timm_name,
        "patch size": entry.patch_size,
        "max resolution": entry.max_resolution,
        "preferred resolution (h, w)": list(size) if size else None,
        "vitdet windows": entry.supports_vitdet,
        "position interpolation as published": entry.position_interpolation_published,
        "position interpolation in torch.hub today": entry.position_interpolation_torch_hub,
        "published metrics": dict(entry.metrics),
        "metrics source": entry.metrics_source,
        "notes": entry.notes,
    }


def _of_file(path: Path) -> dict[str, Any]:
    from amradio.models.configs import ERadioConfig
    from amradio.weights.layouts import read_checkpoint

    checkpoint = read_checkpoint(path)
    config, trunk = checkpoint.config, checkpoint.config.backbone
    text = {t["name"]: t.get("type") for t in reversed(config.teachers)}
    adaptors = {
        name: {
            "summary": a.summary.output_dim,
            "features": a.features.output_dim // a.features.upsample_factor**2,
            "heads": f"{a.summary.version} / {a.features.version}",
            "upsampling": a.features.upsample_factor,
            "token": a.head_idx,
            "teacher type": text.get(name),
        }
        for name, a in config.adaptors.items()
    }
    if isinstance(trunk, ERadioConfig):
        network = {"kind": "E-RADIO", "width": trunk.embed_dim, "depths": list(trunk.depths)}
    else:
        network = {
            "kind": "ViT",
            "width": trunk.embed_dim,
            "depth": trunk.depth,
            "heads": trunk.num_heads,
            "mlp": f"{trunk.mlp} {trunk.mlp_hidden_dim}",
            "class tokens": trunk.num_cls_tokens,
            "registers": trunk.num_registers,
            "position grid": list(trunk.position_grid),
        }
    counts = {
        "backbone": sum(t.numel() for k, t in checkpoint.tensors.items() if k.startswith("model.")),
        "adaptors": sum(t.numel() for k, t in checkpoint.tensors.items() if k.startswith("adaptors.")),
    }
    size = config.preferred_resolution
    return {
        "path": str(path),
        "layout": checkpoint.identity.layout,
        "version": config.version,
        "network": network,
        "values": counts,
        "dtype": config.dtype,
        "patch size": config.patch_size or trunk.patch_size,
        "summary tokens": list(config.summary_idxs),
        "summary width": len(config.summary_idxs) * trunk.embed_dim,
        "adaptors": adaptors,
        "normalizers": {"features": config.feature_normalizer, "intermediates": config.inter_normalizer is not None},
        "position interpolation": config.position_interpolation,
        "preferred resolution (h, w)": list(size) if size else None,
        "sha256": checkpoint.identity.sha256,
        "license": checkpoint.identity.license,
    }


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [f"{key}:", *(f"  {line}" for k, v in value.items() for line in _lines(k, v))]
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    elif isinstance(value, int) and value >= 10_000:
        value = f"{value:,}"
    return [f"{key}: {'-' if value in (None, '', {}) else value}"]
