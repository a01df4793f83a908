"""Independent answers for checks: the definition of a prox by search, a step by the paper's words.

Nothing here shares code with the backends: penalties are written again, in mpmath; groups are
loops over index tuples; update rules are torch.optim's. `verify` and the tests call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import mpmath
import numpy as np
from mpmath import mpf

DIGITS = 44


@dataclass(frozen=True)
class Oracle:
    """What is known of a penalty, written again from its source, in mpmath.

    Attributes:
        value: (w, weight, a) -> the weighted penalty of one weight.
        published: (|v|, step, weight, a) -> |w|, the closed form.
        kinks: (step, weight, a) -> about the |v| where the prox is not smooth, the first of them
            where |v| begins to live: where tests look closely.
        condition: (|v|, step, weight, a) -> by how much rounding is magnified there, about.
    """

    value: Callable[[mpf, mpf, mpf], mpf]
    published: Callable[[mpf, mpf, mpf, mpf], mpf]
    kinks: Callable[[float, float, float], tuple[float, ...]]
    condition: Callable[[float, float, float, float], float] = lambda v, step, weight, a: 1.0


def _tl1_threshold(tau: mpf, a: mpf) -> mpf:
    if tau <= a**2 / (2 * (a + 1)):
        return tau * (a + 1) / a
    return mpmath.sqrt(2 * tau * (a + 1)) - a / 2


def _tl1_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Ma et al. 2019, eq. 11. It cancels: a = 100, tau = 1e-6 leaves float32 no digit."""
    tau = step * weight
    if v <= _tl1_threshold(tau, a):
        return mpf(0)
    phi = mpmath.acos(1 - 27 * tau * a * (a + 1) / (2 * (a + v) ** 3))
    return 2 * (a + v) * mpmath.cos(phi / 3) / 3 - 2 * a / 3 + v / 3


def _tl1_condition(v: float, step: float, weight: float, a: float) -> float:
    """Return 1 / sqrt(1 - q), large at the cubic's double root; for q > 1 the prox is 0."""
    q = 6.75 * step * weight * (a + 1) / (a + v) * a / (a + v) / (a + v)
    return 1.0 if q > 1 else 1 / math.sqrt(max(1 - q, 1e-30))


def _scad(w: mpf, weight: mpf, a: mpf) -> mpf:
    if abs(w) <= weight:
        return weight * abs(w)
    if abs(w) <= a * weight:
        return (a * weight * abs(w) - (w**2 + weight**2) / 2) / (a - 1)
    return weight**2 * (a + 1) / 2


def _scad_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Fan & Li 2001, for any step size."""
    if v <= weight * (1 + step):
        return max(v - step * weight, mpf(0))
    if v <= a * weight:
        return ((a - 1) * v - step * a * weight) / (a - 1 - step)
    return v


def _scad_condition(v: float, step: float, weight: float, a: float) -> float:
    return (a - 1) / (a - 1 - step) if weight * (1 + step) < v <= a * weight else 1.0


def _mcp(w: mpf, weight: mpf, a: mpf) -> mpf:
    return weight * abs(w) - w**2 / (2 * a) if abs(w) <= a * weight else a * weight**2 / 2


def _mcp_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Zhang 2010; the firm shrinkage of Gao & Bruce 1997."""
    if v <= a * weight:
        return max(v - step * weight, mpf(0)) / (1 - step / a)
    return v


def _mcp_condition(v: float, step: float, weight: float, a: float) -> float:
    return a / (a - step) if step * weight < v <= a * weight else 1.0


def _capped_l1_kinks(step: float, weight: float, a: float) -> tuple[float, ...]:
    tau = step * weight
    return (math.sqrt(2 * tau * a),) if a < tau / 2 else (tau, a + tau / 2)


def _capped_l1_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Gong et al. 2013 (GIST): the better of the two parts' own solutions."""
    outside, inside = max(v, a), min(a, max(mpf(0), v - step * weight))
    costs = [(w - v) ** 2 / 2 + step * weight * min(w, a) for w in (inside, outside)]
    return inside if costs[0] <= costs[1] else outside


def _log_roots(v: mpf, tau: mpf, a: mpf) -> tuple[mpf, mpf]:
    """Return the larger stationary point, not below 0, and what is under its root."""
    inside = (v + 1 / a) ** 2 - 4 * tau / mpmath.log1p(a)
    if inside < 0:
        return mpf(0), inside
    return max((v - 1 / a + mpmath.sqrt(inside)) / 2, mpf(0)), inside


def _log_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Gong et al. 2013: a root of the quadratic, if it is better than 0."""
    w, _ = _log_roots(v, step * weight, a)
    scale = step * weight / mpmath.log1p(a)
    return w if (w - v) ** 2 / 2 + scale * mpmath.log1p(a * w) < v**2 / 2 else mpf(0)


def _log_kinks(step: float, weight: float, a: float) -> tuple[float, ...]:
    with mpmath.workdps(DIGITS):
        tau, scale = mpf(step) * mpf(weight), mpf(step) * mpf(weight) / mpmath.log1p(a)
        low, high = mpf(0), a * scale  # the slope at 0 keeps all beyond alive
        if a * a * scale > 1:
            low = 2 * mpmath.sqrt(scale) - mpf(1) / a
            for _ in range(60):
                middle = (low + high) / 2
                alive = _log_published(middle, tau, mpf(1), mpf(a)) > 0
                low, high = (low, middle) if alive else (middle, high)
        return (float(high),)


def _log_condition(v: float, step: float, weight: float, a: float) -> float:
    _, inside = _log_roots(mpf(v), mpf(step) * mpf(weight), mpf(a))
    return 1.0 if inside < 0 else float((v + 1 / mpf(a)) / mpmath.sqrt(max(inside, 1e-300)))


def _l_half_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Xu et al. 2012, whose lambda is 2 step weight: no factor 1/2 at the square."""
    scale = 2 * step * weight
    if v <= mpmath.cbrt(54) / 4 * mpmath.cbrt(scale) ** 2:
        return mpf(0)
    phi = mpmath.acos(scale / 8 * (v / 3) ** mpf("-1.5"))
    return 2 * v / 3 * (1 + mpmath.cos(2 * mpmath.pi / 3 - 2 * phi / 3))


def _l_two_thirds_published(v: mpf, step: mpf, weight: mpf, a: mpf) -> mpf:
    """Cao, Sun & Xu 2013, whose lambda is 2 step weight."""
    scale = 2 * step * weight
    if v <= mpf(2) / 3 * mpmath.root(3 * scale**3, 4):
        return mpf(0)
    if scale == 0:
        return v
    phi = mpmath.acosh(27 * v**2 / 16 * scale ** mpf("-1.5"))
    length = 2 / mpmath.sqrt(3) * mpmath.root(scale, 4) * mpmath.sqrt(mpmath.cosh(phi / 3))
    return ((length + mpmath.sqrt(2 * v / length - length**2)) / 2) ** 3


ORACLES: dict[str, Oracle] = {
    "l1": Oracle(
        value=lambda w, weight, a: weight * abs(w),
        published=lambda v, step, weight, a: max(v - step * weight, mpf(0)),
        kinks=lambda step, weight, a: (step * weight,),
    ),
    "tl1": Oracle(
        value=lambda w, weight, a: weight * (a + 1) * abs(w) / (a + abs(w)),
        published=_tl1_published,
        kinks=lambda step, weight, a: (float(_tl1_threshold(mpf(step * weight), mpf(a))),),
        condition=_tl1_condition,
    ),
    "l0": Oracle(
        value=lambda w, weight, a: weight if w else mpf(0),
        published=lambda v, step, weight, a: v if v**2 > 2 * step * weight else mpf(0),
        kinks=lambda step, weight, a: (math.sqrt(2 * step * weight),),
    ),
    "scad": Oracle(
        value=_scad,
        published=_scad_published,
        kinks=lambda step, weight, a: (step * weight, weight * (1 + step), a * weight),
        condition=_scad_condition,
    ),
    "mcp": Oracle(
        value=_mcp,
        published=_mcp_published,
        kinks=lambda step, weight, a: (step * weight, a * weight),
        condition=_mcp_condition,
    ),
    "log": Oracle(
        value=lambda w, weight, a: weight * mpmath.log1p(a * abs(w)) / mpmath.log1p(a),
        published=_log_published,
        kinks=_log_kinks,
        condition=_log_condition,
    ),
    "capped_l1": Oracle(
        value=lambda w, weight, a: weight * min(abs(w), a),
        published=_capped_l1_published,
        kinks=_capped_l1_kinks,
    ),
    "l_half": Oracle(
        value=lambda w, weight, a: weight * mpmath.sqrt(abs(w)),
        published=_l_half_published,
        kinks=lambda step, weight, a: (1.5 * (step * weight) ** (2 / 3),),
    ),
    "l_two_thirds": Oracle(
        value=lambda w, weight, a: weight * mpmath.cbrt(abs(w)) ** 2,
        published=_l_two_thirds_published,
        kinks=lambda step, weight, a: (2 * (step * weight / 1.5) ** 0.75,),
    ),
}
"""By name of the penalty; the tests hold it against the registry."""


@dataclass(frozen=True)
class Coupled:
    """The same of a penalty of whole groups, in float64 or better.

    Attributes:
        value: (w_g, weight) -> the weighted penalty of one group.
        published: (v_g, step, weight, group) -> w_g after the weight `group` of its l2 norm too.
        condition: (v_g, step * weight) -> by how much rounding is magnified, about.
        undecided: (v_g, step * weight, error) -> whether the prox may jump within that error of
            v_g.
    """

    value: Callable[[np.ndarray, float], float]
    published: Callable[[np.ndarray, float, float, float], np.ndarray]
    condition: Callable[[np.ndarray, float], float] = lambda v, tau: 1.0
    undecided: Callable[[np.ndarray, float, float], bool] = lambda v, tau, error: False


def _norm(w: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(w, dtype=np.longdouble))))


def _shrunk(w: np.ndarray, tau: float) -> np.ndarray:
    norm = _norm(w)
    return w * max(0.0, 1 - tau / norm) if norm > 0 else w


def _l1_minus_l2_published(v: np.ndarray, step: float, weight: float, group: float) -> np.ndarray:
    """Lou & Yan 2018 with alpha = 1, case by case."""
    tau, largest = step * weight, int(np.argmax(np.abs(v)))
    if abs(v[largest]) > tau:
        z = np.sign(v) * np.maximum(np.abs(v) - tau, 0)
        w = z * ((_norm(z) + tau) / _norm(z))
    else:
        w = np.zeros_like(v)
        w[largest] = v[largest]
    return _shrunk(w, step * group)


def _l1_minus_l2_condition(v: np.ndarray, tau: float) -> float:
    """Return 1 + tau / ||z||_2: a short z is scaled up by that."""
    norm = _norm(np.maximum(np.abs(v) - tau, 0))
    return 1 + tau / norm if norm > 0 else 1.0


def _l1_minus_l2_undecided(v: np.ndarray, tau: float, error: float) -> bool:
    """Return whether two weights could each be the largest, which is kept alone."""
    size = np.sort(np.abs(v))
    return len(v) > 1 and size[-1] <= tau + error and size[-1] - size[-2] <= 2 * error


def _exclusive_published(v: np.ndarray, step: float, weight: float, group: float) -> np.ndarray:
    """Kowalski 2009: a soft threshold at tau ||w||_1, found by bisection."""
    tau, size = step * weight, np.abs(v).astype(np.longdouble)
    low, high = np.longdouble(0), tau * size.sum()
    for _ in range(100):
        middle = (low + high) / 2
        above = tau * np.maximum(size - middle, 0).sum() > middle
        low, high = (middle, high) if above else (low, middle)
    return _shrunk(np.sign(v) * np.maximum(size - high, 0).astype(np.float64), step * group)


def _cges_published(v: np.ndarray, step: float, weight: float, group: float) -> np.ndarray:
    """Yoon & Hwang 2017: the group lasso, then the exclusive step."""
    w = _shrunk(v, step * group)
    return np.sign(w) * np.maximum(np.abs(w) - step * weight * np.abs(w).sum(), 0)


COUPLED: dict[str, Coupled] = {
    "l1_minus_l2": Coupled(
        value=lambda w, weight: weight * (float(np.abs(w).sum()) - _norm(w)),
        published=_l1_minus_l2_published,
        condition=_l1_minus_l2_condition,
        undecided=_l1_minus_l2_undecided,
    ),
    "exclusive": Coupled(
        value=lambda w, weight: weight / 2 * float(np.abs(w).sum()) ** 2,
        published=_exclusive_published,
    ),
    "cges": Coupled(
        value=lambda w, weight: weight / 2 * float(np.abs(w).sum()) ** 2,
        published=_cges_published,
    ),
}
"""By name, as `ORACLES`."""


def prox_by_definition(v: float, step: float, weight: float, penalty: str, a: float) -> mpf:
    """Return argmin over w of (w - v)^2 / 2 + step * penalty(w), to about 20 digits.

    A search on a grid over [0, |v|] brackets the local minima; golden-section search in 44 digits
    polishes each; the least value wins, 0 being among the candidates.
    """
    value = ORACLES[penalty].value
    with mpmath.workdps(DIGITS):
        eta, scale, shape, size = mpf(step), mpf(weight), mpf(a), abs(mpf(v))
        if size == 0:
            return mpf(0)

        def objective(w: mpf) -> mpf:
            return (w - size) ** 2 / 2 + eta * value(w, scale, shape)

        grid = [size * share for share in _grid()]
        values = [objective(w) for w in grid]
        best, least = mpf(0), objective(mpf(0))
        for i in range(1, len(grid)):
            right = values[i + 1] if i + 1 < len(grid) else mpmath.inf
            if values[i - 1] >= values[i] <= right:
                w = _golden(objective, grid[i - 1], grid[min(i + 1, len(grid) - 1)])
                if objective(w) < least:
                    best, least = w, objective(w)
        return best if v > 0 else -best


@cache
def _grid() -> list[mpf]:
    """Return shares of [0, 1], in steps of 1/48 and, near both ends, of half powers of two.

    A minimum at w and another, or a kink, at twice its distance from either end are told apart.
    """
    near = [mpf(2) ** (-mpf(i) / 2) for i in range(10, 80)]
    return sorted({*(mpf(i) / 48 for i in range(49)), *near, *(1 - share for share in near)})


def _golden(f: Callable[[mpf], mpf], low: mpf, high: mpf) -> mpf:
    ratio = (mpmath.sqrt(5) - 1) / 2
    x1, x2 = high - ratio * (high - low), low + ratio * (high - low)
    f1, f2 = f(x1), f(x2)
    for _ in range(100):  # 0.618^100 = 1e-21 of the bracket
        if f1 < f2:
            high, x2, f2 = x2, x1, f1
            x1 = high - ratio * (high - low)
            f1 = f(x1)
        else:
            low, x1, f1 = x1, x2, f2
            x2 = low + ratio * (high - low)
            f2 = f(x2)
    return (low + high) / 2


def prox_by_formula(v: float, step: float, weight: float, penalty: str, a: float) -> float:
    """Return the prox by the published closed form, in 44 digits."""
    published = ORACLES[penalty].published
    with mpmath.workdps(DIGITS):
        return math.copysign(published(abs(mpf(v)), mpf(step), mpf(weight), mpf(a)), v)


def group_index(shape: tuple[int, ...], group_by: str | int | None) -> np.ndarray:
    """Return the number of the group that each weight belongs to, an int array of `shape`."""
    ndim = len(shape)
    if group_by == "auto":
        group_by = "in" if ndim == 2 else "out"
    named: dict[Any, Any] = {
        "out": [0],
        "in": [1],
        "in_spatial": range(1, ndim),
        "filter_slice": [0, 1],
        "layer": [],
    }
    dims = named.get(group_by, [group_by])
    numbers: dict[tuple[int, ...], int] = {}
    index = np.empty(shape, dtype=np.int64)
    for position in product(*map(range, shape)):
        key = tuple(position[dim] for dim in dims)
        index[position] = numbers.setdefault(key, len(numbers))
    return index


def prox_as_published(
    v: np.ndarray,
    step: float,
    *,
    lam: float,
    penalty: str | None,
    a: float,
    mu: float,
    group_by: str | int | None,
    group_weight: str | None = None,
) -> np.ndarray:
    """Return the last two lines of eq. 22 in float64: threshold, then shrinkage by group.

    For a penalty of whole groups, what its authors have in place of the threshold.
    """
    t = v.astype(np.float64)
    if penalty is not None and penalty not in COUPLED:
        formula = np.vectorize(prox_by_formula, otypes=[np.float64])
        t = formula(t, step, lam * mu, penalty, a)
    if group_by is None:
        return t
    index = group_index(t.shape, group_by)
    w = np.empty_like(t)
    for group in range(index.max() + 1):
        members = index == group
        weight = lam * (1 - mu) * (np.sqrt(members.sum()) if group_weight == "sqrt" else 1.0)
        if penalty in COUPLED:
            w[members] = COUPLED[penalty].published(t[members], step, lam * mu, weight)
        else:
            w[members] = _shrunk(t[members], step * weight)
    return w


def condition(
    v: np.ndarray, step: float, weight: float, penalty: str, a: float, group_by: str | int | None
) -> np.ndarray:
    """Return by how much the prox magnifies rounding of each of the weights v, about."""
    if penalty not in COUPLED:
        return np.vectorize(ORACLES[penalty].condition)(np.abs(v), step, weight, a)
    index = group_index(v.shape, group_by)
    of_group = [
        COUPLED[penalty].condition(v[index == group], step * weight)
        for group in range(index.max() + 1)
    ]
    return np.array(of_group)[index]


def undecided(
    v: np.ndarray,
    error: np.ndarray,
    step: float,
    weight: float,
    penalty: str | None,
    a: float,
    group_by: str | int | None,
) -> np.ndarray:
    """Return which of the weights v the prox may put elsewhere within `error` of them: bools.

    Those of a group in which a weight is at a kink, or the prox of the whole group may jump.
    `error` has v's shape.
    """
    alone = np.arange(v.size).reshape(v.shape)
    index = alone if group_by is None else group_index(v.shape, group_by)
    if penalty in COUPLED:
        jumps = COUPLED[penalty].undecided
        members = [index == group for group in range(index.max() + 1)]
        return np.array([jumps(v[of], step * weight, error[of].max()) for of in members])[index]
    at_a_kink = np.zeros(v.shape, dtype=bool)
    for kink in () if penalty is None else ORACLES[penalty].kinks(step, weight, a):
        at_a_kink |= np.abs(np.abs(v) - kink) <= error
    return np.isin(index, index[at_a_kink])
