"""The optimizers: torch.optim's options, state and checkpoints, with a proximal step inside.

They subclass torch's own, so that schedulers, hooks, scalers and isinstance see what they know;
`Proximal` replaces the step. Here is what each adds: its update rule, and how its state begins.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tl1kernels.batch import SGD, Adam, Rule, state_dtype
from tl1kernels.penalties import number, number_or_tensor
from tl1kernels.proximal import COUNTER, Proximal, counts_on_device

_DOC = """torch.optim.{base} with a proximal step: connections and neurons become exact zeros.

    One step is torch's update with step size lr, then the threshold of lr * lam * mu on single
    weights, then the group shrinkage of lr * lam * (1 - mu) (Ma et al. 2019, eq. 22). The step
    size of the thresholds is lr for Adam too, without its preconditioner.

    Arguments are torch.optim.{base}'s, then, by keyword or as options of a param group:

    Args:
        lam: weight of the regularizer, >= 0; 0 is torch's optimizer.
        penalty: a name of `PENALTIES`, or None for groups alone.
        a: shape of the penalty, > 0; None for the penalty's own.
        mu: weight of the penalty's term, in [0, 1]; 1 - mu is the groups'. None: 1 without
            groups, 0 without a penalty, 1/2 with both (1 for "l1_minus_l2").
        group_by: which weights form a group, as in `prox`; "auto" unless given, None for no groups.
        group_weight: None, or "sqrt" to weigh a group by the square root of its size.
        min_ndim: tensors of fewer dims stay unregularized: 2 spares biases and norm scales. In
            a param group with a `lam` of its own, not the optimizer's, the default is 0: the group
            says what it wants.
        rounding: of bfloat16 parameters, "nearest" or "stochastic", which keeps on average what is
            too small a step for them; `torch.manual_seed` decides how, on every backend alike.
        master_weights: whether a 16-bit parameter follows a float32 master of it, which the step
            updates: state `master_param`. What others write to the parameter is taken over, unless
            they do so behind autograd's back, through `.data`.

    lr, lam, mu and a may change between steps. State is float32 or better, whatever the
    parameter's dtype, under torch's names: checkpoints go both ways. lr and lam may be tensors on
    the parameters' device: a step then takes the value that they have when it runs, and does not
    check it. `foreach` changes nothing. With `fused=True` a GradScaler leaves it to the step to
    unscale the gradients, which stay as they are, and to skip itself. `fused=True` and
    `capturable=True` keep Adam's `step` on the parameters' device, so that a CUDA graph can hold
    the step, after two outside it. `differentiable=True` is refused.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed. Nothing is
            changed then, neither by the constructor nor by `step`.
        RuntimeError: `step`, where a backend asked for by name cannot take it, or a CUDA graph
            captures what it cannot replay.
    """


def _described(cls: type[Proximal]) -> type[Proximal]:
    """Give an optimizer its docstring, and torch's signature followed by our options."""
    base = cls.__bases__[-1]
    ours = inspect.signature(Proximal.__init__).parameters.values()
    torchs = inspect.signature(base).parameters.values()
    keyword_only = [p for p in ours if p.kind is p.KEYWORD_ONLY]
    cls.__doc__ = _DOC.format(base=base.__name__)
    cls.__signature__ = inspect.Signature([*torchs, *keyword_only])  # type: ignore[attr-defined]
    return cls


@_described
class ProxSGD(Proximal, torch.optim.SGD):  # noqa: D101 (_described writes it)
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
class ProxAdam(Proximal, torch.optim.Adam):  # noqa: D101 (_described writes it)
    def _rule(self, group: dict[str, Any]) -> tuple[Rule, dict[str, float | Tensor]]:
        rule = Adam(
            amsgrad=bool(group["amsgrad"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
            capturable=counts_on_device(group),
        )
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        beta1, beta2 = (number("betas", beta) for beta in betas)
        scalars = {"beta1": beta1, "beta2": beta2, "eps": number("eps", group["eps"])}
        return rule, {**_rate_and_decay(group), **scalars}

    def _start(self, param: Tensor, rule: Rule) -> dict[str, float]:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=COUNTER, device="cpu")
        for name in rule.state:
            if name not in state:
                state[name] = _zeros_like(param)
        return {}


@_described
class ProxAdamW(ProxAdam, torch.optim.AdamW):  # noqa: D101 (_described writes it)
    pass


def _rate_and_decay(group: dict[str, Any]) -> dict[str, float | Tensor]:
    return {
        "lr": number_or_tensor("lr", group["lr"]),
        "weight_decay": number("weight_decay", group["weight_decay"]),
    }


def _zeros_like(param: Tensor) -> Tensor:
    return torch.zeros_like(
        param, dtype=state_dtype(param.dtype), memory_format=torch.preserve_format
    )
