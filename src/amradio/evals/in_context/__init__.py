"""In-context segmentation: patches of a picture are looked up among patches of labelled ones.

```python
from amradio.evals.in_context import InContextConfig, in_context_policy, run_in_context

reports = run_in_context(backbone, train, val, InContextConfig(memory_sizes=(102_400, 1_024_000)), setup)
```
"""

from amradio.evals.in_context.config import InContextConfig
from amradio.evals.in_context.memory import MemoryBank, patch_counts, sampling_scores
from amradio.evals.in_context.metrics import Confusion, mean_iou
from amradio.evals.in_context.propagate import attention, label_map, mix_labels
from amradio.evals.in_context.protocol import PROTOCOLS, InContextProtocol, get_protocol
from amradio.evals.in_context.run import build_memory, in_context_policy, run_in_context
from amradio.evals.in_context.sheets import Sheet, SheetOptions
from amradio.evals.in_context.store import load_memory, save_memory

__all__ = [
    "PROTOCOLS",
    "Confusion",
    "InContextConfig",
    "InContextProtocol",
    "MemoryBank",
    "Sheet",
    "SheetOptions",
    "attention",
    "build_memory",
    "get_protocol",
    "in_context_policy",
    "label_map",
    "load_memory",
    "mean_iou",
    "mix_labels",
    "patch_counts",
    "run_in_context",
    "sampling_scores",
    "save_memory",
]
