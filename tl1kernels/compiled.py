"""Steps and proximal steps inside torch.compile: one op each, which runs as it does outside.

A step's op knows the optimizer by a key, and the options are read when it runs: no schedule of
lr or lam recompiles anything, and the graph has no break.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

_keys = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(optimizer: Any) -> int:
    """Return a key by which the op finds the optimizer while that lives."""
    key = next(_keys)
    _optimizers[key] = optimizer
    return key


def step(key: int, param_groups: Sequence[dict[str, Any]]) -> None:
    """Put a step on all parameters with gradients into the graph; torch.compile traces this."""
    params, grads, places = [], [], []
    place = 0
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                grads.append(param.grad)
                places.append(place)
            place += 1
    if params:
        torch.ops.tl1kernels.optimizer_step_(params, grads, places, key)


def _run(params: list[Tensor], grads: list[Tensor], places: list[int], key: int) -> None:
    optimizer = _optimizers[key]
    given = set(places)
    everyone: list[Tensor] = []
    of_groups = []
    for group in optimizer.param_groups:
        here = range(len(everyone), len(everyone) + len(group["params"]))
        everyone += group["params"]
        of_groups.append([everyone[place] for place in here if place in given])
    # Where the compiler made copies, they have what the graph wrote before the step, and will be
    # written back over the parameters.
    copies = [
        (copy, everyone[place])
        for copy, place in zip(params, places, strict=True)
        if copy.data_ptr() != everyone[place].data_ptr()
    ]
    with torch.no_grad():
        for copy, param in copies:
            param.copy_(copy)
        optimizer._take_step(of_groups, grads)
        for copy, param in copies:
            copy.copy_(param)


_OPS = torch_library.Library("tl1kernels", "FRAGMENT")
# torch.compile's own CUDA graphs would replay what the options were, and take back the memory that
# steps keep. Older versions of torch have no such tag.
_TAGS = tuple(tag for name, tag in torch.Tag.__members__.items() if name == "cudagraph_unsafe")


def define(schema: str, run: Callable[..., None]) -> None:
    """Define an op that returns nothing and writes to what its schema says."""
    name = schema[: schema.index("(")]
    _OPS.define(schema, tags=_TAGS)
    _OPS.impl(name, run, "CompositeExplicitAutograd")
    torch_library.register_fake(f"tl1kernels::{name}", lambda *_: None)


define("optimizer_step_(Tensor(a!)[] params, Tensor[] grads, int[] places, int key) -> ()", _run)
