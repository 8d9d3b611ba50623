"""What the models of this room share: how they are built, initialised, loaded and saved."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from amradio.backbones.load import attach_text
from amradio.errors import OptionError
from amradio.hf.attention import AttentionCore, dispatch_attention
from amradio.hf.card import CARD, model_card, upload
from amradio.hf.configuration import AmradioConfig
from amradio.hf.image_processing import AmradioImageProcessor
from amradio.hf.initialization import initialize
from amradio.hf.library import OutputRecorder, PreTrainedModel, require
from amradio.hf.loading import is_pretrained, read_foreign, state_of
from amradio.hub import HubOptions
from amradio.models.radio import RadioModel
from amradio.models.stem import EfficientNetStem
from amradio.models.vit import VisionTransformer
from amradio.weights.checkpoint import Checkpoint, Identity, torch_dtype
from amradio.weights.native import KEPT_IDENTITY, UNUSED
from amradio.weights.pretrained import NAME, ROOT

_PROCESSOR = "preprocessor_config.json"
_AUTO = "auto"
_PUSH = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class AmradioPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What `AmradioModel` and `AmradioBackbone` share: the network, and how it is loaded, saved and initialised.

    Args:
        config: What to build; weights are random.

    Attributes:
        radio: The network. Its names in the state dict begin with ``radio.``.
    """

    config_class = AmradioConfig
    base_model_prefix = "amradio"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "PatchGenerator", "Stage"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "attentions": OutputRecorder(AttentionCore, index=1, layer_name="model.blocks")
    }

    def __init__(self, config: AmradioConfig) -> None:
        super().__init__(config)
        description = config.to_radio()
        names = config.built_adaptors
        self.radio = RadioModel(description, names)
        dispatch_attention(self.radio, config)
        _cast(self.radio, torch.get_default_dtype(), torch_dtype(config.adaptor_dtype))
        if config.vitdet_window_size is not None:
            if not description.supports_vitdet:
                raise OptionError(
                    f"vitdet_window_size is not supported for {description.version or 'this model'}. Set it to None, "
                    f"or use a version that supports it; `amradio models` shows which."
                )
            self.radio.set_vitdet(config.vitdet_window_size, config.vitdet_num_windowed, config.vitdet_num_global)
        others = [re.escape(name) for name in description.adaptors if name not in names]
        self._keys_to_ignore_on_load_unexpected = [
            rf"^{re.escape(UNUSED)}",  # kept in files for the sake of other layouts
            *(rf"^{re.escape(ROOT)}adaptors\.{name}\." for name in others),
        ]
        self.radio.identity = _identity(config)
        attach_text(self.radio, HubOptions())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.radio.config, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The layer that makes tokens of patches, or of a convolutional stem's maps; of E-RADIO the stem.

        Its output is one tensor, which `enable_input_require_grads` relies on.
        """
        trunk = self.radio.model
        if not isinstance(trunk, VisionTransformer):
            return trunk.patch_embed
        embedder = trunk.patch_generator.embedder
        return embedder.project if isinstance(embedder, EfficientNetStem) else embedder

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the layer that `get_input_embeddings` returns."""
        trunk = self.radio.model
        if not isinstance(trunk, VisionTransformer):
            trunk.patch_embed = value  # type: ignore[assignment]
        elif isinstance(trunk.patch_generator.embedder, EfficientNetStem):
            trunk.patch_generator.embedder.project = value  # type: ignore[assignment]
        else:
            trunk.patch_generator.embedder = value

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return isinstance(self.radio.model, VisionTransformer) and self.radio.model.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        """A model that this one is a part of sets it, after ``_gradient_checkpointing_func``; E-RADIO keeps out."""
        if isinstance(self.radio.model, VisionTransformer):
            self._checkpoint_with(enable, getattr(self, "_gradient_checkpointing_func", None))

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
        **_: Any,
    ) -> None:
        if every_n_layers != 1:
            raise OptionError(f"Every block is checkpointed, or none: every_n_layers must be 1, got {every_n_layers}.")
        self._checkpoint_with(enable, gradient_checkpointing_func)

    def _checkpoint_with(self, enable: bool, function: Callable[..., Any] | None) -> None:
        self.radio.set_grad_checkpointing(enable)
        if enable and function is not None:
            self.radio.model.checkpoint = function

    # ---- saving ----

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save weights and config, and beside them an image processor's config and a model card where there are none.

        The weights of adapters of PEFT are saved alone, as transformers does.

        Args:
            save_directory: The directory; it is made if needed.
            push_to_hub: Whether to call `push_to_hub` too, with ``repo_id`` (default the directory's name).
            **kwargs: Arguments of transformers (``max_shard_size``, ``state_dict``, ...); with `push_to_hub` those of
                that method.
        """
        for adaptor in self.radio.adaptors.values():
            self.config.adaptor_dtype = str(next(adaptor.parameters()).dtype).removeprefix("torch.")
        hub = {k: kwargs.pop(k) for k in (*_PUSH, "repo_id") if push_to_hub and k in kwargs}
        path = Path(save_directory)
        super().save_pretrained(path, **kwargs)
        if path.is_dir() and kwargs.get("is_main_process", True) and not getattr(self, "_hf_peft_config_loaded", False):
            if not (path / _PROCESSOR).exists():
                AmradioImageProcessor.from_config(self.config).save_pretrained(path)
            if not (path / CARD).exists():
                card = model_card(self.config, self.radio, hub.get("repo_id", path.name), hub.get("tags") or ())
                card.save(path / CARD)
        if push_to_hub:
            upload(
                path, hub.get("repo_id", path.name), **{k: v for k, v in hub.items() if k not in ("repo_id", "tags")}
            )

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> Any:
        """Upload the model with its config, an image processor's config and a model card.

        Args:
            repo_id: Name of the repository; it is made if needed. A model card that it has is kept.
            max_shard_size: See transformers.
            **kwargs: See `amradio.hf.card.upload`.

        Returns:
            The commit, as ``huggingface_hub`` describes it.
        """
        tags = kwargs.pop("tags", None) or ()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            model_card(self.config, self.radio, repo_id, tags).save(Path(folder, CARD))
            return upload(Path(folder), repo_id, **kwargs)

    # ---- to and from other layouts ----

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a model, without executing any code that comes with it.

        Args:
            pretrained_model_name_or_path: A directory or repository that ``save_pretrained`` and ``push_to_hub`` made;
                or whatever `amradio.load` takes: a version such as ``c-radio_v4-h``, a repository of the publishers
                such as ``nvidia/C-RADIOv2-B``, a file or directory in any layout.
            *model_args: Positional arguments of transformers.
            **kwargs: Arguments of transformers (``dtype``, ``device_map``, ``quantization_config``,
                ``attn_implementation``, ...), and of `AmradioConfig`. Of a model in another layout no adaptors are
                loaded but those in ``adaptor_names``.

        Returns:
            The model in evaluation mode. Without ``dtype`` it is in the dtype that it was published in, with adaptors
            in float32; otherwise all of it is cast, as by `amradio.load`.

        Raises:
            AmradioError: The model cannot be found, read or understood; see `amradio.load`.
            OSError: The same, where transformers notices.
        """
        require()
        name = None if pretrained_model_name_or_path is None else os.fspath(pretrained_model_name_or_path)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        config = kwargs.pop("config", None)
        if config is not None and not isinstance(config, AmradioConfig):
            config = AmradioConfig.from_pretrained(config, **_hub_arguments(kwargs))
        if dtype not in (None, _AUTO):  # everything is cast; otherwise adaptors stay as they are
            cast = str(dtype).removeprefix("torch.")
            config, kwargs = _with(config, kwargs, adaptor_dtype=cast)
        if name is None or is_pretrained(name, _hub_arguments(kwargs)):
            return super().from_pretrained(name, *model_args, config=config, dtype=dtype, **kwargs)
        wanted = {} if config is None else {"adaptor_names": config.adaptor_names}
        described, checkpoint, kwargs = read_foreign(name, {**wanted, **kwargs})
        if config is None:
            config, kwargs = AmradioConfig.from_dict(described, return_unused_kwargs=True, **kwargs)
        state = state_of(checkpoint, config.built_adaptors)
        found = super().from_pretrained(None, *model_args, config=config, state_dict=state, dtype=dtype, **kwargs)
        model = found[0] if isinstance(found, tuple) else found  # a tuple with output_loading_info=True
        model.name_or_path = model.config.name_or_path = name
        return found

    @classmethod
    def from_radio(cls, model: RadioModel, **kwargs: Any) -> Any:
        """Wrap a model of this package; weights are shared, not copied.

        Args:
            model: Any model, with the adaptors that are loaded.
            **kwargs: Arguments of `AmradioConfig`, and ``attn_implementation``.

        Returns:
            The model, in the same mode (training or evaluation), dtypes and windows.

        Raises:
            CheckpointError: The model's input conditioner was taken out.
        """
        require()
        from transformers.initialization import no_init_weights

        checkpoint = Checkpoint.of(model)
        identity = {k: getattr(checkpoint.identity, k) for k in ("source", *KEPT_IDENTITY)}
        windows = {"vitdet_window_size": model.window_size, "vitdet_num_windowed": _num_windowed(model)}
        config = AmradioConfig.from_radio(checkpoint.config, **{**windows, "identity": identity, **kwargs})
        with torch.device("meta"), no_init_weights():
            wrapped = cls(config)
        wrapped.radio.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        return wrapped.train(model.training)

    def to_radio(self) -> RadioModel:
        """The model as one of this package; weights are shared, not copied.

        Returns:
            What `amradio.load` would give: same mode, dtypes and windows, nothing of transformers in it.
        """
        source = self.radio
        with torch.device("meta"):
            model = RadioModel(source.config, list(source.adaptors), source.compat)
        model.load_state_dict(source.state_dict(keep_vars=True), assign=True)
        model.config = dataclasses.replace(source.config, dtype=str(source.dtype).removeprefix("torch."))
        if source.window_size is not None:
            model.set_vitdet(source.window_size, _num_windowed(source))
        model.identity = source.identity
        attach_text(model, HubOptions())
        return model.train(source.training)


def _cast(radio: RadioModel, dtype: torch.dtype, adaptor_dtype: torch.dtype) -> None:
    """Give all parts the dtypes that `amradio.load` gives them."""
    for part in (radio.model, radio.feature_normalizer, radio.inter_feature_normalizer):
        if part is not None:
            part.to(dtype)
    radio.adaptors.to(adaptor_dtype)


def _num_windowed(radio: RadioModel) -> int | None:
    """Windowed blocks between two global ones as the model has them now, None without windows."""
    trunk = radio.model
    return trunk.global_schedule.index(True) if radio.window_size and isinstance(trunk, VisionTransformer) else None


def _with(config: Any, kwargs: dict[str, Any], **fields: Any) -> tuple[Any, dict[str, Any]]:
    """Change fields of a config if there is one already, else arguments for one that is still to be made."""
    if config is None:
        return None, kwargs | fields
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config, kwargs


def _identity(config: AmradioConfig) -> Identity | None:
    if not config.identity:
        return None
    known = {k: config.identity.get(k) for k in KEPT_IDENTITY}
    return Identity(source=str(config.identity.get("source") or config.name_or_path), layout=NAME, **known)


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("token", "revision", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
    return {k: kwargs[k] for k in names if k in kwargs}
