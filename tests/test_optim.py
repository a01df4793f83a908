"""The optimizers: torch.optim's behaviour where lam = 0, a proximal step where it is not."""

import copy
import inspect
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import tl1kernels as tk
from tests.common import (
    PAIRS,
    VARIANTS,
    allowed_shape,
    assert_near,
    many_steps,
    network,
    rounding,
    same,
    step,
    variants,
)
from tl1kernels import oracles

pytestmark = pytest.mark.usefixtures("each_backend")

# --- lam = 0 is torch.optim.


@variants
def test_without_lam_float64_tracks_torch(ours, torchs, options, each_backend):
    """Many steps: the reference to the last bit, in state too; kernels to 1e-12."""
    models = network(torch.float64), network(torch.float64)
    optimizers = [
        kind(model.parameters(), lr=0.01, **options)
        for kind, model in zip((ours, torchs), models, strict=True)
    ]
    for i in range(many_steps(each_backend)):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, i)
    tolerance = 0 if each_backend == "reference" else 1e-12
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        mine, theirs = optimizers[0].state[p], optimizers[1].state[q]
        assert mine.keys() == theirs.keys()
        for got, want in ((p, q), *((mine[k], theirs[k]) for k in mine)):
            size = max(1.0, want.abs().max().item())
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance * size)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=8)
def test_without_lam_random_problems_track_torch(each_backend, data):
    """100 steps on least squares of any shape, with any options, in float64."""
    n, m, k = (data.draw(st.integers(1, 12)) for _ in range(3))
    ours, torchs, options = data.draw(st.sampled_from(VARIANTS))
    options = {**options, "maximize": False, "lr": data.draw(st.sampled_from([1e-3, 0.01]))}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    start, x, y = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((n, m), (m, k), (n, k))
    )
    p, q = (start.clone().requires_grad_() for _ in range(2))
    optimizers = ours([p], **options), torchs([q], **options)
    for _ in range(many_steps(each_backend)):
        for w, optimizer in zip((p, q), optimizers, strict=True):
            optimizer.zero_grad()
            (w @ x / m - y).square().mean().backward()
            optimizer.step()
    tolerance = 0 if each_backend == "reference" else 1e-12 * max(1.0, q.abs().max().item())
    torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_lam_one_step_is_the_float64_step(ours, torchs, options, dtype, each_backend):
    """The reference rounds once; kernels are within 3 ulp of float32, and round that once."""
    start = torch.randn(31, 7).to(dtype)
    gradient = torch.randn(31, 7).to(dtype)
    narrow, wide = start.clone().requires_grad_(), start.double().requires_grad_()
    narrow.grad, wide.grad = gradient.clone(), gradient.double()
    ours([narrow], lr=0.01, **options).step()
    torchs([wide], lr=0.01, **options).step()
    if each_backend == "reference":
        assert torch.equal(narrow.detach(), wide.detach().to(dtype))
    size = torch.maximum(wide.detach().abs(), start.double().abs())
    assert_near(
        narrow.detach(),
        wide.detach(),
        3 if dtype == torch.float32 else rounding(each_backend, dtype),
        size,
    )


@variants
def test_without_lam_float32_stays_near_torch(ours, torchs, options, each_backend):
    """Many steps: torch rounds each operation to float32, ours each step; 1e-4 of the weights."""
    models = network(), network()
    options = {**options, "maximize": False}  # which diverges, and rounding with it
    for kind, model in zip((ours, torchs), models, strict=True):
        optimizer = kind(model.parameters(), lr=0.01, **options)
        for i in range(many_steps(each_backend)):
            step(model, optimizer, i)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p - q).abs().max() <= 1e-4 * max(1.0, q.abs().max().item())


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_signature_is_torchs_then_ours_by_keyword(ours, torchs):
    theirs = list(inspect.signature(torchs).parameters.values())
    mine = list(inspect.signature(ours).parameters.values())
    assert mine[: len(theirs)] == theirs
    extra = mine[len(theirs) :]
    assert [p.name for p in extra] == [
        *("lam", "penalty", "a", "mu", "group_by", "group_weight", "min_ndim", "rounding"),
        "master_weights",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)
    assert issubclass(ours, torchs)
    assert torchs.__name__ in ours.__doc__


# --- lam > 0 is eq. 22.


@variants
@pytest.mark.parametrize("penalty", [None, "tl1", "scad"])  # verify has all of them
@pytest.mark.parametrize("group_by", [None, "out", "in", "layer"])
def test_a_step_is_torchs_step_then_eq_22(ours, torchs, options, penalty, group_by):
    start, gradients = torch.randn(9, 5).double(), [torch.randn(9, 5).double() for _ in range(3)]
    regularizer = {"lam": 5.0, "penalty": penalty, "mu": 0.4, "group_by": group_by}
    regularizer["a"] = allowed_shape(penalty, 0.7, 0.1)
    p, q = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine, theirs = ours([p], lr=0.1, **options, **regularizer), torchs([q], lr=0.1, **options)
    for gradient in gradients:
        p.grad, q.grad = gradient.clone(), gradient.clone()
        mine.step()
        theirs.step()
        want = oracles.prox_as_published(q.detach().numpy(), 0.1, **regularizer)
        with torch.no_grad():
            q.copy_(torch.from_numpy(want))
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)
    assert (p == 0).any() or penalty is None


def test_a_float16_weight_that_rounds_to_zero_is_plus_zero():
    p = torch.zeros(2, 2, dtype=torch.float16, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, momentum=1.0, lam=1e-12, group_by=None)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["momentum_buffer"].fill_(2.5e-8)  # below half the least float16
    optimizer.step()
    assert p.view(torch.int16).eq(0).all()


def test_training_leaves_plus_zeros():
    model = network()
    optimizer = tk.ProxAdam(model.parameters(), lr=0.01, lam=1.0)
    for i in range(60):
        step(model, optimizer, i)
    for name, p in model.named_parameters():
        zeros = p[p == 0]
        assert zeros.view(torch.int32).eq(0).all()
        assert (zeros.numel() > 0) == name.endswith("weight"), name


def test_p_and_grad_of_different_strides():
    p = torch.randn(8, 4, 3, 3).double().to(memory_format=torch.channels_last).requires_grad_()
    q = p.detach().contiguous().requires_grad_()
    gradient = torch.randn(4, 8, 3, 3).double().transpose(0, 1)
    for tensor, optimizer in (
        (p, tk.ProxSGD([p], lr=0.1, lam=0.5)),
        (q, tk.ProxSGD([q], lr=0.1, lam=0.5)),
    ):
        tensor.grad = gradient
        optimizer.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-15)
    assert p.is_contiguous(memory_format=torch.channels_last)


# --- What is regularized.


def test_bare_parameters_spare_biases_and_norm_scales():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = tk.ProxSGD(model.parameters(), lr=1.0, lam=100.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p == 0).all() if p.ndim == 2 else torch.equal(p, before[name]), name


def test_frozen_parameters_may_be_of_any_kind():
    """As in torch, which looks at them when they have gradients."""
    weight = torch.ones(2, 2, requires_grad=True)
    thaws = torch.ones(4, 4)[::2]
    frozen = [torch.ones(2, 2, dtype=torch.int8), torch.ones(2).to_sparse(), thaws]
    optimizer = tk.ProxSGD([weight, *frozen], lr=0.1, lam=0.1)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert weight[0, 0] < 1
    before = weight.detach().clone()
    thaws.requires_grad_().grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match="must be dense"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_inference_tensors_are_written_in_inference_mode_only():
    """By torch's rule, and in torch's words."""
    with torch.inference_mode():
        p = torch.ones(2, 2)
        p.grad = torch.ones(2, 2)
    wanted = []
    for kind in (torch.optim.SGD, tk.ProxSGD):
        optimizer = kind([p], lr=0.1)
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
            optimizer.step()
        assert kind is torch.optim.SGD or p.eq(1).all()
        with torch.inference_mode():
            p.fill_(1)
            kind([p], lr=0.1).step()
            wanted.append(p.clone())
            p.fill_(1)
    assert torch.equal(*wanted)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
        tk.prox_(p, 0.1)


def test_state_that_is_an_inference_tensor_is_refused_outside_before_anything_is_changed():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = tk.ProxSGD([a, b], lr=0.1, momentum=0.9)
    b.grad = torch.ones(2)
    with torch.inference_mode():
        optimizer.step()
    for _ in range(2):
        a.grad = torch.ones(2)
        before = b.detach().clone()
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
            optimizer.step()
        assert a.eq(1).all()
        assert torch.equal(b, before)


def test_a_group_that_sets_lam_regularizes_what_it_holds():
    vector = torch.ones(3, requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    spared = torch.ones(3, requires_grad=True)
    optimizer = tk.ProxSGD(
        [
            {"params": [vector], "lam": 0.5, "penalty": "l1"},
            {"params": [other], "min_ndim": 1},
            {"params": [spared], "lam": 0.5, "min_ndim": 2},
        ],
        lr=1.0,
        lam=0.25,
        penalty="l1",
    )
    for p in (vector, other, spared):
        p.grad = torch.zeros(3)
    optimizer.step()
    assert [p[0].item() for p in (vector, other, spared)] == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("lam", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
def test_a_group_with_the_optimizers_own_lam_spares_what_the_optimizer_spares(lam):
    """So that a wrapper which writes the defaults into each group changes nothing."""
    p = torch.ones(3, requires_grad=True)
    optimizer = tk.ProxSGD([{"params": [p], "lam": lam}], lr=1.0, lam=lam)
    assert optimizer.param_groups[0]["min_ndim"] == 2


# --- Everything that a drop-in must not break.


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_first_gradient_that_comes_late(ours, torchs, each_backend):
    results = []
    for kind in (ours, torchs):
        early, late = (torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = kind([early, late], lr=0.1)
        for i in range(4):
            early.grad = torch.full((2, 2), 0.5).double()
            late.grad = torch.ones(2, 2).double() if i > 1 else None
            optimizer.step()
        results.append((early, late))
    for p, q in zip(*results, strict=True):
        assert_near(p.detach(), q.detach(), 0 if each_backend == "reference" else 4)


def test_the_optimizers_can_be_subclassed():
    class Mine(tk.ProxAdamW):
        """Mine."""

    assert Mine.__doc__ == "Mine."
    optimizer = Mine(network().parameters(), lr=0.1, lam=0.2)
    assert optimizer.param_groups[0]["lam"] == 0.2


def test_foreach_changes_nothing_and_fused_tells_a_grad_scaler():
    for options, supports in (({"foreach": True}, False), ({"fused": True}, True), ({}, False)):
        torch.manual_seed(0)
        model = network()
        optimizer = tk.ProxAdam(model.parameters(), lam=0.1, **options)
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == supports
        step(model, optimizer, 0)
        if not options:
            continue
        plain = network()
        step(plain, tk.ProxAdam(plain.parameters(), lam=0.1), 0)
        assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_grad_scaler_scales_and_skips(ours, torchs, fused):
    """Steps 1 and 3 overflow: nothing is touched, not even where there is no state yet."""
    momentum = {"momentum": 0.9, "dampening": 0.5} if ours is tk.ProxSGD else {}
    results = []
    for kind in (ours, torchs):
        p = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        optimizer = kind([p], lr=0.1, **momentum, **({"fused": fused} if kind is ours else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        seen = []
        for i in range(5):
            optimizer.zero_grad()
            loss = (p * torch.arange(12.0).reshape(3, 4)).square().sum()
            scaler.scale(loss * (math.inf if i in (0, 2) else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            seen += [p.detach().clone(), *map(torch.clone, optimizer.state[p].values())]
        results.append(seen)
    assert torch.equal(results[0][0], torch.linspace(-1, 1, 12).reshape(3, 4))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_after_the_state_was_cleared_leaves_none():
    p = torch.zeros(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, momentum=0.9, dampening=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradient in (1.0, 1.0, math.inf, 1.0):
        if gradient == math.inf:
            optimizer.state.clear()
            p.data.zero_()
        optimizer.zero_grad()
        scaler.scale((p * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.state) == (gradient != math.inf)
    assert p.eq(-1).all()  # a first step, of which dampening takes nothing


def test_schedulers_and_changes_of_lam_between_steps():
    p = torch.full((1, 2), 10.0, dtype=torch.float64, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, lam=1.0, penalty="l1", group_by=None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps = []
    for lam in (1.0, torch.tensor(4.0), 0.0, 8):
        optimizer.param_groups[0]["lam"] = lam
        p.grad = torch.zeros_like(p)
        before = p[0, 0].item()
        optimizer.step()
        scheduler.step()
        steps.append(before - p[0, 0].item())
    assert steps == [1.0, 2.0, 0.0, 1.0]


def test_lr_and_lam_as_tensors():
    p = torch.full((2, 2), 2.0, requires_grad=True)
    options = {"penalty": "l1", "group_by": None}
    optimizer = tk.ProxSGD([p], lr=torch.tensor(0.5), lam=torch.tensor(1.0), **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_grad_scaler_skips_a_step_with_infinities_and_touches_nothing():
    model = network()
    optimizer = tk.ProxSGD(model.parameters(), lr=0.1, momentum=0.9, lam=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(model.state_dict())
    for bad in (True, False):
        optimizer.zero_grad()
        loss = model(torch.randn(3, 6)).square().sum()
        scaler.scale(loss).backward()
        if bad:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert same(before, model.state_dict()) == bad
        assert bool(optimizer.state) == (not bad)


def test_closures_hooks_and_version_counters():
    model = network()
    optimizer = tk.ProxAdamW(model.parameters(), lr=0.01, lam=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    versions = [p._version for p in model.parameters()]

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == ["before", "closure", "after"]
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))


def test_named_parameters_and_no_gradients_at_all():
    model = network()
    optimizer = tk.ProxSGD(model.named_parameters(), lr=0.1, lam=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert same(before, model.state_dict())


def test_empty_parameters():
    p = torch.empty(0, 4, requires_grad=True)
    p.grad = torch.empty(0, 4)
    tk.ProxAdam([p], lam=0.1).step()
    assert p.shape == (0, 4)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_the_same_bits_run_after_run_for_any_number_of_threads(ours, torchs):
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            generator = torch.Generator().manual_seed(0)
            params = [
                torch.randn(size, generator=generator).requires_grad_()
                for size in ((300, 40), (40, 300), (16, 3, 3, 3), (50,))
            ]
            optimizer = ours(params, lr=0.05, lam=0.5)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            results.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("group_by", ["out", "in", "layer"])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_dead_group_stays_plus_zero_and_is_never_nan(ours, torchs, group_by, lr):
    p = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    if group_by == "layer":
        p[1, 1] = 0.0
    before = p.clone()
    p.requires_grad_()
    optimizer = ours([p], lr=lr, lam=1.0, group_by=group_by, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p[before == 0].view(torch.int32).eq(0).all()
    assert (p[1, 1] == before[1, 1]) if lr == 0 or group_by == "layer" else 0 < p[1, 1] < 3


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_autograd_knows_what_a_step_has_written(ours, torchs):
    """As with torch's: a backward pass that needs the old value raises."""
    for kind in (ours, torchs):
        momentum = {"momentum": 0.9} if issubclass(kind, torch.optim.SGD) else {}
        p = torch.ones(2, 2, requires_grad=True)
        optimizer = kind([p], lr=0.1, **momentum)
        for _ in range(2):
            p.grad = torch.ones(2, 2)
            tensors = [p, *optimizer.state[p].values()]
            before = [t._version for t in tensors]
            x = torch.ones(2, 2, requires_grad=True)
            y = (x * p).sum()
            optimizer.step()
            assert all(t._version > v for t, v in zip(tensors, before, strict=True))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


@pytest.mark.parametrize("masters", [False, True])
def test_the_scale_of_16_bit_gradients_is_taken_off_in_float32(masters):
    """In float16, 1e-8 would be 0; in bfloat16, a third rounds."""
    for dtype, gradient, scale, lr in (
        (torch.float16, 1e-8, 65536.0, 1e4),
        (torch.bfloat16, 1 / 3, 3.0, 1.0),
    ):
        p = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
        optimizer = tk.ProxSGD([p], lr=lr, fused=True, master_weights=masters)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        p.grad = torch.full((2, 2), gradient * scale).to(dtype)
        want = -lr * p.grad.double() / scale
        optimizer.step()
        got = optimizer.state[p]["master_param"] if masters else p.detach()
        torch.testing.assert_close(got.double(), want, rtol=1e-6 if masters else 2 ** (-7), atol=0)


def test_a_skipped_step_before_there_is_a_buffer_is_no_first_step():
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    optimizer.state[p] = {"momentum_buffer": None}  # as in torch's own checkpoints
    optimizer.grad_scale = torch.tensor(1.0)
    for found_inf in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(found_inf)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((2, 2), 0.9))


def test_a_scalar_of_a_group_that_sets_lam_is_regularized():
    p = torch.ones((), requires_grad=True)
    optimizer = tk.ProxSGD([{"params": [p], "lam": 0.25}], lr=1.0, penalty="l1")
    p.grad = torch.zeros(())
    optimizer.step()
    assert p.item() == 0.75


def test_without_a_the_group_has_the_penaltys_own():
    for name, penalty in tk.PENALTIES.items():
        p = torch.ones(2, 2, requires_grad=True)
        optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1, penalty=name)
        assert optimizer.param_groups[0]["a"] == (penalty.a or 1.0)
