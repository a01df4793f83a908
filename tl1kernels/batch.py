"""What a backend takes: tensors that go through the same step together, and the update rules.

A step is update rule, then elementwise threshold, then group shrinkage (Ma et al. 2019, eq. 22).
A `Batch` names the rule and the penalty, which select code; everything that a scheduler may change
between two steps is a number in `Entry`, never a variant of code. lam = 0 is a number too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl1kernels.penalties import Terms
from tl1kernels.views import GroupView, is_laid_out_like, laid_out_like


class Rule:
    """An update rule's variant: what selects code. Here is what most variants have.

    Attributes:
        counters: names of the state tensors that are 0-d.
        maximize: whether the gradient's sign is turned.
        nesterov: SGD's variant of momentum.
        decoupled: AdamW's weight decay.
        capturable: whether counters lie on the parameter's device.
    """

    counters: tuple[str, ...] = ()
    maximize: bool = False
    nesterov: bool = False
    decoupled: bool = False
    capturable: bool = False

    @property
    def name(self) -> str:
        """The name by which kernels know the rule; the rest of its variant is numbers."""
        raise NotImplementedError

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the state tensors shaped like the parameter."""
        return ()


@dataclass(frozen=True)
class Assign(Rule):
    """v = source: no update rule, only the prox of another tensor (or of the same one).

    Scalars: lr, the step size of the prox.
    """

    @property
    def name(self) -> str:  # noqa: D102
        return "assign"


@dataclass(frozen=True)
class SGD(Rule):
    """torch.optim.SGD's rule. Scalars: lr, momentum, dampening, weight_decay."""

    momentum: bool = False
    nesterov: bool = False
    maximize: bool = False

    @property
    def name(self) -> str:  # noqa: D102
        return "sgd_momentum" if self.momentum else "sgd"

    @property
    def state(self) -> tuple[str, ...]:  # noqa: D102
        return ("momentum_buffer",) if self.momentum else ()


@dataclass(frozen=True)
class Adam(Rule):
    """torch.optim.Adam's rule, and AdamW's where `decoupled`.

    Scalars: lr, beta1, beta2, eps, weight_decay. The counter `step`, a 0-d float tensor, counts
    the steps taken; the backend adds one. Where `capturable` it lies on the parameter's device,
    and a backend that can does not wait for the device.
    """

    amsgrad: bool = False
    decoupled: bool = False
    maximize: bool = False
    capturable: bool = False
    counters = ("step",)

    @property
    def name(self) -> str:  # noqa: D102
        return "adam_amsgrad" if self.amsgrad else "adam"

    @property
    def state(self) -> tuple[str, ...]:  # noqa: D102
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if self.amsgrad else names


@dataclass
class Numbers:
    """What a scheduler may change between two steps; entries that have the same share one object.

    Attributes:
        scalars: the rule's scalars and `lr`, the step size that also scales the thresholds; `lr`
            may be a 0-d tensor, of which the step takes the value that it then has.
        terms: the regularizer's weights and shape; both weights 0 leave the rule's result as
            it is, to the bit.
    """

    scalars: Mapping[str, float | Tensor]
    terms: Terms


@dataclass
class Entry:
    """One tensor's part of a batch.

    Attributes:
        param: what is updated in place; dense, in any order of dims.
        view: the groups of `param`.
        numbers: the rule's scalars and the regularizer's terms.
        state: the rule's state by name, updated in place.
        stochastic: whether bfloat16 is rounded stochastically, and not to nearest.
        copy: a 16-bit tensor, laid out as `param`, that takes its new values, rounded: `param` is
            then the float32 master of it, and the gradient has its dtype.
    """

    param: Tensor
    view: GroupView
    numbers: Numbers
    state: Mapping[str, Tensor] = field(default_factory=dict)
    stochastic: bool = False
    copy: Tensor | None = None

    @property
    def scalars(self) -> Mapping[str, float | Tensor]:
        """The rule's scalars."""
        return self.numbers.scalars

    @property
    def terms(self) -> Terms:
        """The regularizer's terms."""
        return self.numbers.terms


@dataclass
class Batch:
    """Entries that share a device, dtypes, a rule, a penalty (None: groups alone) and rounding.

    Attributes:
        grads: the gradient of each entry (for `Assign`, the source): the parameter's shape, any
            strides and float dtype.
        numbers: whatever the backend derives from scalars, terms and state, and wants to find
            again if the next step has the same; emptied when one of them changes.
        tables: the like, from state and all that is in `layouts`.
        layouts: the like, from parameters, views and the gradients' layout; never emptied.
        stochastic: whether results are rounded stochastically, from `seed`, new in each step.
        copy_dtype: of the entries' copies; None where they have none.
        grad_scale: 0-d float32 tensor on the device: what gradients are divided by; None for 1.
        found_inf: 0-d float32 tensor on the device: unless 0 nothing changes, counters included.
    """

    device: torch.device
    dtype: torch.dtype
    rule: Rule
    penalty: str | None
    entries: list[Entry]
    grads: list[Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, Any] = field(default_factory=dict)
    stochastic: bool = False
    seed: int | None = None
    copy_dtype: torch.dtype | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype that gradients have, unless their `grad_dtype` was set to another."""
        return self.dtype if self.copy_dtype is None else self.copy_dtype


def gradients(batch: Batch) -> list[Tensor]:
    """Return the batch's gradients laid out as their parameters; those that are not are copied."""
    pairs = zip(batch.entries, batch.grads, strict=True)
    apart = batch.layouts.get("apart")
    if apart is None:
        apart = [i for i, (e, grad) in enumerate(pairs) if not is_laid_out_like(e.param, grad)]
        batch.layouts["apart"] = apart
    grads = list(batch.grads)
    for i in apart:
        grads[i] = laid_out_like(batch.entries[i].param, grads[i])
    return grads


def tensors(batch: Batch) -> dict[str, list[Tensor]]:
    """Return the tensors of a step besides gradients, by what they are to it.

    `params` and, where there are any, `copies`: one of each entry. `state` and `counters`: the
    first entry's in the order of the rule's names, then the second's, ... `written`: all that the
    step writes to.
    """
    entries, rule = batch.entries, batch.rule
    of = {
        "params": [entry.param for entry in entries],
        "copies": [entry.copy for entry in entries if entry.copy is not None],
        "state": [entry.state[name] for entry in entries for name in rule.state],
        "counters": [entry.state[name] for entry in entries for name in rule.counters],
    }
    return {**of, "written": [*chain(*of.values())]}


def unknown_to(
    batch: Batch, device_types: Collection[str], penalties: Collection[str]
) -> str | None:
    """Return what a backend with kernels for these has none for; None if there is nothing."""
    if batch.device.type not in device_types:
        return f"it has no kernels for {batch.device.type}"
    if batch.penalty is not None and batch.penalty not in penalties:
        return f"it has no penalty {batch.penalty!r}"
    return None


def needs_torch(batch: Batch) -> str | None:
    """Return what no kernel can do with a batch, only torch; None if there is nothing."""
    for entry, grad in zip(batch.entries, batch.grads, strict=True):
        if entry.param.is_neg():
            return "a parameter with its negative bit set"
        for tensor in (entry.param, grad):
            if hasattr(tensor, "__tensor_flatten__"):  # its memory is that of others
                return f"a {type(tensor).__name__}"
        if grad.dtype != batch.grad_dtype:
            return f"a gradient of {grad.dtype} for a parameter of {batch.grad_dtype}"
    return None


def host_numbers(entry: Entry) -> tuple[dict[str, float], Terms]:
    """Return an entry's scalars and terms as plain numbers; waits for a device that has them."""
    return {name: float(value) for name, value in entry.scalars.items()}, entry.terms.read()


def scalar_table(batch: Batch, names: Sequence[str]) -> Tensor:
    """Return each entry's scalars and terms under these names, as kernels take them.

    float64 [entries, names] on the CPU. What an entry lacks is 0, as is lr where it lies on a
    device; lam there is not in the terms.
    """
    tables = batch.tables
    if "places" not in tables:
        distinct = {id(entry.numbers): entry.numbers for entry in batch.entries}
        order = {key: i for i, key in enumerate(distinct)}
        tables["distinct"] = list(distinct.values())
        tables["places"] = np.array([order[id(e.numbers)] for e in batch.entries], np.intp)
        tables["scalars"] = [name for name in names if name in batch.entries[0].scalars]
        tables["columns"] = [names.index(name) for name in (*tables["scalars"], *_OF_TERMS)]
    rows = []
    for numbers in tables["distinct"]:
        row = [
            *map(numbers.scalars.__getitem__, tables["scalars"]),
            *numbers.terms[: len(_OF_TERMS)],
        ]
        if isinstance(numbers.scalars["lr"], Tensor):
            row[tables["scalars"].index("lr")] = 0.0
        rows.append(row)
    # NumPy takes a quarter of the time that torch does for so little.
    of_distinct = np.zeros((len(rows), len(names)))
    of_distinct[:, tables["columns"]] = rows
    return torch.from_numpy(of_distinct[tables["places"]])


_OF_TERMS = [name for name in Terms._fields if name != "scale"]  # the last one


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of optimizer state for a parameter dtype: never less than float32."""
    return torch.promote_types(dtype, torch.float32)
