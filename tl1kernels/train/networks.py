"""The networks: plain nn.Modules, which load the sparse models that training leaves behind."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def digits_network() -> nn.Sequential:
    """Return one convolution and two fully connected layers for 8 x 8 images in ten classes.

    34,346 parameters. Weights by Xavier initialisation (Glorot & Bengio 2010), biases zero but
    for the hidden neurons', which start at 0.3. From zero some of them are silent on every image
    from the start, more fall silent soon, and any penalty removes those alike: the comparison
    would show the initialisation.
    """
    conv, fc1, fc2 = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16 * 4 * 4, 128), nn.Linear(128, 10)
    for layer, bias in ((conv, 0.0), (fc1, 0.3), (fc2, 0.0)):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, bias)
    return nn.Sequential(
        OrderedDict(
            conv=conv,
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=fc1,
            relu2=nn.ReLU(),
            fc2=fc2,
        )
    )


NETWORKS = {"digits": digits_network}
"""The network for each data set."""
