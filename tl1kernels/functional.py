"""The regularizer without an optimizer: its proximal step and its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl1kernels import compiled, plan
from tl1kernels.batch import Assign, Entry, Numbers
from tl1kernels.penalties import PENALTIES, Options, Regularizer, number_or_tensor
from tl1kernels.views import GroupBy, view_of


def prox(
    v: Tensor,
    step: float | Tensor,
    *,
    lam: float | Tensor = 1.0,
    penalty: str | None = "tl1",
    a: float | Tensor | None = None,
    mu: float | Tensor | None = None,
    group_by: GroupBy = None,
    group_weight: str | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Threshold the weights, then shrink the groups: the last two lines of Ma et al. 2019, eq. 22.

        t   = prox of (step * lam * mu) * rho_a, elementwise
        w_g = t_g * max(0, 1 - step * lam * (1 - mu) * c_g / ||t_g||_2)

    For penalty="l1" this is the proximal operator of the sum of both terms; for "tl1" it is the
    paper's algorithm, which is not quite that of the sum. Weights that die are exactly +0.0.
    The result carries no gradient.

    Args:
        v: any shape; float32, float64, bfloat16 or float16.
        step: step size eta >= 0, finite; any, and without effect, where lam = 0.
        lam: weight of the regularizer, >= 0.
        penalty: elementwise penalty rho, a name of `PENALTIES`, or None for groups alone. Where
            `PENALTIES` says that it couples a group's weights, its own step takes the place of the
            threshold.
        a: shape of the penalty, > 0. For "tl1", a -> 0 tends to l0 and a -> inf to l1. None: the
            penalty's own (`PENALTIES`), 1 for "tl1". "scad" needs a > 1 + step, "mcp" a > step.
        mu: weight of the penalty's term, in [0, 1]; 1 - mu is the groups'. None: 1 without
            groups, 0 without a penalty, 1/2 with both (1 for "l1_minus_l2").
        group_by: "out" (dim 0), "in" (dim 1), "in_spatial" (dims 1 and up), "filter_slice"
            (dims 0 and 1), "layer" (all of `v`), an int dim, "auto" ("in" for matrices, "out"
            for more dims), or None for no groups.
        group_weight: None for c_g = 1, "sqrt" for the square root of the group's size.
        backend: a name of `tl1kernels.info().backends`; None for the preferred one of the device.
        out: where to write the result: shape, dtype and device of `v`, dense. May be `v`.

    Returns:
        `out`, or a new dense tensor like `v`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
        RuntimeError: the named backend cannot run, or cannot do this; `out` requires grad outside
            `torch.no_grad`, or is an inference tensor outside `torch.inference_mode`.
    """
    options = {"lam": lam, "penalty": penalty, "a": a, "mu": mu}
    options |= {"group_by": group_by, "group_weight": group_weight}
    if torch.compiler.is_compiling():
        return _in_graph(v, step, options, backend, out)
    plan.check_tensor("v", v)
    eta = number_or_tensor("step", step)
    reg = Regularizer.of(options)
    source = v.detach()
    if out is None:
        out = torch.empty_like(v, memory_format=torch.preserve_format, requires_grad=False)
    else:
        _check_out(out, v)
        if source.data_ptr() != out.data_ptr() and _share_memory(source, out):
            source = source.clone()  # what has been written would be read as v's
    view = view_of(out, group_by)
    reg.check_step("step", eta)
    entry = Entry(out, view, Numbers({"lr": eta}, reg.terms(view)))
    plan.execute(plan.prepare([(Assign(), penalty, entry, source)], backend))
    return out


def _in_graph(
    v: Tensor,
    step: float | Tensor,
    options: dict[str, Any],
    backend: str | None,
    out: Tensor | None,
) -> Tensor:
    """Put `prox` into torch.compile's graph, which takes it for an op."""
    source = None if out is v else v.detach()
    if out is None:
        out = torch.empty_like(v, memory_format=torch.preserve_format, requires_grad=False)
    # Of a product the compiler makes an input of the graph: another number compiles nothing anew.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    numbers = (
        value if value is None or isinstance(value, Tensor) else one * value
        for value in (step, *(options[name] for name in ("lam", "a", "mu")))
    )
    names = (
        None if name is None else str(name)
        for name in (options["penalty"], options["group_by"], options["group_weight"], backend)
    )
    torch.ops.tl1kernels.prox_(out, source, *numbers, *names)
    return out


def _run_in_graph(
    out: Tensor,
    v: Tensor | None,
    step: Tensor,
    lam: Tensor,
    a: Tensor | None,
    mu: Tensor | None,
    penalty: str | None,
    group_by: str | None,
    group_weight: str | None,
    backend: str | None,
) -> None:
    with torch.no_grad():
        prox(
            out if v is None else v,
            step,
            lam=lam,
            penalty=penalty,
            a=a,
            mu=mu,
            group_by=group_by if group_by is None or group_by.isidentifier() else int(group_by),
            group_weight=group_weight,
            backend=backend,
            out=out,
        )


compiled.define(
    "prox_(Tensor(a!) out, Tensor? v, Tensor step, Tensor lam, Tensor? a, Tensor? mu, "
    "str? penalty, str? group_by, str? group_weight, str? backend) -> ()",
    _run_in_graph,
)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether the storages overlap: NumPy's arrays come as storages of their own."""
    a_begin, b_begin = (x.untyped_storage().data_ptr() for x in (a, b))
    a_end, b_end = a_begin + a.untyped_storage().nbytes(), b_begin + b.untyped_storage().nbytes()
    return a_begin < b_end and b_begin < a_end


def prox_(v: Tensor, step: float | Tensor, **options: Unpack[Options]) -> Tensor:
    """Run `prox` in place; `v` must be dense. Options and errors are those of `prox`."""
    if "out" in options:
        raise TypeError("prox_ writes to v and takes no out")
    return prox(v, step, **options, out=v)


def _check_out(out: Tensor, v: Tensor) -> None:
    plan.check_tensor("out", out)
    for name in ("shape", "dtype", "device"):
        have, want = getattr(out, name), getattr(v, name)
        if have != want:
            raise ValueError(f"out must have the {name} of v, {want}, got {have}")
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a tensor that requires grad cannot be written in place; use torch.no_grad()"
        )


def penalty_value(
    w: Tensor,
    *,
    lam: float | Tensor = 1.0,
    penalty: str | None = "tl1",
    a: float | Tensor | None = None,
    mu: float | Tensor | None = None,
    group_by: GroupBy = None,
    group_weight: str | None = None,
) -> Tensor:
    """Return the regularizer's value: lam * (mu sum rho_a(w_i) + (1 - mu) sum c_g ||w_g||_2).

    lam to `group_weight`, and errors, are those of `prox`; `w` may have any strides. No step bounds
    `a` here: "scad" needs a > 1.

    Returns:
        A 0-d float64 tensor on w's device, differentiable with respect to `w` (almost everywhere:
        a count's gradient is 0).
    """
    plan.check_tensor("w", w)
    options = {"lam": lam, "penalty": penalty, "a": a, "mu": mu}
    reg = Regularizer.of({**options, "group_by": group_by, "group_weight": group_weight})
    w = w.to(torch.float64).contiguous()
    view = view_of(w, group_by)
    terms, split = reg.terms(view).read(), view.split(w)
    total = w.reshape(-1)[:0].sum()  # 0, with a gradient of zeros
    if reg.penalty is not None:
        total = total + PENALTIES[reg.penalty].value(split, terms.elementwise, terms.a)
    if view.grouped:
        # vector_norm has a subgradient at a group of zeros; sqrt(sum of squares) has NaN there.
        total = total + terms.group * torch.linalg.vector_norm(split, dim=(1, 3)).sum()
    return total
