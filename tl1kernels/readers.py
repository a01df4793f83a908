"""Who reads a layer's units: a look at how data flows through a model, for `sparsity`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl1kernels.groups import CONVOLUTIONS, TRANSPOSED

LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)

# Functions of one value, or a choice between values, that are flat in places or everywhere: by
# their autograd nodes, "ReluBackward0" for one.
_FLAT_IN_PLACES = frozenset(
    f"{name}Backward"
    for name in (
        *("Relu", "Threshold", "Hardtanh", "Clamp", "ClampMin", "ClampMax"),
        *("Hardsigmoid", "Hardswish", "Hardshrink", "Softshrink"),
        *("LeakyRelu", "PreluKernel", "RreluWithNoise"),
        *("Elu", "Celu", "Gelu", "Silu", "Mish", "Softplus", "LogSigmoid"),
        *("Sigmoid", "Tanh", "Exp", "Erf", "Softmax"),
        *("Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Div", "Bernoulli", "Poisson"),
        *("Where", "MaskedFill", "Maximum", "Minimum"),
    )
)
# Functions of each element alone, by which something without grad may come from something with.
_ELEMENTWISE = frozenset(
    f"{before}{name}{after}"
    for name in (
        *("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "xor", "invert", "neg", "abs"),
        *("add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "rtruediv", "pow"),
    )
    for before, after in (("", ""), ("__", "__"))
) | {
    *("logical_and", "logical_or", "logical_xor", "logical_not", "where", "masked_fill"),
    *("to", "type_as", "float", "double", "half", "bfloat16", "bool", "int", "long"),
    *("detach", "clone", "contiguous", "round", "floor", "ceil", "trunc", "sign", "sgn"),
    *("relu", "sigmoid", "tanh", "exp", "clamp", "heaviside", "maximum", "minimum"),
}
# Functions that make numbers or an array of a tensor.
_NUMBERS = frozenset(
    f"__{name}__" for name in ("array", "dlpack", "bool", "float", "int", "index", "complex")
) | {"item", "tolist", "numpy"}
# Functions that ask whether values are numbers at all, or for shape and kind alone.
_NO_VALUES = re.compile("is(nan|inf|posinf|neginf|finite)")
_KIND_OF_THE_SECOND = re.compile("to|.*_as")
_KIND_OF_THE_FIRST = re.compile("new_.*|.*_like")
_IN_PLACE = re.compile(".*[^_]_|__i(?!nvert)[a-z]+__|__setitem__|__set__")


class Trace:
    """One look at how data flows between the layers of a model.

    Each layer's output is replaced by a leaf, so that gradients at it come only from what reads
    this output directly: live inputs of other layers, and the model's output. Their random
    positive multiples have gradient zero, unit by unit, exactly where nobody reads.
    Three things keep readers from hiding. Where an activation is flat (`_FLAT_IN_PLACES`) the
    gradient passes as if it were not. Where autograd does not follow, `_Watch` does. And
    so that no gate stays shut and no maximum is always another unit's, the leaves' values change
    while some unit seems unread: the real output first, then random values around zero, then
    around the real output, on several scales and each with both signs. Those that the model
    refuses are left out.
    """

    # A leaf is the first times the real output plus the second times random values.
    ROUNDS = (
        *((1, 0.0), (0, 1.0), (0, -1.0)),
        *((1, scale) for scale in (1.0, -1.0, 1e2, -1e2, 1e4, -1e4)),
    )

    def __init__(self, weights: dict[nn.Module, Tensor]) -> None:
        self.spatial_dims = {layer: weight.ndim - 2 for layer, weight in weights.items()}
        alive = {layer: _alive(layer, weight) for layer, weight in weights.items()}
        self.weights = {layer: layer._parameters.get("weight") for layer in weights}
        self.reads = {layer: reads for layer, (reads, _) in alive.items()}
        self.computes = {layer: computes for layer, (_, computes) in alive.items()}
        self.real: dict[nn.Module, list[Tensor]] = {}  # outputs by use
        self.positions: Mapping[nn.Module, float] = {}
        self.unread: dict[nn.Module, Tensor] = {}
        self.counted: dict[nn.Module, int] = {}  # of one call, as the next two
        self.outputs: list[tuple[nn.Module, Tensor]] = []
        self.read: list[Tensor] = []
        self.blind = False  # something was read where neither autograd nor the watch looks
        self.watch = _Watch(self)

    def run(self, model: nn.Module, inputs: Any) -> None:
        """Fill `positions` (output positions per example) and `unread` (bool by unit)."""
        if isinstance(inputs, dict):
            args, kwargs = (), {name: _cloned(x) for name, x in inputs.items()}
        else:
            args = tuple(map(_cloned, inputs if isinstance(inputs, tuple) else (inputs,)))
            kwargs = {}
        self.batch = _batch_size([*args, *kwargs.values()])
        with ExitStack() as stack:
            for layer in self.reads:
                before = layer.register_forward_pre_hook(self.watch.pause)
                stack.callback(before.remove)
                after = layer.register_forward_hook(self._hook, with_kwargs=True)
                stack.callback(after.remove)
            for around, scale in self.ROUNDS:
                self.around, self.scale = around, scale
                self.generator = torch.Generator().manual_seed(int(abs(scale)) + around)
                first = not self.positions
                try:
                    self._round(model, args, kwargs)
                except Exception:  # the model's: of any kind
                    self.blind = self.blind or first  # for it may take gradients of its own
                suspects = (unread & self.computes[m] for m, unread in self.unread.items())
                if self.blind or not any(bool(units.any()) for units in suspects):
                    break
            if self.blind and not self.positions:
                self._call(model, args, kwargs)  # as it is; what is wrong with the inputs is raised
                self.positions = self.counted
        self.positions = {m: n / self.batch for m, n in self.positions.items()}
        if self.blind:
            self.unread = {}
        self.real, self.outputs, self.read = {}, [], []
        del self.watch  # and what it holds, without waiting for the garbage collector

    def _call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.counted, self.outputs, self.read = {}, [], []
        self.watch.begin()
        result = model(*args, **kwargs)
        if self.outputs and self._unit_dim(*self.outputs[0]) == 0:
            self.batch = 1
        return result

    def _round(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.watch:
            result = self._call(model, args, kwargs)
        self._add_read(result)
        # A backward pass that recomputes calls the hooks again; what they note then is dropped.
        outputs, read, positions = self.outputs, self.read, self.counted
        self.counted, self.outputs, self.read = {}, [], []
        if not self.real:
            for layer, leaf in outputs:
                self.real.setdefault(layer, []).append(leaf.detach())
        leaves = [leaf for _, leaf in outputs]
        if not leaves or not read:
            self.blind, self.positions = True, positions
            return
        total = torch.stack([part.to(read[0]) for part in read]).sum()
        _pass_where_flat(total)
        # What is computed again here, the watch does not see: if it took part, torch raises.
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        self.positions = self.positions or positions  # of the real values
        for (layer, leaf), gradient in zip(outputs, gradients, strict=True):
            unit_dim = self._unit_dim(layer, leaf)
            others = [dim for dim in range(leaf.ndim) if dim != unit_dim]
            silent = torch.ones(leaf.shape[unit_dim], dtype=torch.bool, device=leaf.device)
            if gradient is not None:
                silent = (gradient == 0).all(others) if others else gradient == 0
            known = self.unread.get(layer)
            self.unread[layer] = silent if known is None else known & silent

    def _hook(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        try:
            return self._replaced(layer, args[0] if args else kwargs["input"], output)
        finally:
            self.watch.go_on()

    def _replaced(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Note what a layer reads and count its positions; return what stands for its output."""
        unit_dim = self._unit_dim(layer, x)
        counted = x if isinstance(layer, TRANSPOSED) else output
        positions = math.prod(counted.shape[:unit_dim]) * math.prod(counted.shape[unit_dim + 1 :])
        self.counted[layer] = self.counted.get(layer, 0) + positions
        self.blind = self.blind or not torch.is_grad_enabled()
        if self.blind:
            self.outputs.append((layer, output))
            return output
        reads = self.reads[layer]
        weight = layer._parameters.get("weight")
        if weight is not self.weights[layer] and isinstance(weight, Tensor):  # functional_call
            self._add_read([weight] if weight.requires_grad else [])
            reads = reads | _alive(layer, weight.detach())[0]
        shape = [1] * x.ndim
        shape[unit_dim] = -1
        live = self.watch.followed(x)
        if live.requires_grad:
            self._add_read(live * reads.view(shape))
        leaf = self._leaf(layer, output.detach())
        self.outputs.append((layer, leaf))
        return leaf.clone()  # an in-place activation may follow

    def _leaf(self, layer: nn.Module, output: Tensor) -> Tensor:
        # Not around `output`: made from other leaves, it would grow with each layer.
        uses = self.real.get(layer, [])
        use = sum(earlier is layer for earlier, _ in self.outputs)
        real = uses[use] if use < len(uses) and uses[use].shape == output.shape else output
        if self.scale == 0:
            return real.requires_grad_()
        size = real.float().square().mean().sqrt().clamp(min=1e-3).to(real) if self.around else 1
        noise = self._random(real) * torch.where(self._random(real) < 1, -1, 1)
        return (self.around * real + self.scale * size * noise).requires_grad_()

    def _unit_dim(self, layer: nn.Module, tensor: Tensor) -> int:
        """Return the dim of a layer's input or output that counts features or channels."""
        return tensor.ndim - 1 - self.spatial_dims[layer]

    def _add_read(self, value: Any) -> None:
        if isinstance(value, Tensor) and not value.requires_grad:
            value = [*self.watch.sources(value).values()] or value
        if isinstance(value, Tensor) and value.requires_grad:
            value = torch.view_as_real(value) if value.is_complex() else value
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
        # On the CPU, whatever the default device: the same values everywhere.
        values = torch.rand(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (values + 0.5).to(like)


class _Watch(TorchFunctionMode):
    """Follows what autograd does not, while a model runs.

    Where something without grad is computed from followed tensors, element by element (detached,
    compared, rounded), these are its sources; and where something with grad is computed from it,
    again element by element, the gradient goes on to the sources too (`_Also`). In all other cases
    the sources count as read.
    """

    MANY = 8  # sources are not followed further

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.begin()

    def begin(self) -> None:
        """Forget all sources."""
        self.paused = False
        # By the id of a tensor, with it: its sources by their ids, as they were then.
        self._sources: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        self._aliases: dict[int, Tensor] = {}  # by id: what writes to another tensor unseen

    def pause(self, *_: Any) -> None:
        """Look away: a layer computes, whose readers are known."""
        self.paused = True

    def go_on(self) -> None:
        """Look again."""
        self.paused = False

    def sources(self, x: Tensor) -> dict[int, Tensor]:
        """Return what a tensor without grad was computed from."""
        return self._sources.get(id(x), (x, {}))[1]

    def followed(self, x: Tensor) -> Tensor:
        """Return `x`, with a gradient for its sources; what that cannot reach counts as read."""
        return x if x.requires_grad else self._with(x, self.sources(x).values())

    def _with(self, x: Tensor, sources: Iterable[Tensor]) -> Tensor:
        for source in sources:
            if x.is_floating_point() and source.is_floating_point() and _fits(source, x):
                with torch.enable_grad():
                    x = _Also.apply(x, source)
            else:
                self._count([source])
        return x

    def _count(self, sources: Iterable[Tensor]) -> None:
        with torch.enable_grad():
            self.trace._add_read([*sources])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.paused or _NO_VALUES.fullmatch(name):
            return func(*args, **kwargs)
        given = args[:1] if _KIND_OF_THE_SECOND.fullmatch(name) else [*args, kwargs]
        given = [*_tensors(given[1:] if _KIND_OF_THE_FIRST.fullmatch(name) else given)]
        hidden: dict[int, Tensor] = {}
        for x in given:
            hidden |= {} if x.requires_grad else self.sources(x)
        seen = {id(x): x for x in given if x.requires_grad}
        if _IN_PLACE.fullmatch(name):
            return self._written(func, name, args, kwargs, seen, hidden)
        result = func(*args, **kwargs)
        if func == _DATA or name == "detach":
            self._aliases[id(result)] = result
        if not seen and not hidden:
            return result
        elementwise = isinstance(result, Tensor) and (name in _ELEMENTWISE or func == _DATA)
        results = [*_tensors([result])]
        if any(x.requires_grad for x in results):
            if elementwise:
                return self._with(result, hidden.values())
            self._count(hidden.values())
            for x in results:  # an argmax beside a maximum
                if not x.requires_grad:
                    # Flat, for the elements of one are not those of the other.
                    self._follow(x, {i: source.flatten() for i, source in seen.items()}, {})
        elif elementwise and all(_fits(x, result) for x in (*seen.values(), *hidden.values())):
            self._follow(result, seen, hidden)
        elif results or name in _NUMBERS:
            self._count([*seen.values(), *hidden.values()])
        return result

    def _follow(self, x: Tensor, seen: dict[int, Tensor], hidden: dict[int, Tensor]) -> None:
        if len(seen) + len(hidden) > self.MANY:
            self._count([*seen.values(), *hidden.values()])
            return
        with torch.enable_grad():  # copies, for what is seen may be written to
            self._sources[id(x)] = x, hidden | {i: source.clone() for i, source in seen.items()}

    def _written(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seen: dict[int, Tensor],
        hidden: dict[int, Tensor],
    ) -> Any:
        """Call a function that writes to its first argument."""
        target = args[0]
        hidden.pop(id(target), None)  # it is what it was, but where it is written to
        self._count(hidden.values())
        if name == "detach_":
            self._count(seen.values())
        others = [x for x in seen.values() if x is not target]
        result = func(*args, **kwargs)
        lost = name == "__set__" or id(target) in self._aliases
        if lost or not torch.is_grad_enabled() or not target.requires_grad:
            self._count(others)
        return result


_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def _fits(source: Tensor, result: Tensor) -> bool:
    """Return whether one tensor can be expanded to the shape of another."""
    pairs = zip(reversed(source.shape), reversed(result.shape), strict=False)
    return source.ndim <= result.ndim and all(n in (1, m) for n, m in pairs)


class _Also(torch.autograd.Function):
    """A tensor as it is, whose gradient goes in part to another one, too.

    In part, for z + (q - z).detach() must not become q alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, source: Tensor) -> Tensor:
        return x.clone()  # no view, which could not be written to

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.shape, ctx.dtype = inputs[1].shape, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, _PART * gradient.sum_to_size(ctx.shape).to(ctx.dtype)


_PART = 0.37


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples, dicts and slices."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from _tensors(value)
        elif isinstance(value, slice):
            yield from _tensors((value.start, value.stop, value.step))


def _pass_where_flat(total: Tensor) -> None:
    """Let gradients of `total` pass activations as if those were flat nowhere."""
    seen = set()
    todo = [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(before for before, _ in node.next_functions)
        if node.name().rstrip("0123456789") in _FLAT_IN_PLACES:
            node.register_hook(_straight_through)


def _straight_through(
    gradients: tuple[Tensor | None, ...], after: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Replace zeros of an activation's gradients by a part of the gradient that reaches it.

    A part, for x - tanh(x) must not become flat in turn.
    """
    out = after[0]
    return tuple(
        g
        if g is None or out is None or g.shape != out.shape
        else torch.where(g == 0, _PART * out, g)
        for g in gradients
    )


def _cloned(value: Any) -> Any:
    """Return tensors as copies that autograd may keep, whatever mode made them."""
    return value.clone() if isinstance(value, Tensor) else value


def _batch_size(values: Iterable[Any]) -> int:
    sizes = [x.shape[0] for x in values if isinstance(x, Tensor) and x.ndim]
    if 0 in sizes:
        raise ValueError("example_inputs must hold at least one example, got a batch of 0")
    return sizes[0] if sizes else 1


def _alive(layer: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return which input units have a nonzero weight, and which output units: two bool vectors."""
    # (out, in / groups, positions); for transposed convolutions (in, out / groups, positions)
    nonzero = weight.ne(0).unsqueeze(-1).flatten(2)
    groups = layer.groups if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 1
    parts = nonzero.any(2).chunk(groups, 0)
    first = torch.cat([part.any(1) for part in parts])
    second = torch.cat([part.any(0) for part in parts])
    return (first, second) if isinstance(layer, TRANSPOSED) else (second, first)
