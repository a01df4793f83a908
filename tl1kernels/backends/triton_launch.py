"""The backend "triton": every GPU that Triton reaches, and its interpreter (TRITON_INTERPRET=1).

A batch is at most three launches: coefficients (`prepare_kernel`), tiles that see each weight once
(`resident_kernel`), tiles of groups that no tile holds (`split_kernel`). What they read, a table of
addresses and lists of tiles, stays on the device until an address, a number or a layout changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl1kernels.backends import gpu
from tl1kernels.backends import triton_schedule as schedule
from tl1kernels.backends.gpu import Step
from tl1kernels.backends.gpu_work import ceil_div
from tl1kernels.batch import Batch, state_dtype, unknown_to

BLOCK, PREPARE_WARPS = 64, 2  # of prepare_kernel: tensors that a program takes


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
    """Import the kernels once."""
    from tl1kernels.backends import triton_kernels

    return triton_kernels


def maths() -> ModuleType:
    """Import the kernels' maths: the columns of their tables, and update rules."""
    load()
    from tl1kernels.backends import triton_math

    return triton_math


def penalty_rows() -> dict[str | None, Any]:
    """Import the kernels' penalties: a row of `PENALTIES` by name, None for groups alone."""
    load()
    from tl1kernels.backends import triton_penalties

    return triton_penalties.PENALTIES


def penalties() -> frozenset[str]:
    """Return the names of the penalties that there are kernels for."""
    return frozenset(filter(None, penalty_rows()))


def rejects(batch: Batch) -> str | None:
    """Return why Triton cannot run this batch; None if it can."""
    if unknown := unknown_to(batch, {"cuda", "cpu"} if interpreting() else {"cuda"}, penalties()):
        return unknown
    for view in gpu.views(batch):
        across = view.groups * view.inner
        if view.grouped and view.outer > 1 and across > schedule.MOST_ACROSS:
            return f"groups down rows of {across} weights, more than {schedule.MOST_ACROSS}"
    return gpu.rejects(batch)


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    gpu.run(batch, step, maths().SCALARS, Kept)


@dataclass
class Kept(gpu.Kept):
    """What a batch's next step finds again; see `gpu.Kept`.

    Attributes:
        schedule: the tiles, of which `resident` and `split` are on the device.
        coefficients: on the device, what `prepare_kernel` makes of each tensor's scalars.
        partials, factors: on the device, what tiles of a team leave for each other.
        sync: on the device, counters: of programs, then of each team; 0 after `prepare_kernel`.
        compiled: kernels and their constants, by what those depend on.
    """

    schedule: schedule.Schedule = field(init=False)
    resident: Tensor = field(init=False)
    split: Tensor = field(init=False)
    coefficients: Tensor = field(init=False)
    partials: Tensor = field(init=False)
    factors: Tensor = field(init=False)
    sync: Tensor = field(init=False)
    compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = field(init=False)


def step(of: Step, kept: Kept) -> None:
    """Launch the kernels on the current device.

    Its rule is a name of `triton_math.RULES`, its penalty one of `triton_penalties.PENALTIES`, its
    scalars' columns are `triton_math.SCALARS`.
    """
    kernels, n = load(), len(of.params)
    gpu.renew(of, kept, _make_schedule, maths().SCALARS.index("step"))
    work = kept.schedule
    grad_scale = kept.one if of.grad_scale is None else of.grad_scale
    found_inf = kept.zero if of.found_inf is None else of.found_inf
    n_sync = 1 + 2 * work.n_teams
    _launch(
        kernels.prepare_kernel,
        ceil_div(max(n, n_sync), BLOCK),
        (
            kept.table,
            kept.scalars,
            kept.coefficients,
            kept.sync,
            n,
            n_sync,
            grad_scale,
            found_inf,
            int(of.maximize),
            int(of.nesterov),
            int(of.decoupled),
        ),
        partial(_prepare_constants, of),
        (of.rule, of.penalty, of.on_device[0][0] is None),
        kept,
    )
    if len(work.resident.items):
        _launch(
            kernels.resident_kernel,
            len(work.resident.items),
            (kept.table, kept.coefficients, kept.resident, found_inf, of.seed),
            partial(_constants, of, work.resident),
            (of.rule, of.penalty),
            kept,
        )
    if len(work.split.items):
        _launch(
            kernels.split_kernel,
            len(work.split.items),
            (
                kept.table,
                kept.coefficients,
                kept.split,
                found_inf,
                of.seed,
                kept.partials,
                work.n_partials,
                kept.factors,
                work.n_factors,
                kept.sync,
                work.n_teams,
            ),
            partial(_constants, of, work.split, schedule.COLUMNS),
            (of.rule, of.penalty),
            kept,
        )


def _launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants_of: Callable[[], tuple[dict[str, Any], int]],
    choice: tuple[Any, ...],
    kept: Kept,
) -> None:
    """Launch a kernel.

    Triton's launcher looks up at each launch what it has compiled for such arguments, which took
    three launches 75 of the 186 us that the host had a step of SGD on 161 tensors for. What it
    finds is kept.

    Args:
        kernel: one of `triton_kernels`.
        programs: how many.
        arguments: the kernel's first ones, all that are no constants.
        constants_of: returns the constants by name, and how many warps a program has.
        choice: what the constants depend on, besides the schedule.
        kept: the batch's; its `compiled` lasts as long as the schedule.
    """
    key = (kernel, *choice, *map(_specialized, arguments))
    known = kept.compiled.get(key)
    if known is not None:
        compiled, constants = known
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    named, warps = constants_of()
    # NumPy, in the interpreter, warns of what a GPU does without a word: 1 / 0 = inf.
    with np.errstate(all="ignore"):
        compiled = kernel[(programs,)](*arguments, **named, num_warps=warps, enable_fp_fusion=True)
    if compiled is not None:  # the interpreter has nothing to keep
        constants = [named[name] for name in kernel.arg_names[len(arguments) :]]
        kept.compiled[key] = compiled, constants


def _specialized(argument: Tensor | int | None) -> object:
    """Return what a kernel is compiled for in an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return None if argument is None else -(2**31) <= argument < 2**31


def _prepare_constants(of: Step) -> tuple[dict[str, Any], int]:
    prepare, _, couple = penalty_rows()[of.penalty]
    constants = {
        "Prepare": prepare,
        "COUPLED": couple is not None,
        "ADAM": of.rule.startswith("adam"),
        "COUNTERS": of.on_device[0][0] is not None,
        "A": _named(state_dtype(of.params[0].dtype)),
        "BLOCK": BLOCK,
    }
    return constants, PREPARE_WARPS


def _constants(of: Step, work: schedule.Work, columns: int = 0) -> tuple[dict[str, Any], int]:
    dtype, tile = of.params[0].dtype, work.tile
    advance, apply = maths().RULES[of.rule]
    _, prox, couple = penalty_rows()[of.penalty]
    constants = {
        "Advance": advance,
        "Apply": apply,
        "STATES": len(of.state) // len(of.params),
        "Prox": prox,
        "Couple": couple,
        "T": _named(dtype),
        "G": _named(of.grads[0].dtype),
        "A": _named(state_dtype(dtype)),
        "VECTOR": 16 // dtype.itemsize,
        "KINDS": work.kinds,
        "TILE": tile.weights,
    }
    if not columns:
        constants["PART"] = tile.part(dtype.itemsize)
    else:
        constants |= {"ROWS": tile.weights // columns, "COLUMNS": columns}
    return constants, tile.warps


def programs_at_once(device: torch.device) -> int:
    """Return how many tiles that share groups surely run at the same time on a device.

    The interpreter runs one after the other.
    """
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _make_schedule(of: Step, aligned: list[bool], kept: Kept) -> NDArray[np.void]:
    """Make the tiles and the workspace; return the table's columns from OUTER on."""
    device, dtype = of.device, of.params[0].dtype
    states = len(of.state) // len(of.params)
    coupled = penalty_rows()[of.penalty][2] is not None
    work = kept.schedule = schedule.make_schedule(
        of.views, aligned, dtype.itemsize, states, programs_at_once(device), coupled
    )
    kept.resident = gpu.to_device(device, torch.from_numpy(work.resident.items))
    kept.split = gpu.to_device(device, torch.from_numpy(work.split.items))
    empty = partial(torch.empty, dtype=state_dtype(dtype), device=device)
    kept.partials = empty(work.n_partials * (load().MEASURES if coupled else 1))
    kept.factors = empty(work.n_factors * (load().OUTCOMES if coupled else 1))
    kept.coefficients = empty(len(of.params) * maths().N_COEFFICIENTS.value)
    kept.compiled = {}
    kept.sync = torch.empty(1 + 2 * work.n_teams, dtype=torch.int32, device=device)
    return work.layout


def _named(dtype: torch.dtype) -> Any:
    """Return Triton's dtype for torch's."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
