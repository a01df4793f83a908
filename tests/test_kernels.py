"""What only the compiled kernels promise, on each of them: error, faults, odd combinations.

What every backend must do is tested elsewhere (`each_backend`). Here run the native library, on
every instruction set that this machine has, and Triton, on a GPU or interpreted.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tests.common import ELEMENTWISE, allowed_shape, assert_near, rounding, variants
from tl1kernels import oracles
from tl1kernels.backends.reference import tl1_threshold
from tl1kernels.plan import FLOAT_DTYPES as DTYPES

HALVES = (torch.bfloat16, torch.float16)


def on(backend, function, *args, **options):
    with tk.use_backend(backend):
        return function(*args, **options)


def test_tl1_is_within_4_ulp_and_dies_where_the_reference_does(kernels):
    """Over a from 1e-6 to 1e6 and tau from 1e-15 to 1; scaled by the conditioning."""
    generator = np.random.default_rng(0)
    worst = 0.0
    for i in range(90 if kernels == "triton" else 300):  # its interpreter is slow
        a, tau = 10 ** generator.uniform(-3, 6), 10 ** generator.uniform(-10, 0)
        if i % 3 == 0:  # next to the double root
            tau = min(1.0, a * a / (2 * (a + 1)) * 10 ** generator.uniform(-0.5, 0.5))
        if i % 3 == 1:  # where the native kernels go from one series to another, in small units
            a = 10 ** generator.uniform(-6, 0)
            tau = a * a / (a + 1) * 10 ** generator.uniform(-3.5, -1)
        near = 1 + generator.choice([-1, 1], 2000) * 10 ** generator.uniform(-7.5, 0, 2000)
        far = 10 ** generator.uniform(-3, 6, 500)
        v = torch.from_numpy(tl1_threshold(tau, a) * np.concatenate([near, far])).float()
        got = on(kernels, tk.prox, v, tau, a=a)
        want = on("reference", tk.prox, v.double(), tau, a=a)
        assert got.isfinite().all(), (a, tau)
        ulp = torch.from_numpy(np.spacing(v.abs().numpy())).double()
        near_threshold = (v.double().abs() - tl1_threshold(tau, a)).abs() <= 4 * ulp
        assert (((got == 0) == (want == 0)) | near_threshold).all(), (a, tau)
        # As `_tl1_condition`, for all of them at once.
        size = v.double().abs()
        q = (6.75 * tau * (a + 1) / (a + size) * a / (a + size) / (a + size)).clamp(max=1 - 1e-15)
        error = (got.double() - want).abs() / ulp
        worst = max(worst, (error * (1 - q).sqrt()).max().item())
    assert 0 < worst <= 4


@pytest.mark.parametrize("dtype", HALVES)
def test_tl1_of_16_bits_is_right_for_any_a_and_threshold(kernels, dtype):
    """For a from 1e-20 to 1e20, thresholds of the dtype's range; scaled by the conditioning."""
    generator = np.random.default_rng(0)
    finfo = torch.finfo(dtype)
    least, most = math.log10(finfo.smallest_normal) + 2, math.log10(finfo.max) - 1
    worst = 0.0
    for _ in range(60):
        a, threshold = 10 ** generator.uniform(-20, 20), 10 ** generator.uniform(least, most)
        tau = threshold * a / (a + 1)
        if 2 * threshold > a:  # it jumps there
            tau = (threshold + a / 2) ** 2 / 2 / (a + 1)
        assert tl1_threshold(tau, a) == pytest.approx(threshold)
        far = threshold * 10 ** generator.uniform(0, 5, 200)
        v = torch.from_numpy(np.concatenate([threshold * generator.uniform(1, 3, 200), far]))
        v = v[(v > 1.01 * threshold) & (v < finfo.max / 2)].to(dtype)
        got = on(kernels, tk.prox, v, tau, a=a).double()
        size = v.double()
        want = on("reference", tk.prox, size, tau, a=a)
        assert got.isfinite().all(), (a, tau)
        q = (6.75 * tau * (a + 1) / (a + size) * a / (a + size) / (a + size)).clamp(max=1)
        ulp = torch.from_numpy(np.ldexp(finfo.eps, np.frexp(size.numpy())[1] - 1))
        error = (got - want).abs() / ulp
        worst = max(worst, (error * (1 - q).sqrt()).max().item())
    assert 0 < worst <= rounding(kernels, dtype)


@pytest.mark.parametrize("penalty", ELEMENTWISE)
def test_every_penalty_is_within_4_ulp_and_dies_where_the_reference_does(kernels, penalty):
    """Over the same range, close to every kink and far from it."""
    generator = np.random.default_rng(0)
    oracle = oracles.ORACLES[penalty]
    condition = np.vectorize(oracle.condition, otypes=[float])
    worst = 0.0
    for _ in range(25):
        step, lam = 10 ** generator.uniform(-5, 0, 2)
        a = allowed_shape(penalty, 10 ** generator.uniform(-3, 6), step)
        kinks = oracle.kinks(step, lam, a)
        near = 1 + generator.choice([-1, 1], 300) * 10 ** generator.uniform(-7.5, 0, 300)
        far = 10 ** generator.uniform(-3, 6, 100)
        v = np.concatenate([kink * np.concatenate([near, far]) for kink in kinks])
        x = torch.from_numpy(v).float()
        options = {"lam": lam, "penalty": penalty, "a": a}
        got = on(kernels, tk.prox, x, step, **options).double().numpy()
        want = on("reference", tk.prox, x.double(), step, **options).numpy()
        assert np.isfinite(got).all(), options
        ulp, size = np.spacing(x.numpy()).astype(float), x.double().numpy()
        at_a_kink = np.any([abs(size - kink) <= 4 * ulp for kink in kinks], axis=0)
        assert (((got == 0) == (want == 0)) | at_a_kink).all(), options
        error = abs(got - want) / ulp / condition(size, step, lam, a)
        worst = max(worst, error[~at_a_kink].max())
    assert worst <= 4
    assert worst > 0 or penalty == "l0"


@pytest.mark.parametrize("dtype", HALVES)
def test_sixteen_bits_are_read_exactly_and_rounded_correctly(kernels, dtype):
    """Every pattern there and back; every middle of two neighbours, and what is next to it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    interpreted = rounding(kernels, dtype) > 1  # Triton's truncates, and knows nothing subnormal
    if interpreted:
        every = every[~(every.abs() < torch.finfo(dtype).smallest_normal)]
    there_and_back = tk.prox(every, 0.5, lam=0.0)
    number = ~every.isnan()
    assert torch.equal(there_and_back.view(torch.int16)[number], every.view(torch.int16)[number])
    assert there_and_back.isnan().equal(~number)
    low = every[every.isfinite()]
    middles = (low.double() + torch.nextafter(low, torch.full_like(low, math.inf)).double()) / 2
    v = middles[middles.isfinite()].float()
    v = torch.cat([v, torch.nextafter(v, v * 2), torch.nextafter(v, v * 0)])
    # p - lr * g with p = 0 and lr = 1 hands a float32 gradient's negative to the store; a half
    # cannot hold one, so the value comes as the sum of two: momentum's buffer is float32.
    p = torch.zeros(v.shape, dtype=dtype, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, momentum=1.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["momentum_buffer"].copy_(-v)
    optimizer.step()
    if interpreted:
        assert_near(p.detach(), v, 1, v.abs().clamp(min=2 * torch.finfo(dtype).smallest_normal))
    else:
        assert torch.equal(p.detach(), v.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@variants
def test_a_step_agrees_with_the_reference(kernels, ours, torchs, options, dtype):
    """Three steps on a tensor of 25 blocks and a tail, with groups."""
    start = torch.randn(83, 41).to(dtype)
    gradients = [torch.randn(83, 41).to(dtype) for _ in range(3)]
    results = []
    for backend in (kernels, "reference"):
        p = start.clone().requires_grad_()
        optimizer = ours([p], lr=0.05, lam=0.5, a=0.7, **options)
        for gradient in gradients:
            p.grad = gradient
            on(backend, optimizer.step)
        results.append(p.detach())
    got, want = results
    size = start.double().abs().clamp(min=1)
    ulps = 4 if rounding(kernels, dtype) < 1 else 12
    assert_near(got, want, {torch.float32: 32, torch.float64: 64}.get(dtype, ulps), size)
    assert (got == 0).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@variants
def test_nan_and_infinite_gradients_do_what_torch_does(kernels, ours, torchs, options, bad):
    results = []
    for kind in (ours, torchs):
        p = torch.linspace(-1, 1, 70).reshape(7, 10).requires_grad_()
        optimizer = kind([p], lr=0.1, **options)
        for i in range(3):
            p.grad = torch.full_like(p, 0.5)
            if i == 0:
                p.grad[2, 3] = bad
            optimizer.step()
        results.append(p.detach())
    got, want = results
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_norm_over_or_underflows(kernels, dtype):
    """Also next to thresholds at which kernels begin to take squares in another unit."""
    form = torch.finfo(dtype)
    least, most = form.smallest_normal * 64, form.max / 64
    usual = [size for size in (2.0**-38, 1.0, 2.0**34) if least < size < most]
    for size in (least, *usual, most):
        v = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]], dtype=dtype) * size
        for group_by in (0, 1):
            got, want = (
                tk.prox(v, 2.5 * size, penalty=None, group_by=group_by, backend=backend)
                for backend in (kernels, "reference")
            )
            torch.testing.assert_close(got, want, rtol=4 * form.eps, atol=form.smallest_normal)


@pytest.mark.parametrize(
    ("v", "tau", "a"),
    [
        (1e14, 1e13, 1e12),
        (1e8, 1e7, 1e15),
        (1e20, 1e37, 1.0),
        (1e20, 1e19, 1e30),
        (math.inf, 1e39, 1.0),
        (3e38, 1e30, 1e300),
        (1e-40, 1e-45, 1e-3),
        (0.5, 1e-30, 1e-30),
        (2.0, 1.0, 1e-300),
    ],
)
@pytest.mark.parametrize("penalty", ELEMENTWISE)
def test_unusual_ranges(kernels, penalty, v, tau, a):
    x = torch.tensor([v, -v, 0.0])
    a = allowed_shape(penalty, a, tau)
    got, want = (
        tk.prox(x, tau, penalty=penalty, a=a, backend=backend) for backend in (kernels, "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-44)


def test_adams_mean_forgets_a_large_gradient_as_torch_does(kernels):
    """With beta1 < 1/2, mean + (1 - beta1) (g - mean) would cancel."""
    results = []
    for kind in (tk.ProxAdam, torch.optim.Adam):
        p = torch.zeros(70, requires_grad=True)
        optimizer = kind([p], lr=1.0, betas=(0.1, 0.5))
        for size in (1e9, 1.0, 1.0):
            p.grad = torch.full((70,), size)
            optimizer.step()
        results.append(optimizer.state[p]["exp_avg"])
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_state_and_gradients_in_another_layout(kernels):
    """The network turns to channels_last after its first step; gradients stay as they were."""
    results = []
    for backend in (kernels, "reference"):
        torch.manual_seed(0)
        p = torch.randn(8, 4, 3, 3).requires_grad_()
        optimizer = tk.ProxAdamW([p], lr=0.1, lam=0.3)
        for i in range(4):
            p.grad = torch.randn(4, 8, 3, 3).transpose(0, 1)
            if i == 1:
                p.data = p.data.to(memory_format=torch.channels_last)
            if i == 3:
                p.grad = torch.ones(1).expand(8, 4, 3, 3)
            on(backend, optimizer.step)
        results.append(p.detach())
    assert_near(*results, 16, results[1].abs().clamp(min=1))


def test_two_dtypes_rules_and_penalties_in_one_optimizer(kernels):
    groups = []
    generator = torch.Generator().manual_seed(0)
    for dtype, penalty in itertools.product(DTYPES, (None, *ELEMENTWISE)):
        p = torch.randn(9, 7, generator=generator).to(dtype).requires_grad_()
        p.grad = torch.randn(9, 7, generator=generator).to(dtype)
        groups.append({"params": [p], "penalty": penalty, "lam": 0.3})
    wanted = []
    for group in groups:
        (p,) = group["params"]
        v = p.detach().double() - 0.1 * p.grad.double()
        a = tk.PENALTIES[group["penalty"]].a if group["penalty"] else None
        options = {"lam": 0.3, "penalty": group["penalty"], "group_by": "auto", "a": a or 1.0}
        mu = 0.0 if group["penalty"] is None else 0.5
        wanted.append(oracles.prox_as_published(v.numpy(), 0.1, mu=mu, **options))
    tk.ProxSGD(groups, lr=0.1).step()
    for group, want in zip(groups, wanted, strict=True):
        (p,) = group["params"]
        assert_near(p.detach(), torch.from_numpy(want), 8, p.detach().abs().clamp(min=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_regularizer_no_bit_changes_not_even_of_minus_zero(kernels, dtype):
    v = torch.tensor([[-0.0, 0.0, 1.0, -1.0, math.inf]], dtype=dtype)
    for group_by in (None, "out", "in"):
        got = tk.prox(v, 0.5, lam=0.0, group_by=group_by)
        assert torch.equal(got, v)
        assert torch.equal(got.signbit(), v.signbit())
