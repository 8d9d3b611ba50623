"""Running a backbone over many pictures: loader, batches of one shape, model, sink; with the time of each stage.

```python
from amradio.features import collect, extract
from amradio.images import ResizePolicy, open_images

policy = ResizePolicy.parse([512], multiple=model.min_resolution_step)
for record in extract(open_images("photos"), model, policy):
    ...
table = collect(open_images("photos"), model, policy)
```
"""

from amradio.features.collect import Failure, FeatureTable, collect
from amradio.features.embed import EmbedOptions, embed
from amradio.features.embeddings import Embeddings, load_embeddings
from amradio.features.extract import extract
from amradio.features.job import run_job
from amradio.features.manifest import StaleError
from amradio.features.maps import AttentionMap, FeatureMap, attention_map, feature_map, feature_maps
from amradio.features.runner import ExtractOptions, FeatureModel, FeatureRecord, Keep
from amradio.features.timing import StageTimer
from amradio.features.writer import FeatureWriter, WriterOptions

__all__ = [
    "AttentionMap",
    "EmbedOptions",
    "Embeddings",
    "ExtractOptions",
    "Failure",
    "FeatureMap",
    "FeatureModel",
    "FeatureRecord",
    "FeatureTable",
    "FeatureWriter",
    "Keep",
    "StageTimer",
    "StaleError",
    "WriterOptions",
    "attention_map",
    "collect",
    "embed",
    "extract",
    "feature_map",
    "feature_maps",
    "load_embeddings",
    "run_job",
]
