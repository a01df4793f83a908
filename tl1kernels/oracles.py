"""Independent answers for checks: the definition of a prox by search, a step by the paper's words.

Nothing here shares code with the backends: penalties are written again, in mpmath; groups are
loops over index tuples; update rules are torch.optim's. `verify` and the tests call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import mpmath
import numpy as np
from mpmath import mpf

VALUES: dict[str, Callable[[mpf, mpf], mpf]] = {
    "l1": lambda w, a: abs(w),
    "tl1": lambda w, a: (a + 1) * abs(w) / (a + abs(w)),
}
"""rho_a(w) in mpmath, by name of the penalty."""

DIGITS = 44


def prox_by_definition(v: float, step: float, weight: float, penalty: str, a: float) -> mpf:
    """Return argmin over w of (w - v)^2 / 2 + step * weight * rho_a(w), to about 20 digits.

    A dense search over [0, |v|] in float64, on a linear and a logarithmic grid, brackets the
    local minima; golden-section search in 44 digits polishes each; the least value wins, 0 being
    among the candidates.
    """
    rho = VALUES[penalty]
    with mpmath.workdps(DIGITS):
        tau, shape, size = mpf(step) * mpf(weight), mpf(a), abs(mpf(v))
        if size == 0:
            return mpf(0)

        def objective(w: mpf) -> mpf:
            return (w - size) ** 2 / 2 + tau * rho(w, shape)

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


def tl1_as_published(v: float, tau: float, a: float) -> float:
    """Return the TL1 prox by the paper's closed form (eq. 11).

    In 44 digits, for it cancels: with a = 100 and tau = 1e-6, float32 loses every digit.
    """
    with mpmath.workdps(DIGITS):
        size, tau_, shape = abs(mpf(v)), mpf(tau), mpf(a)
        if tau_ <= shape**2 / (2 * (shape + 1)):
            threshold = tau_ * (shape + 1) / shape
        else:
            threshold = mpmath.sqrt(2 * tau_ * (shape + 1)) - shape / 2
        if size <= threshold:
            return 0.0
        phi = mpmath.acos(1 - 27 * tau_ * shape * (shape + 1) / (2 * (shape + size) ** 3))
        w = 2 * (shape + size) * mpmath.cos(phi / 3) / 3 - 2 * shape / 3 + size / 3
        return float(mpmath.sign(v) * w)


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
    tau = step * lam * mu
    t = v.astype(np.float64)
    if penalty == "l1":
        t = np.sign(t) * np.maximum(np.abs(t) - tau, 0)
    elif penalty == "tl1":
        t = np.vectorize(tl1_as_published, otypes=[np.float64])(t, tau, a)
    elif penalty is not None:
        raise ValueError(f"no oracle for penalty {penalty!r}")
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
