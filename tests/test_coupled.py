"""Penalties of whole groups: their definitions and edge cases, on every backend that has them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize

import tl1kernels as tk
from tests.common import COUPLED, ON_THE_REFERENCE_ALONE, assert_near, rounding
from tests.strategies import has_view, tensors
from tl1kernels import backends, oracles
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
from tl1kernels.verify import GROUPINGS

PROXIMAL = ("l1_minus_l2", "exclusive")  # CGES is a step, not the prox of what it goes by


@pytest.fixture(params=COUPLED)
def penalty(request, each_backend):
    if request.param in ON_THE_REFERENCE_ALONE[each_backend]:
        pytest.skip(f"{each_backend} has no {request.param}; see the next test")
    return request.param


def test_a_backend_without_the_penalty_says_so_when_it_is_asked_for(each_backend):
    if not ON_THE_REFERENCE_ALONE[each_backend]:
        pytest.skip(f"{each_backend} has all of them")
    for name in ON_THE_REFERENCE_ALONE[each_backend]:
        with pytest.raises(RuntimeError, match=f"'{each_backend}' .* no penalty '{name}'"):
            tk.prox(torch.randn(3, 4), 0.1, penalty=name, group_by="in")


@pytest.mark.parametrize("name", PROXIMAL)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_prox_is_a_minimum_of_its_definition(name, n):
    """No search from many starts, on every choice of zeros among them, finds a better one."""
    generator = np.random.default_rng(n)
    value = oracles.COUPLED[name].value
    for tau in (0.03, 0.3, 1.0, 3.0):
        v = generator.normal(size=n)

        def objective(w, v=v, tau=tau):
            return np.square(w - v).sum() / 2 + value(w, tau)

        x = torch.from_numpy(v)[None]
        got = tk.prox(x, tau, penalty=name, mu=1.0, group_by="out", backend="reference")
        reached = objective(got.numpy()[0])
        for support in range(1 << n):
            there = np.array([(support >> i) & 1 for i in range(n)], dtype=bool)
            for scale in (1.0, 0.3):

                def on_support(u, there=there):
                    w = np.zeros(n)
                    w[there] = u
                    return objective(w)

                start = scale * v[there]
                least = objective(np.zeros(n))
                if there.any():
                    least = minimize(on_support, start, method="Nelder-Mead", tol=1e-12).fun
                assert reached <= least + 1e-9, (tau, v, there)


@given(data=st.data())
def test_the_value_is_the_sum_over_groups(data):
    w = data.draw(tensors(min_dims=2))
    name = data.draw(st.sampled_from(COUPLED))
    group_by = data.draw(st.sampled_from([by for by in GROUPINGS if by is not None]))
    assume(has_view(w, group_by))
    options = {"lam": 0.7, "mu": 0.4, "penalty": name, "group_by": group_by}
    index = oracles.group_index(tuple(w.shape), group_by)
    members = [w.numpy()[index == g] for g in range(index.max() + 1)]
    want = sum(
        oracles.COUPLED[name].value(group, 0.28) + 0.42 * np.linalg.norm(group) for group in members
    )
    assert tk.penalty_value(w, **options).item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@pytest.mark.usefixtures("each_backend")
def test_any_dense_tensor_is_what_its_authors_say_group_by_group(data, dtype):
    lacking = ON_THE_REFERENCE_ALONE[backends.asked_for()]
    penalties = [name for name in COUPLED if name not in lacking]
    if not penalties:
        pytest.skip("no kernel")
    penalty = data.draw(st.sampled_from(penalties))
    v = data.draw(tensors(min_dims=2)).to(dtype)
    group_by = data.draw(st.sampled_from([by for by in (*GROUPINGS, "auto") if by is not None]))
    assume(has_view(v, group_by))
    options = {
        "lam": data.draw(st.floats(0, 5)),
        "mu": data.draw(st.floats(0, 1)),
        "penalty": penalty,
        "group_by": group_by,
        "group_weight": data.draw(st.sampled_from([None, "sqrt"])),
    }
    got = tk.prox(v, 0.3, **options).double().numpy()
    x = v.double().numpy()
    want = oracles.prox_as_published(x, 0.3, a=1.0, **options)
    terms = 0.3, options["lam"] * options["mu"]
    magnified = oracles.condition(x, *terms, penalty, 1.0, group_by)
    sizes = np.abs(x).max() if x.size else 0.0  # a group's sum rounds with the largest of it
    # float32 arithmetic, or float64's; then the store
    limit = (8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps) * sizes * magnified
    limit = limit + torch.finfo(dtype).eps * np.abs(want)
    assert (np.abs(got - want) <= limit + torch.finfo(dtype).tiny).all()


def test_groups_are_asked_for(penalty):
    with pytest.raises(ValueError, match=rf"group_by must not be None with penalty='{penalty}'"):
        tk.prox(torch.ones(2, 2), 0.1, penalty=penalty)
    with pytest.raises(ValueError, match="group_by must not be None"):
        tk.ProxSGD([torch.ones(2, 2)], lr=0.1, lam=1.0, penalty=penalty, group_by=None)


def test_the_default_of_mu_and_the_schedule_of_layers():
    v = torch.randn(4, 5)
    for name, mu in (("l1_minus_l2", 1.0), ("exclusive", 0.5), ("cges", 0.5)):
        options = {"penalty": name, "group_by": "out", "backend": "reference"}
        assert torch.equal(tk.prox(v, 0.1, **options), tk.prox(v, 0.1, mu=mu, **options))
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    of = {
        name: [g.get("mu") for g in tk.param_groups(net, lam=1.0, penalty=name)][:2]
        for name in COUPLED
    }
    assert of == {"l1_minus_l2": [None, None], "exclusive": [0.2, 0.8], "cges": [0.2, 0.8]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_rounding_alone_puts_beyond_the_threshold_is_kept_alone(dtype, each_backend):
    """Tau is 1 for float32, and a little less in float64."""
    v = torch.tensor([[0.3, -0.1, 1.0], [-1.0, 0.5, 0.0]], dtype=dtype)
    for tau in (1 - 2**-53, 1.0, 1 + 2**-52):
        w = tk.prox(v, tau, penalty="l1_minus_l2", group_by=0, mu=1.0)
        assert w.tolist() == [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("group_by", ["out", "in", "layer"])
def test_of_equal_largest_weights_the_first_is_kept_alone(group_by, each_backend):
    if "l1_minus_l2" in ON_THE_REFERENCE_ALONE[each_backend]:
        pytest.skip("no kernel")
    v = -torch.ones(70, 130)
    v[3, 5] = 0.5
    w = tk.prox(v, 2.0, penalty="l1_minus_l2", group_by=group_by)
    want = torch.zeros_like(v)
    if group_by == "out":
        want[:, 0] = -1
    elif group_by == "in":
        want[0] = -1
    else:
        want[0, 0] = -1
    assert torch.equal(w, want)
    assert w[w == 0].view(torch.int32).eq(0).all()


@pytest.mark.parametrize("shape", [(7, 40), (130, 700)])
@pytest.mark.parametrize("group_by", ["out", "in", "layer"])
def test_where_the_threshold_reaches_the_largest_weight_it_is_kept_alone(
    group_by, shape, each_backend
):
    if "l1_minus_l2" in ON_THE_REFERENCE_ALONE[each_backend]:
        pytest.skip("no kernel")
    v = torch.empty(shape).uniform_(-1, 1)
    w = tk.prox(v, 1.0, penalty="l1_minus_l2", group_by=group_by)
    dim = {"out": 1, "in": 0, "layer": (0, 1)}[group_by]
    alone = v.abs() == v.abs().amax(dim, keepdim=True)
    torch.testing.assert_close(w, torch.where(alone, v, 0), rtol=1e-6, atol=0)


def test_an_infinity_is_not_taken_for_a_dead_weight(penalty):
    v = torch.tensor([[math.inf, 1.0], [1.0, -2.0]])
    w = tk.prox(v, 0.1, penalty=penalty, group_by="in")
    assert not w[0, 0].isfinite()
    assert w[:, 1].isfinite().all()


def test_a_nan_spoils_its_group_and_zeros_stay_plus_zero(penalty):
    v = torch.randn(4, 100)
    v[1, 2], v[2] = math.nan, -0.0
    for step in (0.001, 5.0):
        w = tk.prox(v, step, penalty=penalty, group_by="out")
        assert w.isnan().any(1).tolist() == [False, True, False, False]
        assert w[1].isnan().all()
        assert w[2].view(torch.int32).eq(0).all()
        assert w[w == 0].view(torch.int32).eq(0).all()


@pytest.mark.parametrize(
    ("shape", "group_by"),
    [((3, 9000), "out"), ((130, 70), "in"), ((90, 3, 5, 5), "in"), ((9, 70), "in")],
)
def test_a_nan_spoils_groups_of_many_pieces_alone(penalty, shape, group_by):
    v = torch.randn(shape)
    dim = 0 if group_by == "out" else 1
    v.select(dim, 1).fill_(math.nan)
    v.select(dim, 2).flatten()[3] = math.inf
    v.select(dim, 2)[4] = math.nan
    for step in (0.001, 5.0):
        w = tk.prox(v, step, penalty=penalty, group_by=group_by)
        spoilt = [w.select(dim, i).isnan() for i in range(3)]
        assert [bool(x.any()) for x in spoilt] == [False, True, True]
        assert spoilt[1].all()


@pytest.mark.parametrize("shape", [(40, 3), (40, 300), (3, 9000)])
@pytest.mark.parametrize("group_by", ["out", "in"])
@pytest.mark.parametrize("name", ["cges", "l1_minus_l2"])
def test_coupled_kernels_are_within_4_ulp_of_each_weight(name, group_by, shape, each_backend):
    """In float32, scaled by the condition; thresholds from tiny to beyond the largest weight."""
    generator = np.random.default_rng(0)
    worst = 0.0
    for _ in range(6):
        v = torch.from_numpy(generator.normal(size=shape)).float()
        v = v if group_by == "out" else v.T.contiguous()
        size = shape[1]
        tau = 10 ** generator.uniform(-6, 0.3) / (size if name == "cges" else 1)
        lasso = 10 ** generator.uniform(-6, 0) * math.sqrt(size)
        options = {"lam": tau + lasso, "mu": tau / (tau + lasso), "penalty": name}
        options["group_by"] = group_by
        got = tk.prox(v, 1.0, **options).double()
        want = tk.prox(v.double(), 1.0, **options, backend="reference")
        magnified = 1.0
        if name == "l1_minus_l2":
            z = (v.double().abs() - tau).clamp(min=0)
            norms = z.norm(dim=1 if group_by == "out" else 0, keepdim=True)
            magnified = 1 + tau / norms.clamp(min=1e-9)
        ulp = torch.from_numpy(np.spacing(v.abs().numpy())).double()
        worst = max(worst, ((got - want).abs() / ulp / magnified).max().item())
    assert 0 < worst <= 4


@pytest.mark.parametrize("n", [1, 2, 5000])
def test_a_single_weight_is_a_group_where_auto_finds_none(penalty, n):
    """Tensors of fewer than two dims, whose value is a sum over weights."""
    v = torch.linspace(-2, 2, n)
    options = {"penalty": penalty, "mu": 1.0, "lam": 0.7}
    got = tk.prox(v, 0.5, group_by="auto", **options)
    want = tk.prox(v[:, None], 0.5, group_by="out", **options, backend="reference")
    assert_near(got, want[:, 0], 4, v.abs())
    p = v.clone().requires_grad_()
    p.grad = torch.zeros_like(p)
    tk.ProxSGD([p], lr=0.5, min_ndim=0, **options).step()
    assert torch.equal(p.detach(), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_threshold_beside_large_weights_and_the_reverse(penalty, dtype):
    """The squares of either, in units of the other, are beyond float64."""
    v = torch.tensor([[3.0, -4.0, 0.5], [1e-30, 2e-30, 0.0]], dtype=dtype)
    options = {"penalty": penalty, "mu": 0.5, "group_by": "out"}
    for lam in (1e-174, 1e-300, 5e-324):
        assert torch.equal(tk.prox(v, 1.0, lam=lam, **options), v)
    assert tk.prox(v, 1.0, lam=1e200, **options).eq(0).all()


def test_without_weight_it_is_the_group_lasso_and_without_both_nothing(penalty):
    v = torch.randn(7, 90)
    lasso = tk.prox(v, 0.5, penalty=None, group_by="in")
    assert_near(tk.prox(v, 0.5, penalty=penalty, mu=0.0, group_by="in"), lasso, 2)
    assert torch.equal(tk.prox(v, 0.0, penalty=penalty, mu=0.5, group_by="in"), v)
    assert torch.equal(tk.prox(v, 0.5, lam=0.0, penalty=penalty, group_by="in"), v)


def test_a_step_with_momentum_and_a_master(each_backend):
    if "cges" in ON_THE_REFERENCE_ALONE[each_backend]:
        pytest.skip("no kernel")
    narrow = torch.randn(33, 65).bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    options = {"lr": 0.05, "momentum": 0.9, "lam": 0.2, "penalty": "cges", "group_by": "in"}
    mine = tk.ProxSGD([narrow], master_weights=True, **options)
    theirs = tk.ProxSGD([wide], **options)
    for _ in range(3):
        narrow.grad = torch.randn(33, 65).bfloat16()
        wide.grad = narrow.grad.float()
        mine.step()
        theirs.step()
    assert torch.equal(mine.state[narrow]["master_param"], wide)
    if rounding(each_backend, torch.bfloat16) < 1:  # Triton's interpreter cuts off
        assert torch.equal(narrow, wide.bfloat16())
    assert (narrow == 0).any()
    assert (narrow != 0).any()


def test_cges_groups_and_layer_weights_of_its_authors_can_be_expressed():
    """Yoon & Hwang: linear weights by input unit, filters by (in, kh, kw), over the outputs."""
    v = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    w = tk.prox(v, 0.1, penalty="cges", mu=0.3, group_by="in_spatial", backend="reference")
    for i, y, x in np.ndindex(4, 3, 3):
        group = v[:, i, y, x].numpy()
        want = oracles.COUPLED["cges"].published(group, 0.1, 0.3, 0.7)
        np.testing.assert_allclose(w[:, i, y, x].numpy(), want, rtol=0, atol=1e-15)
