"""Lists of work for the kernels of both GPU backends: which tile, and in what order. No GPU.

An item is a row of four int32: the tensor's place in the batch, the kind of work (a number of the
backend's), a team or tile of that tensor, and a piece of it.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.int32]

NO_ITEMS: Items = np.empty((0, 4), np.int32)


def items_of(index: int, kind: int, teams: int, pieces: int = 1) -> Items:
    """Return all pieces of a tensor's teams, those of a team in a row."""
    items = np.empty((teams * pieces, 4), np.int32)
    items[:, 0] = index
    items[:, 1] = kind
    items[:, 2] = np.repeat(np.arange(teams), pieces)
    items[:, 3] = np.tile(np.arange(pieces), teams)
    return items


def in_turn(twice: list[tuple[Items, Items]], lag: int) -> Items:
    """Return the items of two passes in one order: who waits for a team comes after all of it.

    A team's second pass comes `lag` items after the last of its first.

    Args:
        twice: for each tensor the items of its first pass and of its second, all teams of as many
            pieces.
        lag: of first passes.
    """
    # The n-th item of a first pass has the key n, one of a second pass a half between two of these.
    keys = [np.empty(0)]
    begun = 0
    for first, second in twice:
        pieces = 1 + second[-1, 3]
        keys.append(np.arange(begun, begun + len(first), dtype=np.float64))
        keys.append(begun + (second[:, 2] + 1.0) * pieces - 0.5 + lag)
        begun += len(first)
    items = np.concatenate([NO_ITEMS, *chain(*twice)])
    return items[np.argsort(np.concatenate(keys), kind="stable")]


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
