"""Bad input to the optimizers: the message, and nothing changed."""

import operator

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tl1kernels import backends

BAD = [
    ({"lam": -0.5}, ValueError, "lam must be finite and >= 0, got -0.5"),
    ({"mu": 2.0}, ValueError, r"mu must be None or in \[0, 1\], got 2.0"),
    ({"a": -1.0}, ValueError, "a must be None or finite and > 0, got -1.0"),
    ({"penalty": "ridge"}, ValueError, "penalty must be None or one of .*'ridge'"),
    ({"group_by": "everything"}, ValueError, "group_by must be .*'everything'"),
    ({"group_by": 7}, ValueError, r"group_by=7 must be a dim in \[-2, 1\]"),
    ({"group_weight": 2}, ValueError, "group_weight must be None or 'sqrt', got 2"),
    ({"min_ndim": -1}, ValueError, "min_ndim must be an int >= 0, got -1"),
    ({"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'stochastic', got 'up'"),
    ({"master_weights": 1}, ValueError, "master_weights must be True or False, got 1"),
    (
        {"master_weights": True, "rounding": "stochastic"},
        ValueError,
        "rounding must be 'nearest' with master_weights=True, got 'stochastic'",
    ),
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


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), 0.9])
def test_betas_that_are_not_two_change_nothing(betas):
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxAdamW([p], lam=0.1)
    optimizer.param_groups[0]["betas"] = betas
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="betas must be two numbers, got "):
        optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state


def test_differentiable_is_refused():
    with pytest.raises(ValueError, match="differentiable must be False, got True"):
        tk.ProxAdam([torch.ones(2, 2, requires_grad=True)], differentiable=True)


def dampened():
    """Return an optimizer whose first step tells whether state was there before it."""
    p, q = (torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = tk.ProxSGD([{"params": [p]}, {"params": [q]}], lr=1.0, momentum=0.9, dampening=0.5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    return optimizer, p, q


def test_a_step_that_a_backend_refuses_leaves_no_trace(monkeypatch):
    optimizer, p, q = dampened()
    for backend in backends.BACKENDS.values():
        monkeypatch.setattr(backend, "rejects", lambda batch: "not today")
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
        ("lr", np.array([0.1, 0.2]), TypeError, "lr must be a number or a 0-d tensor, got array"),
        ("lam", torch.ones(2), TypeError, "lam must be a number or a 0-d tensor, got tensor"),
        ("lam", np.True_, TypeError, "lam must be a number or a 0-d tensor, got "),
        ("mu", torch.tensor(True), TypeError, "mu must be a number or a 0-d tensor, got "),
        ("weight_decay", 10**400, TypeError, "weight_decay must be a number or a 0-d tensor"),
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
        (torch.nn.LazyLinear(5).weight, ValueError, "params must be initialized, got Uninit"),
    ],
)
def test_bad_parameters_are_refused_at_construction(p, error, message):
    with pytest.raises(error, match=message):
        tk.ProxSGD([p if p.requires_grad else p.requires_grad_()], lam=0.1)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="lambda_"):
        tk.ProxSGD([torch.ones(2, 2, requires_grad=True)], lambda_=0.1)


def test_gradients_and_state_that_do_not_fit_change_nothing():
    """Not even the good tensors of another dtype, which a batch of their own would take."""
    good = torch.ones(2, 2, requires_grad=True)
    bad = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = tk.ProxAdam([good, bad], lr=0.1, lam=0.1)

    def refused(error, message):
        before = [good.detach().clone(), bad.detach().clone()]
        with pytest.raises(error, match=message):
            optimizer.step()
        assert all(map(torch.equal, (good, bad), before))

    good.grad, bad.grad = torch.ones(2, 2), torch.ones(2, 2).double()
    bad.data = torch.ones(3, 2).double()
    refused(ValueError, r"grad must have the shape \(3, 2\) of its parameter, got \(2, 2\)")
    assert not optimizer.state
    bad.data = torch.ones(2, 2).double()
    for name, value, error, message in (
        ("exp_avg", torch.zeros(3, 3), ValueError, r"'exp_avg' must be floats of shape \(2, 2\)"),
        ("exp_avg", "x", TypeError, "state 'exp_avg' must be a tensor, got str"),
        ("step", 3, TypeError, "state 'step' must be a tensor, got int"),
        ("step", torch.ones(2), ValueError, r"state 'step' must be one float, .*\(2,\)"),
        ("step", torch.ones(()), ValueError, "got step without exp_avg, exp_avg_sq"),
        ("exp_avg", torch.ones(2, 2), ValueError, "got exp_avg without exp_avg_sq, step"),
    ):
        optimizer.state[bad][name] = value
        refused(error, message)
        assert good not in optimizer.state
        del optimizer.state[bad]
    optimizer.step()
    optimizer.state[bad]["exp_avg"] = torch.zeros(3, 3)
    refused(ValueError, r"'exp_avg' must be floats of shape \(2, 2\)")
    assert optimizer.state[good]["step"] == 1


def test_refused_param_groups_are_as_they_were_and_may_be_used_again():
    """Torch fills the optimizer's options into the user's dicts."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = tk.param_groups(model, lam=0.1)
    groups[1]["penalty"] = "mcp"
    before = [dict(group) for group in groups]
    for options in ({"rounding": "stocastic"}, {"lr": 7.0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match=r"rounding must be|lr|learning rate"):
            tk.ProxAdamW(iter(groups), **options)
        assert groups == before
    optimizer = tk.ProxAdamW(groups, lr=0.1)
    assert all(map(operator.is_, optimizer.param_groups, groups))
    more = {"params": iter([torch.ones(2, 2, requires_grad=True)]), "lam": -1.0}
    with pytest.raises(ValueError, match="lam must be"):
        optimizer.add_param_group(more)
    assert more.keys() == {"params", "lam"}
    assert len(optimizer.param_groups) == 3
    more["lam"] = 0.2
    optimizer.add_param_group(more)
    assert len(optimizer.param_groups[3]["params"]) == 1


def test_a_refusal_leaves_no_empty_state():
    p = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state.clear()
    optimizer.param_groups[0]["lam"] = -1
    with pytest.raises(ValueError, match="lam must be"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("name", ["lr", "lam", "mu", "a", "momentum"])
def test_a_number_on_the_wrong_device_is_named_and_nothing_is_changed(name):
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1)
    optimizer.param_groups[0][name] = torch.tensor(0.5, device="meta")
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=f"{name} must have a value, got .* device 'meta'"):
        optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state


def test_a_complex_gradient_is_refused_and_nothing_is_changed():
    """Torch refuses to assign one, unless it is told not to look."""
    p = torch.ones(2, 2, requires_grad=True)
    p.grad_dtype = None
    p.grad = torch.ones(2, 2, dtype=torch.complex64)
    optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9)
    with pytest.raises(
        TypeError, match=r"grad must have one of the dtypes .*, got torch\.complex64"
    ):
        optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_size_without_a_prox_is_refused_between_steps(lr, steps):
    """With batches that are kept, too."""
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1)
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr must be finite and >= 0"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_state_of_whole_numbers_is_refused():
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(2, 2, dtype=torch.int64)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"'momentum_buffer' must be floats .*, got torch\.int64"):
        optimizer.step()
    assert p.eq(1).all()


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_without_lam_any_step_size_is_torchs(lr):
    results = []
    for kind in (tk.ProxSGD, torch.optim.SGD):
        p = torch.ones(2, 2, requires_grad=True)
        optimizer = kind([p], lr=0.1)
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p.detach())
    assert torch.allclose(*results, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "error", "message"), [row for row in BAD if "lr" not in row[0]]
)
def test_bad_options_after_some_steps_change_nothing(options, error, message):
    """With batches that are kept."""
    p = torch.ones(3, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9, lam=0.1)
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert optimizer._planned is not None
    before = p.detach().clone()
    optimizer.param_groups[0].update(options)
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("name", ["lr", "lam", "mu", "a"])
def test_a_tensor_of_several_numbers_is_named_after_a_step(name):
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.param_groups[0][name] = torch.ones(2)
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name} must be a number or a 0-d tensor"):
            optimizer.step()
