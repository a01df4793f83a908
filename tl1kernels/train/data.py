"""Data sets as tensors, split once and for all: fit, validation, test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0


@dataclass(frozen=True)
class Data:
    """What one run fits and what it is judged by. Images are (n, 1, height, width), in [0, 1]."""

    fit_images: Tensor
    fit_labels: Tensor
    eval_images: Tensor
    eval_labels: Tensor


def digits(evaluate_on: str) -> Data:
    """Return scikit-learn's DIGITS: 1,797 images of 8 x 8 pixels in ten classes.

    One fifth is for the test, one fifth for validation, stratified by class. To choose options
    (`evaluate_on="validation"`) a run fits 1,077 images and never sees the test split; the final
    runs (`"test"`) fit those and the validation images, 1,437 in all.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target)

    def divide(indices: np.ndarray, share: float) -> list[np.ndarray]:
        return train_test_split(
            indices, test_size=share, random_state=SPLIT_SEED, stratify=bunch.target[indices]
        )

    rest, test = divide(np.arange(len(labels)), 1 / 5)
    train, validation = divide(rest, 1 / 4)
    if evaluate_on == "test":
        fit, judge = rest, test
    elif evaluate_on == "validation":
        fit, judge = train, validation
    else:
        raise ValueError(f"evaluate_on must be 'validation' or 'test', got {evaluate_on!r}")
    return Data(images[fit], labels[fit], images[judge], labels[judge])


DATA = {"digits": digits}
"""The data sets by name."""
