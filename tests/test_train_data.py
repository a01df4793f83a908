"""The data sets of `tl1kernels train`: small files in the real formats; what is said without."""

import dataclasses
import gzip
import hashlib
import io
import json
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tl1kernels import cli
from tl1kernels.train import data, experiment, run
from tl1kernels.train.recipes import RECIPES

TRAIN, TEST = 60, 30


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, inputs, labels, suffix=".gz"):
    for part, rows in (("train", slice(TRAIN)), ("t10k", slice(TRAIN, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", inputs[rows, 0])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels[rows])


def write_pendigits(folder, inputs, labels):
    for name, rows in (("pendigits.tra", slice(TRAIN)), ("pendigits.tes", slice(TRAIN, None))):
        lines = [
            ",".join([*(f"{x:3d}" for x in row), f" {label}"])
            for row, label in zip(inputs[rows], labels[rows], strict=True)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")


def write_sdd(folder, inputs, labels):
    lines = [
        " ".join([*(f"{x:.4e}" for x in row), str(label + 1)])
        for row, label in zip(inputs, labels, strict=True)
    ]
    (folder / "Sensorless_drive_diagnosis.txt").write_text("\n".join(lines) + "\n")


def cifar10_batches(inputs, labels):
    records = np.concatenate([labels[:, None], inputs.reshape(len(labels), -1)], 1)
    parts = np.array_split(records[:TRAIN], 5)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    batches = dict(zip(names, parts, strict=True))
    return {**batches, "batches.meta.txt": np.array([]), "test_batch.bin": records[TRAIN:]}


def write_cifar10(folder, inputs, labels):
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, batch in cifar10_batches(inputs, labels).items():
            content = batch.astype(np.uint8).tobytes()
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


# shape of one input, largest value, classes, writer
FORMATS = {
    "mnist": ((1, 28, 28), 255, 10, write_mnist),
    "fashion_mnist": ((1, 28, 28), 255, 10, write_mnist),
    "pendigits": ((16,), 100, 10, write_pendigits),
    "sdd": ((48,), 100, 11, write_sdd),
    "cifar10": ((3, 32, 32), 255, 10, write_cifar10),
}


def write_small(name, folder, rows=TRAIN + TEST):
    """Write a small data set; return its inputs and labels, in the order of the files."""
    shape, largest, classes, writer = FORMATS[name]
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, largest + 1, size=(rows, *shape))
    labels = np.arange(rows) % classes
    folder.mkdir(parents=True, exist_ok=True)
    writer(folder, inputs, labels)
    return inputs, labels


def test_every_data_set_has_a_source_and_a_recipe_and_a_test_here():
    assert data.DATA.keys() == RECIPES.keys() == {"digits", *FORMATS}


def test_the_commands_help_names_every_data_set(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in RECIPES:
        assert name in printed


def test_networks_have_the_parameters_that_their_docstrings_name():
    counted = 0
    for recipe in RECIPES.values():
        named = re.search(r"([0-9,]+) parameters", recipe.network.__doc__)
        if named:
            numel = sum(p.numel() for p in recipe.network().parameters())
            assert f"{numel:,}" == named[1]
            counted += 1
    assert counted >= 5


@pytest.mark.parametrize("name", FORMATS)
def test_files_in_the_real_formats_are_read_exactly(name, tmp_path):
    inputs, labels = write_small(name, tmp_path)
    final = data.DATA[name].load(name, "test", tmp_path)
    assert final.fit_inputs.dtype == torch.float32
    assert final.fit_labels.dtype == torch.int64
    if name == "sdd":  # not split by its authors
        assert len(final.eval_labels) == len(labels) // 5
        rows = np.concatenate([final.fit_labels, final.eval_labels])
        assert sorted(rows) == sorted(labels)
        assert final.fit_inputs.mean(0) == pytest.approx(torch.zeros(48), abs=1e-6)
        assert final.fit_inputs.std(0, correction=0) == pytest.approx(torch.ones(48), abs=1e-6)
        return
    assert final.fit_labels.tolist() == labels[:TRAIN].tolist()
    assert final.eval_labels.tolist() == labels[TRAIN:].tolist()
    want = inputs / FORMATS[name][1]
    if name == "cifar10":
        fit = want[:TRAIN]
        want = (want - fit.mean((0, 2, 3), keepdims=True)) / fit.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(final.fit_inputs, want[:TRAIN], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(final.eval_inputs, want[TRAIN:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_choice_is_judged_by_a_quarter_of_the_training_rows(name, tmp_path):
    write_small(name, tmp_path, rows=132)
    source = data.DATA[name]
    choosing, final = (source.load(name, on, tmp_path) for on in ("validation", "test"))
    fitted, judged = len(choosing.fit_labels), len(choosing.eval_labels)
    assert fitted + judged == len(final.fit_labels)
    assert judged == -(-len(final.fit_labels) // 4)
    again = source.load(name, "validation", tmp_path)
    assert torch.equal(again.fit_inputs, choosing.fit_inputs)


def test_unpacked_files_serve_too(tmp_path):
    inputs, labels = write_small("mnist", tmp_path / "packed")
    (tmp_path / "plain").mkdir()
    write_mnist(tmp_path / "plain", inputs, labels, suffix="")
    packed, plain = (
        data.DATA["mnist"].load("MNIST", "test", tmp_path / where) for where in ("packed", "plain")
    )
    assert torch.equal(packed.fit_inputs, plain.fit_inputs)

    inputs, labels = write_small("cifar10", tmp_path / "archive")
    folder = tmp_path / "folder" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, batch in cifar10_batches(inputs, labels).items():
        (folder / name).write_bytes(batch.astype(np.uint8).tobytes())
    packed, plain = (
        data.DATA["cifar10"].load("CIFAR-10", "test", tmp_path / where)
        for where in ("archive", "folder")
    )
    assert torch.equal(packed.eval_inputs, plain.eval_inputs)


@pytest.mark.parametrize("name", FORMATS)
def test_the_recipe_trains_on_its_data_set(name, tmp_path):
    write_small(name, tmp_path)
    setting = run.Setting(name, "integrated_tl1", 1e-3, 0.1, 0, "test", epochs=2)
    network, result = run.train(setting, tmp_path)
    assert len(result["history"]) == 2
    assert np.isfinite([epoch["loss"] for epoch in result["history"]]).all()
    kind = type(run.make_optimizer(network, setting)).__name__
    sgd = name in ("mnist", "fashion_mnist", "pendigits")
    assert kind == ("ProxSGD" if sgd else "ProxAdam")


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("mnist", "t10k-images-idx3-ubyte.gz", b"\0\0\x0d\3" + bytes(12), "IDX"),
        ("mnist", "t10k-images-idx3-ubyte.gz", b"\0\0\x08\1\0\0\0\7x", "IDX"),
        ("pendigits", "pendigits.tes", b"1,2,3\n", "17 columns, got 3"),
        ("pendigits", "pendigits.tes", b"a,b\n", "as a table of numbers"),
        ("sdd", "Sensorless_drive_diagnosis.txt", b"1 2\n", "49 columns, got 2"),
    ],
)
def test_a_file_that_is_something_else_is_named(name, file, content, says, tmp_path, capsys):
    write_small(name, tmp_path)
    packed = file.endswith(".gz")
    (tmp_path / file).write_bytes(gzip.compress(content) if packed else content)
    out = tmp_path / "out"
    assert cli.main(["train", name, "--data", str(tmp_path), "--out", str(out)]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert file in printed
    assert says in printed


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("mnist", "t10k-images-idx3-ubyte.gz", b"no archive"),
        ("mnist", "t10k-images-idx3-ubyte.gz", gzip.compress(bytes(99))[:-9]),
        ("mnist", "t10k-images-idx3-ubyte.gz", gzip.compress(b"")[:10] + b"\xff" * 20),
        ("cifar10", "cifar-10-binary.tar.gz", b"no archive"),
        ("cifar10", "cifar-10-binary.tar.gz", gzip.compress(bytes(10240))),  # an empty archive
        ("pendigits", "pendigits.tes", b"\xff\xfe"),
    ],
    ids=["no gzip", "cut short", "broken", "no archive", "empty", "no text"],
)
def test_a_broken_file_is_named_with_what_to_do(name, file, content, tmp_path, capsys):
    write_small(name, tmp_path)
    (tmp_path / file).write_bytes(content)
    assert cli.main(["train", name, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / file} cannot be read as " in error
    assert "remove it, and it is fetched again, or put the file of its authors there" in error


PENDIGIT = ",".join(["50"] * 16)


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("mnist", "train-labels-idx1-ubyte.gz", np.zeros(7), "and a label for each"),
        ("mnist", "t10k-images-idx3-ubyte.gz", np.zeros(9), "and a label for each"),
        ("mnist", "t10k-labels-idx1-ubyte.gz", np.full(TEST, 200), "from 0 to 200, of 10"),
        ("pendigits", "pendigits.tes", f"{PENDIGIT},10\n", "from 0 to 10, of 10 classes"),
        ("pendigits", "pendigits.tes", f"nan{PENDIGIT[2:]},1\n", "not all inputs are finite"),
    ],
    ids=["too few", "no images", "no such class", "one class more", "not finite"],
)
def test_files_that_do_not_belong_together_are_named(name, file, content, says, tmp_path, capsys):
    write_small(name, tmp_path)
    if name == "mnist":
        write_idx(tmp_path / file, content)
    else:
        (tmp_path / file).write_text(content)
    assert cli.main(["train", name, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert file in error
    assert says in error
    assert error.count("\n") == 1


def test_files_are_fetched_once_and_their_checksum_is_checked(tmp_path, monkeypatch):
    """By file:// URLs, which take the same way as https:// ones."""
    published, folder = tmp_path / "published", tmp_path / "data"
    _, labels = write_small("pendigits", published)

    def source(md5):
        names = ("pendigits.tra", "pendigits.tes")
        files = tuple(data.File(f"{published.as_uri()}/{name}", md5(name)) for name in names)
        return dataclasses.replace(data.DATA["pendigits"], files=files)

    with pytest.raises(data.MissingDataError, match="does not have the checksum 0123"):
        source(lambda name: "0123").load("PENDIGITS", "test", folder)
    assert not list(folder.iterdir())
    good = source(lambda name: hashlib.md5((published / name).read_bytes()).hexdigest())
    assert good.load("PENDIGITS", "test", folder).fit_labels.tolist() == labels[:TRAIN].tolist()
    monkeypatch.setattr(data.File, "fetch", lambda *_: pytest.fail("fetched again"))
    good.load("PENDIGITS", "test", folder)


def test_without_network_the_message_says_which_file_to_put_where(tmp_path, capsys, monkeypatch):
    def refuse(url, timeout):
        raise data.urllib.error.URLError("no network")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").touch()
    command = ["train", "mnist", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    printed = capsys.readouterr().err
    assert f"MNIST is not in {folder} and cannot be fetched" in printed
    assert "no network" in printed
    for name in ("train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{name}-ubyte.gz from https://" in printed
    assert "train-images" not in printed  # it is there


def test_a_search_chooses_and_the_final_runs_take_what_it_chose(tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "data", tmp_path / "out"
    write_small("pendigits", folder)
    recipe = RECIPES["pendigits"]
    monkeypatch.setattr(experiment, "RECIPES", {"pendigits": _shorter(recipe)})
    monkeypatch.setattr(experiment, "chosen_path", lambda _: tmp_path / "nothing.json")
    command = ["train", "pendigits", "--data", str(folder), "--out", str(out), "--epochs", "2"]
    command += ["--jobs", "1", "--seeds", "2", "--methods", "none", "scad", "integrated_tl1"]
    assert cli.main(command) == 2
    assert "no lam and a were chosen yet for none, scad, integrated_tl1" in capsys.readouterr().err
    assert cli.main([*command, "--search"]) == 0
    chosen = json.loads((out / "chosen.json").read_text())
    assert chosen["command"] == (
        "tl1kernels train pendigits --search --methods none scad integrated_tl1 --epochs 2"
    )
    assert chosen["chosen"]["scad"]["a"] == 3.7  # 0.01, 0.1 and 1 are not allowed
    other = [*command[:-3], "mcp", "--search"]
    assert cli.main(other) == 0  # of another method: what is there of these stays
    assert "Kept from earlier searches: scad, integrated_tl1\n" in capsys.readouterr().out
    later = json.loads((out / "chosen.json").read_text())
    assert later["command"].endswith("--search --methods mcp --epochs 2")
    assert later["chosen"].keys() == {*chosen["chosen"], "mcp"}
    assert later["chosen"]["scad"] == chosen["chosen"]["scad"]
    assert cli.main([*command, "--paper"]) == 0
    table = json.loads((out / "table2.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["none", "integrated_tl1", "scad"]
    assert table["rows"][1]["lam"] == chosen["chosen"]["integrated_tl1"]["lam"]
    assert (out / "fig6-filters.png").exists()  # of a linear layer, too


def _shorter(recipe):
    return type(recipe)(**{**vars(recipe), "grid": recipe.grid[:1]})


def test_the_data_folder_is_named_after_the_data_set(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_small("sdd", Path("data/sdd"))
    assert cli.main(["train", "sdd", "--epochs", "1"]) == 2
    assert "no lam and a were chosen yet" in capsys.readouterr().err
    assert cli.main(["train", "elsewhere"]) == 2
    assert "dataset must be among digits, mnist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sdd", "cifar10"])
@pytest.mark.parametrize("evaluate_on", ["validation", "test"])
def test_features_are_standardized_by_the_rows_that_are_fitted(name, evaluate_on, tmp_path):
    write_small(name, tmp_path, rows=132)
    fit = data.DATA[name].load(name, evaluate_on, tmp_path).fit_inputs.double()
    over = tuple(i for i in range(fit.ndim) if i != 1)
    torch.testing.assert_close(fit.mean(over), torch.zeros_like(fit.mean(over)), rtol=0, atol=1e-5)
    torch.testing.assert_close(fit.std(over, correction=0), torch.ones_like(fit.mean(over)))


def test_every_class_has_its_share_of_each_split():
    for evaluate_on in ("validation", "test"):
        digits = data.DATA["digits"].load("DIGITS", evaluate_on, Path("no-such-folder"))
        fit, judged = (y.bincount(minlength=10) for y in (digits.fit_labels, digits.eval_labels))
        share = judged.sum() / (fit.sum() + judged.sum())
        assert (judged - share * (fit + judged)).abs().max() < 1.5
