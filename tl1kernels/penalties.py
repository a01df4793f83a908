"""The penalties: names, valid ranges and values; the options of a regularizer, checked.

A regularizer is the sum over a tensor's weights and groups of

    lam * mu * sum_i rho_a(w_i)  +  lam * (1 - mu) * sum_g c_g ||w_g||_2

rho is a row of `PENALTIES`; the groups are a `views.GroupView`. How a penalty's proximal
operator is computed is each backend's affair (`backends/`); the truth is `backends/reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from tl1kernels.views import GroupBy, GroupView, check_group_by


@dataclass(frozen=True)
class Penalty:
    """A row of the registry: the term that lam * mu weighs.

    Attributes:
        name: the value of the option `penalty`.
        source: where it is defined.
        value: (w, weight, a) -> 0-d tensor, the weighted term of a tensor given as
            (blocks, outer, groups, inner), differentiable. It gets the weight because some
            penalties (SCAD, MCP) are not a weight times a function of w.
        a: the shape where none is given; None where it does not depend on one.
        coupled: whether the term is of each group's weights together, not of single weights.
        mu: its share of lam, where groups are there too and none is given; None for 1/2, or the
            schedule of `param_groups`.
        check: (a, step) -> what is wrong with this shape at this step size, or None.
    """

    name: str
    source: str
    value: Callable[[Tensor, float, float], Tensor]
    a: float | None = None
    coupled: bool = False
    mu: float | None = None
    check: Callable[[float, float], str | None] = lambda a, step: None


def _scad(w: Tensor, weight: float, a: float) -> Tensor:
    size = w.abs()
    middle = (2 * a * weight * size - size.square() - weight**2) / (2 * (a - 1))
    beyond = torch.where(size <= a * weight, middle, weight**2 * (a + 1) / 2)
    return torch.where(size <= weight, weight * size, beyond).sum()


def _mcp(w: Tensor, weight: float, a: float) -> Tensor:
    size = w.abs()
    inner = weight * size - size.square() / (2 * a)
    return torch.where(size <= a * weight, inner, a * weight**2 / 2).sum()


def _exclusive(w: Tensor, weight: float, a: float) -> Tensor:
    return weight / 2 * w.abs().sum(dim=(1, 3)).square().sum()


def _root(w: Tensor, power: float) -> Tensor:
    """Return |w|^power; where w is 0 its gradient is 0, one of the subgradients, and not NaN."""
    alive = w != 0
    return torch.where(alive, torch.where(alive, w, 1).abs().pow(power), 0)


def _l1_minus_l2(w: Tensor, weight: float, a: float) -> Tensor:
    norms = torch.linalg.vector_norm(w, dim=(1, 3))
    return weight * (w.abs().sum() - norms.sum())


PENALTIES: dict[str, Penalty] = {
    row.name: row
    for row in (
        Penalty(
            "tl1",
            "transformed l1: Zhang & Xin 2017; Ma et al. 2019, eq. 5",
            lambda w, weight, a: weight * ((a + 1) * w.abs() / (a + w.abs())).sum(),
            a=1.0,
        ),
        Penalty("l1", "Tibshirani 1996", lambda w, weight, a: weight * w.abs().sum()),
        Penalty(
            "l0",
            "the number of weights; Blumensath & Davies 2008",
            lambda w, weight, a: weight * (w != 0).sum().to(w.dtype),
        ),
        Penalty(
            "scad",
            "smoothly clipped absolute deviation: Fan & Li 2001",
            _scad,
            a=3.7,
            check=lambda a, step: None if a > 1 + step else f"scad needs a > {1 + step}",
        ),
        Penalty(
            "mcp",
            "minimax concave penalty: Zhang 2010",
            _mcp,
            a=3.0,
            check=lambda a, step: None if a > step else f"mcp needs a > {step}",
        ),
        Penalty(
            "log",
            "log(a |w| + 1) / log(a + 1): Candes, Wakin & Boyd 2008",
            lambda w, weight, a: weight / math.log1p(a) * (a * w.abs()).log1p().sum(),
            a=1.0,
        ),
        Penalty(
            "capped_l1",
            "min(|w|, a): Zhang 2009",
            lambda w, weight, a: weight * w.abs().clamp(max=a).sum(),
            a=1.0,
        ),
        Penalty(
            "l_half",
            "|w|^(1/2): Xu, Chang, Xu & Zhang 2012",
            lambda w, weight, a: weight * _root(w, 1 / 2).sum(),
        ),
        Penalty(
            "l_two_thirds",
            "|w|^(2/3): Krishnan & Fergus 2009; Cao, Sun & Xu 2013",
            lambda w, weight, a: weight * _root(w, 2 / 3).sum(),
        ),
        Penalty(
            "l1_minus_l2",
            "||w_g||_1 - ||w_g||_2 of each group: Lou & Yan 2018",
            _l1_minus_l2,
            coupled=True,
            mu=1.0,
        ),
        Penalty(
            "exclusive",
            "||w_g||_1^2 / 2 of each group: Zhou, Jin & Hoi 2010",
            _exclusive,
            coupled=True,
        ),
        Penalty(
            "cges",
            "the same, by the step of combined group and exclusive sparsity: Yoon & Hwang 2017",
            _exclusive,
            coupled=True,
        ),
    )
}
"""By name."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "l1": {"penalty": "l1", "group_by": None},
    "group_lasso": {"penalty": None, "group_by": "auto"},
    "sparse_group_lasso": {"penalty": "l1", "group_by": "auto"},
    "cges": {"penalty": "cges", "group_by": "auto"},
    "tl1": {"penalty": "tl1", "group_by": None},
    "integrated_tl1": {"penalty": "tl1", "group_by": "auto"},
}
"""The regularizers that the paper compares, as options:
`param_groups(model, lam=lam, **PRESETS[name])`."""


class Options(TypedDict, total=False):
    """The keyword options of `prox` and its kin, for type checkers."""

    lam: float | Tensor
    penalty: str | None
    a: float | Tensor | None
    mu: float | Tensor | None
    group_by: GroupBy
    group_weight: str | None
    backend: str | None


class Terms(NamedTuple):
    """A regularizer on one tensor, as a backend sees it: numbers.

    Attributes:
        elementwise: lam * mu, the weight of the penalty.
        group: lam * (1 - mu) * c_g, the weight of a group's l2 norm; the same for all groups.
        a: the penalty's shape.
        scale: None, or lam as a 0-d tensor, and then the two weights lack it: a step takes the
            value that it then has.
    """

    elementwise: float
    group: float
    a: float
    scale: Tensor | None = None

    def read(self) -> Terms:
        """Return the same with lam in the weights; waits for the device that has it."""
        lam = 1.0 if self.scale is None else float(self.scale)
        return Terms(lam * self.elementwise, lam * self.group, self.a)


@dataclass(frozen=True)
class Regularizer:
    """The checked regularization options of one param group.

    Build it with `Regularizer.of`, which raises on anything out of range.
    """

    lam: float | Tensor = 0.0
    penalty: str | None = "tl1"
    a: float | None = None
    mu: float | None = None
    group_by: GroupBy = None
    group_weight: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Regularizer:
        """Check the options among `options` that are this class's fields; others are ignored.

        `lam` on a device other than the CPU stays there, unread and unchecked.

        Raises:
            TypeError, ValueError: naming the option, its value and what is allowed.
        """
        given = {name: options[name] for name in REGULARIZER if name in options}
        if "lam" in given:
            given["lam"] = number_or_tensor("lam", given["lam"])
        for name in ("a", "mu"):
            if given.get(name) is not None:
                given[name] = number(name, given[name])
        reg = cls(**given)
        if not isinstance(reg.lam, Tensor) and not 0 <= reg.lam < math.inf:
            raise ValueError(f"lam must be finite and >= 0, got {reg.lam}")
        if reg.penalty is not None and reg.penalty not in tuple(PENALTIES):
            names = ", ".join(repr(name) for name in PENALTIES)
            raise ValueError(f"penalty must be None or one of {names}, got {reg.penalty!r}")
        if reg.a is not None and not 0 < reg.a < math.inf:
            raise ValueError(f"a must be None or finite and > 0, got {reg.a}")
        check = PENALTIES[reg.penalty].check if reg.penalty is not None else None
        if check and (problem := check(reg.a_or_default, 0.0)):
            raise ValueError(f"a={reg.a_or_default}: {problem}")
        if reg.mu is not None and not 0 <= reg.mu <= 1:
            raise ValueError(f"mu must be None or in [0, 1], got {reg.mu}")
        check_group_by(reg.group_by)
        if reg.group_by is None and reg.penalty is not None and PENALTIES[reg.penalty].coupled:
            raise ValueError(f"group_by must not be None with penalty={reg.penalty!r}")
        if reg.group_weight not in (None, "sqrt"):
            raise ValueError(f"group_weight must be None or 'sqrt', got {reg.group_weight!r}")
        return reg

    def terms(self, view: GroupView) -> Terms:
        """Return the weights of the two terms on a tensor with this view.

        mu=None gives the whole of lam to the one term that is there, and half of it to each
        where both are (`Penalty.mu`). A term that is absent (penalty=None, or no groups) weighs
        nothing.
        """
        if self.mu is not None:
            mu = self.mu
        elif not view.grouped:
            mu = 1.0
        else:
            share = PENALTIES[self.penalty].mu if self.penalty else 0.0
            mu = 0.5 if share is None else share
        lam, scale = (1.0, self.lam) if isinstance(self.lam, Tensor) else (self.lam, None)
        elementwise = lam * mu if self.penalty is not None else 0.0
        group = lam * (1 - mu) if view.grouped else 0.0
        if self.group_weight == "sqrt":
            group *= math.sqrt(view.group_size)
        return Terms(elementwise, group, self.a_or_default, scale)

    @property
    def a_or_default(self) -> float:
        """The penalty's shape: `a`, or the penalty's own; 1 where it has none."""
        default = PENALTIES[self.penalty].a if self.penalty else None
        return self.a if self.a is not None else 1.0 if default is None else default

    def check_step(self, name: str, step: float | Tensor) -> None:
        """Raise ValueError, naming the argument, where no prox of this step size exists.

        lam = 0 takes any step, as torch.optim does. What lies on a device is not read.
        """
        if isinstance(step, Tensor) or (not isinstance(self.lam, Tensor) and self.lam == 0):
            return
        if not 0 <= step < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {step}")
        problem = PENALTIES[self.penalty].check(self.a_or_default, step) if self.penalty else None
        if problem:
            raise ValueError(f"a={self.a_or_default} with {name}={step}: {problem}")


REGULARIZER = tuple(field.name for field in fields(Regularizer))
"""The options that are its fields."""


def number(name: str, value: Any) -> float:
    """Return a float for a Python number or a real one-element tensor.

    Raises:
        TypeError: naming the argument, for anything else.
        ValueError: the tensor is on the device "meta".
    """
    if type(value) is float:  # of most groups in most steps
        return value
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
            if value.is_meta:
                raise ValueError(f"{name} must have a value, got a tensor on the device 'meta'")
            return float(value)
    elif hasattr(value, "__float__") and not isinstance(value, _NO_NUMBERS):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):  # several elements, or too large
            pass
    raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}")


_NO_NUMBERS = (bool, np.bool_, np.complexfloating)


def number_or_tensor(name: str, value: Any) -> float | Tensor:
    """Return `number(name, value)`, but a one-element tensor on a device as it is, unread."""
    elsewhere = isinstance(value, Tensor) and value.device.type not in ("cpu", "meta")
    if elsewhere and value.numel() == 1:
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a 0-d float tensor, got {value.dtype}")
        return value
    return number(name, value)
