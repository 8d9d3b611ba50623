"""Linear segmentation probe: a linear head on frozen patch features.

```python
from amradio.evals.linear_seg import LinearSegConfig, get_protocol, linear_seg_policy, run_linear_seg

report = run_linear_seg(backbone, train, val, LinearSegConfig(protocol=get_protocol("ridge")), setup)
```
"""

from amradio.evals.linear_seg.config import (
    PROTOCOLS,
    Augmentation,
    LinearSegConfig,
    LinearSegProtocol,
    get_protocol,
)
from amradio.evals.linear_seg.head import BatchNormLinear, LinearMap
from amradio.evals.linear_seg.ridge import RidgeSums, fit_ridge
from amradio.evals.linear_seg.run import linear_seg_policy, run_linear_seg
from amradio.evals.linear_seg.store import load_head, save_head

__all__ = [
    "PROTOCOLS",
    "Augmentation",
    "BatchNormLinear",
    "LinearMap",
    "LinearSegConfig",
    "LinearSegProtocol",
    "RidgeSums",
    "fit_ridge",
    "get_protocol",
    "linear_seg_policy",
    "load_head",
    "run_linear_seg",
    "save_head",
]
