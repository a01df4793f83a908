"""One training run: a `Setting` in, a result file and a model file out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import platform
import time
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

import tl1kernels as tk
from tl1kernels.train.data import DATA, Data
from tl1kernels.train.recipes import RECIPES

METHODS = ("none", *tk.PRESETS)
"""What is compared: no penalty, and the regularizers of the paper."""

OPTIONS: dict[str, dict[str, Any]] = {name: dict(of) for name, of in tk.PRESETS.items()} | {
    name: {"penalty": name, "group_by": "auto" if penalty.coupled else None}
    for name, penalty in tk.PENALTIES.items()
    if name not in tk.PRESETS
}
"""By method, what `param_groups` gets: the presets, and every other penalty alone."""

MU_MIN = 0.2
SETTLED = 1e-3
PATIENCE = 5


@dataclass(frozen=True)
class Setting:
    """Everything that decides a run's outcome, besides the recipe and the code.

    Attributes:
        epochs: the most; None for the recipe's.
    """

    dataset: str
    method: str
    lam: float
    a: float
    seed: int
    evaluate_on: str
    epochs: int | None = None

    @property
    def file_name(self) -> str:
        """Name of this run's files, without suffix; one for each distinct setting."""
        name = f"{self.dataset}-{self.method}-lam{self.lam}-a{self.a}-seed{self.seed}"
        epochs = "" if self.epochs is None else f"-e{self.epochs}"
        return f"{name}-{self.evaluate_on}{epochs}"


def train(setting: Setting, data_folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train one network and return it with its result: accuracy, what is left, history."""
    recipe = RECIPES[setting.dataset]
    data = _data(setting.dataset, setting.evaluate_on, data_folder)
    torch.manual_seed(setting.seed)
    network = recipe.network()
    optimizer = make_optimizer(network, setting)
    most = setting.epochs or recipe.epochs
    steps = most * -(-len(data.fit_labels) // recipe.batch_size)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps if recipe.falling else 1.0)
    began = time.perf_counter()
    history: list[dict[str, float]] = []
    while len(history) < most and not (settled(history) or diverged(history)):
        total = 0.0
        for batch in torch.randperm(len(data.fit_labels)).split(recipe.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(data.fit_inputs[batch]), data.fit_labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        history.append({"loss": total / len(data.fit_labels), "accuracy": accuracy(network, data)})
    left = tk.sparsity(network, data.eval_inputs[:8])
    result = {
        "setting": asdict(setting),
        "accuracy": history[-1]["accuracy"],
        "sparsity": left.as_dict(),
        "history": history,
        "iterations_per_epoch": steps // most,
        "seconds": time.perf_counter() - began,
        "environment": environment(),
        "data": _checksum(setting.dataset, setting.evaluate_on, data_folder),
    }
    return network, result


def settled(history: list[dict[str, float]]) -> bool:
    """Return whether the training loss has stopped changing.

    By less than `SETTLED` of itself in each of the last `PATIENCE` epochs: one alone may be chance.
    """
    losses = [epoch["loss"] for epoch in history[-PATIENCE - 1 :]]
    small = [abs(after - before) < SETTLED * before for before, after in pairwise(losses)]
    return len(small) == PATIENCE and all(small)


def diverged(history: list[dict[str, float]]) -> bool:
    """Return whether the training loss has left the finite numbers, from which nothing returns."""
    return bool(history) and not math.isfinite(history[-1]["loss"])


def make_optimizer(network: torch.nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """Return the recipe's optimizer with the setting's regularizer; torch's own where none is."""
    recipe = RECIPES[setting.dataset]
    if setting.method == "none":
        plain = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[recipe.optimizer]
        return plain(network.parameters(), lr=recipe.lr)
    options = {"mu_min": MU_MIN, "a": setting.a, **OPTIONS[setting.method]}
    groups = tk.param_groups(network, lam=setting.lam, **options)
    proximal = {"Adam": tk.ProxAdam, "SGD": tk.ProxSGD}[recipe.optimizer]
    return proximal(groups, lr=recipe.lr)


@torch.no_grad()
def accuracy(network: torch.nn.Module, data: Data) -> float:
    """Return the share of the evaluation inputs that the network classifies correctly."""
    batches = zip(data.eval_inputs.split(1000), data.eval_labels.split(1000), strict=True)
    right = sum((network(x).argmax(1) == y).sum().item() for x, y in batches)
    return right / len(data.eval_labels)


RESULT = {"setting", "accuracy", "sparsity", "history", "seconds", "environment", "data"}
"""What a result file has, at least."""
_BROKEN = RuntimeError, EOFError, pickle.UnpicklingError  # of torch.load


class DamagedRunError(Exception):
    """A result file is not what a run wrote; the message names it and says what to do."""


def run_to_file(setting: Setting, folder: Path, data_folder: Path) -> dict[str, Any]:
    """Train, write `<file_name>.json` and `.pt` (a state_dict) to `folder`, return the result.

    A run that is there already is read instead, if this code made it of these data on this machine.
    The JSON file appears last and whole: an interrupted run leaves nothing that looks finished.

    Raises:
        DamagedRunError: the result that is there cannot be read.
    """
    target = folder / f"{setting.file_name}.json"
    if target.exists() and target.with_suffix(".pt").exists():
        file = target
        try:
            known = json.loads(target.read_text())
            data = _checksum(setting.dataset, setting.evaluate_on, data_folder)
            current = known["environment"] == environment() and known["data"] == data
            current = current and known.keys() >= RESULT
            file = target.with_suffix(".pt")
            if current:
                torch.load(file, weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, *_BROKEN) as error:
            reason = str(error).partition("\n")[0]
            raise DamagedRunError(
                f"{file} cannot be read as the result of a run ({type(error).__name__}: {reason}): "
                "remove it, and the same command trains that run again"
            ) from error
        if current:
            return known
    network, result = train(setting, data_folder)
    torch.save(network.state_dict(), target.with_suffix(".pt"))
    draft = target.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(result))
    draft.replace(target)
    return result


@lru_cache(maxsize=2)
def _data(dataset: str, evaluate_on: str, folder: Path) -> Data:
    return DATA[dataset].load(RECIPES[dataset].title, evaluate_on, folder)


@lru_cache(maxsize=2)
def _checksum(dataset: str, evaluate_on: str, folder: Path) -> int:
    """Return a checksum of what a run reads."""
    data = _data(dataset, evaluate_on, folder)
    checksum = 0
    for tensor in (data.fit_inputs, data.fit_labels, data.eval_inputs, data.eval_labels):
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return checksum


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Return what, besides the setting, a result may depend on."""
    package = Path(tk.__file__).parent
    sources = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        sources.update(file.read_bytes())
    return {
        "sources": sources.hexdigest()[:16],
        "tl1kernels": tk.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "step": tk.info().runs_on["cpu"],
        "library": tk.info().native,
    }
