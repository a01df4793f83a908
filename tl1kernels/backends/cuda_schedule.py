"""Which blocks of `csrc/cuda` serve which view, and in what order. No GPU.

A tensor's view is (blocks, outer, groups, inner), see `views`. By it

| groups                              | shape | who has a group's weights           |
|-------------------------------------|-------|-------------------------------------|
| none                                | chunk | a block has TILE or more neighbours |
| rows (outer = 1), at least 2 a TILE | chunk | a block, several groups             |
| outer > 1, runs of at most PANEL    | panel | a team, several groups side by side |
| all others                          | run   | a team, one group                   |

A team is one block, where ALONE weights suffice; else as many as have HELD bytes each, if that many
run at the same time. Either way all waits in shared memory for the groups' norms, and each weight
is read once and written once. A block has room for two pieces: it measures the next one while its
team's other blocks measure the last. What is larger than that is split: a first pass leaves the
sums in memory, a second one reads all again, from the L2 cache if it can. Few pieces begin between
a group's passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from tl1kernels.backends.gpu_work import NO_ITEMS, Items, ceil_div, in_turn, items_of
from tl1kernels.views import GroupView

THREADS = 128  # of a block
TILE = 7168
"""Weights of a chunk; half as many in float64, and without groups in a batch of less than MANY."""
MANY = 2048 * TILE
COUPLED_PARTS = 1024
"""Measures in a chunk of a penalty of whole groups; of others as many as a TILE has vectors."""
ALONE = 8192  # weights that one block holds of a team
PANEL = 64  # weights side by side
WIDE_PANEL = 256  # where it takes more to have whole groups and whole vectors
TEAM_GROUPS = 64  # of a panel, at most
HELD = 18 << 10  # bytes that a block of a larger team holds of a piece
BLOCKS_AT_ONCE = 1024  # at most
PIECE = 8192  # weights that a block takes of a split team
LAG = 512
"""Pieces begun between a group's two passes: enough that the first is over and nobody waits."""

CHUNK_SHAPE, PANEL_SHAPE, RUN_SHAPE = 0, 1, 2
HELD_PHASE, FIRST, SECOND = 0, 1, 2
LAYOUT = 18
"""Columns of the layout: csrc/cuda/work.h's Row from `outer` on."""


@dataclass(frozen=True)
class Schedule:
    """The work of a batch.

    Attributes:
        layout: int64, [tensors, LAYOUT].
        resident: int32, [items, 4]: tensor, kind, team, piece; those of a team in a row.
        split: the same, in the order in which they must begin.
        n_partials: of teams of several blocks, what their pieces measure: of each group one.
        n_factors: groups of such teams.
        most_pieces: of a team that is held.
        parts, outcomes, waiting, piece: entries that a block needs in shared memory; the last are
            those of one of a team's pieces, of which it holds two.
    """

    layout: NDArray[np.int64]
    resident: Items
    split: Items
    n_partials: int
    n_factors: int
    most_pieces: int
    parts: int
    outcomes: int
    waiting: int
    piece: int


@dataclass(frozen=True)
class Share:
    """How the pieces of a team divide its rectangle of rows x columns.

    Attributes:
        lanes: threads side by side; those of a row's vectors, or all.
        rows, columns: of a piece, in weights.
        pieces: of a team.
        across: pieces side by side.
        waiting: weights for which a block needs room.
    """

    lanes: int
    rows: int
    columns: int
    pieces: int
    across: int
    waiting: int


def share(outer: int, columns: int, vector: int, pieces: int, panel: bool) -> Share:
    """Return the shares of at most `pieces` blocks in `outer` rows of `columns` weights.

    A panel is never divided into columns: a thread keeps a sum for each of its own.
    """
    across = 1 if panel else max(1, pieces // max(outer, 1))
    wide = min(ceil_div(ceil_div(columns, across), vector) * vector, max(columns, 1))
    # At least 2, even where 1 would do: what the kernels know vectors from single weights by.
    lanes = max(2, min(ceil_div(wide, vector), THREADS))
    at_a_time = THREADS // lanes
    rows = ceil_div(ceil_div(outer, max(pieces // across, 1)), at_a_time) * at_a_time
    pieces = across * ceil_div(outer, rows)  # no more than have something to do
    turns = rows // at_a_time * ceil_div(wide, lanes * vector)
    return Share(lanes, rows, wide, pieces, across, turns * THREADS * vector)


def plan(
    views: Sequence[GroupView],
    aligned: Sequence[bool],
    vector: int,
    arithmetic: int,
    blocks_at_once: int,
    coupled: bool,
) -> Schedule:
    """Return the work for tensors with these views.

    Args:
        views: of each tensor.
        aligned: whether each tensor's addresses, gradient and state included, are multiples of
            16 bytes.
        vector: elements of the parameters' dtype in 16 bytes.
        arithmetic: bytes of a value in the arithmetic's dtype.
        blocks_at_once: how many blocks the GPU runs at the same time.
        coupled: whether the penalty is one of whole groups, of which more is measured.
    """
    layout = np.zeros((len(views), LAYOUT), np.int64)
    teams_of_many: list[Items] = [NO_ITEMS]
    others: list[Items] = [NO_ITEMS]
    split: list[tuple[Items, Items]] = []
    n_partials = n_factors = 0
    parts, outcomes, waiting, piece, most_pieces = THREADS, TEAM_GROUPS, 0, 0, 1
    held = HELD // arithmetic // (2 if coupled else 1)  # whose measures need room too
    tile = TILE * 4 // arithmetic
    flat = TILE if sum(v.n_groups * v.group_size for v in views) >= MANY else TILE // 2
    for index, (view, at_16) in enumerate(zip(views, aligned, strict=True)):
        blocks, outer, groups, inner = view.blocks, view.outer, view.groups, view.inner
        size = view.group_size
        numel = view.n_groups * size
        if numel == 0:
            continue
        row = layout[index]
        row[:4] = outer, groups, inner, numel
        if not view.grouped:
            row[4] = flat
            others.append(_flat(index, numel, flat, at_16, vector))
            continue
        if outer == 1:
            wide = at_16 and size % vector == 0
            # Where a vector has weights of two groups, each weight is measured by itself.
            unit = vector if wide else 1
            most = min(tile, (COUPLED_PARTS if coupled else tile // vector) * unit)
            if 2 * size <= most:
                span = most // size * size
                in_chunk = min(span, numel)
                lanes = min(_floor_power(THREADS * size // in_chunk), 32)
                row[4:7] = span, size, min(lanes, _floor_power(max(size // unit, 1)))
                row[15] = _inverse(size)
                others.append(
                    items_of(index, _kind(CHUNK_SHAPE, HELD_PHASE, wide), ceil_div(numel, span))
                )
                parts = max(parts, in_chunk // unit)
                outcomes = max(outcomes, in_chunk // size)
                turns = ceil_div(in_chunk, THREADS * vector)
                waiting = max(waiting, turns * THREADS * vector)
                continue
        panel = inner <= PANEL
        shape = PANEL_SHAPE if panel else RUN_SHAPE
        length = groups * inner
        wide = at_16 and (length if panel else inner) % vector == 0
        spans = _panel_spans(length, inner, vector, wide) if panel else [inner]
        for span in spans:
            if of := _held(outer, span, vector, panel, held, blocks_at_once):
                break
        else:
            span = spans[0]
            of = _split(outer, span, vector, panel)
        if panel:
            wide = wide and span % vector == 0
            parts = max(parts, THREADS * vector)
        in_block = ceil_div(length, span) if panel else groups
        teams = blocks * in_block
        row[4] = span
        row[6:11] = of.lanes, of.rows, of.columns, of.pieces, of.across
        team_groups = span // inner if panel else 1
        row[13:16] = team_groups, in_block, _inverse(inner)
        row[16:] = _inverse(of.lanes), _inverse(THREADS // of.lanes)
        if of.pieces > 1 or not of.waiting:
            row[11:13] = n_partials, n_factors
            n_partials += teams * team_groups * of.pieces
            n_factors += teams * team_groups
        if of.waiting:
            if of.pieces > 1:
                piece = max(piece, of.waiting)
            else:
                waiting = max(waiting, of.waiting)
            most_pieces = max(most_pieces, of.pieces)
            items = items_of(index, _kind(shape, HELD_PHASE, wide), teams, of.pieces)
            (teams_of_many if of.pieces > 1 else others).append(items)
        else:
            first, second = (
                items_of(index, _kind(shape, phase, wide), teams, of.pieces)
                for phase in (FIRST, SECOND)
            )
            split.append((first, second))
    return Schedule(
        layout,
        # Who waits for others does so first: what waits for nobody fills the gaps at the end.
        np.concatenate(teams_of_many + others),
        in_turn(split, LAG),
        n_partials,
        n_factors,
        most_pieces,
        parts,
        outcomes,
        waiting,
        piece,
    )


def _held(
    outer: int, span: int, vector: int, panel: bool, held: int, blocks_at_once: int
) -> Share | None:
    """Return the shares of a team that holds its weights; None if no such team is small enough."""
    of = share(outer, span, vector, 1, panel)
    if of.waiting <= ALONE:
        return of
    pieces = max(2, ceil_div(outer * span, held))
    while pieces <= blocks_at_once:
        of = share(outer, span, vector, pieces, panel)
        if of.waiting <= held:
            return of
        pieces += ceil_div(pieces, 8)
    return None


def _split(outer: int, span: int, vector: int, panel: bool) -> Share:
    """Return shares of about PIECE weights, of which none wait."""
    if panel or span <= PIECE:
        rows = ceil_div(PIECE, span)
        of = share(min(rows, outer), span, vector, 1, panel)
        return Share(of.lanes, rows, span, ceil_div(outer, rows), 1, 0)
    across = ceil_div(span, PIECE)
    return Share(THREADS, 1, PIECE, outer * across, across, 0)


def _panel_spans(length: int, inner: int, vector: int, wide: bool) -> list[int]:
    """Return widths of a panel, the best one first: whole groups, and whole vectors if it can be.

    Narrow ones, of which fewer blocks have all rows, are of no less than 64 bytes.
    """
    spans: list[int] = []
    even = vector // gcd(vector, inner) * inner  # weights of whole groups and vectors
    even = even if wide and even <= min(WIDE_PANEL, length) else inner
    for most in (PANEL, PANEL // 2, PANEL // 4):
        span = min(max(most // even, 1) * even, length)
        if spans and (span < 4 * vector or span == spans[-1]):
            break
        spans.append(span)
    return spans


def _flat(index: int, numel: int, span: int, aligned: bool, vector: int) -> Items:
    """Return the chunks of weights without groups; the last may have to do without vectors."""
    n = ceil_div(numel, span)
    items = items_of(index, _kind(CHUNK_SHAPE, HELD_PHASE, aligned), n)
    if numel % vector:
        items[-1, 1] = _kind(CHUNK_SHAPE, HELD_PHASE, False)
    return items


def _kind(shape: int, phase: int, vectors: bool) -> int:
    return vectors + 2 * shape + 8 * phase


def _inverse(by: int) -> int:
    """Return what stands for a division by that: csrc/cuda/walk.h, quotient."""
    return ceil_div(1 << 31, by)


def _floor_power(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
