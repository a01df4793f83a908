"""Random tensors for property tests."""

import math
import re

import numpy as np
import torch
from hypothesis import strategies as st


@st.composite
def tensors(draw, min_dims=1):
    """Draw a dense tensor of random shape, order of dims in memory and offset into its storage."""
    shape = draw(st.lists(st.integers(1, 5), min_size=min_dims, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    offset = draw(st.integers(0, 3))
    seed = draw(st.integers(0, 2**31))
    values = np.random.default_rng(seed).normal(size=math.prod(shape) + offset)
    dense = torch.from_numpy(values)[offset:].view([shape[dim] for dim in order])
    return dense.permute([order.index(dim) for dim in range(len(shape))])


def has_view(tensor, group_by):
    """Return whether the group dims lie in at most two stretches of memory, as a view needs."""
    if group_by != "filter_slice":
        return True  # one group dim, or all but one: always so
    dims = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    dims.sort(key=lambda dim: -tensor.stride(dim))
    kinds = "".join("G" if dim < 2 else "R" for dim in dims)
    return re.fullmatch("G*R*G*R*", kinds) is not None
