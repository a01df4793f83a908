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

All blocks of a launch have as much shared memory as the tensor that needs most of each kind. Where
that is more than the smallest GPUs have, chunks and ALONE are half as large for the whole batch: in
float64, or with a penalty of whole groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
SHARED = 99 << 10  # bytes of shared memory that a block can have: of all GPUs the least
PIECE = 8192  # weights that a block takes of a split team
LAG = 512
"""Pieces begun between a group's two passes: enough that the first is over and nobody waits."""

CHUNK_SHAPE, PANEL_SHAPE, RUN_SHAPE = 0, 1, 2
HELD_PHASE, FIRST, SECOND = 0, 1, 2
FIELDS = (
    *("outer", "groups", "inner", "numel"),
    *("span", "width", "lanes"),
    *("share_rows", "share_columns", "pieces", "across"),
    *("partials", "factors", "team_groups", "in_block"),
    *("inverse", "inverse_lanes", "inverse_step"),
)
ROW = np.dtype([(name, np.int64) for name in FIELDS])
"""A tensor's part of the layout. csrc/cuda/work.h, Row from `outer` on, says what each is."""


@dataclass(frozen=True)
class Schedule:
    """The work of a batch.

    Attributes:
        layout: ROW, [tensors].
        resident: int32, [items, 4]: tensor, kind, team, piece; those of a team in a row.
        split: the same, in the order in which they must begin.
        n_partials: of teams of several blocks, what their pieces measure: of each group one.
        n_factors: groups of such teams.
        most_pieces: of a team that is held.
        parts, outcomes, waiting, piece: entries that a block needs in shared memory; the last are
            those of one of a team's pieces, of which it holds two.
    """

    layout: NDArray[np.void]
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


def make_schedule(
    views: Sequence[GroupView],
    aligned: Sequence[bool],
    vector: int,
    arithmetic: int,
    blocks_at_once: int,
    coupled: bool,
    shared_bytes: Callable[[int, int, int, int], int],
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
        shared_bytes: takes `parts`, `outcomes`, `waiting` and `piece` of a schedule; a block's
            shared memory.
    """
    start = partial(_Draft, vector, arithmetic, blocks_at_once, coupled)
    work = _schedule(views, aligned, start(TILE, ALONE))
    if shared_bytes(work.parts, work.outcomes, work.waiting, work.piece) > SHARED:
        work = _schedule(views, aligned, start(TILE // 2, ALONE // 2))
    return work


def _schedule(views: Sequence[GroupView], aligned: Sequence[bool], draft: _Draft) -> Schedule:
    layout = np.zeros(len(views), ROW)
    flat = TILE if sum(v.n_groups * v.group_size for v in views) >= MANY else TILE // 2
    for index, (view, at_16) in enumerate(zip(views, aligned, strict=True)):
        row, numel = layout[index], view.n_groups * view.group_size
        if numel == 0:
            continue
        row["outer"], row["groups"], row["inner"] = view.outer, view.groups, view.inner
        row["numel"] = numel
        if not view.grouped:
            draft.add_flat(index, row, flat, at_16)
        elif not draft.add_rows(index, row, view, at_16):
            draft.add_teams(index, row, view, at_16)
    return Schedule(
        layout,
        # Who waits for others does so first: what waits for nobody fills the gaps at the end.
        np.concatenate([NO_ITEMS, *draft.teams_of_many, *draft.others]),
        in_turn(draft.split, LAG),
        draft.n_partials,
        draft.n_factors,
        draft.most_pieces,
        draft.parts,
        draft.outcomes,
        draft.waiting,
        draft.piece,
    )


@dataclass
class _Draft:
    """A schedule to which one tensor after the other is added.

    Attributes:
        vector, arithmetic, blocks_at_once, coupled: see `make_schedule`.
        tile, alone: TILE and ALONE, or less where these need too much shared memory.
        teams_of_many, others, split: lists of items, by who waits for whom.
        n_partials, ..., piece: see `Schedule`.
    """

    vector: int
    arithmetic: int
    blocks_at_once: int
    coupled: bool
    tile: int
    alone: int
    teams_of_many: list[Items] = field(default_factory=list)
    others: list[Items] = field(default_factory=list)
    split: list[tuple[Items, Items]] = field(default_factory=list)
    n_partials: int = 0
    n_factors: int = 0
    most_pieces: int = 1
    parts: int = THREADS
    outcomes: int = TEAM_GROUPS
    waiting: int = 0
    piece: int = 0

    def add_flat(self, index: int, row: np.void, span: int, aligned: bool) -> None:
        """Add a tensor without groups; the last chunk may have to do without vectors."""
        row["span"] = span
        items = items_of(
            index, _kind(CHUNK_SHAPE, HELD_PHASE, aligned), ceil_div(int(row["numel"]), span)
        )
        if row["numel"] % self.vector:
            items[-1, 1] = _kind(CHUNK_SHAPE, HELD_PHASE, False)
        self.others.append(items)

    def add_rows(self, index: int, row: np.void, view: GroupView, aligned: bool) -> bool:
        """Add groups of neighbours if a chunk takes at least two; return whether it does."""
        size, numel = view.group_size, view.n_groups * view.group_size
        wide = aligned and size % self.vector == 0
        # Where a vector has weights of two groups, each weight is measured by itself.
        unit = self.vector if wide else 1
        tile = self.tile * 4 // self.arithmetic
        parts = COUPLED_PARTS * self.tile // TILE if self.coupled else tile // self.vector
        most = min(tile, parts * unit)
        if view.outer > 1 or 2 * size > most:
            return False
        span = most // size * size
        in_chunk = min(span, numel)
        lanes = min(_floor_power(THREADS * size // in_chunk), 32)
        row["span"], row["width"] = span, size
        row["lanes"] = min(lanes, _floor_power(max(size // unit, 1)))
        row["inverse"] = _inverse(size)
        kind = _kind(CHUNK_SHAPE, HELD_PHASE, wide)
        self.others.append(items_of(index, kind, ceil_div(numel, span)))
        self.parts = max(self.parts, in_chunk // unit)
        self.outcomes = max(self.outcomes, in_chunk // size)
        turns = ceil_div(in_chunk, THREADS * self.vector)
        self.waiting = max(self.waiting, turns * THREADS * self.vector)
        return True

    def add_teams(self, index: int, row: np.void, view: GroupView, aligned: bool) -> None:
        """Add groups whose weights teams share: panels of them side by side, or runs."""
        vector, outer, inner = self.vector, view.outer, view.inner
        panel = inner <= PANEL
        length = view.groups * inner
        wide = aligned and (length if panel else inner) % vector == 0
        spans = _panel_spans(length, inner, vector, wide) if panel else [inner]
        for span in spans:
            if of := self._held(outer, span, panel):
                break
        else:
            span = spans[0]
            of = _split(outer, span, vector, panel)
        if panel:
            wide = wide and span % vector == 0
            self.parts = max(self.parts, THREADS * vector)
        in_block = ceil_div(length, span) if panel else view.groups
        teams = view.blocks * in_block
        team_groups = span // inner if panel else 1
        row["span"], row["lanes"] = span, of.lanes
        row["share_rows"], row["share_columns"] = of.rows, of.columns
        row["pieces"], row["across"] = of.pieces, of.across
        row["team_groups"], row["in_block"] = team_groups, in_block
        row["inverse"], row["inverse_lanes"] = _inverse(inner), _inverse(of.lanes)
        row["inverse_step"] = _inverse(THREADS // of.lanes)
        if of.pieces > 1 or not of.waiting:
            row["partials"], row["factors"] = self.n_partials, self.n_factors
            self.n_partials += teams * team_groups * of.pieces
            self.n_factors += teams * team_groups

        def items(phase: int) -> Items:
            kind = _kind(PANEL_SHAPE if panel else RUN_SHAPE, phase, wide)
            return items_of(index, kind, teams, of.pieces)

        if not of.waiting:
            self.split.append((items(FIRST), items(SECOND)))
        elif of.pieces > 1:
            self.teams_of_many.append(items(HELD_PHASE))
            self.piece = max(self.piece, of.waiting)
            self.most_pieces = max(self.most_pieces, of.pieces)
        else:
            self.others.append(items(HELD_PHASE))
            self.waiting = max(self.waiting, of.waiting)

    def _held(self, outer: int, span: int, panel: bool) -> Share | None:
        """Return the shares of a team that holds its weights; None if none is small enough."""
        of = share(outer, span, self.vector, 1, panel)
        if of.waiting <= self.alone:
            return of
        # The measures of a penalty of whole groups need room too.
        held = HELD // self.arithmetic // (2 if self.coupled else 1)
        pieces = max(2, ceil_div(outer * span, held))
        while pieces <= self.blocks_at_once:
            of = share(outer, span, self.vector, pieces, panel)
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


def _kind(shape: int, phase: int, vectors: bool) -> int:
    return vectors + 2 * shape + 8 * phase


def _inverse(by: int) -> int:
    """Return what stands for a division by that: csrc/cuda/walk.h, quotient."""
    return ceil_div(1 << 31, by)


def _floor_power(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
