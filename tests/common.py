"""What the tests of the optimizers share: variants, a small network, a step."""

import copy

import pytest
import torch
from torch import nn

import tl1kernels as tk
from tl1kernels import backends
from tl1kernels.backends import cuda, triton_launch
from tl1kernels.verify import RULES, bounds_of

PAIRS = [
    (tk.ProxSGD, torch.optim.SGD),
    (tk.ProxAdam, torch.optim.Adam),
    (tk.ProxAdamW, torch.optim.AdamW),
]
VARIANTS = [
    *RULES.values(),
    (tk.ProxSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (tk.ProxSGD, torch.optim.SGD, {"weight_decay": 0.1}),
    (tk.ProxAdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    (tk.ProxAdam, torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (tk.ProxAdam, torch.optim.Adam, {"betas": (0.5, 0.7), "eps": 1e-3}),
]
variants = pytest.mark.parametrize(("ours", "torchs", "options"), VARIANTS)


ELEMENTWISE = [name for name, row in tk.PENALTIES.items() if not row.coupled]
COUPLED = [name for name, row in tk.PENALTIES.items() if row.coupled]

ON_THE_REFERENCE_ALONE = {
    "cpu": {"exclusive"},
    "triton": {"exclusive"},
    "cuda": {"exclusive"},
    "reference": set(),
}
"""Penalties that a backend has no kernel for yet."""


def allowed_shape(penalty, a, step):
    """Return `a`, or a larger shape where the penalty's prox needs one at this step size."""
    if penalty is None or tk.PENALTIES[penalty].check(a, 1.5 * step) is None:
        return a
    return a + 1.5 + 2 * step


def assert_near(got, want, ulps, size=None):
    """Assert that values agree to `ulps` units in the last place of `size` (default: of `want`)."""
    form = torch.finfo(got.dtype)
    size = want.double().abs() if size is None else size.double().abs()
    unit = form.eps * 2.0 ** size.clamp(min=form.tiny).log2().floor()
    error = ((got.double() - want.double()).abs() / unit).max().item()
    assert error <= ulps, f"{error:.3g} ulp"


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(5, 6, generator=generator).to(weight.dtype)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def state_of(optimizer):
    """Every tensor and option of an optimizer, comparable."""
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def skip_unless_it_runs(backend):
    """Skip a test whose tensors are on the CPU where this backend cannot take them."""
    reason = backends.BACKENDS[backend].unavailable()
    if backend == "triton" and not reason and not triton_launch.interpreting():
        reason = "it compiles for the GPU here; see test_triton.py and test_gpu.py"
    if backend == "cuda" and not reason and not cuda.emulated():
        reason = "it runs on the GPU here; see test_gpu.py"
    if reason:
        pytest.skip(f"backend {backend}: {reason}")


def gpu_backend(request):
    """Run tests on one of the backends with kernels for GPUs; the body of a fixture."""
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(f"{request.param}: {reason}")
    with tk.use_backend(request.param):
        yield request.param


def many_steps(backend):
    """100, or as many as an interpreter takes in a few seconds."""
    return 10 if backend == "triton" and triton_launch.interpreting() else 100


def rounding(backend, dtype):
    """How far a 16-bit result may be from the exact one, in ulp."""
    return bounds_of(backend).step[dtype]
