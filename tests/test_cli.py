"""The command line: what every command says of Ctrl-C, of the environment and of backends."""

import os
import subprocess
import sys

import pytest
import torch

import tl1kernels as tk
from tl1kernels import backends, cli
from tl1kernels.bench import command

SHORT = {
    "train": ["train", "digits", "--epochs", "1", "--seeds", "1", "--tables", "--methods", "tl1"],
    "bench": ["bench", "--device", "cpu", "--size", "32", "--rounds", "1"],
    "verify": ["verify", "--penalty", "l1"],
}


def words(name, tmp_path):
    return SHORT[name] + ([] if name == "verify" else ["--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["bench", "verify"])
def test_ctrl_c_is_one_line_and_status_130(name, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tl1kernels.verify.PARTS", (interrupted,))
    monkeypatch.setattr(command, "disagreement", interrupted)
    assert cli.main(words(name, tmp_path)) == 130
    assert capsys.readouterr().err == "tl1kernels: interrupted\n"
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", SHORT)
def test_a_backend_of_the_environment_is_named_by_its_variable(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "abacus")
    assert cli.main(words(name, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "TL1KERNELS_BACKEND must be among cpu, triton, cuda, reference, got 'abacus'" in error
    monkeypatch.setenv("TL1KERNELS_BACKEND", "triton")
    monkeypatch.setattr(backends.BACKENDS["triton"], "unavailable", lambda: "no GPU")
    assert cli.main(words(name, tmp_path)) == 2
    assert "TL1KERNELS_BACKEND: backend 'triton' cannot run here: no GPU" in capsys.readouterr().err


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
@pytest.mark.parametrize("name", SHORT)
def test_an_unknown_build_for_the_cpu_is_one_line_before_any_work(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "cpu")
    monkeypatch.setenv("TL1KERNELS_CPU", "abacus")
    assert cli.main(words(name, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "TL1KERNELS_CPU must be one of " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["--version", "info", "train"])  # argparse, print and rich
def test_where_nobody_reads_a_command_ends_quietly(name, tmp_path):
    nobody_reads, stdout = os.pipe()
    os.close(nobody_reads)
    command = [sys.executable, "-m", "tl1kernels"]
    command += words(name, tmp_path) if name in SHORT else [name]
    done = subprocess.run(
        command,
        check=False,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # what is buffered is written at exit
    )
    os.close(stdout)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"tl1kernels {tk.__version__}\n"


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
def test_info_does_not_say_that_a_backend_runs_where_it_has_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("TL1KERNELS_BACKEND", "cpu")
    assert tk.info().runs_on == {
        "cpu": "cpu",
        "cuda": "nothing: 'cpu' was asked for: it has no kernels for cuda",
    }
