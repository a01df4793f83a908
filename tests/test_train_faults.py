"""`tl1kernels train` stopped, damaged or misused; and what is not run again."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from rich.console import Console

from tl1kernels import cli
from tl1kernels.train import experiment, run

QUIET = Console(quiet=True)
NOWHERE = Path("no-such-folder")  # DIGITS needs no files


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    setting = run.Setting("digits", "l1", 0.3, 1.0, 0, "validation", epochs=1)
    first = run.run_to_file(setting, tmp_path, NOWHERE)
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained again"))
    assert run.run_to_file(setting, tmp_path, NOWHERE) == first
    assert not list(tmp_path.glob("*.draft"))


def test_runs_of_other_code_or_without_their_model_are_run_again(tmp_path):
    setting = run.Setting("digits", "l1", 0.3, 1.0, 0, "validation", epochs=1)
    run.run_to_file(setting, tmp_path, NOWHERE)
    (file,) = tmp_path.glob("*.json")
    stale = json.loads(file.read_text())
    stale["environment"]["sources"] = "of another day"
    stale["accuracy"] = -1.0
    file.write_text(json.dumps(stale))
    assert run.run_to_file(setting, tmp_path, NOWHERE)["accuracy"] > 0
    file.with_suffix(".pt").unlink()
    assert run.run_to_file(setting, tmp_path, NOWHERE)["accuracy"] > 0
    assert file.with_suffix(".pt").exists()


def test_no_run_outlives_a_command_that_is_killed(tmp_path):
    command = [sys.executable, "-m", "tl1kernels", "train", "digits", "--out", str(tmp_path)]
    command += ["--seeds", "2", "--epochs", "30", "--methods", "none", "l1", "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while not list((tmp_path / "runs").glob("*.json")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=10)  # until nobody can write to the pipe
    assert len(list((tmp_path / "runs").glob("*.json"))) < 10


def test_ctrl_c_saves_finished_runs_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "tl1kernels", "train", "digits", "--out", str(tmp_path)]
    command += ["--seeds", "1", "--epochs", "20", "--methods", "none", "l1", "tl1", "--jobs", "1"]
    # A job in the background ignores Ctrl-C, and so would what it starts.
    heeds_it = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds_it
    )
    while not list((tmp_path / "runs").glob("*.json")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    printed, _ = process.communicate(timeout=60)
    finished = len(list((tmp_path / "runs").glob("*.json")))
    assert process.returncode == 130, printed
    assert f"{finished} of 9 runs are saved" in printed
    assert "the same command goes on from there" in " ".join(printed.split())
    assert 1 <= finished < 9
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert len(list((tmp_path / "runs").glob("*.json"))) == 9


def test_a_method_named_twice_is_trained_once(tmp_path):
    command = ["train", "digits", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main([*command, "--methods", "none", "none"]) == 0
    assert len(json.loads((tmp_path / "table2.json").read_text())["rows"]) == 1


def test_bad_usage_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    assert cli.main(["train", "digits", "--methods", "l3", "--out", str(tmp_path)]) == 2
    assert "'l3'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out", "/sys"):
        assert cli.main(["train", "digits", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            f"tl1kernels: --out must be a folder that can be written, got '{out}'"
        )
        assert error.count("\n") == 1
    for bad in (["verify", "--seed", "-1"], ["train", "digits", "--seeds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(bad)
        assert "must be a whole number >= " in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("tl1kernels.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["train", "digits"]) == 2
    assert "pip install 'tl1kernels[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"chosen": {"l1": {"lam": 1}}}'),
        '{"chosen": {"l1": {"lam": NaN, "a": 1}}}',
        '{"chosen": {"l1": {"lam": 1, "a": 0}}}',
    ],
)
def test_a_broken_file_of_what_was_chosen_is_named_with_what_to_do(content, tmp_path, capsys):
    (tmp_path / "chosen.json").write_text(content)
    assert cli.main(["train", "digits", "--out", str(tmp_path), "--epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'chosen.json'} cannot be read as what a search chose" in error
    assert error.endswith("remove it; the same command with --search writes it anew\n")


def test_a_damaged_run_is_named_and_trained_again_once_it_is_removed(tmp_path):
    setting = run.Setting("digits", "l1", 0.3, 1.0, 0, "validation", epochs=1)
    first = run.run_to_file(setting, tmp_path, NOWHERE)
    (file,) = tmp_path.glob("*.json")
    for content in (b"", file.read_bytes()[:-1], b"[]", b"{}", b"3", b"\x80"):
        file.write_bytes(content)
        with pytest.raises(run.DamagedRunError, match="remove it, and the same command") as damaged:
            run.run_to_file(setting, tmp_path, NOWHERE)
        assert str(damaged.value).startswith(f"{file} cannot be read as the result of a run")
    file.unlink()
    (weights,) = tmp_path.glob("*.pt")
    run.run_to_file(setting, tmp_path, NOWHERE)
    for content in (b"", weights.read_bytes()[:-99], b"3"):
        weights.write_bytes(content)
        with pytest.raises(run.DamagedRunError, match="remove it") as damaged:
            run.run_to_file(setting, tmp_path, NOWHERE)
        assert str(damaged.value).startswith(f"{weights} cannot be read as the result of a run")
        assert "\n" not in str(damaged.value)
    weights.unlink()
    assert run.run_to_file(setting, tmp_path, NOWHERE)["accuracy"] == first["accuracy"]


def test_a_run_on_other_data_is_run_again(tmp_path, monkeypatch):
    setting = run.Setting("digits", "l1", 0.3, 1.0, 0, "validation", epochs=1)
    first = run.run_to_file(setting, tmp_path, NOWHERE)
    assert run.run_to_file(setting, tmp_path, NOWHERE) == first
    data = run._data("digits", "validation", NOWHERE)
    others = dataclasses.replace(data, eval_labels=(data.eval_labels + 1) % 10)
    monkeypatch.setattr(run, "_data", lambda *_: others)
    run._checksum.cache_clear()
    again = run.run_to_file(setting, tmp_path, NOWHERE)
    run._checksum.cache_clear()
    assert again["accuracy"] < 0.5 < 2 * first["accuracy"]
    assert again["data"] != first["data"]


def test_a_killed_process_and_a_file_in_a_folders_place_are_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").touch()
    command = ["train", "digits", "--epochs", "1", "--methods", "none", "--out", str(tmp_path)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tl1kernels: --out {tmp_path} cannot be written to: ")
    assert error.count("\n") == 1
    (tmp_path / "runs").unlink()

    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(experiment, "as_completed", killed)
    assert cli.main(command) == 130
    assert "a run's process was killed" in capsys.readouterr().out


def test_a_damaged_run_is_one_line_and_status_2(tmp_path, capsys):
    runs = tmp_path / "runs"
    runs.mkdir()
    chosen = json.loads(experiment.chosen_path("digits").read_text())["chosen"]["none"]
    setting = run.Setting("digits", "none", chosen["lam"], chosen["a"], 0, "test", 1)
    file = runs / f"{setting.file_name}.json"
    file.write_text("{")
    file.with_suffix(".pt").touch()
    command = ["train", "digits", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main([*command, "--methods", "none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tl1kernels: {file} cannot be read as the result of a run")
    assert error.count("\n") == 1


def test_help_says_which_options_a_search_and_digits_do_not_use(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--seeds, --paper and --tables are of the runs without --search" in printed
    assert "digits needs none" in printed
