"""The description of a model, as transformers keeps it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from amradio.errors import CapabilityError, ConfigError, UnknownAdaptorError
from amradio.hf.library import BackboneConfigMixin, PreTrainedConfig
from amradio.models.configs import ERadioConfig, RadioConfig, ViTConfig, from_json, to_json
from amradio.weights.pretrained import MODEL_TYPE

_DEFAULT = RadioConfig(
    backbone=ViTConfig(
        embed_dim=768, depth=12, num_heads=12, mlp_hidden_dim=3072, num_cls_tokens=4, num_registers=4,
        position_grid=(128, 128),
    ),
    summary_idxs=(0, 1, 2),
)  # fmt: skip
_DEFAULT_SIDE = 224  # pixels, where the publishers recommend nothing


def _of_backbone(field: str, meaning: str) -> Any:
    """A property of the config that is a field of a vision transformer's description."""

    def get(self: AmradioConfig) -> Any:
        return self.backbone_field(field)

    def change(self: AmradioConfig, value: Any) -> None:
        if self.is_hybrid:
            raise CapabilityError(
                f"The config of an E-RADIO model has no {field} to set; give a description as radio=."
            )
        self.radio["backbone"][field] = value

    return property(get, change, doc=meaning)


class AmradioConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """Everything that `AmradioModel` is made of: trunk, adaptors, normalizers, ViTDet windows.

    Names that transformers' users know (``hidden_size`` and so on) are views of `radio`: what is read there is read
    from it, and what is set there changes it.

    Args:
        radio: `amradio.models.configs.RadioConfig` as a JSON object; default a C-RADIO ViT-B/16 without adaptors.
        adaptor_names: Which of the described adaptors the model has; None for all of them.
        vitdet_window_size: Side in patches of ViTDet attention windows; None for global attention.
        vitdet_num_windowed: Windowed blocks between two global ones; default as published with the weights.
        vitdet_num_global: Number of global blocks; default as published, else 4.
        adaptor_dtype: Dtype of the adaptors' parameters; ``dtype`` is the trunk's.
        image_size: Side in pixels, or (height, width), that image processors and language models assume. The model
            itself takes any multiple of its patch size. Default what the publishers recommend, else 224.
        identity: Where the weights came from.
        initializer_range: Standard deviation of random weights.
        out_features: For `AmradioBackbone`: names of the stages whose maps it returns.
        out_indices: The same as indices; the last stage is the default.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "attentions"]

    radio: dict[str, Any] = dataclasses.field(default_factory=lambda: to_json(_DEFAULT))
    adaptor_names: list[str] | None = None
    vitdet_window_size: int | None = None
    vitdet_num_windowed: int | None = None
    vitdet_num_global: int | None = None
    adaptor_dtype: str = "float32"
    image_size: int | list[int] | tuple[int, int] | None = None
    identity: dict[str, Any] | None = None
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    hidden_size = _of_backbone("embed_dim", "Width of a token; of E-RADIO, of the features.")
    num_hidden_layers = _of_backbone("depth", "Blocks; of E-RADIO, stages.")
    num_attention_heads = _of_backbone("num_heads", "Attention heads.")
    intermediate_size = _of_backbone("mlp_hidden_dim", "Width of the MLP's hidden layer.")
    patch_size = _of_backbone("patch_size", "Side of a patch in pixels; of E-RADIO, stride of the features.")
    num_channels = _of_backbone("in_chans", "Image channels.")

    def __post_init__(self, **kwargs: Any) -> None:
        self.radio = copy.deepcopy(dict(self.radio))
        out = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        kwargs.pop("stage_names", None)
        for name in [k for k in kwargs if k in _VIEWS]:
            setattr(self, name, kwargs.pop(name))
        self.set_output_features_output_indices(**out)
        if self.image_size is None:
            size = self.radio.get("preferred_resolution")
            self.image_size = _DEFAULT_SIDE if size is None else size[0] if size[0] == size[1] else list(size)
        super().__post_init__(**kwargs)

    # ---- from and to the description of the networks ----

    @classmethod
    def from_radio(cls, radio: RadioConfig, adaptors: Sequence[str] | None = None, **kwargs: Any) -> AmradioConfig:
        """The config of a described model.

        Args:
            radio: The description.
            adaptors: Which of its adaptors to have; None for all of them.
            **kwargs: Other arguments of this class.

        Returns:
            The config.

        Raises:
            UnknownAdaptorError: An adaptor is not described.
        """
        names = list(radio.adaptors) if adaptors is None else list(adaptors)
        config = cls(**{"radio": to_json(radio), "adaptor_names": names, "dtype": radio.dtype, **kwargs})
        config.built_adaptors  # noqa: B018  # refuses unknown names
        return config

    def to_radio(self) -> RadioConfig:
        """The description of the networks.

        Raises:
            ConfigError: It is inconsistent.
        """
        return from_json(RadioConfig, self.radio, "AmradioConfig.radio")

    @property
    def built_adaptors(self) -> list[str]:
        """The adaptors that the model has.

        Raises:
            UnknownAdaptorError: One of `adaptor_names` is not described.
        """
        described = list(self._described("adaptors") or {})
        names = described if self.adaptor_names is None else list(self.adaptor_names)
        for name in names:
            if name not in described:
                raise UnknownAdaptorError(
                    f"Unable to find the specified adaptor name {name!r}. Known names: {described}."
                )
        return names

    @property
    def is_hybrid(self) -> bool:
        """Whether the trunk is E-RADIO, and no vision transformer."""
        return bool(self._described("backbone").get("kind") == ERadioConfig.kind)

    @property
    def stage_names(self) -> list[str]:
        """Names of the maps that `AmradioBackbone` can return."""
        first = [] if self.is_hybrid else ["stem"]
        return [*first, *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]

    def backbone_field(self, name: str) -> Any:
        """A field of the trunk's description, under the name that vision transformers have for it."""
        backbone = self._described("backbone")
        if self.is_hybrid:
            trunk = from_json(ERadioConfig, backbone, "AmradioConfig.radio.backbone")
            known = {
                "embed_dim": trunk.embed_dim,
                "depth": len(trunk.depths),
                "num_heads": trunk.num_heads[-1],
                "mlp_hidden_dim": int(trunk.dim * 2 ** (len(trunk.depths) - 1) * trunk.mlp_ratio),
                "patch_size": trunk.patch_size,
                "in_chans": 3,
            }
            return known[name]
        if name in backbone:
            return backbone[name]
        return ViTConfig.__dataclass_fields__[name].default

    def _described(self, name: str) -> Any:
        if name not in self.radio:
            raise ConfigError(f"AmradioConfig.radio has no {name!r}; it must be a RadioConfig as a JSON object.")
        return self.radio[name]

    # ---- reading ----

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The JSON object of a model in any layout that amradio reads, or of any published name.

        Args:
            pretrained_model_name_or_path: See `AmradioModel.from_pretrained`.
            **kwargs: Arguments of transformers.

        Returns:
            The object, and the arguments that were not used.
        """
        from amradio.hf.loading import is_pretrained, read_foreign

        name = os.fspath(pretrained_model_name_or_path)
        if is_pretrained(name, kwargs):
            found: tuple[dict[str, Any], dict[str, Any]] = super().get_config_dict(name, **kwargs)
            return found
        config, _, unused = read_foreign(name, kwargs)
        return config, unused


_VIEWS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_channels")
