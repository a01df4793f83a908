"""float32 masters of 16-bit weights: what is too small a step for 16 bits is not lost."""

import copy
import io

import pytest
import torch

import tl1kernels as tk
from tests.common import assert_near, network, rounding, same, state_of, step, variants

pytestmark = pytest.mark.usefixtures("each_backend")


def _needs_rounding(backend, dtype):
    if rounding(backend, dtype) >= 1:
        pytest.skip("what Triton's interpreter cuts off looks like a change from outside")


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def test_small_steps_add_up():
    ends = {}
    for masters in (False, True):
        p = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
        optimizer = tk.ProxSGD([p], lr=1.0, master_weights=masters)
        for _ in range(10):
            p.grad = torch.full_like(p, -0.25 * 2**-7)  # a quarter of the distance to the next
            optimizer.step()
        ends[masters] = p[0, 0].item()
    exact = 1 + 10 * torch.tensor(0.25 * 2**-7).bfloat16().item()
    assert ends == {False: 1.0, True: torch.tensor(exact).bfloat16().item()}


@variants
@HALVES
@pytest.mark.parametrize("group_by", [None, "out", "in", "layer"])
def test_the_master_is_what_a_float32_weight_becomes(
    ours, torchs, options, dtype, group_by, each_backend
):
    """To the bit, on the same gradients; the weight is the master, rounded."""
    narrow = torch.randn(7, 9).to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    regularizer = {"lr": 0.05, "lam": 4.0, "group_by": group_by}
    mine = ours([narrow], **regularizer, master_weights=True, **options)
    theirs = ours([wide], **regularizer, **options)
    for _ in range(3):
        narrow.grad = torch.randn(7, 9).to(dtype)
        wide.grad = narrow.grad.float()
        mine.step()
        theirs.step()
    master = mine.state[narrow]["master_param"]
    assert torch.equal(master, wide)
    assert_near(narrow.detach(), wide.detach(), rounding(each_backend, dtype))
    assert (narrow == 0).any()
    assert narrow[narrow == 0].view(torch.int16).eq(0).all()
    assert same(
        {name: tensor for name, tensor in mine.state[narrow].items() if name != "master_param"},
        dict(theirs.state[wide]),
    )


@pytest.mark.parametrize(
    ("shape", "group_by"),
    [
        ((3, 9000), "out"),
        ((40, 192), "out"),
        ((3, 4096), "out"),
        ((300, 70), "in"),
        ((20, 6, 3, 3), "in"),
        ((8, 5, 2, 2), "filter_slice"),
    ],
)
def test_groups_of_every_size_and_layout(shape, group_by, each_backend):
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout == torch.channels_last and len(shape) < 4:
            continue
        narrow = torch.randn(shape).bfloat16().to(memory_format=layout).requires_grad_()
        wide = narrow.detach().float().requires_grad_()
        gradient = torch.randn(shape).bfloat16()  # not the weight's layout
        regularizer = {"lr": 0.1, "lam": 2.0, "group_by": group_by, "penalty": "l1"}
        for p, masters in ((narrow, True), (wide, False)):
            p.grad = gradient.to(p.dtype)
            tk.ProxSGD([p], **regularizer, master_weights=masters).step()
        assert_near(narrow.detach(), wide.detach(), rounding(each_backend, torch.bfloat16))
        assert narrow.is_contiguous(memory_format=layout)


def test_what_others_write_to_the_weight_is_taken_over_and_the_rest_keeps_its_precision():
    p = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, master_weights=True)

    def step_of(size):
        p.grad = torch.full_like(p, -size)
        optimizer.step()

    step_of(0.25 * 2**-7)
    with torch.no_grad():
        p[0, 0] = 3.0
    step_of(0.25 * 2**-7)
    master = optimizer.state[p]["master_param"]
    assert master.tolist() == [[3 + 2**-9, 1 + 2**-8], [1 + 2**-8, 1 + 2**-8]]


def test_a_weight_loaded_into_the_model_is_taken_over():
    model = network(torch.bfloat16)
    optimizer = tk.ProxAdamW(model.parameters(), lr=0.01, master_weights=True)
    step(model, optimizer, 0)
    model.load_state_dict(network(torch.bfloat16, seed=3).state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, 1)
    for name, p in model.named_parameters():
        assert (p - before[name]).abs().max() < 0.05


@HALVES
def test_checkpoints_resume_to_the_bit_and_go_to_torch(dtype, each_backend):
    _needs_rounding(each_backend, dtype)
    model = network(dtype)
    optimizer = tk.ProxAdamW(model.parameters(), lr=0.01, lam=0.1, master_weights=True)
    for i in range(3):
        step(model, optimizer, i)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = network(dtype, seed=1)
    resumed = tk.ProxAdamW(other.parameters(), lr=1.0)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    third, copied = copy.deepcopy((model, optimizer))
    theirs = torch.optim.AdamW(network(dtype).parameters())
    theirs.load_state_dict(copy.deepcopy(state))
    for i in range(3, 6):
        step(model, optimizer, i)
        step(other, resumed, i)
        step(third, copied, i)
    for m, o in ((other, resumed), (third, copied)):
        assert same(model.state_dict(), m.state_dict())
        assert same(state_of(optimizer), state_of(o))


def test_weights_of_32_and_64_bits_have_none():
    for dtype in (torch.float32, torch.float64):
        p = torch.ones(2, 2, dtype=dtype, requires_grad=True)
        optimizer = tk.ProxSGD([p], lr=0.1, master_weights=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert not optimizer.state[p]


def test_a_group_of_mixed_dtypes_keeps_its_batches_and_follows_a_master_that_is_replaced():
    p, q = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    optimizer = tk.ProxSGD([p.requires_grad_(), q.requires_grad_()], lr=0.5, master_weights=True)
    kept = []
    for i in range(4):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        if i == 3:
            optimizer.state[p]["master_param"] = torch.full((2, 2), 1 + 2**-12)
        optimizer.step()
        kept.append(optimizer._planned.batches)
    assert kept[:3] == [kept[0]] * 3
    assert optimizer.state[p]["master_param"].eq(1 + 2**-12).all()


def test_a_copy_that_rounds_to_zero_is_plus_zero():
    """The master is below half the least float16, and negative."""
    p = torch.tensor([[-0.0, 1.0]], dtype=torch.float16, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=1.0, lam=1e-12, penalty="l1", group_by=None, master_weights=True)
    optimizer.state[p]["master_param"] = torch.tensor([[-2.5e-8, 1.0]])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert -2.5e-8 < optimizer.state[p]["master_param"][0, 0] < -2.4e-8
    assert p.view(torch.int16)[0, 0] == 0


def test_a_step_that_a_grad_scaler_skips_leaves_masters_alone(each_backend):
    p = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = tk.ProxAdamW([p], lr=0.01, lam=0.1, fused=True, master_weights=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(p.float().sum() * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(optimizer.state[p]["master_param"].clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert_near(p.detach(), seen[2], rounding(each_backend, torch.bfloat16))


def test_inference_tensors_which_count_no_writes(each_backend):
    _needs_rounding(each_backend, torch.bfloat16)
    with torch.inference_mode():
        p = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer = tk.ProxSGD([p], lr=1.0, master_weights=True)
        for _ in range(4):
            p.grad = torch.full_like(p, -0.25 * 2**-7)
            optimizer.step()
        assert optimizer.state[p]["master_param"].eq(1 + 2**-7).all()


def test_what_others_write_to_an_inference_tensor_is_taken_over(each_backend):
    with torch.inference_mode():
        p = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer = tk.ProxSGD([p], lr=1.0, master_weights=True)
        for value in (1.0, 3.0):
            p.fill_(value)
            p.grad = torch.full_like(p, -0.5)
            optimizer.step()
        assert optimizer.state[p]["master_param"].eq(3.5).all()


def test_a_master_in_another_layout_than_the_weight():
    start = torch.randn(3, 4).bfloat16()
    p = start.t().contiguous().t().requires_grad_()
    optimizer = tk.ProxSGD([p], lr=1.0, master_weights=True)
    optimizer.state[p]["master_param"] = start.float()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), start)
    assert optimizer.state[p]["master_param"].stride() == p.stride()


def test_autograd_knows_that_a_weight_with_a_master_was_written_to():
    p = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = tk.ProxAdamW([p], lr=0.1, master_weights=True)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        tensors = [p, *optimizer.state[p].values()]
        before = [t._version for t in tensors]
        y = (torch.ones_like(p).requires_grad_() * p).sum()
        optimizer.step()
        assert all(t._version > v for t, v in zip(tensors, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
