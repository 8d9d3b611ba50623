"""Multi-teacher distillation: several frozen teachers into one student, at any resolution.

```python
from pathlib import Path

import torch
from amradio.distill import distill, load_config

outcome = distill(load_config("run.yaml"), Path("run"), device=torch.device("cuda"), max_minutes=10)
```
"""

from amradio.distill.config import DistillConfig, config_names, load_config, parse_config
from amradio.distill.hooks import FunctionHook, Hook, Measurement, Moment
from amradio.distill.loop import Outcome, Progress, distill
from amradio.errors import NonFiniteLossError

__all__ = [
    "DistillConfig",
    "FunctionHook",
    "Hook",
    "Measurement",
    "Moment",
    "NonFiniteLossError",
    "Outcome",
    "Progress",
    "config_names",
    "distill",
    "load_config",
    "parse_config",
]
