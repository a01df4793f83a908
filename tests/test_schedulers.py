"""Schedules of lam, mu and a, in torch's manner."""

import io

import pytest
import torch

import tl1kernels as tk
from tests.common import network, same, state_of, step


def optimizer_of(**options):
    p = torch.full((1, 2), 10.0, dtype=torch.float64, requires_grad=True)
    return tk.ProxSGD([p], **{"lr": 1.0, "lam": 2.0, "penalty": "l1", "group_by": None, **options})


def values(optimizer, scheduler, n, option="lam"):
    seen = []
    for _ in range(n):
        seen.append(float(optimizer.param_groups[0][option]))
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0, 0, 0, 0, 0, 2, 2]),
        ("linear", [0, 0, 0.5, 1, 1.5, 2, 2]),
        ("cubic", [0, 0, 2 - 2 * 0.75**3, 2 - 2 * 0.5**3, 2 - 2 * 0.25**3, 2, 2]),
    ],
)
def test_the_shapes(shape, expected):
    optimizer = optimizer_of()
    scheduler = tk.LamScheduler(optimizer, shape, steps=4, delay=1)
    assert values(optimizer, scheduler, 7) == expected
    assert scheduler.get_last_value() == [2.0]
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_step_uses_the_scheduled_lam():
    optimizer = optimizer_of()
    (p,) = optimizer.param_groups[0]["params"]
    scheduler = tk.LamScheduler(optimizer, "linear", steps=2)
    cuts = []
    for _ in range(4):
        p.grad, before = torch.zeros_like(p), p[0, 0].item()
        optimizer.step()
        scheduler.step()
        cuts.append(before - p[0, 0].item())
    assert cuts == [0.0, 1.0, 2.0, 2.0]


def test_on_the_groups_of_a_model_what_is_unregularized_stays_so():
    for option, start in (("lam", 0.0), ("mu", 0.0), ("a", 9.0)):
        groups = tk.param_groups(torch.nn.Sequential(torch.nn.Linear(3, 4)), lam=0.3, a=0.1)
        optimizer = tk.ProxSGD(groups, lr=0.1)
        before = dict(optimizer.param_groups[1])
        scheduler = tk.LamScheduler(optimizer, steps=2, option=option, start=start)
        assert optimizer.param_groups[0][option] == start
        optimizer.step()
        scheduler.step()
        assert start != optimizer.param_groups[0][option]
        assert {name: optimizer.param_groups[1][name] for name in before} == before


@pytest.mark.parametrize(("option", "start", "end"), [("mu", 1.0, 0.25), ("a", 100.0, 0.5)])
def test_mu_and_a(option, start, end):
    optimizer = optimizer_of(penalty="tl1", group_by="in", **{option: end})
    scheduler = tk.LamScheduler(optimizer, "linear", steps=2, option=option, start=start)
    assert values(optimizer, scheduler, 4, option) == [start, (start + end) / 2, end, end]


def test_groups_without_lam_stay_so_and_later_groups_join():
    p, q, r = (torch.ones(2, 2, requires_grad=True) for _ in range(3))
    optimizer = tk.ProxSGD([{"params": [p], "lam": 1.0}, {"params": [q]}], lr=0.1)
    scheduler = tk.LamScheduler(optimizer, "linear", steps=4, start=3.0)
    assert scheduler.get_last_value() == [3.0, 0.0]
    optimizer.add_param_group({"params": [r], "lam": 5.0})
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_value() == [2.5, 0.0, 3.5]


def test_a_tensor_is_written_in_place_and_lr_schedulers_stand_beside():
    lam = torch.tensor(2.0)
    optimizer = optimizer_of(lam=lam)
    scheduler = torch.optim.lr_scheduler.ChainedScheduler(
        [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            tk.LamScheduler(optimizer, "linear", steps=2),
        ]
    )
    assert values(optimizer, scheduler, 3) == [0, 1, 2]
    assert optimizer.param_groups[0]["lam"] is lam
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_checkpoint_resumes_to_the_bit():
    def build(seed, lam):
        model = network(seed=seed)
        optimizer = tk.ProxAdamW(tk.param_groups(model, lam=lam), lr=0.01)
        return model, optimizer, tk.LamScheduler(optimizer, "cubic", steps=6)

    model, optimizer, scheduler = build(0, 0.5)

    def run(parts, seeds):
        for i in seeds:
            step(*parts[:2], i)
            parts[2].step()

    run((model, optimizer, scheduler), range(3))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, scheduler)], file)
    file.seek(0)
    other = build(1, 0.1)
    for part, saved in zip(other, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    assert other[2].get_last_value() == scheduler.get_last_value()
    run((model, optimizer, scheduler), range(3, 9))
    run(other, range(3, 9))
    assert same(model.state_dict(), other[0].state_dict())
    assert same(state_of(optimizer), state_of(other[1]))
    assert 0.5 in scheduler.get_last_value()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "steep"}, "shape must be one of 'constant', 'linear', 'cubic', got 'steep'"),
        ({"option": "lr"}, "option must be one of 'lam', 'mu', 'a', got 'lr'"),
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"delay": -1}, "delay must be an int >= 0, got -1"),
        ({"start": -1.0}, r"start=-1.0 is no value of lam: lam must be finite and >= 0"),
        ({"option": "a"}, r"start must be a number > 0 for option='a', got None"),
        (
            {"option": "a", "start": 0.0},
            "start=0.0 is no value of a: a must be None or finite and > 0",
        ),
        ({"option": "mu"}, "mu of param group 0 must be a number, got None"),
    ],
)
def test_bad_arguments_change_nothing(options, message):
    optimizer = optimizer_of()
    before = state_of(optimizer)
    with pytest.raises(ValueError, match=message):
        tk.LamScheduler(optimizer, **{"steps": 3, **options})
    assert same(before, state_of(optimizer))


def test_an_optimizer_without_the_option_is_refused():
    theirs = torch.optim.SGD([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match="lam of param group 0 must be a number, got no such"):
        tk.LamScheduler(theirs, steps=3)


def test_groups_that_share_a_tensor_share_its_schedule():
    lam, zero = torch.tensor(0.5), torch.tensor(0.0)
    p, q, r, s = (torch.ones(2, 2, requires_grad=True) for _ in range(4))
    groups = [{"params": [p]}, {"params": [q]}, {"params": [s], "lam": zero}]
    optimizer = tk.ProxSGD(groups, lr=0.1, lam=lam)
    scheduler = tk.LamScheduler(optimizer, "linear", steps=4, start=0.25)
    seen = []
    for i in range(6):
        if i == 2:
            optimizer.add_param_group({"params": [r]})
        seen.append(lam.item())
        optimizer.step()
        scheduler.step()
    assert seen == [0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5]
    assert zero == 0
    assert [group["initial_lam"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0, 0.5]


def test_bad_state_is_refused_and_leaves_the_scheduler_alone():
    scheduler = tk.LamScheduler(optimizer_of(), "linear", steps=4)
    with pytest.raises(ValueError, match=r"shape must be one of .*'bogus'"):
        scheduler.load_state_dict({"shape": "bogus"})
    assert scheduler.shape == "linear"
    whole = optimizer_of(lam=torch.tensor(1))
    with pytest.raises(ValueError, match=r"lam of param group 0 must be a float, got torch\.int64"):
        tk.LamScheduler(whole, steps=3)


def test_a_schedule_loaded_alone_sets_the_option():
    optimizer = optimizer_of()
    scheduler = tk.LamScheduler(optimizer, "linear", steps=4)
    values(optimizer, scheduler, 3)
    other = tk.LamScheduler(optimizer_of(), "linear", steps=4)
    other.load_state_dict(scheduler.state_dict())
    assert other.get_last_value() == scheduler.get_last_value() == [1.5]


@pytest.mark.parametrize("shape", ["constant", "linear", "cubic"])
def test_the_way_ends_at_the_groups_own_value_to_the_bit(shape):
    assert 3.0 + (0.1 - 3.0) != 0.1
    optimizer = optimizer_of(lam=0.1)
    scheduler = tk.LamScheduler(optimizer, shape, steps=2, start=3.0)
    values(optimizer, scheduler, 3)
    assert scheduler.get_last_value() == [0.1]
