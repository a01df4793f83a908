"""The CUDA backend: its launches, the emulation, what nvcc made.

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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl1kernels as tk
from tests.common import assert_near, rounding
from tests.test_cuda_schedule import most_shared_bytes, planned, shared_of
from tl1kernels import plan as planning
from tl1kernels.backends import cuda, native
from tl1kernels.backends import cuda_schedule as schedule
from tl1kernels.batch import SGD, Batch, Entry, Numbers
from tl1kernels.penalties import Terms
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
from tl1kernels.views import GroupView, view_of

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


@emulated
@pytest.mark.parametrize("sizes", [(1, 2**31, 1, 1), (1, 1, 1, 2**31), (2**16, 1, 2**15, 1)])
def test_groups_of_too_much_are_rejected(sizes):
    p = torch.ones(())
    view = GroupView((), *sizes, grouped=True)
    entry = Entry(p, view, Numbers({"lr": 0.1}, Terms(0.1, 0.1, 1.0)))
    batch = Batch(p.device, p.dtype, SGD(), "tl1", [entry], [p])
    assert cuda.rejects(batch) == "more than 2^30 groups, or rows or weights of one"
