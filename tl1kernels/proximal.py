"""What the optimizers share: options, state and checkpoints, and how a step is planned and taken.

A step checks everything, attaches the state, then hands the tensors to `plan`. No maths here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor

from tl1kernels import compiled, plan
from tl1kernels.batch import Entry, Numbers, Rule, state_dtype
from tl1kernels.groups import is_flat_piece
from tl1kernels.options import (
    Seen,
    check_group,
    check_none_is_lost,
    check_state,
    of_structure,
)
from tl1kernels.penalties import Regularizer, Terms, number_or_tensor
from tl1kernels.views import GroupBy, GroupView, laid_out_like, view_of


@dataclass
class _PlannedGroup:
    """A param group's part of a step, and what that was made for."""

    rule: Rule
    scalars: Mapping[str, float | Tensor]  # the rule's
    structure: tuple[Any, ...]  # the options whose change needs a new plan
    reg: Regularizer
    seen: Seen  # the options that all that was made of
    numbers: dict[GroupView | None, Numbers]  # by view; None for tensors that are spared
    entries: list[Entry]
    params: list[Tensor]
    state: list[Tensor] = field(default_factory=list)  # all of it, in the order of the dicts
    kinds: plan.Kinds | None = None  # of that state
    masters: bool = False  # whether parameters have them

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Under which the rule keeps its state."""
        return (*self.rule.state, *self.rule.counters)


@dataclass
class _Planned:
    """A step's batches, and the param groups and state that they were made for."""

    batches: plan.Plan
    groups: list[_PlannedGroup]
    with_state: list[_PlannedGroup] = field(init=False)  # of them; masters are state too
    settled: list[Any] = field(init=False)  # of all of them, see `Seen`
    state: list[Any] = field(default_factory=list)  # of all parameters, as `_flat_state` has it

    def __post_init__(self) -> None:
        self.with_state = [group for group in self.groups if group.masters or group.names]
        self.settle()

    def settle(self) -> None:
        """Gather what the groups have seen."""
        self.settled = [*chain(*(group.seen.settled for group in self.groups))]


class Proximal(torch.optim.Optimizer):
    """What the optimizers share; it stands before torch's class in their bases."""

    _loading: tuple[dict[str, Any], list[dict[str, Any]]]
    _planned: _Planned | None = None  # of the last step
    _versions: dict[Tensor, int | None]  # of parameters that have masters, after the last step
    _key: int  # by which a compiled step finds this optimizer
    # `param_groups`, by a name under which torch.compile does not make constants of all options.
    _groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        lam: float | Tensor = 0.0,
        penalty: str | None = "tl1",
        a: float | Tensor | None = None,
        mu: float | Tensor | None = None,
        group_by: GroupBy = "auto",
        group_weight: str | None = None,
        min_ndim: int = 2,
        rounding: str = "nearest",
        master_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        # torch's __init__ replaces self.defaults and then calls add_param_group, which is where
        # these join them.
        self._options = {
            "lam": lam,
            "penalty": penalty,
            "a": a,
            "mu": mu,
            "group_by": group_by,
            "group_weight": group_weight,
            "min_ndim": min_ndim,
            "rounding": rounding,
            "master_weights": master_weights,
        }
        if not isinstance(params, Tensor):  # which torch refuses
            params = list(params)
        with _unchanged_if_refused(params):
            super().__init__(params, *args, **kwargs)
        self._key = compiled.register(self)
        self._versions = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "param_groups":
            self._groups = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see `torch.optim.Optimizer.add_param_group`."""
        self.defaults.update(self.__dict__.pop("_options", {}))
        with _unchanged_if_refused([param_group]):
            # Wrappers (ZeroRedundancyOptimizer) put the optimizer's own lam into every group.
            if isinstance(param_group, dict) and _sets_own_lam(param_group, self.defaults):
                param_group.setdefault("min_ndim", 0)
            super().add_param_group(param_group)
            group = self.param_groups.pop()
            # What is frozen may be of any kind, as for torch; if it thaws, its first step looks.
            reg = check_group(group, [param for param in group["params"] if param.requires_grad])
            self.param_groups.append(group)
        regularized = isinstance(reg.lam, Tensor) or reg.lam > 0
        asks = reg.group_by is not None or group["min_ndim"] > 1  # for what a flat piece lacks
        if regularized and asks and any(map(is_flat_piece, group["params"])):
            warnings.warn(
                "tl1kernels: params are flat pieces that FullyShardedDataParallel has made of "
                "weights, with no groups and too few dims for min_ndim: fully_shard keeps both",
                RuntimeWarning,
                stacklevel=3,
            )
        group["a"] = reg.a_or_default if group["a"] is None else group["a"]
        for name in ("lam", "a", "mu"):  # a NumPy scalar would keep a checkpoint from loading
            if group[name] is not None and not isinstance(group[name], Tensor):
                group[name] = float(group[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its torch.optim counterpart.

        Options that the checkpoint lacks keep their present value. State is copied, in the
        dtype that this optimizer gives it; torch would cast it to the parameter's.
        """
        # The last pre-hook sees what the user's hooks made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(_remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._groups = self.param_groups
        self._planned, self._versions = None, {}
        if "_key" not in self.__dict__:
            self._key = compiled.register(self)
        if "_loading" not in self.__dict__:
            return
        checkpoint, present = self._loading
        saved_groups = checkpoint["param_groups"]
        for group, old, saved in zip(self.param_groups, present, saved_groups, strict=True):
            for name, value in old.items():
                group.setdefault(name, value)
            # How torch ran its step says nothing about how this one can.
            group.update({name: old[name] for name in _IMPLEMENTATION if name in old})
            for param, key in zip(group["params"], saved["params"], strict=True):
                for name, value in checkpoint["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        scalar = name == "step"
                        dtype = value.dtype if scalar else state_dtype(param.dtype)
                        on_cpu = scalar and not counts_on_device(group)
                        device = torch.device("cpu") if on_cpu else param.device
                        self.state[param][name] = value.to(device, dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one proximal step; return the closure's loss, if there is one."""
        if closure is None and torch.compiler.is_compiling():
            compiled.step(self._key, self._groups)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [group["params"] for group in self.param_groups]
        grads = [param.grad for param in chain(*params)]
        if type(None) in set(map(type, grads)):
            params = [[p for p in there if p.grad is not None] for there in params]
            grads = [param.grad for param in chain(*params)]
        self._take_step(params, grads)
        return loss

    def _take_step(self, params: list[list[Tensor]], grads: list[Tensor]) -> None:
        """Take a step on some parameters of each param group, with the gradients of all of them."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # a GradScaler's
        planned = self._planned
        self._planned = None  # until its step has gone well
        # Whatever can be refused is refused before any state or weight is touched.
        if planned is None or not self._renew(planned, params, grads):
            planned = self._plan(params, grads)
        starts = self._lacks_state(planned)
        if starts and found_inf is not None and found_inf.item():
            return  # a first step that is skipped leaves no state: the next one is the first
        only_now = self._attach_state(planned)
        planned.batches.execute(getattr(self, "grad_scale", None), found_inf)
        followed = [
            param for group in planned.with_state if group.masters for param in group.params
        ]
        self._versions = {param: _version(param) for param in followed}
        self._planned = None if only_now else planned

    def _plan(self, params: list[list[Tensor]], grads: list[Tensor]) -> _Planned:
        """Check everything and prepare the batches of a step."""
        work: list[tuple[Rule, str | None, Entry, Tensor]] = []
        groups = []
        remaining = iter(grads)
        for group, with_grad in zip(self.param_groups, map(list, params), strict=True):
            theirs = list(islice(remaining, len(with_grad)))
            reg = check_group(group, with_grad, theirs)
            rule, scalars = self._rule(group)
            structure, seen = of_structure(group), Seen(group, self.defaults)
            there = _PlannedGroup(rule, scalars, structure, reg, seen, {}, [], params=with_grad)
            for param, grad in zip(with_grad, theirs, strict=True):
                spared = param.ndim < group["min_ndim"]
                view = view_of(param, None if spared else reg.group_by)
                key = None if spared else view
                if key not in there.numbers:
                    there.numbers[key] = Numbers(scalars, reg.terms(key) if key else _NO_TERMS)
                entry = Entry(param, view, there.numbers[key])
                entry.stochastic = group["rounding"] == "stochastic"
                if group["master_weights"] and param.dtype.itemsize == 2:
                    entry.copy, entry.param = param, self._master(param)
                    there.masters = True
                there.entries.append(entry)
                work.append((rule, reg.penalty, entry, grad))
            groups.append(there)
        return _Planned(plan.Plan(work), groups)

    def _renew(self, planned: _Planned, params: list[list[Tensor]], grads: list[Tensor]) -> bool:
        """Fit the last step's batches to this one; return False if they cannot be."""
        if list(map(len, params)) != [len(group.params) for group in planned.groups]:
            return False
        if not planned.batches.renew([*chain(*params)], grads):
            return False
        for there in planned.with_state:
            if there.masters:
                pairs = zip(there.params, there.entries, strict=True)
                if any(e.copy is p and self._master_of(p) is not e.param for p, e in pairs):
                    return False
        now = chain.from_iterable(map(dict.values, self.param_groups))
        same_size = sum(map(len, self.param_groups)) == len(planned.settled)
        if same_size and all(map(is_, planned.settled, now)):  # of all: there may be hundreds
            return True
        renewed = False
        for group, there in zip(self.param_groups, planned.groups, strict=True):
            changed = there.seen.follow(group)
            if not any(changed):
                continue
            only_lr = not changed.regularizer and not changed.rule
            if not only_lr and of_structure(group) != there.structure:
                return False
            if changed.rule:
                rule, there.scalars = self._rule(group)
                if rule != there.rule:
                    return False
            else:
                there.scalars = {**there.scalars, "lr": number_or_tensor("lr", group["lr"])}
            if changed.regularizer:
                there.reg = check_group(group)
                for view, numbers in there.numbers.items():
                    if view is not None:
                        numbers.terms = there.reg.terms(view)
            else:
                there.reg.check_step("lr", there.scalars["lr"])
            for numbers in there.numbers.values():
                numbers.scalars = there.scalars
            renewed = True
        planned.settle()
        if renewed:
            planned.batches.forget_numbers()
        return True

    def _lacks_state(self, planned: _Planned) -> bool:
        """Raise if there is state that does not fit; return whether some is missing altogether.

        Groups whose state is not the last step's lose their `kinds`.
        """
        missing = False
        state = _flat_state(self.state) if planned.with_state else []
        same = len(state) == len(planned.state) and all(map(is_, state, planned.state))
        for group in planned.with_state:
            if same and group.kinds is not None and group.kinds.hold(group.state):
                continue
            group.kinds = None
            for param in group.params:
                of_param = self.state.get(param, {})
                there = [name for name in group.names if of_param.get(name) is not None]
                for name in there:
                    check_state(name, of_param[name], param, name in group.rule.counters)
                check_none_is_lost(group.names, there)
                missing = missing or len(there) < len(group.names)
        return missing

    def _attach_state(self, planned: _Planned) -> bool:
        """Give each entry its state; return whether scalars of it are for this step alone."""
        only_now = renewed = False
        for group in planned.with_state:
            names = group.names
            if group.kinds is not None:  # it has it
                if group.masters:
                    self._follow(group)
                continue
            for param, entry in zip(group.params, group.entries, strict=True):
                first = self._start(param, group.rule) if names else {}
                of_param = self.state[param]
                # Loaded, replaced, or the parameter's own layout or dtype has changed.
                for name in group.rule.state:
                    wide = of_param[name].to(state_dtype(param.dtype))
                    of_param[name] = laid_out_like(param, wide)
                for name in group.rule.counters:
                    device = param.device if group.rule.capturable else "cpu"
                    dtype = torch.promote_types(of_param[name].dtype, COUNTER)
                    if group.rule.capturable:  # the kernels read and write it
                        dtype = COUNTER
                    of_param[name] = of_param[name].to(device, dtype)
                if entry.copy is not None:
                    of_param[_MASTER] = entry.param
                entry.state = {name: of_param[name] for name in names}
                if first:
                    entry.numbers = Numbers({**entry.scalars, **first}, entry.terms)
                only_now = only_now or bool(first)
            group.state = [tensor for p in group.params for tensor in self.state[p].values()]
            group.kinds = plan.Kinds(group.state)
            if group.masters:
                self._follow(group)
            planned.batches.forget_numbers(state_too=True)
            renewed = True
        if renewed:
            planned.state = _flat_state(self.state)
        return only_now

    def _master(self, param: Tensor) -> Tensor:
        """Return the float32 master of a 16-bit parameter, new if the state has none for it."""
        master = self._master_of(param)
        if master is not None:
            check_state(_MASTER, master, param)
        return laid_out_like(param, (param if master is None else master).to(torch.float32))

    def _master_of(self, param: Tensor) -> Any:
        return self.state[param].get(_MASTER) if param in self.state else None

    def _follow(self, group: _PlannedGroup) -> None:
        """Let masters follow parameters that something else than a step has written to."""
        for entry in group.entries:
            if entry.copy is None:
                continue
            version = _version(entry.copy)
            if version is None or version != self._versions.get(entry.copy):
                master = entry.param
                theirs = master.to(entry.copy.dtype) != entry.copy
                master.copy_(torch.where(theirs, entry.copy.to(master.dtype), master))

    def _rule(self, group: dict[str, Any]) -> tuple[Rule, dict[str, float | Tensor]]:
        """Return the update rule's variant and its scalars for one param group."""
        raise NotImplementedError

    def _start(self, param: Tensor, rule: Rule) -> dict[str, float]:
        """Create the state that `param` lacks; return the scalars that differ on its first step."""
        raise NotImplementedError


COUNTER = torch.float32  # of steps taken, at least

_MASTER = "master_param"

_NO_TERMS = Terms(0.0, 0.0, 1.0)

_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""torch's options that choose how a step runs, not what it does."""


@contextmanager
def _unchanged_if_refused(groups: Iterable[Any]) -> Iterator[None]:
    """Where what is inside raises, take back what it has filled into the user's param groups."""
    before = []
    for group in groups:
        if isinstance(group, dict):
            if isinstance(group.get("params"), Iterator):  # which can be read only once
                group["params"] = list(group["params"])
            before.append((group, dict(group)))
    try:
        yield
    except BaseException:
        for group, old in before:
            group.clear()
            group.update(old)
        raise


def _sets_own_lam(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Return whether a param group sets lam, and not to the default."""
    own, default = group.get("lam", defaults["lam"]), defaults["lam"]
    return own is not default and (isinstance(own, Tensor) or own != default)


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Return whether Adam's `step` lies where the parameters do; torch's rule."""
    return bool(group.get("capturable") or group.get("fused"))


def _remember(optimizer: Any, checkpoint: dict[str, Any]) -> None:
    optimizer._loading = checkpoint, [dict(group) for group in optimizer.param_groups]


def _flat_state(state: Mapping[Tensor, Mapping[str, Any]]) -> list[Any]:
    """Return an optimizer's parameters that have state, then all of that; hashes no tensor."""
    return [*state, *chain.from_iterable(map(methodcaller("values"), state.values()))]


def _version(param: Tensor) -> int | None:
    """Return how often autograd has seen the tensor written to; None where it does not look."""
    return None if param.is_inference() else param._version
