"""From many tensors to few batches, and their run: the seam between Python options and backends."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tl1kernels import backends
from tl1kernels.batch import Batch, Entry, Rule


def run(work: Iterable[tuple[Rule, Entry]], backend: str | None = None) -> list[str]:
    """Group entries by device, dtype, rule and penalty, run each batch, return who ran them.

    Every batch's backend is chosen before the first one runs, so that a refusal changes nothing.
    """
    batches = make_batches(work)
    selected = [backends.select(batch, backend) for batch in batches]
    with torch.no_grad():
        for batch, name in zip(batches, selected, strict=True):
            backends.BACKENDS[name].run(batch)
    return selected


def make_batches(work: Iterable[tuple[Rule, Entry]]) -> list[Batch]:
    """Gather entries that one call can take, in order of first appearance.

    Entries without weights are dropped. Entries with lam = 0 need no penalty and share a batch.
    """
    batches: dict[tuple[object, ...], Batch] = {}
    for rule, entry in work:
        p, reg = entry.param, entry.regularizer
        if p.numel() == 0 and not entry.state:
            continue
        penalty = reg.penalty if reg.lam > 0 else None
        key = (p.device, p.dtype, rule, penalty)
        if key not in batches:
            batches[key] = Batch(p.device, p.dtype, rule, penalty, [])
        batches[key].entries.append(entry)
    return list(batches.values())


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
