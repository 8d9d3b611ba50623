"""References and tools for the tests of the search."""

import weakref

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def unit():
    """Random unit vectors [n, D]."""

    def make(n, dim, seed=0):
        return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)

    return make


@pytest.fixture
def reference():
    """Neighbours by NumPy: all scores in float64, rounded to float32, sorted by (score, index)."""

    def search(queries, database, k):
        scores = (queries.double().numpy() @ database.double().numpy().T).astype(np.float32)  # [Q, N]
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), order

    return search


@pytest.fixture
def peak_bytes():
    """Bytes of all tensors that a call has alive at once at most, beside those that were there before."""

    class Tracker(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live, self.peak, self.known = 0, 0, {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.watch(tensor.untyped_storage(), given)
            return out

        def watch(self, storage, given):
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or storage.data_ptr() in given or not size:
                return
            self.known[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

        def forget(self, key):
            self.live -= self.known.pop(key)

    def measure(call):
        with Tracker() as tracker:
            call()
        return tracker.peak

    return measure
