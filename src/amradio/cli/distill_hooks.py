"""What a configuration can have done to a student while it is trained: evaluations and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from amradio.errors import ConfigError, nearest_names

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.distill.config import HookConfig
    from amradio.distill.hooks import Hook, Moment


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What every kind has: pictures, and how the student sees them.

    Attributes:
        eval: Pictures to judge on, or to show.
        eval_split: Its part.
        adaptor: Whose output is judged; None: the backbone's.
        resolution: Side in pixels of a centre crop.
        batch_size: Most pictures in one forward pass.
        limit: Only so many pictures of each set.
    """

    eval: str
    eval_split: str | None = None
    adaptor: str | None = None
    resolution: int = 224
    batch_size: int = 32
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class _KnnOptions(_Options):
    """Options of k-NN: also the pictures to learn from.

    Attributes:
        train: Labelled pictures.
        train_split: Its part.
        k: Neighbours.
    """

    train: str
    train_split: str | None = None
    k: int = 20


@dataclass(frozen=True, kw_only=True)
class _ZeroShotOptions(_Options):
    """Options of zero-shot classification, by an adaptor with a text side.

    Attributes:
        adaptor: As above; needed.
        templates: Prompts, see `amradio.evals.zero_shot`.
        class_names: Names of the classes, likewise.
    """

    adaptor: str = field()
    templates: str = "openai"
    class_names: str = "auto"


def make_hooks(configs: Sequence[HookConfig]) -> list[Hook]:
    """Make the hooks of a configuration.

    Args:
        configs: Of the run.

    Raises:
        ConfigError: There is no such kind, or it has no such option.
    """
    from amradio.distill.hooks import FunctionHook

    hooks: list[Hook] = []
    for config in configs:
        if config.kind not in _KINDS:
            raise ConfigError(f"There is no hook {config.kind!r}. {nearest_names(config.kind, _KINDS)}")
        options_of, function = _KINDS[config.kind]
        options = _parsed(options_of, config)
        hooks.append(FunctionHook(config.name or config.kind, config.every, partial(function, options=options)))
    return hooks


def _parsed(kind: type[Any], config: HookConfig) -> Any:
    known = [f.name for f in fields(kind)]
    for name in config.options:
        if name not in known:
            raise ConfigError(f"The hook {config.kind!r} has no option {name!r}. {nearest_names(name, known)}")
    try:
        return kind(**config.options)
    except TypeError as e:
        raise ConfigError(f"The hook {config.kind!r}: {e}") from e


def _images(spec: str, split: str | None, limit: int | None) -> Any:
    from amradio.images import open_images

    images = open_images(spec, split)
    return images if limit is None else images.shuffled(0).head(limit)


def _setup(moment: Moment, options: _Options) -> tuple[Backbone, Any]:
    from amradio.evals.runner import Setup
    from amradio.features import ExtractOptions
    from amradio.images import ResizePolicy

    backbone = cast("Backbone", moment.model.view(options.adaptor or "backbone"))
    policy = ResizePolicy.parse([options.resolution] * 2, multiple=backbone.min_resolution_step)
    device = next(moment.model.parameters()).device
    return backbone, Setup(policy, ExtractOptions(batch_size=options.batch_size, device=device), None)


def _values(report: Any, names: Sequence[str]) -> Mapping[str, float]:
    return {name: float(report.metrics[name].value) for name in names if name in report.metrics}


def _knn(moment: Moment, options: _KnnOptions) -> Mapping[str, float]:
    from amradio.evals.knn import KnnConfig, run_knn

    backbone, setup = _setup(moment, options)
    train = _images(options.train, options.train_split, options.limit)
    evaluation = _images(options.eval, options.eval_split, options.limit)
    return _values(run_knn(backbone, train, evaluation, KnnConfig(k=(options.k,)), setup), ("top1",))


def _zero_shot(moment: Moment, options: _ZeroShotOptions) -> Mapping[str, float]:
    from amradio.evals.zero_shot import ZeroShotConfig, run_zero_shot
    from amradio.text.towers import has_text_side

    record = next(t for t in moment.model.config.teachers if t["name"] == options.adaptor)
    adaptor: Any = moment.model.adaptors[options.adaptor]
    adaptor.attach_text(partial(_text_tower, record) if has_text_side(record) else None)
    backbone, setup = _setup(moment, options)
    images = _images(options.eval, options.eval_split, options.limit)
    config = ZeroShotConfig(templates=options.templates, class_names=options.class_names)
    return _values(run_zero_shot(backbone, images, config, setup), ("top1",))


def _text_tower(record: Mapping[str, Any], device: Any) -> Any:
    from amradio.text.towers import load_text_tower

    return load_text_tower(record, device=device)


def _pca(moment: Moment, options: _Options) -> Mapping[str, float]:
    """Write pictures of the student's features beside the photos."""
    import torch

    from amradio.images import MAX_PIXELS, WHITE, ResizePolicy, to_tensor
    from amradio.viz.pca import pca_rgb, side_by_side, to_picture

    backbone, _ = _setup(moment, options)
    folder = moment.folder / "pictures" / f"step-{moment.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    policy = ResizePolicy.parse([options.resolution] * 2, multiple=backbone.min_resolution_step)
    device = next(moment.model.parameters()).device
    for source in _images(options.eval, options.eval_split, options.limit or 8):
        photo = policy.apply(source.decode(max_pixels=MAX_PIXELS, background=WHITE))
        with torch.inference_mode():
            features = backbone(to_tensor(photo)[None].to(device), feature_fmt="NHWC").features[0]  # [h, w, D]
        picture = side_by_side([photo, to_picture(pca_rgb(features.cpu()), (photo.height, photo.width))])
        picture.save(folder / f"{source.id.replace('/', '_')}.png")
    return {}


_KINDS: Mapping[str, tuple[type[Any], Callable[..., Mapping[str, float]]]] = {
    "knn": (_KnnOptions, _knn),
    "zero-shot": (_ZeroShotOptions, _zero_shot),
    "pca": (_Options, _pca),
}
