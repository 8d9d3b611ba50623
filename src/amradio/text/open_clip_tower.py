"""Text towers through ``open_clip``, without its image half."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amradio.errors import (
    CheckpointError,
    DownloadError,
    MissingDependencyError,
    OfflineError,
    UnknownModelError,
    nearest_names,
)
from amradio.hub import HubOptions
from amradio.text.hub import fetch_first, translated_errors

# The smallest image tower that open_clip builds. It is thrown away at once: its constructors know no model without one.
_PLACEHOLDER = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 8, "head_width": 8}


class OpenClipTextTower(nn.Module):
    """The text half of an open_clip model (a `amradio.text.TextTower`).

    Args:
        model: An open_clip model; its image tower is dropped.
        tokenizer: open_clip's tokenizer for this model: texts to int64 ids [N, L].
        embed_dim: Width C of the embeddings.
    """

    def __init__(self, model: Any, *, tokenizer: Any, embed_dim: int) -> None:
        super().__init__()
        if hasattr(model, "visual"):
            del model.visual
        self.model = model
        self.tokenizer: Callable[..., Any] = tokenizer
        self.embed_dim = embed_dim
        # Kept as numbers: casting the tower to a short dtype must not round them.
        self.logit_scale = _number(model, "logit_scale")
        self.logit_bias = _number(model, "logit_bias")

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens.

        Args:
            tokens: Ids [N, L].
            normalize: Scale every embedding to length 1.

        Returns:
            Embeddings [N, C] in the tower's dtype.
        """
        embeddings: Tensor = self.model.encode_text(tokens, normalize=normalize)
        return embeddings


def import_open_clip() -> Any:
    """The package ``open_clip``.

    Raises:
        MissingDependencyError: It is not installed or, as with a torchvision that does not fit torch, its import fails.
    """
    try:
        return importlib.import_module("open_clip")
    except Exception as e:  # a torchvision built for another torch raises RuntimeError, not ImportError
        raise MissingDependencyError(
            f"open_clip cannot be imported ({type(e).__name__}: {e}). It comes with `pip install 'amradio[text]'` and "
            "needs a torchvision that fits the installed torch."
        ) from e


def load_open_clip_tower(open_clip: Any, name: str, pretrained: str, options: HubOptions) -> OpenClipTextTower:
    """Load the text half of an open_clip model; its image half is never allocated, nor read where the file allows it.

    Args:
        open_clip: The package.
        name: Architecture, such as ``ViT-H-14-378-quickgelu``.
        pretrained: Tag of published weights, such as ``dfn5b``, or path of a weights file.
        options: How the hub is asked.

    Returns:
        The tower on the CPU, in float32.

    Raises:
        UnknownModelError: open_clip has no such architecture, or no such weights for it.
        DownloadError: The weights cannot be fetched.
        CheckpointError: The weights do not fit.
    """
    config = open_clip.get_model_config(name)
    if config is None:
        raise UnknownModelError(
            f"open_clip has no architecture {name!r}. {nearest_names(name, open_clip.list_models())}"
        )
    path = _weights_file(open_clip, name, pretrained, options)
    model = _text_half(open_clip, config, path)
    if (
        model is None
    ):  # a layout that only open_clip's own loader knows: the whole model is built, and half of it dropped
        try:
            model = open_clip.create_model(name, pretrained=str(path), device="cpu")
        except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as e:
            raise CheckpointError(f"{path} does not hold weights of the open_clip model {name}: {e}") from e
    return OpenClipTextTower(
        model, tokenizer=_tokenizer(open_clip, name, config, options), embed_dim=int(config["embed_dim"])
    )


def _number(model: Any, name: str) -> float | None:
    value = getattr(model, name, None)
    return None if value is None else float(value.detach())


def _weights_file(open_clip: Any, name: str, pretrained: str, options: HubOptions) -> Path:
    if Path(pretrained).expanduser().is_file():
        return Path(pretrained).expanduser()
    published = open_clip.get_pretrained_cfg(name, pretrained)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UnknownModelError(
            f"open_clip has no weights {pretrained!r} for {name}, and there is no such file. "
            f"{nearest_names(pretrained, tags)}"
        )
    if published.get("hf_hub"):
        # Fetched here and not by open_clip, which takes neither token nor revision nor offline mode. The entry
        # "org/name/" names no file.
        repo, _, filename = published["hf_hub"].rpartition("/")
        defaults = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        return fetch_first(
            repo, [str(Path(filename).with_suffix(".safetensors")), filename] if filename else defaults, options
        )
    if options.offline_reason:
        raise OfflineError(
            f"The weights {pretrained!r} of {name} come from {published.get('url')}, and {options.offline_reason}. "
            "Fetch the file with a connection and give its path as the teacher's `pretrained`."
        )
    with translated_errors(f"open_clip's {name}", options, f"the weights {pretrained!r}"):
        path = open_clip.download_pretrained(published, cache_dir=str(options.cache_root))
    if not path:
        raise DownloadError(f"open_clip knows no address for the weights {pretrained!r} of {name}.")
    return Path(path)


def _text_half(open_clip: Any, config: dict[str, Any], path: Path) -> Any | None:
    """Build everything but the image tower and fill it; None where model or file is of a special kind."""
    config = dict(config)
    custom_text = config.pop("custom_text", False)
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"]:
        return None
    state = _read_text_tensors(path)
    if state is None:
        return None
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**{**config, "vision_cfg": _PLACEHOLDER})
    del model.visual
    wanted = model.state_dict()
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in state.items()}:
        return None
    model.load_state_dict(state)
    return model


def _read_text_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors outside ``visual.``; None for what is not a plain state dict."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys() if not k.startswith("visual.")}  # noqa: SIM118 (no mapping)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
    ):  # TorchScript archives, files from before torch 1.6, numpy files
        return None
    state = loaded.get("state_dict", loaded)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    return {k: v for k, v in state.items() if not k.startswith("visual.")}


def _tokenizer(open_clip: Any, name: str, config: dict[str, Any], options: HubOptions) -> Any:
    source = config["text_cfg"].get("hf_tokenizer_name")
    if not source:
        return open_clip.get_tokenizer(name)
    with translated_errors(source, options, "the tokenizer"):
        return open_clip.get_tokenizer(
            name,
            cache_dir=str(options.cache_root),
            token=options.token,
            local_files_only=options.offline_reason is not None,
        )
