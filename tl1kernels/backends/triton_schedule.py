"""Which tile of `triton_kernels` serves which view, and in what order. No Triton, no GPU.

A tensor's view is (blocks, outer, groups, inner), see `views`. By it

| groups                              | kind    | a tile                                  |
|-------------------------------------|---------|-----------------------------------------|
| none                                | flat    | `Tile.weights` neighbours               |
| rows (outer = 1) of at most LONGEST | rows    | as many as fill that, by WIDTHS         |
| outer > 1, runs of at most COLUMNS  | columns | COLUMNS side by side, of whole groups   |
| all others: long rows, long runs    | long    | `Tile.weights` neighbours of one run    |

The tiles of a group, or of a panel of columns, are a team. A team of one tile, or of no more than
run at the same time, goes through its weights once: it reads and writes each weight, gradient and
state once. A larger one takes two passes: the first reads all and writes state, the second reads
all again and writes the weights. Few tiles begin between a team's passes, so that the second finds
in the L2 cache what the first has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tl1kernels.backends.gpu_work import NO_ITEMS, Items, ceil_div, in_turn, items_of
from tl1kernels.views import GroupView

LONGEST = 8192  # a row that a tile of its own holds in registers
COLUMNS = 64
MOST_ACROSS = 2**25  # weights of a row of columns: what a tile has of them is 32 bits apart
LAG = 1024
"""Tiles begun between a group's two passes: enough that the first is over and nobody waits."""

WIDTHS = (
    *((1 << k, 1) for k in range(14)),
    *((1 << k, 3) for k in range(5, 12)),
    *((1 << k, 9) for k in range(4, 10)),
)
"""Of rows, by kind of resident tile: a part, which is a power of two, and how many parts.

One part alone would leave a quarter of the lanes idle in a transformer's rows of 768 and 3072, and
nearly half of them in the 3x3 filters of 64, 128, ... channels.
"""
FLAT = 31  # the kind of resident tile without groups
COLUMNS_KIND, LONG_KIND = 0, 4  # as kinds of split tile: plus a phase
FIRST, SECOND, WHOLE, HELD = 0, 1, 2, 3  # phases


FIELDS = ("outer", "groups", "inner", "pieces", "partials", "teams", "factors")
ROW = np.dtype([(name, np.int64) for name in FIELDS])
"""A tensor's part of the layout: its view, the pieces of a team, where those of its teams begin in
the workspaces."""


@dataclass(frozen=True)
class Tile:
    """How much a program of a kernel takes, and who does it.

    Attributes:
        weights: of a tile; a longer row is a tile of its own.
        warps: of 32 threads.
    """

    weights: int
    warps: int

    def part(self, itemsize: int) -> int:
        """Return the weights of one part of a tile of several: 16 bytes a thread."""
        return 32 * self.warps * 16 // itemsize


def resident_tile(longest: int, itemsize: int, states: int) -> Tile:
    """Return the tiles of a batch that see each weight once.

    As many weights a thread as have their loads under way together without filling the registers:
    8 of 4 bytes, 16 of 2, or 32 where there is no state; more in long rows. bench/results has what
    others cost.

    Args:
        longest: weights of a part of the longest row.
        itemsize: bytes of a weight.
        states: number of state tensors.
    """
    a_thread = 8 if itemsize > 2 else 32 if states == 0 else 16
    warps = 4
    most = 32 if itemsize > 2 and states else 8
    while warps < most and 32 * warps * a_thread < longest:
        warps *= 2
    return Tile(32 * warps * a_thread, warps)


def rows_kind(inner: int) -> int:
    """Return the kind of resident tile for rows: the one with the least room that holds them."""
    room = [(width * parts, parts) for width, parts in WIDTHS]
    return min((k for k in range(len(WIDTHS)) if room[k][0] >= inner), key=room.__getitem__)


def split_tile(itemsize: int, states: int) -> Tile:
    """Return the tiles of a batch that share groups.

    Of few warps, so that a multiprocessor runs two however many registers a thread takes.
    """
    return Tile(4096 if itemsize <= 4 and states == 0 else 2048, 4)


@dataclass(frozen=True)
class Work:
    """Tiles of one kernel, in the order in which they begin.

    Attributes:
        items: int32, [tiles, 4]: index of the tensor, kind, team, piece (of resident tiles: the
            tile, 0). A kind is twice one of the constants above, plus 1 where addresses and
            lengths are multiples of a vector of 16 bytes.
        kinds: a bit for each kind among them.
        tile: how much a program takes.
    """

    items: Items
    kinds: int
    tile: Tile


@dataclass(frozen=True)
class Schedule:
    """The tiles of a batch.

    Attributes:
        layout: ROW, [tensors].
        resident: tiles that see each weight once and for all.
        split: tiles that share groups, and columns; in the order in which they must begin.
        n_partials: sums that the split tiles leave for each other.
        n_factors: factors of groups that they leave.
        n_teams: teams of split tiles.
    """

    layout: NDArray[np.void]
    resident: Work
    split: Work
    n_partials: int
    n_factors: int
    n_teams: int


def make_schedule(
    views: Sequence[GroupView],
    aligned: Sequence[bool],
    itemsize: int,
    states: int,
    at_once: int,
    coupled: bool = False,
) -> Schedule:
    """Return the tiles for tensors with these views.

    Args:
        views: of each tensor.
        aligned: whether each tensor's addresses, gradient and state included, are multiples of
            16 bytes.
        itemsize: bytes of a weight.
        states: number of state tensors.
        at_once: tiles that share groups of which as many surely run at the same time.
        coupled: whether the penalty is one of whole groups, of which more is measured.
    """
    vector = 16 // itemsize
    rows_of = {v.inner for v in views if v.grouped and not _split(v)}
    kinds_of = {inner: rows_kind(inner) for inner in rows_of}
    longest = max((WIDTHS[kind][0] for kind in kinds_of.values()), default=0)
    tile = resident_tile(longest, itemsize, states)
    shared = split_tile(itemsize, states)
    # Half of the device is left to others that may be using it. Tiles of few registers leave a
    # third, for three of them run on a multiprocessor; a kernel takes what its worst tile takes.
    few_registers = itemsize <= 4 and not coupled
    for view, at_16 in zip(views, aligned, strict=True):
        few_registers &= not _split(view) or _wide(view, at_16, vector)
    layout = np.zeros(len(views), ROW)
    resident: list[Items] = []
    held: list[Items] = []
    whole: list[Items] = []
    twice: list[tuple[Items, Items]] = []
    n_partials = n_factors = n_teams = 0
    for index, (view, at_16) in enumerate(zip(views, aligned, strict=True)):
        blocks, outer, groups, inner = view.blocks, view.outer, view.groups, view.inner
        row, pieces = layout[index], 1
        if view.n_groups * view.group_size == 0:
            continue
        if not view.grouped:
            resident += _flat(index, view.n_groups * view.group_size, tile.weights, at_16)
            groups = view.n_groups * view.group_size
        elif not _split(view):
            kind = kinds_of[inner]
            rows = blocks * groups
            width, parts = WIDTHS[kind]
            at_a_time = tile.weights if parts == 1 else tile.part(itemsize)
            tiles = ceil_div(rows, max(at_a_time // width, 1))
            resident.append(items_of(index, _kind(kind, _wide(view, at_16, vector)), tiles))
            groups = rows
        else:
            if inner <= COLUMNS:
                length = groups * inner
                pieces = ceil_div(outer, shared.weights // COLUMNS)
                teams = blocks * ceil_div(length, COLUMNS // inner * inner)
                kind, sums, factors = COLUMNS_KIND, blocks * pieces * length, blocks * length
            else:
                pieces = outer * ceil_div(inner, shared.weights)
                teams = blocks * groups
                kind, sums, factors = LONG_KIND, teams * pieces, teams
            wide = _wide(view, at_16, vector)
            row["partials"], row["teams"], row["factors"] = n_partials, n_teams, n_factors
            if pieces == 1:
                whole.append(items_of(index, _kind(kind + WHOLE, wide), teams))
            else:
                n_partials += sums
                n_factors += factors
                n_teams += teams
                if pieces <= (at_once if few_registers else at_once // 2):
                    held.append(items_of(index, _kind(kind + HELD, wide), teams, pieces))
                else:
                    both = (
                        items_of(index, _kind(kind + phase, wide), teams, pieces)
                        for phase in (FIRST, SECOND)
                    )
                    twice.append((next(both), next(both)))
        row["outer"], row["groups"], row["inner"], row["pieces"] = outer, groups, inner, pieces
    return Schedule(
        layout,
        _work(resident, tile),
        # Who waits for others begins first: what waits for nobody fills the gaps at the end.
        _work([*held, in_turn(twice, LAG), *whole], shared),
        n_partials,
        n_factors,
        n_teams,
    )


def _flat(index: int, n: int, tile: int, aligned: bool) -> list[Items]:
    """Return the tiles of n weights: aligned ones are full, and what is left is not aligned."""
    full = n // tile if aligned else 0
    rest = items_of(index, _kind(FLAT, False), ceil_div(n, tile))[full:]
    return [items_of(index, _kind(FLAT, True), full), rest]


def _split(view: GroupView) -> bool:
    """Return whether tiles share a view's groups, or have columns."""
    return view.grouped and (view.outer > 1 or view.inner > LONGEST)


def _wide(view: GroupView, at_16: bool, vector: int) -> bool:
    """Return whether each tile of a view with groups begins and ends between vectors."""
    if _split(view) and view.inner <= COLUMNS:
        return at_16 and view.inner == 1 and view.groups % vector == 0
    return at_16 and view.inner % vector == 0


def _kind(kind: int, aligned: bool) -> int:
    return 2 * kind + aligned


def _work(parts: list[Items], tile: Tile) -> Work:
    items = np.concatenate([NO_ITEMS, *parts])
    kinds = sum(1 << int(kind) for kind in np.unique(items[:, 1]))
    return Work(np.ascontiguousarray(items), kinds, tile)
