"""States in files of bounded size: whole again when they are loaded, whatever was cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter, load, save

from amradio.distill.pieces import PiecePlanner, bounded_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPES = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, piece=st.integers(16, 3000))
def test_states_are_whole_again(tmp_path_factory, shapes, piece):
    folder = tmp_path_factory.mktemp("state")
    state = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)} | {"note": {"x": [1, 2]}}
    save(state, storage_writer=FileSystemWriter(folder, thread_count=3), planner=PiecePlanner(piece), no_dist=True)
    found = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in state.items()}
    found["note"] = {"x": [0, 0]}
    load(found, checkpoint_id=folder, no_dist=True)
    assert found.pop("note") == state.pop("note")
    assert all(torch.equal(found[k], v) for k, v in state.items())


def test_files_stay_below_their_bound(tmp_path):
    bound = 256 * 1024
    shapes = [(700, 300), (300,), (3, 5, 7), (), (1, 90_000), *[(64, 64)] * 20, *[(64,)] * 20]
    state = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    files, piece = bounded_files(list(state.values()), bound)
    save(
        state, storage_writer=FileSystemWriter(tmp_path, thread_count=files), planner=PiecePlanner(piece), no_dist=True
    )
    sizes = [f.stat().st_size for f in tmp_path.iterdir()]
    assert max(sizes) <= bound
    assert len(sizes) == files + 1  # and the metadata
    assert sum(sizes) < 1.2 * sum(t.numel() * 4 for t in state.values())
