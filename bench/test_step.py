"""Time of one SGD step with integrated TL1, beside the step that people know.

Run: .venv/bin/python -m pytest bench --benchmark-enable
Each case checks its result on fresh random input before it is timed.
"""

import math

import pytest
import torch

import tl1kernels as tk

LR, LAM, A, MU = 0.1, 0.05, 1.0, 0.5
SHAPE = (1024, 1024)


@torch.no_grad()
def eager_step(p, g):
    """Take the step as a user would type it from the paper: SGD, eq. 11, group lasso on rows."""
    tau, c = LR * LAM * MU, LR * LAM * (1 - MU)
    v = p - LR * g
    if tau <= A * A / (2 * (A + 1)):
        threshold = tau * (A + 1) / A
    else:
        threshold = math.sqrt(2 * tau * (A + 1)) - A / 2
    size = v.abs()
    phi = torch.arccos((1 - 27 * tau * A * (A + 1) / (2 * (A + size) ** 3)).clamp(-1, 1))
    t = v.sign() * (2 / 3 * (A + size) * torch.cos(phi / 3) - 2 * A / 3 + size / 3)
    t = torch.where(size <= threshold, 0.0, t)
    norm = t.norm(dim=1, keepdim=True)
    p.copy_(t * torch.where(norm > 0, (1 - c / norm).clamp(min=0), 0.0))


def step_of(side, p):
    if side == "eager, from the paper":
        return lambda: eager_step(p, p.grad)
    if side == "torch.optim.SGD(fused=True), no prox":
        return torch.optim.SGD([p], lr=LR, fused=True).step
    optimizer = tk.ProxSGD([p], lr=LR, lam=LAM, a=A, mu=MU, group_by="out")

    def step():
        with tk.use_backend(side):
            optimizer.step()

    return step


def fresh(dtype=torch.float32):
    p = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    p.grad = torch.randn(SHAPE, dtype=dtype)
    return p


@pytest.mark.parametrize(
    "side", ["torch.optim.SGD(fused=True), no prox", "eager, from the paper", "reference"]
)
def test_rows_1024x1024_float32(benchmark, side):
    if "no prox" not in side:
        ours, eager = fresh(torch.float64), fresh(torch.float64)
        with torch.no_grad():
            eager.copy_(ours)
        eager.grad = ours.grad
        step_of("reference", ours)()
        eager_step(eager, eager.grad)
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-12)
    benchmark.pedantic(step_of(side, fresh()), rounds=10, warmup_rounds=2)
