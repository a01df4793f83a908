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

from tl1kernels.backends.triton_math import (
    GROUPS,
    INNER,
    ITEM,
    N_COEFFICIENTS,
    TABLE,
)
from tl1kernels.backends.triton_prepare import prepare_kernel
from tl1kernels.backends.triton_teams import MEASURES, OUTCOMES, split_kernel
from tl1kernels.backends.triton_tiles import (
    finished,
    measured,
    shrunk,
    thresholded,
    write,
)

__all__ = ["MEASURES", "OUTCOMES", "prepare_kernel", "resident_kernel", "split_kernel"]


@triton.jit
def _flat_tile(
    row, c, stream, tile, TILE: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
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
    write(row, c, stream, base, offsets, mask, t, T, G, ALIGNED)


@triton.jit
def _rows_tile(
    row, c, stream, tile, TILE: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
):
    """Groups that are rows of at most WIDTH neighbours, as many as fill TILE."""
    ROWS: tl.constexpr = TILE // WIDTH if WIDTH < TILE else 1
    first = tile * ROWS
    width = tl.load(row + INNER)
    if ALIGNED:
        width = width // VECTOR * VECTOR  # tells the compiler what it is a multiple of
    base = first * width
    width = width.to(tl.int32)
    r = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (r < tl.load(row + GROUPS) - first) & (column < width)
    offsets = r * width + column
    t = thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    squares, total, largest, at = measured(t, column, 1, c, Couple)
    factor, cut, kept = finished(squares, total, largest, c, Couple)
    first_of_largest = column == at[:, None]
    w = shrunk(t, factor[:, None], cut[:, None], kept[:, None], first_of_largest, A, Couple)
    write(row, c, stream, base, offsets, mask, w, T, G, ALIGNED)


@triton.jit(do_not_specialize=["seed"])
def resident_kernel(
    table, coefficients, work, found_inf, seed,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
    KINDS: tl.constexpr, TILE: tl.constexpr,
):
    """One tile a program: no groups, or groups that the tile holds. Each weight is read once.

    KINDS has a bit for each kind of tile in `work`, and only their code is there: bit 2 k for rows
    of up to 2^k, 2 * 31 for no groups; the next bit for the aligned ones.
    """
    item = work + tl.program_id(0).to(tl.int64) * ITEM
    row = table + tl.load(item).to(tl.int64) * TABLE
    c = coefficients + tl.load(item).to(tl.int64) * N_COEFFICIENTS
    stream = None
    if seed is not None:
        stream = seed + tl.load(item)
    kind = tl.load(item + 1)
    tile = tl.load(item + 2).to(tl.int64)
    if tl.load(found_inf) == 0:
        for aligned in tl.static_range(2):
            for k in tl.static_range(14):
                if (KINDS >> (2 * k + aligned)) & 1:
                    if kind == 2 * k + aligned:
                        _rows_tile(
                            row, c, stream, tile, TILE, 1 << k, aligned == 1,
                            Advance, Apply, STATES, Prox, Couple, T, G, A, VECTOR,
                        )
            if (KINDS >> (62 + aligned)) & 1:
                if kind == 62 + aligned:
                    _flat_tile(
                        row, c, stream, tile, TILE, aligned == 1,
                        Advance, Apply, STATES, Prox, T, G, A,
                    )
