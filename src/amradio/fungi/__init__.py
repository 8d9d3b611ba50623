"""FUNGI: features with the gradients of self-supervised losses beside them, without training (arXiv 2407.10964).

```python
import amradio
from amradio.fungi import DenseFungiBackbone, FungiWrapper

backbone = amradio.load_backbone("dino_vits16")
dense = DenseFungiBackbone(backbone).fit(amradio.images.open_images("photos"))  # a backbone with wider features
fungi = FungiWrapper(backbone, ["kl", "dino", "simclr"]).fit(train_loader)  # a backbone with wider summaries
```
"""

from amradio.fungi.dense import DenseConfig, DenseFungiBackbone
from amradio.fungi.image import FungiWrapper, ImageConfig
from amradio.fungi.objectives import Objective
from amradio.fungi.pca import Pca
from amradio.fungi.projections import GradientShape, Projection, make_projection
from amradio.fungi.support import SupportIndex
from amradio.fungi.tail import Split, SplitsLastBlock, Splitter, make_splitter

__all__ = [
    "DenseConfig",
    "DenseFungiBackbone",
    "FungiWrapper",
    "GradientShape",
    "ImageConfig",
    "Objective",
    "Pca",
    "Projection",
    "Split",
    "SplitsLastBlock",
    "Splitter",
    "SupportIndex",
    "make_projection",
    "make_splitter",
]
