"""The optimizers: torch.optim's behaviour where lam = 0, a proximal step where it is not."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import tl1kernels as tk
from tl1kernels import oracles
from tl1kernels.backends import reference
from tl1kernels.verify import RULES

PAIRS = [
    (tk.ProxSGD, torch.optim.SGD),
    (tk.ProxAdam, torch.optim.Adam),
    (tk.ProxAdamW, torch.optim.AdamW),
]
VARIANTS = [
    *RULES.values(),
    (tk.ProxSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (tk.ProxAdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    (tk.ProxAdam, torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (tk.ProxAdam, torch.optim.Adam, {"betas": (0.5, 0.7), "eps": 1e-3}),
]
variants = pytest.mark.parametrize(("ours", "torchs", "options"), VARIANTS)


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(5, 6, generator=generator).to(weight.dtype)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def state_of(optimizer):
    """Every tensor and option of an optimizer, comparable."""
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- lam = 0 is torch.optim.


@variants
def test_without_lam_float64_tracks_torch_to_the_last_bit(ours, torchs, options):
    models = network(torch.float64), network(torch.float64)
    optimizers = [
        kind(model.parameters(), lr=0.01, **options)
        for kind, model in zip((ours, torchs), models, strict=True)
    ]
    for i in range(100):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, i)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        mine, theirs = optimizers[0].state[p], optimizers[1].state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_lam_one_step_is_the_float64_step_rounded_once(ours, torchs, options, dtype):
    start = torch.randn(31, 7).to(dtype)
    gradient = torch.randn(31, 7).to(dtype)
    narrow, wide = start.clone().requires_grad_(), start.double().requires_grad_()
    narrow.grad, wide.grad = gradient.clone(), gradient.double()
    ours([narrow], lr=0.01, **options).step()
    torchs([wide], lr=0.01, **options).step()
    assert torch.equal(narrow.detach(), wide.detach().to(dtype))


@variants
def test_without_lam_float32_stays_near_torch(ours, torchs, options):
    """100 steps: torch rounds each operation to float32, ours each step; 1e-4 of the weights."""
    models = network(), network()
    options = {**options, "maximize": False}  # which diverges, and rounding with it
    for kind, model in zip((ours, torchs), models, strict=True):
        optimizer = kind(model.parameters(), lr=0.01, **options)
        for i in range(100):
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
        *("lam", "penalty", "a", "mu", "group_by", "group_weight", "min_ndim")
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)
    assert issubclass(ours, torchs)
    assert torchs.__name__ in ours.__doc__


# --- lam > 0 is eq. 22.


@variants
@pytest.mark.parametrize("penalty", [None, *tk.PENALTIES])
@pytest.mark.parametrize("group_by", [None, "out", "in", "layer"])
def test_a_step_is_torchs_step_then_eq_22(ours, torchs, options, penalty, group_by):
    start, gradients = torch.randn(9, 5).double(), [torch.randn(9, 5).double() for _ in range(3)]
    regularizer = {"lam": 5.0, "penalty": penalty, "a": 0.7, "mu": 0.4, "group_by": group_by}
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


# --- Everything that a drop-in must not break.


@variants
def test_checkpoints_go_both_ways_and_resume_to_the_bit(ours, torchs, options):
    there = network(torch.float64)
    first = torchs(there.parameters(), lr=0.01, **options)
    for i in range(5):
        step(there, first, i)
    here = copy.deepcopy(there)
    second = ours(here.parameters(), lr=0.5, lam=0.0, a=3.0, **options)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.01
    assert second.param_groups[0]["a"] == 3.0
    back = copy.deepcopy(there)
    third = torchs(back.parameters(), **options)
    for i in range(5, 10):
        step(there, first, i)
        step(here, second, i)
        if i == 7:
            back.load_state_dict(here.state_dict())
            third.load_state_dict(copy.deepcopy(second.state_dict()))
        elif i > 7:
            step(back, third, i)
    for p, q, r in zip(*(m.parameters() for m in (there, here, back)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@variants
def test_save_and_load_with_weights_only_resumes_to_the_bit(ours, torchs, options):
    model = network()
    groups = tk.param_groups(model, lam=0.1)
    optimizer = ours(groups, lr=0.01, **options)
    for i in range(3):
        step(model, optimizer, i)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(seed=1)
    resumed = ours(tk.param_groups(other, lam=0.7), lr=1.0)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lam"] == 0.1
    for i in range(3, 6):
        step(model, optimizer, i)
        step(other, resumed, i)
    assert same(state_of(optimizer), state_of(resumed))
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_is_float32_for_half_parameters_and_stays_so_when_loaded(dtype):
    model = network(dtype)
    optimizer = tk.ProxAdam(model.parameters(), lr=0.01, lam=0.1)
    step(model, optimizer, 0)
    other = copy.deepcopy(model)
    resumed = tk.ProxAdam(other.parameters(), lr=0.01, lam=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert resumed.state[q][name].dtype == torch.float32
            assert torch.equal(resumed.state[q][name], optimizer.state[p][name])
            assert resumed.state[q][name].data_ptr() != optimizer.state[p][name].data_ptr()


@variants
def test_pickle_and_deepcopy(ours, torchs, options):
    model = network()
    optimizer = ours(model.parameters(), lr=0.01, lam=0.1, **options)
    step(model, optimizer, 0)
    pickled = pickle.loads(pickle.dumps(optimizer))
    assert same(state_of(pickled), state_of(optimizer))
    model2, copied = copy.deepcopy((model, optimizer))
    step(model, optimizer, 1)
    step(model2, copied, 1)
    assert same(model.state_dict(), model2.state_dict())
    copied.add_param_group({"params": [torch.ones(2, 2, requires_grad=True)]})
    assert copied.param_groups[1]["lam"] == 0.1


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_first_gradient_that_comes_late(ours, torchs):
    results = []
    for kind in (ours, torchs):
        early, late = (torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = kind([early, late], lr=0.1)
        for i in range(4):
            early.grad = torch.full((2, 2), 0.5).double()
            late.grad = torch.ones(2, 2).double() if i > 1 else None
            optimizer.step()
        results.append((early, late))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_load_hooks_have_the_say_that_torch_gives_them():
    p, q = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    optimizer = tk.ProxAdam([p, q], lr=0.1)
    for i, tensor in enumerate((p, q)):
        tensor.grad = torch.full((2, 2), float(i + 1))
    optimizer.step()
    moments = [optimizer.state[t]["exp_avg"].clone() for t in (p, q)]

    def swap(_, checkpoint):
        state = {0: checkpoint["state"][1], 1: checkpoint["state"][0]}
        return {**checkpoint, "state": state}

    def mark(loaded):
        loaded.state[q]["exp_avg"].fill_(7.0)

    optimizer.register_load_state_dict_pre_hook(swap)
    optimizer.register_load_state_dict_post_hook(mark)
    optimizer.load_state_dict(state_of(optimizer))
    assert torch.equal(optimizer.state[p]["exp_avg"], moments[1])
    assert optimizer.state[q]["exp_avg"].eq(7.0).all()
    assert "_loading" not in vars(optimizer)


def test_a_checkpoint_of_a_capturable_optimizer_loads_and_steps():
    model = network()
    optimizer = tk.ProxAdamW(model.parameters(), lr=0.01, lam=0.1)
    step(model, optimizer, 0)
    checkpoint = state_of(optimizer)
    checkpoint["param_groups"][0].update(capturable=True, fused=True)
    optimizer.load_state_dict(checkpoint)
    assert not optimizer.param_groups[0]["capturable"]
    step(model, optimizer, 1)


def test_numpy_numbers_become_plain_ones_so_that_a_checkpoint_loads():
    model = network()
    optimizer = tk.ProxSGD(model.parameters(), lam=np.float64(0.1), mu=np.float32(0.5), a=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert [type(group[name]) for name in ("lam", "mu", "a")] == [float, float, float]


def test_the_optimizers_can_be_subclassed():
    class Mine(tk.ProxAdamW):
        """Mine."""

    assert Mine.__doc__ == "Mine."
    optimizer = Mine(network().parameters(), lr=0.1, lam=0.2)
    assert optimizer.param_groups[0]["lam"] == 0.2


def test_foreach_and_fused_change_nothing():
    model = network()
    optimizer = tk.ProxAdam(model.parameters(), lam=0.1, foreach=True, fused=True)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    step(model, optimizer, 0)


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


# --- Bad input: the message, and nothing changed.

BAD = [
    ({"lam": -0.5}, ValueError, "lam must be finite and >= 0, got -0.5"),
    ({"mu": 2.0}, ValueError, r"mu must be None or in \[0, 1\], got 2.0"),
    ({"a": -1.0}, ValueError, "a must be finite and > 0, got -1.0"),
    ({"penalty": "ridge"}, ValueError, "penalty must be None or one of .*'ridge'"),
    ({"group_by": "everything"}, ValueError, "group_by must be .*'everything'"),
    ({"group_by": 7}, ValueError, r"group_by=7 must be a dim in \[-2, 1\]"),
    ({"group_weight": 2}, ValueError, "group_weight must be None or 'sqrt', got 2"),
    ({"min_ndim": -1}, ValueError, "min_ndim must be an int >= 0, got -1"),
    ({"differentiable": True}, ValueError, "differentiable must be False"),
    ({"lr": -1.0}, ValueError, "learning rate: -1.0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_at_construction_in_a_group_and_between_steps(options, error, message):
    p = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(error, match=message):
        tk.ProxSGD([p], **{"lam": 0.1, **options})
    if "lr" in options:
        return
    optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9, lam=0.1)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [torch.ones(2, 2, requires_grad=True)], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    p.grad = torch.ones_like(p)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    assert not optimizer.state


def test_capturable_is_refused_until_a_backend_can():
    with pytest.raises(ValueError, match="capturable must be False, got True"):
        tk.ProxAdam([torch.ones(2, 2, requires_grad=True)], capturable=True)


def dampened():
    """Return an optimizer whose first step tells whether state was there before it."""
    p, q = (torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = tk.ProxSGD([{"params": [p]}, {"params": [q]}], lr=1.0, momentum=0.9, dampening=0.5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    return optimizer, p, q


def test_a_step_that_a_backend_refuses_leaves_no_trace(monkeypatch):
    optimizer, p, q = dampened()
    monkeypatch.setattr(reference, "rejects", lambda batch: "not today")
    with pytest.raises(RuntimeError, match="not today"):
        optimizer.step()
    assert not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    assert p.eq(0).all()
    assert q.eq(0).all()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("lr", "fast", TypeError, "lr must be a number or a 0-d tensor, got 'fast'"),
        ("momentum", "some", TypeError, "momentum must be a number"),
        ("group_by", 9, ValueError, "group_by=9"),
        ("min_ndim", True, ValueError, "min_ndim must be an int >= 0, got True"),
    ],
)
def test_a_bad_option_of_the_last_group_leaves_no_trace_in_the_first(name, value, error, message):
    optimizer, p, _ = dampened()
    optimizer.param_groups[1][name] = value
    with pytest.raises(error, match=message):
        optimizer.step()
    assert not optimizer.state
    assert p.eq(1).all()


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_step_size_without_a_prox_is_refused_between_steps(lr):
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1)
    optimizer.param_groups[0]["lr"] = lr
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="lr must be finite and >= 0"):
        optimizer.step()
    assert p.eq(1).all()


def test_a_group_that_is_refused_for_any_reason_is_not_kept():
    optimizer = tk.ProxSGD([torch.ones(2, 2, requires_grad=True)], lam=0.1)
    more = torch.ones(2, 2, requires_grad=True)
    for bad in (10**400, torch.ones((), device="meta"), ["tl1"]):
        with pytest.raises((TypeError, ValueError, OverflowError, RuntimeError)):
            optimizer.add_param_group({"params": [more], "lam": bad})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"penalty must be None or one of .*\['tl1'\]"):
        optimizer.add_param_group({"params": [more], "penalty": ["tl1"]})


def test_bad_gradients_change_nothing_not_even_the_good_tensors():
    good, bad = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    optimizer = tk.ProxSGD([good, bad], lr=0.1, momentum=0.9)
    good.grad = torch.ones_like(good)
    bad.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"grad must be a strided tensor, got layout .*sparse"):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(3, 2))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "params must have .*complex64"),
        (torch.ones(2, 4)[:, :2], ValueError, r"dense.*strides \(4, 1\)"),
        (torch.ones(2).expand(3, 2), ValueError, r"dense.*strides \(0, 1\)"),
    ],
)
def test_bad_parameters_are_refused_at_construction(p, error, message):
    with pytest.raises(error, match=message):
        tk.ProxSGD([p.requires_grad_()], lam=0.1)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="lambda_"):
        tk.ProxSGD([torch.ones(2, 2, requires_grad=True)], lambda_=0.1)
