"""Which weights of a tensor share a group norm: `group_by` -> `GroupView`.

A group is a neuron: a row, a column, an input channel. Whatever the layer type, in the tensor's
memory the groups form one regular pattern, the view; the backends know only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import prod

import torch
from torch import Tensor

GroupBy = str | int | None

_NAMED_DIMS = {
    "out": lambda ndim: (0,),
    "in": lambda ndim: (1,),
    "in_spatial": lambda ndim: tuple(range(1, ndim)),
    "filter_slice": lambda ndim: (0, 1),
    "layer": lambda ndim: (),
}
GROUP_BY = ("auto", *_NAMED_DIMS)
"""The names that `group_by` takes, besides None and an int dim."""


@dataclass(frozen=True)
class GroupView:
    """A dense tensor's memory as (blocks, outer, groups, inner).

    The element at [b, o, g, i] of the view belongs to group (b, g): a group is spread over
    `outer` runs of `inner` neighbours in memory. Rows have outer = 1, columns inner = 1;
    blocks > 1 only where groups are split by two dims that are apart in memory, such as the
    (out, in) slices of a channels_last filter. Without groups each element is one by itself.
    """

    order: tuple[int, ...]  # the tensor's dims from the slowest to the fastest in memory
    blocks: int
    outer: int
    groups: int
    inner: int
    grouped: bool

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return self.blocks * self.groups

    @property
    def group_size(self) -> int:
        """Number of weights in a group."""
        return self.outer * self.inner

    def split(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (blocks, outer, groups, inner); a group is a slice [b, :, g, :].

        `tensor` has the shape that the view was made for. With that tensor's strides the result
        shares its memory; with others it may be a copy.
        """
        shape = (self.blocks, self.outer, self.groups, self.inner)
        return tensor.permute(self.order).reshape(shape)

    def join(self, split: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `split`: return a tensor of the original `shape`."""
        position = {dim: i for i, dim in enumerate(self.order)}
        in_memory_order = split.reshape([shape[dim] for dim in self.order])
        return in_memory_order.permute([position[dim] for dim in range(len(shape))])


def check_group_by(group_by: GroupBy) -> None:
    """Raise TypeError or ValueError unless `group_by` is None, an int or a name of `GROUP_BY`."""
    if isinstance(group_by, bool) or not isinstance(group_by, (str, int, type(None))):
        raise TypeError(f"group_by must be None, an int dim or a name, got {group_by!r}")
    if isinstance(group_by, str) and group_by not in GROUP_BY:
        names = ", ".join(repr(name) for name in GROUP_BY)
        raise ValueError(f"group_by must be None, an int dim or one of {names}, got {group_by!r}")


def view_of(tensor: Tensor, group_by: GroupBy) -> GroupView:
    """Return the view of `tensor` whose groups are the index tuples over the dims of `group_by`.

    Args:
        tensor: any shape, dense: its elements fill a stretch of memory, in any order of dims.
        group_by: "out" (dim 0), "in" (dim 1), "in_spatial" (dims 1 and up), "filter_slice"
            (dims 0 and 1), "layer" (one group), an int dim, None (no groups), or "auto": "in"
            for matrices, "out" for three dims and more, None for fewer than two.

    Raises:
        TypeError: `group_by` is none of these.
        ValueError: there is no such name, the tensor is not dense, or it lacks the dims that
            `group_by` names.
    """
    # torch.compile would warn that it looks into no cache.
    view = _view.__wrapped__ if torch.compiler.is_compiling() else _view
    return view(tuple(tensor.shape), tensor.stride(), group_by)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], stride: tuple[int, ...], group_by: GroupBy) -> GroupView:
    check_group_by(group_by)
    dims = _group_dims(shape, group_by)
    order = _memory_order(shape, stride)
    if dims is None:
        return GroupView(order, 1, 1, prod(shape), 1, grouped=False)

    # Neighbouring dims of one kind merge into runs: [(is_group_dim, size), ...], slowest first.
    long_dims = [dim for dim in order if shape[dim] != 1]
    runs = [
        (is_group, prod([shape[dim] for dim in run]))
        for is_group, run in groupby(long_dims, key=lambda dim: dim in dims)
    ]
    sizes = []  # inner, groups, outer, blocks
    for want_group in (False, True, False, True):
        sizes.append(runs.pop()[1] if runs and runs[-1][0] == want_group else 1)
    if runs:
        raise ValueError(
            f"group_by={group_by!r} needs weights whose group dims lie in at most two stretches "
            f"of memory, got shape {shape} with strides {stride}; use .contiguous()"
        )
    inner, groups, outer, blocks = sizes
    return GroupView(order, blocks, outer, groups, inner, grouped=True)


def is_laid_out_like(param: Tensor, tensor: Tensor) -> bool:
    """Return whether `tensor` has its elements, as they are, where `param` has them."""
    plain = not (tensor.is_neg() or tensor._is_zerotensor())  # else torch must make it real
    return plain and _same_layout(param.shape, param.stride(), tensor.stride())


def laid_out_like(param: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy with its elements where the dense `param` has them."""
    if is_laid_out_like(param, tensor):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


@lru_cache(maxsize=4096)
def _same_layout(shape: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> bool:
    # The stride of a dim of size 1 leads nowhere.
    return all(n == 1 or a == b for n, a, b in zip(shape, ours, theirs, strict=True))


def _group_dims(shape: tuple[int, ...], group_by: GroupBy) -> tuple[int, ...] | None:
    """Return the dims that index the groups; None for no groups."""
    ndim = len(shape)
    if group_by == "auto":
        group_by = {0: None, 1: None, 2: "in"}.get(ndim, "out")
    if group_by is None:
        return None
    if isinstance(group_by, int):
        if not ndim:
            raise ValueError(f"group_by={group_by} needs at least 1 dims, got shape {shape}")
        if not -ndim <= group_by < ndim:
            raise ValueError(
                f"group_by={group_by} must be a dim in [{-ndim}, {ndim - 1}] for shape {shape}"
            )
        return (group_by % ndim,)
    dims = _NAMED_DIMS[group_by](ndim)
    if (dims and dims[-1] >= ndim) or (group_by == "in_spatial" and ndim < 2):
        need = 1 if group_by == "out" else 2
        raise ValueError(f"group_by={group_by!r} needs at least {need} dims, got shape {shape}")
    return dims


def _memory_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dims from slowest to fastest; ValueError unless the memory is dense."""
    # Dims of size 1 may carry any stride: wherever they stand, they change nothing.
    order = sorted(range(len(shape)), key=lambda dim: -stride[dim])
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected and 0 not in shape:
            raise ValueError(
                f"the tensor must be dense and without overlap, got shape {shape} with strides "
                f"{stride}; use .contiguous()"
            )
        expected *= shape[dim]
    return tuple(order)
