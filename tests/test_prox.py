"""The proximal operators against their definition, other people's libraries and eq. 22."""

import copy
import importlib.util
import itertools
import math

import numpy as np
import pyproximal
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skglm.penalties import L0_5, L2_3, SCAD, LogSumPenalty, MCPenalty
from skglm.penalties.block_separable import WeightedGroupL2, WeightedL1GroupL2

import tl1kernels as tk
from tests.common import COUPLED, ELEMENTWISE, ON_THE_REFERENCE_ALONE, allowed_shape, rounding
from tests.strategies import has_view, tensors
from tl1kernels import oracles
from tl1kernels.backends import asked_for, native, reference, triton_launch
from tl1kernels.backends.reference import tl1_threshold
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
from tl1kernels.verify import GROUPINGS

pytestmark = pytest.mark.usefixtures("each_backend")


def test_every_penalty_of_the_registry_is_everywhere():
    every = {None, *tk.PENALTIES}
    assert reference.PROX.keys() == every
    assert oracles.ORACLES.keys() == set(ELEMENTWISE)
    assert oracles.COUPLED.keys() == set(COUPLED)
    if native.unavailable() is None:
        assert {None, *native.penalties()} == every - ON_THE_REFERENCE_ALONE["cpu"]
    if importlib.util.find_spec("triton"):
        assert {None, *triton_launch.penalties()} == every - ON_THE_REFERENCE_ALONE["triton"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_values_agree_with_the_oracle(name):
    w = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for shape in (1e-3, 0.5, 1.0, 1e6):
        a = allowed_shape(name, shape, 0.0)
        want = sum(float(oracles.ORACLES[name].value(x, 0.7, a)) for x in w.tolist())
        got = tk.penalty_value(w, lam=0.7, penalty=name, a=a).item()
        assert got == pytest.approx(want, rel=1e-13)


# --- One weight: the definition, from tiny to huge.

LAM = (1e-10, 1e-4, 0.3, 1.0, 30.0)
SHAPES = (1e-3, 0.1, 1.0, 37.0, 1e6)
OFFSETS = (-1e-1, -1e-6, 1e-6, 1e-3, 1e-1, 1.0, 1e3)


SHAPED = [
    *(("tl1", a) for a in SHAPES),
    *((name, a) for name in ELEMENTWISE[1:] for a in SHAPES[:: 2 if tk.PENALTIES[name].a else 5]),
]


@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_prox_is_the_argmin_of_its_definition(name, shape, each_backend):
    """On both sides of every kink: float64 within 1e-13 of |v|, float32 within ulps of |v|.

    The reference rounds to float32 once, kernels compute in it: 1 ulp and 4.
    """
    once = each_backend == "reference"
    for lam in LAM:
        oracle, a = oracles.ORACLES[name], allowed_shape(name, shape, lam)
        for kink, offset in itertools.product(oracle.kinks(lam, 1.0, a), OFFSETS):
            v = kink * (1 + offset)
            for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2.0**-23)):
                tolerance *= 1 if once or dtype == torch.float64 else 4
                x = torch.tensor([-v], dtype=dtype)
                got = tk.prox(x, lam, penalty=name, a=a)
                want = float(oracles.prox_by_definition(x.item(), lam, 1.0, name, a))
                magnified = oracle.condition(abs(x.item()), lam, 1.0, a)
                limit = tolerance * abs(x.item()) * magnified
                assert abs(got.item() - want) <= limit, (name, a, lam, offset, dtype, got, want)
                if once and dtype == torch.float32 and want != 0:
                    nearest = np.float32(want)
                    assert abs(got.numpy()[0] - nearest) <= np.spacing(abs(nearest)), (a, lam, v)


@pytest.mark.parametrize("a", SHAPES)
def test_tl1_either_side_of_the_change_from_continuous_to_jump(a):
    """At tau = a^2 / (2 (a + 1)) the two threshold formulas meet, and so must the results."""
    critical = a * a / (2 * (a + 1))
    below, above = (tl1_threshold(critical * f, a) for f in (1 - 1e-12, 1 + 1e-12))
    assert below == pytest.approx(above, rel=1e-11)
    for factor in (0.5, 0.99, 0.999999, 1.000001, 1.01, 2.0):
        tau = critical * factor
        for offset in (-1e-3, 1e-3, 0.1):
            v = tl1_threshold(tau, a) * (1 + offset)
            got = tk.prox(torch.tensor([v], dtype=torch.float64), tau, a=a).item()
            want = float(oracles.prox_by_definition(v, tau, 1.0, "tl1", a))
            limit = 1e-13 * v * oracles.ORACLES["tl1"].condition(v, tau, 1.0, a)
            assert abs(got - want) <= limit, (a, factor, offset, got, want)


@pytest.mark.parametrize(("tau", "a"), [(0.1, 1.0), (1.0, 1.0), (1e-6, 100.0), (4.0, 0.25)])
def test_the_threshold_itself_goes_to_zero_and_the_next_float_need_not(tau, a):
    t = tl1_threshold(tau, a)
    x = torch.tensor([t, -t, math.nextafter(t, 0)], dtype=torch.float64)
    assert tk.prox(x, tau, a=a).tolist() == [0.0, 0.0, 0.0]
    above = tk.prox(torch.tensor([t * (1 + 1e-9)], dtype=torch.float64), tau, a=a).item()
    assert above > 0
    jumps = tau > a * a / (2 * (a + 1))
    assert (above > 1e-3 * t) == jumps


def test_just_above_the_threshold_rounding_makes_no_nan():
    generator = np.random.default_rng(0)
    for _ in range(300):
        a = 10 ** generator.uniform(-3, 6)
        critical = a * a / (2 * (a + 1))
        tau = critical * generator.choice([1e-6, 1e-2, 0.5, 1.0, 1.0 + 1e-15, 2.0])
        v = [tl1_threshold(tau, a)]
        for _ in range(20):
            v.append(math.nextafter(v[-1], math.inf))
        w = tk.prox(torch.tensor(v, dtype=torch.float64), tau, a=a)
        assert w.isfinite().all()


def test_tl1_tends_to_soft_and_to_hard_thresholding():
    v = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    soft = tk.prox(v, 0.3, penalty="l1")
    torch.testing.assert_close(tk.prox(v, 0.3, a=1e12), soft, rtol=0, atol=1e-11)
    hard = torch.where(v.abs() <= math.sqrt(0.6), 0.0, v)
    torch.testing.assert_close(tk.prox(v, 0.3, a=1e-12), hard, rtol=0, atol=1e-11)
    for extreme in (1e-300, 1e300):
        assert tk.prox(v, 0.3, a=extreme).isfinite().all()


# --- Other people's libraries.


@pytest.mark.parametrize(
    ("tau", "a"), [(1e-3, 1.0), (0.1, 1.0), (1.0, 1.0), (0.2, 0.1), (0.5, 10.0), (2.0, 3.0)]
)
def test_tl1_agrees_with_pyproximal_geman(tau, a):
    v = np.random.default_rng(0).normal(scale=3, size=20_000)
    want = pyproximal.Geman(sigma=a + 1, gamma=a).prox(v, tau)
    got = tk.prox(torch.from_numpy(v), tau, a=a).numpy()
    assert ((got == 0) == (want == 0)).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-13)


def test_l1_agrees_with_pyproximal():
    v = np.random.default_rng(1).normal(size=1000)
    want = pyproximal.L1(sigma=0.7).prox(v, 0.3)
    np.testing.assert_array_equal(tk.prox(torch.from_numpy(v), 0.3, lam=0.7, penalty="l1"), want)


# skglm 0.5 finds no threshold of the log penalty where the prox jumps: a = 1.6 is continuous.
SKGLM = [
    *(("scad", a, SCAD(0.7, a)) for a in (1.6, 5.0, 30.0)),
    *(("mcp", a, MCPenalty(0.7, a)) for a in (0.6, 5.0, 30.0)),
    *(("log", a, LogSumPenalty(0.7 / math.log1p(a), 1 / a)) for a in (0.1, 1.6)),
    ("l_half", None, L0_5(0.7)),
    ("l_two_thirds", None, L2_3(0.7)),
]


@pytest.mark.parametrize(("name", "a", "other"), SKGLM)
def test_the_family_agrees_with_skglm(name, a, other):
    v = np.random.default_rng(3).normal(scale=2, size=3000)
    want = np.array([other.prox_1d(x, 0.5, 0) for x in v])
    assert 100 < (want == 0).sum() < 2900
    got = tk.prox(torch.from_numpy(v), 0.5, lam=0.7, penalty=name, a=a).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-13)


@pytest.mark.parametrize("a", [0.1, 1.6, 5.0, 30.0])
def test_log_agrees_with_pyproximal(a):
    v = np.random.default_rng(4).normal(scale=2, size=3000)
    want = pyproximal.Log(sigma=0.7, gamma=a).prox(v, 0.5)
    assert 100 < (want == 0).sum() < 2900
    got = tk.prox(torch.from_numpy(v), 0.5, lam=0.7, penalty="log", a=a).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-13)


def test_l0_agrees_with_pyproximal():
    """Whose L0 takes the threshold itself, not the weight."""
    v = np.random.default_rng(4).normal(size=3000)
    want = pyproximal.L0().prox(v, math.sqrt(2 * 0.3 * 0.7))
    np.testing.assert_array_equal(tk.prox(torch.from_numpy(v), 0.3, lam=0.7, penalty="l0"), want)


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("group_weight", [None, "sqrt"])
def test_group_lasso_and_sparse_group_lasso_agree_with_skglm(mu, group_weight):
    rows, columns, step, lam = 40, 6, 0.3, 2.0
    v = np.random.default_rng(2).normal(size=(rows, columns)) * np.linspace(0.1, 3, rows)[:, None]
    c = math.sqrt(columns) if group_weight else 1.0
    groups = np.arange(0, rows * columns + 1, columns, dtype=np.int32)
    members = np.arange(rows * columns, dtype=np.int32)
    options = {"lam": lam, "mu": mu, "group_by": "out", "group_weight": group_weight}
    if mu == 0:
        other = WeightedGroupL2(lam, np.full(rows, c), groups, members)
        got = tk.prox(torch.from_numpy(v), step, penalty=None, **options).numpy()
    else:
        weights = np.full(rows, lam * (1 - mu) * c), np.full(v.size, lam * mu)
        other = WeightedL1GroupL2(1.0, *weights, groups, members)
        got = tk.prox(torch.from_numpy(v), step, penalty="l1", **options).numpy()
    want = np.stack([other.prox_1group(row.copy(), step, g) for g, row in enumerate(v)])
    assert 0 < (want == 0).all(1).sum() < rows
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)


# --- Any tensor: eq. 22, group by group.


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_prox_of_any_dense_tensor_is_eq_22(data, dtype):
    v = data.draw(tensors(min_dims=2)).to(dtype)
    penalty = data.draw(st.sampled_from([None, *ELEMENTWISE]))
    group_by = data.draw(st.sampled_from([*GROUPINGS, "auto"]))
    options = {
        "lam": data.draw(st.floats(0, 5)),
        "a": allowed_shape(penalty, data.draw(st.floats(0.1, 10)), 0.3),
        "mu": data.draw(st.floats(0, 1)),
        "penalty": penalty,
        "group_by": group_by,
        "group_weight": data.draw(st.sampled_from([None, "sqrt"])),
    }
    if not has_view(v, group_by):
        with pytest.raises(ValueError, match="at most two stretches"):
            tk.prox(v, 0.3, **options)
        return
    got = tk.prox(v, 0.3, **options)
    want = oracles.prox_as_published(v.double().numpy(), 0.3, **options)
    assert got.dtype == dtype
    size = v.double().abs().numpy()
    limit = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps * size
    if asked_for() != "reference" and penalty is not None:  # float32 arithmetic
        condition = np.vectorize(oracles.ORACLES[penalty].condition)
        magnified = condition(size, 0.3, options["lam"] * options["mu"], options["a"])
        limit = limit + 6 * 2.0**-23 * size * magnified
    assert (np.abs(got.double().numpy() - want) <= limit + torch.finfo(dtype).tiny).all()


@given(v=tensors(), group_by=st.sampled_from([None, 0, -1, "layer"]))
def test_in_place_and_out_give_the_same_bits(v, group_by):
    options = {"lam": 0.7, "group_by": group_by}
    want = tk.prox(v, 0.3, **options)
    out = torch.full_like(v.contiguous(), math.nan)
    assert tk.prox(v, 0.3, **options, out=out) is out
    torch.testing.assert_close(out, want, rtol=0, atol=1e-15)
    same = copy.deepcopy(v)  # its offset too: which loads a GPU can take may change a sum's order
    version = same._version
    assert tk.prox_(same, 0.3, **options) is same
    assert same._version > version
    assert torch.equal(same, want)
    assert same.stride() == v.stride()


@pytest.mark.parametrize("shift", [-37, 0, 64])
def test_out_may_overlap_v(shift):
    memory = torch.randn(1200)
    v, out = memory[100:1100].view(100, 10), memory[100 + shift : 1100 + shift].view(100, 10)
    want = tk.prox(v.clone(), 0.1, group_by="in")
    assert torch.equal(tk.prox(v, 0.1, group_by="in", out=out), want)


def test_out_may_overlap_v_as_memory_of_others():
    """NumPy's arrays of the same memory are storages of their own."""
    memory = np.arange(1, 3002, dtype=np.float32)
    v, out = torch.from_numpy(memory[:-1]), torch.from_numpy(memory[1:])
    want = tk.prox(v.clone(), 0.5, penalty="l1")
    assert torch.equal(tk.prox(v, 0.5, penalty="l1", out=out), want)


def test_a_tensor_with_gaps_can_be_read_but_not_written_in_place():
    wide = torch.randn(6, 8, dtype=torch.float64)
    v = wide[:, ::2]
    assert torch.equal(tk.prox(v, 0.3, group_by="in"), tk.prox(v.clone(), 0.3, group_by="in"))
    before = wide.clone()
    with pytest.raises(ValueError, match=r"dense.*strides \(8, 2\)"):
        tk.prox_(v, 0.3)
    assert torch.equal(wide, before)


# --- Zeros, NaN, infinities.


def bits(tensor):
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalty", [None, *ELEMENTWISE])
def test_dead_weights_are_plus_zero(dtype, penalty):
    tiny = torch.finfo(dtype).smallest_normal
    v = torch.tensor(
        [[-1e-3, -0.0, 0.0, 1e-3], [-5, 5, -1e-3, -tiny], [0, -0.0, 0, 0]], dtype=dtype
    )
    for mu, group_by in ((1.0, None), (0.5, 0), (0.0, 0), (0.5, "layer")):
        if penalty is None and group_by is None:
            continue  # nothing to die of
        for width in (1, 512):  # groups of a few weights, and of many
            w = tk.prox(v.repeat(1, width), 0.1, penalty=penalty, mu=mu, group_by=group_by)
            assert (bits(w)[w == 0] == 0).all(), (mu, group_by, width, w)
    assert (bits(tk.prox(v, 0.1, penalty=penalty, mu=0.5, group_by=0))[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 512, 9000])
def test_a_weight_is_plus_zero_that_its_groups_factor_makes_too_small(dtype, width):
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    v = torch.full((1, width), -least, dtype=dtype)
    v[0, 0] = 1.5
    for group_by in ("out", "layer"):
        w = tk.prox(v, 1.0, penalty=None, group_by=group_by)
        assert w[0, 0] == pytest.approx(0.5)
        assert (bits(w)[0, 1:] == 0).all()


def test_a_zero_is_plus_zero_where_the_threshold_is_zero():
    """At lr = 0, as warm-up begins, with groups alone."""
    v = torch.tensor([[-0.0, 1.0]])
    w = tk.prox(v, 0.0, penalty=None, group_by="out")
    assert bits(w).tolist() == bits(torch.tensor([[0.0, 1.0]])).tolist()


@pytest.mark.parametrize("penalty", COUPLED)
def test_a_coupled_penalty_that_weighs_nothing_does_nothing(penalty):
    """To infinities and NaN, too, and to weights whose squares are 0."""
    if penalty in ON_THE_REFERENCE_ALONE[asked_for()]:
        pytest.skip(f"{penalty} runs on the reference alone")
    v = torch.tensor([[3e-38, 3e-38, 3e-38], [1.0, math.inf, 2.0], [1.0, math.nan, 2.0]])
    if asked_for() == "triton":
        v = v[:1]  # there a group with one of those becomes NaN, as at any other step size
    for step, mu in ((0.0, 1.0), (0.1, 0.0), (0.0, 0.0)):
        if mu == 1.0:
            w = tk.prox(v, step, penalty=penalty, mu=mu, group_by="out")
            torch.testing.assert_close(w, v, rtol=0, atol=0, equal_nan=True)
        else:
            alone = tk.prox(v, step, penalty=None, group_by="out")
            w = tk.prox(v, step, penalty=penalty, mu=mu, group_by="out")
            torch.testing.assert_close(w, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("step", [0.0, 0.1])
@pytest.mark.parametrize("group_by", [0, 1, "layer"])
def test_groups_of_zeros_stay_zero_and_never_make_nan(step, group_by):
    v = torch.zeros(3, 4)
    assert torch.equal(tk.prox(v, step, group_by=group_by), v)
    assert torch.equal(tk.prox(v, step, penalty=None, group_by=group_by), v)


def test_step_zero_changes_nothing():
    v = torch.randn(5, 6)
    assert torch.equal(tk.prox(v, 0.0, lam=3.0, group_by="in"), v)
    assert torch.equal(tk.prox(v, 1.0, lam=0.0, group_by="in"), v)


@pytest.mark.parametrize("size", [1e-170, 1e170])
def test_group_norms_neither_under_nor_overflow(size):
    v = torch.tensor([[3 * size, 4 * size]], dtype=torch.float64)
    assert torch.equal(tk.prox(v, 0.0, penalty=None, group_by="out"), v)
    half = tk.prox(v, 2.5 * size, penalty=None, group_by="out")
    torch.testing.assert_close(half, v / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype, each_backend):
    """Next to the middle of two neighbours; the reference even where float32 takes it for that."""
    apart = 2.0**-40 if each_backend == "reference" else 2.0**-22
    low = torch.rand(50).add(1).to(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    middle = (low.double() + high.double()) / 2
    for offset, nearest in ((apart, high), (-apart, low)):
        for value, want in zip((middle + offset).tolist(), nearest.tolist(), strict=True):
            p = torch.zeros(1, dtype=dtype, requires_grad=True)
            p.grad = torch.tensor([-1.0], dtype=dtype)
            tk.ProxSGD([p], lr=value).step()
            if rounding(each_backend, dtype) < 1:
                assert p.item() == want, (value, want)
            else:
                assert abs(p.item() - value) <= torch.finfo(dtype).eps, (value, want)


@pytest.mark.parametrize("penalty", ELEMENTWISE)
def test_nan_stays_nan_and_spoils_its_group_only(penalty):
    v = torch.ones(3, 4)
    v[1, 2] = math.nan
    alone = tk.prox(v, 0.1, penalty=penalty)
    assert alone.isnan().sum() == 1
    assert alone[1, 2].isnan()
    grouped = tk.prox(v, 0.1, penalty=penalty, group_by="out")
    assert grouped.isnan().any(1).tolist() == [False, True, False]
    assert grouped[1].isnan().all()


@pytest.mark.parametrize("penalty", ELEMENTWISE)
def test_infinity_stays_infinite(penalty):
    v = torch.tensor([math.inf, -math.inf, 1.0])
    assert tk.prox(v, 0.1, penalty=penalty)[:2].tolist() == [math.inf, -math.inf]


def test_empty_and_scalar_tensors():
    assert tk.prox(torch.empty(0, 3), 0.1, group_by="in").shape == (0, 3)
    assert tk.prox(torch.empty(3, 0), 0.1, group_by="out").shape == (3, 0)
    assert tk.prox(torch.tensor(2.0), 0.5, penalty="l1").item() == 1.5


# --- The value.


@given(data=st.data())
def test_penalty_value_is_the_sum_that_it_says(data):
    w = data.draw(tensors(min_dims=2))
    penalty = data.draw(st.sampled_from([None, *ELEMENTWISE]))
    group_by = data.draw(st.sampled_from(GROUPINGS))
    lam, mu, a = (data.draw(st.floats(0.1, 1)) for _ in range(3))
    a = allowed_shape(penalty, a, 0.0)
    got = tk.penalty_value(w, lam=lam, penalty=penalty, a=a, mu=mu, group_by=group_by).item()
    want = 0.0
    if penalty is not None:
        value = oracles.ORACLES[penalty].value
        want += sum(value(x, lam * mu, a) for x in w.flatten().tolist())
    if group_by is not None:
        index = oracles.group_index(tuple(w.shape), group_by)
        norms = [np.linalg.norm(w.numpy()[index == g]) for g in range(index.max() + 1)]
        want += lam * (1 - mu) * sum(norms)
    assert got == pytest.approx(want, rel=1e-12)


def test_penalty_value_takes_any_strides():
    w = torch.randn(6, 8, dtype=torch.float64)
    for strided in (w[:, ::2], w.T[1:], w[:1].expand(3, 8)):
        got = tk.penalty_value(strided, group_by="in")
        assert got == tk.penalty_value(strided.clone().contiguous(), group_by="in")


@pytest.mark.parametrize("penalty", ["l0", None])
def test_a_count_or_nothing_has_a_gradient_of_zeros(penalty):
    w = torch.tensor([[2.0, 0.0], [float("inf"), -1.0]], requires_grad=True)
    value = tk.penalty_value(w, penalty=penalty)
    assert value == (3 if penalty else 0)
    value.backward()
    assert w.grad.eq(0).all()


def test_penalty_value_has_a_gradient_also_at_zero_groups():
    w = torch.zeros(3, 4, dtype=torch.float64)
    w[0] = torch.randn(4)
    w.requires_grad_()
    tk.penalty_value(w, group_by="out").backward()
    assert w.grad.isfinite().all()
    assert w.grad[0].ne(0).all()


@pytest.mark.parametrize("penalty", [name for name in tk.PENALTIES if name != "l0"])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_penalty_value_has_a_gradient_also_at_zeros(penalty, lam):
    w = torch.tensor([[0.0, 1.0], [-2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    tk.penalty_value(w, lam=lam, penalty=penalty, group_by="out").backward()
    assert w.grad.isfinite().all()


def test_mu_none_gives_all_of_lam_to_the_only_term():
    v = torch.randn(6, 7, dtype=torch.float64)
    for options, mu in (
        ({"penalty": "tl1", "group_by": None}, 1.0),
        ({"penalty": None, "group_by": "in"}, 0.0),
        ({"penalty": "l1", "group_by": "in"}, 0.5),
    ):
        assert torch.equal(tk.prox(v, 0.4, **options), tk.prox(v, 0.4, mu=mu, **options))


# --- Bad input.

V = torch.ones(2, 3)
BAD = [
    ({"lam": -1.0}, ValueError, r"lam .* >= 0, got -1.0"),
    ({"lam": math.nan}, ValueError, r"lam .*finite.*nan"),
    ({"lam": "much"}, TypeError, r"lam must be a number.*'much'"),
    ({"a": 0.0}, ValueError, r"a must be None or finite and > 0, got 0.0"),
    ({"a": math.inf}, ValueError, r"a must be None or finite and > 0, got inf"),
    ({"penalty": "scad", "a": 0.5}, ValueError, r"a=0.5: scad needs a > 1"),
    ({"mu": 1.5}, ValueError, r"mu must be None or in \[0, 1\], got 1.5"),
    ({"mu": -0.1}, ValueError, r"mu .*-0.1"),
    ({"mu": True}, TypeError, r"mu must be a number.*True"),
    ({"penalty": "l7"}, ValueError, r"penalty must be None or one of 'tl1', 'l1', .*, got 'l7'"),
    ({"group_by": "rows"}, ValueError, r"group_by must be .*'out'.*got 'rows'"),
    ({"group_by": 2}, ValueError, r"group_by=2 must be a dim in \[-2, 1\]"),
    ({"group_by": 0.5}, TypeError, r"group_by must be .*0.5"),
    ({"group_by": True}, TypeError, r"group_by must be .*True"),
    ({"group_weight": "cube"}, ValueError, r"group_weight must be None or 'sqrt', got 'cube'"),
    (
        {"backend": "abacus"},
        ValueError,
        r"backend must be None or one of 'cpu', 'triton', 'cuda', 'reference'.*'abacus'",
    ),
    ({"out": torch.ones(3, 2)}, ValueError, r"out must have the shape of v"),
    ({"out": torch.ones(2, 3, device="meta")}, ValueError, r"out must have the device of v, cpu"),
    ({"out": torch.ones(2, 3).double()}, ValueError, r"out must have the dtype of v"),
    ({"out": [1.0]}, TypeError, r"out must be a tensor, got list"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_name_argument_value_and_what_is_allowed(options, error, message):
    with pytest.raises(error, match=message):
        tk.prox(V, 0.1, **options)
    if "out" not in options and "backend" not in options:
        with pytest.raises(error, match=message):
            tk.penalty_value(V, **options)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (V.to(torch.complex64), r"v must have one of the dtypes .*torch.float32.*complex64"),
        (V.to(torch.int32), r"v must have one of the dtypes .*int32"),
        (V.to_sparse(), r"v must be a strided tensor, got layout torch.sparse_coo"),
        ([1.0], r"v must be a tensor, got list"),
    ],
)
def test_bad_tensors_are_type_errors(v, message):
    with pytest.raises(TypeError, match=message):
        tk.prox(v, 0.1)


@pytest.mark.parametrize("step", [-1.0, math.nan, math.inf])
def test_bad_step(step):
    with pytest.raises(ValueError, match="step must be finite and >= 0"):
        tk.prox(V, step)


def test_in_place_on_a_tensor_that_requires_grad_raises_as_torch_does():
    v = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="in place"):
        tk.prox_(v, 0.1)
    with torch.no_grad():
        tk.prox_(v, 0.1, penalty="l1")
    assert v.tolist() == pytest.approx([0.9] * 3)
    with pytest.raises(TypeError, match="no out"):
        tk.prox_(v.detach(), 0.1, out=v)


def test_the_result_carries_no_gradient():
    assert not tk.prox(torch.ones(3, requires_grad=True), 0.1).requires_grad


def test_a_complex_number_is_no_number():
    for name in ("lam", "a", "mu"):
        with pytest.raises(TypeError, match=f"{name} must be a number or a 0-d tensor"):
            tk.prox(V, 0.1, **{name: torch.tensor(0.5 + 0j)})


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("penalty", [None, "l1"])
def test_an_infinite_group_is_not_shrunk(penalty):
    v = torch.tensor([[3.0, math.inf], [3.0, -1.0]])
    w = tk.prox(v, 0.5, penalty=penalty, group_by="out", mu=0.5)
    assert w[0].tolist() == [3.0 - (0.25 if penalty else 0.0), math.inf]
    assert w[1].isfinite().all()


@pytest.mark.parametrize(("penalty", "a"), [("mcp", 0.25), ("scad", 1.25)])
def test_the_least_shape_is_not_allowed(penalty, a):
    with pytest.raises(ValueError, match=rf"a={a} with step=0.25: {penalty} needs a > {a}"):
        tk.prox(V, 0.25, penalty=penalty, a=a)
    tk.prox(V, 0.25, penalty=penalty, a=a * 1.01)
