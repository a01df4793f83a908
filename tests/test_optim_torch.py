"""PyTorch's own configurations and error inputs of its optimizers, given to ours.

`torch.testing._internal.common_optimizers` is what PyTorch's test suite draws them from; the checks
are those of that suite that make sense for SGD, Adam and AdamW, written anew.
"""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import tl1kernels as tk
from tests.common import PAIRS, assert_near, many_steps, network, same, state_of, step

# Importing PyTorch's material forbids everyone in the process to set flags of its backends.
_allowed = torch.backends.__allow_nonbracketed_mutation_flag
from torch.testing._internal.common_optimizers import (  # noqa: E402
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

torch.backends.__allow_nonbracketed_mutation_flag = _allowed

pytestmark = pytest.mark.usefixtures("each_backend")

OURS = {torchs: ours for ours, torchs in PAIRS}
INFOS = [info for info in optim_db if info.optim_cls in OURS]
assert len(INFOS) == 3


def _configurations(info):
    inputs = _get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, info, skip=("differentiable",)
    )
    found = []
    for given in inputs:
        kwargs = {k: v for k, v in given.kwargs.items() if k != "differentiable"}
        # torch itself refuses these two together.
        if isinstance(kwargs.get("lr"), torch.Tensor) and kwargs.get("foreach"):
            continue
        found.append(pytest.param(info, kwargs, id=f"{info.name}, {given.desc}"))
    return found


CONFIGURATIONS = [one for info in INFOS for one in _configurations(info)]
configurations = pytest.mark.parametrize(("info", "kwargs"), CONFIGURATIONS)
infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
PENALTIES = pytest.mark.parametrize("lam", [0.0, 0.05])


def _given(kwargs):
    return copy.deepcopy(kwargs)  # a tensor lr is written to by schedulers


def _problem(layout="contiguous"):
    """Return parameters and a closure's loss: a layer and a bias, as in PyTorch's suite."""
    torch.manual_seed(3)
    weight, bias = torch.randn(10, 5), torch.randn(10)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    weight, bias, x = nn.Parameter(weight), nn.Parameter(bias), torch.randn(5)

    def loss():
        return (weight.mv(x) + bias).square().sum()

    return [weight, bias], loss


def _errors():
    return [
        pytest.param(info, error, id=f"{info.name}, {error.optimizer_error_input.desc}")
        for info in INFOS
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    ]


@pytest.mark.parametrize(("info", "error"), _errors())
def test_torchs_error_inputs_are_refused_with_torchs_words(info, error):
    given = error.optimizer_error_input
    params = [torch.randn(1, 1, requires_grad=True)] if given.params is None else given.params
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    kind = OURS[info.optim_cls]
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            kind(params, **_given(given.kwargs))
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            kind(params, **_given(given.kwargs))


@infos
def test_fused_and_foreach_together_are_refused(info):
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        OURS[info.optim_cls]([torch.ones(2, requires_grad=True)], fused=True, foreach=True)


@configurations
def test_lam_0_takes_torchs_steps(info, kwargs, each_backend):
    """float64, so that the reference must have torch's bits; its own forloop is the oracle."""
    results = []
    for kind in (OURS[info.optim_cls], info.optim_cls):
        params, _ = _problem()
        for p in params:
            p.data = p.data.double()
        given = _given(kwargs)
        if kind is info.optim_cls:
            given.update(fused=False, foreach=False)
        optimizer = kind(params, **given)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        results.append([p.detach() for p in params])
    for got, want in zip(*results, strict=True):
        atol = 0 if each_backend == "reference" else 1e-13
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@configurations
@PENALTIES
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_loss_goes_the_right_way(info, kwargs, lam, layout, each_backend):
    params, loss = _problem(layout)
    optimizer = OURS[info.optim_cls](params, lam=lam, **_given(kwargs))

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    first = closure().item()
    for _ in range(min(20, many_steps(each_backend))):
        assert isinstance(optimizer.step(closure), torch.Tensor)
    last = closure().item()
    assert last > first if kwargs.get("maximize") else last < first


def _with_schedulers():
    return [
        pytest.param(info, makers, id=f"{info.name}, {i}")
        for info in INFOS
        for i, makers in enumerate(info.scheduler_inputs)
    ]


@pytest.mark.parametrize(("info", "makers"), _with_schedulers())
@PENALTIES
def test_torchs_scheduler_inputs_lead_lr_as_they_lead_torchs(info, makers, lam):
    paths = []
    for kind, options in ((OURS[info.optim_cls], {"lam": lam}), (info.optim_cls, {})):
        params, loss = _problem()
        optimizer = kind(params, lr=0.01, **options)
        schedulers = [make(optimizer) for make in makers]
        path = []
        for _ in range(10):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
            path.append(optimizer.param_groups[0]["lr"])
        paths.append(path)
    assert paths[0] == paths[1]


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 3)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_left_out():
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and hasattr(value, "state_dict") and not name.startswith("_")
    }
    assert classes - {"LRScheduler", "Optimizer"} == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_every_scheduler_leads_ours_as_torchs(ours, torchs, name, tensor_lr, each_backend):
    """Also what OneCycleLR and CyclicLR do to momentum and betas; float64 weights, lam = 0."""
    results = []
    for kind in (ours, torchs):
        model = network(torch.float64)
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
        momentum = {"momentum": 0.9} if kind in (tk.ProxSGD, torch.optim.SGD) else {}
        optimizer = kind(model.parameters(), lr=lr, **momentum)
        scheduler = SCHEDULERS[name](optimizer)
        for i in range(7):
            step(model, optimizer, i)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        results.append([float(optimizer.param_groups[0]["lr"]), *model.parameters()])
    assert results[0][0] == results[1][0]
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        # A tensor lr: torch computes bias corrections and products in its dtype, on tensors.
        exact = each_backend == "reference" and not tensor_lr
        torch.testing.assert_close(got, want, rtol=0, atol=0 if exact else 1e-13)


@configurations
@PENALTIES
def test_nothing_moves_without_gradients_and_state_dicts_are_deterministic(info, kwargs, lam):
    params, loss = _problem()
    optimizer = OURS[info.optim_cls](params, lam=lam, **_given(kwargs))
    before = [p.detach().clone() for p in params]
    assert optimizer.step() is None
    assert all(map(torch.equal, params, before))
    assert not optimizer.state
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    params_2, loss_2 = _problem()
    again = OURS[info.optim_cls](params_2, **_given(kwargs))
    checkpoint = state_of(optimizer)
    again.load_state_dict(checkpoint)
    assert same(checkpoint, state_of(optimizer))
    assert same(state_of(again), checkpoint)
    with torch.no_grad():
        for p, q in zip(params, params_2, strict=True):
            q.copy_(p)
    for optimizer_, loss_ in ((optimizer, loss), (again, loss_2)):
        for _ in range(3):
            optimizer_.zero_grad()
            loss_().backward()
            optimizer_.step()
    assert all(map(torch.equal, params, params_2))
    assert same(state_of(again), state_of(optimizer))


@configurations
def test_older_checkpoints_load_and_step_goes_on(info, kwargs):
    """Flags that later versions of torch added are missing; `step` was a number once."""
    params, loss = _problem()
    optimizer = OURS[info.optim_cls](params, lam=0.05, **_given(kwargs))
    loss().backward()
    optimizer.step()
    checkpoint = state_of(optimizer)
    for group in checkpoint["param_groups"]:
        for flag in info.not_og_supported_flags:
            if not kwargs.get(flag):  # torch takes a flag that is missing for False
                group.pop(flag, None)
    for state in checkpoint["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    params_2, loss_2 = _problem()
    with torch.no_grad():
        for p, q in zip(params, params_2, strict=True):
            q.copy_(p)
    older = OURS[info.optim_cls](params_2, lam=0.05, **_given(kwargs))
    older.load_state_dict(checkpoint)
    for optimizer_, loss_ in ((optimizer, loss), (older, loss_2)):
        optimizer_.zero_grad()
        loss_().backward()
        optimizer_.step()
    assert all(map(torch.equal, params, params_2))
    for p in params_2:
        if "step" in older.state[p]:
            assert torch.equal(older.state[p]["step"], torch.tensor(2.0))


@configurations
def test_copies_pickles_and_prints(info, kwargs):
    params, loss = _problem()
    optimizer = OURS[info.optim_cls](params, lam=0.05, **_given(kwargs))
    loss().backward()
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(copied) if not name.startswith("_")}
    assert same(state_of(copied), state_of(optimizer))
    assert same(state_of(pickle.loads(pickle.dumps(optimizer))), state_of(optimizer))
    text = repr(optimizer)
    assert OURS[info.optim_cls].__name__ in text
    assert "lam: 0.05" in text


@infos
def test_hooks_of_step_and_of_checkpoints_run_in_order(info):
    params, _ = _problem()
    optimizer = OURS[info.optim_cls](params, lam=0.05)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


@infos
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_is_torchs_and_what_is_left_is_stepped_on_as_torch_does(info, set_to_none):
    params, loss = _problem()
    optimizer = OURS[info.optim_cls](params, lr=0.1, lam=0.05)
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    before = [p.detach().clone() for p in params]
    if set_to_none:
        assert all(p.grad is None for p in params)
    else:
        assert all(p.grad.eq(0).all() for p in params)
    optimizer.step()  # with gradients of 0 the regularizer, and Adam's momentum, go on
    moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert moved[0] == (not set_to_none)


@infos
def test_groups_may_set_their_own_lr_and_weight_decay(info):
    (weight, bias), loss = _problem()
    (weight_2, bias_2), loss_2 = _problem()
    results = []
    for kind, w, b, value in (
        (OURS[info.optim_cls], weight, bias, loss),
        (info.optim_cls, weight_2, bias_2, loss_2),
    ):
        optimizer = kind(
            [{"params": [w]}, {"params": [b], "lr": 0.003, "weight_decay": 0.1}], lr=0.01
        )
        for _ in range(4):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
        results.append((w.detach(), b.detach()))
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 16)


@infos
def test_a_mixture_of_dtypes_and_sizes_in_one_step(info):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    mine = [torch.randn(n, 3, dtype=d).requires_grad_() for d in dtypes for n in (0, 1, 40)]
    alone = [p.detach().clone().requires_grad_() for p in mine]
    for p, q in zip(mine, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    OURS[info.optim_cls](mine, lr=0.01, lam=0.1).step()
    for q in alone:
        OURS[info.optim_cls]([q], lr=0.01, lam=0.1).step()
    assert all(map(torch.equal, mine, alone))


@infos
def test_a_checkpoint_with_and_without_names_loads_into_the_other(info):
    model = network()
    plain = OURS[info.optim_cls](model.parameters(), lam=0.1)
    named = OURS[info.optim_cls](model.named_parameters(), lam=0.2)
    step(model, plain, 0)
    named.load_state_dict(state_of(plain))
    assert named.param_groups[0]["lam"] == 0.1
    assert named.param_groups[0]["param_names"][0] == "0.weight"
    plain.load_state_dict(state_of(named))
    step(model, plain, 1)


@infos
def test_distributed_checkpoints_read_and_write_its_state(info):
    """get_optimizer_state_dict takes a step with lr = 0 to make state: it moves nothing."""
    from torch.distributed.checkpoint import state_dict as dcp

    model = network()
    optimizer = OURS[info.optim_cls](model.parameters(), lr=0.1, lam=0.5)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        fresh = dcp.get_optimizer_state_dict(model, optimizer)
        assert same(before, model.state_dict())
        step(model, optimizer, 0)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
        other = network(seed=1)
        resumed = OURS[info.optim_cls](other.parameters(), lr=0.3)
        dcp.set_optimizer_state_dict(other, resumed, saved)
    other.load_state_dict(model.state_dict())
    assert resumed.param_groups[0]["lam"] == 0.5
    assert fresh.keys() == saved.keys()
    for i in (1, 2):
        step(model, optimizer, i)
        step(other, resumed, i)
    assert same(model.state_dict(), other.state_dict())


@infos
def test_one_optimizer_for_each_weight_in_the_backward_pass(info):
    """The recipe that saves the memory of gradients: a step in a hook after accumulation."""
    whole, parts = network(), network()
    optimizer = OURS[info.optim_cls](whole.parameters(), lr=0.05, lam=0.1)
    of = {p: OURS[info.optim_cls]([p], lr=0.05, lam=0.1) for p in parts.parameters()}

    def hook(p):
        of[p].step()
        of[p].zero_grad()

    for p in parts.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for i in range(4):
        step(whole, optimizer, i)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
        parts(x).square().sum().backward()
        assert all(p.grad is None for p in parts.parameters())
    assert same(whole.state_dict(), parts.state_dict())


# --- What torch's fused optimizers get wrong.


@infos
def test_a_first_step_that_amp_skips_leaves_no_garbage(info):
    """With torch's fused SGD an uninitialised momentum buffer is left, and used from then on."""
    momentum = {"momentum": 0.9} if info.name == "SGD" else {}
    p = torch.ones(64, 64, requires_grad=True)
    optimizer = OURS[info.optim_cls]([p], lr=0.1, fused=True, **momentum)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    p.grad = torch.full_like(p, math.inf)
    optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state
    q = torch.ones(64, 64, requires_grad=True)
    other = OURS[info.optim_cls]([q], lr=0.1, **momentum)
    optimizer.found_inf = torch.tensor(0.0)
    for tensor, its in ((p, optimizer), (q, other)):
        tensor.grad = torch.full_like(tensor, 0.5)
        its.step()
    assert torch.equal(p, q)


@infos
def test_gradients_and_state_in_another_layout_than_the_weight(info):
    """With torch's fused CPU kernels all is read as if it were laid out alike."""
    momentum = {"momentum": 0.9} if info.name == "SGD" else {}
    start, gradients = torch.randn(6, 5), torch.randn(3, 6, 5)
    results = []
    for kind, swapped in ((OURS[info.optim_cls], True), (info.optim_cls, False)):
        p = (start.t().contiguous().t() if swapped else start.clone()).requires_grad_()
        optimizer = kind([p], lr=0.1, **momentum)
        for i, gradient in enumerate(gradients):
            p.grad = gradient.clone()
            if i == 2:  # a checkpoint keeps the layout that its state had
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                checkpoint = torch.load(file, weights_only=True)
                for name, tensor in checkpoint["state"][0].items():
                    if tensor.ndim == 2:
                        checkpoint["state"][0][name] = tensor.contiguous()
                optimizer.load_state_dict(checkpoint)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_keeps_the_states_precision(dtype):
    """With torch all of a checkpoint's state but `step` is cast to the parameter's dtype."""
    p = torch.ones(3, 4, dtype=dtype, requires_grad=True)
    optimizer = tk.ProxAdam([p], lr=0.01)
    for i in range(3):
        p.grad = torch.full_like(p, 0.1 + 0.01 * i)
        optimizer.step()
    moments = {name: t.clone() for name, t in optimizer.state[p].items()}
    optimizer.load_state_dict(optimizer.state_dict())
    for name, tensor in optimizer.state[p].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, moments[name])
    assert not torch.equal(moments["exp_avg"], moments["exp_avg"].to(dtype).float())
