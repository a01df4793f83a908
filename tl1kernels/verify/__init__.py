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

__all__ = ["GROUPINGS", "RULES", "Check", "Report", "bounds_of", "verify"]


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
    every = (None, *PENALTIES)
    for name in penalties or ():
        if name not in every:
            raise ValueError(f"penalties must be among {every}, got {name!r}")
    backends.require(backend)
    has = {None, *backends.BACKENDS[backend].penalties()}
    for name in penalties or ():
        if name not in has:
            raise ValueError(f"backend {backend!r} has no penalty {name!r}")
    lacking = [name for name in PENALTIES if name not in has] if penalties is None else []
    chosen = [name for name in every if name in has] if penalties is None else penalties
    seed = secrets.randbelow(2**31) if seed is None else seed
    generator = np.random.default_rng(seed)
    checks: list[Check] = []
    bounds = bounds_of(backend)
    where = _device(backend, device)
    with backends.use_backend(backend):
        for part in PARTS:
            checks += part(generator, bounds, where, chosen)
    return Report(backend, seed, tuple(checks), tuple(lacking))


def _device(backend: str, name: str | None) -> torch.device:
    """Return the device that a name means; ValueError where the backend cannot run on it."""
    on_gpu = {"triton": not triton_launch.interpreting(), "cuda": not cuda.emulated()}
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if backend == "reference":
        allowed = ["cpu", *(["cuda", *gpus] if gpus else [])]
    else:
        allowed = ["cuda", *gpus] if on_gpu.get(backend) else ["cpu"]
    if name is not None and name not in allowed:
        names = ", ".join(allowed)
        raise ValueError(f"device must be among {names} for backend {backend!r}, got {name!r}")
    return torch.device(name or allowed[0])
