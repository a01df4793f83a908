"""The library built from csrc: where it is, its loading, and why it is not there.

It holds no kernels yet, so it is not a row of `BACKENDS`; `tl1kernels info` reports it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

import tl1kernels

BINARY = "libtl1kernels_cpu.so"
REPORT = "native_build.txt"


def unavailable() -> str | None:
    """Return why the library cannot be used here; None if it can."""
    try:
        load()
    except OSError as error:  # FileNotFoundError too
        return f"{error}: {error.__cause__}" if error.__cause__ else str(error)
    return None


@cache
def load() -> Path:
    """Load the library once and return its path; its ops are then in torch.ops.tl1kernels.

    Raises:
        FileNotFoundError: it was not built; the message says why.
        OSError: it was built but does not load beside this torch.
    """
    library = _installed(BINARY)
    if library is None:
        report = _installed(REPORT)
        why = report.read_text().strip() if report else "the package was not installed by pip"
        raise FileNotFoundError(f"not built: {why}")
    torch.ops.load_library(str(library))
    return library


def build_info() -> str:
    """Return the library's own words about how it was built."""
    load()
    return torch.ops.tl1kernels.build_info()


def _installed(name: str) -> Path | None:
    # An editable install keeps built files in site-packages and sources elsewhere; both are in
    # the package's path.
    for folder in tl1kernels.__path__:
        if (candidate := Path(folder) / name).exists():
            return candidate
    return None
