"""The truth: one step in plain torch, float64 inside, one rounding at the end.

Read it from the top: update rules, elementwise proximal operators, group shrinkage, and `run`,
which puts them together. It is written for the reader and the test, not for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tl1kernels.batch import SGD, Adam, Assign, Batch, Entry, Rule
from tl1kernels.penalties import Regularizer
from tl1kernels.views import GroupView

Scalars = Mapping[str, float]
State = dict[str, Tensor]


def unavailable() -> str | None:
    """Return None: the reference runs wherever torch does."""
    return None


def rejects(batch: Batch) -> str | None:
    """Return None: the reference takes every batch."""
    return None


# --- Update rules: (p, g, state, scalars) -> v. float64 tensors; `state` is updated in place.
# The operations and their order are those of torch.optim's single-tensor code, so that float64
# parameters agree with it to the last bit.


def sgd(rule: SGD, p: Tensor, g: Tensor, state: State, s: Scalars) -> Tensor:
    """Return p after SGD with momentum, dampening, Nesterov momentum and weight decay."""
    if rule.maximize:
        g = -g
    if s["weight_decay"] != 0:
        g = g.add(p, alpha=s["weight_decay"])
    if rule.momentum:
        buffer = state["momentum_buffer"]
        buffer.mul_(s["momentum"]).add_(g, alpha=1 - s["dampening"])
        g = g.add(buffer, alpha=s["momentum"]) if rule.nesterov else buffer
    return p.add(g, alpha=-s["lr"])


def adam(rule: Adam, p: Tensor, g: Tensor, state: State, s: Scalars) -> Tensor:
    """Return p after Adam (weight decay in the gradient) or AdamW (decoupled), with AMSGrad."""
    state["step"] += 1
    step = state["step"].item()
    if rule.maximize:
        g = -g
    if s["weight_decay"] != 0:
        if rule.decoupled:
            p = p.mul(1 - s["lr"] * s["weight_decay"])
        else:
            g = g.add(p, alpha=s["weight_decay"])
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(g, 1 - s["beta1"])
    exp_avg_sq.mul_(s["beta2"]).addcmul_(g, g, value=1 - s["beta2"])
    if rule.amsgrad:
        exp_avg_sq = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq, out=state["max_exp_avg_sq"])
    step_size = s["lr"] / (1 - s["beta1"] ** step)
    denominator = (exp_avg_sq.sqrt() / (1 - s["beta2"] ** step) ** 0.5).add_(s["eps"])
    return p.addcdiv(exp_avg, denominator, value=-step_size)


def _updated(rule: Rule, p: Tensor, g: Tensor, state: State, s: Scalars) -> Tensor:
    if isinstance(rule, Assign):
        return g
    return sgd(rule, p, g, state, s) if isinstance(rule, SGD) else adam(rule, p, g, state, s)


# --- Elementwise proximal operators: argmin over w of (w - v)^2 / 2 + step * weight * rho_a(w).
# (|v|, step, weight, a) -> |w|, float64, any shape; step = eta, weight = lam * mu. A penalty
# whose prox depends on more than the product gets both. NaN in, NaN out.


def prox_l1(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return the soft threshold, max(0, |v| - step * weight)."""
    return (v - step * weight).clamp(min=0)


def tl1_threshold(tau: float, a: float) -> float:
    """Return the largest |v| that the TL1 prox maps to 0 (Zhang & Xin 2017, theorem 3.1).

    Below tau = a^2 / (2 (a + 1)) the prox is continuous there, above it jumps.
    """
    if tau * 2 * (a + 1) <= a * a:
        return tau * (a + 1) / a
    return math.sqrt(2 * tau * (a + 1)) - a / 2


def prox_tl1(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return TL1's prox: the largest root of (w - |v|) (a + w)^2 + tau a (a + 1) = 0, or 0.

    The published closed form subtracts terms of the order of a. With a + w = (a + |v|) r and
    d = tau a (a + 1) / (a + |v|)^2 the cubic becomes r^3 - r^2 + (4/27) q = 0 for
    q = (27/4) d / (a + |v|); its largest root, in [2/3, 1], is (1 + 2 cos(phi / 3)) / 3 with
    sin(phi / 2) = sqrt(q). Then w = |v| - d / r^2 loses nothing and overflows for no a.
    """
    tau = step * weight
    d = tau * ((a + 1) / (a + v)) * (a / (a + v))
    q = (6.75 * d / (a + v)).clamp(max=1)
    r = (1 + 2 * torch.cos(torch.asin(q.sqrt()) * (2 / 3))) / 3
    w = (v - d / r.square()).clamp(min=0)  # rounding must not push it below a threshold of 0
    return torch.where(v <= tl1_threshold(tau, a), 0.0, w)


PROX: Mapping[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "l1": prox_l1,
    "tl1": prox_tl1,
}


# --- Groups.


def group_norms(t: Tensor, view: GroupView) -> Tensor:
    """Return the groups' l2 norms, shape (blocks, 1, groups, 1), for `t` of any shape."""
    return view.split(t).square().sum(dim=(1, 3), keepdim=True).sqrt()


def shrink_groups(t: Tensor, view: GroupView, tau: float) -> Tensor:
    """Return t_g * max(0, 1 - tau / ||t_g||_2) for every group g, 0 where the norm is 0."""
    norms = group_norms(t, view)
    # `<=` first, so that a norm of 0 with tau = 0 is not 0/0 and a NaN stays NaN.
    factors = torch.where(norms <= tau, 0.0, 1 - tau / norms)
    return view.join(view.split(t) * factors, t.shape)


def prox(v: Tensor, view: GroupView, step: float, reg: Regularizer) -> Tensor:
    """Return the threshold, then the group shrinkage, of a float64 tensor: eq. 22's last lines."""
    elementwise, group = reg.weights(view)
    t = v
    if reg.penalty is not None:
        t = PROX[reg.penalty](v.abs(), step, elementwise, reg.a).copysign(v)
    if view.grouped:
        t = shrink_groups(t, view, step * group)
    return t


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    for entry in batch.entries:
        _run_entry(batch.rule, entry)


def _run_entry(rule: Rule, entry: Entry) -> None:
    p, g, reg = entry.param, entry.grad, entry.regularizer
    state = {name: entry.state[name].to(torch.float64, copy=True) for name in entry.state}
    w = _updated(rule, p.to(torch.float64), g.to(torch.float64), state, entry.scalars)
    if reg.lam > 0:
        w = prox(w, entry.view, entry.scalars["lr"], reg)
    for name, stored in entry.state.items():
        stored.copy_(state[name])
    p.copy_(w)
    if reg.lam > 0:
        p.add_(0.0)  # -0.0 + 0.0 = +0.0: a dead weight has one bit pattern
