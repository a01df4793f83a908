"""A schedule of lam, mu or a, in the manner of torch.optim.lr_scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl1kernels.penalties import Regularizer, number

SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda x: float(x >= 1),
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
}
"""How far the way from the start to the group's own value has come after a share x of the steps."""

OPTIONS = ("lam", "mu", "a")


class LamScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Leads an option of every param group from `start` to the value that the group has now.

    Call `step` after the optimizer's, once a batch or once an epoch, as with torch's schedulers; lr
    stays what it is, and a scheduler of lr may stand beside it. A tensor is written in place. As
    with lr, the scheduler is made before a checkpoint of the optimizer is loaded. The group's own
    value waits in the group as `initial_lam` (`initial_mu`, `initial_a`), which a later scheduler
    leads to as well: change it there. A group that is added later joins in; one with lam = 0 stays
    as it is.

    Args:
        optimizer: one of this package's.
        shape: of the way, after a share x of `steps`: "constant" (`start`, then the group's value),
            "linear", or "cubic", 1 - (1 - x)^3 of it (Zhu & Gupta 2017, eq. 1), fast at first.
        steps: how many steps the way takes, >= 1.
        option: what is led: "lam", "mu" or "a".
        start: the value at the beginning; None for 0, which is no value of "a".
        delay: steps before the way begins, >= 0.
        last_epoch: as in torch, one less than the steps taken; -1 begins anew.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: str = "cubic",
        *,
        steps: int,
        option: str = "lam",
        start: float | None = None,
        delay: int = 0,
        last_epoch: int = -1,
    ) -> None:
        for name, value, allowed in (("shape", shape, SHAPES), ("option", option, OPTIONS)):
            if value not in tuple(allowed):
                names = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {names}, got {value!r}")
        for name, count, least in (("steps", steps, 1), ("delay", delay, 0)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"{name} must be an int >= {least}, got {count!r}")
        if start is None and option == "a":
            raise ValueError("start must be a number > 0 for option='a', got None")
        start = 0.0 if start is None else number("start", start)
        try:
            Regularizer.of({option: start})
        except ValueError as error:
            raise ValueError(f"start={start} is no value of {option}: {error}") from None
        for i, group in enumerate(getattr(optimizer, "param_groups", ())):
            value = group.get(option)
            if "lam" in group and not _is_led(group):
                continue
            if value is None:
                got = "None" if option in group else "no such option"
                raise ValueError(f"{option} of param group {i} must be a number, got {got}")
            if isinstance(value, Tensor) and not value.is_floating_point():
                raise ValueError(f"{option} of param group {i} must be a float, got {value.dtype}")
        self.shape, self.option = shape, option
        self.steps, self.start, self.delay = steps, start, delay
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Go one step on, and set the option in every group."""
        super().step(epoch)
        self._apply()

    def get_last_value(self) -> list[float | Tensor]:
        """Return the option's present value in every group."""
        return [group[self.option] for group in self.optimizer.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scheduler's state, and set the option to what it was."""
        if state_dict.get("shape", self.shape) not in SHAPES:
            raise ValueError(f"shape must be one of {tuple(SHAPES)}, got {state_dict['shape']!r}")
        super().load_state_dict(state_dict)
        self._apply()

    def _apply(self) -> None:
        share = min(max((self.last_epoch - self.delay) / self.steps, 0.0), 1.0)
        way = SHAPES[self.shape](share)
        ends = self._ends()
        for group, end in zip(self.optimizer.param_groups, ends, strict=True):
            if end is None or not _is_led(group):
                continue
            value = end if way == 1 else self.start + (end - self.start) * way
            if isinstance(group[self.option], Tensor):
                group[self.option].fill_(value)
            else:
                group[self.option] = value

    def _ends(self) -> list[float | None]:
        """Return each group's own value, before any is written: groups may share a tensor."""
        name, shared = f"initial_{self.option}", {}
        for group in self.optimizer.param_groups:
            if name in group:
                shared[id(group[self.option])] = group[name]
        for group in self.optimizer.param_groups:
            present = group[self.option]
            if name not in group and present is not None:
                is_shared = isinstance(present, Tensor) and id(present) in shared
                group[name] = shared[id(present)] if is_shared else float(present)
        return [group.get(name) for group in self.optimizer.param_groups]


def _is_led(group: Mapping[str, Any]) -> bool:
    """Return whether a param group is regularized, at present or at the end of a schedule."""
    lam = group.get("initial_lam", group["lam"])
    return isinstance(lam, Tensor) or lam != 0
