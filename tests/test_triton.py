"""The Triton backend: which tile serves which view, numbers on the device, the op.

Where Triton compiles, on a GPU, or interprets (TRITON_INTERPRET=1, `make test`), the kernels run;
the schedule is tested anywhere. What they share with other kernels is in test_kernels.py.
"""

import math

import numpy as np
import pytest
import torch
from torch import library as torch_library

import tl1kernels as tk
from tests.common import assert_near, rounding, variants
from tl1kernels import plan as planning
from tl1kernels.backends import triton_launch, triton_schedule
from tl1kernels.batch import SGD, Adam, Entry, Numbers, host_numbers
from tl1kernels.penalties import Terms
from tl1kernels.plan import FLOAT_DTYPES as DTYPES
from tl1kernels.views import GroupView, view_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# name: shape, group_by, kinds of tiles
VIEWS = {
    "no groups": ((3, 1300), None, {"flat"}),
    "no groups, full tiles": ((4, 4096), None, {"flat aligned"}),
    "no groups, a full tile and a rest": ((4099,), None, {"flat aligned", "flat"}),
    "rows of one": ((50, 1), 0, {"rows 1"}),
    "rows of 3": ((3001, 3), 0, {"rows 4"}),
    "slices 3x3": ((20, 30, 3, 3), "filter_slice", {"rows 16"}),
    "rows of 100": ((70, 100), 0, {"rows 128 aligned"}),
    "rows of 147": ((64, 147), 0, {"rows 256"}),
    "rows of 576": ((33, 576), 0, {"rows 1024 aligned"}),
    "rows of 4096": ((3, 4096), 0, {"rows 4096 aligned"}),
    "rows of 8192": ((3, 8192), 0, {"rows 8192 aligned"}),
    "rows of 8191": ((2, 8191), 0, {"rows 8192"}),
    "longer rows": ((2, 8193), 0, {"long first", "long second"}),
    "long aligned rows": ((2, 12288), 0, {"long first aligned", "long second aligned"}),
    "a whole layer": ((130, 70), "layer", {"long first aligned", "long second aligned"}),
    "a small layer": ((30, 7), "layer", {"rows 256"}),
    "few rows of columns": ((64, 99), 1, {"columns whole"}),
    "few rows of aligned columns": ((17, 128), 1, {"columns whole aligned"}),
    "columns": ((65, 67), 1, {"columns first", "columns second"}),
    "aligned columns": ((200, 136), 1, {"columns first aligned", "columns second aligned"}),
    "tall columns": ((5000, 3), 1, {"columns first", "columns second"}),
    "input channels 3x3": ((130, 15, 3, 3), 1, {"columns first", "columns second"}),
    "input channels 7x7": ((70, 3, 7, 7), 1, {"columns first", "columns second"}),
    "few rows of input channels": ((9, 15, 3, 3), 1, {"columns whole"}),
    "runs of 65": ((3, 5, 65), 1, {"long first", "long second"}),
    "long runs": ((3, 5, 5000), 1, {"long first aligned", "long second aligned"}),
}


def names(kinds):
    """Return what a schedule's kinds of split tiles are called."""
    parts = []
    for kind in (k for k in range(64) if kinds >> k & 1):
        geometry = "columns" if kind // 2 < triton_schedule.LONG_KIND else "long"
        phase = ("first", "second", "whole")[kind // 2 % 3]
        parts.append(f"{geometry} {phase}" + (" aligned" if kind % 2 else ""))
    return set(parts)


def resident_names(kinds):
    parts = []
    for kind in (k for k in range(64) if kinds >> k & 1):
        k = kind // 2
        name = "flat" if k == triton_schedule.FLAT else f"rows {1 << k}"
        parts.append(name + (" aligned" if kind % 2 else ""))
    return set(parts)


def kinds_of(schedule):
    return resident_names(schedule.resident.kinds) | names(schedule.split.kinds)


@pytest.mark.parametrize("name", VIEWS)
def test_every_range_of_views_takes_its_tile(name):
    """The table at the top of triton_schedule.py."""
    shape, group_by, want = VIEWS[name]
    view = view_of(torch.empty(shape), group_by)
    assert kinds_of(triton_schedule.plan([view], [True], 4)) == want
    unaligned = {kind.removesuffix(" aligned") for kind in want}
    assert kinds_of(triton_schedule.plan([view], [False], 4)) == unaligned


def test_split_tiles_come_in_an_order_in_which_nobody_waits_for_ever():
    """A team's second pass begins after all of its first; and not much later."""
    shapes = [((300, 700), 1), ((5, 40_000), 0), ((130, 15, 3, 3), 1), ((64, 3), 1)]
    views = [view_of(torch.empty(shape), group_by) for shape, group_by in shapes]
    schedule = triton_schedule.plan(views, [True] * len(views), 4)
    last, begun = {}, {}
    for at, (index, kind, of_tensor, _) in enumerate(schedule.split.items.tolist()):
        phase = kind // 2 % 3
        team = (index, of_tensor)
        if phase == triton_schedule.FIRST:
            last[team] = at
            begun[team] = begun.get(team, 0) + 1
        elif phase == triton_schedule.SECOND:
            assert begun[team] == schedule.layout[index, 3]
            assert at - last[team] <= 2 * triton_schedule.LAG + begun[team]
    assert len(begun) == schedule.n_teams


def test_the_memory_of_sums_is_a_64th_of_the_weights_at_most():
    for shape, group_by in (((4096, 4096), 1), ((2, 2**22), 0), ((3000, 300, 3, 3), 1)):
        view = view_of(torch.empty(shape, device="meta"), group_by)
        schedule = triton_schedule.plan([view], [True], 4)
        assert schedule.n_partials <= math.prod(shape) / 60
        assert schedule.n_factors <= 9 * view.n_groups


def test_indices_beyond_2_to_the_31():
    for view in (
        GroupView((), 1, 1, 2**33, 1, grouped=False),
        GroupView((), 1, 1, 2**21, 2**12, grouped=True),
        GroupView((), 1, 2**17, 2**16, 1, grouped=True),
        GroupView((), 1, 1, 1, 2**33, grouped=True),
    ):
        schedule = triton_schedule.plan([view], [True], 4)
        items = np.concatenate([schedule.resident.items, schedule.split.items])
        assert items.dtype == np.int32
        assert (items >= 0).all()
        assert (schedule.layout >= 0).all()


# --- Where the kernels run.

runs = pytest.mark.skipif(
    triton_launch.unavailable() is not None, reason=f"triton: {triton_launch.unavailable()}"
)


@pytest.fixture
def triton():
    with tk.use_backend("triton"):
        yield "triton"


def at_offset(tensor, offset):
    """Return a copy of a tensor that begins `offset` elements into its storage."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=DEVICE)
    return storage[offset:].view(tensor.shape).copy_(tensor)


@runs
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_agrees_with_the_reference(triton, name, dtype, offset):
    shape, group_by, _ = VIEWS[name]
    v = at_offset(torch.randn(shape).to(dtype), offset)
    view = view_of(v, group_by)
    norm = math.sqrt(view.group_size)
    for penalty in (None, "tl1"):
        options = {"lam": 0.5 + norm / 2, "mu": 0.5 / (0.5 + norm / 2)}  # weights 1/2 and norm/2
        options |= {"penalty": penalty, "group_by": group_by, "a": 0.8}
        got, want = (tk.prox(v, 0.6, **options, backend=b) for b in ("triton", "reference"))
        assert (got != 0).any()
        # a = 0.8 is near the double root
        ulps = {torch.float32: 24, torch.float64: 64}.get(dtype, 1 + rounding("triton", dtype))
        assert_near(got.cpu(), want.cpu(), ulps, v.cpu())


@runs
@pytest.mark.parametrize("name", [name for name in VIEWS if VIEWS[name][1] is not None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("penalty", "tau"), [("cges", None), ("l1_minus_l2", 1.0), ("l1_minus_l2", 10.0)]
)
def test_every_tile_of_a_penalty_of_whole_groups(triton, name, dtype, penalty, tau):
    """With tau = 10 one weight of each group is left, wherever it is."""
    shape, group_by, _ = VIEWS[name]
    v = torch.randn(shape).to(DEVICE, dtype)
    view = view_of(v, group_by)
    tau = tau or 0.6 / view.group_size
    lasso = 0.3 * math.sqrt(view.group_size) if tau < 10 else 0.0
    options = {"lam": tau + lasso, "mu": tau / (tau + lasso)}
    options |= {"penalty": penalty, "group_by": group_by}
    got, want = (tk.prox(v, 1.0, **options, backend=b) for b in ("triton", "reference"))
    assert (got != 0).any()
    if tau == 10:
        assert (got != 0).sum() == view.n_groups
    magnified = 1.0
    if penalty == "l1_minus_l2":  # a short soft-thresholded group is scaled up
        z = view.split((v.double().abs() - tau).clamp(min=0))
        norms = torch.linalg.vector_norm(z, dim=(1, 3), keepdim=True).expand_as(z)
        magnified = 1 + tau / view.join(norms, v.shape).clamp(min=1e-9)
    ulps = {torch.float32: 8, torch.float64: 64}.get(dtype, 1 + rounding("triton", dtype))
    assert_near(got, want, ulps, v.abs().clamp(min=1) * magnified)


@runs
@pytest.mark.parametrize("name", ["rows of 100", "columns", "long runs", "few rows of columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@variants
def test_every_rule_on_every_kind_of_tile(triton, ours, torchs, options, dtype, name):
    """Two steps: 16 bits compute a tile of two passes twice, and state must not see that."""
    shape, group_by, _ = VIEWS[name]
    start = torch.randn(shape).to(DEVICE, dtype)
    gradients = [torch.randn(shape).to(DEVICE, dtype) for _ in range(2)]
    results = []
    for backend in ("triton", "reference"):
        p = start.clone().requires_grad_()
        optimizer = ours([p], lr=0.05, lam=0.5, a=0.7, group_by=group_by, **options)
        with tk.use_backend(backend):
            for gradient in gradients:
                p.grad = gradient
                optimizer.step()
        results.append((p.detach().cpu(), [x.cpu() for x in optimizer.state[p].values()]))
    (got, state), (want, right) = results
    size = start.cpu().double().abs().clamp(min=1)
    ulps = {torch.float32: 32, torch.float64: 64}.get(dtype, 4 * rounding("triton", dtype) + 2)
    assert_near(got, want, ulps, size)
    near = {"rtol": 1e-5, "atol": 1e-6}
    if dtype in (torch.bfloat16, torch.float16):
        near = {"rtol": 2e-2, "atol": 1e-2}  # weight decay goes by the rounded weight
    for mine, theirs in zip(state, right, strict=True):
        torch.testing.assert_close(mine, theirs, **near)


@runs
def test_thousands_of_tiny_tensors_and_empty_ones(triton):
    shapes = [(1,), (2, 3), (0, 4), (3, 3, 3), (5, 1), (7,)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shapes[i % 6], generator=generator).to(DEVICE) for i in range(2000)]
    results = []
    for backend in ("triton", "reference"):
        params = [p.clone().requires_grad_() for p in start]
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (i % 7 - 3))
        optimizer = tk.ProxSGD(params, lr=0.1, lam=0.4, min_ndim=1)
        with tk.use_backend(backend):
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]).cpu())
    assert_near(*results, 8, results[1].abs().clamp(min=1))
    assert (results[0] == 0).any()


@runs
def test_a_model_of_one_dtype_is_three_launches(triton, monkeypatch):
    kernels = triton_launch.load()
    launched = []

    class Counting:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("prepare_kernel", "resident_kernel", "split_kernel"):
        monkeypatch.setattr(kernels, name, Counting(name))
    shapes = [(64, 3, 7, 7), (64,), (32, 64, 1, 1), (200, 136), (10,), (2, 9000)]
    params = [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    tk.ProxAdamW(params, lr=0.1, lam=0.1).step()
    assert launched == ["prepare_kernel", "resident_kernel", "split_kernel"]


def numbers(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@runs
@pytest.mark.parametrize("adam", [False, True])
def test_numbers_on_the_device_are_read_by_each_step(triton, adam):
    """lr, lam and Adam's counter in place, without a new table."""
    lr, lam, step = numbers(0.1), numbers(0.2), numbers(0.0)
    rule = Adam(capturable=True) if adam else SGD()
    start = torch.randn(9, 7)
    results = []
    for backend in ("triton", "reference"):
        lr.fill_(0.1), lam.fill_(0.2), step.fill_(0.0)
        p = start.to(DEVICE, copy=True)
        scalars = {"lr": lr, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": step}
        view, terms = view_of(p, "in"), Terms(0.5, 0.5, 1.0, lam)
        entry = Entry(p, view, Numbers(scalars, terms), state if adam else {})
        prepared = planning.prepare([(rule, "tl1", entry, torch.ones_like(p))], backend)
        for i in range(3):
            lr.fill_(0.1 / (i + 1)), lam.fill_(0.2 * (i + 1))
            planning.execute(prepared)
        if backend == "triton":
            assert prepared[0][1].numbers["scalars"][0, 0] == 0
        assert step.item() == (3 if adam else 0)
        results.append(p.cpu())
    assert_near(*results, 16, start.abs().clamp(min=1))
    assert host_numbers(entry)[0]["lr"] == pytest.approx(0.1 / 3)


@runs
@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scale_and_found_inf_on_the_device(triton, capturable):
    results = []
    for backend in ("triton", "reference"):
        p = torch.linspace(-1, 1, 12, device=DEVICE).reshape(3, 4)
        start, step = p.clone(), numbers(0.0) if capturable else torch.tensor(0.0)
        state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": step}
        scalars = {"lr": 0.1, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        terms = Terms(0.5, 0.5, 1.0)
        entry = Entry(p, view_of(p, "in"), Numbers(scalars, terms), state)
        with tk.use_backend(backend):
            rule = Adam(capturable=capturable)
            work = planning.Plan([(rule, "tl1", entry, 8 * torch.ones_like(p))])
            work.execute(numbers(8.0), numbers(1.0))
            assert torch.equal(p, start)
            assert all(not tensor.any() for tensor in state.values())
            assert work.renew([p], [8 * torch.ones_like(p)])
            work.execute(numbers(8.0), numbers(0.0))
        assert step == 1
        assert torch.allclose(state["exp_avg"], numbers(0.1))
        results.append(p.cpu())
    assert_near(*results, 8, torch.ones(3, 4))


@runs
def test_capturable_keeps_the_counter_with_the_parameter_and_checkpoints_go_on(triton):
    p = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    optimizer = tk.ProxAdamW([p], lr=0.1, lam=0.1, capturable=True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 3
    assert optimizer.state[p]["step"].device == p.device
    other = tk.ProxAdamW([p], lr=0.1, capturable=True)
    other.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones_like(p)
    other.step()
    assert other.state[p]["step"].item() == 4


@runs
def test_a_wide_counter_from_a_checkpoint_is_what_the_kernels_read(triton):
    p = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    optimizer = tk.ProxAdam([p], lr=0.1, capturable=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0]["step"] = torch.tensor(5.0, dtype=torch.float64)
    optimizer.load_state_dict(checkpoint)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 6
    assert optimizer.state[p]["step"].dtype == torch.float32


@runs
def test_a_change_of_numbers_keeps_the_tiles(triton, monkeypatch):
    planned = []
    plan = triton_schedule.plan
    monkeypatch.setattr(triton_schedule, "plan", lambda *a: planned.append(1) or plan(*a))
    p = torch.ones(30, 40, device=DEVICE, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(4):
        p.grad = torch.ones_like(p)  # its address may change; whether it is aligned does not
        optimizer.step()
        scheduler.step()
        optimizer.param_groups[0]["lam"] *= 2
    assert len(planned) == 1


@runs
def test_what_the_backend_rejects():
    p = torch.ones(2, 2, device=DEVICE, requires_grad=True)
    numbers_ = Numbers({"lr": 0.1, "weight_decay": 0.0}, Terms(0, 0, 1))
    half = Entry(p, view_of(p, None), numbers_)
    with pytest.raises(RuntimeError, match=r"gradient of torch\.float16"):
        planning.prepare([(SGD(), "tl1", half, p.half())], "triton")
    lr = {"lr": numbers(0.1, torch.float64), "weight_decay": 0.0}
    wide = Entry(p, view_of(p, None), Numbers(lr, Terms(0, 0, 1)))
    with pytest.raises(RuntimeError, match=r"a number of torch\.float64 on the device"):
        planning.prepare([(SGD(), "tl1", wide, p)], "triton")


# --- The op.


def op_arguments(rule="adam"):
    n = {"assign": 0, "sgd": 0, "sgd_momentum": 1, "adam": 2, "adam_amsgrad": 3}[rule]
    scalars = {"lr": 0.5, "beta1": 0.9, "beta2": 0.99, "elementwise": 0.1, "group": 0.1, "a": 1.0}
    row = [scalars.get(name, 0.0) for name in triton_launch.maths().SCALARS]
    return (
        [torch.ones(2, 3, device=DEVICE)],
        [torch.ones(2, 3, device=DEVICE)],
        [torch.rand(2, 3, device=DEVICE) for _ in range(n)],
        [torch.tensor(3.0)] if rule.startswith("adam") else [],
        torch.tensor([[1, 2, 3, 1, 1]]),
        torch.tensor([row], dtype=torch.float64),
        rule,
        "tl1",
        False,
        False,
        False,
    )


@runs
@pytest.mark.parametrize("rule", ["assign", "sgd", "sgd_momentum", "adam", "adam_amsgrad"])
def test_opcheck(rule):
    arguments = op_arguments(rule)
    torch_library.opcheck(torch.ops.tl1kernels.triton_step_.default, arguments)


@runs
def test_in_a_compiled_function_without_a_graph_break():
    def function(p, g, views, scalars):
        torch.ops.tl1kernels.triton_step_(
            [p], [g], [], [], views, scalars, "sgd", "tl1", False, False, False
        )
        return p * 2

    params, grads, _, _, views, scalars, *_ = op_arguments("sgd")
    args = [params[0], grads[0], views, scalars]
    want = function(*(x.clone() for x in args))
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, want)
    assert not torch.equal(want, torch.full_like(want, 2.0))
