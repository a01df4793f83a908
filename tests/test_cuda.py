"""The CUDA backend: which blocks serve which view, its launches, the emulation, what nvcc made.

The kernels run emulated on the host, or on a GPU. What they share with others is in
test_gpu_backends.py and test_kernels.py.
"""

import dataclasses
import math
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import tl1kernels as tk
from tests.common import assert_near, rounding
from tl1kernels import plan as planning
from tl1kernels.backends import cuda, native
from tl1kernels.backends import cuda_schedule as schedule
from tl1kernels.backends.gpu import ADDRESSES
from tl1kernels.batch import SGD, Entry, Numbers
from tl1kernels.penalties import Terms
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
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


# --- Emulated.

emulated = pytest.mark.skipif(
    not cuda.emulated() or cuda.unavailable() is not None,
    reason=f"cuda, emulated: {cuda.unavailable() or 'TL1KERNELS_CUDA does not ask for it'}",
)


STORED = {"float64": 2, "float32": 4, "bfloat16": 8, "float16": 8}
RULES = {"sgd": 0, "sgd_momentum": 1, "adam": 2, "adam_amsgrad": 3}


@emulated
@given(*[st.integers(0, 8192)] * 4, st.sampled_from(["tl1", "cges"]))
def test_the_kernels_need_as_much_shared_memory_as_these_tests_say(
    parts, outcomes, waiting, piece, penalty
):
    entries = parts, outcomes, waiting, piece // 16 * 16
    cuda.load()
    for (dtype, vector), (rule, states) in product(STORED.items(), RULES.items()):
        mine = most_shared_bytes(vector, penalty == "cges", states)(*entries)
        op = torch.ops.tl1kernels.cuda_shared_bytes
        assert op(dtype, dtype, rule, penalty, *entries) == mine, (dtype, rule)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalty", ["tl1", "cges"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_batch_of_rows_and_runs_has_room_on_the_smallest_gpu(dtype, penalty, amsgrad):
    """The emulation has no more shared memory for a block than such a GPU."""
    start = [torch.randn(shape).to(dtype) for shape in [(4096, 1), (16, 8192)]]
    results = []
    for backend in ("cuda", "reference"):
        params = [p.clone().requires_grad_() for p in start]
        for p in params:
            p.grad = p.detach().clone()
        options = {"lam": 0.5, "penalty": penalty, "group_by": 0, "amsgrad": amsgrad}
        with tk.use_backend(backend):
            tk.ProxAdam(params, lr=0.1, **options).step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    got, want = results
    ulps = {torch.float32: 32, torch.float64: 64}.get(dtype, 4 * rounding("cuda", dtype) + 2)
    assert_near(got, want, ulps, want.abs().clamp(min=1))


@emulated
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("entries", "message"),
    [({"waiting": 1 << 20}, "no multiprocessor has room"), ({"most_pieces": 9}, "a team of 9")],
)
def test_a_step_that_is_refused_changes_nothing(monkeypatch, capturable, entries, message):
    """Not even Adam's counter; nor is what a later step prepares taken for prepared."""
    start = torch.randn(30, 40)
    p = start.clone().requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = tk.ProxAdam([p], lr=0.1, lam=0.1, capturable=capturable)
    make = schedule.make_schedule

    def too_much(*args, **options):
        return dataclasses.replace(make(*args, **options), **entries)

    with tk.use_backend("cuda"):
        with monkeypatch.context() as patched:
            patched.setattr(schedule, "make_schedule", too_much)
            for _ in range(2):
                with pytest.raises(RuntimeError, match=message):
                    optimizer.step()
        assert torch.equal(p, start)
        assert [x.any() for x in optimizer.state[p].values()] == [False] * 3
        checkpoint = optimizer.state_dict()
        optimizer = tk.ProxAdam([p], lr=0.1, lam=0.1, capturable=capturable)
        optimizer.load_state_dict(checkpoint)
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
    with tk.use_backend("reference"):
        q = start.clone().requires_grad_()
        q.grad = torch.ones_like(q)
        tk.ProxAdam([q], lr=0.1, lam=0.1).step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@emulated
def test_numbers_of_a_step_that_was_refused_are_prepared_by_the_next(monkeypatch):
    p = torch.randn(30, 40).requires_grad_()
    p.grad = torch.ones_like(p)
    want = (p - 0.1).detach()
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.0)
    step = torch.ops.tl1kernels.cuda_step_
    at = [a.name for a in step.default._schema.arguments].index("in_a_team")
    with tk.use_backend("cuda"):
        with monkeypatch.context() as patched:
            patched.setattr(
                torch.ops.tl1kernels,
                "cuda_step_",
                lambda *args: step(*args[:at], 9, *args[at + 1 :]),
            )
            with pytest.raises(RuntimeError, match="a team of 9"):
                optimizer.step()
        optimizer.step()
    torch.testing.assert_close(p.detach(), want)


@emulated
def test_a_batch_is_refused_for_what_is_wrong_with_its_own_gpu(monkeypatch):
    """Of several GPUs, of which the current one is another."""
    asked = []

    def problem(index):
        asked.append(index)
        return "no kernel image" if index == 1 else ""

    monkeypatch.setattr(torch.ops.tl1kernels, "cuda_problem", problem)
    cuda._problem_with.cache_clear()
    p = torch.ones(3, 4)
    entry = Entry(p, view_of(p, None), Numbers({"lr": 0.1, "weight_decay": 0.0}, Terms(0, 0, 1)))
    (_, batch), *_ = planning.prepare([(SGD(), "tl1", entry, p)], "cuda")
    assert asked == [0]
    assert cuda.rejects(batch) is None
    monkeypatch.setattr(cuda, "emulated", lambda: False)
    for device in (0, 1, 1):
        reason = cuda.rejects(dataclasses.replace(batch, device=torch.device("cuda", device)))
        assert (reason or "").startswith("on cuda:1: no kernel image") == (device == 1), reason
    assert asked == [0, 1]
    cuda._problem_with.cache_clear()


@emulated
def test_a_model_of_one_dtype_is_one_op_of_two_launches(monkeypatch):
    """`prepare`, and all tensors of a model: csrc/cuda/step.cpp has a launch for each."""
    called = []
    step = torch.ops.tl1kernels.cuda_step_
    monkeypatch.setattr(
        torch.ops.tl1kernels, "cuda_step_", lambda *args: called.append(1) or step(*args)
    )
    shapes = [(64, 3, 7, 7), (64,), (32, 64, 1, 1), (200, 136), (10,), (2, 9000)]
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    with tk.use_backend("cuda"):
        tk.ProxAdamW(params, lr=0.1, lam=0.1).step()
    assert called == [1]
    source = Path(__file__).parents[1] / "csrc" / "cuda" / "step.cpp"
    assert len(re.findall(r" launch_\w+\(", source.read_text())) == 2


@emulated
def test_numbers_are_prepared_anew_only_when_they_change(monkeypatch):
    """And blocks that share groups never take what an earlier step has left."""
    for name, value in {"ALONE": 0, "HELD": 4096, "BLOCKS_AT_ONCE": 8}.items():
        monkeypatch.setattr(schedule, name, value)
    launches = []
    step = torch.ops.tl1kernels.cuda_step_
    at = [a.name for a in step.default._schema.arguments].index("launch")
    monkeypatch.setattr(
        torch.ops.tl1kernels, "cuda_step_", lambda *args: launches.append(args[at]) or step(*args)
    )
    start = torch.randn(200, 96)
    results = {}
    for backend in ("cuda", "reference"):
        generator = torch.Generator().manual_seed(1)
        p = start.clone().requires_grad_()
        optimizer = tk.ProxSGD([p], lr=0.1, lam=0.5, momentum=0.9)
        for lr in (0.1, 0.1, 0.1, 0.05, 0.05, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.randn(p.shape, generator=generator)
            with tk.use_backend(backend):
                optimizer.step()
        results[backend] = p.detach()
    # The first step with momentum has a number of its own: no momentum yet.
    prepared = [launch == 0 for launch in launches]
    assert prepared == [True, True, False, True, False, True]
    numbers = [launch for launch in launches if launch]
    assert len(set(numbers)) == len(numbers)
    torch.testing.assert_close(results["cuda"], results["reference"], rtol=1e-5, atol=1e-6)


@emulated
@pytest.mark.parametrize("view", [(50, 40, 3), (1, 30, 37), (1, 1, 3000), (7, 3, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("blocks", [1, 8])
def test_nothing_outside_the_tensor_is_written(monkeypatch, view, dtype, offset, blocks):
    small = {"ALONE": 0, "TILE": 16, "HELD": 4096, "BLOCKS_AT_ONCE": blocks, "PIECE": 512}
    for name, value in small.items():
        monkeypatch.setattr(schedule, name, value)
    n = math.prod(view)
    memory = torch.full((n + 64,), 7.0, dtype=dtype)
    p = memory[offset : offset + n].view(view).requires_grad_()
    with torch.no_grad():
        p.fill_(1.0)
    p.grad = torch.full_like(p, 3.0)
    with tk.use_backend("cuda"):
        tk.ProxSGD([p], lr=0.1, lam=0.1, group_by=1).step()
    assert (p != 1.0).all()
    assert (memory[:offset] == 7).all()
    assert (memory[offset + n :] == 7).all()


FAULT = """
import dataclasses, os, torch, tl1kernels as tk
os.environ["TL1KERNELS_CUDA"] = "emulated"
from tl1kernels.backends import cuda_schedule as schedule
from tl1kernels.backends.gpu import ADDRESSES
from tl1kernels.batch import SGD, Entry, Numbers
from tl1kernels.penalties import Terms
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
make_schedule = schedule.make_schedule
schedule.BLOCKS_AT_ONCE, schedule.ALONE, schedule.PIECE = 1, 0, 512
def faulty(*args, **options):
    made = make_schedule(*args, **options)
    {fault}
    return made
schedule.make_schedule = faulty
p = torch.ones({shape})[1:].requires_grad_()
p.grad = torch.ones_like(p)
with tk.use_backend("cuda"):
    tk.ProxSGD([p], lr=0.1, lam=0.1, group_by={by}).step()
print("went on")
"""
FAULTS = {
    "an access to memory at no multiple of its size": ("made.resident[:, 1] |= 1", (4097,), None),
    "a block writes beyond its shared memory": (
        "made = dataclasses.replace(made, waiting=made.waiting - 64)",
        (33, 64),
        0,
    ),
    "threads wait for what the others never do": (
        "made.split[:] = made.split[::-1].copy()",  # second passes before the first
        (200, 64),
        1,
    ),
}


@emulated
@pytest.mark.parametrize("message", FAULTS)
def test_the_emulation_tells_what_a_gpu_would_do_in_silence(message):
    fault, shape, by = FAULTS[message]
    script = FAULT.format(fault=fault, shape=shape, by=by)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "went on" not in done.stdout
    script = FAULT.format(fault="pass", shape=shape, by=by)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


# --- Without a GPU.


@emulated
def test_on_hopper_shared_memory_has_room_for_as_many_blocks_as_registers_have():
    """Of the hot kernels, on large matrices and on whole models."""
    pytest.importorskip("triton", reason="its cuobjdump")
    from bench import cuda_sass
    from tl1kernels.bench.cases import MODELS

    library = native.installed(cuda_sass.BINARY)
    if library is None:
        pytest.skip(f"not built: {native.installed(cuda.REPORT).read_text().strip()}")
    usage = cuda_sass.usage_of(library)
    square, wide, filters = [(8192, 8192)], [(1024, 65536)], [(4096, 2048, 3, 3)]
    work = [(square, 0), (wide, 0), (square, 1), (wide, 1), (filters, 1), (square, None)]
    work += [(shapes(), "auto") for shapes in MODELS.values()]
    cuda.load()
    for dtype, param in ((torch.float32, "float"), (torch.bfloat16, "BFloat16")):
        name = str(dtype).removeprefix("torch.")
        for rule in ("sgd", "sgd_momentum", "adam"):
            registers = usage[cuda_sass.Name(param, param, rule, "tl1")].registers
            by_registers = (1 << 16) // (schedule.THREADS * -(-registers // 8) * 8)
            assert by_registers >= 3
            for shapes, group_by in work:
                metas = [torch.empty(shape, device="meta") for shape in shapes]
                views = [view_of(p, group_by if p.ndim > 1 else None) for p in metas]
                plan = planned(views, vector=16 // dtype.itemsize, blocks=132 * by_registers)
                assert len(plan.split) == 0
                entries = shared_of(plan)
                shared = torch.ops.tl1kernels.cuda_shared_bytes(name, name, rule, "tl1", *entries)
                assert (228 << 10) // (shared + 1024) >= by_registers, (name, rule, group_by)


def test_why_it_is_not_there(monkeypatch):
    monkeypatch.delenv(cuda.ENVIRONMENT, raising=False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run here: no GPU that torch can use"):
        tk.prox(torch.ones(3), 0.1, backend="cuda")
    assert tk.info().backends["cuda"].startswith("no GPU")


def test_the_library_for_gpus_loads_beside_any_torch_and_says_what_cuda_says():
    """Nothing in it needs a GPU, or a torch with CUDA, before a kernel is launched."""
    library = native.installed("libtl1kernels_cuda.so")
    if library is None:
        pytest.skip(f"not built: {native.installed(cuda.REPORT).read_text().strip()}")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "ops = torch.ops.tl1kernels\n"
        "print(len(ops.cuda_penalty_names().split()))\n"
        "print(ops.cuda_problem(0))\n"
        "ops.cuda_resident_blocks('float32', 'float32', 'adam', 'tl1', 256, 64, 4096, 0, 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    penalties, problem = done.stdout.splitlines()
    assert int(penalties) == len(tk.PENALTIES) - 1
    assert problem
    assert f"CUDA, choosing the device: {problem}" in done.stderr


def test_on_hopper_no_kernel_spills_and_hot_ones_are_within_the_budget():
    """SGD, momentum and AdamW by l1 and TL1 are hot."""
    pytest.importorskip("triton", reason="its cuobjdump")
    from bench import cuda_sass
    from bench.sass import SLOTS_PER_BYTE, STATES

    library = native.installed(cuda_sass.BINARY)
    if library is None:
        pytest.skip(f"not built: {native.installed(cuda.REPORT).read_text().strip()}")
    usage, codes = cuda_sass.usage_of(library), cuda_sass.code_of(library)
    assert usage.keys() == codes.keys()
    # Penalties; rules for 4 dtypes, for 2 masters, for stochastic rounding.
    assert len(usage) == 4 * (4 * 5 + 2 * 4 + 4)
    for name, code in codes.items():
        assert (usage[name].stack, usage[name].local) == (0, 0), name
        assert code.count("LDL") + code.count("STL") == 0, name
        assert code.count("LDGSTS.E.BYPASS.128") >= 1 + STATES[name.rule], name
        assert code.count("STG.E.128") >= 1, name
    for param in ("float", "BFloat16", "Float16", "StochasticBFloat16"):
        for rule in ("sgd", "sgd_momentum", "adam"):
            for penalty in ("l1", "tl1"):
                grad = param.removeprefix("Stochastic")
                name = cuda_sass.Name(param, grad, rule, penalty)
                ways = cuda_sass.passes(name, codes[name])
                assert all(ways.values()), name
                budget = SLOTS_PER_BYTE * name.bytes_per_weight
                assert 5 < ways["finish"].slots <= budget, name
                assert 5 < ways["hold"].slots + ways["release"].slots <= budget, name
                special = 2 * (rule == "adam") + 2 * (penalty == "tl1")
                assert ways["finish"].special == special, name
