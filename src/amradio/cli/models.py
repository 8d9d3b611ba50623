"""``amradio models``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from amradio.cli.text import number, table


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the published models with their licences and published numbers."""

    commercial: bool = False
    """Only models whose licence allows commercial use."""
    json: bool = False
    """Print one JSON array with everything that is known."""

    def run(self) -> int:
        """Print the list; returns the exit code."""
        from amradio.weights.catalog import entries

        found = [e for e in entries() if e.commercial or not self.commercial]
        if self.json:
            print(json.dumps([_record(e) for e in found], indent=2))
            return 0
        head = ["version", "architecture", "params", "pref. size", "ViTDet", "licence", "commercial"]
        metrics = {
            "zero-shot %": "zero_shot_top1_percent",
            "k-NN %": "knn_top1_percent",
            "ADE20k mIoU": "ade20k_miou_percent",
            "VOC mIoU": "voc_miou_percent",
            "SAM-COCO": "sam_coco_percent",
        }
        rows = []
        for e in found:
            params = f"{e.params / 1e6:.0f}M" if e.params else "-"
            size = "x".join(map(str, e.preferred_resolution)) if e.preferred_resolution else "-"
            row = [e.version, e.architecture, params, size, "yes" if e.supports_vitdet else "no"]
            row += [e.license.short_name, "yes" if e.commercial else "NO"]
            rows.append(row + [number(e.metrics.get(key)) for key in metrics.values()])
        print(table([*head, *metrics], rows))
        print("\nNumbers are the publishers' own. `amradio info VERSION` shows all that is known of one model.")
        return 0


def _record(entry: object) -> dict[str, object]:
    record = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}  # type: ignore[arg-type]
    record["license"] = dataclasses.asdict(record["license"])
    record["metrics"] = dict(record["metrics"])
    return record
