"""Running a backbone over many pictures: loader, batches of one shape, model, sink; with the time of each stage.

```python
from amradio.features import extract
from amradio.images import ResizePolicy, expand

policy = ResizePolicy.parse([512], multiple=model.min_resolution_step)
for record in extract(expand(["photos"]), model, policy):
    ...
```
"""

from amradio.features.extract import ExtractOptions, FeatureModel, FeatureRecord, extract
from amradio.features.job import run_job
from amradio.features.timing import StageTimer
from amradio.features.writer import FeatureWriter, WriterOptions

__all__ = [
    "ExtractOptions",
    "FeatureModel",
    "FeatureRecord",
    "FeatureWriter",
    "StageTimer",
    "WriterOptions",
    "extract",
    "run_job",
]
