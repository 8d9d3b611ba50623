"""Entry point for ``torch.hub``, with the official signature.

```python
model = torch.hub.load("OWNER/amradio", "radio_model", version="radio_v2.5-l", adaptor_names=["clip"])
```
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

dependencies = ["torch", "numpy", "safetensors", "huggingface_hub", "tqdm"]

_SRC = str(Path(__file__).resolve().parent / "src")


def radio_model(
    version: str = "",
    progress: bool = True,
    adaptor_names: str | Sequence[str] | None = None,
    neck_name: str | None = None,
    vitdet_window_size: int | None = None,
    return_checkpoint: bool = False,
    **overrides: Any,
) -> Any:
    """Load a RADIO model as the official entry point does: lenient about missing and unexpected tensors.

    Args:
        version: A version key, or the path of a checkpoint; the empty string is the default version.
        progress: Whether to show a progress bar while downloading.
        adaptor_names: Name or names of the adaptors to load.
        neck_name: Only None: necks belong to RADIO1D, of which no weights were released.
        vitdet_window_size: Side in patches of ViTDet attention windows.
        return_checkpoint: Also return the checkpoint dict, read by the restricted unpickler.
        **overrides: Any further option of `amradio.load`, such as ``patch_size`` or ``position_interpolation``.

    Returns:
        The model in evaluation mode, or ``(model, checkpoint)``.
    """
    if _SRC not in sys.path:
        sys.path.insert(0, _SRC)
    import amradio
    from amradio.backbones.locate import locate
    from amradio.errors import OptionError
    from amradio.hub import HubOptions

    if neck_name is not None:
        raise OptionError(f"neck_name={neck_name!r}: no released model has necks; pass None.")
    overrides = {"strict": False, "progress": progress, **overrides}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = amradio.load(version, adaptor_names, vitdet_window_size=vitdet_window_size, **overrides)
    for warning in caught:
        warnings.warn(warning.message, category=warning.category, stacklevel=2)
    if not return_checkpoint:
        return model
    from amradio.weights.pickles import load_pickle

    if model.identity.layout != "official":
        raise OptionError(f"return_checkpoint is for official .pth.tar files, {version} is {model.identity.layout!r}.")
    hub_options = {k: v for k, v in overrides.items() if k in HubOptions.__dataclass_fields__}
    path = locate(os.fspath(version), with_adaptors=bool(adaptor_names), hub=HubOptions(**hub_options)).path
    return model, load_pickle(path)
