"""The networks: plain nn.Modules, which load the sparse models that training leaves behind."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def digits_network() -> nn.Sequential:
    """Return one convolution and two fully connected layers for 8 x 8 images in ten classes.

    Xavier initialisation (Glorot & Bengio 2010), biases zero; 34,474 parameters.
    """
    network = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 16, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * 4 * 4, 128),
            relu2=nn.ReLU(),
            fc2=nn.Linear(128, 10),
        )
    )
    for module in network:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return network


NETWORKS = {"digits": digits_network}
"""The network for each data set."""
