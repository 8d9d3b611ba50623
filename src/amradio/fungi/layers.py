"""Finding the linear layer whose gradient is wanted."""

from __future__ import annotations

import re

from torch import nn

from amradio.errors import CapabilityError, nearest_names

# Output projections of attention layers, as this package, timm, DINO, DINOv2 and transformers name them.
_ATTENTION_OUTPUT = re.compile(
    r"(?:^|\.)(?:attn\.proj|attn\.out_proj|self_attn\.out_proj|self_attn\.o_proj|self_attention\.out_proj"
    r"|attention\.o_proj|attention\.out_proj|attention\.output\.dense)$"
)
_WRAPPERS = ("backbone.", "module.", "model.", "network.")


def find_layer(module: nn.Module, name: str | None = None) -> tuple[str, nn.Linear]:
    """Find a linear layer by its name.

    Args:
        module: Where to look.
        name: Full name, or its end from some dot on; ``backbone.`` and the like at its beginning do not count. None:
            the output projection of the last attention.

    Returns:
        The full name and the layer.

    Raises:
        CapabilityError: There is no such layer, or several, or it is not linear.
    """
    linear = {n: m for n, m in module.named_modules() if _is_linear(m, n, module)}
    if name is None:
        return _last_attention_output(module, linear)
    wanted = _unwrapped(name)
    found = [n for n in linear if n == name] or [n for n in linear if n == wanted or n.endswith(f".{wanted}")]
    if len(found) == 1:
        return found[0], linear[found[0]]
    if found:
        raise CapabilityError(f"{name!r} is the end of several layers' names: {', '.join(found[:4])}. Give a full one.")
    others = [n for n, _ in module.named_modules() if n and (n == wanted or n.endswith(f".{wanted}"))]
    if others:
        kind = type(module.get_submodule(others[0])).__name__
        raise CapabilityError(f"{others[0]} is a {kind}, and gradients are taken of a torch.nn.Linear.")
    raise CapabilityError(f"The backbone has no linear layer {name!r}. {nearest_names(wanted, linear)}")


def _last_attention_output(module: nn.Module, linear: dict[str, nn.Linear]) -> tuple[str, nn.Linear]:
    found = [n for n in linear if _ATTENTION_OUTPUT.search(n)]
    if not found:
        raise CapabilityError(
            f"No output projection of an attention was found by its name in {type(module).__name__}. Say which linear "
            f"layer's gradient is wanted, with layer=. The last ones are: {', '.join(list(linear)[-4:]) or 'none'}."
        )
    return found[-1], linear[found[-1]]


def _is_linear(module: nn.Module, name: str, root: nn.Module) -> bool:
    """Whether it is a linear layer that is called as a module; `torch.nn.MultiheadAttention` only takes its weights."""
    if not isinstance(module, nn.Linear):
        return False
    parent = root.get_submodule(name.rpartition(".")[0])
    return not isinstance(parent, nn.MultiheadAttention)


def _unwrapped(name: str) -> str:
    while True:
        prefix = next((w for w in _WRAPPERS if name.startswith(w)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)
