"""The networks: plain nn.Modules, which load the sparse models that training leaves behind."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format


def _network(*layers: nn.Module) -> nn.Sequential:
    """Return the layers in order, named conv1, fc1, ..., by Xavier (Glorot & Bengio 2010).

    Biases are zero but for those of hidden linear layers, which start at 0.3. From zero some of
    their neurons are silent on every input from the start, more fall silent soon, and any penalty
    removes those alike: the comparison would show the initialisation.
    """
    weighted = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in weighted:
        hidden = isinstance(layer, nn.Linear) and layer is not weighted[-1]
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, 0.3 if hidden else 0.0)
    network, count = nn.Sequential(), Counter[str]()
    for module in layers:
        name = type(module).__name__.lower()
        kind = {"conv2d": "conv", "linear": "fc"}.get(name, name)
        count[kind] += 1
        network.add_module(f"{kind}{count[kind]}", module)
    return network


def _channels_last(network: nn.Sequential) -> nn.Sequential:
    """Return the network with its convolutions' weights in the format that oneDNN takes as it is.

    On a CPU an epoch of LeNet takes two thirds of the time then.
    """
    return convert_conv2d_weight_memory_format(network, torch.channels_last)


def digits_network() -> nn.Sequential:
    """Return one convolution and two linear layers for images of 8 x 8; 34,346 parameters."""
    return _network(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def lenet() -> nn.Sequential:
    """Return LeNet-5 of Caffe's sizes, for images of 28 x 28; 431,080 parameters.

    Caffe's has no ReLU after the convolutions. On Fashion-MNIST, that one diverges under SGD when
    TL1 removes most connections: 7 of 50 runs at lr = 0.1, and one at 0.05 still.
    """
    layers = _network(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )
    return _channels_last(layers)


def pendigits_network() -> nn.Sequential:
    """Return three linear layers for 16 features; 12,810 parameters."""
    return _network(
        nn.Linear(16, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def sdd_network() -> nn.Sequential:
    """Return four linear layers, 40, 40 and 30 hidden neurons (Scardapane et al. 2017)."""
    return _network(
        nn.Linear(48, 40),
        nn.ReLU(),
        nn.Linear(40, 40),
        nn.ReLU(),
        nn.Linear(40, 30),
        nn.ReLU(),
        nn.Linear(30, 11),
    )


def cifar10_network() -> nn.Sequential:
    """Return four convolutions in two blocks and two linear layers; 2,360,138 parameters."""
    layers = _network(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128 * 8 * 8, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    return _channels_last(layers)
