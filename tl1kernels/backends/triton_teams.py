"""The Triton kernel for groups that no tile holds, and for columns: a team of tiles shares them.

Every tile adds its part of the sums of squares to memory; the one that comes last makes the team's
factors of them, always in the same order. Tiles are begun in the order of `work`.

HELD: the team's programs run at the same time, and t waits in their registers. A team has no more
tiles than surely run at once, so that the first team that is not complete becomes so.

FIRST, SECOND: larger teams go through their tiles twice. Nobody waits for a tile that has not
begun. Between the passes t waits in the parameter itself. In 16 bits that would round twice: t is
computed again from the parameter as it was and the state as it is.

WHOLE: one tile has all the rows of its columns.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends import triton_schedule
from tl1kernels.backends.triton_math import (
    FACTORS,
    GROUPS,
    INNER,
    ITEM,
    N_COEFFICIENTS,
    OUTER,
    PARAM,
    PARTIALS,
    PIECES,
    TABLE,
    TEAMS,
)
from tl1kernels.backends.triton_tiles import (
    NOWHERE,
    address_of,
    finished,
    load_or,
    measured,
    random_key,
    shrunk,
    thresholded,
    write,
)

MEASURES = 4  # of a group whose weights are coupled: squares, sum, largest, its place in the piece
OUTCOMES = 5  # factor, cut, kept, and where: piece, place in the piece
PIECES_AT_A_TIME = tl.constexpr(16)  # of a panel, that its team's last tile adds up
LANES = tl.constexpr(1024)  # pieces of a long group that are added up side by side

# Phases of tiles that share groups.
FIRST = tl.constexpr(triton_schedule.FIRST)
SECOND = tl.constexpr(triton_schedule.SECOND)
WHOLE = tl.constexpr(triton_schedule.WHOLE)
HELD = tl.constexpr(triton_schedule.HELD)


@triton.jit
def _arrive(arrivals, pieces):
    """Whether this tile of the team is the last; it then sees what the others have written."""
    tl.debug_barrier()
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == pieces - 1


@triton.jit
def _announce(ready):
    tl.debug_barrier()
    tl.atomic_xchg(ready, 1, sem="release")


@triton.jit
def _wait(ready):
    while tl.atomic_add(ready, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()


@triton.jit
def _of_neighbours(squares, total, largest, piece, at, n, Couple: tl.constexpr):
    """Each element's sums and first largest over the n of its group: runs of n neighbours."""
    n = n.to(tl.int32)
    element = tl.arange(0, squares.shape[0])
    first = element // n * n
    all_squares = tl.zeros_like(squares)
    all_total = tl.zeros_like(total)
    top = tl.zeros_like(largest) - 1
    piece_of_top = piece
    at_top = at
    for i in range(0, n):
        other = tl.minimum(first + i, squares.shape[0] - 1)
        all_squares += tl.gather(squares, other, 0)
        if Couple is not None:
            all_total += tl.gather(total, other, 0)
            size = tl.gather(largest, other, 0)
            of_piece = tl.gather(piece, other, 0)
            at_other = tl.gather(at, other, 0)
            before = (of_piece < piece_of_top) | (of_piece == piece_of_top) & (at_other < at_top)
            better = (size > top) | (size == top) & before
            top = tl.where(better, size, top)
            piece_of_top = tl.where(better, of_piece, piece_of_top)
            at_top = tl.where(better, at_other, at_top)
    return all_squares, all_total, top, piece_of_top, at_top


@triton.jit
def _leave(
    address, stride, mask, squares, total, largest, at, A: tl.constexpr, Couple: tl.constexpr
):
    """Leave what was measured of a piece for the team."""
    tl.store(address, squares, mask=mask)
    if Couple is not None:
        tl.store(address + stride, total, mask=mask)
        tl.store(address + 2 * stride, largest, mask=mask)
        tl.store(address + 3 * stride, at.to(A), mask=mask)


@triton.jit
def _decide(
    address, stride, mask, squares, total, largest, piece, at, c, A: tl.constexpr,
    Couple: tl.constexpr,
):
    """Leave for the team what becomes of its groups."""
    factor, cut, kept = finished(squares, total, largest, c, Couple)
    tl.store(address, factor, mask=mask)
    if Couple is not None:
        tl.store(address + stride, cut, mask=mask)
        tl.store(address + 2 * stride, kept, mask=mask)
        tl.store(address + 3 * stride, piece.to(A), mask=mask)
        tl.store(address + 4 * stride, at.to(A), mask=mask)


@triton.jit
def _decide_columns(
    of_block, n_partials, pieces, row_length, inner, inside, own_factors, n_factors, c,
    COLUMNS: tl.constexpr, A: tl.constexpr, Couple: tl.constexpr,
):
    """Leave for the team what becomes of its panel's groups, from what its tiles have left."""
    # Each thread adds up its own pieces: the team waits, and would wait for a barrier a turn.
    r = tl.arange(0, PIECES_AT_A_TIME)[:, None]
    top = tl.zeros([PIECES_AT_A_TIME, COLUMNS], A)
    all_squares = top.to(tl.float64)
    all_total = all_squares
    piece_of_top = r + tl.zeros([PIECES_AT_A_TIME, COLUMNS], tl.int32)  # the first with the largest
    for i in range(0, pieces.to(tl.int32), PIECES_AT_A_TIME):
        there = (r < pieces - i) & inside[None, :]
        some = of_block[None, :] + (i + r) * row_length
        all_squares += tl.load(some, mask=there, other=0.0).to(tl.float64)
        if Couple is not None:
            all_total += tl.load(some + n_partials, mask=there, other=0.0).to(tl.float64)
            in_pieces = tl.load(some + 2 * n_partials, mask=there, other=0.0)
            piece_of_top = tl.where(in_pieces > top, i + r, piece_of_top)
            top = tl.maximum(top, in_pieces)
    squares = tl.sum(all_squares, axis=0).to(A)
    total = squares
    highest = squares
    piece = tl.zeros([COLUMNS], tl.int32)
    at_top = piece
    if Couple is not None:
        total = tl.sum(all_total, axis=0).to(A)
        highest = tl.max(top, axis=0)
        piece = tl.min(tl.where(top == highest[None, :], piece_of_top, 1 << 30), axis=0)
        of_piece = of_block + 3 * n_partials + piece * row_length
        at_top = tl.load(of_piece, mask=inside, other=0.0).to(tl.int32)
    if inner > 1:
        squares, total, highest, piece, at_top = _of_neighbours(
            squares, total, highest, piece, at_top, inner, Couple
        )
    _decide(own_factors, n_factors, inside, squares, total, highest, piece, at_top, c, A, Couple)


@triton.jit
def _decide_long(
    partials, n_partials, pieces, factors, n_factors, c,
    A: tl.constexpr, Couple: tl.constexpr,
):
    """Leave for the team what becomes of its group, from what its tiles have left."""
    at = tl.arange(0, LANES)
    all_squares = tl.zeros([LANES], tl.float64)
    all_total = tl.zeros([LANES], tl.float64)
    # Of the pieces that each lane looks at, the first with the largest weight.
    top = tl.zeros([LANES], A)
    pieces_of_tops = at
    for i in range(0, pieces.to(tl.int32), LANES):
        there = at < pieces - i
        some = partials + i + at
        all_squares += tl.load(some, mask=there, other=0.0).to(tl.float64)
        if Couple is not None:
            all_total += tl.load(some + n_partials, mask=there, other=0.0).to(tl.float64)
            in_pieces = tl.load(some + 2 * n_partials, mask=there, other=0.0)
            pieces_of_tops = tl.where(in_pieces > top, i + at, pieces_of_tops)
            top = tl.maximum(top, in_pieces)
    highest = tl.max(top, axis=0)
    piece_of_top = tl.min(tl.where(top == highest, pieces_of_tops, 1 << 30), axis=0)
    at_top = 0 * piece_of_top
    if Couple is not None:
        at_top = tl.load(partials + 3 * n_partials + piece_of_top).to(tl.int32)
    squares = tl.sum(all_squares, axis=0).to(A)
    total = tl.sum(all_total, axis=0).to(A)
    _decide(
        factors, n_factors, None, squares, total, highest, piece_of_top, at_top, c, A, Couple
    )


@triton.jit
def _decided(address, stride, mask, own_piece, Couple: tl.constexpr):
    """What becomes of a piece's groups: factor, cut, kept, and the place of that in this piece."""
    factor = load_or(address, mask, 0.0)
    if Couple is None:
        return factor, factor, factor, factor.to(tl.int32)
    else:
        piece = load_or(address + 3 * stride, mask, -1.0).to(tl.int32)
        at = load_or(address + 4 * stride, mask, 0.0).to(tl.int32)
        cut = load_or(address + stride, mask, 0.0)
        kept = load_or(address + 2 * stride, mask, -1.0)
        return factor, cut, kept, tl.where(piece == own_piece, at, NOWHERE)


@triton.jit
def _of_phase(
    row, c, base, offsets, mask, ready, PHASE: tl.constexpr, ALIGNED: tl.constexpr,
    Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr, A: tl.constexpr,
):
    """t: computed, and left in the parameter by FIRST; SECOND waits, and finds or recomputes it."""
    if PHASE == SECOND:
        _wait(ready)
    if PHASE == SECOND and T == A:
        t = load_or(address_of(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0)
    else:
        t = thresholded(
            row, c, base, offsets, mask, PHASE == SECOND, ALIGNED, Advance, Apply, STATES, Prox,
            T, G, A,
        )
    if PHASE == FIRST and T == A:
        tl.store(address_of(row, PARAM, T, base, ALIGNED) + offsets, t, mask=mask)
    return t


@triton.jit
def _columns_tile(
    row, c, key, team, piece, partials, n_partials, factors, n_factors, arrivals, ready,
    PHASE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, Advance: tl.constexpr, Apply: tl.constexpr,
    STATES: tl.constexpr, Prox: tl.constexpr, Couple: tl.constexpr, T: tl.constexpr,
    G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
):
    """Groups that are columns, or `inner` neighbours in each of many rows: ROWS x COLUMNS of them.

    A team is a panel of whole groups down all rows; WHOLE, where ROWS are all the rows there are.
    """
    outer = tl.load(row + OUTER)
    inner = tl.load(row + INNER)
    pieces = tl.load(row + PIECES)
    row_length = tl.load(row + GROUPS) * inner
    span = COLUMNS // inner.to(tl.int32) * inner
    if ALIGNED:
        row_length = row_length // VECTOR * VECTOR
        span = COLUMNS  # inner is 1 then
    panels = tl.cdiv(row_length, span).to(tl.int32)
    block = (team // panels).to(tl.int64)
    left = (team % panels).to(tl.int64) * span
    above = piece.to(tl.int64) * ROWS
    base = (block * outer + above) * row_length + left
    r = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    inside = (column < span) & (column < row_length - left)
    mask = (r < outer - above) & inside[None, :]
    offsets = r * row_length.to(tl.int32) + column[None, :]  # fits: MOST_ACROSS of the schedule
    place = r * COLUMNS + column[None, :]
    own_factors = factors + tl.load(row + FACTORS) + block * row_length + left + column
    arrivals += tl.load(row + TEAMS) + team
    ready += tl.load(row + TEAMS) + team
    t = _of_phase(
        row, c, base, offsets, mask, ready, PHASE, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    if PHASE != SECOND:
        squares, total, largest, at = measured(t, place, 0, c, Couple)
    if PHASE == FIRST or PHASE == HELD:
        of_block = partials + tl.load(row + PARTIALS) + block * pieces * row_length + left + column
        own = of_block + piece.to(tl.int64) * row_length
        _leave(own, n_partials, inside, squares, total, largest, at, A, Couple)
        if _arrive(arrivals, pieces):
            _decide_columns(
                of_block, n_partials, pieces, row_length, inner, inside, own_factors, n_factors, c,
                COLUMNS, A, Couple,
            )
            _announce(ready)
    if PHASE == HELD:
        _wait(ready)
    if PHASE != FIRST:
        if PHASE == WHOLE:
            if inner > 1:
                squares, total, largest, _, at = _of_neighbours(
                    squares, total, largest, 0 * column, at, inner, Couple
                )
            factor, cut, kept = finished(squares, total, largest, c, Couple)
        else:
            factor, cut, kept, at = _decided(own_factors, n_factors, inside, piece, Couple)
        first_of_largest = place == at[None, :]
        w = shrunk(t, factor[None, :], cut[None, :], kept[None, :], first_of_largest, A, Couple)
        write(row, c, key, base, offsets, mask, w, T, G, ALIGNED)


@triton.jit
def _long_tile(
    row, c, key, team, piece, partials, n_partials, factors, n_factors, arrivals, ready,
    PHASE: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr,
    Prox: tl.constexpr, Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Groups of `outer` runs of many neighbours: TILE of one run. A team is a group."""
    outer = tl.load(row + OUTER)
    groups = tl.load(row + GROUPS)
    inner = tl.load(row + INNER)
    pieces = tl.load(row + PIECES)
    if ALIGNED:
        inner = inner // VECTOR * VECTOR
    in_run = pieces.to(tl.int32) // outer.to(tl.int32)
    block = (team // groups.to(tl.int32)).to(tl.int64)
    run = (block * outer + piece // in_run) * groups + team % groups.to(tl.int32)
    skipped = (piece % in_run).to(tl.int64) * TILE
    base = run * inner + skipped
    offsets = tl.arange(0, TILE)
    mask = offsets < inner - skipped
    arrivals += tl.load(row + TEAMS) + team
    ready += tl.load(row + TEAMS) + team
    factors += tl.load(row + FACTORS) + team
    t = _of_phase(
        row, c, base, offsets, mask, ready, PHASE, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    if PHASE != SECOND:
        squares, total, largest, at = measured(t, offsets, 0, c, Couple)
        partials += tl.load(row + PARTIALS) + team.to(tl.int64) * pieces
        _leave(partials + piece, n_partials, None, squares, total, largest, at, A, Couple)
        if _arrive(arrivals, pieces):
            _decide_long(partials, n_partials, pieces, factors, n_factors, c, A, Couple)
            _announce(ready)
    if PHASE == HELD:
        _wait(ready)
    if PHASE != FIRST:
        factor, cut, kept, at = _decided(factors, n_factors, None, piece, Couple)
        w = shrunk(t, factor, cut, kept, offsets == at, A, Couple)
        write(row, c, key, base, offsets, mask, w, T, G, ALIGNED)


@triton.jit(do_not_specialize=["seed", "n_partials", "n_factors", "n_teams"])
def split_kernel(
    table, coefficients, work, found_inf, seed, partials, n_partials, factors, n_factors, sync,
    n_teams, Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
    KINDS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One tile a program, of groups that no tile holds, or of columns.

    KINDS has a bit for each kind of tile in `work`: bit 8 g + 2 p for geometry g (0 for columns,
    1 for long runs) and phase p, the next bit for the aligned ones. `sync`: a counter of programs,
    then for each team a counter of arrivals, then for each whether its factors are there.
    """
    ticket = tl.atomic_add(sync, 1, sem="relaxed")
    item = work + ticket.to(tl.int64) * ITEM
    row = table + tl.load(item).to(tl.int64) * TABLE
    c = coefficients + tl.load(item).to(tl.int64) * N_COEFFICIENTS
    key = None
    if seed is not None:
        key = random_key(seed, tl.load(item))
    kind = tl.load(item + 1)
    team = tl.load(item + 2)
    piece = tl.load(item + 3)
    arrivals = sync + 1
    ready = sync + 1 + n_teams
    if tl.load(found_inf) == 0:
        for phase in tl.static_range(4):
            for aligned in tl.static_range(2):
                if (KINDS >> (2 * phase + aligned)) & 1:
                    if kind == 2 * phase + aligned:
                        _columns_tile(
                            row, c, key, team, piece, partials, n_partials, factors,
                            n_factors, arrivals, ready, phase, aligned == 1,
                            ROWS, COLUMNS, Advance, Apply, STATES, Prox, Couple, T, G, A, VECTOR,
                        )
                if (KINDS >> (8 + 2 * phase + aligned)) & 1:
                    if kind == 8 + 2 * phase + aligned:
                        _long_tile(
                            row, c, key, team, piece, partials, n_partials, factors,
                            n_factors, arrivals, ready, phase, aligned == 1,
                            TILE, Advance, Apply, STATES, Prox, Couple, T, G, A, VECTOR,
                        )
