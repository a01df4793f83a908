"""What only a CUDA GPU can show: the same bits, graphs, launches, no recompilation, real training.

Agreement with the reference on every tile, rule and dtype is in test_gpu_backends.py, which runs
there too. `bench/gpu.sh` runs both.
"""

import copy

import pytest
import torch
from torch import nn

import tl1kernels as tk
from tests.common import gpu_backend, variants
from tl1kernels import backends, plan
from tl1kernels.backends import triton_launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

SHAPES = [(700, 601), (64, 3, 7, 7), (5,), (300_007,), (0, 3), (128, 64, 3, 3), (2, 12288)]


def many(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator).to("cuda", dtype) for s in SHAPES]
    for p in params:
        p.requires_grad_()
        p.grad = torch.randn(p.shape, generator=generator).to("cuda", dtype)
    return params


def network():
    torch.manual_seed(0)
    layers = (nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 3))
    return nn.Sequential(*layers).cuda()


backend = pytest.fixture(autouse=True, params=["triton", "cuda"])(gpu_backend)


def test_cuda_tensors_run_on_triton():
    assert triton_launch.unavailable() is None
    assert backends.preferred("cuda") == "triton"
    with tk.use_backend(None):
        assert tk.info().runs_on["cuda"] == "triton"


@pytest.mark.parametrize("dtype", plan.FLOAT_DTYPES)
@pytest.mark.parametrize("group_by", ["auto", "layer", -1, None])
def test_the_same_bits_run_after_run(dtype, group_by):
    results = []
    for _ in range(4):
        params = many(dtype)
        optimizer = tk.ProxAdamW(params, lr=0.1, lam=0.3, group_by=group_by, min_ndim=1)
        for _ in range(3):
            optimizer.step()
        results.append(params + [optimizer.state[p]["exp_avg_sq"] for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("group_by", ["auto", "layer"])
@variants
def test_a_step_is_the_references(backend, ours, torchs, options, group_by):
    results = []
    for name in (backend, "reference"):
        params = many(torch.float32)
        optimizer = ours(params, lr=0.05, lam=0.3, group_by=group_by, min_ndim=1, **options)
        with tk.use_backend(name):
            for _ in range(3):
                optimizer.step()
        results.append(params)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_graph_replays_with_lr_and_lam_as_they_then_are():
    torch.manual_seed(0)
    models = network(), network()
    rates = [torch.tensor(0.01, device="cuda") for _ in models]
    weights = [torch.tensor(0.05, device="cuda") for _ in models]
    optimizers = [
        tk.ProxAdamW(model.parameters(), lr=lr, lam=lam, capturable=True)
        for model, lr, lam in zip(models, rates, weights, strict=True)
    ]
    x = torch.randn(64, 40, device="cuda")

    def train(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(models[0], optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        train(models[0], optimizers[0])
    for _ in range(3):
        train(models[1], optimizers[1])
    for i in range(5):
        for lr, lam in zip(rates, weights, strict=True):
            lr.fill_(0.01 / (i + 1))
            lam.fill_(0.05 * (i + 1))
        x.normal_()
        graph.replay()
        train(models[1], optimizers[1])
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    steps = [optimizers[i].state[next(models[i].parameters())]["step"].item() for i in (0, 1)]
    assert steps == [8, 8]
    assert (next(models[0].parameters()) == 0).any()


def test_a_graph_without_capturable_is_an_error():
    model = network()
    optimizer = tk.ProxAdamW(model.parameters(), lr=0.01)
    x = torch.randn(8, 40, device="cuda")
    model(x).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(0)  # an empty graph would be warned of
            optimizer.step()

    with pytest.raises(RuntimeError, match="capturable"):
        capture()
    assert optimizer.state_dict()["state"][0]["step"] == before["state"][0]["step"]


def test_a_step_between_a_capture_and_its_replay(backend):
    """It reads nothing that only the replay will have brought."""
    results = []
    for captures in (True, False):
        p = torch.linspace(-1, 1, 6000, device="cuda").view(60, 100).requires_grad_()
        optimizer = tk.ProxSGD([p], lr=0.1, lam=0.2)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        p.grad = torch.full_like(p, -0.5)  # elsewhere
        if captures:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            optimizer.step()
            graph.replay()
        else:
            optimizer.step()
            optimizer.step()
        torch.cuda.synchronize()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_steps_on_one_stream_after_another_keep_what_they_read(backend):
    """What a step has made on one stream is nobody else's while a step on another reads it."""
    options = {"lr": 0.01, "lam": 0.5, "group_by": "in"}
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    results = []
    for streams in ([first] * 2, [first, second]):
        p = torch.linspace(-1, 1, 2**24, device="cuda").view(4096, 4096).requires_grad_()
        torch.cuda.synchronize()
        for _ in range(10):
            optimizer = tk.ProxSGD([p], **options)
            for stream in streams:
                stream.wait_stream(first)
                with torch.cuda.stream(stream):
                    p.grad = torch.ones_like(p)
                    optimizer.step()
            del optimizer
            with torch.cuda.stream(first):  # takes at once what has been freed
                waste = [torch.full((2**k,), -1, device="cuda") for k in range(6, 18)]
                del waste
            first.wait_stream(second)
        torch.cuda.synchronize()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_teams_on_two_streams_at_a_time(backend):
    """Each waits for its own while both are on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape, options = (8192, 1024), {"lr": 0.1, "lam": 3.0, "group_by": "in"}
    params = [torch.randn(shape, device="cuda", generator=generator) for _ in range(2)]
    results = []
    for streams in (
        [torch.cuda.current_stream()] * 2,
        [torch.cuda.Stream() for _ in range(2)],
    ):
        mine = [p.clone().requires_grad_() for p in params]
        optimizers = [tk.ProxAdamW([p], **options) for p in mine]
        for p in mine:
            p.grad = torch.ones_like(p)
        torch.cuda.synchronize()
        for _ in range(20):
            for optimizer, stream in zip(optimizers, streams, strict=True):
                with torch.cuda.stream(stream):
                    optimizer.step()
        torch.cuda.synchronize()
        results.append(mine)
    assert all(map(torch.equal, *results))
    assert all((p == 0).any() and p.any() for p in mine)


def launches(function):
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    ours = ("prepare_kernel", "resident_kernel", "split_kernel", "tl1::gpu")
    return [e.name for e in profile.events() if any(name in e.name for name in ours)]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_is_few_launches_and_waits_for_nothing(backend):
    params = many(torch.float32)
    lam = torch.tensor(0.1, device="cuda")
    optimizer = tk.ProxAdamW(params, lr=0.1, lam=lam, capturable=True, min_ndim=1)
    optimizer.step()
    launched = launches(optimizer.step)
    assert len(launched) == len(set(launched)) == {"triton": 3, "cuda": 2}[backend]
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_variants():
    kernels = triton_launch.load()
    every = (kernels.prepare_kernel, kernels.resident_kernel, kernels.split_kernel)
    return sum(len(cache[0]) for kernel in every for cache in kernel.device_caches.values())


def test_a_scheduler_recompiles_nothing(backend):
    if backend != "triton":
        pytest.skip("nothing is compiled at run time")
    params = many(torch.float32)
    optimizer = tk.ProxSGD(params, lr=0.1, momentum=0.9, lam=0.1, min_ndim=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20)
    optimizer.step()
    before = compiled_variants()
    assert before > 0
    for i in range(10):
        optimizer.param_groups[0].update(lam=0.1 * i, mu=0.05 * i, a=10.0**-i)
        optimizer.step()
        scheduler.step()
    assert compiled_variants() == before


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_precision_with_a_grad_scaler(fused):
    results = []
    for kind, options in ((tk.ProxAdamW, {"fused": fused}), (torch.optim.AdamW, {})):
        model = network()
        optimizer = kind(model.parameters(), lr=1e-2, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        generator = torch.Generator("cuda").manual_seed(0)
        for i in range(8):
            optimizer.zero_grad()
            x = torch.randn(32, 40, device="cuda", generator=generator)
            loss = model(x).square().mean() * (float("inf") if i in (0, 3) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in model.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_training_prunes_and_a_checkpoint_goes_on_bit_for_bit():
    model = network()
    optimizer = tk.ProxAdamW(tk.param_groups(model, lam=0.5, a=0.1), lr=2e-3)
    x = torch.randn(256, 40, device="cuda")
    y = x[:, :3].argmax(1)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    train(model, optimizer, 200)
    report = tk.sparsity(model)
    assert report.parameters_left < 0.6 * report.parameters
    other = copy.deepcopy(model)
    resumed = tk.ProxAdamW(tk.param_groups(other, lam=0.5, a=0.1), lr=2e-3)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 5)
    train(other, resumed, 5)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_by", [None, "out", "in", "layer"])
def test_masters_are_what_float32_weights_become(dtype, group_by):
    """To the bit; the weight is the master, rounded."""
    narrow = torch.randn(300, 9000, device="cuda").to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    options = {"lr": 0.05, "lam": 4.0, "group_by": group_by}
    mine = tk.ProxAdamW([narrow], master_weights=True, **options)
    theirs = tk.ProxAdamW([wide], **options)
    for _ in range(3):
        narrow.grad = torch.randn_like(narrow)
        wide.grad = narrow.grad.float()
        mine.step()
        theirs.step()
    assert torch.equal(mine.state[narrow]["master_param"], wide)
    assert torch.equal(narrow, wide.to(dtype))
    assert (narrow == 0).any()
