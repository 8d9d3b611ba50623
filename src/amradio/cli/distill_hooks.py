"""What a configuration can have done to a student while it is trained: evaluations and pictures.

Sets of pictures are opened when the hooks are made, so that a wrong path is found before the training begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from amradio.errors import ConfigError, nearest_names

if TYPE_CHECKING:
    from amradio.backbones.protocol import Backbone
    from amradio.distill.config import DistillConfig, HookConfig, TeacherConfig
    from amradio.distill.hooks import Hook, Measurement, Moment
    from amradio.evals.report import EvalReport
    from amradio.evals.runner import Setup
    from amradio.images.resize import ResizePolicy

    Function = Callable[[Moment], Mapping[str, Measurement]]


@dataclass(frozen=True, kw_only=True)
class HookOptions(ABC):
    """What every kind has: pictures, and how the student sees them.

    Attributes:
        eval: Pictures to judge on, or to show.
        eval_split: Its part.
        adaptor: Whose output is judged; None: the backbone's.
        resolution: Side in pixels, or (height, width), of a centre crop.
        batch_size: Most pictures in one forward pass.
        limit: Only so many pictures of each set, drawn at random once.
    """

    eval: str
    eval_split: str | None = None
    adaptor: str | None = None
    resolution: int | tuple[int, ...] = 224
    batch_size: int = 32
    limit: int | None = None

    @abstractmethod
    def prepared(self, name: str, teachers: Sequence[TeacherConfig]) -> Function:
        """Open what is needed.

        Args:
            name: Of the hook.
            teachers: Of the run.

        Returns:
            What is done at a moment.
        """

    @property
    def size(self) -> tuple[int, ...]:
        """(height, width) in pixels."""
        return (self.resolution,) * 2 if isinstance(self.resolution, int) else self.resolution

    def backbone(self, moment: Moment) -> Backbone:
        """What is judged."""
        return cast("Backbone", moment.model.view(self.adaptor or "backbone"))

    def policy(self, backbone: Backbone) -> ResizePolicy:
        """To which size pictures are brought."""
        from amradio.images import ResizePolicy

        return ResizePolicy.parse(self.size, "crop", multiple=backbone.min_resolution_step)

    def setup(self, moment: Moment, backbone: Backbone) -> Setup:
        """How pictures go through it."""
        from amradio.evals.runner import Setup
        from amradio.features import ExtractOptions

        options = ExtractOptions(batch_size=self.batch_size, device=next(moment.model.parameters()).device)
        return Setup(self.policy(backbone), options)

    def images(self, spec: str, split: str | None) -> Any:
        """A set of pictures, opened."""
        from amradio.images import open_images

        return self.limited(open_images(spec, split))

    def limited(self, images: Any) -> Any:
        """The pictures of a set that are used."""
        return images if self.limit is None else images.shuffled(0).head(self.limit)


@dataclass(frozen=True, kw_only=True)
class KnnOptions(HookOptions):
    """k-NN classification: also pictures to learn from.

    Attributes:
        train: Labelled pictures.
        train_split: Its part.
        k: Neighbours.
    """

    train: str
    train_split: str | None = None
    k: int = 20

    def prepared(self, name: str, teachers: Sequence[TeacherConfig]) -> Function:
        """See `HookOptions`."""
        from amradio.evals.knn import KnnConfig, run_knn
        from amradio.evals.runner import check_pair

        config = KnnConfig(k=(self.k,))
        train, evaluation = self.images(self.train, self.train_split), self.images(self.eval, self.eval_split)
        check_pair(train, evaluation, config.classes)

        def measure(moment: Moment) -> Mapping[str, Measurement]:
            backbone = self.backbone(moment)
            report = run_knn(backbone, train, evaluation, config, self.setup(moment, backbone))
            return _kept(moment, name, report, ["top1"], f"k = {self.k}")

        return measure


@dataclass(frozen=True, kw_only=True)
class InContextOptions(HookOptions):
    """Segmentation by nearest patches (`amradio.evals.in_context`, protocol ``clean``); pictures are stretched.

    Attributes:
        eval: Pictures with masks, as `amradio.images.segmentation.open_segmentation` opens them.
        train: Pictures with masks for the memory; None: another part of `eval`.
        train_split: Its part.
        layout: Of both; None finds out.
        memory_size: Patches in the memory; None: all of all pictures.
        augmentation_epochs: How often each picture goes into the memory, cropped anew each time; 0: once, as it is.
        k: Neighbours that vote for each patch.
        temperature: Of their vote.
        storage: Precision of the features in the memory.
        sheets: Contact sheets that are drawn, for so many pictures.
    """

    train: str | None = None
    train_split: str | None = None
    layout: str | None = None
    memory_size: int | None = None
    augmentation_epochs: int = 0
    k: int = 30
    temperature: float = 0.02
    storage: str = "float32"
    sheets: int = 0

    def policy(self, backbone: Backbone) -> ResizePolicy:
        """Pictures are stretched, so that all of each is scored."""
        from amradio.evals.in_context import in_context_policy

        return in_context_policy(backbone, self.size)

    def prepared(self, name: str, teachers: Sequence[TeacherConfig]) -> Function:
        """See `HookOptions`."""
        from amradio.evals.in_context import InContextConfig, Sheet, SheetOptions, run_in_context
        from amradio.images.segmentation import open_segmentation

        train = self.limited(open_segmentation(self.train or self.eval, self.train_split, layout=self.layout))
        evaluation = self.limited(open_segmentation(self.eval, self.eval_split, layout=self.layout))
        config = InContextConfig(
            k=self.k,
            temperature=self.temperature,
            memory_sizes=(self.memory_size,),
            augmentation="crop-jitter" if self.augmentation_epochs else "none",
            augmentation_epochs=max(self.augmentation_epochs, 1),
            storage=cast("Any", self.storage),
        )

        def measure(moment: Moment) -> Mapping[str, Measurement]:
            def draw(sheet: Sheet) -> None:
                from amradio.viz.contact_sheet import contact_sheet

                moment.show(f"{name}/{sheet.id}", contact_sheet(sheet))

            backbone = self.backbone(moment)
            sheets = SheetOptions(self.sheets) if self.sheets else None
            setup = self.setup(moment, backbone)
            (report,) = run_in_context(backbone, train, evaluation, config, setup, sheets=sheets, on_sheet=draw)
            patches = int(report.metrics["memory_patches"].value)
            return _kept(
                moment, name, report, ["miou", "pixel_accuracy"], f"k = {self.k}, memory of {patches:,} patches"
            )

        return measure


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(HookOptions):
    """Zero-shot classification, by an adaptor with a text side.

    Attributes:
        adaptor: As above; needed.
        templates: Prompts, see `amradio.evals.zero_shot`.
        class_names: Names of the classes, likewise.
    """

    adaptor: str = field()
    templates: str = "openai"
    class_names: str = "auto"

    def prepared(self, name: str, teachers: Sequence[TeacherConfig]) -> Function:
        """See `HookOptions`."""
        from tempfile import TemporaryDirectory

        from amradio.evals.runner import labels_of
        from amradio.evals.zero_shot import ZeroShotConfig, resolve_class_names, run_zero_shot
        from amradio.text.prompts import load_templates
        from amradio.text.towers import has_text_side, load_text_tower

        text = next(t.text for t in teachers if t.name == self.adaptor)
        record = {"name": self.adaptor, **({} if text is None else text)}
        if not has_text_side(record):
            raise ConfigError(
                f"The hook {name!r}: the teacher {self.adaptor!r} has no text side. Name one that has, or say under "
                "the teacher what embeds its texts, such as text: {type: sentence, model: all-MiniLM-L6-v2}."
            )
        images = self.images(self.eval, self.eval_split)
        config = ZeroShotConfig(templates=self.templates, class_names=self.class_names)
        labels_of(images), resolve_class_names(images, self.class_names), load_templates(self.templates)

        @cache
        def tower(device: Any) -> Any:
            return load_text_tower(record, device=device)

        def measure(moment: Moment) -> Mapping[str, Measurement]:
            adaptor: Any = moment.model.adaptors[self.adaptor]
            adaptor.attach_text(tower)
            backbone = self.backbone(moment)
            with TemporaryDirectory() as folder:  # a classifier of a student that will be another one soon is not kept
                report = run_zero_shot(backbone, images, config, self.setup(moment, backbone), cache_dir=folder)
            return _kept(moment, name, report, ["top1"], f"adaptor {self.adaptor}, templates {self.templates}")

        return measure


@dataclass(frozen=True, kw_only=True)
class PcaOptions(HookOptions):
    """Pictures of the features beside the photos, in colours that mean the same in all of one moment.

    Attributes:
        limit: As above; 8 if it is None.
    """

    limit: int | None = 8

    def prepared(self, name: str, teachers: Sequence[TeacherConfig]) -> Function:
        """See `HookOptions`."""
        import torch
        from PIL import Image

        from amradio.images import MAX_PIXELS, WHITE
        from amradio.viz.pca import fit_basis, pca_rgb, side_by_side, to_picture

        sources = self.images(self.eval, self.eval_split)
        pictures = [(s.id, s.decode(max_pixels=MAX_PIXELS, background=WHITE)) for s in sources]

        def draw(moment: Moment) -> Mapping[str, Measurement]:
            backbone = self.backbone(moment)
            policy, device = self.policy(backbone), next(moment.model.parameters()).device
            photos, maps = [], []
            for _, picture in pictures:
                pixels = policy.pixels(picture)  # uint8 [3, H, W]
                with torch.inference_mode():
                    found = backbone(pixels[None].to(device).float() / 255, feature_fmt="NHWC").features  # [1, h, w, D]
                photos.append(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
                maps.append(found[0].float().cpu())
            basis = fit_basis(maps)
            for (picture_id, _), photo, found in zip(pictures, photos, maps, strict=True):
                drawn = to_picture(pca_rgb(found, basis), (photo.height, photo.width))
                moment.show(f"{name}/{picture_id}", side_by_side([photo, drawn]))
            return {}

        return draw


def make_hooks(config: DistillConfig) -> list[Hook]:
    """Make the hooks of a run.

    Args:
        config: Of the run.

    Raises:
        ConfigError: There is no such kind, it has no such option, or no teacher is called as an option says.
        AmradioError: Pictures cannot be opened, or not be used.
    """
    from amradio.distill.hooks import FunctionHook

    hooks: list[Hook] = []
    for hook in config.hooks:
        if hook.kind not in _KINDS:
            raise ConfigError(f"There is no hook {hook.kind!r}. {nearest_names(hook.kind, _KINDS)}")
        options = _parsed(hook, [t.name for t in config.teachers])
        name = hook.name or hook.kind
        hooks.append(FunctionHook(name, hook.every, options.prepared(name, config.teachers)))
    return hooks


def _parsed(hook: HookConfig, adaptors: Collection[str]) -> HookOptions:
    from amradio.distill.config import parse_strictly

    where = f"The hook {hook.name or hook.kind!r}"
    options = parse_strictly(_KINDS[hook.kind], hook.options, where)
    if options.adaptor is not None and options.adaptor not in adaptors:
        raise ConfigError(
            f"{where}: there is no teacher {options.adaptor!r}. {nearest_names(options.adaptor, adaptors)}"
        )
    if len(options.size) != 2:
        raise ConfigError(f"{where}: resolution must be one number or [height, width], got {list(options.size)}.")
    return options


def _kept(moment: Moment, name: str, report: EvalReport, metrics: Sequence[str], how: str) -> Mapping[str, Measurement]:
    """Save a report beside the run; returns its numbers and what they were measured on."""
    from amradio.distill.hooks import Measurement

    report.save(moment.folder / "evaluations" / f"step-{moment.step:08d}" / name)
    data = ", from ".join(_set(report.dataset[role]) for role in ("eval", "train") if role in report.dataset)
    about = f"{data}; {report.size_label}, {how}"
    found = {metric: report.metrics[metric] for metric in metrics}
    return {metric: Measurement(value=m.value, unit=m.unit, data=about) for metric, m in found.items()}


def _set(record: Mapping[str, Any]) -> str:
    split = f" ({record['split']})" if record["split"] else ""
    return f"{record['count'] - record['failed']:,} pictures of {record['name']}{split}"


_KINDS: Mapping[str, type[HookOptions]] = {
    "knn": KnnOptions,
    "in-context": InContextOptions,
    "zero-shot": ZeroShotOptions,
    "pca": PcaOptions,
}
