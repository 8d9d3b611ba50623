"""What a model is made of, as plain data.

Nothing here knows a file format: `amradio.weights` translates the official ``args`` (and every other layout) into
these records and back. A config is JSON-serialisable (`to_json`, `from_json`) and is stored inside our own files.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from amradio.errors import ConfigError

PositionInterpolation = Literal["half_pixel", "align_corners"]
"""How the position grid is resized: ``half_pixel`` is ``align_corners=False`` of `torch.nn.functional.interpolate`."""


DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Dtypes that parameters may have."""


class Resolution(NamedTuple):
    """An image size in pixels, height first."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer trunk: patches + position + prefix tokens, blocks, final norm.

    Attributes:
        embed_dim: Width C of a token.
        depth: Number of blocks.
        num_heads: Attention heads; divides `embed_dim`.
        mlp_hidden_dim: Width of the MLP's hidden layer (of one half for SwiGLU).
        patch_size: Side P of a square patch, in pixels.
        in_chans: Image channels.
        stem: How pixels become tokens: ``patch`` (a linear map of each patch) or ``efficientnet-lite0`` (see
            `amradio.models.stem`; patches of 16 pixels, images in [-1, 1] after the input conditioner).
        mlp: ``gelu`` (fc1, exact GELU, fc2) or ``swiglu`` (w12, SiLU gate, w3).
        mlp_norm: A layer norm (eps 1e-5) between the GELU and fc2, as in radio_v2.1.
        qkv_bias: Whether the qkv projection has a bias.
        norm: ``layernorm`` (eps 1e-6) or ``dyt``, the tanh of "Transformers without Normalization".
        scaled_norm: Multiply the block norms' outputs of block i (1-based) by 1/sqrt(i).
        layer_scale: Initial value of the per-channel branch scale, None for none.
        final_norm: Whether a layer norm (eps 1e-6) follows the last block.
        position: ``cpe`` crops the position grid after resizing it to a square; ``window`` crops without resizing
            where the grid is large enough (CPE set up for the size that the model was built for); ``resize`` resizes
            the whole grid bicubically, as in DINO; ``fixed`` accepts only images of the grid's own size.
        position_grid: Rows and columns of the stored position grid.
        position_of_prefix: Whether the prefix tokens have rows in the position embedding too (plain ViT).
        position_offset: For ``resize``: added to the rows and columns asked for when the scale of the resize is
            computed (0.1 in DINO, and in DINOv2 without registers); 0 resizes to the size itself.
        position_antialias: For ``resize``: whether the resize is antialiased (DINOv2 with registers).
        num_cls_tokens: Class tokens, one a distinct teacher in RADIO.
        num_registers: Register tokens after them.
        pool: ``token``: summaries are class tokens; ``avg``: the mean over patches.
        patch_bias: Whether the patch embedding has a bias.
        patch_norm: Whether a layer norm (eps 1e-5) follows the prefix concatenation.
        unused_reg_tokens: Rows of a parameter ``reg_token`` that the v2 architectures store and never read.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden_dim: int
    patch_size: int = 16
    in_chans: int = 3
    stem: Literal["patch", "efficientnet-lite0"] = "patch"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_norm: bool = False
    qkv_bias: bool = True
    norm: Literal["layernorm", "dyt"] = "layernorm"
    scaled_norm: bool = False
    layer_scale: float | None = None
    final_norm: bool = False
    position: Literal["cpe", "window", "resize", "fixed"] = "cpe"
    position_grid: tuple[int, int] = (14, 14)
    position_of_prefix: bool = False
    position_offset: float = 0.0
    position_antialias: bool = False
    num_cls_tokens: int = 1
    num_registers: int = 0
    pool: Literal["token", "avg"] = "token"
    patch_bias: bool = False
    patch_norm: bool = False
    unused_reg_tokens: int = 0
    kind: Literal["vit"] = "vit"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "mlp_hidden_dim", "patch_size", "in_chans"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}.")
        if self.stem != "patch" and (self.patch_size, self.in_chans) != (16, 3):
            raise ConfigError(
                f"The stem {self.stem!r} takes 3 channels to patches of 16 pixels, got in_chans={self.in_chans} and "
                f"patch_size={self.patch_size}."
            )
        if self.stem != "patch" and not self.num_cls_tokens:
            raise ConfigError(f"The stem {self.stem!r} needs at least one class token, got num_cls_tokens=0.")

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens together."""
        return self.num_cls_tokens + self.num_registers


@dataclass(frozen=True, kw_only=True)
class ERadioConfig:
    """The E-RADIO hybrid of convolution and windowed attention stages. Image sides must be multiples of 32.

    Attributes:
        dim: Width of stage 0; each later stage doubles it.
        in_dim: Width inside the stem.
        depths: Blocks in each of the four stages.
        num_heads: Heads in each stage (used by the attention stages 2 and 3).
        window_size: Per stage: None (convolutional), one window side, or one for each sub-sampling of the block.
        sr_ratio: Per stage: the sub-sampling ratio(s) of its attention blocks.
        mlp_ratio: Hidden width over width in the attention MLPs.
        full_features_head_dim: Channels D of the dense output.
        neck_start_stage: First stage that feeds the dense output.
        cpb_mlp_hidden: Hidden width of the position-bias MLP.
        yolo_arch: C2f convolution stages; otherwise plain residual pairs of 3x3 convolutions.
        conv_base: Sub-sampling by strided convolutions; otherwise by pooling and 1x1 convolutions.
        conv_groups_ratio: 0: the attention block's pre-convolution is dense; 1: depthwise.
        layer_scale: Initial value of the branch scale in attention blocks, None for none.
        qkv_bias: Whether the qkv projection has a bias.
        final_norm: Whether there is a batch norm after the last stage. Neither summary nor features go through it.
    """

    dim: int = 192
    in_dim: int = 64
    depths: tuple[int, ...] = (3, 3, 5, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    window_size: tuple[int | tuple[int, ...] | None, ...] = (None, None, (16, 16), 16)
    sr_ratio: tuple[int | tuple[int, ...], ...] = (1, 1, (2, 1), 1)
    mlp_ratio: float = 4.0
    full_features_head_dim: int = 1536
    neck_start_stage: int = 2
    cpb_mlp_hidden: int = 512
    yolo_arch: bool = True
    conv_base: bool = True
    conv_groups_ratio: float = 0
    layer_scale: float | None = None
    qkv_bias: bool = False
    final_norm: bool = False
    kind: Literal["eradio"] = "eradio"

    @property
    def patch_size(self) -> int:
        """Stride of the dense output in pixels: that of the first stage which feeds it."""
        return 4 * 2**self.neck_start_stage  # type: ignore[no-any-return]

    @property
    def embed_dim(self) -> int:
        """Width D of the dense features."""
        return self.full_features_head_dim


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """One adaptor head.

    Attributes:
        version: ``v1`` (fc, LN, ReLU, fc), ``v2`` (residual pre-norm GELU blocks) or ``attn`` (two transformer blocks,
            then a v2 without inner blocks).
        input_dim: Width of what comes in.
        hidden_dim: Width inside.
        output_dim: Rows of the last layer; for spatial heads that upsample, all ``upsample_factor**2`` sub-positions.
        num_inner: Inner blocks of v1 and v2.
        upsample_factor: Sub-rows and sub-columns u that each token expands into.
        pre_norm: LN and GELU before the first layer.
    """

    version: Literal["v1", "v2", "attn"] = "v2"
    input_dim: int
    hidden_dim: int
    output_dim: int
    num_inner: int = 0
    upsample_factor: int = 1
    pre_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("input_dim", "hidden_dim", "output_dim", "upsample_factor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a head must be at least 1, got {getattr(self, name)}.")
        if self.num_inner < 0:
            raise ConfigError(f"num_inner of a head must be at least 0, got {self.num_inner}.")
        if self.output_dim % self.upsample_factor**2:
            raise ConfigError(
                f"A head that upsamples by {self.upsample_factor} needs an output_dim that is a multiple of "
                f"{self.upsample_factor**2}, got {self.output_dim}."
            )


@dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """The two heads that imitate one teacher.

    Attributes:
        head_idx: Which prefix token feeds the summary head.
        summary: Summary head.
        features: Spatial head.
    """

    head_idx: int
    summary: HeadConfig
    features: HeadConfig


@dataclass(frozen=True, kw_only=True)
class InterNormalizerConfig:
    """Shapes of the normaliser of intermediate features.

    Attributes:
        num_intermediates: Number N of blocks with statistics.
        rotation_per_layer: One (C, C) rotation for each block instead of a shared one.
    """

    num_intermediates: int
    rotation_per_layer: bool


@dataclass(frozen=True, kw_only=True)
class RadioConfig:
    """A whole RADIO model.

    Attributes:
        backbone: The trunk.
        summary_idxs: Prefix tokens whose concatenation is the backbone summary.
        adaptors: All adaptors that the weights contain, by teacher name.
        teachers: The training's teacher records as published (JSON objects with at least ``name``).
        feature_normalizer: Whether final features are standardised by stored statistics.
        inter_normalizer: Statistics for intermediate features, if stored.
        dtype: Parameter dtype of the backbone, such as ``float32``; adaptors are always float32.
        position_interpolation: How the position grid is resized.
        patch_size: Patch size as published; None means the trunk's own.
        max_resolution: Largest side in pixels that the publishers recommend; not enforced.
        preferred_resolution: (height, width) that suits summaries best.
        supports_vitdet: Whether windowed attention gives useful features with these weights.
        vitdet_num_windowed: Windowed blocks between two global ones, if published so.
        vitdet_num_global: Number of global blocks, if published so.
        version: Key in the catalog, if known.
        args: The official training arguments as published; kept so that nothing is lost on the way through our format.
    """

    backbone: ViTConfig | ERadioConfig
    summary_idxs: tuple[int, ...] = (0,)
    adaptors: Mapping[str, AdaptorConfig] = field(default_factory=dict)
    teachers: tuple[Mapping[str, Any], ...] = ()
    feature_normalizer: bool = False
    inter_normalizer: InterNormalizerConfig | None = None
    dtype: str = "float32"
    position_interpolation: PositionInterpolation = "half_pixel"
    patch_size: int | None = None
    max_resolution: int | None = None
    preferred_resolution: Resolution | None = None
    supports_vitdet: bool = True
    vitdet_num_windowed: int | None = None
    vitdet_num_global: int | None = None
    version: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.summary_idxs:
            raise ConfigError("summary_idxs is empty, so the backbone has no summary.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        for teacher in typing.cast("tuple[Any, ...]", self.teachers):  # files hold anything
            if not isinstance(teacher, Mapping) or not isinstance(teacher.get("name"), str):
                raise ConfigError(f"A teacher's record must be an object with a name, got {teacher!r:.100}.")


def to_json(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into a JSON object.

    Args:
        config: Any dataclass of this module.

    Returns:
        Nested dicts, lists and scalars; the inverse is `from_json`.
    """
    return typing.cast("dict[str, Any]", _plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


T = TypeVar("T")


def from_json(cls: type[T], data: Any, where: str = "config") -> T:
    """Rebuild a config dataclass from its JSON object, strictly.

    Args:
        cls: The dataclass to build.
        data: What `to_json` gave, possibly after a trip through a file.
        where: Name of the object in error messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: A field is unknown, missing or has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a JSON object, got {type(data).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has unknown fields {unknown}; it was probably written by a newer amradio.")
    try:
        return cls(**{k: _typed(hints[k], v, f"{where}.{k}") for k, v in data.items()})
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from e


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {list(args)}, got {value!r}.")
        return value
    if origin in (typing.Union, types.UnionType):
        return _typed_union(args, value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[Any]", hint), value, where)
    if hint is Resolution:
        if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int for v in value)):
            raise ConfigError(f"{where} must be [height, width], got {value!r}.")
        return Resolution(*value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        of = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(of) != len(value):
            raise ConfigError(f"{where} must have {len(of)} entries, got {value!r}.")
        return tuple(_typed(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(of, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a JSON object, got {value!r}.")
        return {k: _typed(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}.")
    return value


def _typed_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    kinds = [c for c in choices if dataclasses.is_dataclass(c)]
    if kinds and isinstance(value, Mapping):
        named = [k for k in kinds if getattr(k, "kind", None) == value.get("kind")]
        return from_json(typing.cast("type[Any]", (named or kinds)[0]), value, where)
    problems = []
    for choice in (c for c in choices if c is not type(None)):
        try:
            return _typed(choice, value, where)
        except ConfigError as e:
            problems.append(str(e))
    raise ConfigError(" / ".join(problems))
