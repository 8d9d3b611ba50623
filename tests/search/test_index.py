import importlib
import sys
import types

import numpy as np
import pytest
import torch

from amradio.errors import MissingDependencyError, OptionError
from amradio.search import build_index, load_index, recall_at_k, top_k


@pytest.fixture
def clustered(unit):
    """Queries and a database with structure that an index can use."""
    centres = unit(20, 32, 7)

    def make(count, seed):
        random = torch.Generator().manual_seed(seed)
        rows = centres[torch.randint(20, (count,), generator=random)] + 0.1 * torch.randn(count, 32, generator=random)
        return torch.nn.functional.normalize(rows, dim=1)

    return make(60, 1), make(3000, 2)


def test_exact(clustered):
    queries, database = clustered
    index = build_index(database, memory_limit_bytes=8 * 2**20)
    assert len(index) == 3000
    assert index.spec == "exact"
    assert recall_at_k(index.search(queries, 10), top_k(queries, database, 10)) == 1.0


def test_an_exact_index_takes_a_similarity(clustered):
    queries, database = clustered
    index = build_index(database, similarity=lambda q, d: -torch.cdist(q, d))
    assert recall_at_k(index.search(queries, 5), top_k(queries, database, 5)) == pytest.approx(1.0)


# ---- FAISS ----


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.mark.parametrize(
    ("factory", "options", "recall"),
    [
        ("Flat", {}, 1.0),
        ("IVF16,Flat", {"nprobe": 16}, 1.0),
        ("IVF16,Flat", {"nprobe": 4}, 0.9),
        ("HNSW32", {"ef_search": 128, "ef_construction": 80}, 0.95),
        ("PQ16np", {"train_rows": 1000}, 0.5),
        ("IVF16,PQ16x4np", {"nprobe": 16}, 0.3),
        ("PCA16,IVF16,Flat", {"nprobe": 16, "train_rows": 1500}, 0.3),
    ],
)
def test_faiss(faiss, clustered, factory, options, recall):
    queries, database = clustered
    index = build_index(database, f"faiss:{factory}", **options)
    found, exact = index.search(queries, 10), top_k(queries, database, 10)
    assert len(index) == 3000
    assert index.spec == f"faiss:{factory}"
    assert recall_at_k(found, exact) >= recall
    assert found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64
    assert (found.scores.diff(dim=1) <= 0).all()
    if recall == 1.0:
        assert torch.allclose(found.scores, exact.scores, atol=1e-6)


def test_faiss_marks_what_it_did_not_find(faiss, clustered):
    queries, database = clustered
    found = build_index(database, "faiss:IVF64,Flat", nprobe=1).search(queries, 400)
    missing = found.indices < 0
    assert missing.any()
    assert (found.indices[missing] == -1).all()
    assert torch.equal(found.scores == float("-inf"), missing)
    assert not missing[:, 0].any()


def test_faiss_reads_any_database(faiss, clustered):
    queries, database = clustered
    expected = build_index(database, "faiss:IVF16,Flat", train_rows=500).search(queries, 5)
    for kind in (database.numpy(), database.double().numpy()[::-1][::-1]):
        found = build_index(kind, "faiss:IVF16,Flat", train_rows=500).search(queries, 5)
        assert torch.equal(found.indices, expected.indices)


def test_faiss_indexes_are_saved(faiss, clustered, tmp_path):
    queries, database = clustered
    index = build_index(database, "faiss:IVF16,Flat", nprobe=3)
    index.save(tmp_path / "rows.faiss")
    again = load_index(tmp_path / "rows.faiss")
    assert len(again) == 3000
    assert torch.equal(again.search(queries, 5).indices, index.search(queries, 5).indices)


def test_faiss_leaves_its_threads_alone(faiss, clustered):
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    build_index(clustered[1], "faiss:Flat", threads=1).search(clustered[0], 3)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("faiss:Bogus", {}, r"cannot make an index 'Bogus' for 32 features: could not parse index string Bogus\."),
        ("faiss:PQ5", {}, r"The dimension of the vector \(d\) should be a multiple of the number of subquantizers"),
        ("faiss:IVF4000,Flat", {}, r"with 3000 rows of 32 features .* Number of training points \(3000\) should be"),
        ("faiss:Flat", {"nprobe": 3}, r"A FAISS index 'Flat' has no parameter nprobe\."),
        ("faiss:Flat", {"n_probe": 3}, r"An index 'faiss:Flat' has no option 'n_probe'\. Nearest names: nprobe"),
    ],
)
def test_faiss_says_what_is_wrong(faiss, clustered, spec, options, message):
    with pytest.raises(OptionError, match=message):
        build_index(clustered[1], spec, **options)


def test_files_that_are_no_index(faiss, tmp_path):
    (tmp_path / "text").write_text("hello world")
    with pytest.raises(OptionError, match=r"FAISS cannot read .*text: Index type .* not recognized"):
        load_index(tmp_path / "text")
    faiss.write_index(faiss.index_factory(4, "Flat", faiss.METRIC_L2), str(tmp_path / "l2"))
    with pytest.raises(OptionError, match="another measure than the inner product"):
        load_index(tmp_path / "l2")
    with pytest.raises(OptionError, match="There is no index at"):
        load_index(tmp_path / "nowhere")


# ---- ScaNN ----


class FakeSearcher:
    """Answers as ScaNN's searcher does, which pads with index 0 and score NaN."""

    def __init__(self, rows, calls):
        self.rows, self.calls = rows, calls

    def size(self):
        return len(self.rows)

    def search_batched(self, queries, final_num_neighbors=None, pre_reorder_num_neighbors=None, leaves_to_search=None):
        self.calls.append(("search", final_num_neighbors, pre_reorder_num_neighbors))
        scores = queries @ self.rows.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :final_num_neighbors]
        scores = np.take_along_axis(scores, order, 1)
        order, found = order.astype(np.uint32), max(final_num_neighbors - 2, 1)
        order[:, found:], scores[:, found:] = 0, np.nan
        return order, scores.astype(np.float32)


class FakeBuilder:
    def __init__(self, rows, calls):
        self.rows, self.calls = rows, calls

    def __getattr__(self, step):
        def record(*args, **options):
            self.calls.append((step, *args, options))
            return self

        return record

    def build(self):
        return FakeSearcher(self.rows, self.calls)


@pytest.fixture
def fake_scann(monkeypatch):
    """The surface of the package that the adapter touches; the calls it gets."""
    calls = []

    def builder(rows, num_neighbors, distance_measure):
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        calls.append(("builder", num_neighbors, distance_measure))
        return FakeBuilder(rows, calls)

    module = types.ModuleType("scann")
    module.scann_ops_pybind = types.SimpleNamespace(builder=builder)
    monkeypatch.setitem(sys.modules, "scann", module)
    return calls


def test_scann_is_called_with_what_was_asked_for(fake_scann, clustered):
    queries, database = clustered
    index = build_index(
        database.bfloat16(),
        "scann",
        num_leaves=50,
        num_leaves_to_search=10,
        num_reordering_candidates=100,
        anisotropic_quantization_threshold=0.3,
        dimensions_per_block=2,
    )
    found = index.search(queries, 10)
    index.search(queries, 150)
    assert fake_scann == [
        ("builder", 1, "dot_product"),
        ("set_n_training_threads", 0, {}),
        ("tree", {"num_leaves": 50, "num_leaves_to_search": 10, "training_sample_size": 100_000}),
        ("score_ah", 2, {"anisotropic_quantization_threshold": 0.3, "training_sample_size": 100_000}),
        ("reorder", 100, {}),
        ("search", 10, 100),
        ("search", 150, 150),
    ]
    exact = top_k(queries.float(), database.bfloat16().float(), 8)
    assert torch.equal(found.indices[:, :8], exact.indices)
    assert (found.indices[:, 8:] == -1).all()
    assert (found.scores[:, 8:] == float("-inf")).all()
    assert index.search(queries[:0], 3).indices.shape == (0, 3)


def test_scann_options_must_fit_the_database(fake_scann, clustered):
    with pytest.raises(OptionError, match=r"got 32, 512 and 100\. A common choice of num_leaves .* here 10"):
        build_index(clustered[1][:100], "scann")


@pytest.fixture
def scann():
    return pytest.importorskip("scann")


def test_scann_itself(scann, clustered, tmp_path):
    queries, database = clustered
    index = build_index(database, "scann", num_leaves=50, num_leaves_to_search=10, dimensions_per_block=2)
    exact = top_k(queries, database, 10)
    found = index.search(queries, 10)
    assert len(index) == 3000
    assert recall_at_k(found, exact) >= 0.9
    assert torch.allclose(found.scores[:, 0], exact.scores[:, 0], atol=0.02)
    many = index.search(queries, 2000)
    missing = many.indices < 0
    assert missing.any()
    assert torch.equal(many.scores == float("-inf"), missing)
    assert index.search(queries[:0], 3).indices.shape == (0, 3)
    index.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = load_index(tmp_path / "moved")
    assert again.options == index.options
    assert torch.equal(again.search(queries, 10).indices, found.indices)
    (tmp_path / "moved" / "scann_docids.pkl").write_bytes(b"anything")
    with pytest.raises(OptionError, match=r"holds a pickle, scann_docids.pkl"):
        load_index(tmp_path / "moved")


def test_folders_that_are_no_index(fake_scann, tmp_path):
    with pytest.raises(OptionError, match=r"is no ScaNN index that amradio saved: it has no amradio\.json"):
        load_index(tmp_path)


# ---- all of them ----


@pytest.mark.parametrize("spec", ["annoy", "faiss", "faiss:", "exact:5", "scann:5", ""])
def test_unknown_kinds_are_refused(unit, spec):
    with pytest.raises(OptionError, match=r"is no kind of index. Known: 'exact', 'scann', and 'faiss:'"):
        build_index(unit(9, 4), spec)


@pytest.mark.parametrize(("spec", "extra"), [("faiss:Flat", "search"), ("scann", "scann")])
def test_a_missing_package_names_its_extra(unit, monkeypatch, spec, extra):
    def missing(name, *args, **options):
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'amradio\[{extra}\]'"):
        build_index(unit(9, 4), spec)


@pytest.mark.parametrize("spec", ["faiss:Flat", "scann"])
def test_bad_features_are_named(faiss, fake_scann, clustered, spec):
    queries, database = clustered
    options = {"num_leaves": 9, "num_leaves_to_search": 3} if spec == "scann" else {}
    index = build_index(database, spec, **options)
    for bad, message in [
        (queries[:, :4], r"Queries must have the shape \[Q, 32\] as the index was built, got \[60, 4\]"),
        (queries.clone().index_fill_(0, torch.tensor([7]), float("nan")), "Row 7 of the queries holds nan"),
    ]:
        with pytest.raises(OptionError, match=message):
            index.search(bad, 3)
    with pytest.raises(OptionError, match="k must be at least 1, got 0"):
        index.search(queries, 0)
    database[99, 3] = float("inf")
    with pytest.raises(OptionError, match="Row 99 of the database holds inf"):
        build_index(database, spec, **options)
    with pytest.raises(OptionError, match="The database has no rows"):
        build_index(database[:0], spec, **options)
