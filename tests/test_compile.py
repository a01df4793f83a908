"""Steps and proxes inside torch.compile: one op in the graph, no recompilation by a schedule."""

import pytest
import torch
from torch._dynamo import utils as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import tl1kernels as tk
from tests.common import PAIRS, network, same

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.filterwarnings("ignore:.*Profiler record function.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, i):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
    model.zero_grad()
    model(x).square().sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", [ours for ours, _ in PAIRS])
def test_a_step_has_no_graph_break_and_no_schedule_recompiles_it(kind, backend, each_backend):
    if backend == "inductor" and each_backend == "triton":
        pytest.skip("inductor compiles for the CPU; one compiler tells that the op is opaque")
    eager, compiled = network(), network()
    optimizers = [kind(tk.param_groups(model, lam=0.5), lr=0.05) for model in (eager, compiled)]
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(lambda: optimizers[1].step(), backend=counter, fullgraph=True)
    counts = []
    for i in range(8):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.9**i
                group["lam"] *= 0.9
            optimizer.param_groups[i % 2]["mu"] = 0.1 * i  # not the same group's each time
        gradients(eager, i)
        gradients(compiled, i)
        optimizers[0].step()
        step()
        counts.append(counter.frame_count)
    assert same(eager.state_dict(), compiled.state_dict())
    assert counts == [1] * 8
    if counter.graphs:
        targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
        assert sum("optimizer_step_" in target for target in targets) == 1


def test_a_compiled_step_takes_the_param_groups_that_there_are():
    p, q = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = tk.ProxSGD([p], lr=0.125)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)
    step()
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [q]}]
    step()
    optimizer.add_param_group({"params": [p]})
    step()
    assert p.eq(0.625).all()
    assert q.eq(0.75).all()


def test_a_compiled_step_takes_new_random_bits_each_time_as_an_eager_one_does():
    options = {"lr": 1.0, "lam": 1e-30, "penalty": None, "group_by": "out"}
    params = [torch.ones(20, 30, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    eager, compiled = (tk.ProxSGD([p], **options, rounding="stochastic") for p in params)
    step = torch.compile(lambda: compiled.step(), backend="aot_eager", fullgraph=True)
    seen = []
    for i in range(3):
        for p, take in zip(params, (eager.step, step), strict=True):
            with torch.no_grad():
                p.fill_(1)
            p.grad = torch.full_like(p, -0.3 * 2**-7)
            torch.manual_seed(i)
            take()
        assert torch.equal(*params)
        seen.append(params[1].detach().clone())
    assert not torch.equal(seen[1], seen[2])


def test_a_training_step_with_a_scheduler_is_not_recompiled_after_warm_up(each_backend):
    """Forward, backward, step; torch's scheduler wraps the step, and breaks the graph there."""
    eager, compiled = network(), network()
    results = []
    counter = CompileCounterWithBackend("aot_eager")
    for model, with_compile in ((eager, False), (compiled, True)):
        optimizer = tk.ProxAdamW(tk.param_groups(model, lam=0.5), lr=0.05)
        schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            tk.LamScheduler(optimizer, "cubic", steps=5),
        ]

        def train(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        if with_compile:
            train = torch.compile(train, backend=counter)
        counts, losses = [], []
        for i in range(10):
            losses.append(train(torch.randn(5, 6, generator=torch.Generator().manual_seed(i))))
            for scheduler in schedulers:
                scheduler.step()
            counts.append(counter.frame_count)
        results.append(torch.stack(losses).detach())
    assert counts[0] > 0
    assert counts[4:] == [counts[4]] * 6
    torch.testing.assert_close(*results)
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p == 0, q == 0)


def test_what_the_graph_reads_after_the_step_is_what_the_step_wrote():
    p = torch.ones(3, 2, requires_grad=True)
    optimizer = tk.ProxSGD([p], lr=0.5, lam=0.0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function():
        before = p.detach() * 1
        optimizer.step()
        return before, p.detach() * 2

    for i in range(3):
        p.grad = torch.ones_like(p)
        before, after = function()
        assert before.eq(1 - 0.5 * i).all()
        assert after.eq(2 - (i + 1)).all()


def test_the_op_passes_opcheck():
    p = torch.ones(3, 2)
    optimizer = tk.ProxSGD([p.requires_grad_()], lr=0.1, lam=0.1)
    arguments = ([p.detach()], [torch.ones(3, 2)], [0], optimizer._key)
    torch.library.opcheck(torch.ops.tl1kernels.optimizer_step_.default, arguments)


def test_copies_of_an_optimizer_step_their_own_weights():
    import copy

    model = network()
    optimizer = tk.ProxAdam(model.parameters(), lr=0.05, lam=0.1)
    gradients(model, 0)
    other_model, other = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    gradients(other_model, 0)
    torch.compile(lambda: other.step(), backend="aot_eager", fullgraph=True)()
    assert same(before, model.state_dict())
    assert not same(before, other_model.state_dict())


def test_no_break_is_hidden_in_the_counters():
    dynamo.counters.clear()
    p = torch.ones(3, 2, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = tk.ProxSGD([p], lr=0.5)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()
    assert not dynamo.counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_the_graph_writes_before_and_after_the_step_counts(backend, each_backend):
    if backend == "inductor" and each_backend == "triton":
        pytest.skip("inductor compiles for the CPU; one compiler tells that the op is opaque")
    results = []
    for compiled in (False, True):
        p = torch.ones(3, 3, requires_grad=True)
        optimizer = tk.ProxSGD([p], lr=0.1, momentum=0.9)

        def function(p=p, optimizer=optimizer):
            with torch.no_grad():
                p.mul_(0.5)
            optimizer.step()
            with torch.no_grad():
                p.clamp_(-0.3, 0.3)
            optimizer.step()

        if compiled:
            function = torch.compile(function, backend=backend, fullgraph=True)
        for i in range(4):
            p.grad = torch.full_like(p, i + 1.0)
            function()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_by": "in"},
        {"group_by": -1, "penalty": "scad", "mu": 0.3},
        {"penalty": None, "group_by": 0},
    ],
    ids=["alone", "in", "an int dim", "groups alone"],
)
def test_a_prox_is_one_op_and_no_step_size_recompiles_it(options):
    counter = CompileCounterWithBackend("aot_eager")

    def twice(v, step, lam):
        return tk.prox(2 * v, step, lam=lam, **options) + 1

    compiled = torch.compile(twice, backend=counter, fullgraph=True)
    v = torch.randn(8, 16, requires_grad=True)
    counts = []
    for i in range(1, 7):
        found = compiled(v, 0.1 * i, 1.5 / i)
        assert torch.equal(found, twice(v, 0.1 * i, 1.5 / i))
        assert not found.requires_grad
        counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 4
    lam = torch.tensor(0.5)
    assert torch.equal(compiled(v, 0.1, lam), twice(v, 0.1, lam))
    (op,) = (n for n in counter.graphs[-1].graph.nodes if "tl1kernels" in str(n.target))
    assert "prox_" in str(op.target)


def test_a_compiled_prox_writes_where_it_is_told():
    def in_place(v, out):
        tk.prox(v, 0.3, group_by="in", out=out)
        tk.prox_(v, 0.1)
        return v + out

    v = torch.randn(8, 16)
    results = []
    for function in (in_place, torch.compile(in_place, backend="aot_eager", fullgraph=True)):
        mine, out = v.clone(), torch.empty(8, 16)
        results.append((function(mine, out), mine, out))
    assert all(map(torch.equal, *results))
    compiled = torch.compile(lambda v: tk.prox_(v, -1.0), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"step must be finite and >= 0, got -1\.0"):
        compiled(mine)
    assert torch.equal(mine, results[1][1])


@pytest.mark.parametrize("penalty", [None, *tk.PENALTIES])
def test_a_loss_with_the_penalty_in_it_compiles_whole(penalty):
    def loss(w):
        return w.square().sum() + tk.penalty_value(w, lam=0.1, penalty=penalty, group_by="in")

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        function(w).backward()
        found.append(w.grad)
    torch.testing.assert_close(*found)


def test_the_op_of_a_prox_passes_opcheck():
    v, out = torch.randn(8, 16), torch.empty(8, 16)
    numbers = torch.tensor(0.1), torch.tensor(1.0), None, torch.tensor(0.5)
    names = "tl1", "in", None, None
    torch.library.opcheck(torch.ops.tl1kernels.prox_.default, (out, v, *numbers, *names))
