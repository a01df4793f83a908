"""Groups as a view of memory: the right weights in the right group, without a copy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import has_view, tensors
from tl1kernels import oracles
from tl1kernels.views import GROUP_BY, view_of


def numbered(tensor):
    """Return the tensor with each weight replaced by its position in memory."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64)
    flat = torch.as_strided(out, (tensor.numel(),), (1,))
    flat.copy_(torch.arange(tensor.numel()))
    return out


@given(tensor=tensors(min_dims=2), group_by=st.sampled_from([*GROUP_BY, None, 0, 1, -1, -2]))
def test_split_holds_each_group_in_one_slice_of_the_same_memory(tensor, group_by):
    if not has_view(tensor, group_by):
        with pytest.raises(ValueError, match="at most two stretches"):
            view_of(tensor, group_by)
        return
    view = view_of(tensor, group_by)
    split = view.split(tensor)
    assert split.shape == (view.blocks, view.outer, view.groups, view.inner)
    assert split.data_ptr() == tensor.data_ptr()
    assert view.join(split, tensor.shape).equal(tensor)
    # In memory order the four dims are plain C order: this is what kernels index by.
    assert view.split(numbered(tensor)).flatten().equal(torch.arange(tensor.numel()))
    if group_by is None:
        assert not view.grouped
        return
    index = torch.from_numpy(oracles.group_index(tuple(tensor.shape), group_by))
    by_group = view.split(index).permute(0, 2, 1, 3).reshape(view.n_groups, view.group_size)
    assert (by_group == by_group[:, :1]).all()
    assert by_group[:, 0].unique().numel() == view.n_groups == index.max() + 1


@pytest.mark.parametrize(
    ("shape", "layout", "group_by", "expected"),
    [
        ((6, 4), "C", "out", (1, 1, 6, 4)),
        ((6, 4), "C", "in", (1, 6, 4, 1)),
        ((6, 4), "F", "in", (1, 1, 4, 6)),
        ((8, 4, 3, 3), "C", "out", (1, 1, 8, 36)),
        ((8, 4, 3, 3), "C", "in", (1, 8, 4, 9)),
        ((8, 4, 3, 3), "C", "in_spatial", (1, 8, 36, 1)),
        ((8, 4, 3, 3), "C", "filter_slice", (1, 1, 32, 9)),
        ((8, 4, 3, 3), "C", "layer", (1, 1, 1, 288)),
        ((8, 4, 3, 3), "channels_last", "in", (1, 72, 4, 1)),
        ((8, 4, 3, 3), "channels_last", "out", (1, 1, 8, 36)),
        ((8, 4, 3, 3), "channels_last", "filter_slice", (8, 9, 4, 1)),
        ((8, 1, 3, 3), "channels_last", "filter_slice", (1, 1, 8, 9)),
    ],
)
def test_the_views_of_common_weights(shape, layout, group_by, expected):
    tensor = torch.empty(shape)
    if layout == "F":
        tensor = torch.empty(shape[::-1]).T
    elif layout == "channels_last":
        tensor = tensor.to(memory_format=torch.channels_last)
    view = view_of(tensor, group_by)
    assert (view.blocks, view.outer, view.groups, view.inner) == expected
    assert view.n_groups * view.group_size == math.prod(shape)


def test_auto_is_in_for_matrices_out_for_filters_and_nothing_for_vectors():
    assert view_of(torch.empty(3, 4), "auto") == view_of(torch.empty(3, 4), "in")
    assert view_of(torch.empty(3, 4, 5), "auto") == view_of(torch.empty(3, 4, 5), "out")
    assert not view_of(torch.empty(3), "auto").grouped
    assert not view_of(torch.empty(()), "auto").grouped


@pytest.mark.parametrize(
    ("tensor", "group_by", "message"),
    [
        (torch.empty(3), "in", r"'in' needs at least 2 dims, got shape \(3,\)"),
        (torch.empty(()), "out", r"'out' needs at least 1 dims"),
        (torch.empty(()), 0, r"group_by=0 needs at least 1 dims, got shape \(\)"),
        (torch.empty(3), "in_spatial", "needs at least 2 dims"),
        (torch.empty(3), 1, r"group_by=1 must be a dim in \[-1, 0\]"),
        (torch.empty(4, 4)[:, :2], "in", r"dense.*strides \(4, 1\)"),
        (torch.empty(3).expand(4, 3), "in", r"dense.*strides \(0, 1\)"),
        (torch.empty(5, 6)[::2], None, "dense"),
        (torch.empty(4, 2, 5, 3).permute(1, 3, 0, 2), "filter_slice", "at most two stretches"),
    ],
)
def test_what_has_no_view_says_so(tensor, group_by, message):
    with pytest.raises(ValueError, match=message):
        view_of(tensor, group_by)


def test_dims_of_size_one_may_have_any_stride():
    tensor = torch.as_strided(torch.empty(12), (3, 1, 4), (4, 77, 1))
    view = view_of(tensor, "out")
    assert (view.outer, view.groups, view.inner) == (1, 3, 4)


def test_the_oracle_of_groups_is_right_on_a_case_done_by_hand():
    assert np.array_equal(oracles.group_index((2, 3), "in"), [[0, 1, 2], [0, 1, 2]])
    assert np.array_equal(oracles.group_index((2, 3), "out"), [[0, 0, 0], [1, 1, 1]])
