"""`tl1kernels train digits`: the files it leaves, and what it promises."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import readme
from tl1kernels import cli
from tl1kernels.train import data, experiment, report, run
from tl1kernels.train.recipes import RECIPES

QUIET = Console(quiet=True)
NOWHERE = Path("no-such-folder")  # DIGITS needs no files


def digits(evaluate_on):
    return data.DATA["digits"].load("DIGITS", evaluate_on, NOWHERE)


def test_the_splits_are_disjoint_and_the_test_split_is_never_fitted_for_a_choice():
    choosing, final = digits("validation"), digits("test")
    sizes = [len(x) for x in (choosing.fit_inputs, choosing.eval_inputs, final.eval_inputs)]
    assert sizes == [1077, 360, 360]
    assert len(final.fit_inputs) == 1077 + 360

    def rows(images):
        return {tuple(image.flatten().tolist()) for image in images}

    test = rows(final.eval_inputs)
    assert not test & rows(final.fit_inputs)
    assert not test & rows(choosing.fit_inputs)
    assert not test & rows(choosing.eval_inputs)
    assert not rows(choosing.fit_inputs) & rows(choosing.eval_inputs)
    assert final.fit_inputs.shape[1:] == (1, 8, 8)
    assert 0 <= final.fit_inputs.min() <= final.fit_inputs.max() <= 1
    with pytest.raises(ValueError, match=r"evaluate_on must be .*'train'"):
        digits("train")


@pytest.mark.parametrize("dataset", readme.TRAINED)
def test_chosen_options_are_committed_with_their_command(dataset):
    """And the tables in the README are theirs."""
    file = json.loads(experiment.chosen_path(dataset).read_text())
    assert file["command"] == f"tl1kernels train {dataset} --search"
    assert file["chosen"].keys() == set(run.METHODS)
    table = json.loads((readme.RESULTS / dataset / "table2.json").read_text())
    shown = {row["method"]: (row["lam"], row["a"]) for row in table["rows"]}
    for method, row in file["chosen"].items():
        assert shown[method] == (row["lam"], row["a"])
        if method != "none":
            assert row["lam"] in RECIPES[dataset].lam[method]
            assert row["a"] in (experiment.SEARCH_A if method in experiment.SHAPED else (1.0,))


def result(method, lam, accuracy, parameters, a=1.0):
    return {
        "setting": {"method": method, "lam": lam, "a": a},
        "accuracy": accuracy,
        "sparsity": {"parameters_fraction": parameters},
    }


def test_choose_takes_the_most_accurate_within_the_budget_else_the_smallest_that_is_able():
    chosen = experiment.choose(
        [
            result("none", 0, 0.98, 1.0),
            result("l1", 1, 0.97, 0.11),
            result("l1", 2, 0.95, 0.10),
            result("l1", 3, 0.96, 0.09),
            result("l1", 3, 0.94, 0.09),  # the second seed: the mean is 0.95, and smaller
            result("l1", 4, 0.90, 0.01),
            result("group_lasso", 1, 0.97, 0.9),
            result("group_lasso", 2, 0.94, 0.5),
            result("group_lasso", 3, 0.60, 0.05),
        ]
    )
    assert {method: row["lam"] for method, row in chosen.items()} == {
        "none": 0,
        "l1": 3,
        "group_lasso": 2,
    }


def test_a_search_says_which_lam_is_at_the_edge_of_what_it_tried():
    lams = RECIPES["digits"].lam
    chosen = {
        "none": {"lam": 0.0},
        "l1": {"lam": lams["l1"][0]},
        "tl1": {"lam": lams["tl1"][1]},
        "scad": {"lam": RECIPES["digits"].grid[-1]},
    }
    assert experiment.at_the_edge("digits", chosen) == [
        "l1: lam 0.2 is the smallest that was tried",
        "scad: lam 2 is the largest that was tried",
    ]


def test_a_run_is_repeatable_and_uses_our_optimizer():
    setting = run.Setting("digits", "integrated_tl1", 0.3, 0.1, 1, "validation", epochs=2)
    (first, one), (second, two) = run.train(setting, NOWHERE), run.train(setting, NOWHERE)
    assert one["accuracy"] == two["accuracy"]
    assert all(
        torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True)
    )
    optimizer = run.make_optimizer(first, setting)
    assert [g["mu"] for g in optimizer.param_groups[:3]] == pytest.approx([0.2, 0.5, 0.8])
    assert [g["lam"] for g in optimizer.param_groups] == [0.3, 0.3, 0.3, 0.0]


def test_the_command_writes_everything_it_says(tmp_path, capsys):
    command = ["train", "digits", "--out", str(tmp_path), "--seeds", "1", "--epochs", "2"]
    methods = ["--methods", "none", "group_lasso", "integrated_tl1"]
    assert cli.main([*command, *methods]) == 0
    printed = capsys.readouterr().out
    for text in ("DIGITS, test split", "accuracy", "FLOPs", "integrated TL1", "filters.png"):
        assert text in printed
    table = json.loads((tmp_path / "table2.json").read_text())
    assert table["command"].startswith("tl1kernels train digits --seeds 1 --methods none")
    assert [row["method"] for row in table["rows"]] == ["none", "group_lasso", "integrated_tl1"]
    with (tmp_path / "table2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["parameters"]) == table["rows"][2]["parameters"]
    assert rows[2]["command"] == table["command"]
    for picture in ("fig4-curves.png", "fig6-filters.png"):
        content = (tmp_path / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert table["command"].encode() in content
    # A plain module that knows nothing of this package loads the model.
    plain = nn.Sequential()
    for name, module in RECIPES["digits"].network().named_children():
        plain.add_module(name, module)
    plain.load_state_dict(torch.load(tmp_path / "models" / "integrated_tl1.pt", weights_only=True))
    judged = run.accuracy(plain, digits("test"))
    assert judged == pytest.approx(table["rows"][2]["accuracy"] / 100)


def test_tables_alone_need_no_other_lam(tmp_path, capsys):
    command = ["train", "digits", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1"]
    assert cli.main([*command, "--methods", "none", "tl1", "--tables"]) == 0
    assert "Fig. 4" not in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    assert not list(tmp_path.glob("fig4*"))
    table = json.loads((tmp_path / "table2.json").read_text())
    assert table["command"].endswith("--tables --methods none tl1 --epochs 1")
    assert len(table["rows"]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--tables", "--paper"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_measures_of_the_last_layer_separate_dead_neurons_from_zeros_among_the_rest():
    last = {"weights": 100, "weights_left": 30, "inputs": 10, "inputs_removed": 4}
    left = {"flops_fraction": 0.5, "parameters_fraction": 0.25, "neurons": 8, "neurons_removed": 2}
    got = report.measures({"accuracy": 0.9, "sparsity": {**left, "layers": [last]}})
    assert got == pytest.approx(
        {
            "accuracy": 90,
            "flops": 50,
            "parameters": 25,
            "neurons_removed": 25,
            "last_inputs_removed": 40,
            "last_zeros": 50,
        }
    )


def row(method, accuracy=97.0, parameters=5.0, flops=20.0, a=1.0, neurons=0.0, zeros=0.0):
    of = {"method": method, "accuracy": accuracy, "parameters": parameters, "flops": flops}
    return {**of, "a": a, "last_inputs_removed": neurons, "last_zeros": zeros, "neurons_removed": 1}


def test_the_average_rank_is_of_accuracy_flops_and_parameters_among_regularizers():
    rows = [
        row("none", 99, 100, 100),
        row("l1", 97, 7, 10),
        row("tl1", 97, 6, 20),
        row("cges", 90, 8, 30),
    ]
    report.add_ranks(rows)
    assert "average_rank" not in rows[0]
    ranks = [one["average_rank"] for one in rows[1:]]
    assert ranks == pytest.approx([(1.5 + 1 + 2) / 3, (1.5 + 2 + 1) / 3, 3])


GOOD = [
    row("group_lasso", neurons=80),
    row("sparse_group_lasso", 94, 6),
    row("cges", 94, 12),
    row("tl1", neurons=3, zeros=60),
    row("integrated_tl1", 97, 5, neurons=20, zeros=70),
]
SHAPES = [
    row("integrated_tl1", acc, left, a=a)
    for a, acc, left in ((1, 96, 3), (10, 97, 4), (100, 95, 5))
]


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (None, None),
        ({"of": "group_lasso", "last_zeros": 5}, 0),
        ({"of": "tl1", "last_zeros": 0}, 0),
        ({"of": "tl1", "last_inputs_removed": 30}, 0),
        ({"of": "integrated_tl1", "last_zeros": 0}, 0),
        ({"of": 10, "parameters": 6}, 1),
        ({"of": 10, "accuracy": 96}, 2),  # as good as an end is not better
        ({"of": "sparse_group_lasso", "accuracy": 98}, 3),
        ({"of": "cges", "accuracy": 98}, 4),
    ],
)
def test_a_claim_is_found_to_hold_only_where_the_figures_say_so(change, broken):
    change = dict(change or {"of": ""})
    of = change.pop("of")
    table = [{**one, **change} if one["method"] == of else one for one in GOOD]
    shapes = [{**one, **change} if one["a"] == of else one for one in SHAPES]
    found = report.findings(table, table, shapes)
    assert [i for i, one in enumerate(found) if not one["holds"]] == [broken] * (broken is not None)
    assert len(found) == 5


def test_a_run_ends_when_its_loss_has_settled():
    falling = [{"loss": 0.9**i} for i in range(20)]
    assert not run.settled(falling)
    flat = [{"loss": 0.1 * (1 + 1e-4 * (i % 2))} for i in range(run.PATIENCE)]
    assert not run.settled(falling + flat)
    assert run.settled([*falling, *flat, flat[0]])


def test_a_run_that_diverges_stops_and_is_named(capsys, monkeypatch):
    far = dataclasses.replace(RECIPES["digits"], lr=1e30)
    monkeypatch.setitem(RECIPES, "digits", far)
    _, result = run.train(run.Setting("digits", "l1", 0.1, 1.0, 0, "validation", 9), NOWHERE)
    assert run.diverged(result["history"])
    assert len(result["history"]) < 9
    fine = {**result, "history": [{"loss": 1.0}, {"loss": 0.5}]}
    report.print_diverged([fine, result], Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 2 runs diverged")
    assert lines[1:] == ["  l1, lam 0.1, a 1, seed 0"]
    report.print_diverged([fine], Console())
    assert not capsys.readouterr().out
    assert not run.diverged([])


def test_hidden_neurons_all_speak_at_the_start():
    images = digits("test").fit_inputs
    silent = {0.0: 0, 0.3: 0}
    for seed in range(5):
        torch.manual_seed(seed)
        network = RECIPES["digits"].network()
        for bias in silent:
            nn.init.constant_(network.fc1.bias, bias)
            silent[bias] += network[:6](images).le(0).all(0).sum().item()
    assert silent[0.0] > 0.05 * 5 * 128
    assert silent[0.3] == 0


def summary(method, seeds):
    spread = {f"{name}_std": 0.25 for name in (*report.TABLE_2, *report.TABLE_3)}
    return {**row(method), **spread, "lam": 0.1, "seeds": seeds}


def test_one_run_has_no_deviation_and_every_column_its_unit_in_80_columns(capsys):
    for seeds, title in ((1, "one run"), (3, "mean ± standard deviation of 3 runs")):
        rows = [summary(method, seeds) for method in ("none", "sparse_group_lasso")]
        report.print_tables(rows, "digits", Console(width=80))
        printed = capsys.readouterr().out
        assert f"DIGITS, test split: {title} (Table 2)" in printed
        assert printed.count("±") == (0 if seeds == 1 else 1 + 2 * 6)
        assert "97.0" in printed
    table2, table3 = (" ".join(of.values()).split() for of in (report.TABLE_2, report.TABLE_3))
    assert table2.count("%") == table3.count("%") == 3
    assert printed.count("removed %") == 2
    assert printed.count("last layer:") == 2
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.slow
def test_digits_keeps_its_accuracy_with_a_tenth_of_its_parameters(tmp_path):
    """What `make demo` shows, with its options: means over five seeds on the test split."""
    methods = ("l1", "group_lasso", "sparse_group_lasso", "tl1", "integrated_tl1")
    chosen = json.loads(experiment.chosen_path("digits").read_text())["chosen"]
    settings = experiment.final_settings("digits", methods, 5, None, chosen).table
    jobs = experiment.default_jobs()
    results = experiment.run_all(settings, tmp_path, jobs, QUIET, NOWHERE)
    rows = {row["method"]: row for row in report.summarize(results)}
    ours = rows["integrated_tl1"]
    assert ours["accuracy"] >= 96.5
    assert ours["parameters"] <= 10
    assert ours["flops"] <= 30
    for other in ("l1", "sparse_group_lasso"):
        assert rows[other]["parameters"] <= 10
        assert ours["accuracy"] >= rows[other]["accuracy"] - ours["accuracy_std"]
    # Table 3 of the paper: what happens in the last layer.
    group, single = rows["group_lasso"], rows["tl1"]
    assert group["last_inputs_removed"] > 50
    assert group["last_zeros"] < 1
    assert single["last_zeros"] > 50
    assert single["last_inputs_removed"] < 5
    assert ours["last_zeros"] > 50
    assert ours["last_inputs_removed"] > 2 * single["last_inputs_removed"]


def test_means_and_deviations_are_over_the_seeds_of_one_setting():
    def run_of(accuracy, a):
        layer = {"weights": 4, "weights_left": 2, "inputs": 2, "inputs_removed": 0}
        left = {"flops_fraction": 0.5, "parameters_fraction": 0.5, "neurons": 2}
        left |= {"neurons_removed": 1, "layers": [layer]}
        setting = {"method": "tl1", "lam": 0.1, "a": a}
        return {"setting": setting, "accuracy": accuracy, "sparsity": left}

    runs = [run_of(0.9, 1.0), run_of(0.8, 0.1), run_of(0.94, 1.0), run_of(0.98, 1.0)]
    small, large = report.summarize(runs)
    assert [(row["a"], row["seeds"]) for row in (small, large)] == [(0.1, 1), (1.0, 3)]
    assert (small["accuracy"], small["accuracy_std"]) == pytest.approx((80, 0))
    assert (large["accuracy"], large["accuracy_std"]) == pytest.approx((94, 4))


def test_a_budget_takes_what_meets_it_exactly():
    rows = [row("cges", 95, 5), row("cges", 97, 5.01), row("tl1", 99, 1)]
    assert report.best_within(rows, "cges") == {3: 0.0, 5: 95, 7: 97, 10: 97, 15: 97}


def test_the_model_that_is_copied_is_the_one_of_median_accuracy(tmp_path):
    (tmp_path / "runs").mkdir()
    results = []
    for seed, accuracy in enumerate((0.9, 0.7, 0.8)):
        setting = run.Setting("digits", "l1", 0.3, 1.0, seed, "test")
        (tmp_path / "runs" / f"{setting.file_name}.pt").write_text(str(accuracy))
        results.append({"setting": dataclasses.asdict(setting), "accuracy": accuracy})
    models = report.copy_models(tmp_path, results)
    assert {method: file.read_text() for method, file in models.items()} == {"l1": "0.8"}


def test_a_history_is_of_every_example_once(monkeypatch):
    """The last batch of an epoch is smaller than the others."""
    ours = dataclasses.replace(RECIPES["digits"], lr=1e-30)
    monkeypatch.setitem(RECIPES, "digits", ours)
    fit = digits("validation")
    assert len(fit.fit_labels) % ours.batch_size
    network, result = run.train(
        run.Setting("digits", "none", 0.0, 1.0, 0, "validation", 1), NOWHERE
    )
    want = nn.functional.cross_entropy(network(fit.fit_inputs), fit.fit_labels).item()
    assert result["history"][0]["loss"] == pytest.approx(want, rel=1e-4)
    assert result["iterations_per_epoch"] == -(-1077 // ours.batch_size)


@pytest.mark.parametrize("falling", [False, True])
def test_the_step_size_is_constant_or_falls_linearly_to_0(falling, monkeypatch):
    recipe = dataclasses.replace(RECIPES["digits"], falling=falling)
    monkeypatch.setitem(RECIPES, "digits", recipe)
    make, seen = run.make_optimizer, []

    def watched(network, setting):
        optimizer = make(network, setting)
        optimizer.register_step_pre_hook(lambda of, *_: seen.append(of.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(run, "make_optimizer", watched)
    run.train(run.Setting("digits", "tl1", 0.1, 1.0, 0, "validation", 2), NOWHERE)
    steps = 2 * -(-1077 // recipe.batch_size)
    share = [1 - step / steps if falling else 1.0 for step in range(steps)]
    assert seen == pytest.approx([recipe.lr * part for part in share], rel=1e-12)


def test_settings_that_differ_have_names_that_differ():
    one = run.Setting("digits", "l1", 0.3, 1.0, 0, "test")
    others = {"dataset": "mnist", "method": "tl1", "seed": 1, "evaluate_on": "validation"}
    settings = [dataclasses.replace(one, **{name: value}) for name, value in others.items()]
    settings += [dataclasses.replace(one, lam=lam) for lam in (0.1234567, 0.1234568, 0.1 + 0.2)]
    settings += [dataclasses.replace(one, a=a) for a in (1.01, 1.02, 0.01)]
    settings += [dataclasses.replace(one, epochs=epochs) for epochs in (1, 2)]
    assert len({setting.file_name for setting in (one, *settings)}) == 1 + len(settings)
