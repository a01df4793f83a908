"""Who reads a unit: what leaves autograd is followed, and a model is left as it was."""

import gc
import time
import weakref

import pytest
import torch
from torch import nn

import tl1kernels as tk


class TwoLayers(nn.Module):
    """Hidden units, `dead` of which the second layer does not read."""

    def __init__(self, activation, inputs=6, hidden=8, dead=()):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, hidden), nn.Linear(hidden, 3)
        self.activation = activation
        with torch.no_grad():
            self.b.weight[:, list(dead)] = 0

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


def removed(model, x=None):
    """Return how many units of the first layer count as removed."""
    return tk.sparsity(model, torch.randn(4, 6) if x is None else x).layers[0].neurons_removed


def counted_without_grad(h):
    with torch.no_grad():
        return (h > 0).float() + h.floor()


def zeroed_where_negative(h):
    h[h < 0] = 0
    return h


def averaged(h, steps):
    mean = torch.zeros_like(h)
    for _ in range(steps):
        mean = 0.9 * mean + 0.1 * h.detach()
        h = h - mean
    return h


OUTSIDE_AUTOGRAD = {
    "detach": lambda h: h.relu().detach(),
    "data": lambda h: h.data * 2,
    "round": lambda h: torch.round(h * 16) / 16,
    "sign": torch.sign,
    "compared": lambda h: (h > 0).float(),
    "no_grad": counted_without_grad,
    "straight through": lambda h: h + (torch.round(h * 4) / 4 - h).detach(),
    "mask": lambda h: h * (h > 0),
    "mask, then in place": lambda h: torch.where(h > 0, h, 0.1 * h).add_(1.0),
    "in-place mask": lambda h: h.masked_fill_(h < 0, 0.0),
    "indexed": lambda h: zeroed_where_negative(h),
    "recurrence": lambda h: averaged(h, 4),
}


@pytest.mark.parametrize("function", OUTSIDE_AUTOGRAD)
def test_what_autograd_does_not_follow_hides_no_reader(function):
    """Unit by unit: one that only dead weights read is removed all the same."""
    assert removed(TwoLayers(OUTSIDE_AUTOGRAD[function])) == 0
    assert removed(TwoLayers(OUTSIDE_AUTOGRAD[function], dead=(2, 5, 6))) == 3


class Routed(nn.Module):
    """Experts chosen by an argmax, which nothing but the choice reads."""

    def __init__(self):
        super().__init__()
        self.router, self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        first = self.router(x).argmax(1, keepdim=True) == 0
        return torch.where(first, self.one(x), self.two(x))


class Scaled(nn.Module):
    """By one number, made of all units of a layer."""

    def __init__(self, number):
        super().__init__()
        self.a, self.b, self.number = nn.Linear(6, 8), nn.Linear(6, 3), number

    def forward(self, x):
        return self.b(x) * self.number(self.a(x))


class Quantized(nn.Module):
    """By the nearest of a few codes, whose distances to each unit decide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("codes", torch.linspace(-1, 1, 5))

    def forward(self, x):
        h = self.a(x)
        nearest = self.codes[(h.unsqueeze(-1) - self.codes).abs().argmin(-1)]
        return self.b(nearest)


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 1)
        with torch.no_grad():
            self.actor.weight[:, :4] = 0

    def forward(self, x):
        h = self.body(x).tanh()
        return self.actor(h), self.critic(h.detach())


@pytest.mark.parametrize(
    "model",
    [
        Routed(),
        Scaled(lambda h: h.mean().item()),
        Scaled(lambda h: float(h.detach().numpy().mean())),
        Scaled(lambda h: 2.0 if h.sum() > 0 else 1.0),
        Scaled(lambda h: torch.tensor(h.tolist()).mean()),
        Quantized(),
        ActorCritic(),
    ],
    ids=["argmax", "item", "numpy", "bool", "list", "codes", "critic"],
)
def test_a_unit_that_decides_something_is_read(model):
    assert tk.sparsity(model, torch.randn(4, 6)).neurons_removed == 0


def test_asking_for_shape_kind_or_health_reads_no_unit():
    def asked(h):
        assert not torch.isnan(h).any()
        return nn.functional.relu(h) + torch.zeros_like(h) + h.new_ones(h.shape)

    assert removed(TwoLayers(asked, dead=(0,))) == 1


class Sampled(nn.Module):
    """A normal distribution, which refuses a scale that is not positive."""

    def __init__(self, positive):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)
        self.mean, self.scale, self.positive = nn.Linear(8, 4), nn.Linear(8, 4), positive

    def forward(self, x):
        h = self.encoder(x).relu()
        normal = torch.distributions.Normal(self.mean(h), self.positive(self.scale(h)))
        return self.decoder(normal.rsample())


@pytest.mark.parametrize("positive", [torch.exp, nn.functional.softplus], ids=["exp", "softplus"])
def test_values_that_a_model_refuses_are_left_out(positive):
    torch.manual_seed(0)
    model, x = Sampled(positive), torch.randn(4, 6)
    assert tk.sparsity(model, x).neurons_removed == 0
    with torch.no_grad():
        model.mean.weight[:, 0] = 0
        model.scale.weight[:, 0] = 0
    assert tk.sparsity(model, x).neurons_removed == 1


class Potential(nn.Module):
    """Its output is a gradient that it takes itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x, create_graph=True)[0]


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        inner = torch.utils.checkpoint.checkpoint(self.a, x.requires_grad_(), use_reentrant=True)
        return self.b(inner.relu())


@pytest.mark.parametrize("kind", [Potential, Reentrant])
def test_a_model_that_takes_gradients_is_judged_by_ingoing_weights(kind):
    model = kind()
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.b.weight[:, 3] = 0
    left = tk.sparsity(model, torch.randn(4, 6))
    assert left.layers[0].neurons_removed == 2
    assert left.flops == 2 * (6 * 8 + model.b.weight.numel())


class Numbered(TwoLayers):
    def forward(self, x):
        return super().forward(x), torch.arange(len(x))


def test_with_an_output_that_no_unit_reaches_ingoing_weights_decide():
    assert removed(Numbered(torch.relu, dead=(0, 1))) == 0


def test_a_complex_output_is_followed():
    assert removed(nn.Sequential(TwoLayers(torch.relu, dead=(1,)), Spectrum())) == 1


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x)


def test_inputs_that_do_not_fit_raise_the_models_own_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tk.sparsity(TwoLayers(torch.relu), torch.randn(4, 7))


def test_buffers_that_a_model_writes_to_are_left_as_they_were():
    class Counting(TwoLayers):
        def __init__(self):
            super().__init__(torch.relu)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.calls += 1
            out = super().forward(x)
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
            return out

    model = Counting()
    buffers = dict(model.named_buffers())
    tk.sparsity(model, torch.randn(4, 6))
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(not buffer.any() and not buffer.requires_grad for buffer in buffers.values())


def written_without_grad(h):
    out = torch.zeros_like(h)
    with torch.no_grad():
        out.narrow(1, 0, 8).copy_(h)
    return out


def scaled_without_grad(h):
    gate = h.flip(1)
    h = h.clone()
    with torch.no_grad():
        h.mul_(gate)
    return h


def through_data(h):
    out = torch.zeros_like(h)
    out.data.copy_(h)
    return out


MIXED = {
    "layer norm": lambda h: nn.functional.layer_norm(h.detach(), (8,)),
    "length": lambda h: h / h.detach().norm(dim=1, keepdim=True),
    "stable exponential": lambda h: (h - h.detach().max(1, keepdim=True).values).exp(),
    "softmax": lambda h: h.detach().softmax(-1),
    "one of": lambda h: nn.functional.one_hot(h.argmax(1), 8).float(),
    "product": lambda h: h.detach() @ torch.ones(8, 8).triu(),
    "sum": lambda h: h.detach().cumsum(1),
    "permuted": lambda h: h.detach().flip(1),
    "order": lambda h: h.sort(1).indices.float(),
    "slice": lambda h: torch.ones(4, 8) * torch.ones(9)[: 1 + h.argmax()].sum(),
    "filled": lambda h: torch.full_like(h, 1.0) * h.mean().detach(),
    "count": lambda h: torch.ones(4, 8) * (h > 0).nonzero().numel(),
    "written without grad": written_without_grad,
    "scaled without grad": scaled_without_grad,
    "data": through_data,
}


@pytest.mark.parametrize("function", MIXED)
def test_what_mixes_units_outside_autograd_reads_all_of_them(function):
    """A unit that the second layer does not read decides what it reads of others."""
    assert removed(TwoLayers(MIXED[function], dead=(0, 3))) == 0


def test_a_layer_with_a_weight_that_others_compute_is_seen():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.hyper, self.b = nn.Linear(6, 8), nn.Linear(6, 24), nn.Linear(8, 3)

        def forward(self, x):
            weight = self.hyper(x).mean(0).view(3, 8)
            return torch.func.functional_call(self.b, {"weight": weight}, (self.a(x),))

    model = Hyper()
    nn.init.zeros_(model.b.weight)
    assert [layer.neurons_removed for layer in tk.sparsity(model, torch.ones(2, 6)).layers[:2]] == [
        0,
        0,
    ]


def test_many_sources_take_no_more_than_linear_time():
    def seconds(steps):
        model = TwoLayers(lambda h: averaged(h, steps), dead=(0,))
        began = time.process_time()
        removed(model)
        return time.process_time() - began

    seconds(10)
    assert seconds(400) < 40 * max(seconds(40), 0.01)


def test_nothing_is_kept_of_what_was_seen():
    seen = []

    def watched(h):
        seen.append(weakref.ref(h))
        return h.relu()

    model = TwoLayers(watched)
    gc.collect()
    gc.disable()
    try:
        tk.sparsity(model, torch.randn(4, 6))
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


def test_attributes_that_a_model_sets_are_left_as_they_were():
    class Stateful(TwoLayers):
        def __init__(self):
            super().__init__(torch.relu)
            self.state = None

        def forward(self, x):
            out = super().forward(x)
            self.state = out if self.state is None else self.state + out
            self.calls = 1
            self.register_buffer("last", out, persistent=False)
            return self.state

    model = Stateful()
    tk.sparsity(model, torch.randn(4, 6))
    assert model.state is None
    assert not hasattr(model, "calls")
    assert not hasattr(model, "last")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_part_goes_on_training():
    model = nn.Sequential(nn.Linear(6, 8), torch.jit.script(nn.Dropout(0.5)), nn.Linear(8, 3))
    model.train()
    tk.sparsity(model, torch.randn(4, 6))
    assert all(module.training for module in model.modules())
    assert (model[1](torch.ones(200)) == 0).any()


def test_flops_are_those_of_the_examples():
    """Of the real outputs, not of the values that look for readers; and of parts of examples."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 3)
            with torch.no_grad():
                self.one.weight[0] = 0

        def forward(self, x):
            first = self.router(x).argmax(1) == 0
            out = x.new_zeros(len(x), 3)
            out[first] = self.one(x[first])
            out[~first] = self.two(x[~first])
            return out

    model, x = Experts(), torch.randn(4, 6)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.weight[0, 0] = 1.0
    x[:, 0] = torch.tensor([1.0, -1.0, -1.0, -1.0])
    router, one, two = tk.sparsity(model, x).layers
    assert (router.flops, one.flops, two.flops) == (24, 2 * 18 // 4, 2 * 18 * 3 // 4)


def test_a_checkpoint_is_followed_unless_units_decide_something_in_it():
    class Checkpointed(TwoLayers):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

        def inner(self, x):
            return self.b(self.activation(self.a(x)))

    assert removed(Checkpointed(torch.relu, dead=(1, 2))) == 2
    decided = Checkpointed(lambda h: h.relu() if h.mean() > 0 else h, dead=(1, 2))
    assert removed(decided) == 0
