"""A param group's options and state: what is refused, and whether they are what they were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from torch import Tensor

from tl1kernels import plan
from tl1kernels.penalties import REGULARIZER, Regularizer, number_or_tensor
from tl1kernels.views import view_of


def check_group(
    group: dict[str, Any],
    params: list[Tensor] | None = None,
    grads: list[Tensor] | None = None,
) -> Regularizer:
    """Check a param group's options, and tensors if they are given; return its regularizer."""
    if group.get("differentiable"):
        raise ValueError(f"differentiable must be False, got {group['differentiable']!r}")
    min_ndim = group["min_ndim"]
    if not isinstance(min_ndim, int) or isinstance(min_ndim, bool) or min_ndim < 0:
        raise ValueError(f"min_ndim must be an int >= 0, got {min_ndim!r}")
    rounding, masters = group["rounding"], group["master_weights"]
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if not isinstance(masters, bool):
        raise ValueError(f"master_weights must be True or False, got {masters!r}")
    if masters and rounding != "nearest":
        raise ValueError(f"rounding must be 'nearest' with master_weights=True, got {rounding!r}")
    reg = Regularizer.of(group)
    reg.check_step("lr", number_or_tensor("lr", group["lr"]))
    for param in params or ():
        plan.check_tensor("params", param)
        view_of(param, reg.group_by if param.ndim >= min_ndim else None)
    for param, grad in zip(params or (), grads or (), strict=False):
        plan.check_tensor("grad", grad)
        if grad.shape != param.shape:
            wanted, got = tuple(param.shape), tuple(grad.shape)
            raise ValueError(f"grad must have the shape {wanted} of its parameter, got {got}")
    return reg


def check_state(name: str, value: Any, param: Tensor, counter: bool = False) -> None:
    """Raise unless `value` is fit to be state `name` of a parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"state {name!r} must be a tensor, got {type(value).__name__}")
    fits = value.numel() == 1 if counter else value.shape == param.shape
    if not fits or not value.is_floating_point():
        allowed = "one float" if counter else f"floats of shape {tuple(param.shape)}"
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"state {name!r} must be {allowed}, got {got}")
    plan.check_writable([value])


def check_none_is_lost(names: Sequence[str], there: Sequence[str]) -> None:
    """Raise if a parameter has only some of a rule's state: nothing but a damaged checkpoint has.

    `max_exp_avg_sq` alone may begin later, where amsgrad was turned on between two steps.
    """
    lost = [name for name in names if name not in (*there, "max_exp_avg_sq")]
    if there and lost:
        raise ValueError(
            f"state must have all of {', '.join(names)} or none, "
            f"got {', '.join(there)} without {', '.join(lost)}"
        )


# The options whose change needs a new plan: they choose batches and views. `differentiable` is one
# so that it is refused if it is turned on.
of_structure = itemgetter(
    *("penalty", "group_by", "min_ndim", "rounding", "master_weights", "differentiable")
)


class Changed(NamedTuple):
    """Which options of a param group are others than in the last step."""

    lr: bool
    regularizer: bool  # of `REGULARIZER`
    rule: bool  # all others


class Seen:
    """A param group's options as the last step found them.

    lr and lam may lie on a device. Each step reads them there itself: only another tensor counts.

    Attributes:
        settled: what the group holds, in its order; in place of an option that may change in
            place, an object that is nowhere else.
    """

    def __init__(self, group: Mapping[str, Any], names: Iterable[str]) -> None:
        first = ("lr", *REGULARIZER)
        names = (*first, *(name for name in names if name not in first))
        self._read_by_steps = {name: name in ("lr", "lam") for name in names}
        self._look(group)

    def _look(self, group: Mapping[str, Any]) -> None:
        read_by_steps = self._read_by_steps
        self.settled = [
            _settled(option, read_by_steps[name]) if name in read_by_steps else option
            for name, option in group.items()
        ]
        self._values = tuple([_value(group[name], read) for name, read in read_by_steps.items()])
        self._place_of_lr = list(group).index("lr")

    def follow(self, group: Mapping[str, Any]) -> Changed:
        """Look at the options again."""
        old, lr = self._values, group["lr"]
        self.settled[self._place_of_lr] = lr
        if len(group) == len(self.settled) and all(map(is_, self.settled, group.values())):
            self.settled[self._place_of_lr] = _settled(lr, True)
            self._values = (_value(lr, True), *old[1:])
            return _LR if self._values[0] != old[0] else _NOTHING
        self._look(group)
        new, rule = self._values, 1 + len(REGULARIZER)
        return Changed(new[0] != old[0], new[1:rule] != old[1:rule], new[rule:] != old[rule:])


_LR, _NOTHING = Changed(True, False, False), Changed(False, False, False)

_PLAIN = {int, float, bool, str, type(None)}


def _settled(option: Any, read_by_steps: bool) -> Any:
    """Return an option that is the same as long as it is this object; else an object of its own."""
    kind = type(option)
    if kind in _PLAIN or isinstance(option, np.generic):
        return option
    if kind is tuple and _PLAIN.issuperset(map(type, option)):
        return option
    return option if read_by_steps and _lies_on_a_device(option) else object()


def _value(option: Any, read_by_steps: bool) -> Any:
    """Return an option as something that compares by value, even if it then changes in place."""
    if type(option) in _PLAIN:
        return option
    if isinstance(option, (tuple, list)):
        return tuple([_value(o, False) for o in option])
    if _lies_on_a_device(option):
        if not read_by_steps and option.is_inference():
            return object()  # it does not count what is written to it
        return _Itself(option, 0 if read_by_steps else option._version)
    of_one_element = (
        isinstance(option, (Tensor, np.generic, np.ndarray)) and math.prod(option.shape) == 1
    )
    if of_one_element and not getattr(option, "is_meta", False):
        return option.item()
    return object()  # whoever checks it will say what it is


def _lies_on_a_device(option: object) -> TypeGuard[Tensor]:
    return isinstance(option, Tensor) and option.device.type not in ("cpu", "meta")


class _Itself:
    """Equal to the same tensor at the same version, which goes up with each write to it."""

    def __init__(self, tensor: Tensor, version: int) -> None:
        self._tensor, self._version = tensor, version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Itself):
            return False
        return other._tensor is self._tensor and other._version == self._version
