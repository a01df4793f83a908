"""Which weights of a model are regularized, and how strongly layer by layer: `param_groups`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from tl1kernels.penalties import PENALTIES, Regularizer, number
from tl1kernels.views import GroupBy, view_of

# Modules whose weight may be a matrix and is not a layer's: scales by position, rows by token.
_EXEMPT = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def param_groups(
    model: nn.Module,
    *,
    lam: float | Tensor,
    penalty: str | None = "tl1",
    a: float | Tensor | None = None,
    group_by: GroupBy = "auto",
    mu: float | Tensor | None = None,
    mu_min: float = 0.2,
    group_weight: str | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into param groups, one for each layer's weights.

    Regularized are the parameters of two or more dimensions with `weight` in their name of every
    module that is neither a normalization nor an embedding, in the order in which the model
    registers them. Everything else (biases, norm scales, embeddings) goes to a last group
    with lam = 0. A parameter shared by several modules is taken once, where it first appears.
    Also there, with a warning that names them, goes what a weight is computed from
    (`weight_norm`, `spectral_norm`, `torch.nn.utils.parametrize`): zeros of those are not the
    weight's zeros, and a direction or a singular value that became zero would make it NaN. So do
    FullyShardedDataParallel's flat pieces, of which nobody knows the groups.

    Where both terms are there (a penalty and groups), layer l of L gets, unless `mu` is given,

        mu_l = mu_min + (1 - 2 mu_min) * l / (L - 1),   l = 0..L-1

    so that group sparsity leads in the lower layers and single weights in the upper ones
    (Yoon & Hwang 2017; Ma et al. 2019, section 3). One layer alone gets 1/2. "l1_minus_l2", which
    needs no group term beside it, keeps mu = 1.

    Args:
        model: the network.
        lam: weight of the regularizer, >= 0.
        penalty, a, group_weight: as in `prox`.
        group_by: as in `prox`; "auto" is "out" for convolutions and "in" for linear layers.
        mu: weight of the elementwise term in every layer, in [0, 1]; None for the schedule.
        mu_min: least weight of either term in the schedule, in [0, 1/2].

    Returns:
        Dicts for `ProxSGD`, `ProxAdam` or `ProxAdamW`; `name` says which weight a group holds.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed; also where a
            module is lazy and has no weights yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options = {"lam": lam, "penalty": penalty, "a": a, "mu": mu, "group_weight": group_weight}
    Regularizer.of({**options, "group_by": group_by})
    if not 0 <= number("mu_min", mu_min) <= 0.5:
        raise ValueError(f"mu_min must be in [0, 1/2], got {mu_min}")

    weights, rest = _weights(model)
    groups: list[dict[str, Any]] = []
    for index, (name, module, weight) in enumerate(weights):
        by = _neurons(module, group_by)
        view = view_of(weight, by)
        shares = penalty is not None and PENALTIES[penalty].mu is None
        scheduled = mu is None and shares and view.grouped
        depth = index / (len(weights) - 1) if len(weights) > 1 else 0.5
        mu_l = mu_min + (1 - 2 * mu_min) * depth if scheduled else mu
        groups.append({"params": [weight], "name": name, **options, "mu": mu_l, "group_by": by})
    if rest:
        groups.append({"params": rest, "name": "unregularized", "lam": 0.0})
    return groups


def _neurons(module: nn.Module, group_by: GroupBy) -> GroupBy:
    """Return the `group_by` of a module's weight that names the neurons meant.

    A transposed convolution's weight is (in, out, ...). With `groups`, the second dim of either
    kind counts within a group, and one index stands for several neurons: refused.
    """
    divided = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups != 1
    refused: tuple[GroupBy, ...] = ("in", "in_spatial") if divided else ()
    dims: dict[GroupBy, GroupBy] = {}
    if isinstance(module, TRANSPOSED):
        refused = ("out", "in_spatial") if divided else ("in_spatial",)
        dims = {"auto": 0 if divided else 1, "out": 1, "in": 0}
    if group_by in refused:
        raise ValueError(f"group_by={group_by!r} does not name neurons of {module}")
    return dims.get(group_by, group_by)


def _is_normed(module: nn.Module, name: str) -> bool:
    """Return whether `torch.nn.utils.weight_norm` or `spectral_norm` make a weight of a parameter.

    It is a length or a direction, or what is divided by its largest singular value.
    """
    stem, _, ending = name.rpartition("_")
    if ending == "orig":
        vectors = dict(module.named_buffers(recurse=False)).keys()
        return {f"{stem}_u", f"{stem}_v"} <= vectors
    both = {f"{stem}_g", f"{stem}_v"}
    return name in both and both <= dict(module.named_parameters(recurse=False)).keys()


def is_flat_piece(parameter: Tensor) -> bool:
    """Return whether it is what FullyShardedDataParallel has made of weights."""
    return getattr(parameter, "_fsdp_flattened", False)


def _weights(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Tensor]], list[Tensor]]:
    """Return the (name, module, weight) to regularize, and all other parameters, each once."""
    weights, rest, computed = [], [], []
    seen: set[torch.nn.Parameter] = set()
    for path, module in model.named_modules():
        exempt = isinstance(module, _EXEMPT)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{path}.{name}".lstrip(".")
            if is_lazy(parameter):  # it has no dims yet, by which to know a weight
                kind = type(parameter).__name__
                raise ValueError(
                    f"model must have its weights, but {full_name} is an {kind}: run the model "
                    "once, model(example), before param_groups"
                )
            if is_flat_piece(parameter):
                rest.append(parameter)
                computed.append(full_name)
            elif isinstance(module, ParametrizationList) or _is_normed(module, name):
                rest.append(parameter)
                computed += [full_name] if parameter.ndim >= 2 else []
            elif parameter.ndim >= 2 and "weight" in name and not exempt:
                weights.append((full_name, module, parameter))
            else:
                rest.append(parameter)
    if computed:
        names = ", ".join(computed)
        warnings.warn(
            f"tl1kernels: weights are computed from {names}, which stay unregularized",
            RuntimeWarning,
            stacklevel=3,
        )
    return weights, rest
