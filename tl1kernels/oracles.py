"""Independent answers for checks: the definition of a prox by search, a step by the paper's words.

Nothing here shares code with the backends: penalties are written again, in mpmath; groups are
loops over index tuples; update rules are torch.optim's. `verify` and the tests call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
        published: (|v|, step, weight, a) -> |w|, the closed form; None to search instead.
        threshold: (step * weight, a) -> about where |v| begins to live; where tests look closely.
        condition: (|v|, step * weight, a) -> by how much rounding is magnified there, about.
    """

    value: Callable[[mpf, mpf, mpf], mpf]
    published: Callable[[mpf, mpf, mpf, mpf], mpf] | None = None
    threshold: Callable[[float, float], float] = lambda tau, a: tau
    condition: Callable[[float, float, float], float] = lambda v, tau, a: 1.0


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


def _tl1_condition(v: float, tau: float, a: float) -> float:
    """Return 1 / sqrt(1 - q), large at the cubic's double root; for q > 1 the prox is 0."""
    q = 6.75 * tau * (a + 1) / (a + v) * a / (a + v) / (a + v)
    return 1.0 if q > 1 else 1 / math.sqrt(max(1 - q, 1e-30))


ORACLES: dict[str, Oracle] = {
    "l1": Oracle(
        value=lambda w, weight, a: weight * abs(w),
        published=lambda v, step, weight, a: max(v - step * weight, mpf(0)),
    ),
    "tl1": Oracle(
        value=lambda w, weight, a: weight * (a + 1) * abs(w) / (a + abs(w)),
        published=_tl1_published,
        threshold=lambda tau, a: float(_tl1_threshold(mpf(tau), mpf(a))),
        condition=_tl1_condition,
    ),
}
"""By name of the penalty; the tests hold it against the registry."""


def prox_by_definition(v: float, step: float, weight: float, penalty: str, a: float) -> mpf:
    """Return argmin over w of (w - v)^2 / 2 + step * penalty(w), to about 20 digits.

    A dense search over [0, |v|] in float64, on a linear and a logarithmic grid, brackets the
    local minima; golden-section search in 44 digits polishes each; the least value wins, 0 being
    among the candidates.
    """
    value = ORACLES[penalty].value
    with mpmath.workdps(DIGITS):
        eta, scale, shape, size = mpf(step), mpf(weight), mpf(a), abs(mpf(v))
        if size == 0:
            return mpf(0)

        def objective(w: mpf) -> mpf:
            return (w - size) ** 2 / 2 + eta * value(w, scale, shape)

        grid = sorted({mpf(0), size, *_grid(size)})
        values = [objective(w) for w in grid]
        best, least = mpf(0), objective(mpf(0))
        for i in range(1, len(grid)):
            right = values[i + 1] if i + 1 < len(grid) else mpmath.inf
            if values[i - 1] >= values[i] <= right:
                w = _golden(objective, grid[i - 1], grid[min(i + 1, len(grid) - 1)])
                if objective(w) < least:
                    best, least = w, objective(w)
        return best if v > 0 else -best


def _grid(size: mpf) -> Iterator[mpf]:
    for i in range(1, 48):
        yield size * i / 48
    for exponent in range(6, 60, 2):
        yield size * mpf(2) ** -exponent
        yield size * (1 - mpf(2) ** -exponent)


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
    """Return the prox by the published closed form, in 44 digits; by search where there is none."""
    published = ORACLES[penalty].published
    if published is None:
        return float(prox_by_definition(v, step, weight, penalty, a))
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
    """Return the last two lines of eq. 22 in float64: threshold, then shrinkage by group."""
    t = v.astype(np.float64)
    if penalty is not None:
        formula = np.vectorize(prox_by_formula, otypes=[np.float64])
        t = formula(t, step, lam * mu, penalty, a)
    if group_by is None:
        return t
    index = group_index(t.shape, group_by)
    w = np.empty_like(t)
    for group in range(index.max() + 1):
        members = index == group
        norm = float(np.sqrt(np.sum(np.square(t[members], dtype=np.longdouble))))
        c = step * lam * (1 - mu) * (np.sqrt(members.sum()) if group_weight == "sqrt" else 1.0)
        w[members] = t[members] * max(0.0, 1 - c / norm) if norm > 0 else 0.0
    return w
