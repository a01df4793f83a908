"""param_groups: the layers it finds, the schedule, and what it leaves alone."""

import pytest
import torch
from torch import nn

import tl1kernels as tk


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(1, 4, 3)
        self.up = nn.ConvTranspose2d(4, 2, 3)
        self.bag = nn.EmbeddingBag(10, 8)
        self.norm = nn.LayerNorm((2, 6, 6))
        self.rms = nn.RMSNorm((2, 6, 6))
        self.attention = nn.MultiheadAttention(8, 2)
        self.hidden = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 10, bias=False)
        self.same = nn.Linear(8, 8, bias=False)
        self.same.weight = self.hidden.weight
        self.position = nn.Parameter(torch.zeros(1, 5, 8))


def by_name(groups):
    return {group["name"]: group for group in groups}


def test_every_parameter_is_in_exactly_one_group():
    model = Everything()
    groups = tk.param_groups(model, lam=0.1)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert set(held) == set(model.parameters())
    tk.ProxAdamW(groups)


def test_weights_are_regularized_and_nothing_else_is():
    model = Everything()
    groups = by_name(tk.param_groups(model, lam=0.1))
    assert list(groups) == [
        *("conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
        *("hidden.weight", "tied.weight", "unregularized"),
    ]
    rest = groups.pop("unregularized")
    assert rest["lam"] == 0
    spared = {id(p) for p in rest["params"]}
    for p in (
        model.embedding.weight,
        model.bag.weight,
        model.norm.weight,
        model.rms.weight,
        model.position,
        model.hidden.bias,
    ):
        assert id(p) in spared
    assert all(group["lam"] == 0.1 for group in groups.values())
    assert groups["hidden.weight"]["params"] == [model.hidden.weight]


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
def test_what_a_weight_is_computed_from_stays_unregularized_and_is_named():
    """A direction that became zero would make the weight NaN."""
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3))
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Linear(8, 3))
    spectral = nn.Sequential(nn.utils.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, 3))
    for model, last, name in (
        (old, "2.weight", "0.weight_v"),
        (new, "1.weight", ".original1"),
        (spectral, "1.weight", ".weight_orig"),
    ):
        with pytest.warns(RuntimeWarning, match=f"computed from 0.*{name}, which stay unregul"):
            groups = tk.param_groups(model, lam=10.0)
        assert [group["name"] for group in groups] == [last, "unregularized"]
        optimizer = tk.ProxSGD(groups, lr=0.1)
        for _ in range(3):
            loss = model(torch.randn(4, 5)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert model(torch.randn(4, 5)).isfinite().all()


def test_the_schedule_runs_from_mu_min_to_one_minus_mu_min():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    for mu_min in (0.0, 0.2, 0.5):
        groups = tk.param_groups(model, lam=0.1, mu_min=mu_min)[:-1]
        want = [mu_min + (1 - 2 * mu_min) * i / 4 for i in range(5)]
        assert [group["mu"] for group in groups] == pytest.approx(want)


def test_the_schedule_gives_way_to_mu_and_needs_both_terms():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def mus(**options):
        return [group["mu"] for group in tk.param_groups(model, lam=0.1, **options)[:-1]]

    assert mus(mu=0.7) == [0.7, 0.7]
    assert mus(penalty=None) == [None, None]
    assert mus(group_by=None) == [None, None]
    assert tk.param_groups(nn.Linear(3, 3), lam=0.1)[0]["mu"] == 0.5


def test_transposed_convolutions_group_by_the_same_neurons():
    model = nn.ConvTranspose2d(4, 2, 3, bias=False)
    assert tk.param_groups(model, lam=0.1)[0]["group_by"] == 1
    assert tk.param_groups(model, lam=0.1, group_by="out")[0]["group_by"] == 1
    assert tk.param_groups(model, lam=0.1, group_by="in")[0]["group_by"] == 0
    assert tk.param_groups(model, lam=0.1, group_by="layer")[0]["group_by"] == "layer"


def test_parameters_in_place_of_a_model_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        tk.param_groups(list(nn.Linear(3, 2).parameters()), lam=0.1)


def test_a_model_that_has_no_weights_yet_is_refused():
    """Else its weights, when they come, would be left alone in silence."""
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"0\.weight is an UninitializedParameter: run the model"):
        tk.param_groups(model, lam=1.0)
    model(torch.ones(1, 3))
    assert [group["name"] for group in tk.param_groups(model, lam=1.0)][:2] == [
        "0.weight",
        "2.weight",
    ]


def test_convolutions_with_groups_refuse_an_index_that_stands_for_several_neurons():
    transposed = nn.ConvTranspose2d(4, 4, 3, groups=2)
    assert tk.param_groups(transposed, lam=0.1)[0]["group_by"] == 0
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    assert tk.param_groups(depthwise, lam=0.1)[0]["group_by"] == "auto"
    plain = nn.ConvTranspose2d(4, 4, 3)
    for module, group_by in (
        (transposed, "out"),
        (plain, "in_spatial"),
        (depthwise, "in"),
        (depthwise, "in_spatial"),
    ):
        with pytest.raises(ValueError, match=f"group_by='{group_by}' does not name neurons"):
            tk.param_groups(module, lam=0.1, group_by=group_by)


def test_presets_are_the_regularizers_that_the_paper_compares():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    v = torch.randn(4, 5).double()
    want = {
        "l1": tk.prox(v, 0.5, penalty="l1"),
        "group_lasso": tk.prox(v, 0.5, penalty=None, group_by=1),
        "sparse_group_lasso": tk.prox(v, 0.5, penalty="l1", group_by=1, mu=0.5),
        "tl1": tk.prox(v, 0.5),
        "integrated_tl1": tk.prox(v, 0.5, group_by=1, mu=0.5),
        "cges": tk.prox(v, 0.5, penalty="cges", group_by=1, mu=0.5),
    }
    assert want.keys() == tk.PRESETS.keys()
    for name, options in tk.PRESETS.items():
        tk.ProxSGD(tk.param_groups(model, lam=0.1, **options))
        assert torch.equal(tk.prox(v, 0.5, **options), want[name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lam": -1}, ValueError, "lam must be"),
        ({"mu_min": 0.6}, ValueError, r"mu_min must be in \[0, 1/2\], got 0.6"),
        ({"mu_min": "low"}, TypeError, "mu_min must be a number"),
        ({"mu": 3}, ValueError, "mu must be"),
        ({"penalty": "l3"}, ValueError, "penalty must be"),
        ({"group_by": "row"}, ValueError, "group_by must be"),
        ({"group_by": 5}, ValueError, "group_by=5 must be a dim"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        tk.param_groups(nn.Linear(2, 2), **{"lam": 0.1, **options})


@pytest.mark.parametrize("n", [1, 2, 3])
def test_transposed_convolutions_of_any_dims_group_by_the_same_neurons(n):
    module = getattr(nn, f"ConvTranspose{n}d")(4, 2, 3, bias=False)
    groups = [tk.param_groups(module, lam=0.1, group_by=by)[0] for by in ("auto", "out", "in")]
    assert [group["group_by"] for group in groups] == [1, 1, 0]


def test_a_weight_whose_name_alone_is_like_weight_norms_is_regularized():
    module = nn.Module()
    module.weight_v = nn.Parameter(torch.ones(3, 4))
    groups = tk.param_groups(module, lam=0.1)  # warnings are errors here
    assert [group["name"] for group in groups] == ["weight_v"]
