"""How each data set is learnt: the same network and training for every regularizer.

From Ma et al. 2019: SGD for MNIST, Fashion-MNIST and PENDIGITS, Adam for the others; softmax
cross-entropy; Xavier initialisation; to stop when the loss settles or after so many epochs. The
networks, step sizes and grids are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from tl1kernels.train import networks

# Where no grid was tried out: Adam moves a weight by about lr a step, and lam competes with that;
# under SGD it competes with the loss's gradient.
ADAM_LAM = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
SGD_LAM = (1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)

MNIST_LAM = {
    "l1": (4e-4, 6e-4, 8e-4, 1e-3, 1.4e-3),
    "group_lasso": (6e-3, 1e-2, 1.4e-2, 2e-2),
    "sparse_group_lasso": (6e-4, 8e-4, 1.2e-3, 1.6e-3, 2e-3),
    "cges": (4e-4, 1e-3, 2e-3, 4e-3),
    "tl1": (6e-5, 1.2e-4, 2e-4, 3e-4, 5e-4),
    "integrated_tl1": (1e-4, 2e-4, 3e-4, 5e-4, 8e-4),
}
"""Tried out, as the next: so much that a weight can get to zero within the epochs."""

FASHION_LAM = {
    "l1": (6e-4, 1e-3, 1.4e-3),
    "group_lasso": (1.4e-2, 2e-2),
    "sparse_group_lasso": (8e-4, 1.2e-3, 1.8e-3),
    "cges": (1e-3, 2e-3, 4e-3),
    "tl1": (1.2e-4, 2e-4, 3e-4),
    "integrated_tl1": (2e-4, 3e-4, 5e-4),
}


@dataclass(frozen=True)
class Recipe:
    """How one data set is learnt.

    Attributes:
        title: the data set's name in tables.
        optimizer: "Adam" or "SGD".
        epochs: at most; a run stops before when the training loss has changed by less than
            `run.SETTLED` of itself in each of the last `run.PATIENCE` epochs.
        lam: what the search tries, by method; `grid` for all others.
        search_seeds: runs of each setting of the search.
        falling: whether the step size falls to 0, linearly over the epochs. Where there are only a
            few of them, the last one's noise would else decide what is measured. All steps together
            shrink a weight half as much then: lam is about twice as large for the same size.
    """

    title: str
    network: Callable[[], nn.Sequential]
    optimizer: str
    lr: float
    epochs: int
    grid: tuple[float, ...]
    batch_size: int = 128
    lam: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    search_seeds: int = 1
    falling: bool = False


RECIPES = {
    "digits": Recipe(
        "DIGITS",
        networks.digits_network,
        "Adam",
        lr=2e-3,
        epochs=100,
        grid=ADAM_LAM,
        search_seeds=5,
        lam={
            "l1": (0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.8),
            "group_lasso": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
            "sparse_group_lasso": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            "cges": (0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0),
            "tl1": (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
            "integrated_tl1": (0.15, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6),
        },
    ),
    "mnist": Recipe("MNIST", networks.lenet, "SGD", 0.1, 12, SGD_LAM, lam=MNIST_LAM, falling=True),
    "fashion_mnist": Recipe(
        "Fashion-MNIST", networks.lenet, "SGD", 0.1, 12, SGD_LAM, lam=FASHION_LAM, falling=True
    ),
    "pendigits": Recipe(
        "PENDIGITS",
        networks.pendigits_network,
        "SGD",
        lr=0.1,
        epochs=200,
        grid=SGD_LAM,
        search_seeds=3,
        lam={
            "l1": (0.0007, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004),
            "group_lasso": (0.002, 0.003, 0.005, 0.007, 0.01),
            "sparse_group_lasso": (0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.007),
            "cges": (0.0003, 0.0005, 0.0007, 0.001, 0.0015, 0.002),
            "tl1": (0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.005),
            "integrated_tl1": (0.0007, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.005),
        },
    ),
    "sdd": Recipe("SDD", networks.sdd_network, "Adam", 1e-3, 100, ADAM_LAM, batch_size=256),
    "cifar10": Recipe("CIFAR-10", networks.cifar10_network, "Adam", 1e-3, 60, ADAM_LAM),
}
"""By the data set's name, as `data.DATA`."""
