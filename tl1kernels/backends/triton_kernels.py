"""The Triton kernels: update rule, threshold and group shrinkage while a tile is in registers.

Read it from the top: what the kernels find in memory, update rules, penalties, tiles, kernels.
Which tile serves which view is `triton_schedule.py`'s decision, and there is the table of it.

Whatever a scheduler may change is a number in memory, never a constant of a kernel. A small kernel
first turns every tensor's numbers into coefficients, in float64, as prox_math.h and update_rules.h
do; the others read those. Update rules and penalties are functions passed as constants: a kernel
is compiled for one of each, one storage type `T`, one arithmetic type `A` (that of the state).
"""

# Triton reads these functions' source: names in upper case are constants of the compiler.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# --- Memory. The table, int64, a row a tensor: addresses, then the view (triton_schedule.LAYOUT).
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)  # up to three
COUNTER = tl.constexpr(5)  # Adam's `step`, lr, and lam where they lie on the device, else 0
LR_THERE = tl.constexpr(6)
LAM_THERE = tl.constexpr(7)
OUTER = tl.constexpr(8)
GROUPS = tl.constexpr(9)
INNER = tl.constexpr(10)
PIECES = tl.constexpr(11)
PARTIALS = tl.constexpr(12)
TEAMS = tl.constexpr(13)
FACTORS = tl.constexpr(14)
TABLE = tl.constexpr(15)

# The work, int32, a row a program: index of the tensor, kind, then of a resident tile its index, of
# others the index of its team, and its own in that.
ITEM = tl.constexpr(4)

# A tensor's scalars as the optimizer has them, float64, a row a tensor.
SCALARS = (
    *("lr", "weight_decay", "momentum", "dampening", "beta1", "beta2", "eps"),
    *("elementwise", "group", "a", "step"),
)
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
DAMPENING = tl.constexpr(3)
BETA1 = tl.constexpr(4)
BETA2 = tl.constexpr(5)
EPS = tl.constexpr(6)
ELEMENTWISE = tl.constexpr(7)
GROUP = tl.constexpr(8)
SHAPE = tl.constexpr(9)
STEP = tl.constexpr(10)
N_SCALARS = tl.constexpr(11)

# What `prepare_kernel` makes of them, in the arithmetic type, a row a tensor.
C_UNIT = tl.constexpr(0)  # of the gradient: -1 to maximize, over the loss's scale
C_DECAY = tl.constexpr(1)  # weight decay that goes into the gradient
C_KEEP = tl.constexpr(2)  # factor of the weight before the update (decoupled decay)
C_LR = tl.constexpr(3)  # step size; for Adam, over the first moment's bias correction
C_MOMENTUM = tl.constexpr(4)
C_GAIN = tl.constexpr(5)  # of the gradient in the momentum buffer: 1 - dampening
C_NESTEROV = tl.constexpr(6)
C_BETA1 = tl.constexpr(7)
C_RATE1 = tl.constexpr(8)
C_BETA2 = tl.constexpr(9)
C_RATE2 = tl.constexpr(10)
C_INVERSE_ROOT = tl.constexpr(11)  # 1 / sqrt(the second moment's bias correction)
C_EPS = tl.constexpr(12)
C_THRESHOLD = tl.constexpr(13)  # of a group's norm, in units of
C_NORM_UNIT = tl.constexpr(14)  # about 1 / threshold; 0 where groups weigh nothing
C_ZERO = tl.constexpr(15)  # added to every result: 0.0 makes -0.0 the zero of a dead weight, and
# -0.0 changes no bit of a tensor without a regularizer
C_CUT = tl.constexpr(16)  # |v| <= cut goes to 0
C_SHAPE = tl.constexpr(17)  # the penalty's own, up to N_COEFFICIENTS
N_COEFFICIENTS = tl.constexpr(24)


# --- Update rules, torch.optim's: `advance` takes the state to its next values, and `apply` gives
# the updated weight for them: where the state has its next values, `apply` alone finds v again.


@triton.jit
def _gradient(p, g, c):
    g = tl.load(c + C_UNIT) * g
    decay = tl.load(c + C_DECAY)
    return tl.where(decay != 0, g + decay * p, g)  # 0 * inf would be NaN


@triton.jit
def _no_state(p, g, s0, s1, s2, c):
    return s0, s1, s2


@triton.jit
def _assign(p, g, s0, s1, s2, c):
    return g


@triton.jit
def _sgd(p, g, s0, s1, s2, c):
    return p - tl.load(c + C_LR) * _gradient(p, g, c)


@triton.jit
def _momentum_state(p, g, s0, s1, s2, c):
    g = _gradient(p, g, c)
    return tl.load(c + C_MOMENTUM) * s0 + tl.load(c + C_GAIN) * g, s1, s2


@triton.jit
def _momentum(p, g, s0, s1, s2, c):
    ahead = _gradient(p, g, c) + tl.load(c + C_MOMENTUM) * s0
    return p - tl.load(c + C_LR) * tl.where(tl.load(c + C_NESTEROV) != 0, ahead, s0)


@triton.jit
def _adam_state(p, g, s0, s1, s2, c):
    g = _gradient(p, g, c)
    rate1 = tl.load(c + C_RATE1)
    # torch.lerp's two forms: the other one would cancel a large old mean against itself.
    far = g - tl.load(c + C_BETA1) * (g - s0)
    mean = tl.where(rate1 < 0.5, s0 + rate1 * (g - s0), far)
    return mean, tl.load(c + C_BETA2) * s1 + tl.load(c + C_RATE2) * g * g, s2


@triton.jit
def _adam_over(p, mean, second, c):
    root = tl.sqrt(second) * tl.load(c + C_INVERSE_ROOT) + tl.load(c + C_EPS)
    return tl.load(c + C_KEEP) * p - tl.load(c + C_LR) * (mean / root)


@triton.jit
def _adam(p, g, s0, s1, s2, c):
    return _adam_over(p, s0, s1, c)


@triton.jit
def _amsgrad_state(p, g, s0, s1, s2, c):
    s0, s1, s2 = _adam_state(p, g, s0, s1, s2, c)
    return s0, s1, tl.maximum(s1, s2, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amsgrad(p, g, s0, s1, s2, c):
    return _adam_over(p, s0, s2, c)


RULES = {
    "assign": (_no_state, _assign),
    "sgd": (_no_state, _sgd),
    "sgd_momentum": (_momentum_state, _momentum),
    "adam": (_adam_state, _adam),
    "adam_amsgrad": (_amsgrad_state, _amsgrad),
}
"""By the name of csrc/update_rules.h: advance, apply."""


# --- Penalties: `prepare` stores a tensor's coefficients from (step, weight, a) in float64 and
# returns the largest |v| that goes to 0; `prox` takes any larger |v| to |w| >= 0 with them. NaN in,
# NaN out.


@triton.jit
def _prepare_none(step, weight, a, c, mask, A: tl.constexpr):
    return -1.0 + 0 * step


@triton.jit
def _prepare_l1(step, weight, a, c, mask, A: tl.constexpr):
    tau = step * weight
    high = _round_down(tau, A)
    tl.store(c + C_SHAPE, high, mask=mask)
    tl.store(c + C_SHAPE + 1, tl.minimum(tau - high.to(tl.float64), 3e38).to(A), mask=mask)
    return tau


@triton.jit
def _l1(size, c, T: tl.constexpr):
    """max(0, |v| - tau), with tau in two parts."""
    return (size - tl.load(c + C_SHAPE)) - tl.load(c + C_SHAPE + 1)


# Transformed l1, by the root of prox_math.h: with y = a + |v| and D = tau a (a + 1) the prox is
# |v| - D P / y^2, where P = 1 / r^2 and r is the largest root of r^3 - r^2 + (4/27) q = 0 for
# q = (27/4) D / y^3. Lengths are in a unit, a power of two, in which y is about 1 where |v| begins
# to live: no power of y leaves float32's range, for any a and tau.
# The constants are what `python csrc/tl1_constants.py --triton` prints.


@triton.jit
def _steep_10(x):
    """P - 1 = x * polynomial(x), x = 1 - u, for q <= 1: relative error 1.1e-08."""
    y = x * 0.04648931634300319 + -0.16115764230278867
    y = x * y + 0.27617415935046863
    y = x * y + -0.24281597083396647
    y = x * y + 0.16815378026226185
    y = x * y + -0.008771209613736907
    y = x * y + 0.09657491815415106
    y = x * y + 0.16443365909525517
    y = x * y + 0.31832810285811125
    y = x * y + 0.5925908615963228
    return y


@triton.jit
def _z_7(x):
    """z - 1 = x * polynomial(x), x = 1 - u, for q <= 1: relative error 1.1e-08."""
    y = x * -0.000559570097110104 + 0.0009313373140349891
    y = x * y + -0.0015926046476784248
    y = x * y + -0.0007772855281630176
    y = x * y + -0.004423204568619407
    y = x * y + -0.016441318598217125
    y = x * y + -0.11111194051270547
    return y


@triton.jit
def _p_7(u):
    """P = polynomial(u), for q <= 1: relative error 2.3e-06."""
    y = u * -0.147808541020226 + 0.7331323291178772
    y = u * y + -1.6678029779829482
    y = u * y + 2.4282576530087248
    y = u * y + -2.7371359144565255
    y = u * y + 2.739012784244726
    y = u * y + -2.5976576600077466
    y = u * y + 2.25
    return y


@triton.jit
def _p_5(u):
    """P = polynomial(u), for q <= 1: relative error 8.1e-05."""
    y = u * -0.3100508033999534 + 1.2206049895155198
    y = u * y + -2.199222321583115
    y = u * y + 2.628573763092294
    y = u * y + -2.589986181526069
    y = u * y + 2.25
    return y


@triton.jit
def _prepare_tl1(step, weight, a, c, mask, A: tl.constexpr):
    tau = step * weight
    a = tl.minimum(tl.maximum(a, 1e-100), 1e100)  # beyond, TL1 is l0 or l1 to all digits
    continuous = 2 * (tau / a * (1 + 1 / a)) <= 1
    jump = tl.sqrt(2 * tau) * tl.sqrt(a + 1) - a / 2
    cut = tl.where(continuous, tau * (1 + 1 / a), jump)
    # 2^-e for the exponent e of a + cut.
    exponent = ((a + cut).to(tl.int64, bitcast=True) >> 52) & 0x7FF
    unit = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    d = tau * (a * unit) * ((a + 1) * unit)
    a = a * unit
    tl.store(c + C_SHAPE, unit.to(A), mask=mask)
    tl.store(c + C_SHAPE + 1, a.to(A), mask=mask)
    tl.store(c + C_SHAPE + 2, (a - a.to(A).to(tl.float64)).to(A), mask=mask)
    tl.store(c + C_SHAPE + 3, d.to(A), mask=mask)
    tl.store(c + C_SHAPE + 4, (6.75 * d * unit).to(A), mask=mask)
    # Where w is |v| to all digits; y^2 must not overflow.
    tl.store(c + C_SHAPE + 5, tl.minimum(1e18 / unit, 1e38).to(A), mask=mask)
    return cut


@triton.jit
def _tl1(size, c, T: tl.constexpr):
    unit = tl.load(c + C_SHAPE)
    a = tl.load(c + C_SHAPE + 1)
    d = tl.load(c + C_SHAPE + 3)
    k = tl.load(c + C_SHAPE + 4)
    if T == tl.float64:
        # z = cos(acos(u) / 3) gives r = (4 z^2 - 1) / 3; its cubic 4 z^3 - 3 z = u has no double
        # root, so a Newton step squares the polynomial's error.
        inverse = 1 / (size * unit + a)
        quotient = d * inverse * inverse
        u = tl.sqrt(tl.abs(1 - k * inverse * inverse * inverse))  # < 0 by rounding alone
        z = 1 + (1 - u) * _z_7(1 - u)
        square = 4 * z * z
        z -= (z * (square - 3) - u) / (3 * square - 3)
        r = (4 * z * z - 1) / 3
        w = size - quotient / (r * r)
    elif T == tl.float32:
        # 1 / y^2 becomes (1 + c) / y^2, where c carries what rounding took from y and from 1 / y,
        # and q becomes q (1 + 3/2 c).
        within = tl.minimum(size, tl.load(c + C_SHAPE + 5))
        y = within * unit + a
        lost = tl.fma(within, unit, a - y) + tl.load(c + C_SHAPE + 2)
        inverse = _reciprocal(y)
        correction = 2 * (tl.fma(-y, inverse, 1.0) - lost * inverse)
        square = inverse * inverse
        q = k * inverse * square
        x = 1 - tl.sqrt(tl.abs(tl.fma(-1.5 * q, correction, 1 - q)))
        p = x * _steep_10(x)
        excess = tl.fma(correction, 1 + p, p)
        w = tl.fma(-tl.fma(d, excess, d), square, size)
    else:
        # 16 bits are stored: much less is needed.
        inverse = _reciprocal(size * unit + a)
        square = inverse * inverse
        u = tl.sqrt(tl.abs(1 - k * inverse * square))
        if T == tl.float16:
            p = _p_7(u)
        else:
            p = _p_5(u)
        w = size - d * square * p
    return tl.maximum(w, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reciprocal(y):
    """1 / y for y > 0 to about two units in the last place, without a division's slow path."""
    root = tl.rsqrt(y)
    return root * root


PENALTIES = {
    None: (_prepare_none, None),
    "l1": (_prepare_l1, _l1),
    "tl1": (_prepare_tl1, _tl1),
}
"""By the registry's name (tl1kernels/penalties.py): prepare, prox."""


@triton.jit
def _round_down(x, A: tl.constexpr):
    """The largest A <= x, for x >= 0."""
    near = x.to(A)
    if A == tl.float32:
        bits = near.to(tl.int32, bitcast=True)
        near = tl.where(near.to(tl.float64) > x, bits - 1, bits).to(tl.float32, bitcast=True)
    return near


# --- Coefficients.


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
    decoupled, Prepare: tl.constexpr, ADAM: tl.constexpr, COUNTERS: tl.constexpr, A: tl.constexpr,
    BLOCK: tl.constexpr,
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

    # Squares are summed in units of the threshold: where the sum over- or underflows, the factor is
    # 1 or 0 as it should be.
    threshold = lr * group
    widest: tl.constexpr = 1e30 if A == tl.float32 else 1e300
    norm_unit = tl.minimum(tl.maximum(1 / tl.maximum(threshold, 1e-300), 1 / widest), widest)
    norm_unit = tl.where(group > 0, norm_unit, 0.0)
    tl.store(c + C_THRESHOLD, (threshold * norm_unit).to(A), mask=mask)
    tl.store(c + C_NORM_UNIT, norm_unit.to(A), mask=mask)
    tl.store(c + C_ZERO, tl.where(elementwise + group > 0, 0.0, -0.0).to(A), mask=mask)
    cut = Prepare(lr, elementwise, tl.load(s + SHAPE, mask=mask, other=1.0), c, mask, A)
    tl.store(c + C_CUT, _round_down(tl.where(elementwise > 0, cut, -1.0), A), mask=mask)


# --- A tile: some of a tensor's weights, at `base + offsets`, from memory to t = the threshold of
# the updated weight, and back when their factors are known.


@triton.jit
def _at(row, i: tl.constexpr, T: tl.constexpr, base, ALIGNED: tl.constexpr):
    """The address in column i of a table's row, `base` elements on."""
    start = tl.load(row + i).to(tl.pointer_type(T))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + base


@triton.jit
def _load(address, mask, other: tl.constexpr):
    """What is at the address; `other` where there is no weight: all comes to t = 0 there."""
    if mask is None:
        return tl.load(address)
    else:
        return tl.load(address, mask=mask, other=other)


@triton.jit
def _thresholded(
    row, c, base, offsets, mask, AGAIN: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
    Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
):
    """t; the state takes its next values, unless AGAIN says that it has them."""
    p = _load(_at(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0).to(A)
    g = _load(_at(row, GRAD, T, base, ALIGNED) + offsets, mask, 0.0).to(A)
    s0 = p
    s1 = p
    s2 = p
    if STATES > 0:
        s0 = _load(_at(row, STATE, A, base, ALIGNED) + offsets, mask, 0.0)
    if STATES > 1:
        s1 = _load(_at(row, STATE + 1, A, base, ALIGNED) + offsets, mask, 1.0)
    if STATES > 2:
        s2 = _load(_at(row, STATE + 2, A, base, ALIGNED) + offsets, mask, 1.0)
    if not AGAIN:
        s0, s1, s2 = Advance(p, g, s0, s1, s2, c)
        if STATES > 0:
            tl.store(_at(row, STATE, A, base, ALIGNED) + offsets, s0, mask=mask)
        if STATES > 1:
            tl.store(_at(row, STATE + 1, A, base, ALIGNED) + offsets, s1, mask=mask)
        if STATES > 2:
            tl.store(_at(row, STATE + 2, A, base, ALIGNED) + offsets, s2, mask=mask)
    v = Apply(p, g, s0, s1, s2, c)
    if Prox is not None:
        size = tl.abs(v)
        w = tl.where(size <= tl.load(c + C_CUT), 0.0, Prox(size, c, T))
        v = _with_sign_of(w, v, A)
    return v


@triton.jit
def _with_sign_of(size, x, A: tl.constexpr):
    if A == tl.float64:
        sign = x.to(tl.int64, bitcast=True) & (-9223372036854775807 - 1)
        return (size.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = x.to(tl.int32, bitcast=True) & (-2147483647 - 1)
        return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _squares(t, c):
    scaled = t * tl.load(c + C_NORM_UNIT)
    return scaled * scaled


@triton.jit
def _shrink_factor(squares, c):
    """max(0, 1 - threshold / norm) of a group, from the sum of its squares."""
    norm = tl.sqrt(squares)
    threshold = tl.load(c + C_THRESHOLD)
    # `<=` first, so that a norm of 0 is never divided by, and a NaN stays NaN.
    factor = tl.where(norm <= threshold, 0.0, 1 - threshold / norm)
    return tl.where(tl.load(c + C_NORM_UNIT) > 0, factor, 1.0)


@triton.jit
def _write(row, c, stream, base, offsets, mask, w, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Write the weights; with a stream of random numbers, bfloat16 is rounded stochastically."""
    address = _at(row, PARAM, T, base, ALIGNED) + offsets
    w += tl.load(c + C_ZERO)
    if stream is not None:
        # Up with a probability of what is cut off: 16 random bits are added to those.
        random = tl.randint(stream, base + offsets).to(tl.int32, bitcast=True) & 0xFFFF
        bits = (w.to(tl.int32, bitcast=True) + random) & -65536
        finite = tl.abs(w) < float("inf")
        w = tl.where(finite, bits, w.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    tl.store(address, w.to(T), mask=mask)


# --- Groups that a tile holds, and no groups.


@triton.jit
def _flat_tile(
    row, c, stream, tile, TILE: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
    Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
):
    """TILE neighbours without groups; ALIGNED ones are all there."""
    base = tile * TILE
    offsets = tl.arange(0, TILE)
    mask = None
    if not ALIGNED:
        mask = offsets < tl.load(row + GROUPS) - base
    t = _thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, A
    )
    _write(row, c, stream, base, offsets, mask, t, T, ALIGNED)


@triton.jit
def _rows_tile(
    row, c, stream, tile, TILE: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    T: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
):
    """Groups that are rows of at most WIDTH neighbours, as many as fill TILE."""
    ROWS: tl.constexpr = TILE // WIDTH if WIDTH < TILE else 1
    first = tile * ROWS
    width = tl.load(row + INNER)
    if ALIGNED:
        width = width // VECTOR * VECTOR  # tells the compiler what it is a multiple of
    base = first * width
    width = width.to(tl.int32)
    r = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (r < tl.load(row + GROUPS) - first) & (column < width)
    offsets = r * width + column
    t = _thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, A
    )
    factor = _shrink_factor(tl.sum(_squares(t, c), axis=1), c)
    _write(row, c, stream, base, offsets, mask, t * factor[:, None], T, ALIGNED)


@triton.jit(do_not_specialize=["seed"])
def resident_kernel(
    table, coefficients, work, found_inf, seed,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    T: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr, KINDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile a program: no groups, or groups that the tile holds. Each weight is read once.

    KINDS has a bit for each kind of tile in `work`, and only their code is there: bit 2 k for rows
    of up to 2^k, 2 * 31 for no groups; the next bit for the aligned ones.
    """
    item = work + tl.program_id(0).to(tl.int64) * ITEM
    row = table + tl.load(item).to(tl.int64) * TABLE
    c = coefficients + tl.load(item).to(tl.int64) * N_COEFFICIENTS
    stream = None
    if seed is not None:
        stream = seed + tl.load(item)
    kind = tl.load(item + 1)
    tile = tl.load(item + 2).to(tl.int64)
    if tl.load(found_inf) == 0:
        for aligned in tl.static_range(2):
            for k in tl.static_range(14):
                if (KINDS >> (2 * k + aligned)) & 1:
                    if kind == 2 * k + aligned:
                        _rows_tile(
                            row, c, stream, tile, TILE, 1 << k, aligned == 1,
                            Advance, Apply, STATES, Prox, T, A, VECTOR,
                        )
            if (KINDS >> (62 + aligned)) & 1:
                if kind == 62 + aligned:
                    _flat_tile(
                        row, c, stream, tile, TILE, aligned == 1,
                        Advance, Apply, STATES, Prox, T, A,
                    )


# --- Groups that no tile holds: gone through twice, by a team of tiles. Every tile adds its part
# of the sums of squares to memory; the one that comes last makes the team's factors of them,
# always in the same order; then the team's tiles are gone through again. Nobody waits for a tile
# that has not begun, for tiles are begun in the order of `work`. Between the passes t waits in the
# parameter itself. In 16 bits that would round twice: t is computed again from the parameter as it
# was and the state as it is.


@triton.jit
def _arrive(arrivals, pieces):
    """Whether this tile of the team is the last; it then sees what the others have written."""
    tl.debug_barrier()
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == pieces - 1


@triton.jit
def _announce(ready):
    tl.debug_barrier()
    tl.atomic_xchg(ready, 1, sem="release")


@triton.jit
def _wait(ready):
    while tl.atomic_add(ready, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()


@triton.jit
def _sum_of_neighbours(sums, n, LENGTH: tl.constexpr):
    """Each element's sum over the n of its group, where groups are runs of n neighbours."""
    group = tl.arange(0, LENGTH) // n.to(tl.int32)
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, sums[None, :], 0.0), axis=1)


@triton.jit
def _columns_tile(
    row, c, stream, team, piece, partials, factors, arrivals, ready,
    PHASE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, Advance: tl.constexpr, Apply: tl.constexpr,
    STATES: tl.constexpr, Prox: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Groups that are columns, or `inner` neighbours in each of many rows: ROWS x COLUMNS of them.

    A team is a panel of whole groups down all rows. PHASE 0 adds to the sums, 1 finishes, and 2
    does it all where ROWS are all the rows there are.
    """
    outer = tl.load(row + OUTER)
    inner = tl.load(row + INNER)
    pieces = tl.load(row + PIECES)
    row_length = tl.load(row + GROUPS) * inner
    span = COLUMNS // inner.to(tl.int32) * inner
    if ALIGNED:
        row_length = row_length // VECTOR * VECTOR
        span = COLUMNS  # inner is 1 then
    panels = tl.cdiv(row_length, span).to(tl.int32)
    block = (team // panels).to(tl.int64)
    left = (team % panels).to(tl.int64) * span
    above = piece.to(tl.int64) * ROWS
    base = (block * outer + above) * row_length + left
    r = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    inside = (column < span) & (column < row_length - left)
    mask = (r < outer - above) & inside[None, :]
    offsets = r * row_length + column[None, :]
    own_factors = factors + tl.load(row + FACTORS) + block * row_length + left + column
    arrivals += tl.load(row + TEAMS) + team
    ready += tl.load(row + TEAMS) + team
    if PHASE == 1:
        _wait(ready)
    if PHASE == 1 and T == A:
        t = _load(_at(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0)
    else:
        t = _thresholded(
            row, c, base, offsets, mask, PHASE == 1, ALIGNED, Advance, Apply, STATES, Prox, T, A
        )
    if PHASE == 0 and T == A:
        tl.store(_at(row, PARAM, T, base, ALIGNED) + offsets, t, mask=mask)
    if PHASE == 0:
        sums = tl.sum(_squares(t, c), axis=0)
        of_block = partials + tl.load(row + PARTIALS) + block * pieces * row_length + left + column
        tl.store(of_block + piece.to(tl.int64) * row_length, sums, mask=inside)
        if _arrive(arrivals, pieces):
            total = tl.zeros([COLUMNS], tl.float64)
            for i in range(0, pieces, ROWS):
                there = (r < pieces - i) & inside[None, :]
                some = tl.load(of_block[None, :] + (i + r) * row_length, mask=there, other=0.0)
                total += tl.sum(some.to(tl.float64), axis=0)
            if inner > 1:
                total = _sum_of_neighbours(total, inner, COLUMNS)
            tl.store(own_factors, _shrink_factor(total.to(A), c), mask=inside)
            _announce(ready)
    else:
        if PHASE == 1:
            factor = tl.load(own_factors, mask=inside, other=0.0)
        else:
            sums = tl.sum(_squares(t, c), axis=0)
            if inner > 1:
                sums = _sum_of_neighbours(sums, inner, COLUMNS)
            factor = _shrink_factor(sums, c)
        _write(row, c, stream, base, offsets, mask, t * factor[None, :], T, ALIGNED)


@triton.jit
def _long_tile(
    row, c, stream, team, piece, partials, factors, arrivals, ready,
    PHASE: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr,
    Prox: tl.constexpr, T: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
):
    """Groups of `outer` runs of many neighbours: TILE of one run. A team is a group."""
    outer = tl.load(row + OUTER)
    groups = tl.load(row + GROUPS)
    inner = tl.load(row + INNER)
    pieces = tl.load(row + PIECES)
    if ALIGNED:
        inner = inner // VECTOR * VECTOR
    in_run = pieces.to(tl.int32) // outer.to(tl.int32)
    block = (team // groups.to(tl.int32)).to(tl.int64)
    run = (block * outer + piece // in_run) * groups + team % groups.to(tl.int32)
    skipped = (piece % in_run).to(tl.int64) * TILE
    base = run * inner + skipped
    offsets = tl.arange(0, TILE)
    mask = offsets < inner - skipped
    arrivals += tl.load(row + TEAMS) + team
    ready += tl.load(row + TEAMS) + team
    factors += tl.load(row + FACTORS) + team
    if PHASE == 1:
        _wait(ready)
    if PHASE == 1 and T == A:
        t = _load(_at(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0)
    else:
        t = _thresholded(
            row, c, base, offsets, mask, PHASE == 1, ALIGNED, Advance, Apply, STATES, Prox, T, A
        )
    if PHASE == 0 and T == A:
        tl.store(_at(row, PARAM, T, base, ALIGNED) + offsets, t, mask=mask)
    if PHASE == 0:
        partials += tl.load(row + PARTIALS) + team.to(tl.int64) * pieces
        tl.store(partials + piece, tl.sum(_squares(t, c), axis=0))
        if _arrive(arrivals, pieces):
            total = tl.zeros([TILE], tl.float64)
            for i in range(0, pieces, TILE):
                there = offsets < pieces - i
                total += tl.load(partials + i + offsets, mask=there, other=0.0).to(tl.float64)
            tl.store(factors, _shrink_factor(tl.sum(total, axis=0).to(A), c))
            _announce(ready)
    else:
        _write(row, c, stream, base, offsets, mask, t * tl.load(factors), T, ALIGNED)


@triton.jit(do_not_specialize=["seed", "n_teams"])
def split_kernel(
    table, coefficients, work, found_inf, seed, partials, factors, sync, n_teams,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    T: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr, KINDS: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One tile a program, of groups that no tile holds, or of columns.

    KINDS has a bit for each kind of tile in `work`: bit 6 g + 2 p for geometry g (0 for columns,
    1 for long runs) and phase p, the next bit for the aligned ones. `sync`: a counter of programs,
    then for each team a counter of arrivals, then for each whether its factors are there.
    """
    ticket = tl.atomic_add(sync, 1, sem="relaxed")
    item = work + ticket.to(tl.int64) * ITEM
    row = table + tl.load(item).to(tl.int64) * TABLE
    c = coefficients + tl.load(item).to(tl.int64) * N_COEFFICIENTS
    stream = None
    if seed is not None:
        stream = seed + tl.load(item)
    kind = tl.load(item + 1)
    team = tl.load(item + 2)
    piece = tl.load(item + 3)
    arrivals = sync + 1
    ready = sync + 1 + n_teams
    if tl.load(found_inf) == 0:
        for phase in tl.static_range(3):
            for aligned in tl.static_range(2):
                if (KINDS >> (2 * phase + aligned)) & 1:
                    if kind == 2 * phase + aligned:
                        _columns_tile(
                            row, c, stream, team, piece, partials, factors, arrivals, ready,
                            phase, aligned == 1,
                            ROWS, COLUMNS, Advance, Apply, STATES, Prox, T, A, VECTOR,
                        )
                if (KINDS >> (6 + 2 * phase + aligned)) & 1:
                    if kind == 6 + 2 * phase + aligned:
                        _long_tile(
                            row, c, stream, team, piece, partials, factors, arrivals, ready,
                            phase, aligned == 1,
                            TILE, Advance, Apply, STATES, Prox, T, A, VECTOR,
                        )
