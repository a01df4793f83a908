"""`tl1kernels bench`: what is timed is right, counted once, and said in full."""

import json
import math

import pytest
import torch
from PIL import Image

import tl1kernels as tk
from bench import conftest, readme
from tests.common import ON_THE_REFERENCE_ALONE
from tl1kernels import backends, cli
from tl1kernels.backends import reference
from tl1kernels.bench import cases, command, plots, timing
from tl1kernels.bench.cases import MODELS, RULES, fresh, step_bytes


def bench(tmp_path, *more):
    out = tmp_path / "out"
    options = ["--device", "cpu", "--size", "64", "--rounds", "2", "--out", str(out)]
    return cli.main(["bench", *options, *more])


def test_every_case_is_checked_timed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, "resnet50", lambda: [(8, 3, 3, 3), (8,)])
    threads = torch.get_num_threads()
    assert bench(tmp_path) == 0
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "out" / "cpu.json").read_text())
    rows = {row["name"]: row for row in report["results"]}
    assert len(rows) == len(report["results"])
    for name, row in rows.items():
        assert row["ms"] > 0
        assert row["gb_per_s"] == pytest.approx(row["of_copy"] * report["copy_gb_per_s"])
        if name == "prox alone, rows":
            assert row["ratio"] is None
        else:
            assert 0 < row["lowest"] <= row["ratio"] <= row["highest"]
    lacking = set(tk.PENALTIES) - set(backends.BACKENDS[report["backend"]].penalties())
    assert set(report["skipped"]) == {f"SGD, rows, {name}" for name in lacking}
    for penalty in set(tk.PENALTIES) - lacking - {"tl1"}:
        assert f"SGD, rows, {penalty}" in rows
    assert {row["axis"] for row in rows.values()} == {"", "weights", "tensors", "threads"}
    assert set(report["slopes"]) == {"weights", "tensors", "threads"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*report["skipped"], "AdamW, rows", "geometric mean"))
    with Image.open(tmp_path / "out" / "cpu.png") as picture:
        assert picture.text["Source"] == plots.digest(report)
        assert picture.text["Description"] == report["command"]


def test_json_is_what_the_file_has(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "cases", lambda side: list(CASES(side))[:2])
    monkeypatch.setattr(command, "growth", lambda side, device: [])
    assert bench(tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "cpu.json").read_text())


CASES = cases.cases


def test_after_a_wrong_step_nothing_is_written(tmp_path, capsys, monkeypatch):
    right = reference.shrink_groups
    monkeypatch.setattr(reference, "shrink_groups", lambda t, tau: right(t, tau * (1 + 1e-2)))
    if backends.preferred("cpu") == "reference":
        pytest.skip("nothing to compare the reference with")
    assert bench(tmp_path) == 1
    assert "prox alone, rows on cpu" in (error := capsys.readouterr().err)
    assert "weights are not the reference's" in error
    assert not list((tmp_path / "out").iterdir())


SQUARES = [
    case
    for case in list(cases.cases(300))[:-2]
    if case.options.get("penalty") not in ON_THE_REFERENCE_ALONE["cpu"]
]


@pytest.mark.parametrize("stale", [0.5, math.nan])
@pytest.mark.parametrize("case", SQUARES, ids=lambda case: case.name)
def test_one_wrong_weight_is_found(case, stale, monkeypatch):
    """In what the reference gives: each case looks at every weight."""
    right = reference._run_entry
    if backends.preferred("cpu") == "reference":
        pytest.skip("nothing to compare the reference with")
    assert cases.disagreement(case, "cpu") == ""

    def wrong(rule, penalty, entry, *more):
        right(rule, penalty, entry, *more)
        entry.param[-1, -1] = stale

    monkeypatch.setattr(reference, "_run_entry", wrong)
    assert cases.disagreement(case, "cpu").endswith("of 90000 weights are not the reference's")


def test_what_cannot_run_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device must be cpu" in capsys.readouterr().err
    assert cli.main(["bench", "--backend", "abacus"]) == 2
    assert "'abacus'" in capsys.readouterr().err
    monkeypatch.setattr(backends.BACKENDS["triton"], "unavailable", lambda: None)
    assert cli.main(["bench", "--device", "cpu", "--backend", "triton"]) == 2
    assert "--backend must be among cpu, reference on cpu, got 'triton'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setattr(timing, "copy_bandwidth", lambda _: pytest.fail("began"))
    for out in (tmp_path / "file", tmp_path / "file" / "out", "/proc"):
        assert cli.main(["bench", "--device", "cpu", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            f"tl1kernels: --out must be a folder that can be written, got '{out}'"
        )
        assert error.count("\n") == 1


@pytest.mark.parametrize("size", [10**9 - 1, 10**10, 10**20])  # bytes, their count, an int64
def test_a_size_that_memory_has_no_room_for_is_one_line(size, tmp_path, capsys):
    assert cli.main(["bench", "--device", "cpu", "--size", str(size), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"tl1kernels: --size must be smaller, got {size}: "
        "memory does not suffice for 'prox alone, rows'\n"
    )


def test_a_gpu_without_room_says_the_same_and_other_errors_stay_what_they_are(
    tmp_path, capsys, monkeypatch
):
    def failing(error):
        def timed(*_):
            raise error

        return timed

    monkeypatch.setattr(command, "timed", failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert bench(tmp_path) == 2
    assert "--size must be smaller, got 64: memory does not suffice" in capsys.readouterr().err
    monkeypatch.setattr(command, "timed", failing(RuntimeError("another")))
    with pytest.raises(RuntimeError, match=r"^another$"):
        bench(tmp_path)


@pytest.mark.parametrize(
    ("rule", "dtype", "want"),
    [
        (None, torch.float32, 8),
        ("SGD", torch.float32, 12),
        ("SGD momentum", torch.float32, 20),
        ("AdamW", torch.float32, 28),
        ("SGD", torch.bfloat16, 6),
        ("AdamW", torch.bfloat16, 22),
        ("AdamW", torch.float64, 56),
    ],
)
def test_bytes_a_weight(rule, dtype, want):
    params = [torch.empty(3, 5, dtype=dtype), torch.empty(7, dtype=dtype)]
    assert step_bytes(rule, params) == 22 * want


def test_the_number_of_states_is_the_optimizers():
    for ours, _, options, states in RULES.values():
        p = fresh((3, 4))
        optimizer = ours([p], **options)
        optimizer.step()
        assert sum(s.shape == p.shape for s in optimizer.state[p].values()) == states


def test_models_have_the_published_numbers_of_parameters():
    of = {name: (len(shapes()), sum(map(math.prod, shapes()))) for name, shapes in MODELS.items()}
    assert of == {
        "ResNet-50": (161, 25_557_032),
        "ViT-B/16": (152, 86_567_656),
        "GPT-2 small": (148, 124_439_808),
    }


def test_sides_take_turns_over_placements_that_all_stay():
    calls, made = [], []

    def make():
        made.append(len(made))
        mine = made[-1]
        return {name: lambda name=name: calls.append((mine, name)) for name in ("ours", "peer")}

    def clock(side):
        side()
        return float(len(calls))

    seconds = timing.interleaved(make, clock, rounds=3, placements=2)
    assert made == [0, 1]
    assert [name for _, name in calls] == ["ours", "peer"] * (2 * (3 + 2))
    assert [placement for placement, _ in calls] == [0] * 10 + [1] * 10
    assert seconds == {"ours": [5.0, 7.0, 9.0, 15.0, 17.0, 19.0], "peer": [6, 8, 10, 16, 18, 20]}


def test_a_ratio_is_the_median_over_placements_of_medians_of_rounds():
    ours = [2.0, 4.0, 90.0, 3.0, 3.0, 3.0, 8.0, 8.0, 8.0]
    peer = [1.0, 2.0, 10.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    ratio = timing.ratio_of(ours, peer, rounds=3)
    assert (ratio.ratio, ratio.lowest, ratio.highest) == (3.0, 2.0, 4.0)
    assert (ratio.ours_ms, ratio.peer_ms) == (4000.0, 1000.0)


def test_slopes_are_those_of_power_laws():
    rows = [
        command.Timed("", axis, at, 3.0 * at**power, 0.0, 0.0)
        for axis, power in (("weights", 1.0), ("threads", -0.5))
        for at in (1, 2, 4, 8)
    ]
    assert command.slopes(rows) == {"weights": pytest.approx(1), "threads": pytest.approx(-0.5)}


@pytest.mark.parametrize("n", range(1, 8))
def test_slopes_are_of_the_upper_half_but_of_two_points(n):
    low = n - max(2, math.ceil(n / 2))
    rows = [
        command.Timed("", "tensors", 2**i, 2.0**i if i >= low else 1e-9, 0.0, 0.0) for i in range(n)
    ]
    assert command.slopes(rows) == ({"tensors": pytest.approx(1)} if n > 1 else {})


def test_a_plot_that_its_figures_did_not_draw_is_found(tmp_path, monkeypatch):
    rows = [{"name": name, "axis": "", "of_copy": 0.5, "ratio": 2, "peer": "p"} for name in "abc"]
    report = {"command": "", "results": rows, "backend": "", "copy_gb_per_s": 1.0, "slopes": {}}
    report |= {"environment": {"processor": "some", "threads": 2}, "date": "2026-01-01"}
    (tmp_path / "short").mkdir()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    plots.draw(report, tmp_path / "short" / "cpu.png")
    plots.draw_ratios(report, tmp_path / "ratios.png")
    other = {**report, "copy_gb_per_s": 2.0}
    for written, stale in ((report, []), (other, ["short/cpu.png", "ratios.png"])):
        (tmp_path / "short" / "cpu.json").write_text(json.dumps(written))
        (tmp_path / "machine-2026-01-01.json").write_text(json.dumps(written))
        assert readme.stale_plots() == stale


def test_the_newest_results_of_a_gpu_become_the_readmes_table(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "no table" in readme.gpu()
    row = {"case": "rows", "peer": "a copy", "ours_ms": 0.2, "bytes": 8e8, "bound": 1.1}
    for date, ratio in (("2030-01-02", 1.05), ("2030-01-03", 1.125), ("2030-01-01", 1.0)):
        where = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc"}
        row |= {"ratio": ratio, "lowest": 1.0, "highest": 1.2}
        report = {"environment": where, "date": date, "copy_gb_per_s": 4200.0, "results": [row]}
        (tmp_path / f"{date}.json").write_text(json.dumps(report))
    _, _, line, _, caption = readme.gpu().split("\n")
    assert line == "| rows | a copy | 0.200 | 4000 | 1.12 **missed** | 1.00, 1.20 | 1.10 |"
    assert "A GPU, torch 2.0, Triton 3.0, copy 4200 GB/s; commit abc." in caption


def test_a_cases_figures_are_in_their_units_and_ours_is_above(monkeypatch):
    taken = {"ours": [2e-3] * 6, cases.PEER: [1e-3] * 6}
    monkeypatch.setattr(timing, "interleaved", lambda *_, **options: taken)
    case = cases.Case("", "SGD", {}, ((1000, 1000),))
    got = command.timed(case, "cpu", timing.on_host, 3e10, 2)
    assert (got.ms, got.peer_ms) == pytest.approx((2.0, 1.0))
    assert (got.lowest, got.ratio, got.highest) == pytest.approx((2.0, 2.0, 2.0))
    assert (got.gb_per_s, got.of_copy) == pytest.approx((6.0, 0.2))  # 12 bytes a weight


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(timing, "on_host", lambda copy: 0.5)
    assert timing.copy_bandwidth("cpu") == 2 * 2 * (4 << 24)


def test_the_mean_of_ratios_is_geometric():
    assert timing.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_many_weights_that_die_wrongly_are_found(monkeypatch):
    """A penalty that jumps may take some at its threshold either way, three at most."""
    if backends.preferred("cpu") == "reference":
        pytest.skip("nothing to compare the reference with")
    right = reference._run_entry
    case = next(case for case in SQUARES if case.name == "SGD, no groups")
    for n, found in ((3, False), (9, True)):

        def wrong(rule, penalty, entry, *more, n=n):
            right(rule, penalty, entry, *more)
            entry.param[0, :n] = 0.0

        with monkeypatch.context() as patch:
            patch.setattr(reference, "_run_entry", wrong)
            assert bool(cases.disagreement(case, "cpu")) == found


def test_growth_with_threads_runs_on_that_many(monkeypatch):
    before, seen = torch.get_num_threads(), []

    def sides(make, *_, **options):
        seen.append(torch.get_num_threads())
        return {"ours": [1.0]}

    monkeypatch.setattr(timing, "interleaved", sides)
    threads = [case for case in cases.growth(64, "cpu") if case.axis == "threads"]
    for case in threads:
        command.timed(case, "cpu", timing.on_host, 1.0, 1)
    assert seen == [case.at for case in threads] == sorted({1, 2, before})
    assert torch.get_num_threads() == before


def test_of_sparse_weights_as_many_are_zero_as_the_case_says(monkeypatch):
    made = []
    fresh_ = cases.fresh
    monkeypatch.setattr(cases, "fresh", lambda *args: made.append(fresh_(*args)) or made[-1])
    (case,) = (case for case in cases.cases(300) if case.zeros)
    monkeypatch.setattr(cases, "steps_on_one_memory", lambda *_, **options: (None, None))
    cases.sides(case, "cpu")
    (p,) = made
    assert (p == 0).double().mean().item() == pytest.approx(0.95, abs=0.01)
    assert ((p == 0) == (p.grad == 0)).all()


def test_the_command_in_a_report_makes_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cases", lambda side: list(CASES(side))[:2])
    monkeypatch.setattr(command, "growth", lambda side, device: [])
    assert bench(tmp_path, "--backend", "reference") == 0
    report = json.loads((tmp_path / "out" / "cpu.json").read_text())
    words = "tl1kernels bench --device cpu --backend reference --size 64 --rounds 2"
    assert report["command"] == words


def test_both_sides_step_on_one_memory():
    for rule in RULES:
        p = fresh((3, 4))
        mine, theirs = cases.steps_on_one_memory(rule, [p])
        (ours, peers) = (step.__self__.state[p] for step in (mine, theirs))
        assert ours.keys() == peers.keys()
        assert all(ours[name] is peers[name] for name in ours)
        assert theirs.__self__.param_groups[0]["params"][0] is p


def test_the_check_of_the_readme_fails_by_a_stale_plot_alone(monkeypatch, capsys):
    monkeypatch.setattr(readme.sys, "argv", ["readme.py", "--check"])
    as_it_is = {page: (readme.ROOT / page).read_text() for page in readme.PAGES}
    monkeypatch.setattr(readme, "rendered", as_it_is.get)
    for stale in ([], ["ratios.png"]):
        monkeypatch.setattr(readme, "stale_plots", lambda stale=stale: stale)
        assert readme.main() == len(stale)
    assert "ratios.png was drawn from other figures" in capsys.readouterr().out
    monkeypatch.setattr(readme, "rendered", lambda page: as_it_is[page] + "x")
    assert readme.main() == 1


def test_a_report_grows_by_each_result_and_by_another_run_of_the_same_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "copy_bandwidth", lambda device: 50e9)
    file = tmp_path / "report.json"

    def run(commit, *cases):
        monkeypatch.setenv("COMMIT", commit)
        report = conftest.Report(file)
        for case, ms in cases:
            report.add(conftest.Result(ms, 1.0, ms, ms, ms, case, "torch", 1.0, 8))
        written = json.loads(file.read_text())
        assert written["environment"]["commit"] == commit
        assert written["copy_gb_per_s"] == 50
        return [(row["case"], row["ours_ms"]) for row in written["results"]]

    assert run("one", ("rows", 1.0)) == [("rows", 1.0)]  # there before the second is measured
    assert run("one", ("columns", 2.0)) == [("rows", 1.0), ("columns", 2.0)]
    assert run("one", ("rows", 3.0)) == [("columns", 2.0), ("rows", 3.0)]
    assert run("two", ("rows", 4.0)) == [("rows", 4.0)]


def test_a_report_in_a_folder_is_named_after_machine_and_day(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "copy_bandwidth", lambda device: 50e9)
    report = conftest.Report(tmp_path)
    report.add(conftest.Result(1.0, 1.0, 1.0, 1.0, 1.0, "rows", "torch", 1.0, 8))
    (file,) = tmp_path.iterdir()
    assert file.name.endswith(f"-{conftest.date.today()}.json")
    assert conftest.Report(None).add(report.results[0]) is None
