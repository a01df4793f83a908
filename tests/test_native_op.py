"""The native op: what it refuses, and what torch knows of it."""

import pytest
import torch
from torch import library as torch_library

import tl1kernels as tk
from tl1kernels.backends import native

if native.unavailable() is not None:
    pytest.skip(f"no native library: {native.unavailable()}", allow_module_level=True)

OPS = torch.ops.tl1kernels


def arguments(**changes):
    p = torch.ones(2, 3)
    scalars = {"lr": 0.5, "elementwise": 0.1, "a": 1.0}
    row = [scalars.get(name, 0.0) for name in OPS.scalar_names().split()]
    given = {
        "params": [p],
        "grads": [torch.ones(2, 3)],
        "state": [],
        "views": torch.tensor([[1, 1, 2, 3]]),
        "scalars": torch.tensor([row], dtype=torch.float64),
        "rule": "sgd",
        "penalty": "tl1",
        "maximize": False,
        "nesterov": False,
        "decoupled": False,
        "grad_scale": 1.0,
        "copies": [],
        "seed": None,
    }
    return {**given, **changes}


def counted(steps):
    """Return arguments of a step of Adam on two tensors with these counters."""
    state = [torch.zeros(2, 3), torch.zeros(2, 3), steps[0]]
    state += [torch.zeros(2, 3), torch.zeros(2, 3), steps[1]]
    given = arguments(rule="adam", state=state)
    return {
        **given,
        "params": given["params"] + [torch.ones(2, 3)],
        "grads": given["grads"] * 2,
        "views": given["views"].repeat(2, 1),
        "scalars": given["scalars"].repeat(2, 1),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": []}, "grads must be as many as params"),
        ({"seed": 1}, "with a seed params must be bfloat16"),
        ({"grads": [torch.ones(2, 4)]}, "grads must have 6 elements, got 8"),
        ({"grads": [torch.ones(3, 2).t()]}, "grads must have the shape and strides"),
        ({"grads": [torch.ones(1).expand(2, 3)]}, "grads must have the shape and strides"),
        ({"grads": [torch.ones(2, 3).double()]}, "grads has the wrong dtype"),
        ({"params": [torch.ones(2, 3, dtype=torch.int32)]}, "params must be float32"),
        ({"params": [torch.ones(4, 3)[::2]]}, "params must be dense"),
        ({"params": [torch.ones(1).expand(2, 3)]}, "params must be dense"),
        ({"state": [torch.ones(2, 3)]}, "state must have 0 tensors a parameter"),
        ({"rule": "sgd_momentum"}, "state must have 1 tensors a parameter"),
        ({"rule": "newton"}, "rule must be one of 'assign', 'sgd'.*got 'newton'"),
        ({"penalty": "ridge"}, "penalty must be one of 'l1', 'tl1', .*, got 'ridge'"),
        ({"views": torch.tensor([[1, 1, 2, 4]])}, "views must have the number of elements"),
        ({"views": torch.tensor([[-1, 1, -2, 3]])}, "views must have the number of elements"),
        ({"views": torch.tensor([[1, 1, -2, -3]])}, "views must have the number of elements"),
        ({"views": torch.tensor([[1, 2**62, 4, 6]])}, "views must have the number of elements"),
        (
            {
                **{name: [torch.empty(0)] for name in ("params", "grads")},
                "views": torch.tensor([[1, 1, 300_000, 7]]),
            },
            "views must have the number of elements",
        ),
        ({"views": torch.tensor([[1.0, 1, 2, 3]])}, "views has the wrong dtype"),
        ({"views": torch.tensor([[1, 1, 2]])}, "views must have 4 elements"),
        ({"views": torch.ones(4, 2, dtype=torch.int64)[:, :1]}, "must be contiguous"),
        ({"scalars": torch.zeros(1, 3).double()}, "scalars must have"),
        ({"copies": [torch.ones(2, 3)] * 2}, "copies must be none or as many as params, got 2"),
        ({"copies": [torch.ones(2, 3)]}, "copies must be bfloat16 or float16, of float32 params"),
        ({"copies": [torch.ones(3, 2).half().t()]}, "copies must have the shape and strides"),
        ({"copies": [torch.ones(2, 3).half()]}, "grads has the wrong dtype"),
        (counted([torch.tensor(1.0), torch.tensor(1)]), "step has the wrong dtype"),
        (counted([torch.tensor(1.0), torch.ones(2)]), "step must have 1 elements, got 2"),
    ],
)
def test_the_op_refuses_what_does_not_fit_and_changes_nothing(changes, message):
    given = arguments(**changes)
    written = given["params"] + given["state"] + given["copies"]
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError, match=message):
        OPS.step_(*given.values())
    assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))


# --- What torch knows of the op.


@pytest.mark.parametrize("rule", ["assign", "sgd", "sgd_momentum", "adam", "adam_amsgrad"])
def test_opcheck(rule):
    n = {"sgd_momentum": 1, "adam": 2, "adam_amsgrad": 3}.get(rule, 0)
    state = [torch.rand(2, 3) for _ in range(n)]
    if rule.startswith("adam"):
        state.append(torch.tensor(3.0))
    given = arguments(rule=rule, state=state)
    torch_library.opcheck(OPS.step_.default, tuple(given.values()))


def test_in_a_compiled_function_without_a_graph_break():
    def function(p, g, views, scalars):
        OPS.step_([p], [g], [], views, scalars, "sgd", "tl1", False, False, False, 1.0, [], None)
        return p * 2

    given = arguments()
    args = [given["params"][0], given["grads"][0], given["views"], given["scalars"]]
    want = function(*(x.clone() for x in args))
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, want)
    assert torch.equal(args[0] * 2, want)


def test_versions_are_bumped_for_parameters_and_state():
    p = torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    optimizer = tk.ProxAdam([p], lr=0.1)
    optimizer.step()
    tensors = [p, *optimizer.state[p].values()]
    before = [t._version for t in tensors]
    optimizer.step()
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))
    x = torch.ones(2, 2, requires_grad=True)
    y = (x * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
