"""The backend "triton": every GPU that Triton reaches, and its interpreter (TRITON_INTERPRET=1).

A batch is at most three launches: coefficients (`prepare_kernel`), tiles that see each weight once
(`resident_kernel`), tiles of groups that no tile holds (`split_kernel`). What they read, a table of
addresses and lists of tiles, stays on the device until an address, a number or a layout changes.
"""

from __future__ import annotations

import os
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import library as torch_library

from tl1kernels.backends import gpu
from tl1kernels.backends import triton_schedule as schedule
from tl1kernels.backends.gpu import Step
from tl1kernels.batch import Batch, state_dtype
from tl1kernels.views import GroupView

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
    for view in (entry.view for entry in batch.entries):
        across = view.groups * view.inner
        if view.grouped and view.outer > 1 and across > schedule.MOST_ACROSS:
            return f"groups down rows of {across} weights, more than {schedule.MOST_ACROSS}"
    return gpu.rejects(batch)


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    gpu.run(batch, step, maths().SCALARS)


def step(of: Step) -> None:
    """Launch the kernels on the current device.

    Its rule is a name of `triton_math.RULES`, its penalty one of `triton_penalties.PENALTIES`, its
    scalars' columns are `triton_math.SCALARS`.
    """
    kernels, math = load(), maths()
    import triton.language as tl

    dtype, n = of.params[0].dtype, len(of.params)
    wide = _named(tl, state_dtype(dtype))
    coupled = penalties()[of.penalty][2] is not None
    kept = gpu.renew(of, partial(_plan, of, coupled), math.SCALARS.index("step"))
    plan: schedule.Schedule = kept["plan"]
    found_inf = kept["zero"] if of.found_inf is None else of.found_inf
    advance, apply = math.RULES[of.rule]
    prepare, prox, couple = penalties()[of.penalty]
    n_sync = 1 + 2 * plan.n_teams
    constants = {
        "Advance": advance,
        "Apply": apply,
        "STATES": len(of.state) // n,
        "Prox": prox,
        "Couple": couple,
        "T": _named(tl, dtype),
        "G": _named(tl, of.grads[0].dtype),
        "A": wide,
        "VECTOR": 16 // dtype.itemsize,
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
            kept["one"] if of.grad_scale is None else of.grad_scale,
            found_inf,
            int(of.maximize),
            int(of.nesterov),
            int(of.decoupled),
            Prepare=prepare,
            COUPLED=couple is not None,
            ADAM=of.rule.startswith("adam"),
            COUNTERS=of.numbers[0][0] is not None,
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
                of.seed,
                KINDS=plan.resident.kinds,
                TILE=plan.resident.tile.weights,
                num_warps=plan.resident.tile.warps,
                **constants,
            )
        if len(plan.split.items):
            kernels.split_kernel[(len(plan.split.items),)](
                kept["table"],
                kept["coefficients"],
                kept["split"],
                found_inf,
                of.seed,
                kept["partials"],
                plan.n_partials,
                kept["factors"],
                plan.n_factors,
                kept["sync"],
                plan.n_teams,
                KINDS=plan.split.kinds,
                ROWS=plan.split.tile.weights // schedule.COLUMNS,
                COLUMNS=schedule.COLUMNS,
                TILE=plan.split.tile.weights,
                num_warps=plan.split.tile.warps,
                **constants,
            )


def programs_at_once(device: torch.device) -> int:
    """Return how many tiles that share groups surely run at the same time on a device.

    The interpreter runs one after the other.
    """
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _plan(of: Step, coupled: bool, aligned: list[bool], kept: dict[str, Any]) -> Any:
    """Make the tiles and the workspace; return the table's columns from OUTER on."""
    device, dtype = of.device, of.params[0].dtype
    states = len(of.state) // len(of.params)
    plan = kept["plan"] = schedule.plan(
        of.views, aligned, dtype.itemsize, states, programs_at_once(device), coupled
    )
    kept["resident"] = gpu.to_device(device, torch.from_numpy(plan.resident.items))
    kept["split"] = gpu.to_device(device, torch.from_numpy(plan.split.items))
    for name, size in (
        ("partials", plan.n_partials * (load().MEASURES if coupled else 1)),
        ("factors", plan.n_factors * (load().OUTCOMES if coupled else 1)),
        ("coefficients", len(of.params) * maths().N_COEFFICIENTS.value),
    ):
        kept[name] = torch.empty(size, dtype=state_dtype(dtype), device=device)
    kept["sync"] = torch.empty(1 + 2 * plan.n_teams, dtype=torch.int32, device=device)
    return plan.layout


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
            Step(
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
            )
        )


def _fake_op(params: list[Tensor], grads: list[Tensor], *_: object) -> None:
    for param, grad in zip(params, grads, strict=True):
        torch._check(param.device == grad.device, lambda: "params and grads must share a device")
