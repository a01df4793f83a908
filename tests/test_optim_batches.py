"""Batches that an optimizer keeps from step to step: they follow every change of what they hold."""

import functools
import sys

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tl1kernels import plan

pytestmark = pytest.mark.usefixtures("each_backend")


def test_batches_are_kept_and_gradients_are_not():
    p, q = torch.ones(3, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxAdam([p, q], lr=0.1, lam=0.1)
    for _ in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        kept = optimizer._planned.batches
        assert all(batch.grads == [] for _, batch in kept._prepared)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer._planned.batches is kept


def change_lr(optimizer):
    optimizer.param_groups[0]["lr"] = 0.02


def change_tensor_lam(optimizer):
    optimizer.param_groups[0]["lam"].mul_(2)


def change_penalty(optimizer):
    optimizer.param_groups[0]["penalty"] = "l1"


def change_groups(optimizer):
    optimizer.param_groups[0]["group_by"] = "in"


def change_group_weight(optimizer):
    optimizer.param_groups[0]["group_weight"] = "sqrt"


def change_min_ndim(optimizer):
    optimizer.param_groups[1]["min_ndim"] = 0


def change_momentum(optimizer):
    optimizer.param_groups[0]["momentum"] = 0.0


def change_dtype(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data = p.data.double()


def change_layout(optimizer):
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.t().contiguous().t()


def change_layout_of_state(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        buffer = optimizer.state[p]["momentum_buffer"]
        buffer.data = buffer.data.t().contiguous().t()


def change_group_of_a_parameter(optimizer):
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def change_state(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p, 0.25)


def forget_state(optimizer):
    optimizer.state.clear()


def drop_a_gradient(optimizer):
    optimizer.param_groups[0]["params"][1].requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["guards", "attributes"])
def _kinds(request, monkeypatch):
    """With torch's guards, which are private, and without: attributes tell the same."""
    import torch._dynamo  # which needs them: first, while they are there

    if not request.param:
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    assert (plan.Kinds([torch.ones(2)])._guards is not None) == request.param


CHANGES = [
    change_lr, change_tensor_lam, change_penalty, change_groups, change_group_weight,
    change_min_ndim, change_momentum, change_dtype, change_layout, change_layout_of_state,
    change_state, forget_state, change_group_of_a_parameter, drop_a_gradient,
]  # fmt: skip


@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize("change", CHANGES)
def test_batches_that_are_kept_follow_every_change(change):
    """The same steps with kept batches and with new ones each time."""
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        params = [torch.randn(s).requires_grad_() for s in ((6, 5), (4, 4), (7,), (3, 3))]
        groups = [
            {"params": params[:2], "lam": torch.tensor(0.2)},
            {"params": params[2:], "lam": 0.3, "lr": 0.05, "min_ndim": 2},
        ]
        optimizer = tk.ProxSGD(groups, lr=0.1, momentum=0.9, group_by="auto")
        for i in range(6):
            if i == 3:
                change(optimizer)
            for p in params:
                p.grad = torch.randn_like(p) if p.requires_grad else None
            if not keep:
                optimizer._planned = None
            optimizer.step()
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("_kinds")
def test_a_gradient_of_another_kind_is_seen():
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0)
    plain = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for gradient in (plain, plain.t(), torch._neg_view(plain), plain.double().float().t().neg()):
        with torch.no_grad():
            p.fill_(0)
        p.grad = gradient
        optimizer.step()
        assert torch.equal(p.detach(), -gradient.resolve_neg())


@pytest.mark.parametrize("change", ["lr", "lam", "mu", "a"])
def test_a_change_of_a_number_builds_no_new_plan(change):
    p = torch.randn(6, 5, requires_grad=True)
    optimizer = tk.ProxAdam([p], lr=0.1, lam=0.1, mu=0.5, group_by="in")
    kept = []
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.param_groups[0][change] *= 0.9
        optimizer.step()
        kept.append(optimizer._planned.batches)
    assert kept == [kept[0]] * 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_share_memory_are_updated_one_after_the_other(momentum):
    """As torch does: side by side, one would overwrite the other."""
    memory = torch.randn(60_000)
    results = []
    for optimizer_of in (torch.optim.SGD, tk.ProxSGD):
        here = memory.clone()
        params = [torch.nn.Parameter(x) for x in (here, here[:40_000], here[50_000:], here[5:9])]
        optimizer = optimizer_of(params, lr=0.1, momentum=momentum)
        for k in range(3):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, i + k + 1.0)
            optimizer.step()
        results.append(here)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_16_bit_parameters_with_masters_that_share_memory_are_updated_one_after_the_other():
    results = []
    for backend in ("reference", None):
        memory = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
        params = [torch.nn.Parameter(x) for x in (memory, memory.view(-1))]
        groups = [{"params": p, "group_by": by} for p, by in zip(params, ("in", None), strict=True)]
        optimizer = tk.ProxSGD(groups, lr=0.5, lam=1.0, master_weights=True, min_ndim=0)
        with tk.use_backend(backend):
            for seed in range(3):
                for p in params:
                    generator = torch.Generator().manual_seed(seed)
                    p.grad = torch.randn(p.shape, generator=generator).bfloat16()
                optimizer.step()
        results.append(memory.float())
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_parameters_that_share_memory_are_in_batches_one_after_the_other():
    here = torch.zeros(60_000)
    params = [torch.nn.Parameter(x) for x in (here, here[:40_000], here[50_000:], here[5:9])]
    assert plan._turns(params) == [0, 1, 1, 2]
    apart = [torch.nn.Parameter(x) for x in (here[:7], here[7:9], here[20:])]
    assert plan._turns(apart) == [0, 0, 0]


@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize("last", ["negative bit", "zero tensor"])
def test_a_gradient_that_is_not_what_is_in_memory_is_seen(last):
    """Of the same dtype, shape and strides as the one before."""
    p = torch.zeros(2, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0)
    plain = torch.ones(2, 2)
    other = torch._neg_view(plain) if last == "negative bit" else torch._efficientzerotensor(2, 2)
    for gradient, want in ((plain, -1.0), (other, 0.0 if last == "negative bit" else -1.0)):
        p.grad = gradient
        optimizer.step()
        assert p.eq(want).all()


@pytest.mark.usefixtures("_kinds")
def test_a_list_that_changes_in_place_is_followed():
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        p = torch.randn(3, 4).requires_grad_()
        optimizer = tk.ProxAdam([p], lr=0.1)
        betas = optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        for i in range(4):
            p.grad = torch.randn_like(p)
            betas[0] = 0.9 if i < 2 else 0.5
            if not keep:
                optimizer._planned = None
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_an_array_that_changes_in_place_is_followed():
    results = []
    for kind in (torch.optim.SGD, tk.ProxSGD):
        p = torch.zeros(2, 2, requires_grad=True)
        optimizer = kind([p], lr=np.array(1.0))
        for _ in range(4):
            p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("option", ["lr", "mu", "weight_decay"])
@pytest.mark.parametrize(
    "of",
    [torch.tensor, np.float16, functools.partial(torch.tensor, dtype=torch.bfloat16)],
    ids=["tensor", "float16", "bfloat16"],
)
def test_a_number_that_differs_by_its_rounding_alone_is_another(option, of):
    results = []
    for keep in (True, False):
        p = torch.full((2, 3), 0.7, dtype=torch.float64, requires_grad=True)
        optimizer = tk.ProxSGD([p], group_by="in", **{"lr": 0.1, "lam": 0.1, option: 0.1})
        for value in (0.1, of(0.1), of(0.1), 0.1):
            optimizer.param_groups[0][option] = value
            p.grad = torch.ones_like(p)
            if not keep:
                optimizer._planned = None
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


class OnADevice(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = property(lambda _: torch.device("cuda"))


@pytest.mark.parametrize("option", ["mu", "a", "weight_decay", "momentum"])
def test_what_the_host_reads_on_a_device_is_followed(option):
    """Written to in place, as schedulers do; lr and lam are read by the steps themselves."""
    results = []
    for keep in (True, False):
        p = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
        number = torch.tensor(0.5).as_subclass(OnADevice)
        optimizer = tk.ProxSGD(
            [p], **{"lr": 0.1, "lam": 1.0, "momentum": 0.9, "group_by": "in", option: number}
        )
        kept = []
        for i in range(4):
            p.grad = torch.full_like(p, 0.1 * i)
            if i == 2:
                number.mul_(0.5)
            if not keep:
                optimizer._planned = None
            optimizer.step()
            kept.append(optimizer._planned)
        assert not keep or kept[1:] == [kept[1]] * 3
        results.append(p.detach())
    assert torch.equal(*results)


def change_rounding(optimizer):
    for group in optimizer.param_groups:
        group["rounding"] = "stochastic"


def change_master_weights(optimizer):
    for group in optimizer.param_groups:
        group["master_weights"] = True


@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize("change", [change_rounding, change_master_weights])
def test_batches_of_16_bits_that_are_kept_follow_every_change(change):
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        params = [torch.randn(s).bfloat16().requires_grad_() for s in ((6, 5), (7,))]
        optimizer = tk.ProxSGD(params, lr=0.01, momentum=0.9, lam=0.1)
        for i in range(6):
            if i == 3:
                change(optimizer)
            for p in params:
                p.grad = torch.randn_like(p)
            if not keep:
                optimizer._planned = None
            torch.manual_seed(i)
            optimizer.step()
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batches_that_are_kept_follow_the_backend_that_is_asked_for(monkeypatch):
    ran = []
    for name, module in plan.backends.BACKENDS.items():
        run = module.run
        monkeypatch.setattr(
            module, "run", lambda batch, name=name, run=run: ran.append(name) or run(batch)
        )
    p = torch.ones(3, 2, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = tk.ProxSGD([p], lr=0.1, lam=0.1)
    here = plan.backends.asked_for()
    for name in (here, "reference", here):
        with tk.use_backend(name):
            optimizer.step()
    assert ran == [here, "reference", here]


@pytest.mark.usefixtures("_kinds")
def test_a_tensor_of_another_shape_and_the_same_strides_is_seen():
    p = torch.ones(4, 3, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, lam=0.5, penalty="l1", group_by=None)
    for rows in (4, 2, 5):
        p.data, p.grad = torch.ones(rows, 3), None
        p.grad = torch.zeros(rows, 3)
        optimizer.step()
        assert p.eq(0.5).all()
