"""Sharded training on two processes: torch's wrappers, with our optimizers inside."""

import contextlib
import warnings

import pytest
import torch
from torch import distributed, nn

import tl1kernels as tk
from tl1kernels import backends

RANKS = 2
STEPS, OPTIONS = 4, {"lr": 0.1, "weight_decay": 0.01}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))


def train(model, optimizer):
    """Take the same steps on every rank: as if each had a part of one batch, all alike."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(5, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def trained(**options):
    model = network()
    train(model, tk.ProxAdamW(model.parameters(), **OPTIONS, **options))
    return [p.detach() for p in model.parameters()]


def close(found, wanted):
    zeros = [[(p == 0).sum().item() for p in params] for params in (found, wanted)]
    assert zeros[0] == zeros[1]
    assert sum(zeros[0]) > 0
    for p, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)


def zero_redundancy():
    """Spare biases where the optimizer's own options are written into every param group."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), tk.ProxAdamW, lam=0.3, **OPTIONS)
    train(model, optimizer)
    close([p.detach() for p in model.parameters()], trained(lam=0.3))


def fully_sharded():
    """Take DTensors by the reference, groups across ranks too, with one warning."""
    from torch.distributed.fsdp import fully_shard

    for group_by in (None, "out", "in", "layer"):
        model = network()
        fully_shard(model)
        options = {"lam": 0.5, "group_by": group_by}
        optimizer = tk.ProxAdamW(model.parameters(), **OPTIONS, **options)
        model(torch.ones(5, 6)).square().mean().backward()
        if not backends.native.unavailable():
            with tk.use_backend("cpu"), pytest.raises(RuntimeError, match="a DTensor"):
                optimizer.step()
            assert not optimizer.state
        warns = pytest.warns(RuntimeWarning, match="passed over: a DTensor; 'reference' runs")
        with warns if group_by is None else contextlib.nullcontext():
            train(model, optimizer)
        close([p.full_tensor().detach() for p in model.parameters()], trained(**options))


def flat_pieces():
    """Say that nobody knows the groups of a flat piece, nor what is a bias."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=cpu)
    with pytest.warns(RuntimeWarning, match=r"params are flat pieces .* fully_shard keeps both"):
        tk.ProxSGD(model.parameters(), lr=0.1, lam=0.5)
    with pytest.warns(RuntimeWarning, match=r"computed from _fsdp_wrapped_module\.0\.weight, "):
        groups = tk.param_groups(model, lam=0.5)
    assert [group["name"] for group in groups] == ["unregularized"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.ProxSGD(groups, lr=0.1)
        tk.ProxSGD(model.parameters(), lr=0.1, lam=0.5, group_by=None, min_ndim=0)


def on_a_rank(rank, promise, folder):
    warnings.filterwarnings("error", message="tl1kernels")  # but for those that are waited for
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    promise()
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("promise", [zero_redundancy, fully_sharded, flat_pieces])
def test_on_two_ranks(promise, tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (promise, tmp_path), nprocs=RANKS)
