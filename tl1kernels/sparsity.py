"""How small a network has become: parameters, FLOPs and neurons, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tl1kernels.readers import LAYERS, Trace

# Reparametrizations that compute an attribute before each forward.
_COMPUTES_AN_ATTRIBUTE = (BasePruningMethod, WeightNorm, SpectralNorm)


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

    `parameters` counts every parameter of the model, biases and norm scales too, with a pruned or
    reparametrized one as the layers use it; the other totals are sums over the layers.
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
        model: any network; it is run in eval mode, uncompiled, and left as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, with the
            batch dim first, or one example without it: a vector for a linear layer, (channels,
            *positions) for a convolution. With it FLOPs are counted (a convolution's by its
            output size), and a neuron whose readers have only zeros for it counts as removed.
            Where readers cannot be followed (a layer run without grad, an output that no unit
            is seen to reach, gradients taken inside), ingoing weights alone decide. What leaves
            autograd is followed (`detach`, comparisons, numbers), but not inside torch.jit's
            functions or vmap, nor into a Parameter made of it. Give several examples to a network
            that takes maxima over units: one that loses each of them counts as unread.

    Returns:
        A `Sparsity`. A shared layer is counted once, its FLOPs per use. A layer whose weight is
        used without calling it (attention's output projection) has no FLOPs; totals leave it out.

    Raises:
        ValueError: a batch of no examples, a lazy module that has not run yet, or parameters on
            the meta device.
        TypeError: no nn.Module, or layers compiled by torch.jit, which cannot be looked into.
    """
    _check(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    with _in_eval_mode(model):
        weights: dict[nn.Module, Tensor] = {m: _weight(m) for m in layers.values()}
        trace = Trace(weights)
        if example_inputs is not None:
            trace.run(model, example_inputs)
        parameters, parameters_left = _parameters(model)
    return Sparsity(
        tuple(_layer(name, module, weights[module], trace) for name, module in layers.items()),
        parameters,
        parameters_left,
    )


def _check(model: nn.Module) -> None:
    """Raise for what is no module, and for modules whose weights cannot be seen."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        here = f"{name or 'model'} ({type(module).__name__})"
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{here} is lazy and has no weights yet: run the model once, model(example), "
                "before sparsity"
            )
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(
                    f"{own} of {here} is on the meta device, without values to count: load the "
                    "model's weights before sparsity"
                )
        if isinstance(module, torch.jit.ScriptModule) and (
            module is model or module.original_name in {layer.__name__ for layer in LAYERS}
        ):
            raise TypeError(
                f"{here} was compiled by torch.jit, which hides its layers: pass the nn.Module "
                "that it was made from"
            )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate, uncompiled, with gradients and weights up to date; then leave all as before.

    For reading weights too: in training mode a spectral norm takes a step when it is read.
    """
    modes = [(m, m.training) for m in model.modules()]
    ours = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for m in ours]
    try:
        model.eval()
        # Graphs that torch.compile made before would run without the hooks.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            _replace_buffers(ours)
            for module in model.modules():
                for hook in module._forward_pre_hooks.values():
                    if isinstance(hook, _COMPUTES_AN_ATTRIBUTE):
                        hook(module, ())
            yield
    finally:
        for module, own, buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, training in modes:
            module.training = training


def _replace_buffers(modules: Iterable[nn.Module]) -> None:
    """Give modules copies of their buffers, for a forward may write to them."""
    copies: dict[Tensor, Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is None or is_lazy(buffer):
                continue
            if buffer not in copies:
                copies[buffer] = buffer.clone()
            module._buffers[name] = copies[buffer]


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Count the entries of a model's parameters as they are used, and those that are not zero."""
    entries = left = 0
    counted: set[Tensor] = set()
    for module in model.modules():
        for value, sources in _used(module):
            if not counted.issuperset(sources):
                entries += value.numel()
                left += int(value.count_nonzero())
            counted.update(sources)
    return entries, left


def _used(module: nn.Module) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Yield the tensors that a module computes with, each with the parameters that it is from."""
    own = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, parametrization in module.parametrizations.items():
            yield getattr(module, name), list(parametrization.parameters())
    for name, parameter in own.items():
        stem, _, ending = name.rpartition("_")
        value = vars(module).get(stem) if ending in ("orig", "g", "v") else None
        if isinstance(value, Tensor):  # by a hook of `_COMPUTES_AN_ATTRIBUTE`
            yield value, [p for n, p in own.items() if n.rpartition("_")[0] == stem]
        else:
            yield parameter, [parameter]


def _layer(name: str, module: nn.Module, weight: Tensor, trace: Trace) -> LayerSparsity:
    left = int(weight.count_nonzero())
    reads, computes = trace.reads[module], trace.computes[module]
    unread = trace.unread.get(module)
    removed = ~computes if unread is None else ~computes | unread
    positions = trace.positions.get(module)
    return LayerSparsity(
        name=name,
        kind=type(module).__name__,
        weights=weight.numel(),
        weights_left=left,
        flops=None if positions is None else round(2 * weight.numel() * positions),
        flops_left=None if positions is None else round(2 * left * positions),
        inputs=reads.numel(),
        inputs_removed=int((~reads).sum()),
        neurons=computes.numel(),
        neurons_removed=int(removed.sum()),
    )


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _share(left: int | None, total: int | None) -> str:
    if left is None or total is None:
        return "not counted"
    return f"{left}/{total} ({left / max(total, 1):.1%})"
