"""The truth: one step in plain torch, float64 inside, one rounding at the end.

Read it from the top: update rules, thresholds, proximal operators, and `run`, which puts them
together. It is written for the reader and the test, not for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tl1kernels.batch import SGD, Adam, Batch, Entry, Rule, host_numbers
from tl1kernels.penalties import Terms

Scalars = Mapping[str, float]
State = dict[str, Tensor]


def unavailable() -> str | None:
    """Return None: the reference runs wherever torch does."""
    return None


def rejects(batch: Batch) -> str | None:
    """Return why not: only devices without float64 are refused."""
    return f"{batch.device} has no float64" if batch.device.type == "mps" else None


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
    if isinstance(rule, SGD):
        return sgd(rule, p, g, state, s)
    if isinstance(rule, Adam):
        return adam(rule, p, g, state, s)
    return g  # Assign


# --- Thresholds: argmin over w of (w - v)^2 / 2 + step * weight * rho_a(w), elementwise.
# (|v|, step, weight, a) -> |w|, float64, any shape; step = eta, weight = lam * mu. A penalty
# whose prox depends on more than the product gets both. NaN in, NaN out.


def soft_threshold(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return l1's prox: max(0, |v| - step * weight)."""
    return (v - step * weight).clamp(min=0)


def tl1_threshold(tau: float, a: float) -> float:
    """Return the largest |v| that the TL1 prox maps to 0 (Zhang & Xin 2017, theorem 3.1).

    Below tau = a^2 / (2 (a + 1)) the prox is continuous there, above it jumps.
    """
    if 2 * tau * (1 + 1 / a) <= a:
        return tau * (1 + 1 / a)
    return math.sqrt(2 * tau) * math.sqrt(a + 1) - a / 2


def tl1(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return TL1's prox: the largest root of (w - |v|) (a + w)^2 + tau a (a + 1) = 0, or 0.

    The published closed form subtracts terms of the order of a. With a + w = (a + |v|) r and
    d = tau a (a + 1) / (a + |v|)^2 the cubic becomes r^3 - r^2 + (4/27) q = 0 for
    q = (27/4) d / (a + |v|); its largest root, in [2/3, 1], is (1 + 2 cos(phi / 3)) / 3 with
    sin(phi / 2) = sqrt(q). Then w = |v| - d / r^2 loses nothing and overflows for no a.
    """
    tau = step * weight
    d = tau * ((a + 1) / (a + v)) * (a / (a + v))
    q = (6.75 * d / (a + v)).clamp(max=1)  # rounding must not push a double root over the edge
    r = (1 + 2 * torch.cos(torch.asin(q.sqrt()) * (2 / 3))) / 3
    return torch.where(v <= tl1_threshold(tau, a), 0.0, v - d / r.square())


def hard_threshold(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return l0's prox: |v| beyond sqrt(2 step weight) (Blumensath & Davies 2008)."""
    return torch.where(v <= math.sqrt(2 * step * weight), 0.0, v)


def scad(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return SCAD's prox for a > 1 + step (Fan & Li 2001): soft, then steeper, then none."""
    middle = (v - step * weight * (a / (a - 1))) * ((a - 1) / (a - 1 - step))
    beyond = torch.where(v <= a * weight, middle, v)
    return torch.where(v <= weight * (1 + step), soft_threshold(v, step, weight, a), beyond)


def firm_threshold(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return MCP's prox for a > step (Zhang 2010): a steeper soft threshold, then none."""
    inner = soft_threshold(v, step, weight, a) * (a / (a - step))
    return torch.where(v <= a * weight, inner, v)


def capped_l1(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return capped l1's prox: the better of the soft threshold and v itself (Zhang 2009)."""
    tau = step * weight
    if a < tau / 2:
        return torch.where(v <= math.sqrt(2 * tau * a), 0.0, v)
    return torch.where(v <= a + tau / 2, soft_threshold(v, step, weight, a), v)


def log_threshold(tau: float, a: float) -> float:
    """Return the largest |v| that the log penalty's prox maps to 0; tau = step weight / log(a + 1).

    Up to a^2 tau = 1 the prox is continuous there. Beyond, it jumps to the w where both are as
    good: with x = a w that is 2 (log(1 + x) - x / (1 + x)) / x^2 = 1 / (a^2 tau), which falls.
    """
    k = a * a * tau
    if k <= 1:
        return a * tau
    low, high = 1e-9, 2 * k + 10
    for _ in range(64):
        x = math.sqrt(low) * math.sqrt(high)
        alive = 2 * (math.log1p(x) - x / (1 + x)) * k > x * x
        low, high = (x, high) if alive else (low, x)
    return (x + k / (1 + x)) / a


def log_penalty(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return the log penalty's prox: the larger root of (w - v) (w + 1/a) + tau = 0, or 0."""
    a = min(max(a, 1e-100), 1e100)  # beyond that it is l0 or l1 to all digits
    tau = step * weight / math.log1p(a)
    s, r = v + 1 / a, 2 * math.sqrt(tau)
    root = ((s - r).clamp(min=0) * (s + r)).sqrt()
    w = (v - 2 * tau / (s + root)).clamp(min=0)
    return torch.where(v <= log_threshold(tau, a), 0.0, w)


def l_half(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return the prox of |w|^(1/2) (Xu et al. 2012): w = v r^2, r^3 - r + tau / (2 v^1.5) = 0."""
    tau = step * weight
    threshold = 1.5 * tau ** (2 / 3)
    cosine = -(27**0.5) / 4 * tau / v.clamp(min=threshold).pow(1.5)
    r = (torch.acos(cosine) / 3).cos() * (2 / math.sqrt(3))
    return torch.where(v <= threshold, 0.0, v * r.square() if tau > 0 else v)


def l_two_thirds(v: Tensor, step: float, weight: float, a: float) -> Tensor:
    """Return the prox of |w|^(2/3): w = v r^3, r^4 - r + 2/3 tau / v^(4/3) = 0 (Cao et al. 2013).

    Newton's method falls to the largest root from r = 1, and there the slope is 1 or more.
    """
    tau = step * weight
    threshold = 2 * (tau * (2 / 3)) ** 0.75
    k = (2 / 3) * tau / v.clamp(min=threshold).pow(4 / 3)
    r = torch.ones_like(v)
    for _ in range(8):
        r = r - (r.pow(4) - r + k) / (4 * r.pow(3) - 1)
    return torch.where(v <= threshold, 0.0, v * r.pow(3) if tau > 0 else v)


# --- Proximal operators: (v, step, terms) -> w on (blocks, outer, groups, inner) tensors, where
# v[b, :, g, :] is a group. A penalty that is elementwise is a threshold, then group shrinkage;
# one that couples a group's weights is its own function of the same signature.

Prox = Callable[[Tensor, float, Terms], Tensor]


def group_norms(t: Tensor) -> Tensor:
    """Return ||t_g||_2 for every group g, (blocks, 1, groups, 1)."""
    # In units of the largest magnitude no square over- or underflows.
    largest = t.abs().amax(dim=(1, 3), keepdim=True)
    unit = torch.where((largest == 0) | largest.isinf(), 1.0, largest)
    return unit * (t / unit).square().sum(dim=(1, 3), keepdim=True).sqrt()


def shrink_groups(t: Tensor, tau: float) -> Tensor:
    """Return t_g * max(0, 1 - tau / ||t_g||_2) for every group g, 0 where the norm is 0."""
    norms = group_norms(t)
    # `<=` first, so that a norm of 0 is never divided by, and a NaN stays NaN.
    return t * torch.where(norms <= tau, 0.0, 1 - tau / norms)


def grouped(prox: Prox) -> Prox:
    """Return a prox, then group shrinkage."""

    def both(v: Tensor, step: float, terms: Terms) -> Tensor:
        t = prox(v, step, terms)
        return shrink_groups(t, step * terms.group) if step * terms.group > 0 else t

    return both


def thresholded(threshold: Callable[[Tensor, float, float, float], Tensor] | None) -> Prox:
    """Return the last two lines of eq. 22: a threshold (None for none), then group shrinkage."""

    def prox(v: Tensor, step: float, terms: Terms) -> Tensor:
        if threshold is None:
            return v
        return threshold(v.abs(), step, terms.elementwise, terms.a).copysign(v)

    return grouped(prox)


def l1_minus_l2(v: Tensor, step: float, terms: Terms) -> Tensor:
    """Return the prox of ||w_g||_1 - ||w_g||_2 (Lou & Yan 2018, alpha = 1).

    A soft threshold at tau, and the group scaled up to its norm + tau. Where nothing is beyond the
    threshold, the largest weight (of equal ones the first in memory) stays as it is, and alone.
    """
    tau = step * terms.elementwise
    if tau == 0:
        return v
    size = v.abs()
    soft = (size - tau).clamp(min=0)
    norms = group_norms(soft)
    flat = size.permute(0, 2, 1, 3).flatten(2)
    first = torch.zeros_like(flat).scatter_(2, flat.argmax(2, keepdim=True), 1.0)
    blocks, outer, groups, inner = v.shape
    first = first.reshape(blocks, groups, outer, inner).permute(0, 2, 1, 3)
    grown = soft * (1 + tau / torch.where(norms == 0, 1.0, norms))
    return torch.where(size.amax(dim=(1, 3), keepdim=True) <= tau, first * size, grown).copysign(v)


def exclusive(v: Tensor, step: float, terms: Terms) -> Tensor:
    """Return the prox of ||w_g||_1^2 / 2: a soft threshold at tau ||w_g||_1.

    That is the largest of tau S_k / (1 + tau k), S_k the sum of the group's k largest magnitudes.
    """
    if (tau := step * terms.elementwise) == 0:
        return v
    size = v.abs()
    falling = size.permute(0, 2, 1, 3).flatten(2).sort(dim=2, descending=True).values
    k = torch.arange(1, falling.shape[2] + 1, dtype=v.dtype, device=v.device)
    cuts = (tau * falling.cumsum(2) / (1 + tau * k)).amax(2)
    return (size - cuts[:, None, :, None]).clamp(min=0).copysign(v)


def cges(v: Tensor, step: float, terms: Terms) -> Tensor:
    """Return the step of combined group and exclusive sparsity, as its authors' code takes it.

    Yoon & Hwang 2017: groups shrink first; then a soft threshold at tau ||w_g||_1 with the norm
    that the shrunk group had before, where the prox of ||w_g||_1^2 / 2 has the norm after it.
    """
    w = shrink_groups(v, step * terms.group) if step * terms.group > 0 else v
    if (tau := step * terms.elementwise) == 0:
        return w
    size = w.abs()
    cut = tau * size.sum(dim=(1, 3), keepdim=True)
    return (size - cut).clamp(min=0).copysign(v)


PROX: dict[str | None, Prox] = {
    None: thresholded(None),
    "l1": thresholded(soft_threshold),
    "tl1": thresholded(tl1),
    "l0": thresholded(hard_threshold),
    "scad": thresholded(scad),
    "mcp": thresholded(firm_threshold),
    "log": thresholded(log_penalty),
    "capped_l1": thresholded(capped_l1),
    "l_half": thresholded(l_half),
    "l_two_thirds": thresholded(l_two_thirds),
    "l1_minus_l2": grouped(l1_minus_l2),
    "exclusive": grouped(exclusive),
    "cges": cges,
}


def penalties() -> frozenset[str]:
    """Return the names of the penalties: all."""
    return frozenset(filter(None, PROX))


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    if batch.found_inf is not None and batch.found_inf.item():
        return
    scale = 1.0 if batch.grad_scale is None else batch.grad_scale.item()
    for i, (entry, grad) in enumerate(zip(batch.entries, batch.grads, strict=True)):
        key = None if batch.seed is None else random_key(batch.seed, i)
        _run_entry(batch.rule, batch.penalty, entry, grad.to(torch.float64) / scale, key)


def _run_entry(
    rule: Rule, penalty: str | None, entry: Entry, gradient: Tensor, key: RandomKey | None
) -> None:
    p, view, (scalars, terms) = entry.param, entry.view, host_numbers(entry)
    state = {name: entry.state[name].to(torch.float64, copy=True) for name in entry.state}
    w = _updated(rule, p.to(torch.float64), gradient, state, scalars)
    regularized = terms.elementwise > 0 or terms.group > 0
    if regularized and w.numel() > 0:
        w = view.join(PROX[penalty](view.split(w), scalars["lr"], terms), p.shape)
    for name, stored in entry.state.items():
        stored.copy_(state[name])
    if key is not None:
        p.copy_(_cut_off_by_chance(w, random_bits(key, places(p))))
    else:
        p.copy_(_to_odd(w) if p.element_size() == 2 else w)
    if regularized:
        p.add_(0.0)  # -0.0 + 0.0 = +0.0: a dead weight has one bit pattern
    if entry.copy is not None:
        entry.copy.copy_(p)
        if regularized:
            entry.copy.add_(0.0)


def _to_odd(w: Tensor) -> Tensor:
    """Return float64 `w` as float32, inexact values to the neighbour with an odd last bit.

    torch converts float64 to a 16-bit dtype by way of float32. Rounding twice to nearest can
    miss the nearest; rounding to odd first cannot (Boldo & Melquiond 2008).
    """
    nearest = w.to(torch.float32)
    bits = nearest.view(torch.int32)
    bits = torch.where(nearest.to(torch.float64).abs() > w.abs(), bits - 1, bits)  # towards zero
    return torch.where(nearest.to(torch.float64) != w, bits | 1, bits).view(torch.float32)


def _cut_off_by_chance(w: Tensor, random: Tensor) -> Tensor:
    """Return float64 `w` as float32 on one of its two bfloat16 neighbours, unbiased.

    16 random bits are added to the 16 that bfloat16 lacks: a carry comes with a probability of
    their share of the distance.
    """
    narrow = w.to(torch.float32)
    bits = (narrow.view(torch.int32) + random.to(torch.int32)) & -(1 << 16)
    return torch.where(narrow.isfinite(), bits.view(torch.float32), narrow)


RandomKey = tuple[int, int]
_32_BITS = (1 << 32) - 1


def _mixed(h: int) -> int:
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _32_BITS
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _32_BITS
    return h ^ (h >> 16)


def random_key(seed: int, tensor: int) -> RandomKey:
    """Return the key of a step's `tensor`-th tensor: see csrc/random.h."""
    first, second = seed & _32_BITS, seed >> 32 & _32_BITS
    low = _mixed((_mixed(second) + first + tensor) & _32_BITS)
    return low, _mixed((_mixed(low) + second) & _32_BITS)


def random_bits(key: RandomKey, place: Tensor) -> Tensor:
    """Return 16 bits for each place, int64: see csrc/random.h."""
    h = ((place & _32_BITS) * 0x85EBCA6B + key[0]) & _32_BITS
    return ((h ^ (h >> 13) ^ key[1]) * 0xC2B2AE35 & _32_BITS) >> 16


def places(p: Tensor) -> Tensor:
    """Return each weight's place in memory, int64, counted from a dense tensor's first."""
    return torch.arange(p.numel(), device=p.device).as_strided(p.shape, p.stride())
