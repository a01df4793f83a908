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
            where the layer was not seen to run.
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
        """2 x multiply-adds of one example in the layers that ran, dense; None if none did."""
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
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, with the
            batch dim first. With it FLOPs are counted (a convolution's by its output size), and
            a neuron whose readers have only zeros for it counts as removed. Where readers
            cannot be followed (a part run without grad, an output that is no tensor of floats),
            ingoing weights alone decide.

    Returns:
        A `Sparsity`. A shared layer is counted once, its FLOPs per use. A layer whose weight is
        used without calling it (attention's output projection) has no FLOPs; totals leave it out.

    Raises:
        ValueError: a batch of no examples.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    trace = _Trace(layers.values())
    if example_inputs is not None:
        trace.run(model, example_inputs)
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

    Each layer's output is replaced by a leaf of random values, so that gradients at it come only
    from what reads this output directly: live inputs of other layers, and the model's output.
    Their random positive multiples have gradient zero, unit by unit, exactly where nobody reads.
    So that no activation hides a reader, the values lie around the real output on four scales,
    each with both signs of the same random part.
    """

    ROUNDS = tuple((scale, sign) for scale in (0.01, 1.0, 1e2, 1e4) for sign in (1.0, -1.0))

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        self.positions: dict[nn.Module, int] = {}
        self.unread: dict[nn.Module, Tensor] = {}
        self.blind = False  # something was read where autograd does not look

    def run(self, model: nn.Module, inputs: Any) -> None:
        """Fill `positions` (output positions per example) and `unread` (bool by unit)."""
        training = {m: m.training for m in model.modules()}
        model.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
                self.reads = {layer: _alive(layer)[0] for layer in self.layers}
                for layer in self.layers:
                    handle = layer.register_forward_hook(self._hook, with_kwargs=True)
                    stack.callback(handle.remove)
                args = inputs if isinstance(inputs, tuple) else (inputs,)
                kwargs = inputs if isinstance(inputs, dict) else {}
                args = () if kwargs else tuple(_cloned(x) for x in args)
                kwargs = {name: _cloned(x) for name, x in kwargs.items()}
                batch = _batch_size([*args, *kwargs.values()])
                for scale, sign in self.ROUNDS:
                    self._round(model, args, kwargs, scale, sign)
        finally:
            for module, mode in training.items():
                module.training = mode
        self.positions = {m: n // batch for m, n in self.positions.items()}
        if self.blind:
            self.unread = {}

    def _round(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scale: float,
        sign: float,
    ) -> None:
        self.scale, self.sign = scale, sign
        self.generator = torch.Generator().manual_seed(0)
        self.positions = {}
        self.outputs: list[tuple[nn.Module, Tensor]] = []
        self.read: list[Tensor] = []
        self._add_read(model(*args, **kwargs))
        # A backward pass that recomputes calls the hooks again; what they note then is dropped.
        outputs, read, positions = self.outputs, self.read, self.positions
        self.outputs, self.read, self.positions = [], [], {}
        leaves = [leaf for _, leaf in outputs]
        if not leaves or not read:
            self.blind, self.positions = True, positions
            return
        total = torch.stack([part.to(read[0]) for part in read]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        self.positions = positions
        for (layer, leaf), gradient in zip(outputs, gradients, strict=True):
            unit_dim = _unit_dim(layer, leaf)
            others = [dim for dim in range(leaf.ndim) if dim != unit_dim]
            silent = torch.ones(leaf.shape[unit_dim], dtype=torch.bool, device=leaf.device)
            if gradient is not None:
                silent = (gradient == 0).all(others) if others else gradient == 0
            known = self.unread.get(layer)
            self.unread[layer] = silent if known is None else known & silent

    def _hook(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            self.blind = True
        x = args[0] if args else kwargs["input"]
        shape = [1] * x.ndim
        shape[_unit_dim(layer, x)] = -1
        if x.requires_grad:
            self._add_read(x * self.reads[layer].view(shape))
        counted = x if isinstance(layer, _TRANSPOSED) else output
        positions = counted.numel() // counted.shape[_unit_dim(layer, counted)]
        self.positions[layer] = self.positions.get(layer, 0) + positions
        real = output.detach()
        size = real.float().square().mean().sqrt().clamp(min=1e-3).to(real)
        noise = self._random(real) * torch.where(self._random(real) < 1, -1, 1)
        leaf = (real + self.sign * self.scale * size * noise).requires_grad_()
        self.outputs.append((layer, leaf))
        return leaf.clone()  # an in-place activation may follow

    def _add_read(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.requires_grad:
            self.read.append((value * self._random(value)).sum())
        elif isinstance(value, dict):
            self._add_read(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._add_read(item)
        elif value is not None:
            self.blind = True  # classes, samples, objects: what they read cannot be followed

    def _random(self, like: Tensor) -> Tensor:
        """Return random values in [0.5, 1.5]: never near zero."""
        values = torch.rand(like.shape, generator=self.generator, dtype=torch.float32) + 0.5
        return values.to(like)


def _cloned(value: Any) -> Any:
    """Return tensors as copies that autograd may keep, whatever mode made them."""
    return value.clone() if isinstance(value, Tensor) else value


def _batch_size(values: Iterable[Any]) -> int:
    sizes = [x.shape[0] for x in values if isinstance(x, Tensor) and x.ndim]
    if 0 in sizes:
        raise ValueError("example_inputs must hold at least one example, got a batch of 0")
    return sizes[0] if sizes else 1


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
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _share(left: int | None, total: int | None) -> str:
    if left is None or total is None:
        return "not counted"
    return f"{left}/{total} ({left / max(total, 1):.1%})"
