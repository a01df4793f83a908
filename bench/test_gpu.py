"""What a step costs on a GPU, beside a copy of as many bytes and torch's fused optimizers.

Run: python -m pytest bench/test_gpu.py --benchmark-enable --json-out gpu.json   (or bench/gpu.sh)
Each case first checks its step against the reference on fresh random input; those of one large
matrix, by group, also the kernels that they take. A ratio above its bound is a failure.
"""

import pytest
import torch

import tl1kernels as tk
from tests.common import gpu_backend
from tl1kernels import backends
from tl1kernels.backends import triton_schedule
from tl1kernels.bench.cases import (
    LR,
    MODELS,
    REGULARIZER,
    RULES,
    Case,
    disagreement,
    eager_step,
    fresh,
    step_bytes,
    step_of,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)

SIZE = 8192
# group_by, and the work that a step on a large matrix must be, by backend: see `work_of`.
GROUPS = {
    "rows": ("out", {"triton": {"resident"}, "cuda": {"run"}}),
    "columns": ("in", {"triton": {"split, by teams"}, "cuda": {"panel, by teams"}}),
    "no groups": (None, {"triton": {"resident"}, "cuda": {"chunk"}}),
}
OF_COPY = {  # of the measured copy bandwidth
    "triton": {"rows": 0.9, "columns": 0.8, "no groups": 0.9},
    "cuda": {"rows": 0.92, "columns": 0.85, "no groups": 0.92},
}
COPY = "a copy of as many bytes"


def copy_of(n_bytes):
    """Return a function that copies half as many bytes: reads and writes make n_bytes."""
    source = torch.randn(n_bytes // 8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


backend = pytest.fixture(autouse=True, params=["triton", "cuda"])(gpu_backend)


def work_of(step):
    """Return what a step that has been taken consists of: its kernels, or shapes of work."""
    (_, batch), *_ = step.__self__._planned.batches._prepared
    schedule = batch.layouts["kept"].schedule
    if isinstance(schedule, triton_schedule.Schedule):
        held = (schedule.split.items[:, 1] // 2 % 4 == triton_schedule.HELD).all()
        works = {
            "resident": schedule.resident,
            "split, by teams" if held else "split": schedule.split,
        }
        return {name for name, work in works.items() if len(work.items)}
    shapes = ("chunk", "panel", "run")
    by_teams = ", by teams" if schedule.most_pieces > 1 else ""
    names = {shapes[kind >> 1 & 3] + by_teams for kind in schedule.resident[:, 1].tolist()}
    return names | ({"split"} if len(schedule.split) else set())


def check_step(rule, dtype, group_by, **options):
    """Compare two steps with the reference's."""
    results = []
    seed = torch.seed()
    for backend in (backends.asked_for(), "reference"):
        torch.manual_seed(seed)
        p = fresh((SIZE, SIZE), dtype, "cuda")
        step = step_of(rule, p, group_by=group_by, **REGULARIZER, **options)
        with tk.use_backend(backend):
            step()
            step()  # whose plan is kept
        results.append(p.detach())
    got, want = results
    tolerance = 8 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance, msg=lambda text: f"{text}\ntorch's seed: {seed}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", GROUPS)
def test_one_large_tensor(against_on_gpu, backend, groups, rule, dtype):
    group_by, work = GROUPS[groups]
    check_step(rule, dtype, group_by)
    p = fresh((SIZE, SIZE), dtype, "cuda")
    n_bytes = step_bytes(rule, [p])
    peers, bounds = {COPY: copy_of(n_bytes)}, {COPY: 1 / OF_COPY[backend][groups]}
    if dtype == torch.float32 or rule == "SGD":  # torch keeps bfloat16 state
        q = fresh((SIZE, SIZE), dtype, "cuda")
        _, torchs, options, _ = RULES[rule]
        peer = f"torch {rule}, fused, no prox"
        peers[peer] = torchs([q], lr=LR, fused=True, **options).step
        bounds[peer] = 1.0 if groups != "columns" else 1.25
    name = str(dtype).removeprefix("torch.")
    ours = step_of(rule, p, group_by=group_by, **REGULARIZER)
    case = f"{backend}, {rule}, {groups} {SIZE}x{SIZE}, {name}"
    ours()
    assert work_of(ours) == work[backend]
    against_on_gpu(case, ours, peers, bounds, n_bytes)


def test_stochastic_rounding(against_on_gpu, backend):
    check_step("SGD", torch.bfloat16, "out", rounding="stochastic")
    p = fresh((SIZE, SIZE), torch.bfloat16, "cuda")
    n_bytes = step_bytes("SGD", [p])
    ours = step_of("SGD", p, group_by="out", **REGULARIZER, rounding="stochastic")
    case = f"{backend}, SGD, rows {SIZE}x{SIZE}, bfloat16, rounded stochastically"
    bounds = {COPY: 1 / OF_COPY[backend]["rows"]}
    against_on_gpu(case, ours, {COPY: copy_of(n_bytes)}, bounds, n_bytes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_a_models_parameters(against_on_gpu, backend, model, rule):
    shapes = MODELS[model]()
    assert disagreement(Case(model, rule, REGULARIZER, tuple(shapes)), "cuda") == ""
    ours, torchs, options, _ = RULES[rule]
    mine, theirs = ([fresh(shape, device="cuda") for shape in shapes] for _ in range(2))
    peer = f"torch {rule}, fused, no prox"
    against_on_gpu(
        f"{backend}, {rule}, a {model}'s {len(shapes)} tensors, host included",
        ours(mine, lr=LR, fused=True, **options, **REGULARIZER).step,
        {peer: torchs(theirs, lr=LR, fused=True, **options).step},
        {peer: {"triton": 1.1, "cuda": 1.05}[backend]},
        step_bytes(rule, mine),
        host=True,
    )


def test_a_models_parameters_while_lr_changes(against_on_gpu, backend):
    shapes = MODELS["ResNet-50"]()
    assert disagreement(Case("", "SGD", REGULARIZER, tuple(shapes)), "cuda") == ""
    mine, theirs = ([fresh(shape, device="cuda") for shape in shapes] for _ in range(2))
    peer = "torch SGD, fused, no prox"
    against_on_gpu(
        f"{backend}, SGD, a ResNet-50's {len(shapes)} tensors, lr changes each step, host included",
        changing_lr(tk.ProxSGD(mine, lr=LR, fused=True, **REGULARIZER)),
        {peer: changing_lr(torch.optim.SGD(theirs, lr=LR, fused=True))},
        {peer: 1.15},
        step_bytes("SGD", mine),
        host=True,
    )


def changing_lr(optimizer):
    """Return a step before which lr becomes another, as under a scheduler."""
    (group,) = optimizer.param_groups

    def step():
        group["lr"] = 2 * LR if group["lr"] == LR else LR
        optimizer.step()

    return step


def test_the_papers_step_eager_and_compiled(against_on_gpu, backend):
    check_step("SGD", torch.float32, "out")
    p, q, r = (fresh((SIZE, SIZE), device="cuda") for _ in range(3))
    compiled = torch.compile(eager_step)
    eager, fused = "the paper's step, eager", "the paper's step, torch.compile"
    against_on_gpu(
        f"{backend}, SGD, rows {SIZE}x{SIZE}, float32",
        step_of("SGD", p, group_by="out", **REGULARIZER),
        {eager: lambda: eager_step(q, q.grad), fused: lambda: compiled(r, r.grad)},
        {eager: 1 / 20, fused: 1 / 3},
        step_bytes("SGD", [p]),
        rounds=9,
    )
