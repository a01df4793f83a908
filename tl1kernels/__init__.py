"""Proximal optimizers for PyTorch that leave exact zeros: transformed l1 and its family."""

from importlib.metadata import PackageNotFoundError, version

from tl1kernels.backends import use_backend
from tl1kernels.functional import penalty_value, prox, prox_
from tl1kernels.groups import param_groups
from tl1kernels.info import Info, info
from tl1kernels.optim import ProxAdam, ProxAdamW, ProxSGD
from tl1kernels.penalties import PENALTIES, PRESETS
from tl1kernels.schedulers import LamScheduler
from tl1kernels.sparsity import Sparsity, sparsity

try:
    __version__ = version("tl1kernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "PENALTIES",
    "PRESETS",
    "Info",
    "LamScheduler",
    "ProxAdam",
    "ProxAdamW",
    "ProxSGD",
    "Sparsity",
    "info",
    "param_groups",
    "penalty_value",
    "prox",
    "prox_",
    "sparsity",
    "use_backend",
]
