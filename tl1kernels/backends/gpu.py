"""What the backends for GPUs share: from a batch to a table of addresses, and CUDA graphs.

Whatever a launch reads, addresses, numbers and lists of work, stays on the device until one of them
changes. Nothing here waits for the device, but for Adam's counter where that lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl1kernels.batch import Batch, Entry, gradients, needs_torch, scalar_table, tensors
from tl1kernels.penalties import PENALTIES
from tl1kernels.views import GroupView

STATES = 3
ADDRESSES = 9
"""Columns of a table: param, grad, STATES states, copy, Adam's step, lr, lam. The last three are
where they lie on the device, else 0. A backend's layout follows."""


@dataclass
class Step:
    """What a backend for GPUs launches its kernels for.

    Attributes:
        params: dense tensors of one dtype, on one device; updated in place.
        grads: for each, a gradient of the same strides; of the copy's dtype if there is one.
        state: the rule's states of the first parameter, then those of the second, ...; of the
            arithmetic's dtype (`state_dtype`) and the parameter's strides; updated in place.
        counters: float64 [tensors] on the CPU, each one's number of this step for Adam; None where
            Adam's counters lie on the device.
        on_device: for each parameter Adam's step counter, which is then counted up, lr and lam,
            where they lie on the device: 0-d float32. Else None.
        views: the groups of each parameter.
        scalars: float64 [tensors, the backend's scalars] on the CPU.
        rule: the `name` of an update rule.
        penalty: a penalty's name; None for groups alone.
        maximize: whether the gradient's sign is turned.
        nesterov: SGD's variant of momentum.
        decoupled: AdamW's weight decay.
        grad_scale: what gradients are divided by, 0-d float32 on the device; None for 1.
        found_inf: 0-d float32 on the device: unless 0, nothing changes; None for 0.
        seed: of stochastic rounding, for bfloat16; None to round to nearest.
        copies: none, or for each parameter, then float32, a 16-bit tensor with its strides that
            takes its new values.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    state: Sequence[Tensor]
    counters: Tensor | None
    on_device: Sequence[Sequence[Tensor | None]]
    views: Sequence[GroupView]
    scalars: Tensor
    rule: str
    penalty: str | None
    maximize: bool = False
    nesterov: bool = False
    decoupled: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    seed: int | None = None
    copies: Sequence[Tensor] = ()

    @property
    def device(self) -> torch.device:
        """The tensors' device."""
        return self.params[0].device


@dataclass
class Kept:
    """What a batch's next step finds again, as long as it holds. A backend adds its own.

    Attributes:
        table: int64 [tensors, columns] on the device: ADDRESSES, then the backend's layout.
        addresses: those in the table; None where only a graph's replay will fill it.
        on_device: of `Step.on_device`, of which this was made, what is not None; `there`: its
            places, a parameter's three after another's.
        aligned: for each tensor, whether its addresses are multiples of 16 bytes.
        layout: the table's columns from ADDRESSES on, which the backend has made for that.
        scalars: `Step.scalars` on the device, with the counters; `scalars_of`: what they were on
            the CPU.
        one, zero: float32 on the device, for steps without `grad_scale` or `found_inf`.
        spares: pinned memory for the tables of graphs.
        stream: of the last step.
    """

    table: Tensor = field(init=False)
    addresses: list[int] | None = field(init=False, default=None)
    on_device: list[Tensor] = field(init=False)
    on_device_of: object = field(init=False, default=None)
    there: list[int] = field(init=False)
    aligned: NDArray[np.bool_] | None = field(init=False, default=None)
    layout: NDArray[np.int64] = field(init=False)
    scalars: Tensor = field(init=False)
    scalars_of: Tensor | None = field(init=False, default=None)
    one: Tensor = field(init=False)
    zero: Tensor = field(init=False)
    spares: list[Tensor] = field(init=False, default_factory=list)
    stream: Any = field(init=False, default=None)


K = TypeVar("K", bound=Kept)


def rejects(batch: Batch) -> str | None:
    """Return what no kernel for GPUs can do with this batch; None if there is nothing."""
    for entry in batch.entries:
        for number in _on_device(batch, entry):
            if number is not None and number.dtype != torch.float32:
                return f"a number of {number.dtype} on the device"
            if number is not None and number.device != batch.device:
                return f"a number on {number.device} for a parameter on {batch.device}"
    return needs_torch(batch)


def views(batch: Batch) -> list[GroupView]:
    """Return each entry's groups; under a penalty of whole groups a weight without one is one."""
    coupled = batch.penalty is not None and PENALTIES[batch.penalty].coupled
    return [replace(e.view, grouped=True) if coupled else e.view for e in batch.entries]


def _on_device(batch: Batch, entry: Entry) -> list[Tensor | None]:
    """Return what the kernels read on the device: Adam's `step`, lr, lam; None where they don't."""
    counter = entry.state.get("step") if batch.rule.capturable else None
    lr = entry.scalars["lr"]
    return [counter, lr if isinstance(lr, Tensor) else None, entry.terms.scale]


def _all_on_device(batch: Batch) -> list[list[Tensor | None]]:
    """Return what the kernels read on the device for each entry; the last list, if it still holds.

    A number on the CPU that changes in each step does not change it.
    """
    tables = batch.tables
    distinct = [
        n for numbers in tables["distinct"] for n in (numbers.scalars["lr"], numbers.terms.scale)
    ]
    distinct = [number if isinstance(number, Tensor) else None for number in distinct]
    before = tables.get("distinct_on_device")
    if before is None or not all(map(is_, distinct, before)):
        tables["distinct_on_device"] = distinct
        tables["on_device"] = [_on_device(batch, entry) for entry in batch.entries]
    return tables["on_device"]


def run(
    batch: Batch, launch: Callable[[Step, K], None], scalar_names: Sequence[str], new: type[K]
) -> None:
    """Take one step on every entry, in place, by a backend's `launch`, which keeps a `new()`."""
    if "kept" not in batch.layouts:
        batch.layouts["kept"] = new()
    kept = batch.layouts["kept"]
    with torch.cuda.device_of(batch.entries[0].param):
        _run(batch, kept, launch, scalar_names)


def _run(
    batch: Batch, kept: K, launch: Callable[[Step, K], None], scalar_names: Sequence[str]
) -> None:
    if not batch.tables:
        batch.tables |= {**tensors(batch), "views": views(batch)}
    if not batch.numbers:
        batch.numbers["scalars"] = scalar_table(batch, scalar_names)
        batch.numbers["on_device"] = _all_on_device(batch)
    tables, rule = batch.tables, batch.rule
    grads = gradients(batch)
    counted = [] if rule.capturable else _counters(batch)
    now = None
    if batch.stochastic and capturing(batch.device):
        raise RuntimeError("a CUDA graph would round each replay alike: rounding='nearest' there")
    if counted:
        if capturing(batch.device):
            raise RuntimeError(_UNPREPARED)
        if batch.found_inf is not None and batch.found_inf.item():
            return
        now = np.array([counter.item() for counter in counted], np.float64) + 1
    launch(
        Step(
            tables["params"],
            grads,
            tables["state"],
            None if now is None else torch.from_numpy(now),
            batch.numbers["on_device"],
            tables["views"],
            batch.numbers["scalars"],
            rule.name,
            batch.penalty,
            maximize=rule.maximize,
            nesterov=rule.nesterov,
            decoupled=rule.decoupled,
            grad_scale=batch.grad_scale,
            found_inf=batch.found_inf,
            seed=batch.seed,
            copies=tables["copies"],
        ),
        kept,
    )
    if now is not None:  # not before: a step that is refused does not count
        for counter, value in zip(counted, now.tolist(), strict=True):
            counter[()] = value
    torch.autograd.graph.increment_version(tables["written"])


def _counters(batch: Batch) -> list[NDArray[np.floating]]:
    """Return the memory of the counters, on the CPU.

    NumPy counts up hundreds of them in a seventh of the time that torch does.
    """
    tables = batch.tables
    addresses = list(map(Tensor.data_ptr, tables["counters"]))
    if tables.get("counters_at") != addresses:  # memory may be shared with others, or exchanged
        tables["arrays"] = [counter.detach().numpy() for counter in tables["counters"]]
        tables["counters_at"] = addresses
    return tables["arrays"]


MakeSchedule = Callable[[Step, list[bool], K], NDArray[np.void]]
"""Takes whether each tensor's addresses are multiples of 16 bytes, keeps what else the launch needs
on the device, and returns each tensor's row of a table from ADDRESSES on: int64s."""


def renew(step: Step, kept: K, make_schedule: MakeSchedule[K], step_column: int) -> None:
    """Bring `table` and `scalars` on the device up to date.

    Args:
        step: what is to be launched.
        kept: the batch's.
        make_schedule: the backend's, called where there is none for such addresses.
        step_column: the column of `scalars` that takes `counters`.
    """
    device = step.device
    _follow_stream(device, kept)
    _renew_table(step, kept, make_schedule)
    scalars = step.scalars
    if step.counters is not None:
        scalars = scalars.clone()
        scalars[:, step_column] = step.counters
    if kept.scalars_of is not scalars:
        kept.scalars, kept.scalars_of = to_device(device, scalars), scalars
    if capturing(device):
        _captured.append(copy(kept))
    elif device.type == "cuda" and not kept.spares:
        kept.spares = _pinned((SPARES, *kept.table.shape))


def _follow_stream(device: torch.device, kept: Kept) -> None:
    """Keep others from memory that a step on another stream than the last one's still reads."""
    if device.type != "cuda" or capturing(device):
        return
    stream = torch.cuda.current_stream(device)
    if kept.stream not in (None, stream):
        for tensor in vars(kept).values():
            if isinstance(tensor, Tensor) and tensor.device == device:
                tensor.record_stream(stream)
    kept.stream = stream


def _pinned(shape: Sequence[int]) -> list[Tensor]:
    """Return tables that copies to a device may be made of while a graph is captured."""
    return [*torch.empty(shape, dtype=torch.int64, device="cpu").pin_memory().unbind()]


def _renew_table(step: Step, kept: K, make_schedule: MakeSchedule[K]) -> None:
    params, copies, device, n = step.params, step.copies, step.device, len(step.params)
    tensors = chain(params, step.grads, copies, step.state)
    if kept.on_device_of is not step.on_device:  # mostly None: not to look at each time
        numbers = list(chain(*step.on_device))
        there = [i for i, number in enumerate(numbers) if number is not None]
        if kept.on_device_of is None or there != kept.there:
            kept.there, kept.addresses = there, None
        kept.on_device = [number for number in numbers if number is not None]
        kept.on_device_of = step.on_device
    addresses = list(map(Tensor.data_ptr, chain(tensors, kept.on_device)))
    if kept.addresses == addresses:
        return
    table = np.zeros((n, ADDRESSES), np.int64)
    of_numbers = np.zeros(3 * n, np.int64)
    of_numbers[kept.there] = addresses[len(addresses) - len(kept.there) :]
    of = np.array(addresses[: len(addresses) - len(kept.there)], np.int64)
    table[:, 0], table[:, 1] = of[:n], of[n : 2 * n]
    first = 2 * n + len(copies)  # of the states
    table[:, 2 + STATES] = of[2 * n : first] if copies else 0
    states = of[first:].reshape(n, -1)
    table[:, 2 : 2 + states.shape[1]] = states
    table[:, 3 + STATES :] = of_numbers.reshape(n, 3)
    aligned = ~np.any(table[:, : 3 + STATES] % 16, axis=1)
    if kept.aligned is None or not np.array_equal(kept.aligned, aligned):
        layout = make_schedule(step, aligned.tolist(), kept)
        kept.layout = layout.view(np.int64).reshape(n, -1)
        kept.aligned = aligned
        kept.one = torch.ones((), device=device)
        kept.zero = torch.zeros((), device=device)
    host = torch.from_numpy(np.concatenate([table, kept.layout], axis=1))
    if capturing(device):
        # Gradients have moved to the graph's own memory, as they do in torch's recipe. Each replay
        # copies the addresses from where they are now: nothing may write there again.
        if not kept.spares:
            raise RuntimeError(_UNPREPARED)
        host = kept.spares.pop().copy_(host)
        kept.table = torch.empty_like(host, device=device).copy_(host, non_blocking=True)
        kept.addresses = None  # until a replay nothing is there: no other step may read it
        _captured.append(host)
    else:
        kept.table = to_device(device, host)
        kept.addresses = addresses


SPARES = 16
"""Steps with addresses of their own that graphs may hold before a step outside them."""

_captured: list[object] = []
"""What CUDA graphs use besides the optimizer's tensors: nobody can tell when they are gone."""

_UNPREPARED = (
    "a step that a CUDA graph captures needs the same step, with the same options, before it and "
    "outside the graph, capturable=True for Adam, and lr and lam as tensors if they are to change"
)


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph takes down what is launched on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(device: torch.device, host: Tensor) -> Tensor:
    """Return a copy on the device, without waiting for it."""
    if device.type != "cuda":
        return host
    if capturing(device):
        raise RuntimeError(_UNPREPARED)
    return host.pin_memory().to(device, non_blocking=True)
