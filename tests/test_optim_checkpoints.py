"""Checkpoints: to and from torch.optim, resumed to the bit, with the hooks that torch gives."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tests.common import assert_near, network, same, state_of, step, variants

pytestmark = pytest.mark.usefixtures("each_backend")


@variants
def test_checkpoints_go_both_ways(ours, torchs, options, each_backend):
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
        for other in (q, r):  # the reference resumes to the bit
            size = p.detach().abs().max()
            assert_near(other, p, 0 if each_backend == "reference" else 64, size)


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


def test_numpy_numbers_become_plain_ones_so_that_a_checkpoint_loads():
    model = network()
    optimizer = tk.ProxSGD(model.parameters(), lam=np.float64(0.1), mu=np.float32(0.5), a=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert [type(group[name]) for name in ("lam", "mu", "a")] == [float, float, float]


def test_a_checkpoint_of_a_capturable_optimizer_loads_and_steps():
    model = network()
    optimizer = tk.ProxAdamW(model.parameters(), lr=0.01, lam=0.1)
    step(model, optimizer, 0)
    checkpoint = state_of(optimizer)
    theirs = {"capturable": True, "fused": True, "foreach": True}
    checkpoint["param_groups"][0].update(theirs)
    optimizer.load_state_dict(checkpoint)
    assert not any(optimizer.param_groups[0][name] for name in theirs)
    step(model, optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_counter_counts_on(dtype):
    """In bfloat16, 256 + 1 would be 256."""
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxAdam([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["step"] = torch.tensor(2048.0, dtype=dtype)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert optimizer.state[p]["step"].item() == 2049


def test_amsgrad_may_begin_between_two_steps():
    """Torch would miss `max_exp_avg_sq`; ours starts it: it is what `exp_avg_sq` is."""
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = tk.ProxAdam([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.step()
    state = optimizer.state[p]
    assert state["step"] == 2
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def test_fused_counts_where_the_parameter_is():
    p = torch.ones(2, 2, requires_grad=True)
    for option in ("fused", "capturable"):
        optimizer = tk.ProxAdam([p], lr=0.1, **{option: True})
        rule, _ = optimizer._rule(optimizer.param_groups[0])
        assert rule.capturable
