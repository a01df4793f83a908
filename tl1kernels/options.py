"""A param group's options and state: what is refused, and whether they are what they were."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

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


of_regularizer = itemgetter(*REGULARIZER)


# The options whose change needs a new plan: they choose batches and views. `differentiable` is one
# so that it is refused if it is turned on.
of_structure = itemgetter(
    *("penalty", "group_by", "min_ndim", "rounding", "master_weights", "differentiable")
)


def unchanged(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Return whether options are what they were, given as `plain` and as they are."""
    try:
        return old == new
    except RuntimeError:  # a tensor of several elements, which check_group will name
        return False


class _Itself:
    """Equal to one tensor, and to nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return other is self._tensor


_PLAIN = {int, float, bool, str, type(None)}


def plain(option: Any) -> Any:
    """Return an option as something that compares by value: a tensor may change in place.

    One on a device is not read: whoever uses it looks at its value anew.
    """
    if type(option) in _PLAIN:
        return option
    if isinstance(option, Tensor) and option.device.type not in ("cpu", "meta"):
        return _Itself(option)
    if isinstance(option, Tensor):
        return option.item() if option.numel() == 1 else option
    if isinstance(option, (tuple, list)):  # itself most often of such as need nothing
        return tuple([o if type(o) in _PLAIN else plain(o) for o in option])
    return option
