"""sparsity: counts done by hand, on chains, residual connections, groups and shared layers."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tl1kernels as tk


def convnet():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10)),
    )


def test_a_dense_network_has_torchs_flops_and_nothing_removed():
    model, x = convnet(), torch.randn(3, 1, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    left = tk.sparsity(model, x)
    assert left.flops == left.flops_left == counter.get_total_flops() // 3
    assert left.parameters == sum(p.numel() for p in model.parameters())
    assert left.parameters_left == sum(int((p != 0).sum()) for p in model.parameters())
    assert left.neurons == 8 + 16 + 10
    assert left.neurons_removed == 0


def test_neurons_without_ingoing_or_without_outgoing_weights_are_removed():
    model = convnet()
    with torch.no_grad():
        model[0].weight[5] = 0  # no ingoing weights
        model[4].weight.view(16, 8, 16)[:, 2] = 0  # nobody reads channel 2
        model[4].weight[7] = 0
        model[6].weight[:, [3, 7]] = 0
    for batch in (1, 2):
        conv, fc1, fc2 = tk.sparsity(model, torch.zeros(batch, 1, 8, 8)).layers
        assert (conv.neurons_removed, fc1.neurons_removed, fc2.neurons_removed) == (2, 2, 0)
        assert (conv.inputs_removed, fc1.inputs_removed, fc2.inputs_removed) == (0, 16, 2)
        assert conv.weights_left == 72 - 9
        assert conv.flops_left == 2 * 63 * 64
    without = tk.sparsity(model)
    assert without.flops is None
    assert without.flops_fraction is None
    assert without.neurons_removed == 2  # ingoing weights alone can be seen


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        h = self.a(x)
        h = h + torch.relu(self.norm(self.b(torch.relu(h))))
        return {"y": torch.softmax(self.c(torch.relu(h)), -1)}


def test_a_neuron_with_two_readers_needs_both_to_ignore_it():
    model = Residual()
    with torch.no_grad():
        model.c.weight[:, [1, 2]] = 0
        model.b.weight[:, 1] = 0
    a, b, c = tk.sparsity(model, torch.randn(3, 4)).layers
    assert (a.neurons_removed, b.neurons_removed, c.neurons_removed) == (1, 2, 0)


def test_grouped_and_transposed_convolutions():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 3, 1, bias=False),
    )
    with torch.no_grad():
        model[0].weight[:3, 1] = 0  # input channel 1, read by the first three filters only
        model[1].weight[4] = 0  # input channel 4
        model[1].weight[:3, 1] = 0  # output channel 1
    x = torch.randn(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    left = tk.sparsity(model, x)
    first, second, third = left.layers
    assert (first.inputs, first.inputs_removed, first.neurons_removed) == (4, 1, 1)
    assert (second.inputs_removed, second.neurons, second.neurons_removed) == (1, 4, 1)
    assert third.neurons_removed == 0
    assert left.flops == counter.get_total_flops() // 2


def test_tied_weights_count_once_and_a_shared_layer_per_use():
    shared = nn.Linear(5, 5, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    left = tk.sparsity(model, torch.randn(1, 5))
    assert left.parameters == 25
    assert len(left.layers) == 1
    assert left.flops == 2 * 2 * 25


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(input=h)


def test_no_neuron_of_a_dense_model_is_removed():
    """Whatever normalizes, gates, recomputes or hides: silence is not a missing weight."""
    shifted = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(inplace=True), nn.Linear(128, 10)
    )
    for _ in range(50):
        shifted(torch.rand(64, 64) * 255)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 4), nn.Softmax(-1))
    half = convnet().to(torch.bfloat16)
    vgg = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    attention = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    recomputed = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = recomputed

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = recomputed

        def forward(self, x):
            return self.body(x).argmax(1)

    for model, x in (
        (shifted, torch.rand(2, 64) * 255),
        (wide, torch.randn(1, 8)),
        (half, torch.randn(2, 1, 8, 8, dtype=torch.bfloat16)),
        (vgg, torch.randn(2, 1, 4, 4)),
        (attention, torch.randn(2, 5, 16)),
        (Frozen(), torch.randn(2, 4)),
        (Checkpointed(), torch.randn(2, 8)),
        (Classes(), torch.randn(2, 8)),
    ):
        left = tk.sparsity(model, x)
        assert left.neurons_removed == 0, model
        assert left.flops > 0


def test_unread_neurons_are_seen_through_batch_norm_and_in_inference_mode():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].running_mean.fill_(50)
        model[3].weight[:, [1, 4]] = 0
    assert tk.sparsity(model, torch.randn(4, 6)).neurons_removed == 2
    with torch.inference_mode():
        assert tk.sparsity(model, torch.randn(4, 6)).neurons_removed == 2
    assert tk.sparsity(model, {"input": torch.randn(4, 6)}).neurons_removed == 2


def test_a_layer_that_does_not_run_has_no_flops_and_an_empty_batch_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 5)})
    model.forward = lambda x: model["used"](x)
    left = tk.sparsity(model, torch.randn(2, 4))
    assert [layer.flops for layer in left.layers] == [24, None]
    assert left.flops == 24
    with pytest.raises(ValueError, match="example_inputs must hold at least one example"):
        tk.sparsity(model, torch.randn(0, 4))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    tk.sparsity(model, torch.randn(4, 4))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_table_and_dict():
    left = tk.sparsity(convnet(), torch.randn(1, 1, 8, 8))
    lines = str(left).splitlines()
    assert len(lines) == 5
    assert "weights left" in lines[0]
    assert lines[-1].startswith("all parameters")
    figures = json.loads(json.dumps(left.as_dict()))
    assert figures["layers"][0]["kind"] == "Conv2d"
    assert figures["parameters_fraction"] == left.parameters_fraction
