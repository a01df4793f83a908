"""Check a backend against oracles that share no code with it: `tl1kernels verify`.

Fresh random input each time; the seed that reproduces it is in the report. `checks` has what is
checked, `bounds` what is promised, `report` what is said of it.
"""

from __future__ import annotations

import secrets

import numpy as np
import torch

from tl1kernels import backends
from tl1kernels.backends import cuda, triton_launch
from tl1kernels.penalties import PENALTIES
from tl1kernels.verify.bounds import bounds_of
from tl1kernels.verify.checks import GROUPINGS, PARTS, RULES, Penalties
from tl1kernels.verify.report import Check, Report

__all__ = [
    "GROUPINGS",
    "RULES",
    "Check",
    "Report",
    "bounds_of",
    "devices_of",
    "penalties_of",
    "verify",
]


def verify(
    backend: str = "reference",
    seed: int | None = None,
    penalties: Penalties | None = None,
    device: str | None = None,
) -> Report:
    """Run every check on one backend.

    Args:
        backend: a name of `BACKENDS`.
        seed: of the random input; None draws one.
        penalties: names of `PENALTIES`, or None for no penalty; None for all that it has.
        device: "cpu", "cuda" or "cuda:1", where the backend runs; None for the CPU, or for the GPU
            where Triton compiles.

    Raises:
        ValueError, RuntimeError: no such backend, or it cannot run here; no such penalty; no such
            device, or none for that backend.
    """
    backends.require(backend)
    has, devices = penalties_of(backend), devices_of(backend)
    chosen = has if penalties is None else penalties
    for name in chosen:
        if name not in has:
            raise ValueError(f"penalties must be among {has} for {backend!r}, got {name!r}")
    device = devices[0] if device is None else device
    if device not in devices:
        raise ValueError(f"device must be among {devices} for {backend!r}, got {device!r}")
    lacking = [name for name in PENALTIES if name not in has] if penalties is None else []
    seed = secrets.randbelow(2**31) if seed is None else seed
    generator = np.random.default_rng(seed)
    checks: list[Check] = []
    bounds = bounds_of(backend)
    where = torch.device(device)
    with backends.use_backend(backend):
        for part in PARTS:
            checks += part(generator, bounds, where, chosen)
    return Report(backend, seed, tuple(checks), tuple(lacking))


def penalties_of(backend: str) -> list[str | None]:
    """Return the penalties that a backend has; None, no penalty, is the first."""
    has = backends.BACKENDS[backend].penalties()
    return [None, *(name for name in PENALTIES if name in has)]


def devices_of(backend: str) -> list[str]:
    """Return the devices that a backend runs on here, the one that `verify` prefers first."""
    on_gpu = {"triton": not triton_launch.interpreting(), "cuda": not cuda.emulated()}
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if backend == "reference":
        return ["cpu", *(["cuda", *gpus] if gpus else [])]
    return ["cuda", *gpus] if on_gpu.get(backend) else ["cpu"]
