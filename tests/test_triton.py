"""The Triton backend: which tile serves which view, its launches, the op.

Where Triton compiles, on a GPU, or interprets (TRITON_INTERPRET=1, `make test`), the kernels run;
the schedule is tested anywhere. What it shares with others is in test_gpu_backends.py and
test_kernels.py.
"""

import math

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tl1kernels.backends import triton_launch, triton_schedule
from tl1kernels.views import GroupView, view_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = triton_schedule.WIDTHS
AT_ONCE = 264  # two on each of an H200's multiprocessors

# name: shape, group_by, kinds of tiles
VIEWS = {
    "no groups": ((3, 300), None, {"flat"}),
    "no groups, full tiles": ((4, 4096), None, {"flat aligned"}),
    "no groups, a full tile and a rest": ((4099,), None, {"flat aligned", "flat"}),
    "rows of one": ((50, 1), 0, {"rows 1"}),
    "rows of 3": ((3001, 3), 0, {"rows 4"}),
    "slices 3x3": ((20, 30, 3, 3), "filter_slice", {"rows 16"}),
    "rows of 100": ((70, 100), 0, {"rows 128 aligned"}),
    "rows of 147": ((64, 147), 0, {"rows 192"}),
    "rows of 190": ((11, 190), 0, {"rows 192"}),
    "rows of 768": ((5, 768), 0, {"rows 768 aligned"}),
    "rows of 1100": ((3, 1100), 0, {"rows 1152 aligned"}),
    "rows of 6143": ((2, 6143), 0, {"rows 6144"}),
    "rows of 576": ((33, 576), 0, {"rows 576 aligned"}),
    "rows of 4096": ((3, 4096), 0, {"rows 4096 aligned"}),
    "rows of 8192": ((3, 8192), 0, {"rows 8192 aligned"}),
    "rows of 8191": ((2, 8191), 0, {"rows 8192"}),
    "longer rows": ((2, 8193), 0, {"long held"}),
    "long aligned rows": ((2, 12288), 0, {"long held aligned"}),
    "a whole layer": ((130, 70), "layer", {"long held aligned"}),
    "a small layer": ((30, 7), "layer", {"rows 256"}),
    "few rows of columns": ((64, 99), 1, {"columns whole"}),
    "few rows of aligned columns": ((17, 128), 1, {"columns whole aligned"}),
    "columns": ((65, 67), 1, {"columns held"}),
    "aligned columns": ((200, 136), 1, {"columns held aligned"}),
    "tall columns": ((1200, 3), 1, {"columns held"}),
    "input channels 3x3": ((130, 15, 3, 3), 1, {"columns held"}),
    "input channels 7x7": ((70, 3, 7, 7), 1, {"columns held"}),
    "few rows of input channels": ((9, 15, 3, 3), 1, {"columns whole"}),
    "runs of 65": ((3, 5, 65), 1, {"long held"}),
    "long runs": ((3, 5, 5000), 1, {"long held aligned"}),
}


def names(kinds):
    """Return what a schedule's kinds of split tiles are called."""
    parts = []
    for kind in (k for k in range(64) if kinds >> k & 1):
        geometry = "columns" if kind // 2 < triton_schedule.LONG_KIND else "long"
        phase = ("first", "second", "whole", "held")[kind // 2 % 4]
        parts.append(f"{geometry} {phase}" + (" aligned" if kind % 2 else ""))
    return set(parts)


def resident_names(kinds):
    parts = []
    for kind in (k for k in range(64) if kinds >> k & 1):
        k = kind // 2
        name = "flat" if k == triton_schedule.FLAT else f"rows {math.prod(WIDTHS[k])}"
        parts.append(name + (" aligned" if kind % 2 else ""))
    return set(parts)


def kinds_of(schedule):
    return resident_names(schedule.resident.kinds) | names(schedule.split.kinds)


@pytest.mark.parametrize("name", VIEWS)
def test_every_range_of_views_takes_its_tile(name):
    """The table at the top of triton_schedule.py."""
    shape, group_by, want = VIEWS[name]
    view = view_of(torch.empty(shape), group_by)
    assert kinds_of(triton_schedule.make_schedule([view], [True], 4, 0, AT_ONCE)) == want
    unaligned = {kind.removesuffix(" aligned") for kind in want}
    assert kinds_of(triton_schedule.make_schedule([view], [False], 4, 0, AT_ONCE)) == unaligned
    twice = {kind.replace("held", phase) for kind in want for phase in ("first", "second")}
    assert kinds_of(triton_schedule.make_schedule([view], [True], 4, 0, 1)) == twice


def test_a_team_is_held_where_its_programs_run_at_once():
    """Where they take many registers, only if that leaves half of the device."""
    view = view_of(torch.empty(640, 72), 1)  # 10 pieces
    twice, held = {"columns first", "columns second"}, {"columns held"}
    for at_once, aligned, dtype, coupled, want in (
        (9, True, torch.float32, False, twice),
        (10, True, torch.float32, False, held),
        (19, False, torch.float32, False, twice),
        (20, False, torch.float32, False, held),
        (19, True, torch.float32, True, twice),
        (20, True, torch.bfloat16, True, held),
        (39, True, torch.float64, False, twice),  # 20 pieces
        (40, True, torch.float64, False, held),
    ):
        plan = triton_schedule.make_schedule([view], [aligned], dtype.itemsize, 0, at_once, coupled)
        assert {kind.removesuffix(" aligned") for kind in kinds_of(plan)} == want
    both = [
        view,
        view_of(torch.empty(640, 71), 1),
    ]  # in one kernel
    assert kinds_of(triton_schedule.make_schedule(both, [True] * 2, 4, 0, 19)) == {
        *("columns first", "columns second", "columns first aligned", "columns second aligned"),
    }


def test_split_tiles_come_in_an_order_in_which_nobody_waits_for_ever():
    """A team's second pass begins after all of its first; and not much later."""
    shapes = [((300, 700), 1), ((5, 40_000), 0), ((130, 15, 3, 3), 1), ((64, 3), 1)]
    views = [view_of(torch.empty(shape), group_by) for shape, group_by in shapes]
    schedule = triton_schedule.make_schedule(views, [True] * len(views), 4, 0, 1)
    last, begun = {}, {}
    for at, (index, kind, of_tensor, _) in enumerate(schedule.split.items.tolist()):
        phase = kind // 2 % 4
        team = (index, of_tensor)
        if phase == triton_schedule.FIRST:
            last[team] = at
            begun[team] = begun.get(team, 0) + 1
        elif phase == triton_schedule.SECOND:
            assert begun[team] == schedule.layout["pieces"][index]
            assert at - last[team] <= 2 * triton_schedule.LAG + begun[team]
    assert len(begun) == schedule.n_teams


def test_the_tiles_of_a_team_that_is_held_come_in_a_row_and_before_all_others():
    shapes = [((64, 3), 1), ((300, 700), 1), ((5, 400_000), 0), ((130, 15, 3, 3), 1)]
    views = [view_of(torch.empty(shape), group_by) for shape, group_by in shapes]
    schedule = triton_schedule.make_schedule(views, [True] * len(views), 4, 0, 40)
    phases = [kind // 2 % 4 for kind in schedule.split.items[:, 1].tolist()]
    held = phases.count(triton_schedule.HELD)
    assert set(phases[:held]) == {triton_schedule.HELD}
    assert len(set(phases[held:])) == 3
    at = 0
    while at < held:
        index, _, team, _ = schedule.split.items[at].tolist()
        pieces = schedule.layout["pieces"][index]
        of_team = schedule.split.items[at : at + pieces]
        assert pieces <= 40
        assert of_team[:, [0, 2]].tolist() == [[index, team]] * pieces
        assert of_team[:, 3].tolist() == list(range(pieces))
        at += pieces


@pytest.mark.parametrize(("states", "share"), [(0, 60), (2, 30)])
def test_the_memory_of_sums_is_a_small_share_of_the_weights(states, share):
    for shape, group_by in (((4096, 4096), 1), ((2, 2**22), 0), ((3000, 300, 3, 3), 1)):
        view = view_of(torch.empty(shape, device="meta"), group_by)
        schedule = triton_schedule.make_schedule([view], [True], 4, states, AT_ONCE)
        assert schedule.n_partials <= math.prod(shape) / share
        assert schedule.n_factors <= 9 * view.n_groups


def test_indices_beyond_2_to_the_31():
    for view in (
        GroupView((), 1, 1, 2**33, 1, grouped=False),
        GroupView((), 1, 1, 2**21, 2**12, grouped=True),
        GroupView((), 1, 2**17, 2**16, 1, grouped=True),
        GroupView((), 1, 1, 1, 2**33, grouped=True),
    ):
        schedule = triton_schedule.make_schedule([view], [True], 4, 0, AT_ONCE)
        items = np.concatenate([schedule.resident.items, schedule.split.items])
        assert items.dtype == np.int32
        assert (items >= 0).all()
        assert (schedule.layout.view(np.int64) >= 0).all()


# --- Where the kernels run.

runs = pytest.mark.skipif(
    triton_launch.unavailable() is not None, reason=f"triton: {triton_launch.unavailable()}"
)


@runs
def test_a_model_of_one_dtype_is_three_launches(monkeypatch):
    kernels = triton_launch.load()
    launched = []

    class Counting:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)
            self.arg_names = self.kernel.arg_names

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("prepare_kernel", "resident_kernel", "split_kernel"):
        monkeypatch.setattr(kernels, name, Counting(name))
    shapes = [(64, 3, 7, 7), (64,), (32, 64, 1, 1), (200, 136), (10,), (2, 9000)]
    params = [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    with tk.use_backend("triton"):
        tk.ProxAdamW(params, lr=0.1, lam=0.1).step()
    assert launched == ["prepare_kernel", "resident_kernel", "split_kernel"]


@pytest.mark.skipif(not triton_launch.interpreting(), reason="not interpreted")
def test_a_team_waits_in_its_programs_and_hangs_where_one_too_few_runs(monkeypatch):
    """Why a team has no more pieces than run at once; test_gpu_backends.py tests what comes out."""
    from tests import programs

    shape = (640, 70)  # 2 panels of 10 pieces
    monkeypatch.setattr(triton_launch, "programs_at_once", lambda device: 20)
    v = torch.randn(shape)
    want = tk.prox(v, 0.5, lam=2.0, group_by=1, backend="reference")
    with programs.at_once(10, monkeypatch) as waits:
        got = tk.prox(v, 0.5, lam=2.0, group_by=1, backend="triton")
    assert len(waits) == 20
    assert (want != 0).any()
    torch.testing.assert_close(got, want)
    monkeypatch.setattr(programs, "PATIENCE", 0.5)
    with (
        programs.at_once(9, monkeypatch),
        pytest.raises(Exception, match="has not begun"),
    ):
        tk.prox(v, 0.5, lam=2.0, group_by=1, backend="triton")


@runs
def test_rows_too_long_for_the_distances_within_a_tile_are_rejected(monkeypatch):
    monkeypatch.setattr(triton_schedule, "MOST_ACROSS", 9)
    v = torch.randn(4, 10).to(DEVICE)
    tk.prox(v, 0.5, lam=1.0, group_by=0, backend="triton")
    with pytest.raises(RuntimeError, match="groups down rows of 10 weights, more than 9"):
        tk.prox(v, 0.5, lam=1.0, group_by=1, backend="triton")


@pytest.mark.parametrize("shape", [(130, 16, 3, 3), (130, 6, 2, 2)])
def test_panels_of_runs_are_not_aligned_whatever_their_rows_are(shape):
    """COLUMNS // 9 * 9 = 63 weights: the next panel begins at no multiple of a vector."""
    view = view_of(torch.empty(shape), 1)
    assert view.groups * view.inner % 4 == 0
    assert kinds_of(triton_schedule.make_schedule([view], [True], 4, 0, AT_ONCE)) == {
        "columns held"
    }
