"""The Triton kernels: update rule, threshold and group shrinkage while a tile is in registers.

Here are the tiles that hold their groups, and their kernel; those that share groups are in
`triton_teams.py`, what all tiles do in `triton_tiles.py`, the maths in `triton_math.py`. Which tile
serves which view is decided, and tabulated, in `triton_schedule.py`.

Whatever a scheduler may change is a number in memory, never a constant of a kernel. The kernel of
`triton_prepare.py` first makes coefficients of every tensor's numbers; the others read them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends import triton_schedule
from tl1kernels.backends.triton_math import GROUPS, INNER, ITEM, N_COEFFICIENTS, TABLE
from tl1kernels.backends.triton_prepare import prepare_kernel
from tl1kernels.backends.triton_teams import MEASURES, OUTCOMES, split_kernel
from tl1kernels.backends.triton_tiles import (
    finished,
    measured,
    random_key,
    shrunk,
    thresholded,
    write,
)

N_WIDTHS = tl.constexpr(len(triton_schedule.WIDTHS))
WIDTHS = tl.constexpr(tuple(width for width, _ in triton_schedule.WIDTHS))
PARTS = tl.constexpr(tuple(parts for _, parts in triton_schedule.WIDTHS))

__all__ = ["MEASURES", "OUTCOMES", "prepare_kernel", "resident_kernel", "split_kernel"]


@triton.jit
def _flat_tile(
    row, c, key, tile, TILE: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
    Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    A: tl.constexpr,
):
    """TILE neighbours without groups; ALIGNED ones are all there."""
    base = tile * TILE
    offsets = tl.arange(0, TILE)
    mask = None
    if not ALIGNED:
        mask = offsets < tl.load(row + GROUPS) - base
    t = thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    write(row, c, key, base, offsets, mask, t, T, G, ALIGNED)


@triton.jit
def _rows_tile(
    row, c, key, tile, TILE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ALIGNED: tl.constexpr, Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr,
    Prox: tl.constexpr, Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Groups that are rows of at most PARTS x WIDTH neighbours; a part of them fills TILE."""
    ROWS: tl.constexpr = TILE // WIDTH if WIDTH < TILE else 1
    first = tile * ROWS
    width = tl.load(row + INNER)
    if ALIGNED:
        width = width // VECTOR * VECTOR  # tells the compiler what it is a multiple of
    base = first * width
    r = tl.arange(0, ROWS)
    there = r < tl.load(row + GROUPS) - first
    none = tl.zeros([ROWS], A)
    _rows_part(
        row, c, key, base, width.to(tl.int32), there, none, none, none - 1,
        tl.zeros([ROWS], tl.int32), 0, WIDTH, PARTS, ALIGNED, Advance, Apply, STATES, Prox, Couple,
        T, G, A,
    )


@triton.jit
def _rows_part(
    row, c, key, base, width, there, squares, total, largest, at, PART: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
    Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr, Couple: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr, A: tl.constexpr,
):
    """Part PART of rows, and those behind it; return what becomes of the groups.

    `squares`, `total`, `largest`, `at` are of the parts before. t waits until the last part is in.
    """
    r = tl.arange(0, there.shape[0])[:, None]
    column = PART * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = there[:, None] & (column < width)
    offsets = r * width + column
    t = thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    of_part, total_of_part, largest_of_part, at_in_part = measured(t, column, 1, c, Couple)
    squares += of_part
    if Couple is not None:
        total += total_of_part
        at = tl.where(largest_of_part > largest, at_in_part, at)
        largest = tl.maximum(largest, largest_of_part)
    if PART + 1 < PARTS:
        factor, cut, kept, at = _rows_part(
            row, c, key, base, width, there, squares, total, largest, at, PART + 1, WIDTH,
            PARTS, ALIGNED, Advance, Apply, STATES, Prox, Couple, T, G, A,
        )
    else:
        factor, cut, kept = finished(squares, total, largest, c, Couple)
    first_of_largest = column == at[:, None]
    w = shrunk(t, factor[:, None], cut[:, None], kept[:, None], first_of_largest, A, Couple)
    write(row, c, key, base, offsets, mask, w, T, G, ALIGNED)
    return factor, cut, kept, at


@triton.jit(do_not_specialize=["seed"])
def resident_kernel(
    table, coefficients, work, found_inf, seed,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
    KINDS: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):
    """One tile a program: no groups, or groups that the tile holds. Each weight is read once.

    KINDS has a bit for each kind of tile in `work`, and only their code is there: bit 2 k for rows
    of kind k of `triton_schedule.WIDTHS`, 2 * 31 for no groups; the next bit for the aligned ones.
    """
    item = work + tl.program_id(0).to(tl.int64) * ITEM
    row = table + tl.load(item).to(tl.int64) * TABLE
    c = coefficients + tl.load(item).to(tl.int64) * N_COEFFICIENTS
    key = None
    if seed is not None:
        key = random_key(seed, tl.load(item))
    kind = tl.load(item + 1)
    tile = tl.load(item + 2).to(tl.int64)
    if tl.load(found_inf) == 0:
        for aligned in tl.static_range(2):
            for k in tl.static_range(N_WIDTHS):
                if (KINDS >> (2 * k + aligned)) & 1:
                    if kind == 2 * k + aligned:
                        _rows_tile(
                            row, c, key, tile, TILE if PARTS[k] == 1 else PART, WIDTHS[k],
                            PARTS[k], aligned == 1,
                            Advance, Apply, STATES, Prox, Couple, T, G, A, VECTOR,
                        )
            if (KINDS >> (62 + aligned)) & 1:
                if kind == 62 + aligned:
                    _flat_tile(
                        row, c, key, tile, TILE, aligned == 1,
                        Advance, Apply, STATES, Prox, T, G, A,
                    )
