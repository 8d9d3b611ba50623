"""Several passes over the feature maps of a set, in shuffled batches that do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from amradio.evals.runner import Measurement
from amradio.evals.streaming import FeaturePass
from amradio.images.dataset import ImageSet


class ShuffledMaps:
    """Feature maps of a train set, batch by batch.

    Every batch is made of the same pictures, whatever the number of processes; each process gets its own of them, maybe
    none, so that all take part in as many steps. Maps are kept after the first epoch if they fit into memory in every
    process, and are computed anew in each epoch otherwise.

    Args:
        measurement: Whose backbone and setup are used; the first epoch is noted in it as ``train``.
        images: The set.
        batch_size: Pictures in a batch, over all processes.
        seed: Of the order.
        cache_bytes: How much memory kept maps may take in each process.
    """

    def __init__(
        self, measurement: Measurement, images: ImageSet, batch_size: int, seed: int, cache_bytes: int
    ) -> None:
        self._measurement = measurement
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._cache = _Cache(cache_bytes)
        self._is_cached = False  # for good, in all processes

    def epoch(self, number: int) -> Iterator[list[Tensor]]:
        """Go through all pictures once.

        Args:
            number: From 0, in turn.

        Yields:
            For each batch the maps [D, h, w] of this process's pictures that worked.

        Raises:
            DatasetError: In the first epoch, at its end: no picture worked.
            OptionError: Likewise: features are not finite.
        """
        order = np.random.Generator(np.random.PCG64([self._seed, number])).permutation(len(self._images))
        yield from self._kept(order) if self._is_cached else self._computed(order, first=number == 0)

    def _kept(self, order: np.ndarray) -> Iterator[list[Tensor]]:
        # Each picture stays with the process that computed it. That processes have unequal numbers of a batch costs
        # nothing where there is no backbone to run.
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size].tolist()
            yield [self._cache.maps[i] for i in batch if i in self._cache.maps]

    def _computed(self, order: np.ndarray, *, first: bool) -> Iterator[list[Tensor]]:
        group = self._measurement.setup.group
        own = order if group is None else order[group.rank :: group.world_size]
        features = FeaturePass(self._measurement, self._images, own, "all", shows_progress=first)
        batch_of = np.empty(len(order), dtype=np.int64)
        batch_of[order] = np.arange(len(order)) // self._batch_size
        number, batch = 0, list[Tensor]()
        for record in features:
            while number < batch_of[record.position]:
                yield batch
                number, batch = number + 1, []
            maps = record.outputs["backbone"].features
            if first:
                self._cache.add(record.position, maps)
            batch.append(maps)
        while number * self._batch_size < len(order):
            yield batch
            number, batch = number + 1, []
        if first:
            features.finish("train")
            everywhere = [self._cache.is_complete]
            if group is not None:
                everywhere = group.all_gather_objects(self._cache.is_complete)
            self._is_cached = all(everywhere)
            if not self._is_cached:
                self._cache.close()


class _Cache:
    """Feature maps by position, as long as they fit."""

    def __init__(self, limit_bytes: int) -> None:
        self.maps: dict[int, Tensor] = {}
        self.is_complete = True
        self._left = limit_bytes

    def add(self, position: int, maps: Tensor) -> None:
        self._left -= maps.numel() * maps.element_size()
        if self._left < 0:
            self.close()
        if self.is_complete:
            self.maps[position] = maps

    def close(self) -> None:
        self.maps.clear()
        self.is_complete = False
