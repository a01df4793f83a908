"""One training run: a `Setting` in, a result file and a model file out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tl1kernels as tk
from tl1kernels.train.data import DATA, Data
from tl1kernels.train.networks import NETWORKS

METHODS = ("none", *tk.PRESETS)
"""What is compared: no penalty, and the regularizers of the paper."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides a run's outcome, and nothing else."""

    dataset: str
    method: str
    lam: float
    a: float
    seed: int
    evaluate_on: str
    epochs: int = 100
    lr: float = 2e-3
    batch_size: int = 128
    mu_min: float = 0.2

    @property
    def file_name(self) -> str:
        """Name of this run's files, without suffix; one for each distinct setting."""
        return (
            f"{self.dataset}-{self.method}-lam{self.lam}-a{self.a}-seed{self.seed}"
            f"-{self.evaluate_on}-e{self.epochs}-lr{self.lr}-b{self.batch_size}-m{self.mu_min}"
        )


def train(setting: Setting) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train one network and return it with its result: accuracy, what is left, history."""
    torch.manual_seed(setting.seed)
    data = _data(setting.dataset, setting.evaluate_on)
    network = NETWORKS[setting.dataset]()
    optimizer = make_optimizer(network, setting)
    began = time.perf_counter()
    history = []
    for _ in range(setting.epochs):
        total = 0.0
        for batch in torch.randperm(len(data.fit_labels)).split(setting.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(data.fit_images[batch]), data.fit_labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        history.append({"loss": total / len(data.fit_labels), "accuracy": accuracy(network, data)})
    left = tk.sparsity(network, data.eval_images[:8])
    result = {
        "setting": asdict(setting),
        "accuracy": history[-1]["accuracy"],
        "sparsity": left.as_dict(),
        "history": history,
        "seconds": time.perf_counter() - began,
        "environment": environment(),
    }
    return network, result


def make_optimizer(network: torch.nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """Return Adam with the setting's regularizer; torch's own where there is none."""
    if setting.method == "none":
        return torch.optim.Adam(network.parameters(), lr=setting.lr)
    groups = tk.param_groups(
        network,
        lam=setting.lam,
        a=setting.a,
        mu_min=setting.mu_min,
        **tk.PRESETS[setting.method],
    )
    return tk.ProxAdam(groups, lr=setting.lr)


@torch.no_grad()
def accuracy(network: torch.nn.Module, data: Data) -> float:
    """Return the share of the evaluation images that the network classifies correctly."""
    predicted = network(data.eval_images).argmax(1)
    return (predicted == data.eval_labels).double().mean().item()


def run_to_file(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train, write `<file_name>.json` and `.pt` (a state_dict) to `folder`, return the result.

    A run that is there already is read instead, if this code made it on this machine. The JSON
    file appears last and whole, so that an interrupted run leaves nothing that looks finished.
    """
    target = folder / f"{setting.file_name}.json"
    if target.exists() and target.with_suffix(".pt").exists():
        known = json.loads(target.read_text())
        if known["environment"] == environment():
            return known
    network, result = train(setting)
    torch.save(network.state_dict(), target.with_suffix(".pt"))
    draft = target.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(result))
    draft.replace(target)
    return result


@lru_cache(maxsize=4)
def _data(dataset: str, evaluate_on: str) -> Data:
    return DATA[dataset](evaluate_on)


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
