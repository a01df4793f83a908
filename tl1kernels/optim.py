"""The optimizers: torch.optim's options, state and checkpoints, with a proximal step inside.

They subclass torch's own, so that schedulers, hooks, scalers and isinstance see what they know;
`step` alone is replaced: it checks everything, then hands the tensors to `plan`. No maths here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl1kernels import plan
from tl1kernels.batch import SGD, Adam, Entry, Rule, state_dtype
from tl1kernels.penalties import Regularizer, number, number_or_tensor
from tl1kernels.views import GroupBy, GroupView, laid_out_like, view_of

_DOC = """torch.optim.{base} with a proximal step: connections and neurons become exact zeros.

    One step is torch's update with step size lr, then the threshold of lr * lam * mu on single
    weights, then the group shrinkage of lr * lam * (1 - mu) (Ma et al. 2019, eq. 22). The step
    size of the thresholds is lr for Adam too, without its preconditioner.

    Arguments are torch.optim.{base}'s, then, by keyword or as options of a param group:

    Args:
        lam: weight of the regularizer, >= 0; 0 is torch's optimizer.
        penalty: elementwise penalty, a name of `PENALTIES`, or None for groups alone.
        a: shape of the penalty, > 0.
        mu: weight of the elementwise term, in [0, 1]; 1 - mu is the groups'. None: 1 without
            groups, 0 without a penalty, 1/2 with both.
        group_by: which weights form a group, as in `prox`; None for no groups.
        group_weight: None, or "sqrt" to weigh a group by the square root of its size.
        min_ndim: tensors of fewer dims stay unregularized: 2 spares biases and norm scales. In
            a param group that sets `lam` itself the default is 0: the group says what it wants.
        rounding: of bfloat16 parameters, "nearest" or "stochastic", which keeps on average what is
            too small a step for them; its random numbers are those of `torch.manual_seed`.

    lr, lam, mu and a may change between steps. State is float32 or better, whatever the
    parameter's dtype, under torch's names: checkpoints go both ways. lr and lam may be tensors on
    the parameters' device: a step then takes the value that they have when it runs, and does not
    check it. `foreach` is accepted and changes nothing. With `fused=True` a GradScaler leaves it
    to the step to unscale the gradients, which stay as they are, and to skip itself.
    `capturable=True` keeps Adam's `step` on the parameters' device, so that a CUDA graph can hold
    the step, after two outside it. `differentiable=True` is refused.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed. Nothing is
            changed then, neither by the constructor nor by `step`.
    """


class _PlannedGroup(NamedTuple):
    """What a param group's part of a step was made for."""

    rule: Rule
    penalties: list[str | None]  # None for a tensor that is spared
    entries: list[Entry]


class _Planned(NamedTuple):
    """A step's batches, and the options and param groups that they were made for."""

    batches: plan.Plan
    options: list[tuple[Any, ...]]
    groups: list[_PlannedGroup]


class _Proximal(torch.optim.Optimizer):
    """What the optimizers share; it stands before torch's class in their bases."""

    _loading: tuple[dict[str, Any], list[dict[str, Any]]]
    _planned: _Planned | None = None  # of the last step

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        lam: float | Tensor = 0.0,
        penalty: str | None = "tl1",
        a: float | Tensor = 1.0,
        mu: float | Tensor | None = None,
        group_by: GroupBy = "auto",
        group_weight: str | None = None,
        min_ndim: int = 2,
        rounding: str = "nearest",
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
        }
        # torch's choice between implementations.
        kwargs.pop("foreach", None)
        self._step_supports_amp_scaling = bool(kwargs.pop("fused", None))
        super().__init__(params, *args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see `torch.optim.Optimizer.add_param_group`."""
        self.defaults.update(self.__dict__.pop("_options", {}))
        if isinstance(param_group, dict) and "lam" in param_group:
            param_group.setdefault("min_ndim", 0)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except BaseException:
            del self.param_groups[-1]
            raise
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
                        on_cpu = scalar and not group.get("capturable")
                        device = torch.device("cpu") if on_cpu else param.device
                        self.state[param][name] = value.to(device, dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one proximal step; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [[p for p in g["params"] if p.grad is not None] for g in self.param_groups]
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # a GradScaler's
        first = found_inf is not None and any(p not in self.state for ps in params for p in ps)
        if first and found_inf is not None and found_inf.item():
            return loss  # a first step that is skipped leaves no state: the next one is the first
        of_group = itemgetter(*self.defaults)
        options = [of_group(group) for group in self.param_groups]
        planned = self._planned
        self._planned = None  # until its step has gone well
        # Whatever can be refused is refused before any state or weight is touched.
        if planned is None or not self._renew(planned, params, options):
            planned = self._plan(params, options)
        only_now = self._attach_state(planned)
        planned.batches.execute(getattr(self, "grad_scale", None), found_inf)
        self._planned = None if only_now else planned
        return loss

    def _plan(self, params: list[list[Tensor]], options: list[tuple[Any, ...]]) -> _Planned:
        """Check everything and prepare the batches of a step."""
        work: list[tuple[Rule, str | None, Entry]] = []
        groups = []
        for group, with_grad in zip(self.param_groups, params, strict=True):
            regularized = _check_group(group, with_grad)
            rule, scalars = self._rule(group)
            entries = []
            for param, (reg, view) in zip(with_grad, regularized, strict=True):
                assert param.grad is not None
                entry = Entry(param, param.grad, view, scalars, reg.terms(view))
                entry.stochastic = group["rounding"] == "stochastic"
                entries.append(entry)
                work.append((rule, reg.penalty, entries[-1]))
            penalties = [reg.penalty for reg, _ in regularized]
            groups.append(_PlannedGroup(rule, penalties, entries))
        return _Planned(plan.Plan(work), [_plain(values) for values in options], groups)

    def _renew(
        self, planned: _Planned, params: list[list[Tensor]], options: list[tuple[Any, ...]]
    ) -> bool:
        """Fit the last step's batches to this one; return False if they cannot be."""
        if [len(with_grad) for with_grad in params] != [len(g.entries) for g in planned.groups]:
            return False
        if not planned.batches.renew([param for with_grad in params for param in with_grad]):
            return False
        for i, (group, there, new) in enumerate(
            zip(self.param_groups, planned.groups, options, strict=True)
        ):
            if _equal(planned.options[i], new):
                continue
            regularized = _check_group(group, [entry.param for entry in there.entries])
            rule, scalars = self._rule(group)
            if rule != there.rule or [reg.penalty for reg, _ in regularized] != there.penalties:
                return False
            for entry, (reg, view) in zip(there.entries, regularized, strict=True):
                if view != entry.view or entry.stochastic != (group["rounding"] == "stochastic"):
                    return False
                entry.scalars, entry.terms = scalars, reg.terms(view)
            planned.options[i] = _plain(new)
            planned.batches.forget_tables()
        return True

    def _attach_state(self, planned: _Planned) -> bool:
        """Give each entry its state; return whether scalars of it are for this step alone."""
        only_now = False
        for group in planned.groups:
            names = (*group.rule.state, *group.rule.counters)
            for entry in group.entries:
                if not names:
                    continue
                param, state = entry.param, self.state[entry.param]
                if entry.state and all(
                    state.get(name) is tensor
                    and (tensor.ndim == 0 or tensor.stride() == param.stride())
                    for name, tensor in entry.state.items()
                ):
                    continue
                first = self._start(param, group.rule)
                # Loaded, replaced, or the parameter's own layout or dtype has changed.
                for name in group.rule.state:
                    wide = state[name].to(state_dtype(param.dtype))
                    state[name] = laid_out_like(param, wide)
                for name in group.rule.counters:
                    device = param.device if group.rule.capturable else "cpu"
                    dtype = torch.promote_types(state[name].dtype, _COUNTER)
                    if group.rule.capturable:  # the kernels read and write it
                        dtype = _COUNTER
                    state[name] = state[name].to(device, dtype)
                entry.state = {name: state[name] for name in names}
                entry.scalars = {**entry.scalars, **first}
                only_now = only_now or bool(first)
                planned.batches.forget_tables()
        return only_now

    def _rule(self, group: dict[str, Any]) -> tuple[Rule, dict[str, float | Tensor]]:
        """Return the update rule's variant and its scalars for one param group."""
        raise NotImplementedError

    def _start(self, param: Tensor, rule: Rule) -> dict[str, float]:
        """Create the state that `param` lacks; return the scalars that differ on its first step."""
        raise NotImplementedError


_COUNTER = torch.float32  # of steps taken, at least

_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""torch's options that choose how a step runs, not what it does."""


def _remember(optimizer: Any, checkpoint: dict[str, Any]) -> None:
    optimizer._loading = checkpoint, [dict(group) for group in optimizer.param_groups]


def _described(cls: type[_Proximal]) -> type[_Proximal]:
    """Give an optimizer its docstring, and torch's signature followed by our options."""
    base = cls.__bases__[-1]
    ours = inspect.signature(_Proximal.__init__).parameters.values()
    torchs = inspect.signature(base).parameters.values()
    keyword_only = [p for p in ours if p.kind is p.KEYWORD_ONLY]
    cls.__doc__ = _DOC.format(base=base.__name__)
    cls.__signature__ = inspect.Signature([*torchs, *keyword_only])  # type: ignore[attr-defined]
    return cls


@_described
class ProxSGD(_Proximal, torch.optim.SGD):  # noqa: D101 (_described writes it)
    def _rule(self, group: dict[str, Any]) -> tuple[Rule, dict[str, float | Tensor]]:
        rule = SGD(group["momentum"] != 0, bool(group["nesterov"]), bool(group["maximize"]))
        scalars = {name: number(name, group[name]) for name in ("momentum", "dampening")}
        return rule, {**_rate_and_decay(group), **scalars}

    def _start(self, param: Tensor, rule: Rule) -> dict[str, float]:
        state = self.state[param]
        if state.get("momentum_buffer") is not None:
            return {}
        state["momentum_buffer"] = _zeros_like(param)
        return {"dampening": 0.0}  # torch starts the buffer as the gradient itself


@_described
class ProxAdam(_Proximal, torch.optim.Adam):  # noqa: D101 (_described writes it)
    def _rule(self, group: dict[str, Any]) -> tuple[Rule, dict[str, float | Tensor]]:
        rule = Adam(
            amsgrad=bool(group["amsgrad"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
            capturable=bool(group["capturable"]),
        )
        beta1, beta2 = (number("betas", beta) for beta in group["betas"])
        scalars = {"beta1": beta1, "beta2": beta2, "eps": number("eps", group["eps"])}
        return rule, {**_rate_and_decay(group), **scalars}

    def _start(self, param: Tensor, rule: Rule) -> dict[str, float]:
        state = self.state[param]
        if "step" not in state:
            device = param.device if rule.capturable else "cpu"
            state["step"] = torch.zeros((), dtype=_COUNTER, device=device)
        for name in rule.state:
            if name not in state:
                state[name] = _zeros_like(param)
        return {}


@_described
class ProxAdamW(ProxAdam, torch.optim.AdamW):  # noqa: D101 (_described writes it)
    pass


def _check_group(
    group: dict[str, Any], params: list[Tensor] | None = None
) -> list[tuple[Regularizer, GroupView]]:
    """Check a param group's options and `params` (default: all); return what regularizes each."""
    if group.get("differentiable"):
        raise ValueError(f"differentiable must be False, got {group['differentiable']!r}")
    min_ndim = group["min_ndim"]
    if not isinstance(min_ndim, int) or isinstance(min_ndim, bool) or min_ndim < 0:
        raise ValueError(f"min_ndim must be an int >= 0, got {min_ndim!r}")
    if group["rounding"] not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {group['rounding']!r}")
    reg = Regularizer.of(group)
    reg.check_step("lr", number_or_tensor("lr", group["lr"]))
    spared = Regularizer(penalty=reg.penalty)  # lam = 0: the same batch as the others
    regularized = []
    for param in group["params"] if params is None else params:
        plan.check_tensor("params", param)
        if params is not None and param.grad is not None:
            plan.check_tensor("grad", param.grad)
        here = reg if param.ndim >= min_ndim else spared
        regularized.append((here, view_of(param, here.group_by)))
    return regularized


def _equal(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    """Return whether options are what they were, given as `_plain` and as they are."""
    try:
        return old == new
    except RuntimeError:  # a tensor of several elements, which _check_group will name
        return False


class _Itself:
    """Equal to one tensor, and to nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return other is self._tensor


def _plain(option: Any) -> Any:
    """Return an option as something that compares by value: a tensor may change in place.

    One on a device is not read: whoever uses it looks at its value anew.
    """
    if isinstance(option, Tensor) and option.device.type not in ("cpu", "meta"):
        return _Itself(option)
    if isinstance(option, Tensor):
        return option.item() if option.numel() == 1 else option
    return tuple(map(_plain, option)) if isinstance(option, (tuple, list)) else option


def _rate_and_decay(group: dict[str, Any]) -> dict[str, float | Tensor]:
    return {
        "lr": number_or_tensor("lr", group["lr"]),
        "weight_decay": number("weight_decay", group["weight_decay"]),
    }


def _zeros_like(param: Tensor) -> Tensor:
    return torch.zeros_like(
        param, dtype=state_dtype(param.dtype), memory_format=torch.preserve_format
    )
