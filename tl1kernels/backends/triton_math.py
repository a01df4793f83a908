"""The Triton kernels' maths: what they find in memory, update rules, penalties.

The float32-safe form of csrc/prox_math.h and the rules of csrc/update_rules.h, in Triton's Python.
Adding a penalty is two functions and a row of `PENALTIES`.
"""

# Triton reads these functions' source: names in upper case are constants of the compiler.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# --- Memory. The table, int64, a row a tensor: addresses, then the view (Schedule.layout).
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)  # up to three
COPY = tl.constexpr(5)
COUNTER = tl.constexpr(6)  # Adam's `step`, lr, and lam where they lie on the device, else 0
LR_THERE = tl.constexpr(7)
LAM_THERE = tl.constexpr(8)
OUTER = tl.constexpr(9)
GROUPS = tl.constexpr(10)
INNER = tl.constexpr(11)
PIECES = tl.constexpr(12)
PARTIALS = tl.constexpr(13)
TEAMS = tl.constexpr(14)
FACTORS = tl.constexpr(15)
TABLE = tl.constexpr(16)

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
    high = round_down(tau, A)
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
def round_down(x, A: tl.constexpr):
    """The largest A <= x, for x >= 0."""
    near = x.to(A)
    if A == tl.float32:
        bits = near.to(tl.int32, bitcast=True)
        near = tl.where(near.to(tl.float64) > x, bits - 1, bits).to(tl.float32, bitcast=True)
    return near
