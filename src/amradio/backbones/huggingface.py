"""Vision models of ``transformers`` as backbones: DINOv2, DINOv3, ViT, CLIP, SigLIP and SigLIP2.

The number of class and register tokens, and what the summary is, follow from the model's type and its config:

| ``model_type`` | prefix tokens | summary |
|---|---|---|
| ``dinov2`` | class | ``pooler_output``: the class token after the final norm |
| ``dinov2_with_registers``, ``dinov3_vit`` | class, ``num_register_tokens`` | as above |
| ``vit`` | class | the class token after the final norm (``pooler_output`` is untrained in most ViT checkpoints) |
| ``clip`` | class | ``image_embeds``, the vector that is compared with texts |
| ``clip_vision_model`` | class | ``image_embeds`` if saved with the projection, else ``pooler_output`` |
| ``siglip``, ``siglip2`` and their vision halves | none | ``pooler_output``, the vector that is compared with texts; \
without that head the mean of the patches |

Features are ``last_hidden_state`` without the prefix tokens. Position embeddings are interpolated for other image sizes
by the model's own rule. Of ``clip``, ``siglip`` and ``siglip2`` the text half is loaded when it is first used.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from amradio.backbones.adapter import Adapter, Geometry, without_prefix
from amradio.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointShapeError,
    LayoutError,
    OptionError,
    UnknownModelError,
)
from amradio.hub import HubOptions
from amradio.models.configs import Resolution
from amradio.models.intermediates import take_indices
from amradio.models.output import RadioOutput, arrange, check_feature_fmt
from amradio.text.hf_tower import fetch_weights, import_transformers, load_hf_tower
from amradio.text.hub import fetch_description
from amradio.text.protocol import TextTower
from amradio.weights.checkpoint import Identity
from amradio.weights.hub import announced_sha256

LAYOUT = "transformers"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_BYTE = 1 / 255
_TEXT_HALF = (r"^text_model\.", r"^text_projection\.", r"^logit_", r"\.position_ids$")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How one type of model is built and read.

    Attributes:
        network: Class in transformers.
        summary: Field of the output with the summary; None for the class token.
        num_cls: Class tokens.
        registers: Whether ``config.num_register_tokens`` registers follow them.
        switch: Whether interpolation of positions has to be asked for.
        norm: Attribute of the network with the norm that makes ``last_hidden_state``; None if there is none.
        patchified: Whether the network takes patches and the shape of their grid, instead of images.
        dual: Whether the checkpoint has a text half too, and the vision half's config is a part of its own.
        arguments: For the constructor.
        passed_over: Patterns of stored tensors that the network leaves out on purpose.
    """

    network: str
    summary: str | None = "pooler_output"
    num_cls: int = 1
    registers: bool = False
    switch: bool = False
    norm: str | None = None
    patchified: bool = False
    dual: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    def with_text(self) -> _Kind:
        """The same vision model as half of a dual encoder."""
        return dataclasses.replace(self, dual=True, passed_over=_TEXT_HALF)


_CLIP = _Kind(network="CLIPVisionModelWithProjection", summary="image_embeds", switch=True)
_SIGLIP = _Kind(network="SiglipVisionModel", num_cls=0, norm="post_layernorm", switch=True)
_SIGLIP2 = _Kind(network="Siglip2VisionModel", num_cls=0, norm="post_layernorm", patchified=True)
_KINDS: Mapping[str, _Kind] = {
    "dinov2": _Kind(network="Dinov2Model", norm="layernorm"),
    "dinov2_with_registers": _Kind(network="Dinov2WithRegistersModel", norm="layernorm", registers=True),
    "dinov3_vit": _Kind(network="DINOv3ViTModel", norm="norm", registers=True),
    "vit": _Kind(
        network="ViTModel",
        summary=None,
        norm="layernorm",
        switch=True,
        arguments={"add_pooling_layer": False},
        passed_over=(r"^(vit\.)?pooler\.",),
    ),
    "clip": _CLIP.with_text(),
    "clip_vision_model": _Kind(network="CLIPVisionModel", switch=True),
    "siglip": _SIGLIP.with_text(),
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2.with_text(),
    "siglip2_vision_model": _SIGLIP2,
}


class HFBackbone(Adapter):
    """A vision model of transformers.

    Args:
        network: The model.
        kind: How it is read.
        num_prefix: Class and register tokens at the head of its sequence.
        geometry: Its sizes.
        identity: Where its weights came from.
        mean: Mean of each channel that images are standardised with.
        std: Standard deviation of each channel.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: _Kind,
        num_prefix: int,
        geometry: Geometry,
        identity: Identity,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__(geometry, identity, mean, std)
        self.network = network
        self.num_prefix_tokens = num_prefix
        self._kind = kind

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(self._output(images), self._grid(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the features of intermediate blocks.

        Args:
            images: [B, 3, H, W] in [0, 1].
            indices: n for the last n blocks, a sequence of block indices (negative ones count from the end), or None
                for all blocks.
            norm: Apply the norm that follows the last block to each of them.
            output_fmt: ``NCHW`` or ``NLC``.
            intermediates_only: Leave the final output out.

        Returns:
            ``(final, intermediates)``, or only ``intermediates``: maps [B, D, h, w] or tokens [B, L, D], in the order
            asked for.

        Raises:
            CapabilityError: `norm` is asked of a model that has no norm over all its tokens.
            OptionError: An option or index is not valid.
            ResolutionError: The image size is not supported.
        """
        check_feature_fmt(output_fmt, "output_fmt", ("NCHW", "NLC"))
        final_norm = self._final_norm() if norm else nn.Identity()
        self.geometry.check(images, self.identity.source)
        output, grid = self._output(self._conditioned(images), output_hidden_states=True), self._grid(images)
        states = output.hidden_states[1:]  # the first one is what goes into the first block
        found = []
        for i in take_indices(indices, len(states)):
            tokens = without_prefix(final_norm(states[i]), self.num_prefix_tokens, grid, self.identity.source)
            found.append(arrange(tokens, grid, output_fmt))
        if intermediates_only:
            return found
        summary, features = self._read(output, grid)
        return RadioOutput(summary, arrange(features, grid, output_fmt)), found

    def _output(self, images: Tensor, **options: Any) -> Any:
        if self._kind.patchified:
            return self.network(**_patchified(images, self.patch_size), **options)
        if self._kind.switch:
            options["interpolate_pos_encoding"] = True
        return self.network(images, **options)

    def _read(self, output: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        tokens: Tensor = output.last_hidden_state
        patches = without_prefix(tokens, self.num_prefix_tokens, grid, self.identity.source)  # [B, L, D]
        summary = tokens[:, 0] if self._kind.summary is None else getattr(output, self._kind.summary)  # [B, C]
        return patches.mean(dim=1) if summary is None else summary, patches

    def _final_norm(self) -> nn.Module:
        if self._kind.norm is None:
            raise CapabilityError(
                f"{self.identity.source} ({self._kind.network}) normalises its class token only, so norm=True has no "
                f"meaning for its intermediate features."
            )
        return _inner(self.network, self._kind.norm)


class HFDualBackbone(HFBackbone):
    """The vision half of a model that embeds images and texts in one space, with its text half (`HasText`)."""

    def attach_text(self, load: Callable[[], TextTower]) -> None:
        """Say how the text half is loaded. Nothing is loaded until it is used."""
        self._load_text = load
        self._text: list[TextTower] = []  # in a list, so that the tower never becomes a part of the model's state

    @property
    def text(self) -> TextTower:
        """The text half, on this backbone's device, loaded at the first use."""
        if not self._text:
            self._text.append(self._load_text())
        return self._text[0].to(next(self.parameters()).device)

    def tokenizer(self, texts: str | Sequence[str]) -> Any:
        """Texts to tokens with a ``.to()``; see `amradio.text.protocol.TextTower`."""
        return self.text.tokenizer(texts)

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokens in the space of the summaries.

        Args:
            tokens: What `tokenizer` gave, on the backbone's device.
            normalize: Scale every embedding to length 1.

        Returns:
            [N, C].
        """
        return self.text.encode_text(tokens, normalize)


def load_hf(
    name: str,
    *,
    hub: HubOptions | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> HFBackbone:
    """Load a vision model of transformers. No code of the repository is executed.

    Args:
        name: A repository on the hub (``organisation/name``) or a folder that ``save_pretrained`` wrote.
        hub: How to reach the hub.
        mean: Mean of each channel to standardise images with; default what the model's image processor says.
        std: Standard deviation of each channel, together with `mean`.

    Returns:
        The backbone, in the dtype in which it is stored.

    Raises:
        MissingDependencyError: transformers is not installed.
        UnknownModelError: There is no such folder, and it is no repository name.
        CapabilityError: The model is of a type whose tokens are not known here.
        OptionError: Nothing says how images are standardised.
        CheckpointError: The weights do not fit.
        DownloadError: Files cannot be fetched.
    """
    hub = hub or HubOptions()
    transformers = import_transformers()
    directory = _directory(name, hub)
    config = _config(transformers, directory, name)
    kind = _kind_of(config, name)
    network = _network(transformers, kind, directory, config.vision_config if kind.dual else config, config, name)
    processor = _processor(directory)
    if mean is None and std is None:
        mean, std = _statistics(processor, name)
    identity = _identity(name, directory)
    geometry = _geometry(network.config, kind, processor)
    num_prefix = kind.num_cls + (int(network.config.num_register_tokens) if kind.registers else 0)
    if not kind.dual:
        return HFBackbone(network, kind, num_prefix, geometry, identity, mean, std)
    dual = HFDualBackbone(network, kind, num_prefix, geometry, identity, mean, std)
    dual.attach_text(functools.partial(_text, str(directory)))
    return dual


def _directory(name: str, hub: HubOptions) -> Path:
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise LayoutError(f"{directory} has no config.json: it is no model that save_pretrained wrote.")
        return directory
    if not _HUB_ID.fullmatch(name):
        raise UnknownModelError(f"{name!r} is neither a folder nor a repository on the hub (organisation/name).")
    directory = fetch_description(name, hub, also=_PROCESSORS)
    # The same commit for the weights, even if the branch moves meanwhile.
    fetch_weights(name, HubOptions(**{**vars(hub), "revision": directory.name}))
    return directory


def _config(transformers: Any, directory: Path, name: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except ValueError as e:
        raise CapabilityError(
            f"{name} is a model of a type that transformers does not know without code from the repository, which is "
            f"never executed here: {e!s:.300} A RADIO model is loaded without the prefix hf:."
        ) from e
    except OSError as e:
        raise LayoutError(f"The config.json of {name} cannot be read: {e}") from e


def _kind_of(config: Any, name: str) -> _Kind:
    kind = _KINDS.get(config.model_type)
    if kind is None:
        raise CapabilityError(
            f"{name} is a model of type {config.model_type!r}, of which it is not known here which tokens are class "
            f"tokens, registers and patches. Known types: {', '.join(_KINDS)}. Any other one can be given to "
            f"load_backbone as a callable that returns (summary, features)."
        )
    if kind is _KINDS["clip_vision_model"] and _CLIP.network in (config.architectures or ()):
        return _CLIP
    return kind


def _network(transformers: Any, kind: _Kind, directory: Path, vision: Any, config: Any, name: str) -> Any:
    """The vision model with its weights, in the dtype in which they are stored."""
    cls = getattr(transformers, kind.network)
    if kind.passed_over:
        # In the name of the class itself: transformers renames old tensor names for its own classes only.
        passed_over = {"_keys_to_ignore_on_load_unexpected": list(kind.passed_over), "__module__": cls.__module__}
        cls = type(cls.__name__, (cls,), passed_over)
    if kind.dual and kind.summary == "image_embeds":
        vision.projection_dim = config.projection_dim  # that counts: many files leave a default in the vision half
    try:
        network, info = cls.from_pretrained(
            str(directory),
            config=vision,
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported; they are refused below
            **kind.arguments,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as e:
        raise CheckpointError(f"The weights of {name} cannot be read: {e!s:.500}") from e
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointShapeError(
            f"The weights of {name} contradict its config.json: {key} has shape {list(stored)}, and should have "
            f"{list(expected)} ({len(info['mismatched_keys'])} tensors of a wrong shape)."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointKeyError(
            f"The weights of {name} lack {len(missing)} tensors of {kind.network}, such as {', '.join(missing[:3])}. "
            f"They belong to another model."
        )
    return network


def _processor(directory: Path) -> Mapping[str, Any]:
    """The description of the image processor, empty if there is none."""
    for file in (directory / n for n in _PROCESSORS):
        if file.is_file():
            try:
                described = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as e:
                raise LayoutError(f"{file} is not valid JSON: {e}.") from e
            described = described.get("image_processor", described)
            if "image_mean" in described or described.get("do_normalize") is False:
                return described  # type: ignore[no-any-return]
    return {}


def _statistics(processor: Mapping[str, Any], name: str) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation for images in [0, 1], by the model's own processor."""
    if not processor:
        raise OptionError(
            f"{name} has no preprocessor_config.json with image_mean and image_std, so it is not known how its images "
            f"are standardised. Pass mean=(r, g, b) and std=(r, g, b), for images in [0, 1]; mean=(0, 0, 0) and "
            f"std=(1, 1, 1) leave them as they are."
        )
    factor = processor.get("rescale_factor", _BYTE) if processor.get("do_rescale", True) else 1.0
    if not math.isclose(factor, _BYTE, rel_tol=1e-3):
        raise CapabilityError(
            f"The image processor of {name} scales pixels by {factor:g} and not to [0, 1]. Pass mean= and std= that do "
            f"the same to images in [0, 1]."
        )
    if processor.get("do_normalize") is False:
        return None, None
    return processor["image_mean"], processor["image_std"]


def _geometry(config: Any, kind: _Kind, processor: Mapping[str, Any]) -> Geometry:
    patch = int(config.patch_size)
    size = _size(processor.get("crop_size")) or _size(processor.get("size")) or _size(_image_size(config, patch))
    step = Geometry(patch_size=patch, embed_dim=0, summary_dim=0, min_resolution_step=patch)
    summary = config.projection_dim if kind.summary == "image_embeds" else config.hidden_size
    return Geometry(
        patch_size=patch,
        embed_dim=int(config.hidden_size),
        summary_dim=int(summary),
        min_resolution_step=patch,
        preferred_resolution=None if size is None else step.nearest(*size),
    )


def _image_size(config: Any, patch: int) -> Any:
    """The size that positions are stored for."""
    if hasattr(config, "image_size"):
        return config.image_size
    return math.isqrt(config.num_patches) * patch if hasattr(config, "num_patches") else None


def _size(described: Any) -> Resolution | None:
    """A size in any of the ways that processors and configs write it."""
    if isinstance(described, int):
        return Resolution(described, described)
    if isinstance(described, (list, tuple)) and len(described) == 2:
        return Resolution(*described)
    if isinstance(described, Mapping) and {"height", "width"} <= set(described):
        return Resolution(described["height"], described["width"])
    if isinstance(described, Mapping) and "shortest_edge" in described:
        return Resolution(described["shortest_edge"], described["shortest_edge"])
    return None


def _identity(name: str, directory: Path) -> Identity:
    weights = directory / "model.safetensors"
    if directory == Path(name).expanduser():
        return Identity(source=str(directory), layout=LAYOUT)
    sha256 = announced_sha256(weights) if weights.exists() else None
    return Identity(source=name, layout=LAYOUT, version=name, sha256=sha256, revision=directory.name)


def _patchified(images: Tensor, patch: int) -> dict[str, Tensor]:
    """What the models with variable aspect ratio take: patches (row, column, channel order), their mask and grid."""
    b, c, height, width = images.shape
    h, w = height // patch, width // patch
    x = images.reshape(b, c, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, P, P, 3]
    return {
        "pixel_values": x.reshape(b, h * w, patch * patch * c),  # [B, h*w, P*P*3]
        "pixel_attention_mask": torch.ones(b, h * w, dtype=torch.int64, device=images.device),
        "spatial_shapes": torch.tensor([[h, w]] * b),  # read on the host
    }


def _inner(network: nn.Module, name: str) -> nn.Module:
    """A part of the network, which may be wrapped once (``vision_model``)."""
    owner = network if hasattr(network, name) else network.vision_model
    return getattr(owner, name)  # type: ignore[no-any-return]


def _text(directory: str) -> TextTower:
    return load_hf_tower(directory, HubOptions(local_files_only=True)).eval().requires_grad_(False)
