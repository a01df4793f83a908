"""The native kernels: paths, threads, memory, and how they are built.

What they share with other kernels is in test_kernels.py. Each test that runs kernels does so on
every instruction set that this machine has.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tests.common import assert_near
from tl1kernels.backends import native
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
from tl1kernels.views import view_of

if native.unavailable() is not None:
    pytest.skip(f"no native library: {native.unavailable()}", allow_module_level=True)

OPS = torch.ops.tl1kernels
BUILDS = OPS.cpu_builds().split()
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_CPU", request.param)
    assert OPS.cpu_build() == request.param
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def on(backend, function, *args, **options):
    with tk.use_backend(backend):
        return function(*args, **options)


def test_every_build_of_an_x86_machine_is_tested():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("avx512" in BUILDS) == ("avx512vl" in flags)
    assert ("avx2" in BUILDS) == (" avx2" in flags and " fma" in flags)
    assert BUILDS[-1] == "baseline"


# --- Paths: what waits in cache, what is swept twice, what is cut where.

VIEWS = {
    "rows": ((300, 1000), 0, "resident"),
    "short rows": ((3000, 9), 0, "resident"),
    "one weight a row": ((1000, 1), 0, "resident"),
    "rows of 64": ((100, 64), 0, "resident"),
    "rows of whole chunks": ((70, 1088), 0, "resident"),
    "long rows of whole chunks": ((3, 100_032), 0, "resident"),
    "rows and a rest": ((50, 1100), 0, "resident"),
    "long rows": ((2, 200_003), 0, "resident"),
    "rows beyond the cache": ((2, 300_007), 0, "measure"),
    "a whole layer": ((700, 701), "layer", "measure"),
    "few columns": ((700, 301), 1, "resident"),
    "columns": ((700, 601), 1, "measure"),
    "two long columns": ((300_000, 2), 1, "measure"),
    "three columns": ((50_001, 3), 1, "resident"),
    "more columns than a tile": ((70, 16_389), 1, "resident"),
    "more of both": ((300, 16_389), 1, "measure"),
    "input channels 3x3": ((130, 99, 3, 3), 1, "resident"),
    "many input channels 3x3": ((300, 303, 3, 3), 1, "measure"),
    "more of them than a tile": ((260, 1827, 3, 3), 1, "measure"),
    "input channels 9x9": ((400, 13, 9, 9), 1, "measure"),
    "slices": ((20, 30, 3, 3), "filter_slice", "resident"),
}
PHASES = ("flat", "resident", "measure", "finish")


def tiles(view):
    flat = OPS.cpu_tiles(view.blocks, view.outer, view.groups, view.inner)
    return np.array(flat, dtype=np.int64).reshape(-1, 7)


@pytest.mark.parametrize(
    "name", ["more columns than a tile", "more of both", "more of them than a tile"]
)
def test_rows_of_several_tiles_are_cut_evenly(name):
    shape, group_by, path = VIEWS[name]
    rows = tiles(view_of(torch.empty(shape), group_by))
    widths = {start: end - start for start, end in rows[:, 4:6].tolist()}
    assert len(widths) > 1
    if path == "measure":
        assert min(widths.values()) > 0.9 * max(widths.values())


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_agrees_with_the_reference(build, name, dtype):
    shape, group_by, path = VIEWS[name]
    v = torch.randn(shape).to(dtype)
    view = view_of(v, group_by)
    assert {PHASES[row[0]] for row in tiles(view)} == {path}
    norm = math.sqrt(view.group_size)
    for penalty in (None, "tl1"):
        options = {"lam": 0.5 + norm / 2, "mu": 0.5 / (0.5 + norm / 2)}  # weights 1/2 and norm/2
        options |= {"penalty": penalty, "group_by": group_by, "a": 0.8}
        got, want = (on(b, tk.prox, v, 0.6, **options) for b in ("cpu", "reference"))
        assert (got != 0).any()
        ulps = {torch.float32: 24, torch.float64: 64}.get(
            dtype, 1
        )  # a = 0.8 is near the double root
        assert_near(got, want, ulps, v)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("penalty", "tau"), [("cges", None), ("l1_minus_l2", 1.0), ("l1_minus_l2", 10.0)]
)
def test_every_path_of_a_penalty_of_whole_groups(build, name, dtype, penalty, tau):
    """For l1 - l2 both where groups have weights beyond tau and where they have none."""
    shape, group_by, _ = VIEWS[name]
    v = torch.randn(shape).to(dtype)
    view = view_of(v, group_by)
    tau = tau or 0.6 / view.group_size
    lasso = 0.3 * math.sqrt(view.group_size) if tau < 10 else 0.0
    options = {"lam": tau + lasso, "mu": tau / (tau + lasso)}
    options |= {"penalty": penalty, "group_by": group_by}
    got, want = (on(b, tk.prox, v, 1.0, **options) for b in ("cpu", "reference"))
    assert (got != 0).any()
    magnified = 1.0
    if penalty == "l1_minus_l2":  # a short soft-thresholded group is scaled up
        z = view.split((v.double().abs() - tau).clamp(min=0))
        norms = torch.linalg.vector_norm(z, dim=(1, 3), keepdim=True).expand_as(z)
        magnified = 1 + tau / view.join(norms, v.shape).clamp(min=1e-9)
    # Up to 50,001 squares of a column are added one after the other.
    ulps = {torch.float32: 8, torch.float64: 256}.get(dtype, 1)
    assert_near(got, want, ulps, v.abs().clamp(min=1) * magnified)


@pytest.mark.parametrize("name", ["rows", "columns", "input channels 3x3", "a whole layer"])
@pytest.mark.parametrize("kind", [tk.ProxSGD, tk.ProxAdamW])
def test_state_is_updated_once_on_every_path(build, name, kind):
    """16 bits compute a two-sweep tile twice; their state must not see that."""
    shape, group_by, _ = VIEWS[name]
    options = {"momentum": 0.9} if kind is tk.ProxSGD else {}
    start = torch.randn(shape).bfloat16()
    optimizers = []
    for regularized in (True, False):
        p = start.clone().requires_grad_()
        lam = 1e-30 if regularized else 0.0  # the groups' path, without an effect
        optimizers.append(kind([p], lr=0.1, lam=lam, group_by=group_by, **options))
        for i in range(3):
            p.grad = torch.full_like(p, 0.25 * (i + 1))
            optimizers[-1].step()
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    assert torch.equal(p, q)
    for key, state in optimizers[0].state[p].items():
        assert torch.equal(state, optimizers[1].state[q][key]), key


@pytest.mark.parametrize("header", ["prox_math.h", "penalties.h"])
def test_the_constants_are_what_their_script_finds(header):
    csrc = Path(__file__).parents[1] / "csrc"
    script = [sys.executable, "-B", str(csrc / "prox_constants.py")]
    script += ["--powers"] if header == "penalties.h" else []
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    assert done.stdout in (csrc / header).read_text()


CUDA = """
#include "update_rules.h"
__global__ void step(float* p, const float* g, float* m, float* v, tl1::RuleNumbers n,
                     tl1::Coefficients c) {
  const tl1::Adam<float> rule(n);
  const tl1::TransformedL1<float> penalty(c);
  const int i = threadIdx.x;
  float unused = 0;
  const float t = rule.take<false>(p[i], g[i], m[i], v[i], unused);
  penalty.with_prox([&](auto prox) { p[i] = fabsf(t) <= penalty.cut ? 0.0f : prox(fabsf(t)); });
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_the_scalar_maths_compiles_for_cuda_without_spills(tmp_path):
    (tmp_path / "step.cu").write_text(CUDA)
    csrc = Path(__file__).parents[1] / "csrc"
    command = ["nvcc", "-std=c++20", "-arch=sm_90", "-fmad=false", "-Xptxas", "-v", "-cubin"]
    command += ["-I", str(csrc), "-o", str(tmp_path / "step.cubin"), str(tmp_path / "step.cu")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_tiles_cover_every_weight_once():
    views = [
        *((1, outer, groups, inner) for outer in (1, 3, 31, 64, 700) for groups in (1, 7, 700)
          for inner in (1, 9, 63, 64, 65, 700)),
        (5, 1, 3, 9), (7, 40, 20, 3), (2, 300, 9000, 1), (3, 1, 1, 300_000),
    ]  # fmt: skip
    for blocks, outer, groups, inner in views:
        width = groups * inner
        seen = np.zeros(blocks * outer * width, dtype=np.int8)
        flat = np.array(OPS.cpu_tiles(blocks, outer, groups, inner)).reshape(-1, 7)
        for _, base, row0, row1, col0, col1, _ in flat:
            for row in range(row0, row1):
                seen[base + row * width + col0 : base + row * width + col1] += 1
        assert (seen == 1).all(), (blocks, outer, groups, inner)


def test_tiles_beyond_2_to_the_31():
    """Indices as 64-bit numbers: the far end of views that no machine here could hold."""
    for view in (
        (1, 1, 2**20, 2**13),
        (1, 2**21, 2**13, 1),
        (1, 2**14, 2**10, 2**12),
        (1, 1, 1, 2**33),
    ):
        flat = np.array(OPS.cpu_tiles(*view), dtype=np.int64).reshape(-1, 7)
        rows, columns = flat[:, 3] - flat[:, 2], flat[:, 5] - flat[:, 4]
        assert (rows * columns).sum() == math.prod(view)
        assert flat[:, 3].max() == view[1]
        assert flat[:, 5].max() == view[2] * view[3]
        assert (rows > 0).all()
        assert (columns > 0).all()


def available_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(available_memory() < 9 << 30, reason="needs 5 GB of memory to spare")
def test_a_tensor_of_more_than_2_to_the_31_weights():
    v = torch.zeros(2**20 + 1, 2**11 + 2, dtype=torch.bfloat16)  # 2^31 + 2^21 + ...
    v[-1], v[-2], v[0] = 3.0, 0.001, 3.0
    want = tk.prox(v[-1:].float(), 0.1, group_by="out", backend="reference").bfloat16()
    tk.prox_(v, 0.1, group_by="out")
    assert torch.equal(v[-1:], want)
    assert torch.equal(v[:1], want)
    assert v[-2].eq(0).all()


# --- Threads, memory.


def many(dtype):
    shapes = [
        (700, 601),
        (512, 300),
        (64, 3, 7, 7),
        (5,),
        (1,),
        (300_007,),
        (0, 3),
        (128, 64, 3, 3),
    ]
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group_by", "penalty"),
    [("auto", "tl1"), ("layer", "tl1"), (-1, "tl1"), ("auto", "cges"), ("layer", "l1_minus_l2")],
)
def test_the_same_bits_for_any_number_of_threads_and_run_after_run(
    build, threads, dtype, group_by, penalty
):
    results = []
    for n in (1, 2, 4, 2):
        threads(n)
        params = many(dtype)
        options = {"group_by": group_by, "penalty": penalty, "min_ndim": 1}
        optimizer = tk.ProxAdamW(params, lr=0.1, lam=0.3, **options)
        for _ in range(2):
            optimizer.step()
        state = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")]
        results.append([p.detach() for p in params] + state)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def peak_memory_of(function):
    """Return the bytes by which the process grew at most during the call."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    read = lambda key: int(status.read_text().split(key + ":")[1].split()[0]) * 1024  # noqa: E731
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_by", ["out", "in", "layer", None])
def test_a_step_needs_no_memory_beyond_the_groups(dtype, group_by):
    """64 million bytes of weights, 4096 groups: 3 MB of workspace at most, kept by each thread."""
    p = torch.randn(4096, 4096 * 4 // torch.finfo(dtype).bits * 8).to(dtype).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9, lam=0.1, group_by=group_by)
    optimizer.step()
    assert peak_memory_of(optimizer.step) < 8 << 20 < p.numel() * p.element_size()


# --- Faults.


def test_a_zero_tensor_and_a_negative_bit_as_gradient_or_parameter():
    p = torch.ones(1000, requires_grad=True)
    p.grad = torch._efficientzerotensor((1000,))
    tk.ProxSGD([p], lr=1.0).step()
    assert p.eq(1).all()
    p.grad = torch._neg_view(torch.ones(1000))
    tk.ProxSGD([p], lr=1.0).step()
    assert p.eq(2).all()
    negative = torch._neg_view(torch.ones(4))
    with pytest.warns(RuntimeWarning, match="negative bit"):
        tk.prox_(negative, 0.25, penalty="l1")
    assert negative.eq(-0.75).all()


def test_second_sweeps_between_first_ones_change_no_bit(build, threads):
    """Many tensors at once, some swept twice, as each of them by itself on one thread."""
    shapes = [(300, 700), (4096, 64), (5, 7), (1000, 5), (16, 8, 3, 3), (2000, 300)] * 4

    def step(n_threads, alone):
        threads(n_threads)
        torch.manual_seed(5)
        params = [torch.randn(shape).mul_(0.05).requires_grad_() for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p).mul_(0.01)
        for batch in [[p] for p in params] if alone else [params]:
            tk.ProxSGD(batch, lr=0.1, lam=0.02, group_by="in").step()
        return params

    views = [view_of(torch.empty(shape), "in") for shape in shapes]
    tiles = [OPS.cpu_tiles(v.blocks, v.outer, v.groups, v.inner)[::7] for v in views]
    assert {2 in phases for phases in tiles} == {True, False}  # measured, and swept once
    want = step(1, alone=True)
    for n_threads in (1, 2, 3, 8):
        got = step(n_threads, alone=False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (tk.ProxSGD, {}),
        (tk.ProxSGD, {"momentum": 0.9}),
        (tk.ProxAdam, {}),
        (tk.ProxAdam, {"amsgrad": True}),
    ],
)
def test_a_plain_step_has_the_bits_of_the_whole_rule(build, optimizer, options, dtype):
    """A decay that is rounded away leads to the loop of the whole rule, none to the shorter one."""
    results = []
    for decay in (0.0, 1e-30):
        torch.manual_seed(3)
        p = torch.randn(3, 700).mul_(0.05).to(dtype).requires_grad_()
        opt = optimizer([p], lr=0.01, weight_decay=decay, lam=0.3, group_by="out", **options)
        for _ in range(3):
            p.grad = torch.randn(3, 700).add_(1e-3).to(dtype)
            opt.step()
        results.append([p, *(x for x in opt.state[p].values() if torch.is_tensor(x))])
    for plain, whole in zip(*results, strict=True):
        assert torch.equal(plain, whole)


def test_an_unknown_build_is_an_error_that_names_the_choices(monkeypatch):
    monkeypatch.setenv("TL1KERNELS_CPU", "sse9")
    assert "'sse9'" in tk.info().native
    v = torch.ones(4)
    p = torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    optimizer = tk.ProxAdam([p], lr=0.1)
    with pytest.raises(RuntimeError, match="TL1KERNELS_CPU"):
        optimizer.step()
    assert not optimizer.state
    with pytest.raises(RuntimeError, match=r"TL1KERNELS_CPU must be one of .*'baseline'.*'sse9'"):
        tk.prox_(v, 0.1)
    assert v.eq(1).all()
