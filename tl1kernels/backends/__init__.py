"""The backends: each takes a `Batch` and updates it in place; this file chooses which.

A backend is a module with
    unavailable() -> str | None     why it cannot run on this machine; None if it can
    rejects(batch) -> str | None    why it cannot run this batch; None if it can
    penalties() -> frozenset[str]   the names of the penalties that it has
    run(batch) -> None              the step, in place
Adding one is a row of `BACKENDS`, a place in `PREFERENCE`, and what `verify` has to know of it: its
devices (`verify.devices_of`) and what it promises (`verify.bounds_of`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import ModuleType

from tl1kernels.backends import cuda, native, reference, triton_launch
from tl1kernels.batch import Batch

BACKENDS: Mapping[str, ModuleType] = {
    "cpu": native,
    "triton": triton_launch,
    "cuda": cuda,
    "reference": reference,
}

PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
"""Backends by device type, the preferred one first; other devices get the reference."""

ENVIRONMENT = "TL1KERNELS_BACKEND"

_UNSET = "unset"
_chosen: ContextVar[str | None] = ContextVar("tl1kernels_backend", default=_UNSET)
_warned: set[str] = set()


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Run every step and prox inside the `with` block on one backend; None chooses by device.

    It comes before the environment variable TL1KERNELS_BACKEND, and after a `backend=` argument.
    Other threads do not notice; the variable is for all.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the message says why.
    """
    require(name)
    return _use(name)


@contextmanager
def _use(name: str | None) -> Iterator[None]:
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def require(name: str | None, source: str = "backend") -> None:
    """Raise unless `name`, which `source` gave, is None or a backend that can run here."""
    if name is None:
        return
    if not isinstance(name, str) or name not in BACKENDS:
        names = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(f"{source} must be None or one of {names}, got {name!r}")
    reason = BACKENDS[name].unavailable()
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")


def asked_for() -> str | None:
    """Return the backend that `use_backend` or else the environment names; None for neither."""
    chosen = _chosen.get()
    return (os.environ.get(ENVIRONMENT) or None) if chosen == _UNSET else chosen


def preferred(device_type: str) -> str:
    """Return the name of the first backend for a device type that can run on this machine."""
    names = PREFERENCE.get(device_type, ("reference",))
    return next(name for name in names if BACKENDS[name].unavailable() is None)


def select(batch: Batch, name: str | None = None) -> str:
    """Return the name of the backend that runs `batch`.

    A backend asked for by name (argument, `use_backend`, environment) that cannot take the
    batch is an error. By preference, the first that can; passing one over is warned of once.
    """
    asked = name if name is not None else asked_for()
    if asked is not None:
        # `use_backend` has looked at its own.
        require(asked, "backend" if name is not None else ENVIRONMENT)
        reason = BACKENDS[asked].rejects(batch)
        if reason:
            raise RuntimeError(f"backend {asked!r} cannot run this step: {reason}")
        return asked
    reasons: list[str] = []
    for candidate in PREFERENCE.get(batch.device.type, ("reference",)):
        backend = BACKENDS[candidate]
        reason = backend.unavailable() or backend.rejects(batch)
        if reason is None:
            for passed_over in reasons:
                _warn_once(f"tl1kernels: {passed_over}; {candidate!r} runs instead")
            return candidate
        reasons.append(f"backend {candidate!r} passed over: {reason}")
    raise RuntimeError(f"no backend for {batch.device}: {'; '.join(reasons)}")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
