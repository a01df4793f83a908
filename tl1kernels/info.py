"""What this installation can do on this machine: `tl1kernels.info()`."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tl1kernels.backends import BACKENDS, asked_for, cuda, native, preferred
from tl1kernels.batch import SGD, Batch


@dataclass(frozen=True)
class Info:
    """Versions, devices, backends and what runs where; `print` it, or take `as_dict`.

    Attributes:
        versions: of this package, Python and torch.
        devices: "cpu", and "cuda" if torch can use it -> what it is.
        backends: name -> "available", or why not.
        runs_on: device type -> backend of a step, or what is wrong with what was asked for.
        native: the library of csrc: how it was built, or why it was not.
        cuda: the same of csrc/cuda.
        asked_for: the backend that `use_backend` or the environment names, if one does.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    backends: dict[str, str]
    runs_on: dict[str, str]
    native: str
    cuda: str
    asked_for: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain strings and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        sections = {
            "versions": self.versions,
            "devices": self.devices,
            "backends": self.backends,
            "a step runs on": self.runs_on,
            "native libraries": {"csrc": self.native, "csrc/cuda": self.cuda},
        }
        if self.asked_for:
            sections["asked for"] = {"backend": self.asked_for}
        lines = []
        for title, entries in sections.items():
            lines.append(title)
            lines += [f"  {name:<11} {value}" for name, value in entries.items()]
        return "\n".join(lines)


def info() -> Info:
    """Return what is built, what a step would run on, and why not on the rest."""
    from tl1kernels import __version__

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    backends = {name: b.unavailable() or "available" for name, b in BACKENDS.items()}
    asked = asked_for()
    problem = native.unavailable()
    return Info(
        versions={
            "tl1kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        devices=devices,
        backends=backends,
        runs_on={device: _runs_on(device, asked) for device in devices},
        native=problem or native.build_info(),
        cuda=cuda.build_info(),
        asked_for=asked,
    )


def _runs_on(device_type: str, asked: str | None) -> str:
    """Return the backend of a step of SGD with TL1, or why what was asked for cannot take it."""
    name = preferred(device_type) if asked is None else asked
    if name not in BACKENDS:
        return f"nothing: {asked!r} was asked for: no such backend"
    step = Batch(torch.device(device_type), torch.float32, SGD(), "tl1", [], [])
    try:
        why = BACKENDS[name].unavailable() or BACKENDS[name].rejects(step)
    except RuntimeError as error:  # the CPU's instruction set that was asked for
        return f"nothing: {error}"
    return f"nothing: {asked!r} was asked for: {why}" if asked and why else name
