"""The Triton kernels' penalties: the float32-safe forms of csrc/penalties.h, in Triton's Python.

Adding one is two functions, or one where a prox here fits, and a row of `PENALTIES`.
"""

# Triton reads these functions' source: names in upper case are constants of the compiler.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends.triton_math import (
    C_NORM_UNIT,
    C_OFFSET,
    C_SHAPE,
    C_TAU,
    C_THRESHOLD,
    round_down,
)

# `prepare` stores a tensor's coefficients from (step, weight, a) in float64 and returns the largest
# |v| that goes to 0; `prox` takes any larger |v| with them to |w|, or to -|w| where rounding took
# that below 0. NaN in, NaN out.


@triton.jit
def _store_in_two(x, address, mask, A: tl.constexpr):
    """Store x >= 0 as two A, the larger one rounded down."""
    high = round_down(x, A)
    tl.store(address, high, mask=mask)
    # infinity - infinity would be NaN
    tl.store(address + 1, tl.minimum(x - high.to(tl.float64), 3e38).to(A), mask=mask)


@triton.jit
def _unit_of(x):
    """2^-e for the exponent e of x > 0."""
    exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return ((2046 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _quotient(x, y, T: tl.constexpr):
    """x / y, correctly rounded; the plain one is so in float64 alone."""
    if T == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _prepare_none(step, weight, a, c, mask, A: tl.constexpr):
    return -1.0 + 0 * step


@triton.jit
def _prepare_l1(step, weight, a, c, mask, A: tl.constexpr):
    _store_in_two(step * weight, c + C_SHAPE, mask, A)
    return step * weight


@triton.jit
def _l1(size, c, T: tl.constexpr):
    """max(0, |v| - tau), with tau in two parts."""
    return (size - tl.load(c + C_SHAPE)) - tl.load(c + C_SHAPE + 1)


# Transformed l1, by the root of prox_math.h: with y = a + |v| and D = tau a (a + 1) the prox is
# |v| - D P / y^2, where P = 1 / r^2 and r is the largest root of r^3 - r^2 + (4/27) q = 0 for
# q = (27/4) D / y^3. Lengths are in a unit, a power of two, in which y is about 1 where |v| begins
# to live: no power of y leaves float32's range, for any a and tau.


# What `python csrc/prox_constants.py --triton` prints.


@triton.jit
def _steep_10(x):
    """P - 1 = x * polynomial(x), x = 1 - u, for q <= 1: relative error 1.1e-08."""
    p = x * 0.04648931634300319 + -0.16115764230278867
    p = x * p + 0.27617415935046863
    p = x * p + -0.24281597083396647
    p = x * p + 0.16815378026226185
    p = x * p + -0.008771209613736907
    p = x * p + 0.09657491815415106
    p = x * p + 0.16443365909525517
    p = x * p + 0.31832810285811125
    p = x * p + 0.5925908615963228
    return p


@triton.jit
def _z_7(x):
    """z - 1 = x * polynomial(x), x = 1 - u, for q <= 1: relative error 1.1e-08."""
    p = x * -0.000559570097110104 + 0.0009313373140349891
    p = x * p + -0.0015926046476784248
    p = x * p + -0.0007772855281630176
    p = x * p + -0.004423204568619407
    p = x * p + -0.016441318598217125
    p = x * p + -0.11111194051270547
    return p


@triton.jit
def _p_7(u):
    """P = polynomial(u), for q <= 1: relative error 2.3e-06."""
    p = u * -0.147808541020226 + 0.7331323291178772
    p = u * p + -1.6678029779829482
    p = u * p + 2.4282576530087248
    p = u * p + -2.7371359144565255
    p = u * p + 2.739012784244726
    p = u * p + -2.5976576600077466
    p = u * p + 2.25
    return p


@triton.jit
def _p_5(u):
    """P = polynomial(u), for q <= 1: relative error 8.1e-05."""
    p = u * -0.3100508033999534 + 1.2206049895155198
    p = u * p + -2.199222321583115
    p = u * p + 2.628573763092294
    p = u * p + -2.589986181526069
    p = u * p + 2.25
    return p

@triton.jit
def _prepare_tl1(step, weight, a, c, mask, A: tl.constexpr):
    tau = step * weight
    a = tl.minimum(tl.maximum(a, 1e-100), 1e100)  # beyond, TL1 is l0 or l1 to all digits
    continuous = 2 * (tau / a * (1 + 1 / a)) <= 1
    jump = tl.sqrt(2 * tau) * tl.sqrt(a + 1) - a / 2
    cut = tl.where(continuous, tau * (1 + 1 / a), jump)
    unit = _unit_of(a + cut)
    scaled = a * unit
    d = tau * scaled * ((a + 1) * unit)
    # What rounding takes from a, beside y at the cut, where it matters most: d and k allow for it.
    lost = (scaled - scaled.to(A).to(tl.float64)) / (scaled + cut * unit)
    tl.store(c + C_SHAPE, unit.to(A), mask=mask)
    tl.store(c + C_SHAPE + 1, scaled.to(A), mask=mask)
    tl.store(c + C_SHAPE + 2, (d * (1 - 2 * lost)).to(A), mask=mask)
    tl.store(c + C_SHAPE + 3, (6.75 * d * unit * (1 - 3 * lost)).to(A), mask=mask)
    # Where w is |v| to all digits; y must not overflow.
    tl.store(c + C_SHAPE + 4, tl.minimum(1e30 / unit, 1e38).to(A), mask=mask)
    # For 16 bits, the unit in which q = 1 / y^3. An a far from the cut is l0's or l1's there.
    near = tl.minimum(tl.maximum(a, 1e-6 * cut), 1e8 * cut)
    d = near * tl.where(continuous, cut * near, tau * (a + 1))
    cube = 6.75 * tl.maximum(d, 1e-300)
    unit = tl.where(d > 0, 1 / _cube_root(cube, tl.exp2(tl.log2(cube) / 3)), 1.0)
    tl.store(c + C_SHAPE + 5, unit.to(A), mask=mask)
    tl.store(c + C_SHAPE + 6, tl.where(d > 0, near * unit, 1.0).to(A), mask=mask)
    tl.store(c + C_SHAPE + 7, (d * unit * unit).to(A), mask=mask)
    return cut


@triton.jit
def _tl1(size, c, T: tl.constexpr):
    unit = tl.load(c + C_SHAPE)
    a = tl.load(c + C_SHAPE + 1)
    d = tl.load(c + C_SHAPE + 2)
    k = tl.load(c + C_SHAPE + 3)
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
        return size - quotient / (r * r)
    elif T == tl.float32:
        # A step of Newton's makes up for what rounding took from y and from 1 / y.
        within = tl.minimum(size, tl.load(c + C_SHAPE + 4))
        y = within * unit + a
        lost = tl.fma(within, unit, a - y)
        near = _reciprocal(y)
        inverse = tl.fma(near, tl.fma(-lost, near, tl.fma(-y, near, 1.0)), near)
        square = inverse * inverse
        x = 1 - tl.sqrt(tl.abs(tl.fma(-k * square, inverse, 1.0)))
        p = x * _steep_10(x)
        return tl.fma(-d * square, p, tl.fma(-d, square, size))
    else:
        # 16 bits are stored: much less is needed.
        inverse = _reciprocal(size * tl.load(c + C_SHAPE + 5) + tl.load(c + C_SHAPE + 6))
        square = inverse * inverse
        u = tl.sqrt(tl.abs(1 - square * inverse))
        if T == tl.float16:
            p = _p_7(u)
        else:
            p = _p_5(u)
        return size - tl.load(c + C_SHAPE + 7) * square * p


@triton.jit
def _reciprocal(y):
    """1 / y for y > 0 to about two units in the last place, without a division's slow path."""
    root = tl.rsqrt(y)
    return root * root


# Pieces: 0 up to the cut, then two straight pieces, then |v| itself.


@triton.jit
def _store_piece(slope, offset, end, address, mask, A: tl.constexpr):
    """A piece slope * (|v| - offset), up to |v| = end."""
    _store_in_two(offset, address, mask, A)
    tl.store(address + 2, slope.to(A), mask=mask)
    tl.store(address + 3, round_down(end, A), mask=mask)


@triton.jit
def _prepare_l0(step, weight, a, c, mask, A: tl.constexpr):
    none = 0 * step
    _store_piece(none, none, none, c + C_SHAPE, mask, A)
    _store_piece(none, none, none, c + C_SHAPE + 4, mask, A)
    return tl.sqrt(2 * step * weight)


@triton.jit
def _prepare_scad(step, weight, a, c, mask, A: tl.constexpr):
    tau = step * weight
    _store_piece(1 + 0 * step, tau, weight * (1 + step), c + C_SHAPE, mask, A)
    slope = (a - 1) / (a - 1 - step)
    _store_piece(slope, tau * (a / (a - 1)), a * weight, c + C_SHAPE + 4, mask, A)
    return tau


@triton.jit
def _prepare_mcp(step, weight, a, c, mask, A: tl.constexpr):
    none = 0 * step
    _store_piece(a / (a - step), step * weight, a * weight, c + C_SHAPE, mask, A)
    _store_piece(none, none, none, c + C_SHAPE + 4, mask, A)
    return step * weight


@triton.jit
def _prepare_capped_l1(step, weight, a, c, mask, A: tl.constexpr):
    tau, none = step * weight, 0 * step
    hard = a < tau / 2
    _store_piece(1 + none, tau, tl.where(hard, 0.0, a + tau / 2), c + C_SHAPE, mask, A)
    _store_piece(none, none, none, c + C_SHAPE + 4, mask, A)
    return tl.where(hard, tl.sqrt(2 * tau) * tl.sqrt(a), tau)


@triton.jit
def _pieces(size, c, T: tl.constexpr):
    p = c + C_SHAPE
    first = tl.load(p + 2) * ((size - tl.load(p)) - tl.load(p + 1))
    second = tl.load(p + 6) * ((size - tl.load(p + 4)) - tl.load(p + 5))
    return tl.where(size <= tl.load(p + 3), first, tl.where(size <= tl.load(p + 7), second, size))


# Log, by the root of penalties.h.


@triton.jit
def _log1p(x):
    """log(1 + x), without losing x to the 1."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.maximum(u - 1, 1e-300)))


@triton.jit
def _log_cut(k):
    """Where |v| begins to live, in units of 1 / a."""
    low, high = 1e-9 + 0 * k, 2 * k + 10
    x = high
    for _ in range(64):
        x = tl.sqrt(low) * tl.sqrt(high)
        alive = 2 * (_log1p(x) - x / (1 + x)) * k > x * x
        low, high = tl.where(alive, x, low), tl.where(alive, high, x)
    return tl.where(k <= 1, k, x + k / (1 + x))


@triton.jit
def _prepare_log(step, weight, a, c, mask, A: tl.constexpr):
    a = tl.minimum(tl.maximum(a, 1e-100), 1e100)  # beyond, it is l0 or l1 to all digits
    t = step * weight * (a / _log1p(a))
    cut = _log_cut(a * t) / a
    by = tl.minimum(1.0, 1 / a)
    unit = by * _unit_of(by * (1 + a * cut))
    tl.store(c + C_SHAPE, unit.to(A), mask=mask)
    tl.store(c + C_SHAPE + 1, (unit * a).to(A), mask=mask)
    tl.store(c + C_SHAPE + 2, (unit * 2 * tl.sqrt(a * t)).to(A), mask=mask)
    tl.store(c + C_SHAPE + 3, (unit * 2 * t).to(A), mask=mask)
    return cut


@triton.jit
def _log(size, c, T: tl.constexpr):
    k = tl.load(c + C_SHAPE + 2)
    p = tl.load(c + C_SHAPE) + tl.load(c + C_SHAPE + 1) * size
    below = p - k
    root = tl.sqrt(tl.where(below < 0, 0.0, below) * (p + k))
    return size - _quotient(tl.load(c + C_SHAPE + 3), p + root, T)


# Powers of |w|, by the roots of penalties.h.


# What `python csrc/prox_constants.py --triton-powers` prints.


@triton.jit
def _half_root(y):
    """r - 1 = y * polynomial(y), r^3 - r + k y = 0, for y <= 1: relative error 1.3e-05."""
    p = y * -0.023578462890342287 + 0.03141104163534152
    p = y * p + -0.03291777321452731
    p = y * p + -0.021834855898506676
    p = y * p + -0.1365730695943452
    return p


@triton.jit
def _two_thirds_root(y):
    """r - 1 = y * polynomial(y), r^4 - r + k y = 0, for y <= 1: relative error 1.2e-05."""
    p = y * -0.22731926404386635 + 0.6446670092739136
    p = y * p + -0.7554140573586747
    p = y * p + 0.42609713795514725
    p = y * p + -0.14380153456318767
    p = y * p + -0.01743123524741771
    p = y * p + -0.13308831399629664
    return p

@triton.jit
def _cube_root(x, start):
    """The cube root of x > 0, from one that is good to a few digits: Halley's step."""
    excess = start * start * start - x
    return start - start * excess / (2 * excess + 3 * x)


@triton.jit
def _store_power(threshold, k, power: tl.constexpr, c, mask, A: tl.constexpr):
    """The threshold and k, which makes up for the threshold's rounding."""
    stored = tl.minimum(round_down(threshold, A).to(tl.float64), 3e38)
    lost = tl.where(stored > 0, threshold / tl.maximum(stored, 1e-300) - 1, 0.0)
    tl.store(c + C_SHAPE, stored.to(A), mask=mask)
    tl.store(c + C_SHAPE + 1, (k * (1 + power * tl.minimum(lost, 1e-6))).to(A), mask=mask)


@triton.jit
def _prepare_l_half(step, weight, a, c, mask, A: tl.constexpr):
    tau = tl.maximum(step * weight, 1e-300)
    root = _cube_root(tau, tl.exp2(tl.log2(tau) / 3))
    threshold = 1.5 * root * root
    _store_power(threshold, 0.27216552697590868, 1.5, c, mask, A)  # 1 / (2 1.5^1.5)
    return threshold


@triton.jit
def _l_half(size, c, T: tl.constexpr):
    x = _quotient(tl.load(c + C_SHAPE), size, T)
    y = x * tl.sqrt(x)
    ky = tl.load(c + C_SHAPE + 1) * y
    r = 1 + y * _half_root(y)
    for _ in tl.static_range(2 if T == tl.float64 else 1):
        square = r * r
        r -= (r * (square - 1) + ky) / (3 * square - 1)
    return size * (r * r)


@triton.jit
def _prepare_l_two_thirds(step, weight, a, c, mask, A: tl.constexpr):
    root = tl.sqrt(step * weight / 1.5)
    threshold = 2 * root * tl.sqrt(root)
    _store_power(threshold, 0.39685026299204984, 1.3333333333333333, c, mask, A)  # 2^(-4/3)
    return threshold


@triton.jit
def _l_two_thirds(size, c, T: tl.constexpr):
    x = tl.maximum(_quotient(tl.load(c + C_SHAPE), size, T), 1e-30)
    y = x * _cube_root(x, tl.exp2(tl.log2(x) * 0.3333333333333333))
    ky = tl.load(c + C_SHAPE + 1) * y
    e = y * _two_thirds_root(y)  # r - 1, which has digits that r has not
    for _ in tl.static_range(2 if T == tl.float64 else 1):
        less = e * (e * (3 + e) + 3)  # r^3 - 1
        e -= (e * less + less + ky) / (4 * less + 3)
    return size * (e * (e * (3 + e) + 3) + 1)


# --- Penalties of whole groups, as in penalties.h. No weight has a threshold of its own; what is
# measured of a group (its sum of max(0, |v| - offset)^2 in units, its sum and largest of |v|) says
# what becomes of its weights:
#   |w| = factor * max(0, |v| - cut),   but for the first of the largest weights, which becomes
#   `kept` where that is not negative


@triton.jit
def shrink_factor(squares, c):
    """max(0, 1 - threshold / norm) of a group, from the sum of its squares."""
    norm = tl.sqrt(squares)
    threshold = tl.load(c + C_THRESHOLD)
    # `<=` first, so that a norm of 0 is never divided by, and a NaN stays NaN.
    factor = tl.where(norm <= threshold, 0.0, 1 - threshold / norm)
    return tl.where(tl.load(c + C_NORM_UNIT) > 0, factor, 1.0)


@triton.jit
def _store_tau(step, weight, c, mask, A: tl.constexpr):
    tau = tl.minimum(step * weight, 3e38)  # infinity * 0 would be NaN
    tl.store(c + C_TAU, tau.to(A), mask=mask)
    return tau


@triton.jit
def _prepare_cges(step, weight, a, c, mask, A: tl.constexpr):
    tau = _store_tau(step, weight, c, mask, A)
    tl.store(c + C_OFFSET, (0 * tau).to(A), mask=mask)
    return -1.0 + 0 * step


@triton.jit
def _cges(squares, total, largest, c):
    return shrink_factor(squares, c), tl.load(c + C_TAU) * total, -1 + 0 * total


@triton.jit
def _prepare_l1_minus_l2(step, weight, a, c, mask, A: tl.constexpr):
    tau = _store_tau(step, weight, c, mask, A)
    tl.store(c + C_OFFSET, tau.to(A), mask=mask)
    return -1.0 + 0 * step


@triton.jit
def _l1_minus_l2(squares, total, largest, c):
    tau = tl.load(c + C_TAU)
    unit = tl.load(c + C_NORM_UNIT)
    threshold = tl.load(c + C_THRESHOLD)
    norm = tl.sqrt(squares)
    grown = norm + tau * unit  # infinite where the squares overflow
    left = tl.where(grown <= threshold, 0.0, 1 - threshold / grown)
    scaled_up = 1 + tl.where(norm > 0, tau * unit / norm, 0.0)
    factor = tl.where(left == 0, 0.0, left * scaled_up)
    size = largest * unit
    kept = tl.where(size <= threshold, 0.0, (1 - threshold / size) * largest)
    kept = tl.where(squares == 0, tl.where(largest <= tau, kept, -1.0), -1.0)  # NaN is not 0
    kept = tl.where(unit > 0, kept, -1.0)
    factor = tl.where(unit > 0, tl.where(kept >= 0, 0.0, factor), 1.0)
    return factor, tau + 0 * total, kept


PENALTIES = {
    None: (_prepare_none, None, None),
    "l1": (_prepare_l1, _l1, None),
    "tl1": (_prepare_tl1, _tl1, None),
    "l0": (_prepare_l0, _pieces, None),
    "scad": (_prepare_scad, _pieces, None),
    "mcp": (_prepare_mcp, _pieces, None),
    "capped_l1": (_prepare_capped_l1, _pieces, None),
    "log": (_prepare_log, _log, None),
    "l_half": (_prepare_l_half, _l_half, None),
    "l_two_thirds": (_prepare_l_two_thirds, _l_two_thirds, None),
    "l1_minus_l2": (_prepare_l1_minus_l2, None, _l1_minus_l2),
    "cges": (_prepare_cges, None, _cges),
}
"""By the registry's name (tl1kernels/penalties.py): prepare, prox of single weights, and of a whole
group: what is measured of it -> factor, cut, kept."""
