"""From many tensors to few batches, and their run: the seam between Python options and backends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import attrgetter, is_

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tl1kernels import backends
from tl1kernels.batch import Batch, Entry, Rule

Work = Iterable[tuple[Rule, str | None, Entry, Tensor]]
"""Update rule, penalty, the tensor that they are for, and its gradient."""


def prepare(work: Work, backend: str | None = None) -> list[tuple[str, Batch]]:
    """Gather entries that one call can take, and choose each batch's backend.

    Nothing is changed yet: whatever refuses, refuses here.
    """
    batches: dict[tuple[object, ...], Batch] = {}
    work = list(work)
    check_writable(e.param for _, _, e, _ in work)
    turns = _turns([e.param if e.copy is None else e.copy for _, _, e, _ in work])
    for turn, (rule, penalty, entry, grad) in zip(turns, work, strict=True):
        p, copy = entry.param, entry.copy
        stochastic = entry.stochastic and p.dtype == torch.bfloat16
        copy_dtype = None if copy is None else copy.dtype
        key = (turn, p.device, p.dtype, rule, penalty, stochastic, copy_dtype)
        if key not in batches:
            batch = Batch(p.device, p.dtype, rule, penalty, [], [])
            batch.stochastic, batch.copy_dtype = stochastic, copy_dtype
            batches[key] = batch
        batches[key].entries.append(entry)
        batches[key].grads.append(grad)
    return [(backends.select(batch, backend), batch) for batch in batches.values()]


def _turns(params: Sequence[Tensor]) -> list[int]:
    """Return for each tensor after how many others, with which it shares memory, its step comes.

    A batch's tensors are updated side by side; of those that overlap, one after the other.
    """
    if any(type(p) not in (Tensor, torch.nn.Parameter) or p.is_meta for p in params):
        return [0] * len(params)  # who knows where such a tensor's memory is
    spans = [(p.device, p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize) for p in params]
    if not _overlap(spans):
        return [0] * len(params)
    turns: list[int] = []
    for i, (device, begin, end) in enumerate(spans):
        before = (turns[j] for j in range(i) if _overlap([spans[j], (device, begin, end)]))
        turns.append(1 + max(before, default=-1))
    return turns


def _overlap(spans: Sequence[tuple[torch.device, int, int]]) -> bool:
    """Return whether any two of some spans of memory have an address in common."""
    ordered = sorted((s for s in spans if s[1] < s[2]), key=lambda s: (str(s[0]), s[1]))
    return any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(ordered))


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

    def __init__(self, work: Work) -> None:
        """Prepare batches, as `prepare` does: nothing is changed, and it may raise."""
        work = list(work)
        self._asked_for = backends.asked_for()
        self._prepared = prepare(work)
        self._params = [e.param if e.copy is None else e.copy for _, _, e, _ in work]
        place = {id(entry): i for i, (_, _, entry, _) in enumerate(work)}
        self._places = [[place[id(e)] for e in batch.entries] for _, batch in self._prepared]
        self._kinds = Kinds([*self._params, *(grad for *_, grad in work)])

    def renew(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Take the gradients of another step; return False if the batches do not fit it."""
        same = len(params) == len(self._params) and all(map(is_, params, self._params))
        if not same or self._asked_for != backends.asked_for():
            return False
        if not self._kinds.hold([*params, *grads]):
            return False
        for (_, batch), places in zip(self._prepared, self._places, strict=True):
            batch.grads = [grads[i] for i in places]
        return True

    def forget_numbers(self, state_too: bool = False) -> None:
        """Say that an entry's scalars or terms are new, or its state as well."""
        for _, batch in self._prepared:
            batch.numbers.clear()
            if state_too:
                batch.tables.clear()

    def execute(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Take the step, and let go of the gradients; see `Batch` for the arguments."""
        for _, batch in self._prepared:
            batch.grad_scale, batch.found_inf = (
                None if t is None else t.to(batch.device, torch.float32).view(())
                for t in (grad_scale, found_inf)
            )
        execute(self._prepared)
        for _, batch in self._prepared:
            batch.grads = []


class Kinds:
    """What batches and their tables take for granted of tensors: dtype, device, shape, strides.

    Also that they are strided and mean what is in memory: no negative bit. torch.compile's guards
    look at all that at a tenth of the cost, but are no public part of torch.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards = self._columns = None
        try:
            from torch._C._dynamo.guards import TensorGuards

            guards = TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[])
            self._guards = guards.check if guards.check(*tensors) else None
        except (ImportError, TypeError):
            pass
        if self._guards is None:
            self._columns = _columns(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are such tensors, one for one."""
        if self._guards is not None:
            return self._guards(*tensors)
        return self._columns is not None and self._columns == _columns(tensors)


_kind = attrgetter("dtype", "device", "shape")


def _columns(tensors: Sequence[Tensor]) -> list[list[object]] | None:
    """Return the same by attribute; None where some are sparse, or no tensors."""
    if any(not isinstance(tensor, Tensor) or tensor.layout != torch.strided for tensor in tensors):
        return None
    return [
        list(map(of, tensors))
        for of in (_kind, Tensor.stride, Tensor.is_neg, Tensor._is_zerotensor)
    ]


def check_writable(tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError, in torch's words, if one may be written to in inference mode only."""
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in tensors):
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed: clone it "
            "outside of torch.inference_mode()"
        )


FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a strided real floating-point tensor of a known dtype.

    Raises:
        TypeError: it is something else.
        ValueError: it is not initialized.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        kind = type(tensor).__name__
        raise ValueError(f"{name} must be initialized, got {kind}: run the model once before")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")
