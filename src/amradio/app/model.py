"""The model of the app: its outputs, and the feature maps that were computed already."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amradio.errors import CapabilityError, OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from amradio.app.photos import Photo
    from amradio.app.visit import Visit
    from amradio.backbones.protocol import Backbone
    from amradio.features.maps import FeatureMap
    from amradio.images.resize import ResizePolicy

BACKBONE = "backbone"
LOWEST_RESOLUTION, HIGHEST_RESOLUTION, RESOLUTION_STEP = 224, 1024, 32

_BATCH = 4  # small, so that progress is seen
_TEXTS = 1000


class MapCache:
    """Feature maps by what they were computed from; those that were used longest ago give way.

    Args:
        limit_bytes: Of all maps.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._maps: OrderedDict[tuple[Hashable, ...], FeatureMap] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[Hashable, ...]) -> FeatureMap | None:
        """A map, if it is there."""
        with self._lock:
            found = self._maps.get(key)
            if found is not None:
                self._maps.move_to_end(key)
            return found

    def put(self, key: tuple[Hashable, ...], value: FeatureMap) -> None:
        """Keep a map."""
        with self._lock:
            self._forget([key])
            self._maps[key] = value
            self._bytes += _size(value)
            while self._bytes > self._limit and len(self._maps) > 1:
                self._forget([next(iter(self._maps))])

    def drop(self, session: str) -> None:
        """Forget what was computed for a session."""
        with self._lock:
            self._forget([key for key in self._maps if key[0] == session])

    @property
    def nbytes(self) -> int:
        """Of all maps."""
        return self._bytes

    def _forget(self, keys: Sequence[tuple[Hashable, ...]]) -> None:
        for key in keys:
            gone = self._maps.pop(key, None)
            self._bytes -= 0 if gone is None else _size(gone)


class AppModel:
    """A model whose outputs the page shows.

    Args:
        name: What it is called on the page.
        outputs: Backbones by name, ``backbone`` first; of a RADIO model also the views of its adaptors.
        device: Where they are.
        cache_bytes: See `MapCache`.

    Attributes:
        name: See above.
        outputs: See above.
        device: See above.
        depth: Blocks whose features can be shown; 0 if they cannot.
        cache: What was computed.
    """

    def __init__(
        self, name: str, outputs: Mapping[str, Backbone], device: torch.device, cache_bytes: int = 2**30
    ) -> None:
        self.name = name
        self.outputs = dict(outputs)
        self.device = device
        self.cache = MapCache(cache_bytes)
        self._texts: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self.depth = _depth(self.outputs[BACKBONE])

    @classmethod
    def of(cls, name: str, model: Any, device: torch.device, cache_bytes: int = 2**30) -> AppModel:
        """A model as `amradio.load` or `amradio.load_backbone` gives it."""
        adaptors = list(getattr(model, "adaptors", ()))
        views = {n: model.view(n) for n in (BACKBONE, *adaptors)} if adaptors else {BACKBONE: model}
        return cls(name, views, device, cache_bytes)

    @property
    def text_output(self) -> str | None:
        """The output that can be compared with words; None if there is none."""
        return next((name for name, output in self.outputs.items() if _speaks(output)), None)

    @property
    def text_map_output(self) -> str | None:
        """The output each of whose features can be compared with words; None if there is none."""
        return next((n for n, o in self.outputs.items() if _speaks(o) and o.embed_dim == o.summary_dim), None)

    def output(self, name: Any) -> Backbone:
        """An output by the name that a page said.

        Raises:
            OptionError: There is none.
        """
        if name not in self.outputs:
            raise OptionError(f"The model has the outputs {', '.join(self.outputs)}, and not {name!r:.40}.")
        return self.outputs[name]

    def remembered(self, text: tuple[str, str], make: Callable[[], Tensor]) -> Tensor:
        """What a text is in the space of an output; made if it was not asked for lately.

        Args:
            text: Name of the output, and the text.
            make: Computes it.
        """
        if text not in self._texts:
            self._texts[text] = make()
            if len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)
        return self._texts[text]

    def policy(self, resolution: Any) -> ResizePolicy:
        """To which size photos are brought: the longest side is what a page said.

        Raises:
            OptionError: It is no number in the range of the slider.
        """
        from amradio.images.resize import ResizePolicy

        if not isinstance(resolution, (int, float)) or not LOWEST_RESOLUTION <= resolution <= HIGHEST_RESOLUTION:
            raise OptionError(f"The resolution is from {LOWEST_RESOLUTION} to {HIGHEST_RESOLUTION} pixels.")
        multiple = self.outputs[BACKBONE].min_resolution_step
        return ResizePolicy.parse([int(resolution)], "longest", multiple)

    def maps(
        self,
        visit: Visit,
        photos: Mapping[int, Photo],
        name: Any,
        resolution: Any,
        layer: int | None = None,
        *,
        gradients: bool = False,
    ) -> dict[int, FeatureMap]:
        """The feature maps of photos, by key; only those that are new are computed.

        Args:
            visit: Who asks; hears how far it got.
            photos: The photos of the session, in a mapping of the caller's own: the page may be closed meanwhile.
            name: Of the output.
            resolution: Longest side in pixels.
            layer: Block, from 0; None: the output itself.
            gradients: Whether the features get gradients beside them (FUNGI). They depend on all photos.

        Raises:
            OptionError: What the page said does not fit.
            CapabilityError: The model cannot do this.
        """
        output, policy = self.output(name), self.policy(resolution)
        if layer is not None and not 0 <= layer < self.depth:
            raise OptionError(f"The model has {self.depth} layers, and no layer {layer + 1}.")
        among = tuple(photos) if gradients else ()
        keys = {key: (visit.session.name, key, name, int(resolution), layer, among) for key in photos}
        found = {key: self.cache.get(keys[key]) for key in photos}
        missing = [photo for key, photo in photos.items() if found[key] is None]
        if missing and gradients:
            output = self._with_gradients(visit, output, list(photos.values()), policy)
        what = "Looking closer (with gradients)" if gradients else "Looking at the photos"
        for photo, computed in zip(missing, self._compute(visit, output, missing, policy, layer, what), strict=True):
            found[photo.key] = computed
            self.cache.put(keys[photo.key], computed)
        return {key: value for key, value in found.items() if value is not None}

    def _compute(
        self, visit: Visit, output: Any, photos: Sequence[Photo], policy: ResizePolicy, layer: int | None, what: str
    ) -> Iterator[FeatureMap]:
        from amradio.features.maps import feature_maps

        if not photos:
            return
        pictures = (photo.picture for photo in photos)
        maps = feature_maps(output, pictures, policy, layer=layer, batch_size=_BATCH)
        yield from visit.steps(maps, len(photos), what)

    def _with_gradients(self, visit: Visit, output: Any, photos: Sequence[Photo], policy: ResizePolicy) -> Any:
        from amradio.fungi import DenseConfig, DenseFungiBackbone
        from amradio.images import to_tensor

        try:
            wrapped = DenseFungiBackbone(output, DenseConfig(projection="tensor-sketch"))
        except CapabilityError as error:
            raise CapabilityError(f"Gradients cannot be added to the features of {self.name}: {error}") from error
        sizes = [output.get_nearest_supported_resolution(*policy.target_size(p.picture.height, p.picture.width))
                 for p in photos]  # fmt: skip
        images = (to_tensor(policy.apply(p.picture, size))[None] for p, size in zip(photos, sizes, strict=True))
        return wrapped.fit(visit.steps(images, len(photos), "Getting to know the photos")).eval()


def load_app_model(
    name: str, load: Any, adaptors: Sequence[str] | None, device: torch.device, cache_bytes: int = 2**30
) -> AppModel:
    """Load a model with its adaptors.

    Args:
        name: See `amradio.load_backbone`.
        load: Loads a name with some adaptors, such as `amradio.cli.common.BackboneOptions.load_model`.
        adaptors: Which; None: all that it has.
        device: Where to.
        cache_bytes: See `MapCache`.

    Returns:
        The model.
    """
    model = load(name, list(adaptors or ()))
    if adaptors is None:
        config = getattr(model, "config", None)
        every = list(getattr(config, "adaptors", ()))
        if every:
            model = load(name, every)
    return AppModel.of(name, model, device, cache_bytes)


def _speaks(output: Any) -> bool:
    """Whether an output has a text side that can be loaded; asking does not load it."""
    from amradio.models.view import RadioView

    if isinstance(output, RadioView):
        return output.name != BACKBONE and bool(output.radio.adaptors[output.name].has_text)
    return inspect.getattr_static(output, "encode_text", None) is not None


def _depth(backbone: Any) -> int:
    from amradio.backbones.protocol import HasIntermediates
    from amradio.models.configs import ViTConfig

    inner = getattr(backbone, "radio", backbone)
    trunk = getattr(getattr(inner, "config", None), "backbone", None)
    return trunk.depth if isinstance(trunk, ViTConfig) and isinstance(inner, HasIntermediates) else 0


def _size(found: FeatureMap) -> int:
    return found.features.nbytes + found.summary.nbytes + 3 * found.photo.width * found.photo.height
