"""The penalties: names, shape parameters, valid ranges and values.

A regularizer is the sum over a tensor's weights and groups of

    lam * ( mu * sum_i rho_a(w_i)  +  (1 - mu) * sum_g c_g ||w_g||_2 )

rho is a row of `PENALTIES`; the groups are a `views.GroupView`. How a penalty's proximal
operator is computed is each backend's affair (`backends/`); the truth is `backends/reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tl1kernels.views import GroupBy, GroupView, check_group_by


@dataclass(frozen=True)
class Penalty:
    """One elementwise penalty rho_a.

    Attributes:
        name: the value of the option `penalty`.
        title: what people call it.
        source: where it is defined.
        value: (w, a) -> rho_a(w), elementwise, any shape and float dtype, differentiable.
        shaped: whether rho depends on `a`; where it does not, `a` is accepted and has no effect.
    """

    name: str
    title: str
    source: str
    value: Callable[[Tensor, float], Tensor]
    shaped: bool = False


PENALTIES: Mapping[str, Penalty] = {
    p.name: p
    for p in (
        Penalty(
            "tl1",
            "transformed l1",
            "Zhang & Xin 2017; Ma et al. 2019, eq. 5",
            value=lambda w, a: (a + 1) * w.abs() / (a + w.abs()),
            shaped=True,
        ),
        Penalty("l1", "l1", "Tibshirani 1996", value=lambda w, a: w.abs()),
    )
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "l1": {"penalty": "l1", "group_by": None},
    "group_lasso": {"penalty": None, "group_by": "auto"},
    "sparse_group_lasso": {"penalty": "l1", "group_by": "auto"},
    "tl1": {"penalty": "tl1", "group_by": None},
    "integrated_tl1": {"penalty": "tl1", "group_by": "auto"},
}
"""The regularizers that the paper compares, as options: `param_groups(model, **PRESETS[name])`."""


@dataclass(frozen=True)
class Regularizer:
    """The checked regularization options of one param group.

    Build it with `Regularizer.of`, which raises on anything out of range; a `Regularizer`
    that exists is valid.
    """

    lam: float = 0.0
    penalty: str | None = "tl1"
    a: float = 1.0
    mu: float | None = None
    group_by: GroupBy = None
    group_weight: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Regularizer:
        """Check the options among `options` that are this class's fields; others are ignored.

        Raises:
            TypeError, ValueError: naming the option, its value and what is allowed.
        """
        given = {f.name: options[f.name] for f in fields(cls) if f.name in options}
        for name in ("lam", "a"):
            if name in given:
                given[name] = number(name, given[name])
        reg = cls(**given)
        if not 0 <= reg.lam < math.inf:
            raise ValueError(f"lam must be finite and >= 0, got {reg.lam}")
        if reg.penalty is not None and reg.penalty not in PENALTIES:
            names = ", ".join(repr(name) for name in PENALTIES)
            raise ValueError(f"penalty must be None or one of {names}, got {reg.penalty!r}")
        if not 0 < reg.a < math.inf:
            raise ValueError(f"a must be finite and > 0, got {reg.a}")
        if reg.mu is not None:
            mu = number("mu", reg.mu)
            if not 0 <= mu <= 1:
                raise ValueError(f"mu must be None or in [0, 1], got {mu}")
            reg = cls(**{**given, "mu": mu})
        check_group_by(reg.group_by)
        if reg.group_weight not in (None, "sqrt"):
            raise ValueError(f"group_weight must be None or 'sqrt', got {reg.group_weight!r}")
        return reg

    def weights(self, view: GroupView) -> tuple[float, float]:
        """Return what weighs rho_a(w_i) and what weighs ||w_g||_2 on a tensor with this view.

        mu=None gives the whole of lam to the one term that is there, and half of it to each
        where both are. A term that is absent (penalty=None, or no groups) weighs nothing.
        """
        if self.mu is not None:
            mu = self.mu
        elif not view.grouped:
            mu = 1.0
        else:
            mu = 0.0 if self.penalty is None else 0.5
        elementwise = self.lam * mu if self.penalty is not None else 0.0
        group = self.lam * (1 - mu) if view.grouped else 0.0
        if self.group_weight == "sqrt":
            group *= math.sqrt(view.group_size)
        return elementwise, group


def number(name: str, value: Any) -> float:
    """Return a float for a Python number or a real one-element tensor.

    Raises:
        TypeError: naming the argument, for anything else.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    return float(value)
