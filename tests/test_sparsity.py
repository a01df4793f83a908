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


ACTIVATIONS = {
    **{name: getattr(nn.functional, name) for name in ("relu", "relu6", "hardtanh", "hardsigmoid")},
    **{name: getattr(nn.functional, name) for name in ("hardswish", "hardshrink", "softshrink")},
    **{
        name: getattr(nn.functional, name) for name in ("gelu", "silu", "mish", "elu", "logsigmoid")
    },
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "erf")},
    "tanhshrink": nn.functional.tanhshrink,
    "softmax": lambda x: x.softmax(-1),
    "threshold": lambda x: nn.functional.threshold(x, 0.5, 0.0),
    "clamp": lambda x: x.clamp(0, 1),
    "where": lambda x: torch.where((x > 0) & (x < 6), x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0).masked_fill(x > 6, 6.0),
    "minimum": lambda x: torch.minimum(torch.maximum(x, x.new_zeros(())), x.new_tensor(6.0)),
    "gate": lambda x: x * nn.functional.relu6(x + 3) / 6,
}


class TwoLayers(nn.Module):
    def __init__(self, activation, inputs=32, hidden=64):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, hidden), nn.Linear(hidden, 10)
        self.activation = activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_flat_activation_hides_no_reader(activation):
    for seed in range(8):
        torch.manual_seed(seed)
        model, x = TwoLayers(ACTIVATIONS[activation]), torch.randn(1 + seed // 4, 32)
        with torch.no_grad():
            model.a.weight *= 10.0 ** (seed % 3)
        assert tk.sparsity(model, x).neurons_removed == 0
        with torch.no_grad():
            model.b.weight[:, [2, 5, 6]] = 0
        # A softmax reads every unit for its sum.
        unread = 0 if activation == "softmax" else 3
        assert tk.sparsity(model, x).neurons_removed == unread


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.value, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.value(x)
        return h * nn.functional.hardsigmoid(self.gate(h))


def test_unread_neurons_are_seen_at_any_depth():
    model = nn.Sequential(*(Gated() for _ in range(10)), nn.Linear(8, 3))
    x = torch.randn(2, 8)
    assert tk.sparsity(model, x).neurons_removed == 0
    with torch.no_grad():
        model[9].gate.weight[:, :2] = 0
        model[10].weight[:, :2] = 0
    assert tk.sparsity(model, x).neurons_removed == 2 + 2


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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("has_run", [False, True])
def test_a_compiled_model_is_measured_uncompiled(in_place, has_run):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, x = TwoLayers(torch.relu, 6, 8), torch.randn(3, 6)
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    compiled = model if in_place else torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
    if has_run:
        compiled(x)
    left = tk.sparsity(compiled, x)
    assert (left.flops, left.neurons_removed) == (2 * (6 * 8 + 8 * 10), 1)
    assert len(graphs) == has_run
    compiled(x)
    assert len(graphs) == 1


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 6)], ids=["unseen", "run"])
@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"]
)
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_a_spectral_norm_is_left_as_it_was(norm, inputs):
    layer = norm(nn.Linear(6, 4))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    attribute = vars(layer).get("weight")
    assert tk.sparsity(layer, inputs).parameters == 6 * 4 + 4
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert vars(layer).get("weight") is attribute
    assert layer.training


def test_totals_count_a_computed_weight_as_the_layers_use_it():
    pruned = nn.utils.prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
    nn.utils.prune.l1_unstructured(pruned, "bias", 1)
    left = tk.sparsity(pruned)
    assert (left.layers[0].weights_left, left.parameters_left, left.parameters) == (12, 12 + 3, 28)
    with torch.no_grad():
        pruned.weight_orig.zero_()  # as a step does, before the next forward
    assert tk.sparsity(pruned).parameters_left == 3

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with torch.no_grad():
        normed.parametrizations.weight.original1[:, 0] = 0
    left = tk.sparsity(normed)
    assert (left.layers[0].weights_left, left.parameters_left, left.parameters) == (20, 24, 28)


def test_the_default_device_does_not_matter():
    model, x = convnet(), torch.randn(2, 1, 8, 8)
    with torch.device("meta"):
        left = tk.sparsity(model, x)
    assert left == tk.sparsity(model, x)


def test_an_example_without_a_batch_dim_costs_as_much_as_with_one():
    assert tk.sparsity(nn.Linear(6, 4), torch.randn(6)).flops == 2 * 6 * 4
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))
    x = torch.randn(3, 8, 8)
    assert tk.sparsity(conv, x) == tk.sparsity(conv, x.expand(5, -1, -1, -1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_neurons_has_no_flops():
    left = tk.sparsity(nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3)), torch.randn(2, 6))
    assert (left.flops, left.neurons) == (0, 3)
    assert "0/0" in str(left)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # whose category differs from version to version
def test_a_model_that_cannot_be_looked_into_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1 \(LazyLinear\) is lazy .* run the model once"):
        tk.sparsity(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(TypeError, match=r"torch\.jit.* pass the nn\.Module"):
            tk.sparsity(model, torch.randn(2, 6))
    helped = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.ReLU()))
    assert tk.sparsity(helped, torch.randn(2, 6)).flops == 48


@pytest.mark.parametrize("model", [3, None, nn.Linear, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_refused_by_its_type(model):
    with pytest.raises(
        TypeError, match=rf"^model must be a torch.nn.Module, got {type(model).__name__}$"
    ):
        tk.sparsity(model)


def test_a_parameter_on_the_meta_device_is_named():
    with pytest.raises(ValueError, match=r"^weight of model \(Linear\) is on the meta device"):
        tk.sparsity(nn.Linear(3, 2, device="meta"))
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, device="meta"))
    with pytest.raises(ValueError, match=r"^weight of 1 \(BatchNorm1d\) is on the meta device"):
        tk.sparsity(model, torch.randn(4, 3))


def test_table_and_dict():
    left = tk.sparsity(convnet(), torch.randn(1, 1, 8, 8))
    lines = str(left).splitlines()
    assert len(lines) == 5
    assert "weights left" in lines[0]
    assert lines[-1].startswith("all parameters")
    figures = json.loads(json.dumps(left.as_dict()))
    assert figures["layers"][0]["kind"] == "Conv2d"
    assert figures["parameters_fraction"] == left.parameters_fraction


def test_the_tables_cells_are_the_layers():
    model = convnet()
    with torch.no_grad():
        model[4].weight[7] = 0
        model[6].weight[:, [3, 7]] = 0
    left = tk.sparsity(model, torch.randn(1, 1, 8, 8))
    _, _, _, last, total = left.rows()
    assert last == ["6", "140/160 (87.5%)", "280/320 (87.5%)", "2/16", "0/10"]
    assert total[3:] == ["", "2/34"]
    assert left.flops_fraction == left.flops_left / left.flops < 1
    assert left.parameters_fraction == left.parameters_left / left.parameters < 1


class Largest(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(1, 2)

    def forward(self, x):
        return self.b(self.a(x).amax(1, keepdim=True))


def test_a_unit_that_is_the_largest_in_one_look_alone_is_read():
    assert tk.sparsity(Largest(), torch.randn(1, 4)).neurons_removed == 0


@pytest.mark.parametrize("beyond", [50, 1000])
def test_a_gate_that_opens_far_off_hides_no_reader(beyond):
    model, x = TwoLayers(lambda h: h * (h.abs() > beyond)), torch.randn(2, 32)
    assert tk.sparsity(model, x).neurons_removed == 0
