import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from amradio.errors import OptionError
from amradio.search import plan_memory, top_k


def assert_same(found, expected):
    scores, indices = expected
    assert np.array_equal(found.indices.numpy(), indices)
    assert np.array_equal(found.scores.numpy(), scores)
    assert found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64


def chunked(queries, database, k, query_rows, database_rows, pass_rows=None, candidates=None, exact_rows=None):
    """A plan with given chunk sizes."""
    plan = plan_memory(len(queries), len(database), queries.shape[1], k)
    return dataclasses.replace(
        plan,
        query_rows=query_rows,
        database_rows=database_rows,
        pass_rows=pass_rows or plan.pass_rows,
        candidates=candidates or plan.candidates,
        exact_rows=exact_rows or plan.exact_rows,
    )


# ---- against references ----


@pytest.mark.parametrize(("count", "dim", "k"), [(5000, 33, 10), (300, 7, 300), (9000, 64, 1), (40, 513, 20)])
def test_equals_numpy(unit, reference, count, dim, k):
    queries, database = unit(50, dim, 1), unit(count, dim, 2)
    assert_same(top_k(queries, database, k), reference(queries, database, k))


def test_unnormalised_features_equal_numpy(reference):
    queries, database = torch.randn(40, 100) * 30, torch.randn(3000, 100) * torch.rand(3000, 1).exp()
    assert_same(top_k(queries, database, 15), reference(queries, database, 15))


def test_equals_scikit_learn(unit):
    queries, database = unit(30, 24, 1), unit(2000, 24, 2)
    theirs = NearestNeighbors(n_neighbors=12, metric="cosine", algorithm="brute").fit(database.numpy())
    distances, indices = theirs.kneighbors(queries.numpy())
    found = top_k(queries, database, 12)
    assert np.array_equal(found.indices.numpy(), indices)
    assert np.allclose(found.scores.numpy(), 1 - distances, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_is_scored_in_float32_or_better(unit, reference, dtype):
    queries, database = unit(20, 48, 1).to(dtype), unit(3000, 48, 2).to(dtype)
    assert_same(top_k(queries, database, 9), reference(queries, database, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_rounds_features(unit, reference, dtype):
    queries, database = unit(20, 48, 1), unit(3000, 48, 2)
    expected = reference(queries.to(dtype), database.to(dtype), 9)
    assert_same(top_k(queries, database, 9, dtype=dtype), expected)


def test_mixed_dtypes_are_compared_in_float32(unit, reference):
    queries, database = unit(20, 48, 1), unit(500, 48, 2).bfloat16()
    assert_same(top_k(queries, database, 9), reference(queries, database, 9))


def test_shortened_matrix_products_change_nothing(unit, reference):
    queries, database = unit(20, 48, 1), unit(3000, 48, 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = top_k(queries, database, 9)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(found, reference(queries, database, 9))


# ---- chunks and ties ----

sizes = st.integers(1, 60)


@settings(max_examples=25)
@given(st.integers(0, 2**31), sizes, sizes, sizes, st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_no_chunking_changes_a_bit(seed, query_rows, database_rows, pass_rows, k, dim, ties):
    random = torch.Generator().manual_seed(seed)
    queries, database = torch.randn(23, dim, generator=random), torch.randn(150, dim, generator=random)
    if ties:
        queries, database = queries.round(), database.round()
    plan = chunked(queries, database, k, query_rows, database_rows, pass_rows, candidates=k + 3, exact_rows=2)
    scores = (queries.double() @ database.double().T).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = top_k(queries, database, k, plan=plan)
    assert torch.equal(found.indices, order)
    assert torch.equal(found.scores, scores.gather(1, order))


@settings(max_examples=25)
@given(st.integers(0, 2**31), sizes, sizes, st.integers(1, 150))
def test_ties_of_a_similarity_go_to_the_lower_row(seed, query_rows, database_rows, k):
    random = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (9, 3), generator=random).float()
    database = torch.randint(-2, 3, (150, 3), generator=random).float()

    def similarity(q, d):
        return -(q[:, None] - d[None]).abs().sum(2)  # [q, d]

    plan = chunked(queries, database, k, query_rows, database_rows, exact_rows=4)
    scores = similarity(queries, database)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    found = top_k(queries, database, k, similarity=similarity, plan=plan)
    assert np.array_equal(found.indices.numpy(), order)


def test_the_last_bit_of_a_matrix_product_depends_on_its_shape_and_ours_does_not(unit):
    queries, database = unit(64, 512, 1), unit(3000, 512, 2)
    whole, pieces = queries @ database.T, torch.cat([q[None] @ database.T for q in queries])
    if torch.equal(whole, pieces):
        pytest.skip("this machine's matrix product happens not to depend on its shape")
    one = top_k(queries, database, 20)
    for query_rows, database_rows in ((1, 3000), (64, 7), (13, 100)):
        other = top_k(queries, database, 20, plan=chunked(queries, database, 20, query_rows, database_rows))
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.indices, other.indices)


def test_threads_change_nothing(unit):
    queries, database = unit(64, 512, 1), unit(3000, 512, 2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(top_k(queries, database, 20))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].scores, found[1].scores)
    assert torch.equal(found[0].indices, found[1].indices)


def test_copies_come_in_the_order_of_the_database(unit):
    queries, once = unit(10, 64, 1), unit(300, 64, 2)
    database = once.repeat(40, 1)
    found = top_k(queries, database, 50, plan=chunked(queries, database, 50, 4, 1000))
    best = top_k(queries, once, 2).indices
    assert torch.equal(found.indices[:, :40], best[:, :1] + 300 * torch.arange(40))
    assert torch.equal(found.indices[:, 40:], best[:, 1:] + 300 * torch.arange(10))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-25])
def test_a_constant_database_gives_the_first_rows(value):
    found = top_k(torch.ones(3, 40), torch.full((5000, 40), value), 7)
    assert torch.equal(found.indices, torch.arange(7).expand(3, -1))


def test_scores_that_cancel(reference):
    random = torch.Generator().manual_seed(0)
    database = torch.randn(2000, 64, generator=random)
    queries = torch.zeros(5, 64)
    queries[:, 0] = 1e-8
    queries[1, 1:3] = torch.tensor([1e4, -1e4])
    assert_same(top_k(queries, database, 11), reference(queries, database, 11))


def test_zero_and_minus_zero_are_equal():
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0]])
    found = top_k(torch.ones(1, 1), torch.ones(4, 1), 3, similarity=lambda q, d: scores)
    assert found.indices.tolist() == [[0, 1, 3]]


def test_minus_infinity_is_a_similarity_like_any_other():
    scores = torch.tensor([[float("-inf"), 1.0, float("-inf")]])
    found = top_k(torch.ones(1, 1), torch.ones(3, 1), 3, similarity=lambda q, d: scores)
    assert found.indices.tolist() == [[1, 0, 2]]


# ---- where the database lies ----


class OnDisk:
    """A length and slices; nothing else."""

    def __init__(self, rows):
        self.rows, self.largest = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.largest = max(self.largest, rows.stop - rows.start)
        return self.rows[rows]


def test_a_database_on_disk(unit, reference, tmp_path):
    queries, database = unit(20, 32, 1), unit(3000, 32, 2)
    np.save(tmp_path / "rows.npy", database.numpy())
    memory_map = np.load(tmp_path / "rows.npy", mmap_mode="r")
    plan = chunked(queries, database, 5, 7, 256)
    sliced = OnDisk(database)
    for kind in (memory_map, sliced, OnDisk(memory_map), database.numpy()[::-1][::-1]):
        assert_same(top_k(queries, kind, 5, plan=plan), reference(queries, database, 5))
    assert sliced.largest == 256


def test_gradients_and_views_are_no_obstacle(unit, reference):
    queries, database = unit(32, 20, 1).requires_grad_(), unit(32, 500, 2).T
    found = top_k(queries[:, :16].detach().requires_grad_(), database[:, :16], 5)
    assert not found.scores.requires_grad
    assert_same(found, reference(queries[:, :16].detach(), database[:, :16], 5))


def test_offset_is_added(unit):
    queries, database = unit(3, 8, 1), unit(50, 8, 2)
    assert torch.equal(top_k(queries, database, 4, offset=1000).indices, top_k(queries, database, 4).indices + 1000)


def test_no_queries(unit):
    found = top_k(torch.empty(0, 8), unit(50, 8), 4)
    assert found.scores.shape == found.indices.shape == (0, 4)


# ---- memory ----


@pytest.mark.parametrize("mebibytes", [5, 200])
@pytest.mark.parametrize("case", ["float32", "bfloat16", "ties", "similarity"])
def test_a_plan_is_kept(unit, peak_bytes, mebibytes, case):
    queries, database, options = unit(500, 64, 1), unit(6000, 64, 2), {}
    if case == "bfloat16":
        options["dtype"] = torch.bfloat16
    if case == "ties":
        queries, database = (queries * 4).round(), (database * 4).round()
    if case == "similarity":
        options["similarity"] = lambda q, d: q @ d.T
    limit = mebibytes * 2**20
    plan = plan_memory(500, 6000, 64, 20, memory_limit_bytes=limit, dtype=options.get("dtype", torch.float32))
    assert plan.total_bytes <= limit
    peak = peak_bytes(lambda: top_k(queries, database, 20, memory_limit_bytes=limit, **options))
    assert peak <= plan.total_bytes + plan.result_bytes
    assert mebibytes > 5 or plan.matrix_bytes > 2 * limit


def test_memory_does_not_change_the_result(unit):
    queries, database = unit(700, 48, 1), unit(5000, 48, 2)
    large = top_k(queries, database, 20)
    small = top_k(queries, database, 20, memory_limit_bytes=4 * 2**20)
    assert torch.equal(large.scores, small.scores)
    assert torch.equal(large.indices, small.indices)


def test_imagenet_fits():
    plan = plan_memory(50_000, 1_281_167, 1280, 20)
    assert plan.total_bytes <= 2**30
    assert plan.matrix_bytes == 50_000 * 1_281_167 * 4
    assert plan.passes == 1
    text = plan.describe()
    assert "50,000 queries x 1,281,167 rows x 1280 features, k = 20" in text
    assert "The database is read once" in text


def test_a_small_limit_takes_more_passes():
    plan = plan_memory(50_000, 1_281_167, 1280, 20, memory_limit_bytes=64 * 2**20)
    assert plan.total_bytes <= 64 * 2**20
    assert plan.passes > 1
    assert f"The database is read {plan.passes} times" in plan.describe()


def test_a_limit_that_is_too_small_is_refused():
    with pytest.raises(OptionError, match=r"memory_limit_bytes=1,000 is too small: even one query at a time"):
        plan_memory(10, 10, 8, 3, memory_limit_bytes=1000)


# ---- what is refused ----


@pytest.mark.parametrize("k", [0, -1, 51])
def test_k_must_be_in_the_database(unit, k):
    with pytest.raises(OptionError, match=rf"k must be from 1 to 50, the number of rows in the database; got {k}\."):
        top_k(unit(3, 8), unit(50, 8), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("similarity", [None, lambda q, d: q @ d.T])
def test_bad_features_are_named(unit, bad, similarity):
    queries, database = unit(30, 8, 1), unit(500, 8, 2)
    plan = chunked(queries, database, 3, 7, 64, pass_rows=9)
    database[321, 3] = bad
    with pytest.raises(OptionError, match=rf"Row 321 of the database holds {bad} \(1 of its 8 features\)"):
        top_k(queries, database, 3, plan=plan, similarity=similarity)
    queries[22, 0] = bad
    with pytest.raises(OptionError, match=rf"Row 22 of the queries holds {bad}"):
        top_k(queries, unit(500, 8), 3, plan=plan, similarity=similarity)


def test_overflow_is_refused(unit):
    with pytest.raises(OptionError, match=r"Row 0 of the queries has features up to 3e\+38: inner products"):
        top_k(torch.full((1, 8), 3e38), unit(50, 8), 3)
    with pytest.raises(OptionError, match=r"Features are so large \(norms up to .* and .*\) that inner products"):
        top_k(torch.full((1, 8), 5e18), torch.full((4, 8), 5e18), 3)


@pytest.mark.parametrize(
    ("queries", "database", "message"),
    [
        (torch.zeros(8), torch.zeros(5, 8), r"Queries must have the shape \[Q, D\], got \[8\]"),
        (torch.zeros(2, 8), torch.zeros(5, 9), "Queries have 8 features and rows of the database 9"),
        (torch.zeros(2, 8), torch.zeros(5, 8, 1), r"Rows 0 to 1 of the database have the shape \[1, 8, 1\]"),
        (torch.zeros(2, 8), torch.zeros(5, 8).double(), r"not float64 .*Pass dtype=torch.float32 to round them"),
        (torch.zeros(2, 8), torch.zeros(5, 8).int(), "The database has the dtype int32"),
        (torch.zeros(2, 0), torch.zeros(5, 0), r"The rows of the database are empty: shape \[5, 0\]"),
        (torch.zeros(2, 8), np.array([["a"] * 8]), "The database has the NumPy dtype <U1"),
        (torch.zeros(2, 8), [[0.0] * 8], "A slice of the database is a list"),
    ],
)
def test_what_does_not_fit_is_refused(queries, database, message):
    with pytest.raises(OptionError, match=message):
        top_k(queries, database, 1)


def test_similarities_are_checked(unit):
    queries, database = unit(3, 8), unit(50, 8)
    with pytest.raises(
        OptionError, match=r"blocks \[3, 8\] and \[50, 8\] must have the shape \[3, 50\], got \[50, 3\]"
    ):
        top_k(queries, database, 3, similarity=lambda q, d: d @ q.T)
    with pytest.raises(OptionError, match="The similarity function returned NaN for finite features"):
        top_k(queries, database, 3, similarity=lambda q, d: (q @ d.T) * float("nan"))
