"""Which blocks of csrc/cuda serve which view: all of it, no more than they hold, in what order."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tl1kernels.backends import cuda_schedule as schedule
from tl1kernels.backends.gpu import ADDRESSES
from tl1kernels.views import GroupView, view_of

SHAPES = {schedule.CHUNK_SHAPE: "chunk", schedule.PANEL_SHAPE: "panel", schedule.RUN_SHAPE: "run"}
PHASES = {schedule.HELD_PHASE: "", schedule.FIRST: " first", schedule.SECOND: " second"}


def planned(views, aligned=True, vector=4, blocks=264, coupled=False, shared_bytes=None):
    aligned = [aligned] * len(views)
    arithmetic = 8 if vector == 2 else 4
    shared_bytes = shared_bytes or most_shared_bytes(vector, coupled)
    return schedule.make_schedule(views, aligned, vector, arithmetic, blocks, coupled, shared_bytes)


def most_shared_bytes(vector, coupled, states=3):
    """Return csrc/cuda/step.cpp's shared_of, of a rule with so many states: three need most."""
    arithmetic = 8 if vector == 2 else 4
    measure = (40 if vector == 2 else 24) if coupled else arithmetic  # and an outcome's bytes
    units = 2 + states * vector * arithmetic // 16
    ring = (4 if units == 2 else 2) * units * 16 * schedule.THREADS

    def up(size):
        return -(-size // 16) * 16

    def shared_bytes(parts, outcomes, waiting, piece):
        at = 16 + ring
        alone = up(up(at + parts * measure) + outcomes * measure) + waiting * arithmetic
        of_team = up(at + schedule.THREADS * vector * measure)
        of_team = up(of_team + schedule.TEAM_GROUPS * measure) + 2 * piece * arithmetic
        return max(alone, of_team) if piece else alone

    return shared_bytes


def shared_of(plan):
    return plan.parts, plan.outcomes, plan.waiting, plan.piece


def names(plan):
    """Return what the kinds of work are called, and who does it."""
    of = set()
    for who in ("resident", "split"):
        for index, kind in np.unique(getattr(plan, who)[:, :2], axis=0):
            name = SHAPES[kind >> 1 & 3] + PHASES[kind >> 3] + ("" if kind & 1 else " by weight")
            team = "a team" if plan.layout["pieces"][index] > 1 else "alone"
            of.add(f"{name}, {team}")
    return of


TWO_PANELS = {"panel first, a team", "panel second, a team"}
TWO_RUNS = {"run first, a team", "run second, a team"}
# shape, group_by, work on an H200, and on a GPU that runs two blocks
TABLE = [
    ((4096, 4096), None, {"chunk, alone"}, {"chunk, alone"}),
    ((4099,), None, {"chunk, alone", "chunk by weight, alone"}, None),
    ((4096, 2048), 0, {"chunk, alone"}, {"chunk, alone"}),
    ((4096, 3584), 0, {"chunk, alone"}, {"chunk, alone"}),
    ((4096, 3588), 0, {"run, alone"}, {"run, alone"}),
    ((64, 147), 0, {"chunk by weight, alone"}, None),
    ((512, 512, 3, 3), 0, {"run, alone"}, None),
    ((20, 30, 3, 3), "filter_slice", {"chunk by weight, alone"}, None),
    ((3, 8192), 0, {"run, alone"}, {"run, alone"}),
    ((3, 50_000), 0, {"run, a team"}, TWO_RUNS),
    ((4096, 4096), 1, {"panel, a team"}, TWO_PANELS),
    ((4096, 4097), 1, {"panel by weight, a team"}, None),
    ((64, 256), 1, {"panel, alone"}, {"panel, alone"}),
    ((256, 128, 3, 3), 1, {"panel, a team"}, TWO_PANELS),
    ((256, 16, 10, 10), 1, {"run, a team"}, TWO_RUNS),
    ((50_257, 768), 1, {"panel, a team"}, TWO_PANELS),
    ((56, 64), "layer", {"chunk, alone"}, None),
    ((90, 90), "layer", {"run, alone"}, None),
    ((300, 300), "layer", {"run, a team"}, TWO_RUNS),
    ((4096, 4096), "layer", TWO_RUNS, TWO_RUNS),
]


@pytest.mark.parametrize(("shape", "group_by", "on_h200", "on_two_blocks"), TABLE)
def test_every_range_of_views_takes_its_work(shape, group_by, on_h200, on_two_blocks):
    """The table at the top of cuda_schedule.py."""
    view = view_of(torch.empty(shape, device="meta"), group_by)
    assert names(planned([view])) == on_h200
    if on_two_blocks is not None:
        assert names(planned([view], blocks=2)) == on_two_blocks
    assert all("by weight" in name for name in names(planned([view], aligned=False)))


# Blocks, outer, groups, inner: any; rows; runs; columns side by side.
SIZES = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 9000), st.integers(1, 300), st.integers(1, 900)),
    st.tuples(st.just(1), st.just(1), st.integers(1, 9000), st.integers(1, 40)),
    st.tuples(st.just(1), st.just(1), st.integers(1, 40), st.integers(1, 20_000)),
    st.tuples(st.just(1), st.integers(1, 600), st.integers(1, 300), st.integers(1, 9)),
)
VECTORS = st.sampled_from([2, 4, 8])


@given(
    *(st.lists(SIZES, min_size=1, max_size=4), VECTORS),
    *(st.sampled_from([1, 2, 264]), st.booleans(), st.booleans()),
)
@example([(1, 1, 4096, 1), (1, 1, 16, 8192)], 2, 264, True, False)
@example([(1, 1, 4096, 1), (1, 1, 16, 8192)], 2, 264, True, True)
@example([(1, 1, 4096, 1), (1, 1, 16, 8192)], 4, 264, True, True)
@example([(1, 1, 4096, 1), (1, 1, 16, 8192)], 8, 264, True, True)
@example([(1, 1, 4096, 2)], 2, 264, True, True)  # a batch of one view can need too much
@example([(1, 1, 4096, 8)], 8, 264, True, True)
def test_no_block_has_more_than_it_can_hold_and_pieces_have_all(
    batch, vector, blocks_at_once, at_16, coupled
):
    views = [GroupView((), *sizes, grouped=True) for sizes in batch]
    plan = planned(views, at_16, vector, blocks_at_once, coupled)
    needed = most_shared_bytes(vector, coupled)(*shared_of(plan))
    assert needed <= 101_376, needed  # of the smallest GPUs
    most_pieces = 1
    for index, (view, row) in enumerate(zip(views, plan.layout, strict=True)):
        resident, split = (of[of[:, 0] == index] for of in (plan.resident, plan.split))
        row = dict(zip(schedule.FIELDS, row.tolist(), strict=True))
        check_work(view, row, resident, split, vector)
        if not len(split):
            most_pieces = max(most_pieces, row["pieces"])
    assert plan.most_pieces == most_pieces <= blocks_at_once


def check_work(view, row, resident, split, vector):
    """Assert that one tensor's items have all its weights, and each no more than it can."""
    sizes = view.blocks, view.outer, view.groups, view.inner
    blocks, outer, groups, inner = sizes
    assert [row[n] for n in ("outer", "groups", "inner", "numel")] == [*sizes[1:], math.prod(sizes)]
    span, width, lanes, rows, columns, pieces, across = (
        row[n]
        for n in ("span", "width", "lanes", "share_rows", "share_columns", "pieces", "across")
    )
    shapes = {kind >> 1 & 3 for kind in [*resident[:, 1], *split[:, 1]]}
    assert len(shapes) == 1
    assert 0 < lanes <= schedule.THREADS
    items = len(resident) + len(split)
    if shapes == {schedule.CHUNK_SHAPE}:
        assert lanes & (lanes - 1) == 0
        assert span % width == 0
        assert items == -(-math.prod(sizes) // span)
        return
    assert pieces % across == 0
    down = pieces // across
    assert (down - 1) * rows < outer <= down * rows  # and none of them is empty
    assert (across - 1) * columns < span <= across * columns
    teams = blocks * (groups if shapes == {schedule.RUN_SHAPE} else -(-groups * inner // span))
    assert items == teams * pieces * (2 if len(split) else 1)
    assert lanes >= 2
    if shapes == {schedule.PANEL_SHAPE}:
        assert span % inner == 0
        assert span <= min(lanes * vector, schedule.WIDE_PANEL)
        assert span // inner <= schedule.TEAM_GROUPS


@given(st.lists(SIZES, min_size=1, max_size=4), st.sampled_from([4, 8]), st.booleans())
@example([(1, 1, 4096, 1), (1, 1, 16, 8192), (1, 64, 300, 8)], 8, True)
def test_float32_and_16_bits_have_room_for_whole_tiles_in_any_batch(batch, vector, at_16):
    """Of single weights' penalties."""
    views = [GroupView((), *sizes, grouped=True) for sizes in batch]
    plan = planned(views, at_16, vector)
    roomy = planned(views, at_16, vector, shared_bytes=lambda *entries: 0)
    assert shared_of(plan) == shared_of(roomy)
    for name in ("layout", "resident", "split"):
        assert np.array_equal(getattr(plan, name), getattr(roomy, name)), name


def test_split_pieces_come_in_an_order_in_which_nobody_waits_for_ever():
    """A team's second pass begins after all of its first; and not much later."""
    shapes = [((5000, 700), 1), ((5, 300_000), 0), ((1300, 15, 3, 3), 1), ((640, 3), 1)]
    views = [view_of(torch.empty(shape, device="meta"), group_by) for shape, group_by in shapes]
    plan = planned(views, blocks=1)
    last, begun = {}, {}
    for at, (index, kind, of_tensor, _) in enumerate(plan.split.tolist()):
        team = (index, of_tensor)
        if kind >> 3 == schedule.FIRST:
            last[team] = at
            begun[team] = begun.get(team, 0) + 1
        else:
            assert kind >> 3 == schedule.SECOND
            assert begun[team] == plan.layout["pieces"][index]
            assert at - last[team] <= 2 * schedule.LAG + begun[team]
    groups = sum(view.n_groups for view in views)
    assert len(begun) > 0
    assert groups <= plan.n_factors <= groups + len(begun) * schedule.TEAM_GROUPS


def test_the_memory_of_sums_is_a_64th_of_the_weights_at_most():
    for shape, group_by in (((4096, 4096), 1), ((2, 2**22), 0), ((3000, 300, 3, 3), 1)):
        plan = planned([view_of(torch.empty(shape, device="meta"), group_by)], blocks=1)
        assert 0 < plan.n_partials <= math.prod(shape) / 60


def test_the_schedule_and_the_kernels_have_the_same_constants():
    source = (Path(__file__).parents[1] / "csrc" / "cuda" / "work.h").read_text()
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", source))
    assert int(constants["THREADS"]) == schedule.THREADS
    assert int(constants["TEAM_GROUPS"]) == schedule.TEAM_GROUPS
    row = re.search(r"struct Row \{(.*?)\n\};", source, re.DOTALL)[1]
    fields = re.sub(r"//.*", "", row).replace("state[MAX_STATES]", "state, state, state")
    names = re.findall(r"\w+", fields.replace("int64_t", ""))
    assert names[ADDRESSES:] == list(schedule.FIELDS)


def test_indices_beyond_2_to_the_31():
    """In the schedule; groups of as much are refused."""
    for view in (
        GroupView((), 1, 1, 2**33, 1, grouped=False),
        GroupView((), 1, 1, 2**21, 2**12, grouped=True),
        GroupView((), 1, 2**17, 2**16, 1, grouped=True),
    ):
        plan = planned([view])
        for items in (plan.resident, plan.split):
            assert items.dtype == np.int32
            assert (items >= 0).all()
        assert (plan.layout.view(np.int64) >= 0).all()


def test_a_batch_has_room_for_the_largest_of_its_tensors():
    shapes = [((4096, 4096), 1), ((3, 50_000), 0), ((256, 128, 3, 3), 1), ((64, 147), 0)]
    views = [view_of(torch.empty(shape, device="meta"), group_by) for shape, group_by in shapes]
    for coupled in (False, True):
        each = [planned([view], coupled=coupled) for view in views]
        for order in (views, views[::-1]):
            plan = planned(order, coupled=coupled)
            for name in ("parts", "outcomes", "waiting", "piece", "most_pieces"):
                assert getattr(plan, name) == max(getattr(one, name) for one in each), name


def test_measures_of_whole_groups_have_room_beside_the_weights():
    """Of a penalty of whole groups a team has more blocks, each with fewer weights."""
    view = view_of(torch.empty(4096, 64, device="meta"), 1)
    pieces = [planned([view], coupled=coupled).most_pieces for coupled in (False, True)]
    assert pieces[1] > 1.5 * pieces[0] > 1
