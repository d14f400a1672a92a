"""The dense form of differentiable k-means against a literal one, and the chunked form against the dense one."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompress.quantizers.soft_kmeans.chunked import chunked, needed_dtype
from qcompress.quantizers.soft_kmeans.dense import dense
from qcompress.quantizers.soft_kmeans.forms import Exact, exact_form
from qcompress.quantizers.soft_kmeans.near import Near, is_worthwhile, near_dtype
from tests.helpers import reference_dkm

METRICS = ("squared", "euclidean")
exact = partial(chunked, dtype=torch.float64)
near = partial(chunked, dtype=torch.float64, near=True)


def case(groups, vectors, count, size, *, seed=0, softness=0.5):
    """Draws vectors, centroids and a τ per group at which about every other vector is torn between centroids."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, vectors, size)) + np.arange(groups)[:, None, None]
    c = rng.normal(size=(groups, count, size)) + np.arange(groups)[:, None, None]
    return x, c, softness * np.linspace(1, 2, groups) * count ** (-2 / size)


def outcome(form, x, c, tau, iterations, metric, g, gc):
    """Returns the soft vectors, the centroids, and the gradients by the vectors and by the first centroids."""
    leaves = x.clone().requires_grad_(), c.clone().requires_grad_()
    soft, centroids = form(*leaves, tau, iterations, metric)
    found = torch.autograd.grad([soft, centroids], leaves, [g.to(soft.dtype), gc.to(centroids.dtype)])
    assert [t.dtype for t in (soft, centroids, *found)] == [x.dtype, c.dtype] * 2
    assert torch.equal(leaves[0], x)
    assert torch.equal(leaves[1], c)
    return soft.detach(), centroids.detach(), *found


def tensors(x, c, tau, seed=0):
    """Returns the case as float64 tensors, and gradients of both results, a part of them along the vectors."""
    torch.manual_seed(seed)
    x, c, tau = (torch.as_tensor(value, dtype=torch.float64) for value in (x, c, tau))
    return x, c, tau, torch.randn_like(x) + x, torch.randn_like(c)


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def far_centroid(x, c):
    c[:, 0] = 50.0


def equal_centroids(x, c):
    c[:, 1] = c[:, 0]


def constant(x, c):
    x[:] = 0.3


def vector_on_a_centroid(x, c):
    x[:, 0] = c[:, 0]


ODD = (far_centroid, equal_centroids, constant, vector_on_a_centroid)


@pytest.mark.parametrize(
    ("form", "metric"),
    [
        *((form, metric) for form in (dense, exact) for metric in METRICS),
        (near, "squared"),
    ],
    ids=["dense-squared", "dense-euclidean", "chunked-squared", "chunked-euclidean", "near-squared"],
)
class TestAgainstTheLiteralForm:
    @pytest.mark.parametrize("iterations", [1, 3])
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("change", [None, *ODD])
    def test_results_and_gradients(self, form, metric, iterations, size, change):
        x, c, tau = case(2, 5, 3, size)
        if change:
            change(x, c)
        x, c, tau, g, gc = tensors(x, c, tau)
        found = outcome(form, x, c, tau, iterations, metric, g, gc)
        arrays = [t.numpy() for t in (x, c, tau)]
        wanted = (
            *reference_dkm.dkm(*arrays, iterations, metric),
            *reference_dkm.gradients(*arrays, iterations, metric, g.numpy(), gc.numpy()),
        )
        for name, a, b in zip(("soft", "centroids", "dx", "dc"), found, wanted, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-5, err_msg=name)

    def test_an_empty_centroid_stays_and_passes_its_gradient_on(self, form, metric):
        x, c, tau = case(1, 5, 3, 2)
        far_centroid(x, c)
        x, c, tau, _, gc = tensors(x, c, tau / 10)
        _, centroids, gx, gradient = outcome(form, x, c, tau, 3, metric, torch.zeros_like(x), gc)
        assert torch.equal(centroids[:, 0], c[:, 0])
        assert torch.equal(gradient[:, 0], gc[:, 0])
        assert (
            error(gx, outcome(form, x, c, tau, 3, metric, torch.zeros_like(x), gc.index_fill(1, torch.tensor(0), 0))[2])
            == 0
        )

    def test_a_constant_tensor_stays(self, form, metric):
        x, c, tau, g, gc = tensors(np.full((1, 7, 1), 0.3), [[[0.0], [0.3], [1.0]]], [1e-12])
        soft, _, gx, gradient = outcome(form, x, c, tau, 3, metric, g, gc)
        assert error(soft, x) < 1e-15
        assert gx.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
class TestChunked:
    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param((1, 20000, 16, 1), id="blocks of one group"),
            pytest.param((3, 1300, 256, 4), id="blocks of three groups in turn"),
            pytest.param((300, 64, 16, 1), id="many groups, some of them in a block"),
            pytest.param((2, 500, 2, 8), id="more numbers in a vector than centroids"),
        ],
    )
    def test_equals_dense(self, metric, shape):
        inputs = tensors(*case(*shape))
        for a, b in zip(*(outcome(f, *inputs[:3], 3, metric, *inputs[3:]) for f in (exact, dense)), strict=True):
            assert error(a, b) < 1e-9

    def test_gradcheck(self, metric):
        x, c, tau, *_ = tensors(*case(2, 6, 3, 2))
        leaves = x.requires_grad_(), c.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, c: exact(x, c, tau, 2, metric), leaves)

    def test_computes_bfloat16_vectors_in_float32(self, metric):
        x, c, tau, g, gc = tensors(*case(2, 900, 8, 2))
        x, c = x.bfloat16(), c.float()
        form = partial(chunked, dtype=torch.float32)
        found, wanted = (outcome(f, x, c, tau, 3, metric, g, gc) for f in (form, dense))
        assert [error(a, b) < limit for a, b, limit in zip(found, wanted, (3e-3, 1e-6, 3e-3, 1e-4), strict=True)] == [
            True
        ] * 4

    def test_leaves_out_the_gradient_that_nobody_needs(self, metric):
        x, c, tau, g, gc = tensors(*case(2, 100, 4, 2))
        wanted = outcome(exact, x, c, tau, 3, metric, g, gc)[2]
        soft, centroids = exact(x.requires_grad_(), c, tau, 3, metric)
        (found,) = torch.autograd.grad([soft, centroids], [x], [g, gc])
        assert torch.equal(found, wanted)

    def test_reads_no_value_back_from_the_device(self, metric):
        with FakeTensorMode():  # tensors without values: whatever asks for one fails
            x, c = torch.empty(3, 500, 2, requires_grad=True), torch.empty(3, 4, 2, requires_grad=True)
            soft, centroids = exact(x, c, torch.empty(3, dtype=torch.float64), 3, metric)
            gx, gc = torch.autograd.grad(soft.sum() + centroids.sum(), [x, c])
        assert (gx.shape, gc.shape) == (x.shape, c.shape)

    def test_no_tensor_grows_with_vectors_times_centroids(self, metric):
        x, c, tau, g, gc = tensors(*case(1, 50_000, 16, 1))
        with _Largest() as largest:
            outcome(exact, x, c, tau, 3, metric, g, gc)
        assert largest.nbytes <= 1 << 20

    def test_ignores_autocast(self, metric):
        x, c, tau, g, gc = tensors(*case(1, 300, 4, 2))
        form = partial(chunked, dtype=torch.float32)
        wanted = outcome(form, x.float(), c.float(), tau, 3, metric, g, gc)
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(form, x.float(), c.float(), tau, 3, metric, g, gc)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def drawn(kind, vectors, size):
    x = torch.randn(vectors, size) * 0.05
    if kind == "outliers":
        x[torch.rand(vectors, size) < 1e-3] *= 8
    if kind == "bimodal":
        x = 0.2 * x + torch.where(torch.rand(vectors, 1) < 0.5, -0.05, 0.05)
    return x


@pytest.mark.parametrize("count", [2, 16, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "bimodal"])
def test_the_needed_dtype_keeps_gradients_of_float32_vectors(kind, size, count):
    torch.manual_seed(count + size)
    x = drawn(kind, 1500, size)
    variance = x.var(0, correction=0).mean().item()
    c = x[torch.randperm(len(x))[:count]]
    for ratio in (1 / 19, 1e-3, 1e-4, 1e-6):
        tau = torch.tensor([variance * ratio], dtype=torch.float64)
        needed = needed_dtype(variance, tau.item(), "squared")
        assert needed == (torch.float32 if ratio >= 1 / 20 else torch.float64)
        g, gc = torch.randn(1, *x.shape) + x / 0.05, torch.zeros(1, *c.shape)
        forms = partial(chunked, dtype=needed), dense
        found, wanted = (outcome(form, x[None], c[None], tau, 3, "squared", g, gc)[2] for form in forms)
        assert error(found, wanted) < 5e-4


def test_the_euclidean_metric_needs_float64():
    assert needed_dtype(1.0, 100.0, "squared") == torch.float32
    assert needed_dtype(1.0, 100.0, "euclidean") == torch.float64


def near_case(kind, groups, vectors, count, size, ratio, seed=0):
    """Draws vectors, some of them as first centroids, τ = the variance times `ratio`, and gradients of both results."""
    torch.manual_seed(seed)
    x = torch.stack([drawn(kind, vectors, size) + group for group in range(groups)])
    c = torch.stack([part[torch.randperm(vectors)[:count]] for part in x])
    tau = ratio * x.var(1, correction=0).mean(1).double()
    return x, c, tau, torch.randn_like(x) + x / 0.05, torch.randn_like(c)


def assert_near_equals_dense(x, c, tau, g, gc, form=near, limit=1e-9):
    found, wanted = (outcome(f, x, c, tau, 3, "squared", g, gc) for f in (form, dense))
    for name, a, b in zip(("soft", "centroids", "dx", "dc"), found, wanted, strict=True):
        # Where the attention is sharp, the gradient of the first centroids is next to zero.
        assert (a - b).norm() < limit * max(1e-5, b.norm()), name


class TestNear:
    @pytest.mark.parametrize("shape", [(1, 1500, 2, 1), (3, 700, 16, 1), (2, 700, 16, 2), (1, 3000, 64, 4)])
    @pytest.mark.parametrize("kind", ["gaussian", "outliers"])
    @pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4])
    def test_equals_dense(self, shape, kind, ratio):
        assert_near_equals_dense(*(t.double() for t in near_case(kind, *shape, ratio)))

    @pytest.mark.parametrize("shape", [(1, 9000, 256, 1), (1, 9000, 256, 4), (2, 3000, 64, 8)])
    def test_equals_dense_with_many_centroids(self, shape):
        assert_near_equals_dense(*(t.double() for t in near_case("outliers", *shape, 1e-2)))

    @pytest.mark.parametrize("ratio", [1e-6, 1e-9])
    def test_equals_dense_where_attention_is_all_or_nothing(self, ratio):
        x, c, tau, g, _ = (t.double() for t in near_case("gaussian", 1, 2000, 16, 2, ratio))
        found, wanted = (outcome(form, x, c, tau, 3, "squared", g, torch.zeros_like(c))[:3] for form in (near, dense))
        assert [error(a, b) < 1e-9 for a, b in zip(found, wanted, strict=True)] == [True] * 3

    def test_follows_centroids_that_move_far_within_a_step(self):
        x, c, tau, g, gc = (t.double() for t in near_case("gaussian", 1, 2000, 16, 2, 1e-1))
        c = c + 0.3  # beside the vectors
        moved, bounds = dense(x, c, tau, 1, "squared")[1], Near.of(x, c, tau, torch.float64).bounds
        assert (moved - c).norm(dim=2).max() > 4 * x.std()
        assert (bounds.kept(moved) & ~bounds.kept(c)).any()
        assert_near_equals_dense(x, c, tau, g, gc)

    @pytest.mark.parametrize("change", ODD)
    def test_odd_vectors_and_centroids(self, change):
        x, c, tau, g, gc = (t.double() for t in near_case("gaussian", 2, 500, 8, 2, 1e-2))
        change(x, c)
        assert_near_equals_dense(x, c, tau, g, gc)

    def test_a_centroid_far_from_all_vectors_goes_where_it_gets_attention(self):
        x, c, tau, g, gc = (t.double() for t in near_case("gaussian", 1, 2000, 8, 1, 1e-1))
        c[0, 0] = x.max() + ((x.max() - c[0, 1:].max()).square() + 25 * tau).sqrt()  # logits differ by 25
        attention = torch.softmax(-(x - c.mT).square() / tau, -1)
        assert math.exp(-60) < attention[0, :, 0].max() < math.exp(-20)
        assert near(x, c, tau, 1, "squared")[1][0, 0] < x.max()
        assert_near_equals_dense(x, c, tau, g, gc)
        assert_near_equals_dense(x.float(), c.float(), tau, g, gc, form=partial(near, dtype=torch.float32), limit=5e-4)

    def test_vectors_that_occur_many_times(self):
        x, c, tau, g, gc = (t.double() for t in near_case("gaussian", 1, 2000, 16, 1, 1e-2))
        assert_near_equals_dense((x * 100).round() / 100, c, tau, g, gc)

    def test_gradients_in_any_layout(self):
        x, c, tau, _, gc = (t.double() for t in near_case("gaussian", 1, 500, 8, 2, 1e-2))
        assert_near_equals_dense(x, c, tau, torch.ones(1, 1, 1, dtype=torch.float64).expand_as(x), gc)
        assert_near_equals_dense(x, c, tau, torch.randn(1, 2, 500, dtype=torch.float64).mT, gc)

    def test_bfloat16_vectors(self):
        x, c, tau, g, gc = near_case("gaussian", 2, 900, 8, 2, 1e-1)
        form = partial(chunked, dtype=torch.float32, near=True)
        found, wanted = (outcome(f, x.bfloat16(), c, tau, 3, "squared", g, gc) for f in (form, dense))
        limits = 3e-3, 1e-6, 3e-3, 1e-4
        assert [error(a, b) < limit for a, b, limit in zip(found, wanted, limits, strict=True)] == [True] * 4

    def test_the_same_twice(self):
        x, c, tau, g, gc = near_case("gaussian", 2, 900, 8, 2, 1e-2)
        form = partial(chunked, dtype=torch.float32, near=True)
        first, second = (outcome(form, x, c, tau, 3, "squared", g, gc) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_no_tensor_grows_with_vectors_times_centroids(self):
        inputs = near_case("gaussian", 1, 50_000, 64, 2, 1e-2)
        with _Largest() as largest:
            outcome(partial(chunked, dtype=torch.float32, near=True), *inputs[:3], 3, "squared", *inputs[3:])
        assert largest.nbytes <= 1 << 20

    def test_leaves_out_most_attention_where_that_is_next_to_zero(self):
        x, c, tau, *_ = near_case("gaussian", 1, 9000, 256, 2, 1e-4)
        cells = Near.of(x, c, tau, torch.float32).facing(c.double())
        assert sum(some.pairs for some in cells) < 0.1 * 9000 * 256


@pytest.mark.parametrize("count", [4, 16, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "bimodal"])
def test_the_dtype_of_near_cells_keeps_gradients_of_float32_vectors(kind, size, count):
    for ratio in (size**2 / 1299, 1e-4, 1e-5):
        x, c, tau, g, gc = near_case(kind, 1, 1500 if count < 256 else 9000, count, size, ratio)
        needed = near_dtype(x.var(1, correction=0).mean().item(), size, tau.item())
        assert needed == (torch.float32 if ratio >= size**2 / 1300 else torch.float64)
        forms = partial(chunked, dtype=needed, near=True), dense
        found, wanted = (outcome(form, x, c, tau, 3, "squared", g, torch.zeros_like(gc))[2] for form in forms)
        assert error(found, wanted) < 5e-4


class TestTheChoice:
    def test_near_cells_where_little_attention_is_kept(self):
        x, c, *_ = near_case("gaussian", 1, 9000, 64, 2, 1.0)
        forms = [
            exact_form(x[0], c, torch.tensor([tau], dtype=torch.float64) * x.var(), [9000], "squared")
            for tau in (1.0, 0.01, 1e-5)
        ]
        assert forms == [Exact("chunked", torch.float32), Exact("near", torch.float32), Exact("near", torch.float64)]

    def test_no_near_cells_for_few_vectors_per_centroid_or_the_plain_distance(self):
        x, c, tau, *_ = near_case("gaussian", 1, 1000, 64, 2, 1e-5)
        assert not is_worthwhile(x[0], c, tau, [1000])
        x, c, tau, *_ = near_case("gaussian", 1, 9000, 64, 2, 1e-5)
        assert is_worthwhile(x[0], c, tau, [9000])
        assert exact_form(x[0], c, tau, [9000], "euclidean").kind == "chunked"
