"""From many tensors to few batches, and their run: the seam between Python options and backends."""

from __future__ import annotations

from collections.abc import Iterable

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
        key = (p.device, p.dtype, rule, penalty)
        if key not in batches:
            batches[key] = Batch(p.device, p.dtype, rule, penalty, [])
        batches[key].entries.append(entry)
    return [(backends.select(batch, backend), batch) for batch in batches.values()]


@torch.no_grad()
def execute(prepared: Iterable[tuple[str, Batch]]) -> None:
    """Run each batch on its backend, in place."""
    for name, batch in prepared:
        backends.BACKENDS[name].run(batch)


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
