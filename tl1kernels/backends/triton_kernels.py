"""The Triton kernels: update rule, threshold and group shrinkage while a tile is in registers.

Read it from the top: what all tiles do; tiles that hold their groups, and their kernel; tiles that
do not, and theirs. The maths is in `triton_math.py`. Which tile serves which view is decided, and
tabulated, in `triton_schedule.py`.

Whatever a scheduler may change is a number in memory, never a constant of a kernel. The kernel of
`triton_prepare.py` first makes coefficients of every tensor's numbers; these read them. Update
rules and penalties are functions passed as constants: a kernel is compiled for one of each, one
storage type `T`, one arithmetic type `A` (that of the state).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends.triton_math import (
    C_CUT,
    C_NORM_UNIT,
    C_OFFSET,
    C_ZERO,
    COPY,
    FACTORS,
    GRAD,
    GROUPS,
    INNER,
    ITEM,
    N_COEFFICIENTS,
    OUTER,
    PARAM,
    PARTIALS,
    PIECES,
    STATE,
    TABLE,
    TEAMS,
)
from tl1kernels.backends.triton_penalties import shrink_factor
from tl1kernels.backends.triton_prepare import prepare_kernel

__all__ = ["prepare_kernel", "resident_kernel", "split_kernel"]

MEASURES = 4  # of a group whose weights are coupled: squares, sum, largest, its place in the piece
OUTCOMES = 5  # factor, cut, kept, and where: piece, place in the piece
NOWHERE = tl.constexpr(1 << 20)  # beyond any place in a tile

# --- A tile: some of a tensor's weights, at `base + offsets`, from memory to t = the threshold of
# the updated weight, and back when their factors are known.


@triton.jit
def _at(row, i: tl.constexpr, T: tl.constexpr, base, ALIGNED: tl.constexpr):
    """The address in column i of a table's row, `base` elements on."""
    start = tl.load(row + i).to(tl.pointer_type(T))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + base


@triton.jit
def _load(address, mask, other: tl.constexpr):
    """What is at the address; `other` where there is no weight: all comes to t = 0 there."""
    if mask is None:
        return tl.load(address)
    else:
        return tl.load(address, mask=mask, other=other)


@triton.jit
def _thresholded(
    row, c, base, offsets, mask, AGAIN: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
    Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    A: tl.constexpr,
):
    """t; the state takes its next values, unless AGAIN says that it has them."""
    p = _load(_at(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0).to(A)
    g = _load(_at(row, GRAD, G, base, ALIGNED) + offsets, mask, 0.0).to(A)
    s0 = p
    s1 = p
    s2 = p
    if STATES > 0:
        s0 = _load(_at(row, STATE, A, base, ALIGNED) + offsets, mask, 0.0)
    if STATES > 1:
        s1 = _load(_at(row, STATE + 1, A, base, ALIGNED) + offsets, mask, 1.0)
    if STATES > 2:
        s2 = _load(_at(row, STATE + 2, A, base, ALIGNED) + offsets, mask, 1.0)
    if not AGAIN:
        s0, s1, s2 = Advance(p, g, s0, s1, s2, c)
        if STATES > 0:
            tl.store(_at(row, STATE, A, base, ALIGNED) + offsets, s0, mask=mask)
        if STATES > 1:
            tl.store(_at(row, STATE + 1, A, base, ALIGNED) + offsets, s1, mask=mask)
        if STATES > 2:
            tl.store(_at(row, STATE + 2, A, base, ALIGNED) + offsets, s2, mask=mask)
    v = Apply(p, g, s0, s1, s2, c)
    if Prox is not None:
        size = tl.abs(v)
        w = tl.where(size <= tl.load(c + C_CUT), 0.0, Prox(size, c, T))
        v = _with_sign_of(w, v, A)
    return v


@triton.jit
def _with_sign_of(size, x, A: tl.constexpr):
    if A == tl.float64:
        sign = x.to(tl.int64, bitcast=True) & (-9223372036854775807 - 1)
        return (size.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = x.to(tl.int32, bitcast=True) & (-2147483647 - 1)
        return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _squares(t, c):
    scaled = t * tl.load(c + C_NORM_UNIT)
    return scaled * scaled


@triton.jit
def _measured(t, place, axis: tl.constexpr, c, Couple: tl.constexpr):
    """Of the groups along an axis: squares, sum, largest magnitude, the first place that has it.

    Only the squares where no penalty couples weights.
    """
    if Couple is None:
        squares = tl.sum(_squares(t, c), axis=axis)
        return squares, squares, squares, squares
    else:
        size = tl.abs(t)
        offset = tl.load(c + C_OFFSET)
        beyond = tl.where(size <= offset, 0.0, size - offset)
        largest = tl.max(tl.where(size >= 0, size, 0.0), axis=axis)  # no NaN: it has no place
        first = tl.where(size == tl.expand_dims(largest, axis), place, NOWHERE)
        squares = tl.sum(_squares(beyond, c), axis=axis)
        return squares, tl.sum(size, axis=axis), largest, tl.min(first, axis=axis)


@triton.jit
def _finished(squares, total, largest, c, Couple: tl.constexpr):
    """What becomes of the groups: factor, cut, kept, as `triton_penalties` has them."""
    if Couple is None:
        factor = shrink_factor(squares, c)
        return factor, factor, factor
    else:
        return Couple(squares, total, largest, c)


@triton.jit
def _shrunk(t, factor, cut, kept, first, A: tl.constexpr, Couple: tl.constexpr):
    """The weights; `first` says which is the first of the largest ones of its group."""
    if Couple is None:
        return t * factor
    else:
        size = tl.abs(t)
        w = tl.where(size <= cut, 0.0, (size - cut) * factor)
        return _with_sign_of(tl.where(first, tl.where(kept >= 0, kept, w), w), t, A)


@triton.jit
def _rounded(w, c, T: tl.constexpr):
    """The weights as they are stored. In float16 small ones become zeros, which have no sign."""
    if T == tl.float16:
        return (w.to(T).to(tl.float32) + tl.load(c + C_ZERO)).to(T)
    else:
        return w.to(T)


@triton.jit
def _write(
    row, c, stream, base, offsets, mask, w, T: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr
):
    """Write the weights, and their copies where there are some.

    With a stream of random numbers, bfloat16 is rounded stochastically.
    """
    address = _at(row, PARAM, T, base, ALIGNED) + offsets
    w += tl.load(c + C_ZERO)
    if stream is not None:
        # Up with a probability of what is cut off: 16 random bits are added to those.
        random = tl.randint(stream, base + offsets).to(tl.int32, bitcast=True) & 0xFFFF
        bits = (w.to(tl.int32, bitcast=True) + random) & -65536
        finite = tl.abs(w) < float("inf")
        w = tl.where(finite, bits, w.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    tl.store(address, _rounded(w, c, T), mask=mask)
    if G != T:
        tl.store(_at(row, COPY, G, base, ALIGNED) + offsets, _rounded(w, c, G), mask=mask)


# --- Groups that a tile holds, and no groups.


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
    t = _thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    _write(row, c, stream, base, offsets, mask, t, T, G, ALIGNED)


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
    t = _thresholded(
        row, c, base, offsets, mask, False, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
    )
    squares, total, largest, at = _measured(t, column, 1, c, Couple)
    factor, cut, kept = _finished(squares, total, largest, c, Couple)
    first_of_largest = column == at[:, None]
    w = _shrunk(t, factor[:, None], cut[:, None], kept[:, None], first_of_largest, A, Couple)
    _write(row, c, stream, base, offsets, mask, w, T, G, ALIGNED)


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


# --- Groups that no tile holds: gone through twice, by a team of tiles. Every tile adds its part
# of the sums of squares to memory; the one that comes last makes the team's factors of them,
# always in the same order; then the team's tiles are gone through again. Nobody waits for a tile
# that has not begun, for tiles are begun in the order of `work`. Between the passes t waits in the
# parameter itself. In 16 bits that would round twice: t is computed again from the parameter as it
# was and the state as it is.


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
    LENGTH: tl.constexpr = squares.shape[0]
    group = tl.arange(0, LENGTH) // n.to(tl.int32)
    same = group[:, None] == group[None, :]
    squares = tl.sum(tl.where(same, squares[None, :], 0.0), axis=1)
    if Couple is not None:
        total = tl.sum(tl.where(same, total[None, :], 0.0), axis=1)
        top = tl.max(tl.where(same, largest[None, :], 0.0), axis=1)
        among = same & (largest[None, :] == top[:, None])
        first = tl.min(tl.where(among, piece[None, :], 1 << 30), axis=1)
        among = among & (piece[None, :] == first[:, None])
        at = tl.min(tl.where(among, at[None, :], NOWHERE), axis=1)
        largest = top
        piece = first
    return squares, total, largest, piece, at


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
    factor, cut, kept = _finished(squares.to(A), total.to(A), largest, c, Couple)
    tl.store(address, factor, mask=mask)
    if Couple is not None:
        tl.store(address + stride, cut, mask=mask)
        tl.store(address + 2 * stride, kept, mask=mask)
        tl.store(address + 3 * stride, piece.to(A), mask=mask)
        tl.store(address + 4 * stride, at.to(A), mask=mask)


@triton.jit
def _decided(address, stride, mask, own_piece, Couple: tl.constexpr):
    """What becomes of a piece's groups: factor, cut, kept, and the place of that in this piece."""
    factor = _load(address, mask, 0.0)
    if Couple is None:
        return factor, factor, factor, factor.to(tl.int32)
    else:
        piece = _load(address + 3 * stride, mask, -1.0).to(tl.int32)
        at = _load(address + 4 * stride, mask, 0.0).to(tl.int32)
        cut = _load(address + stride, mask, 0.0)
        kept = _load(address + 2 * stride, mask, -1.0)
        return factor, cut, kept, tl.where(piece == own_piece, at, NOWHERE)


@triton.jit
def _columns_tile(
    row, c, stream, team, piece, partials, n_partials, factors, n_factors, arrivals, ready,
    PHASE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, Advance: tl.constexpr, Apply: tl.constexpr,
    STATES: tl.constexpr, Prox: tl.constexpr, Couple: tl.constexpr, T: tl.constexpr,
    G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
):
    """Groups that are columns, or `inner` neighbours in each of many rows: ROWS x COLUMNS of them.

    A team is a panel of whole groups down all rows. PHASE 0 adds to the sums, 1 finishes, and 2
    does it all where ROWS are all the rows there are.
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
    offsets = r * row_length + column[None, :]
    place = r * COLUMNS + column[None, :]
    own_factors = factors + tl.load(row + FACTORS) + block * row_length + left + column
    arrivals += tl.load(row + TEAMS) + team
    ready += tl.load(row + TEAMS) + team
    if PHASE == 1:
        _wait(ready)
    if PHASE == 1 and T == A:
        t = _load(_at(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0)
    else:
        t = _thresholded(
            row, c, base, offsets, mask, PHASE == 1, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
        )
    if PHASE == 0 and T == A:
        tl.store(_at(row, PARAM, T, base, ALIGNED) + offsets, t, mask=mask)
    if PHASE == 0:
        squares, total, largest, at = _measured(t, place, 0, c, Couple)
        of_block = partials + tl.load(row + PARTIALS) + block * pieces * row_length + left + column
        own = of_block + piece.to(tl.int64) * row_length
        _leave(own, n_partials, inside, squares, total, largest, at, A, Couple)
        if _arrive(arrivals, pieces):
            all_squares = tl.zeros([COLUMNS], tl.float64)
            all_total = tl.zeros([COLUMNS], tl.float64)
            top = tl.zeros([COLUMNS], A)
            piece_of_top = tl.zeros([COLUMNS], tl.int32)
            at_top = tl.zeros([COLUMNS], tl.int32)
            for i in range(0, pieces.to(tl.int32), ROWS):
                there = (r < pieces - i) & inside[None, :]
                some = of_block[None, :] + (i + r) * row_length
                in_pieces = tl.load(some, mask=there, other=0.0)
                all_squares += tl.sum(in_pieces.to(tl.float64), axis=0)
                if Couple is not None:
                    in_pieces = tl.load(some + n_partials, mask=there, other=0.0)
                    all_total += tl.sum(in_pieces.to(tl.float64), axis=0)
                    in_pieces = tl.load(some + 2 * n_partials, mask=there, other=0.0)
                    best = tl.max(in_pieces, axis=0)
                    at_best = tl.min(tl.where(in_pieces == best[None, :], r, NOWHERE), axis=0)
                    places = tl.load(some + 3 * n_partials, mask=there, other=0.0).to(tl.int32)
                    picked = tl.sum(tl.where(r == at_best[None, :], places, 0), axis=0)
                    piece_of_top = tl.where(best > top, i + at_best, piece_of_top)
                    at_top = tl.where(best > top, picked, at_top)
                    top = tl.maximum(top, best)
            if inner > 1:
                all_squares, all_total, top, piece_of_top, at_top = _of_neighbours(
                    all_squares, all_total, top, piece_of_top, at_top, inner, Couple
                )
            _decide(
                own_factors, n_factors, inside, all_squares, all_total, top, piece_of_top, at_top,
                c, A, Couple,
            )
            _announce(ready)
    else:
        if PHASE == 1:
            factor, cut, kept, at = _decided(own_factors, n_factors, inside, piece, Couple)
        else:
            squares, total, largest, at = _measured(t, place, 0, c, Couple)
            if inner > 1:
                squares, total, largest, _, at = _of_neighbours(
                    squares, total, largest, 0 * column, at, inner, Couple
                )
            factor, cut, kept = _finished(squares, total, largest, c, Couple)
        first_of_largest = place == at[None, :]
        w = _shrunk(t, factor[None, :], cut[None, :], kept[None, :], first_of_largest, A, Couple)
        _write(row, c, stream, base, offsets, mask, w, T, G, ALIGNED)


@triton.jit
def _long_tile(
    row, c, stream, team, piece, partials, n_partials, factors, n_factors, arrivals, ready,
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
    if PHASE == 1:
        _wait(ready)
    if PHASE == 1 and T == A:
        t = _load(_at(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0)
    else:
        t = _thresholded(
            row, c, base, offsets, mask, PHASE == 1, ALIGNED, Advance, Apply, STATES, Prox, T, G, A
        )
    if PHASE == 0 and T == A:
        tl.store(_at(row, PARAM, T, base, ALIGNED) + offsets, t, mask=mask)
    if PHASE == 0:
        squares, total, largest, at = _measured(t, offsets, 0, c, Couple)
        partials += tl.load(row + PARTIALS) + team.to(tl.int64) * pieces
        _leave(partials + piece, n_partials, None, squares, total, largest, at, A, Couple)
        if _arrive(arrivals, pieces):
            all_squares = tl.zeros([TILE], tl.float64)
            all_total = tl.zeros([TILE], tl.float64)
            # Of the pieces that each lane looks at, the first with the largest weight.
            top = tl.zeros([TILE], A)
            pieces_of_tops = offsets
            for i in range(0, pieces.to(tl.int32), TILE):
                there = offsets < pieces - i
                some = partials + i + offsets
                all_squares += tl.load(some, mask=there, other=0.0).to(tl.float64)
                if Couple is not None:
                    all_total += tl.load(some + n_partials, mask=there, other=0.0).to(tl.float64)
                    in_pieces = tl.load(some + 2 * n_partials, mask=there, other=0.0)
                    pieces_of_tops = tl.where(in_pieces > top, i + offsets, pieces_of_tops)
                    top = tl.maximum(top, in_pieces)
            highest = tl.max(top, axis=0)
            piece_of_top = tl.min(tl.where(top == highest, pieces_of_tops, 1 << 30), axis=0)
            at_top = 0 * piece_of_top
            if Couple is not None:
                at_top = tl.load(partials + 3 * n_partials + piece_of_top).to(tl.int32)
            _decide(
                factors, n_factors, None, tl.sum(all_squares, axis=0), tl.sum(all_total, axis=0),
                highest, piece_of_top, at_top, c, A, Couple,
            )
            _announce(ready)
    else:
        factor, cut, kept, at = _decided(factors, n_factors, None, piece, Couple)
        w = _shrunk(t, factor, cut, kept, offsets == at, A, Couple)
        _write(row, c, stream, base, offsets, mask, w, T, G, ALIGNED)


@triton.jit(do_not_specialize=["seed", "n_partials", "n_factors", "n_teams"])
def split_kernel(
    table, coefficients, work, found_inf, seed, partials, n_partials, factors, n_factors, sync,
    n_teams, Advance: tl.constexpr, Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr,
    Couple: tl.constexpr, T: tl.constexpr, G: tl.constexpr, A: tl.constexpr, VECTOR: tl.constexpr,
    KINDS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One tile a program, of groups that no tile holds, or of columns.

    KINDS has a bit for each kind of tile in `work`: bit 6 g + 2 p for geometry g (0 for columns,
    1 for long runs) and phase p, the next bit for the aligned ones. `sync`: a counter of programs,
    then for each team a counter of arrivals, then for each whether its factors are there.
    """
    ticket = tl.atomic_add(sync, 1, sem="relaxed")
    item = work + ticket.to(tl.int64) * ITEM
    row = table + tl.load(item).to(tl.int64) * TABLE
    c = coefficients + tl.load(item).to(tl.int64) * N_COEFFICIENTS
    stream = None
    if seed is not None:
        stream = seed + tl.load(item)
    kind = tl.load(item + 1)
    team = tl.load(item + 2)
    piece = tl.load(item + 3)
    arrivals = sync + 1
    ready = sync + 1 + n_teams
    if tl.load(found_inf) == 0:
        for phase in tl.static_range(3):
            for aligned in tl.static_range(2):
                if (KINDS >> (2 * phase + aligned)) & 1:
                    if kind == 2 * phase + aligned:
                        _columns_tile(
                            row, c, stream, team, piece, partials, n_partials, factors,
                            n_factors, arrivals, ready, phase, aligned == 1,
                            ROWS, COLUMNS, Advance, Apply, STATES, Prox, Couple, T, G, A, VECTOR,
                        )
                if (KINDS >> (6 + 2 * phase + aligned)) & 1:
                    if kind == 6 + 2 * phase + aligned:
                        _long_tile(
                            row, c, stream, team, piece, partials, n_partials, factors,
                            n_factors, arrivals, ready, phase, aligned == 1,
                            TILE, Advance, Apply, STATES, Prox, Couple, T, G, A, VECTOR,
                        )
