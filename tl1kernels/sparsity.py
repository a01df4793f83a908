"""How small a network has become: parameters, FLOPs and neurons, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


@dataclass(frozen=True)
class LayerSparsity:
    """One linear or convolutional layer.

    Attributes:
        name, kind: the module's path and class.
        weights, weights_left: entries of the weight, and those that are not zero.
        flops, flops_left: 2 x multiply-adds of one example; only nonzero weights are left. None
            without `example_inputs`.
        inputs, inputs_removed: units (features, channels) that the layer reads, and those whose
            weights in this layer are all zero.
        neurons, neurons_removed: units that the layer computes, and those removed: all ingoing
            weights zero or, where `example_inputs` showed who reads them, all outgoing ones.
    """

    name: str
    kind: str
    weights: int
    weights_left: int
    flops: int | None
    flops_left: int | None
    inputs: int
    inputs_removed: int
    neurons: int
    neurons_removed: int


@dataclass(frozen=True)
class Sparsity:
    """A model's layers and its totals; `print` it for a table, `as_dict` it for a log.

    `parameters` counts every parameter of the model, biases and norm scales too; the other
    totals are sums over the layers.
    """

    layers: tuple[LayerSparsity, ...]
    parameters: int
    parameters_left: int

    @property
    def flops(self) -> int | None:
        """2 x multiply-adds of one example, dense."""
        return _total(layer.flops for layer in self.layers)

    @property
    def flops_left(self) -> int | None:
        """2 x multiply-adds of one example with nonzero weights."""
        return _total(layer.flops_left for layer in self.layers)

    @property
    def neurons(self) -> int:
        """Units computed by the layers."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def neurons_removed(self) -> int:
        """Units whose ingoing or outgoing weights are all zero."""
        return sum(layer.neurons_removed for layer in self.layers)

    @property
    def parameters_fraction(self) -> float:
        """Share of the parameters that is not zero, in [0, 1]."""
        return self.parameters_left / max(self.parameters, 1)

    @property
    def flops_fraction(self) -> float | None:
        """Share of the FLOPs that is left, in [0, 1]; None without `example_inputs`."""
        if self.flops is None or self.flops_left is None:
            return None
        return self.flops_left / max(self.flops, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return totals and layers as plain numbers, strings, lists and dicts."""
        totals = {
            name: getattr(self, name)
            for name in (
                "parameters",
                "parameters_left",
                "parameters_fraction",
                "flops",
                "flops_left",
                "flops_fraction",
                "neurons",
                "neurons_removed",
            )
        }
        return {**totals, "layers": [asdict(layer) for layer in self.layers]}

    def rows(self) -> list[list[str]]:
        """Return the table: a header, a row a layer, a row for the whole model."""
        header = ["layer", "weights left", "FLOPs left", "inputs removed", "neurons removed"]
        rows = [header]
        for layer in self.layers:
            rows.append(
                [
                    layer.name or layer.kind,
                    _share(layer.weights_left, layer.weights),
                    _share(layer.flops_left, layer.flops),
                    f"{layer.inputs_removed}/{layer.inputs}",
                    f"{layer.neurons_removed}/{layer.neurons}",
                ]
            )
        rows.append(
            [
                "all parameters",
                _share(self.parameters_left, self.parameters),
                _share(self.flops_left, self.flops),
                "",
                f"{self.neurons_removed}/{self.neurons}",
            ]
        )
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def sparsity(model: nn.Module, example_inputs: Any = None) -> Sparsity:
    """Count what is left of a model's linear and convolutional layers.

    Args:
        model: any network; it is run in eval mode and left as it was.
        example_inputs: a tensor, or a tuple of positional arguments, with the batch dim first.
            With it FLOPs are counted (a convolution's by its output size), and a neuron whose
            readers have only zeros for it counts as removed. Two examples or more make a
            wrong answer, from a neuron silent on all of them, all but impossible.

    Returns:
        A `Sparsity`. Shared layers are counted once; their FLOPs, per use.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    trace = _Trace(layers.values())
    if example_inputs is not None:
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        trace.run(model, inputs)
    parameters = list(model.parameters())
    return Sparsity(
        tuple(_layer(name, module, trace) for name, module in layers.items()),
        sum(p.numel() for p in parameters),
        sum(int(p.count_nonzero()) for p in parameters),
    )


def _layer(name: str, module: nn.Module, trace: _Trace) -> LayerSparsity:
    weight = _weight(module)
    left = int(weight.count_nonzero())
    reads, computes = _alive(module)
    unread = trace.unread.get(module)
    removed = ~computes if unread is None else ~computes | unread
    positions = trace.positions.get(module)
    return LayerSparsity(
        name=name,
        kind=type(module).__name__,
        weights=weight.numel(),
        weights_left=left,
        flops=None if positions is None else 2 * weight.numel() * positions,
        flops_left=None if positions is None else 2 * left * positions,
        inputs=reads.numel(),
        inputs_removed=int((~reads).sum()),
        neurons=computes.numel(),
        neurons_removed=int(removed.sum()),
    )


def _alive(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return which input units have a nonzero weight, and which output units: two bool vectors."""
    # (out, in / groups, positions); for transposed convolutions (in, out / groups, positions)
    nonzero = _weight(module).detach().ne(0).unsqueeze(-1).flatten(2)
    groups = module.groups if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) else 1
    parts = nonzero.any(2).chunk(groups, 0)
    first = torch.cat([part.any(1) for part in parts])
    second = torch.cat([part.any(0) for part in parts])
    return (first, second) if isinstance(module, _TRANSPOSED) else (second, first)


class _Trace:
    """One look at how data flows between the layers of a model.

    Each layer's output is replaced by fresh random values that require grad, so that gradients
    at them come only from what reads this output directly. Those of random positive multiples
    of all live inputs and of the model's output are then zero, unit by unit, exactly where
    nobody reads. Random values of both signs, several times over, pass every activation.
    """

    ROUNDS = 8

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        self.positions: dict[nn.Module, int] = {}
        self.unread: dict[nn.Module, Tensor] = {}

    def run(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Fill `positions` (output positions per example) and `unread` (bool by unit)."""
        training = {m: m.training for m in model.modules()}
        model.eval()
        try:
            with ExitStack() as stack, torch.enable_grad():
                for layer in self.layers:
                    handle = layer.register_forward_hook(self._hook)
                    stack.callback(handle.remove)
                for round_ in range(self.ROUNDS):
                    self._round(model, inputs, torch.Generator().manual_seed(round_))
        finally:
            for module, mode in training.items():
                module.training = mode
        batch = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.ndim), 1)
        self.positions = {m: n // batch for m, n in self.positions.items()}

    def _round(self, model: nn.Module, inputs: tuple[Any, ...], generator: torch.Generator) -> None:
        self.generator = generator
        self.positions = {}
        self.outputs: list[tuple[nn.Module, Tensor]] = []
        self.read = torch.zeros(())
        self._add_read(model(*inputs))
        leaves = [leaf for _, leaf in self.outputs]
        if not leaves or not self.read.requires_grad:
            return
        gradients = torch.autograd.grad(self.read, leaves, allow_unused=True)
        for (layer, leaf), gradient in zip(self.outputs, gradients, strict=True):
            unit_dim = _unit_dim(layer, leaf)
            others = [dim for dim in range(leaf.ndim) if dim != unit_dim]
            silent = torch.ones(leaf.shape[unit_dim], dtype=torch.bool, device=leaf.device)
            if gradient is not None:
                silent = (gradient == 0).all(others) if others else gradient == 0
            known = self.unread.get(layer)
            self.unread[layer] = silent if known is None else known & silent

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        reads, _ = _alive(layer)
        shape = [1] * x.ndim
        shape[_unit_dim(layer, x)] = -1
        self._add_read(x * reads.view(shape))
        counted = x if isinstance(layer, _TRANSPOSED) else output
        positions = counted.numel() // counted.shape[_unit_dim(layer, counted)]
        self.positions[layer] = self.positions.get(layer, 0) + positions
        leaf = self._random(output).requires_grad_()
        self.outputs.append((layer, leaf))
        return leaf

    def _add_read(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.requires_grad:
                weights = self._random(value).abs()
                self.read = self.read.to(value.device) + (value * weights).sum()
        elif isinstance(value, dict):
            self._add_read(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._add_read(item)

    def _random(self, like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=self.generator, dtype=torch.float32)
        return values.to(like)


def _unit_dim(layer: nn.Module, tensor: Tensor) -> int:
    """Return the dim of a layer's input or output that counts features or channels."""
    return (
        tensor.ndim - 1 if isinstance(layer, nn.Linear) else tensor.ndim - _weight(layer).ndim + 1
    )


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _total(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(v for v in known if v is not None)


def _share(left: int | None, total: int | None) -> str:
    if left is None or total is None:
        return "not counted"
    return f"{left}/{total} ({left / max(total, 1):.1%})"
