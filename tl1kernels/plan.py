"""From many tensors to few batches, and their run: the seam between Python options and backends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from tl1kernels import backends
from tl1kernels.batch import Batch, Entry, Rule

Work = Iterable[tuple[Rule, str | None, Entry]]
"""Update rule, penalty, and the tensor that they are for."""


def prepare(work: Work, backend: str | None = None) -> list[tuple[str, Batch]]:
    """Gather entries that one call can take, and choose each batch's backend.

    Nothing is changed yet: whatever refuses, refuses here.
    """
    batches: dict[tuple[object, ...], Batch] = {}
    for rule, penalty, entry in work:
        p = entry.param
        stochastic = entry.stochastic and p.dtype == torch.bfloat16
        key = (p.device, p.dtype, rule, penalty, stochastic)
        if key not in batches:
            batches[key] = Batch(p.device, p.dtype, rule, penalty, [], stochastic=stochastic)
        batches[key].entries.append(entry)
    return [(backends.select(batch, backend), batch) for batch in batches.values()]


@torch.no_grad()
def execute(prepared: Iterable[tuple[str, Batch]]) -> None:
    """Run each batch on its backend, in place."""
    for name, batch in prepared:
        if batch.stochastic:  # torch.manual_seed makes it the same again
            batch.seed = int(torch.randint(2**62, (), device="cpu"))
        backends.BACKENDS[name].run(batch)


class Plan:
    """An optimizer's batches, kept from step to step while the same tensors take part.

    Checking every option and building every batch anew costs more than a small network's step.
    """

    def __init__(self, work: Iterable[tuple[Rule, str | None, Entry]]) -> None:
        """Prepare batches, as `prepare` does: nothing is changed, and it may raise."""
        work = list(work)
        self.entries = [entry for _, _, entry in work]
        self._asked_for = backends.asked_for()
        self._prepared = prepare(work)
        self._params = [entry.param for entry in self.entries]
        self._layouts = _layouts(self._params, [entry.grad for entry in self.entries])

    def renew(self, params: Sequence[Tensor]) -> bool:
        """Take the gradients of another step; return False if the batches do not fit it."""
        if len(params) != len(self._params) or self._asked_for != backends.asked_for():
            return False
        grads: list[Any] = [param.grad for param in params]
        if not all(map(is_, params, self._params)) or self._layouts != _layouts(params, grads):
            return False
        for entry, grad in zip(self.entries, grads, strict=True):
            entry.grad = grad
        return True

    def forget_tables(self) -> None:
        """Say that an entry's scalars, terms or state are new."""
        for _, batch in self._prepared:
            batch.tables.clear()

    def execute(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Take the step, and let go of the gradients; see `Batch` for the arguments."""
        for _, batch in self._prepared:
            batch.grad_scale, batch.found_inf = (
                None if t is None else t.to(batch.device, torch.float32).view(())
                for t in (grad_scale, found_inf)
            )
        execute(self._prepared)
        for entry in self.entries:
            del entry.grad


_of_param = attrgetter("shape", "dtype", "device")
_of_grad = attrgetter("dtype", "device")
_kind = attrgetter("layout")


def _layouts(params: Sequence[Tensor], grads: Sequence[Any]) -> list[list[object]] | None:
    """Return what batches and their tables take for granted of tensors; None for sparse ones.

    By attribute, not by tensor: `map` has no line of Python to run for each of them.
    """
    if set(map(_kind, grads)) - {torch.strided}:
        return None
    return [
        list(column)
        for column in (
            *(map(_of_param, params), map(Tensor.stride, params)),
            *(map(_of_grad, grads), map(Tensor.stride, grads)),
            *(map(Tensor.is_neg, grads), map(Tensor._is_zerotensor, grads)),
        )
    ]


FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a strided real floating-point tensor of a known dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")
