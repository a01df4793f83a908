"""The backend "triton": every GPU that Triton reaches, and its interpreter (TRITON_INTERPRET=1).

A batch is at most three launches: coefficients (`prepare_kernel`), tiles that see each weight once
(`resident_kernel`), tiles of groups that no tile holds (`split_kernel`). What they read, a table of
addresses and lists of tiles, stays on the device until an address, a number or a layout changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import library as torch_library

from tl1kernels.backends import triton_schedule as schedule
from tl1kernels.batch import Batch, Entry, gradients, rule_name, scalar_table, state_dtype
from tl1kernels.views import GroupView

WARPS = 8
BLOCK = 64  # tensors that a program of prepare_kernel takes


def unavailable() -> str | None:
    """Return why Triton cannot be used here; None if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"no triton: {error}"
    if not (torch.cuda.is_available() or interpreting()):
        return "no GPU that torch can use, and TRITON_INTERPRET is not 1"
    return None


def interpreting() -> bool:
    """Return whether Triton interprets its kernels, on CPU tensors, and compiles nothing."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def load() -> ModuleType:
    """Import the kernels once; torch.ops.tl1kernels.triton_step_ is then there."""
    from tl1kernels.backends import triton_kernels

    _OPS.define(_SCHEMA)
    _OPS.impl("triton_step_", _op, "CompositeExplicitAutograd")
    torch_library.register_fake("tl1kernels::triton_step_", _fake_op)
    return triton_kernels


def maths() -> ModuleType:
    """Import the kernels' maths: the columns of their tables, and update rules."""
    load()
    from tl1kernels.backends import triton_math

    return triton_math


def penalties() -> dict[str | None, Any]:
    """Import the kernels' penalties: a row of `PENALTIES` by name."""
    load()
    from tl1kernels.backends import triton_penalties

    return triton_penalties.PENALTIES


def rejects(batch: Batch) -> str | None:
    """Return why Triton cannot run this batch; None if it can."""
    if batch.device.type != "cuda" and not (batch.device.type == "cpu" and interpreting()):
        return f"it has no kernels for {batch.device.type}"
    if batch.penalty not in penalties():
        return f"it has no penalty {batch.penalty!r}"
    for entry, grad in zip(batch.entries, batch.grads, strict=True):
        if entry.param.is_neg():
            return "a parameter with its negative bit set"
        if grad.dtype != batch.grad_dtype:
            return f"a gradient of {grad.dtype} for a parameter of {batch.grad_dtype}"
        for number in _on_device(batch, entry):
            if number is not None and number.dtype != torch.float32:
                return f"a number of {number.dtype} on the device"
            if number is not None and number.device != batch.device:
                return f"a number on {number.device} for a parameter on {batch.device}"
    return None


def _on_device(batch: Batch, entry: Entry) -> list[Tensor | None]:
    """Return what the kernels read on the device: Adam's `step`, lr, lam; None where they don't."""
    counter = entry.state.get("step") if batch.rule.capturable else None
    lr = entry.scalars["lr"]
    return [counter, lr if isinstance(lr, Tensor) else None, entry.terms.scale]


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    with torch.cuda.device_of(batch.entries[0].param):
        _run(batch)


def _run(batch: Batch) -> None:
    if not batch.tables:
        batch.tables.update(_tables(batch))
    if not batch.numbers:
        batch.numbers.update(_numbers(batch))
    tables, rule = batch.tables, batch.rule
    grads = gradients(batch)
    counters = tables["counters"]
    if batch.stochastic and _capturing(batch.device):
        raise RuntimeError("a CUDA graph would round each replay alike: rounding='nearest' there")
    if counters and not rule.capturable:
        if _capturing(batch.device):
            raise RuntimeError(_UNPREPARED)
        if batch.found_inf is not None and batch.found_inf.item():
            return
        torch._foreach_add_(counters, 1)
    step(
        tables["params"],
        grads,
        tables["state"],
        [] if rule.capturable else counters,
        batch.numbers["on_device"],
        tables["views"],
        batch.numbers["scalars"],
        rule_name(rule),
        batch.penalty,
        maximize=getattr(rule, "maximize", False),
        nesterov=getattr(rule, "nesterov", False),
        decoupled=getattr(rule, "decoupled", False),
        grad_scale=batch.grad_scale,
        found_inf=batch.found_inf,
        seed=batch.seed,
        copies=tables["copies"],
        kept=batch.layouts,
    )
    torch.autograd.graph.increment_version(tables["written"])


def _tables(batch: Batch) -> dict[str, Any]:
    entries, rule = batch.entries, batch.rule
    params = [entry.param for entry in entries]
    state = [entry.state[name] for entry in entries for name in rule.state]
    counters = [entry.state[name] for entry in entries for name in rule.counters]
    copies = [entry.copy for entry in entries if entry.copy is not None]
    return {
        "params": params,
        "copies": copies,
        "state": state,
        "counters": counters,
        "written": [*params, *state, *counters, *copies],
        "views": [entry.view for entry in entries],
    }


def _numbers(batch: Batch) -> dict[str, Any]:
    return {
        "on_device": [_on_device(batch, entry) for entry in batch.entries],
        "scalars": scalar_table(batch, maths().SCALARS),
    }


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Tensor],
    counters: Sequence[Tensor],
    numbers: Sequence[Sequence[Tensor | None]],
    views: Sequence[GroupView],
    scalars: Tensor,
    rule: str,
    penalty: str | None,
    *,
    maximize: bool = False,
    nesterov: bool = False,
    decoupled: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
    copies: Sequence[Tensor] = (),
    kept: dict[str, Any],
) -> None:
    """Launch the kernels on the current device.

    Args:
        params: dense tensors of one dtype, on one device; updated in place.
        grads: for each, a gradient of the same dtype and strides.
        state: the rule's states of the first parameter, then those of the second, ...; of the
            arithmetic's dtype (`state_dtype`) and the parameter's strides; updated in place.
        counters: Adam's step counters where they lie on the CPU: the number of this step, 0-d.
        numbers: for each parameter Adam's step counter, which is then counted up, lr and lam, where
            they lie on the device: 0-d float32. Else None.
        views: the groups of each parameter.
        scalars: float64 [tensors, len(SCALARS)] on the CPU.
        rule: a name of `triton_math.RULES`.
        penalty: a name of `triton_penalties.PENALTIES`.
        maximize: whether the gradient's sign is turned.
        nesterov: SGD's variant of momentum.
        decoupled: AdamW's weight decay.
        grad_scale: what gradients are divided by, 0-d float32 on the device; None for 1.
        found_inf: 0-d float32 on the device: unless 0, nothing changes; None for 0.
        seed: of stochastic rounding, for bfloat16; None to round to nearest.
        copies: none, or for each parameter, then float32, a 16-bit tensor with its strides that
            takes its new values; its gradient has that dtype.
        kept: what to find again next time; of these params and views only.
    """
    kernels, math = load(), maths()
    import triton.language as tl

    device, dtype, n = params[0].device, params[0].dtype, len(params)
    wide = _named(tl, state_dtype(dtype))
    coupled = penalties()[penalty][2] is not None
    _renew_tables(params, grads, state, copies, numbers, views, coupled, kept)
    if counters:
        scalars = scalars.clone()
        scalars[:, math.SCALARS.index("step")] = torch.stack([*counters]).to(scalars)
    if kept.get("scalars_of") is not scalars:
        kept["scalars"], kept["scalars_of"] = _to(device, scalars), scalars
    if _capturing(device):
        _captured.append(dict(kept))
    elif device.type == "cuda" and "spare" not in kept:
        kept["spare"] = torch.empty_like(kept["table"], device="cpu").pin_memory()
    plan: schedule.Schedule = kept["plan"]
    found_inf = kept["zero"] if found_inf is None else found_inf
    advance, apply = math.RULES[rule]
    prepare, prox, couple = penalties()[penalty]
    n_sync = 1 + 2 * plan.n_teams
    constants = {
        "Advance": advance,
        "Apply": apply,
        "STATES": len(state) // n,
        "Prox": prox,
        "Couple": couple,
        "T": _named(tl, dtype),
        "G": _named(tl, grads[0].dtype),
        "A": wide,
        "VECTOR": 16 // dtype.itemsize,
        "TILE": schedule.TILE,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    # NumPy, in the interpreter, warns of what a GPU does without a word: 1 / 0 = inf.
    with np.errstate(all="ignore"):
        kernels.prepare_kernel[(-(-max(n, n_sync) // BLOCK),)](
            kept["table"],
            kept["scalars"],
            kept["coefficients"],
            kept["sync"],
            n,
            n_sync,
            kept["one"] if grad_scale is None else grad_scale,
            found_inf,
            int(maximize),
            int(nesterov),
            int(decoupled),
            Prepare=prepare,
            COUPLED=couple is not None,
            ADAM=rule.startswith("adam"),
            COUNTERS=numbers[0][0] is not None,
            A=wide,
            BLOCK=BLOCK,
            num_warps=1,
            enable_fp_fusion=True,
        )
        if len(plan.resident.items):
            kernels.resident_kernel[(len(plan.resident.items),)](
                kept["table"],
                kept["coefficients"],
                kept["resident"],
                found_inf,
                seed,
                KINDS=plan.resident.kinds,
                **constants,
            )
        if len(plan.split.items):
            kernels.split_kernel[(len(plan.split.items),)](
                kept["table"],
                kept["coefficients"],
                kept["split"],
                found_inf,
                seed,
                kept["partials"],
                plan.n_partials,
                kept["factors"],
                plan.n_factors,
                kept["sync"],
                plan.n_teams,
                KINDS=plan.split.kinds,
                ROWS=schedule.ROWS,
                COLUMNS=schedule.COLUMNS,
                **constants,
            )


def _renew_tables(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: Sequence[Sequence[Tensor | None]],
    views: Sequence[GroupView],
    coupled: bool,
    kept: dict[str, Any],
) -> None:
    """Bring the table of addresses, the tiles and the workspace up to date."""
    addresses = [t.data_ptr() for t in chain(params, grads, copies, state)]
    addresses += [0 if number is None else number.data_ptr() for number in chain(*numbers)]
    if kept.get("addresses") == addresses:
        return
    math = maths()
    device, dtype, n = params[0].device, params[0].dtype, len(params)
    of = np.array(addresses, np.int64)
    table = np.zeros((n, math.TABLE.value), np.int64)
    table[:, 0], table[:, 1] = of[:n], of[n : 2 * n]
    first = 2 * n + len(copies)
    table[:, math.COPY.value] = of[2 * n : first] if copies else 0
    states = of[first : -3 * n].reshape(n, -1)
    table[:, 2 : 2 + states.shape[1]] = states
    table[:, math.COUNTER.value : math.OUTER.value] = of[-3 * n :].reshape(n, 3)
    aligned = ~np.any(table[:, : math.COUNTER.value] % 16, axis=1)
    if "plan" not in kept or not np.array_equal(kept["aligned"], aligned):
        plan = kept["plan"] = schedule.plan(views, aligned.tolist(), 16 // dtype.itemsize)
        kept["aligned"] = aligned
        kept["resident"] = _to(device, torch.from_numpy(plan.resident.items))
        kept["split"] = _to(device, torch.from_numpy(plan.split.items))
        coefficients = n * math.N_COEFFICIENTS.value
        for name, size in (
            ("partials", plan.n_partials * (load().MEASURES if coupled else 1)),
            ("factors", plan.n_factors * (load().OUTCOMES if coupled else 1)),
            ("coefficients", coefficients),
        ):
            kept[name] = torch.empty(size, dtype=state_dtype(dtype), device=device)
        kept["sync"] = torch.empty(1 + 2 * plan.n_teams, dtype=torch.int32, device=device)
        kept["one"] = torch.ones((), device=device)
        kept["zero"] = torch.zeros((), device=device)
    table[:, math.OUTER.value :] = kept["plan"].layout
    host = torch.from_numpy(table)
    if _capturing(device):
        # Gradients have moved to the graph's own memory, as they do in torch's recipe. Each replay
        # copies the addresses from where they are now: nothing may write there again.
        if "spare" not in kept:
            raise RuntimeError(_UNPREPARED)
        host = kept.pop("spare").copy_(host)
        kept["table"] = torch.empty_like(host, device=device).copy_(host, non_blocking=True)
        _captured.append(host)
    else:
        kept["table"] = _to(device, host)
    kept["addresses"] = addresses


_captured: list[object] = []
"""What CUDA graphs use besides the optimizer's tensors: nobody can tell when they are gone."""

_UNPREPARED = (
    "a step that a CUDA graph captures needs the same step, with the same options, before it and "
    "outside the graph, capturable=True for Adam, and lr and lam as tensors if they are to change"
)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _to(device: torch.device, host: Tensor) -> Tensor:
    """Return a copy on the device, without waiting for it."""
    if device.type != "cuda":
        return host
    if _capturing(device):
        raise RuntimeError(_UNPREPARED)
    return host.pin_memory().to(device, non_blocking=True)


def _named(tl: Any, dtype: torch.dtype) -> Any:
    """Return Triton's dtype for torch's."""
    return getattr(tl, str(dtype).removeprefix("torch."))


# --- The op, for torch.compile: what `step` does, without anything kept.

_OPS = torch_library.Library("tl1kernels", "FRAGMENT")
_SCHEMA = (
    "triton_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor[] counters, "
    "Tensor views, Tensor scalars, str rule, str? penalty, bool maximize, bool nesterov, "
    "bool decoupled) -> ()"
)


def _op(
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    counters: list[Tensor],
    views: Tensor,
    scalars: Tensor,
    rule: str,
    penalty: str | None,
    maximize: bool,
    nesterov: bool,
    decoupled: bool,
) -> None:
    rows = [(*row[:4], bool(row[4])) for row in views.tolist()]
    with torch.cuda.device_of(params[0]):
        step(
            params,
            grads,
            state,
            counters,
            [(None, None, None)] * len(params),
            [GroupView((), *row) for row in rows],
            scalars,
            rule,
            penalty,
            maximize=maximize,
            nesterov=nesterov,
            decoupled=decoupled,
            kept={},
        )


def _fake_op(params: list[Tensor], grads: list[Tensor], *_: object) -> None:
    for param, grad in zip(params, grads, strict=True):
        torch._check(param.device == grad.device, lambda: "params and grads must share a device")
