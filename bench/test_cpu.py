"""What a step costs on the CPU, beside torch's fused optimizers and what people use today.

Run: .venv/bin/python -m pytest bench/test_cpu.py --benchmark-enable --json-out bench/results
Two threads; peers of other libraries need `pip install -e '.[peers]'`. Each case first checks its
step against the reference on fresh random input, that of a large matrix also the path that it
takes. A ratio above its bound is a failure.
"""

import pytest
import torch

import tl1kernels as tk
from tl1kernels.backends import native
from tl1kernels.bench.cases import (
    LAM,
    LR,
    MODELS,
    REGULARIZER,
    RULES,
    Case,
    disagreement,
    eager_step,
    fresh,
    regularizer,
    resnet50,
    step_bytes,
    step_of,
    steps_on_one_memory,
)
from tl1kernels.views import view_of

if native.unavailable() is not None:
    pytest.skip(f"no native library: {native.unavailable()}", allow_module_level=True)

BUILDS = torch.ops.tl1kernels.cpu_builds().split()
SGD_BYTES = step_bytes("SGD", [torch.empty(4096, 4096, device="meta")])


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check_step(rule, shape, group_by, dtype, path, **regularizer):
    """Compare two steps with the reference, and the path with the one that the case is about."""
    results = []
    seed = torch.seed()
    for backend in ("cpu", "reference"):
        torch.manual_seed(seed)
        p = fresh(shape, dtype)
        step = step_of(rule, p, group_by=group_by, **regularizer)
        with tk.use_backend(backend):
            step()
            step()
        results.append(p.detach())
    got, want = results
    tolerance = 8 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance, msg=lambda text: f"{text}\ntorch's seed: {seed}"
    )
    assert got.eq(0).any() == want.eq(0).any()
    if group_by is not None:
        assert_path(got, group_by, path)


def assert_path(tensor, group_by, path):
    view = view_of(tensor, group_by)
    tiles = torch.ops.tl1kernels.cpu_tiles(view.blocks, view.outer, view.groups, view.inner)
    assert set(tiles[::7]) == {("flat", "resident", "measure").index(path)}


# group_by, path, bounds on AVX-512 of SGD, SGD momentum, AdamW
ROWS = ("out", "resident", {"SGD": 1.25, "SGD momentum": 1.15, "AdamW": 1.15})
COLUMNS = ("in", "measure", {"SGD": 2.0, "SGD momentum": 2.0, "AdamW": 1.4})
SHAPES = {
    "rows 4096x4096": ((4096, 4096), *ROWS),
    "columns 4096x4096": ((4096, 4096), *COLUMNS),
    "columns 4000x4100": ((4000, 4100), *COLUMNS),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_torchs_fused(against, name, rule):
    shape, group_by, path, bounds = SHAPES[name]
    check_step(rule, shape, group_by, torch.float32, path, **REGULARIZER)
    slow = 1.0 if BUILDS[0] == "avx512" else 2.0
    peer = f"torch {rule}, fused, no prox"

    def make():
        given = [fresh(shape)]
        ours, theirs = steps_on_one_memory(rule, given, group_by=group_by, **REGULARIZER)
        return ours, {peer: theirs}

    n_bytes = step_bytes(rule, [torch.empty(shape, device="meta")])
    against(f"{rule}, {name}", make, {peer: bounds[rule] * slow}, n_bytes)


# A pass over memory for each operation: one for SGD, three with momentum, a dozen for AdamW.
FOREACH = {"SGD": 1.25, "SGD momentum": 1.0, "AdamW": 0.4}


@pytest.mark.parametrize("rule", RULES)
def test_rows_against_torchs_foreach(against, rule):
    shape, group_by, path, _ = SHAPES["rows 4096x4096"]
    check_step(rule, shape, group_by, torch.float32, path, **REGULARIZER)
    peer = f"torch {rule}, foreach, no prox"

    def make():
        options = {"torchs_way": "foreach", "group_by": group_by, **REGULARIZER}
        ours, theirs = steps_on_one_memory(rule, [fresh(shape)], **options)
        return ours, {peer: theirs}

    n_bytes = step_bytes(rule, [torch.empty(shape, device="meta")])
    against(f"{rule}, rows", make, {peer: FOREACH[rule]}, n_bytes, rounds=3, placements=5)


@pytest.mark.skipif("avx2" not in BUILDS, reason="no AVX2 on this processor")
def test_rows_forced_to_avx2(against, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_CPU", "avx2")
    assert torch.ops.tl1kernels.cpu_build() == "avx2"
    check_step("SGD", (4096, 4096), "out", torch.float32, "resident", **REGULARIZER)
    peer = "torch SGD, fused, no prox"

    def make():
        given = [fresh((4096, 4096))]
        ours, theirs = steps_on_one_memory("SGD", given, group_by="out", **REGULARIZER)
        return ours, {peer: theirs}

    against("SGD, rows, AVX2 only", make, {peer: 2.5}, SGD_BYTES)


@pytest.mark.parametrize("rule", RULES)
def test_rows_bfloat16_against_float32(against, rule):
    """State is float32 for both; the parameter and the gradient are half as large."""
    check_step(rule, (4096, 4096), "out", torch.bfloat16, "resident", **REGULARIZER)
    peer = f"ours, {rule}, float32"

    def make():
        dtypes = (torch.bfloat16, torch.float32)
        narrow, wide = (
            step_of(rule, fresh((4096, 4096), dtype), group_by="out", **REGULARIZER)
            for dtype in dtypes
        )
        return narrow, {peer: wide}

    n_bytes = step_bytes(rule, [torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")])
    against(f"{rule}, rows, bfloat16", make, {peer: 1.0}, n_bytes)


def test_rows_bfloat16_rounded_stochastically(against):
    options = {**REGULARIZER, "rounding": "stochastic"}
    check_step("SGD", (4096, 4096), "out", torch.bfloat16, "resident", **options)
    peer = "ours, rounded to nearest"

    def make():
        p, q = (fresh((4096, 4096), torch.bfloat16) for _ in range(2))
        nearest = step_of("SGD", q, group_by="out", **REGULARIZER)
        return step_of("SGD", p, group_by="out", **options), {peer: nearest}

    n_bytes = step_bytes("SGD", [torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")])
    against("SGD, rows, bfloat16, rounded stochastically", make, {peer: 1.5}, n_bytes)


def test_rows_mostly_zero(against):
    options = {"group_by": "out", **REGULARIZER}
    case = Case("SGD, rows, 90 % zeros", "SGD", options, ((4096, 4096),), zeros=0.9)
    assert disagreement(case, "cpu") == ""
    assert_path(torch.empty(4096, 4096, device="meta"), "out", "resident")
    peer = "ours, dense"

    def make():
        p, q = fresh((4096, 4096)), fresh((4096, 4096))
        with torch.no_grad():
            p.mul_(torch.rand_like(p) > 0.9)
            p.grad.mul_(p != 0)
        ours, dense = (step_of("SGD", x, group_by="out", **REGULARIZER) for x in (p, q))
        return ours, {peer: dense}

    against(case.name, make, {peer: 1.1}, SGD_BYTES)


def test_the_papers_step_eager_and_compiled(against):
    p = fresh((4096, 4096))
    with torch.no_grad():
        wide = p.double()
    wide.grad = p.grad.double()
    eager_step(wide, wide.grad)
    other = p.detach().clone().requires_grad_()
    other.grad = p.grad
    step_of("SGD", other, group_by="out", **REGULARIZER)()
    torch.testing.assert_close(other.double(), wide, rtol=0, atol=1e-6)
    compiled = torch.compile(eager_step)
    del wide, other

    def make():
        p, q, r = (fresh((4096, 4096)) for _ in range(3))
        peers = {
            "the paper's step, eager": lambda: eager_step(q, q.grad),
            "the paper's step, torch.compile": lambda: compiled(r, r.grad),
        }
        return step_of("SGD", p, group_by="out", **REGULARIZER), peers

    bounds = {"the paper's step, eager": 1 / 60, "the paper's step, torch.compile": 1 / 8}
    against("SGD, rows", make, bounds, SGD_BYTES, rounds=3, placements=5)


PAT = {
    "rows": ("ProxGroupLasso", "Dim0Grouper", "out", None, "resident", 3.5),
    "columns": ("ProxGroupLasso", "Dim1Grouper", "in", None, "measure", 12),
    "lasso": ("ProxLasso", "ElemGrouper", None, "l1", None, 25),
}


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("job", PAT)
def test_torchao_pat_on_its_own_job(against, job):
    """Its prox runs on SGD(fused=True) and keeps a second copy of the weights."""
    optim = pytest.importorskip("torchao.prototype.pat.optim", reason="pip install -e '.[peers]'")
    prox_type, group_type, group_by, penalty, path, speed_up = PAT[job]
    options = {"group_by": group_by, "penalty": penalty, "lam": LAM}
    check_step("SGD", (4096, 4096), dtype=torch.float32, path=path, **options)
    peer = f"torchao PAT, {prox_type}"

    def make():
        p, q = fresh((4096, 4096)), fresh((4096, 4096))
        group = {"params": [q], "prox_type": prox_type, "group_type": group_type}
        pat = optim.PruneOptimizer(torch.optim.SGD([group], lr=LR, fused=True), reg_lambda=LAM)
        return step_of("SGD", p, **options), {peer: pat.step}

    case = "SGD, l1" if job == "lasso" else f"SGD, group lasso, {job}"
    against(case, make, {peer: 1 / speed_up}, SGD_BYTES, rounds=3, placements=5)


LIBRARIES = {
    "ProxTorch": ("proxtorch.operators", lambda module: module.L1(LAM)),
    "pyproximal": ("pyproximal", lambda module: module.L1(LAM)),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_prox_of_l1_alone(against, library):
    """In place, where they return another tensor, or NumPy array, of the same memory each time."""
    name, make_prox = LIBRARIES[library]
    module = pytest.importorskip(name, reason="pip install -e '.[peers]'")
    theirs, step = make_prox(module), 0.5
    options = {"lam": LAM, "penalty": "l1", "group_by": None}

    def given(v):
        return v.numpy() if library == "pyproximal" else v

    v = torch.randn(300, 700)
    want = torch.as_tensor(theirs.prox(given(v), step))
    torch.testing.assert_close(tk.prox(v, step, **options), want)

    def make():
        v, w = torch.randn(4096, 4096), torch.randn(4096, 4096)
        peer = given(w)
        return lambda: tk.prox_(v, step, **options), {library: lambda: theirs.prox(peer, step)}

    n_bytes = 2 * 4 * 4096**2
    against("the prox alone, l1", make, {library: 1 / 3}, n_bytes, rounds=3, placements=5)


@pytest.mark.parametrize("schedule", ["", ", lr changes each step"])
@pytest.mark.parametrize("n_groups", [1, 55])
@pytest.mark.parametrize("rule", RULES)
def test_pythons_time_for_161_small_tensors(against, monkeypatch, rule, n_groups, schedule):
    """A step without the op that does the arithmetic, on either side; of torch in one group."""
    params = [fresh((4, 4)) for _ in range(161)]
    groups = [{"params": params[i::n_groups]} for i in range(n_groups)]
    ours, theirs = steps_on_one_memory(rule, groups, **REGULARIZER)
    ours(), theirs()
    monkeypatch.setattr(torch.ops.tl1kernels, "step_", lambda *_: None)
    for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)

    def with_schedule(step):
        groups = step.__self__.param_groups

        def run():
            for _ in range(20):
                for group in groups if schedule else ():
                    group["lr"] *= 0.999
                step()

        return run

    peer = f"torch {rule}, fused, no prox"
    many = "" if n_groups == 1 else f", {n_groups} param groups"
    case = f"{rule}, 20 steps of 161 tensors 4x4, Python alone{many}{schedule}"
    bound = (3.0 if schedule else 1.15) if many else 1.15 if schedule else 1.0
    sides = with_schedule(ours), {peer: with_schedule(theirs)}
    against(case, lambda: sides, {peer: bound}, 0)


# What they cost now, with some room; the others are promises.
PENALTIES = dict.fromkeys(("l1", "l0", "scad", "mcp", "log", "capped_l1"), 1.5)
PENALTIES |= {"l_half": 2.0, "l_two_thirds": 3.5, "l1_minus_l2": 2.5, "cges": 2.5}


def test_no_penalty_is_left_out():
    assert {*PENALTIES, "tl1"} == {*native.penalties()}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty(against, penalty):
    options = regularizer(penalty)
    case = Case(f"SGD, rows, {penalty}", "SGD", options, ((4096, 4096),))
    assert disagreement(case, "cpu") == ""
    assert_path(torch.empty(4096, 4096, device="meta"), "out", "resident")
    peer = "torch SGD, fused, no prox"

    def make():
        ours, theirs = steps_on_one_memory("SGD", [fresh((4096, 4096))], **options)
        return ours, {peer: theirs}

    against(case.name, make, {peer: PENALTIES[penalty]}, SGD_BYTES, placements=3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", ["ViT-B/16", "GPT-2 small"])
def test_a_transformers_parameters(against, rule, model):
    """Their linear layers are grouped by columns, which take a second sweep."""
    shapes = tuple(MODELS[model]())
    name = f"{rule}, a {model}'s {len(shapes)} tensors"
    assert disagreement(Case(name, rule, REGULARIZER, shapes), "cpu") == ""
    assert_path(torch.empty(3072, 768, device="meta"), "in", "measure")
    peer = f"torch {rule}, fused, no prox"

    def make():
        ours, theirs = steps_on_one_memory(rule, [fresh(shape) for shape in shapes], **REGULARIZER)
        return ours, {peer: theirs}

    n_bytes = step_bytes(rule, [torch.empty(shape, device="meta") for shape in shapes])
    against(name, make, {peer: COLUMNS[2][rule]}, n_bytes, rounds=5, placements=2)


@pytest.mark.parametrize("groups", ["one param group", "one for each layer"])
@pytest.mark.parametrize("rule", RULES)
def test_a_resnet50s_parameters(against, rule, groups):
    shapes = resnet50()
    assert disagreement(Case("", rule, REGULARIZER, tuple(shapes)), "cpu") == ""
    peer = f"torch {rule}, fused, no prox"

    def make():
        given = [fresh(shape) for shape in shapes]
        if groups == "one for each layer":
            given = [
                {"params": [p], "lam": LAM * (p.ndim > 1), "mu": i / len(given)}
                for i, p in enumerate(given)
            ]
        ours, theirs = steps_on_one_memory(rule, given, **REGULARIZER)
        return ours, {peer: theirs}

    case = f"{rule}, a ResNet-50's 161 tensors, {groups}"
    n_bytes = step_bytes(rule, [torch.empty(shape, device="meta") for shape in shapes])
    against(case, make, {peer: 1.25}, n_bytes)
