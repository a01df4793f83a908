"""The Triton kernel that runs first: every tensor's numbers become coefficients, in float64.

Scheduled numbers are read from memory here; the kernels of `triton_kernels.py` read what comes out.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends.triton_math import (
    BETA1,
    BETA2,
    C_BETA1,
    C_BETA2,
    C_CUT,
    C_DECAY,
    C_EPS,
    C_GAIN,
    C_GRAD_DECAY,
    C_GRAD_LR,
    C_INVERSE_ROOT,
    C_KEEP,
    C_LR,
    C_MOMENTUM,
    C_NESTEROV,
    C_NORM_UNIT,
    C_RATE1,
    C_RATE2,
    C_THRESHOLD,
    C_UNIT,
    C_ZERO,
    COUNTER,
    DAMPENING,
    ELEMENTWISE,
    EPS,
    GROUP,
    LAM_THERE,
    LR,
    LR_THERE,
    MOMENTUM,
    N_COEFFICIENTS,
    N_SCALARS,
    SHAPE,
    STEP,
    TABLE,
    WEIGHT_DECAY,
    round_down,
)


@triton.jit
def _power(base, n):
    """base^n for whole n >= 0."""
    power = 1 + 0 * base
    n = n.to(tl.int64)
    while tl.max(n) > 0:
        power = tl.where(n & 1 == 1, power * base, power)
        base = base * base
        n = n >> 1
    return power


@triton.jit
def _there(column, otherwise, mask):
    """The numbers on the device whose addresses are in a column of the table, where it has one."""
    address = tl.load(column, mask=mask, other=0)
    on_device = address != 0
    number = tl.load(address.to(tl.pointer_type(tl.float32)), mask=on_device, other=0.0)
    return tl.where(on_device, number.to(tl.float64), otherwise)


@triton.jit(do_not_specialize=["n", "n_sync", "maximize", "nesterov", "decoupled"])
def prepare_kernel(
    table, scalars, coefficients, sync, n, n_sync, grad_scale, found_inf, maximize, nesterov,
    decoupled, Prepare: tl.constexpr, COUPLED: tl.constexpr, ADAM: tl.constexpr,
    COUNTERS: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):
    """Coefficients of every tensor; and `sync`, of n_sync, begins at 0.

    A program takes BLOCK tensors. With COUNTERS Adam's step counts lie on the device, and are
    counted up; else they are in the scalars.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sync + at, tl.zeros([BLOCK], tl.int32), mask=at < n_sync)
    mask = at < tl.where(tl.load(found_inf) == 0, n, 0)
    s = scalars + at.to(tl.int64) * N_SCALARS
    c = coefficients + at.to(tl.int64) * N_COEFFICIENTS
    row = table + at.to(tl.int64) * TABLE
    lr = _there(row + LR_THERE, tl.load(s + LR, mask=mask, other=0.0), mask)
    lam = _there(row + LAM_THERE, 1.0 + 0 * lr, mask)
    decay = tl.load(s + WEIGHT_DECAY, mask=mask, other=0.0)
    beta1 = tl.load(s + BETA1, mask=mask, other=0.0)
    beta2 = tl.load(s + BETA2, mask=mask, other=0.0)
    elementwise = lam * tl.load(s + ELEMENTWISE, mask=mask, other=0.0)
    group = lam * tl.load(s + GROUP, mask=mask, other=0.0)

    unit = tl.where(maximize != 0, -1.0, 1.0) / tl.load(grad_scale).to(tl.float64)
    tl.store(c + C_UNIT, (unit + 0 * lr).to(A), mask=mask)
    apart = decoupled != 0
    tl.store(c + C_DECAY, tl.where(apart, 0.0, decay).to(A), mask=mask)
    tl.store(c + C_KEEP, tl.where(apart, 1 - lr * decay, 1.0).to(A), mask=mask)
    momentum = tl.load(s + MOMENTUM, mask=mask, other=0.0)
    dampening = tl.load(s + DAMPENING, mask=mask, other=0.0)
    tl.store(c + C_MOMENTUM, momentum.to(A), mask=mask)
    tl.store(c + C_GAIN, (1 - dampening).to(A), mask=mask)
    tl.store(c + C_NESTEROV, (nesterov + 0 * lr).to(A), mask=mask)
    size = lr
    if ADAM:
        if COUNTERS:
            counter = tl.load(row + COUNTER, mask=mask, other=0).to(tl.pointer_type(tl.float32))
            step = tl.load(counter, mask=mask, other=0.0) + 1
            tl.store(counter, step, mask=mask)
        else:
            step = tl.load(s + STEP, mask=mask, other=1.0)
        size = lr / (1 - _power(beta1, step))
        inverse_root = 1 / tl.sqrt(1 - _power(beta2, step))
        tl.store(c + C_INVERSE_ROOT, inverse_root.to(A), mask=mask)
        tl.store(c + C_BETA1, beta1.to(A), mask=mask)
        tl.store(c + C_RATE1, (1 - beta1).to(A), mask=mask)
        tl.store(c + C_BETA2, beta2.to(A), mask=mask)
        tl.store(c + C_RATE2, (1 - beta2).to(A), mask=mask)
        tl.store(c + C_EPS, tl.load(s + EPS, mask=mask, other=0.0).to(A), mask=mask)
    tl.store(c + C_LR, size.to(A), mask=mask)
    tl.store(c + C_GRAD_LR, (size * unit).to(A), mask=mask)
    tl.store(c + C_GRAD_DECAY, (decay / unit).to(A), mask=mask)

    # Squares are summed in units of the threshold: where the sum over- or underflows, the factor is
    # 1 or 0 as it should be.
    threshold = lr * group
    widest: tl.constexpr = 1e30 if A == tl.float32 else 1e300
    scale = threshold
    weight = group
    if COUPLED:  # what the penalty measures is of the size of its own threshold
        scale = tl.maximum(threshold, lr * elementwise)
        weight = tl.maximum(group, elementwise)
    norm_unit = tl.minimum(tl.maximum(1 / tl.maximum(scale, 1e-300), 1 / widest), widest)
    norm_unit = tl.where(weight > 0, norm_unit, 0.0)
    tl.store(c + C_THRESHOLD, (threshold * norm_unit).to(A), mask=mask)
    tl.store(c + C_NORM_UNIT, norm_unit.to(A), mask=mask)
    tl.store(c + C_ZERO, tl.where(elementwise + group > 0, 0.0, -0.0).to(A), mask=mask)
    cut = Prepare(lr, elementwise, tl.load(s + SHAPE, mask=mask, other=1.0), c, mask, A)
    tl.store(c + C_CUT, round_down(tl.where(elementwise > 0, cut, -1.0), A), mask=mask)
