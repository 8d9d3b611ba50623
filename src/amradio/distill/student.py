"""The student: a `RadioModel` under training, with one adaptor for each teacher."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amradio.backbones import efficientnet
from amradio.distill.config import DistillConfig, HeadSizes, StudentConfig, TeacherConfig
from amradio.distill.parametrize import SpectralNorm, add_parametrizations
from amradio.errors import ConfigError
from amradio.models.adaptors import Adaptor, AttentionHead, MlpV1, MlpV2
from amradio.models.architectures import build_vit_config, vit_arguments
from amradio.models.configs import (
    AdaptorConfig,
    ERadioConfig,
    HeadConfig,
    RadioConfig,
    ViTConfig,
    from_json,
)
from amradio.models.output import arrange
from amradio.models.radio import RadioModel
from amradio.models.stem import EfficientNetStem
from amradio.models.vit import VisionTransformer
from amradio.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

INIT_STD = 0.02  # of the linear layers of a new trunk, as in the ViT papers
_PREFIX = "model.patch_generator.cls_token.token"


class Widths(NamedTuple):
    """Sizes of a teacher's targets: summary width C and feature width D."""

    summary: int
    features: int


class Prediction(NamedTuple):
    """What the student says of a teacher.

    Attributes:
        summary: [B, C].
        features: [B, D, h, w], standardised as the targets are.
    """

    summary: Tensor
    features: Tensor


class Student(nn.Module):
    """Runs the trunk once and only the adaptors that are asked for.

    Args:
        radio: The model, with all adaptors.

    Attributes:
        radio: See above.
    """

    def __init__(self, radio: RadioModel) -> None:
        super().__init__()
        self.radio = radio

    def forward(self, images: Tensor, teachers: Sequence[str]) -> dict[str, Prediction]:
        """Imitate teachers.

        Args:
            images: [B, 3, H, W] in [0, 1].
            teachers: Names of adaptors.

        Returns:
            One prediction a teacher.
        """
        radio = self.radio
        p = radio.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        tokens, patches = self._trunk(images)
        found = {}
        for name in teachers:
            adaptor = radio.adaptors[name]
            assert isinstance(adaptor, Adaptor)
            token = tokens if tokens.ndim == 2 else tokens[:, adaptor.head_idx]  # [B, C]
            summary, features = adaptor(token, patches, grid)
            u = adaptor.upsample_factor
            found[name] = Prediction(summary, arrange(features, (grid[0] * u, grid[1] * u), "NCHW"))
        return found

    def advance(self) -> None:
        """Tell reparametrised weights that a new step begins."""
        for module in self.modules():
            if isinstance(module, SpectralNorm):
                module.advance()

    def _trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens [B, P, C] or one summary [B, C], and patches [B, L, D]."""
        radio = self.radio
        out = radio.model(radio.input_conditioner(images))
        if isinstance(radio.model, VisionTransformer) and radio.model.config.pool == "avg":
            return out.patches.mean(dim=1), out.patches
        summary, patches = out
        return summary, patches


def radio_config(config: DistillConfig, widths: Mapping[str, Widths]) -> RadioConfig:
    """Describe the student, with an adaptor for each teacher.

    Args:
        config: Of the run.
        widths: Of the teachers' targets, by name.

    Raises:
        ConfigError: The description is inconsistent.
        CheckpointError: The checkpoint to start from cannot be read.
    """
    student = config.student
    if student.architecture is None and student.model is None:
        base = read_init(student).config
        return _with_adaptors(base, config.teachers, widths, keep=True)
    if student.model is not None:
        data = dict(student.model)
        backbone = dict(data.get("backbone") or {})
        if not backbone:
            raise ConfigError("student.model has no backbone.")
        if backbone.get("kind", "vit") == "vit":
            backbone.setdefault("num_cls_tokens", len(config.teachers))
        default = [i for i, t in enumerate(config.teachers) if t.summary is not None and t.summary.in_backbone]
        tokens = backbone.get("num_cls_tokens", 0)
        data.setdefault("summary_idxs", [i for i in default if i < tokens] or [0])
        base = from_json(RadioConfig, data | {"backbone": backbone}, "student.model")
        return _with_adaptors(base, config.teachers, widths, keep=False)
    return _with_adaptors(_of_architecture(student, config.teachers), config.teachers, widths, keep=False)


def _of_architecture(student: StudentConfig, teachers: Sequence[TeacherConfig]) -> RadioConfig:
    assert student.architecture is not None  # which the caller has checked
    arguments = vit_arguments(student.architecture, student.model_kwargs)
    side = student.max_size // arguments["patch_size"]
    backbone = build_vit_config(
        arguments,
        position_grid=(side, side),
        num_cls_tokens=len(teachers),
        num_registers=student.registers,
    )
    summary = [i for i, t in enumerate(teachers) if t.summary is not None and t.summary.in_backbone]
    return RadioConfig(backbone=backbone, summary_idxs=tuple(summary or [0]), max_resolution=student.max_size)


def _with_adaptors(
    base: RadioConfig, teachers: Sequence[TeacherConfig], widths: Mapping[str, Widths], *, keep: bool
) -> RadioConfig:
    """The description with adaptors of the teachers' widths; `keep` keeps those of a checkpoint that fit."""
    b = base.backbone
    tokens = b.num_cls_tokens if isinstance(b, ViTConfig) and b.pool == "token" else 0
    adaptors = {}
    for i, teacher in enumerate(teachers):
        known = base.adaptors.get(teacher.name)
        if known is not None and keep and _fits(known, teacher, widths[teacher.name]):
            adaptors[teacher.name] = known
            continue
        slot = known.head_idx if known is not None else i if tokens > 1 else 0
        if tokens and slot >= tokens:
            raise ConfigError(
                f"The student has {tokens} class tokens, one too few for the teacher {teacher.name!r}. Describe it "
                "with student.model and more num_cls_tokens; student.init then loads what fits."
            )
        adaptors[teacher.name] = _adaptor(base, teacher, widths[teacher.name], slot)
    records = tuple(
        {
            "name": t.name,
            "type": "generic",
            "model": t.backbone,
            "use_summary": t.summary is not None and t.summary.in_backbone,
            **(t.text or {}),
        }
        for t in teachers
    )
    return dataclasses.replace(base, adaptors=adaptors, teachers=records, dtype="float32", version=None, args={})


def _fits(adaptor: AdaptorConfig, teacher: TeacherConfig, widths: Widths) -> bool:
    u = 1 if teacher.features is None else teacher.features.upsample
    wanted = (widths.summary, widths.features * u * u, u)
    return (adaptor.summary.output_dim, adaptor.features.output_dim, adaptor.features.upsample_factor) == wanted


def _adaptor(base: RadioConfig, teacher: TeacherConfig, widths: Widths, slot: int) -> AdaptorConfig:
    b = base.backbone
    summary = HeadSizes() if teacher.summary is None else teacher.summary.head
    features = HeadSizes() if teacher.features is None else teacher.features.head
    u = 1 if teacher.features is None else teacher.features.upsample
    if summary.version == "attn":
        raise ConfigError(f"The summary head of {teacher.name!r} cannot be 'attn', which is for spatial heads.")
    return AdaptorConfig(
        head_idx=slot,
        summary=_head(summary, b.embed_dim, widths.summary),
        features=_head(features, b.embed_dim, widths.features * u * u, u),
    )


def _head(sizes: HeadSizes, input_dim: int, output_dim: int, upsample: int = 1) -> HeadConfig:
    return HeadConfig(
        version=sizes.version,
        input_dim=input_dim,
        hidden_dim=sizes.hidden_dim or input_dim,
        output_dim=output_dim,
        num_inner=sizes.num_inner,
        upsample_factor=upsample,
    )


def read_init(student: StudentConfig) -> Checkpoint:
    """Read the checkpoint that a student starts from.

    Raises:
        AmradioError: There is none, or it cannot be read.
    """
    from amradio.backbones.load import read_located
    from amradio.backbones.locate import locate

    assert student.init is not None  # which the caller has checked
    return read_located(locate(student.init, with_adaptors=True))


def build_student(config: DistillConfig, description: RadioConfig) -> tuple[Student, frozenset[str]]:
    """Build the student with its first weights, which depend on the seed only.

    Args:
        config: Of the run.
        description: See `radio_config`.

    Returns:
        The student on the CPU in training mode, and the names of adaptors whose weights came from a checkpoint.

    Raises:
        ConfigError: The checkpoint to start from does not fit the description.
    """
    settings = config.student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        radio = RadioModel(description, tuple(description.adaptors))
        _reset(radio)
    loaded: frozenset[str] = frozenset()
    if settings.init == efficientnet.NAME:
        _inherit_stem(radio)
    elif settings.init is not None:
        loaded = _load_init(radio, read_init(settings))
    for teacher in config.teachers:  # heads that nothing trains have no place in the optimiser
        adaptor = radio.adaptors[teacher.name]
        assert isinstance(adaptor, Adaptor)
        adaptor.head_mlp.requires_grad_(teacher.summary is not None)
        adaptor.feat_mlp.requires_grad_(teacher.features is not None)
    if settings.frozen_stem:
        _stem(radio, "frozen_stem").network.requires_grad_(False)
    if settings.mean is not None and settings.std is not None:
        conditioner: Any = radio.input_conditioner
        conditioner.norm_mean.copy_(torch.tensor(settings.mean).view(-1, 1, 1))
        conditioner.norm_std.copy_(torch.tensor(settings.std).view(-1, 1, 1))
    parametrized(radio, settings)
    if settings.checkpointing:
        radio.set_grad_checkpointing()
    return Student(radio.float()).train(), loaded


def parametrized(radio: RadioModel, settings: StudentConfig) -> RadioModel:
    """Add the training-time parametrisations of the blocks, in place."""
    if settings.spectral or settings.damp:
        add_parametrizations(radio.blocks, settings.spectral, settings.damp)
    return radio


def last_linear(head: nn.Module) -> nn.Linear:
    """The layer of a head that makes its output."""
    if isinstance(head, AttentionHead):
        head = head.mlp
    layer = head.fc2 if isinstance(head, MlpV1) else head.final[-1] if isinstance(head, MlpV2) else None
    assert isinstance(layer, nn.Linear)  # there are no other heads
    return layer


def _reset(radio: RadioModel) -> None:
    """Truncated normal weights and no biases in a new ViT's blocks, which torch would draw by fan-in."""
    if isinstance(radio.config.backbone, ERadioConfig):
        return
    layers: list[nn.Module] = list(radio.blocks.modules())
    if radio.config.backbone.stem == "patch":
        layers += list(radio.model.patch_generator.embedder.modules())  # type: ignore[union-attr]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _inherit_stem(radio: RadioModel) -> None:
    """Fill the convolutional stem of a new student with the weights of EfficientNet-Lite0."""
    _stem(radio, f"init: {efficientnet.NAME}").network.load_state_dict(efficientnet.folded_network())


def _stem(radio: RadioModel, setting: str) -> EfficientNetStem:
    """The convolutional stem of a student."""
    stem = radio.model.patch_generator.embedder if isinstance(radio.model, VisionTransformer) else None
    if not isinstance(stem, EfficientNetStem):
        raise ConfigError(f"student.{setting} is for students whose backbone has the stem {efficientnet.NAME!r}.")
    return stem


def _load_init(radio: RadioModel, checkpoint: Checkpoint) -> frozenset[str]:
    """Fill a new student with what a checkpoint has of it; returns the adaptors that were filled."""
    state = radio.state_dict()
    have = checkpoint.tensors
    taken: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in state.items():
        if name not in have or name == "summary_idxs":
            continue
        if have[name].shape == tensor.shape:
            taken[name] = have[name].to(tensor.dtype)
        elif name == _PREFIX:
            rows = min(len(tensor), len(have[name]))
            taken[name] = torch.cat([have[name][:rows].to(tensor.dtype), tensor[rows:]])
        elif not name.startswith("adaptors."):
            wrong.append(f"{name} is {list(have[name].shape)}, expected {list(tensor.shape)}")
    if wrong:
        raise ConfigError(
            f"{checkpoint.identity.source} does not fit the student: {'; '.join(wrong[:5])}"
            f"{f', and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Describe the student as the checkpoint is, "
            "or leave its description out."
        )
    new = [n for n in state if n not in taken and n != "summary_idxs" and not n.startswith("adaptors.")]
    if new:
        logger.warning(
            "%d tensors of the trunk are not in %s and start anew: %s", len(new), checkpoint.identity.source, new[:5]
        )
    whole = {
        adaptor for adaptor in radio.adaptors if all(n in taken for n in state if n.startswith(f"adaptors.{adaptor}."))
    }
    for name in [n for n in taken if n.startswith("adaptors.") and n.split(".")[1] not in whole]:
        del taken[name]  # a half-filled head is no better than a new one
    radio.load_state_dict(state | taken)
    return frozenset(whole)
