"""What a step costs on a GPU, beside a copy of as many bytes and torch's fused optimizers.

Run: python -m pytest bench/test_gpu.py --benchmark-enable --json-out gpu.json   (or bench/gpu.sh)
Each case first checks its step against the reference, and the kernels that it takes, on fresh
random input. A ratio above its bound is a failure.
"""

import pytest
import torch

import tl1kernels as tk
from tl1kernels.backends import triton_launch
from tl1kernels.bench.cases import (
    LR,
    MODELS,
    REGULARIZER,
    RULES,
    eager_step,
    fresh,
    step_bytes,
    step_of,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)

SIZE = 8192
GROUPS = {"rows": ("out", "resident"), "columns": ("in", "split"), "no groups": (None, "resident")}
OF_COPY = {"rows": 0.9, "columns": 0.8, "no groups": 0.9}  # of the measured copy bandwidth
COPY = "a copy of as many bytes"


def copy_of(n_bytes):
    """Return a function that copies half as many bytes: reads and writes make n_bytes."""
    source = torch.randn(n_bytes // 8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check_step(rule, dtype, group_by, kernel):
    """Compare two steps with the reference's, and the kernel with the one the case is about."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        p = fresh((1024, 1024), dtype, "cuda")
        step = step_of(rule, p, group_by=group_by, **REGULARIZER)
        with tk.use_backend(backend):
            step()
            step()  # whose plan is kept
        if backend == "triton":
            (_, batch), *_ = step.__self__._planned.batches._prepared
            plan = batch.layouts["plan"]
            assert bool(len(plan.split.items)) == (kernel == "split")
            assert bool(len(plan.resident.items)) == (kernel == "resident")
        results.append(p.detach())
    got, want = results
    tolerance = 8 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", GROUPS)
def test_one_large_tensor(against_on_gpu, groups, rule, dtype):
    group_by, kernel = GROUPS[groups]
    check_step(rule, dtype, group_by, kernel)
    p = fresh((SIZE, SIZE), dtype, "cuda")
    n_bytes = step_bytes(rule, [p])
    peers, bounds = {COPY: copy_of(n_bytes)}, {COPY: 1 / OF_COPY[groups]}
    if dtype == torch.float32 or rule == "SGD":  # torch keeps bfloat16 state
        q = fresh((SIZE, SIZE), dtype, "cuda")
        _, torchs, options, _ = RULES[rule]
        peer = f"torch {rule}, fused, no prox"
        peers[peer] = torchs([q], lr=LR, fused=True, **options).step
        bounds[peer] = 1.0 if groups != "columns" else 1.25
    name = str(dtype).removeprefix("torch.")
    ours = step_of(rule, p, group_by=group_by, **REGULARIZER)
    against_on_gpu(f"{rule}, {groups} {SIZE}x{SIZE}, {name}", ours, peers, bounds, n_bytes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_a_models_parameters(against_on_gpu, model, rule):
    shapes = MODELS[model]()
    ours, torchs, options, _ = RULES[rule]
    mine, theirs = ([fresh(shape, device="cuda") for shape in shapes] for _ in range(2))
    peer = f"torch {rule}, fused, no prox"
    against_on_gpu(
        f"{rule}, a {model}'s {len(shapes)} tensors, host included",
        ours(mine, lr=LR, **options, **REGULARIZER).step,
        {peer: torchs(theirs, lr=LR, fused=True, **options).step},
        {peer: 1.1},
        step_bytes(rule, mine),
        host=True,
    )


def test_the_papers_step_eager_and_compiled(against_on_gpu):
    p, q, r = (fresh((SIZE, SIZE), device="cuda") for _ in range(3))
    compiled = torch.compile(eager_step)
    eager, fused = "the paper's step, eager", "the paper's step, torch.compile"
    against_on_gpu(
        f"SGD, rows {SIZE}x{SIZE}, float32",
        step_of("SGD", p, group_by="out", **REGULARIZER),
        {eager: lambda: eager_step(q, q.grad), fused: lambda: compiled(r, r.grad)},
        {eager: 1 / 20, fused: 1 / 3},
        step_bytes("SGD", [p]),
        rounds=9,
    )


def test_the_backend_is_triton():
    assert tk.info().runs_on["cuda"] == "triton", triton_launch.unavailable()
