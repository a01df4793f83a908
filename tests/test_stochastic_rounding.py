"""Stochastic rounding of bfloat16: its random bits, and that all backends take the same."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl1kernels as tk
from tests.common import COUPLED, ELEMENTWISE, ON_THE_REFERENCE_ALONE, allowed_shape
from tests.strategies import has_view, tensors
from tl1kernels.backends import asked_for, reference
from tl1kernels.verify import GROUPINGS


def stochastic(starts, gradients, seed=0, rule=tk.ProxSGD, backend=None, **options):
    """Return what bfloat16 tensors are after one step."""
    params = [start.clone().requires_grad_() for start in starts]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
    optimizer = rule(params, **options, rounding="stochastic")
    torch.manual_seed(seed)
    with tk.use_backend(backend or asked_for()):
        optimizer.step()
    return [p.detach() for p in params]


# --- The random bits.


def bits(seed, tensor, place):
    return reference.random_bits(reference.random_key(seed, tensor), place)


def correlation(x, y):
    """Of numbers from 0 to 2^16, in standard deviations of that of independent ones."""
    x, y = ((of.double() + 0.5) / 2**16 - 0.5 for of in (x, y))
    return (12 * (x * y).mean() * math.sqrt(len(x))).abs().item()


@pytest.mark.parametrize("seed", [0, 1, 2**61 + 12345])
@pytest.mark.parametrize("first", [0, 2**31 - 1000, 2**32 - 10**5])
def test_random_bits_are_uniform_and_independent(seed, first):
    """Of neighbours, of rows of usual lengths, of other tensors, of steps with similar seeds."""
    place = first + torch.arange(2**18)
    of = bits(seed, 0, place)
    assert (of.min(), of.max()) == (0, 2**16 - 1)
    for n in (1, 4, 8, 12):  # the upper ones decide most
        counts = torch.bincount(of >> 16 - n, minlength=2**n).double()
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert abs(chi2 - 2**n + 1) < 5 * math.sqrt(2 * 2**n)
    lags = [1, 2, 3, 4, 7, 8, 9, 16, 32, 64, 100, 256, 576, 768, 1000, 1024, 4096, 65536]
    assert max(correlation(of[:-lag], of[lag:]) for lag in lags) < 5
    others = [(seed, tensor) for tensor in (1, 2, 160)]
    others += [(other, 0) for other in (seed + 1, seed ^ 2**32, seed + 2**40)]
    assert max(correlation(of, bits(*other, place)) for other in others) < 5


def test_places_are_those_in_memory():
    for p in (torch.zeros(3, 4), torch.zeros(4, 3).t(), torch.zeros(2, 3, 5).permute(2, 0, 1)):
        places = reference.places(p)
        flat = torch.arange(p.numel())
        assert torch.equal(places.as_strided((p.numel(),), (1,)), flat)
        assert torch.equal(torch.empty_like(p, dtype=torch.int64).copy_(places), places)
        assert places.stride() == p.stride()


# --- What they decide.


@pytest.mark.usefixtures("each_backend")
@given(st.data(), st.sampled_from(GROUPINGS), st.integers(0, 2**62))
def test_where_arithmetic_is_exact_all_bits_are_the_references(data, group_by, seed):
    """Tensors of any strides; lr = 1 leaves one rounding, to float32."""
    drawn = data.draw(st.lists(tensors(min_dims=2), min_size=1, max_size=3))
    starts = [start.bfloat16() for start in drawn if has_view(start, group_by)]
    gradients = [(0.01 * start.double().sin()).bfloat16() for start in starts]
    if not starts:
        return
    # A threshold so small that it changes nothing, on the way of any.
    options = {"lr": 1.0, "lam": 1e-30, "penalty": None, "group_by": group_by}
    want = stochastic(starts, gradients, seed, backend="reference", **options)
    for a, b in zip(stochastic(starts, gradients, seed, **options), want, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize(
    ("penalty", "group_by"), [(None, None), *product((None, "l1_minus_l2"), ("out", "in", "layer"))]
)
def test_every_instruction_set_takes_the_same_bits(kernels, penalty, group_by):
    """On tensors of more weights than a vector; l1 - l2 with a threshold that changes nothing."""
    starts = [torch.randn(37, 53).bfloat16(), torch.randn(8, 16, 3, 3).bfloat16()]
    starts[1] = starts[1].to(memory_format=torch.channels_last)
    gradients = [(0.01 * start.double()).bfloat16() for start in starts]
    options = {"lr": 1.0, "lam": 1e-30, "mu": 0.5, "penalty": penalty, "group_by": group_by}
    of = (starts, gradients, 11)
    want = stochastic(*of, backend="reference", **options)
    for a, b in zip(stochastic(*of, **options), want, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("rule", [tk.ProxSGD, tk.ProxAdamW])
@pytest.mark.parametrize("penalty", [None, *ELEMENTWISE, *COUPLED])
def test_a_step_rounds_as_the_references_but_where_float32_decides(penalty, rule, each_backend):
    """Which neighbour a weight goes to may hang on the last places of a float32: of few."""
    if penalty in ON_THE_REFERENCE_ALONE[each_backend]:
        pytest.skip(f"{each_backend} has no {penalty}")
    lr = 1e-2
    a = allowed_shape(penalty, 0.5, lr)
    shapes = [(33, 70), (16, 8, 3, 3), (9, 1030)]
    groupings = ["out", "in", "layer"] + [None] * (penalty not in COUPLED)
    for group_by in groupings:
        starts = [torch.randn(shape).bfloat16() for shape in shapes]
        starts[1] = starts[1].to(memory_format=torch.channels_last)
        gradients = [torch.randn_like(start) for start in starts]
        options = {"lr": lr, "lam": 0.05, "penalty": penalty, "a": a, "group_by": group_by}
        of = (starts, gradients, 7, rule)
        want = torch.cat([w.flatten() for w in stochastic(*of, backend="reference", **options)])
        got = torch.cat([w.flatten() for w in stochastic(*of, **options)])
        size = torch.cat([start.flatten() for start in starts]).double().abs()
        size = torch.maximum(size, want.double().abs()).clamp(min=2.0**-6)  # a step moves 1e-2
        error = (got.double() - want.double()).abs() / (2.0 ** size.log2().floor() * 2**-7)
        assert error.max() <= 1
        assert (got != want).double().mean() <= 2e-3
        assert (want != torch.cat([start.flatten() for start in starts])).double().mean() > 0.1


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("group_by", [None, "in", "layer"])
def test_stochastic_rounding_keeps_small_steps_on_average_and_repeats(group_by):
    """1 + 0.3 ulp in bfloat16: a 1 or its neighbour, which 3 of 10 become."""
    start = torch.ones(90, 100, dtype=torch.bfloat16)
    gradient = torch.full_like(start, -0.3 * 2**-7)
    options = {"lr": 1.0, "lam": 1e-30, "penalty": None, "group_by": group_by}
    steps = (stochastic([start], [gradient], seed, **options) for seed in (0, 0, 1))
    (first,), (again,), (other,) = steps
    assert set(first.unique().tolist()) == {1.0, 1 + 2**-7}
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    up = (first > 1).double().mean().item()
    assert abs(up - 0.3) < 5 * (0.3 * 0.7 / first.numel()) ** 0.5
    rows = (first > 1).double().mean(1)  # and not by rows
    assert 0.5 < rows.var() / (0.3 * 0.7 / 100) < 2


@pytest.mark.usefixtures("each_backend")
def test_equal_tensors_of_a_step_are_rounded_each_by_itself():
    start = torch.ones(50, 50, dtype=torch.bfloat16)
    gradient = torch.full_like(start, -0.5 * 2**-7)
    of = ([start] * 3, [gradient] * 3)
    for options in ({"lam": 0.0}, {"lam": 1e-30, "penalty": None, "group_by": "in"}):
        a, b, c = stochastic(*of, lr=1.0, **options)
        for x, y in ((a, b), (a, c), (b, c)):
            assert 0.4 < (x != y).double().mean() < 0.6


@pytest.mark.usefixtures("each_backend")
def test_only_bfloat16_is_rounded_so_and_zeros_infinities_and_nan_stay():
    all_ones = torch.tensor([0x7FFF, -1], dtype=torch.int16).view(torch.bfloat16).tolist()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = [[0.5, -0.5, math.inf, -math.inf, math.nan, *all_ones]]
        p = torch.tensor(values, dtype=dtype, requires_grad=True)
        if dtype == torch.bfloat16:
            p.detach()[0, 5:] = torch.tensor([0x7FFF, -1], dtype=torch.int16).view(dtype)
        p.grad = torch.zeros_like(p)
        tk.ProxSGD([p], lr=1.0, lam=1.0, group_by=None, rounding="stochastic").step()
        assert p.tolist()[0][:4] == [0.0, 0.0, math.inf, -math.inf]
        assert not p.signbit()[0, :2].any()
        assert p[0, 4:].isnan().all()


@pytest.mark.usefixtures("each_backend")
def test_what_is_rounded_to_zero_has_no_sign():
    """Half of the least bfloat16, negative, becomes a zero half of the time: +0 under a penalty.

    The threshold is far below it. What flushes subnormals makes zeros of all.
    """
    start = torch.full((40, 50), -(2.0**-133), dtype=torch.bfloat16)
    for group_by in ("out", "in"):
        options = {"lr": 0.5, "lam": 1e-42, "penalty": None, "group_by": group_by}
        (w,) = stochastic([start], [start], **options)
        assert (w == 0).double().mean() > 0.4
        assert not w[w == 0].signbit().any()


@pytest.mark.usefixtures("each_backend")
def test_each_step_of_an_optimizer_takes_new_random_bits():
    p = torch.ones(40, 50, dtype=torch.bfloat16, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, rounding="stochastic")
    seen = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1)
        p.grad = torch.full_like(p, -0.5 * 2**-7)
        optimizer.step()
        seen.append(p.detach().clone())
    for x, y in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < (seen[x] != seen[y]).double().mean() < 0.6


@pytest.mark.usefixtures("each_backend")
def test_groups_may_round_each_in_its_own_way():
    params = [torch.ones(40, 50, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    for order in (("nearest", "stochastic"), ("stochastic", "nearest")):
        groups = [{"params": [p], "rounding": way} for p, way in zip(params, order, strict=True)]
        optimizer = tk.ProxSGD(groups, lr=1.0)
        for p in params:
            with torch.no_grad():
                p.fill_(1)
            p.grad = torch.full_like(p, -0.25 * 2**-7)
        optimizer.step()
        changed = {way: (p != 1).any().item() for p, way in zip(params, order, strict=True)}
        assert changed == {"nearest": False, "stochastic": True}
