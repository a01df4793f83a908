"""Data sets as tensors, split once and for all: fit, validation, test.

Each is read from its authors' own files, in a folder of the user's or fetched from where they are
published: one reader serves both.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0


@dataclass(frozen=True)
class Data:
    """What one run fits and what it is judged by.

    Inputs are float32, images (n, channels, height, width) or features (n, d); labels int64 (n,).
    """

    fit_inputs: Tensor
    fit_labels: Tensor
    eval_inputs: Tensor
    eval_labels: Tensor


class MissingDataError(Exception):
    """A data set is neither in the folder nor can it be fetched; says which file goes where."""


@dataclass(frozen=True)
class File:
    """A file as its authors publish it.

    Attributes:
        url: where it is; its last part is the file's name.
        md5: its checksum, where one is published; checked when it is fetched.
        unpacked: what may be there instead, uncompressed.
    """

    url: str
    md5: str | None = None
    unpacked: str | None = None

    @property
    def name(self) -> str:
        """The file's name in the folder."""
        return self.url.rsplit("/", 1)[1]

    def find(self, folder: Path) -> Path | None:
        """Return where it is in the folder, packed or not; None if it is not."""
        for name in (self.unpacked, self.name):
            if name and (folder / name).exists():
                return folder / name
        return None

    def fetch(self, folder: Path) -> None:
        """Write it to the folder, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(self.url, timeout=60) as answer:
            content = answer.read()
        if self.md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != self.md5:
            raise OSError(f"what came from {self.url} does not have the checksum {self.md5}")
        draft = folder / f"{self.name}.part"
        draft.write_bytes(content)
        draft.replace(folder / self.name)


@dataclass(frozen=True)
class Source:
    """Where a data set is and how its files are read.

    Attributes:
        read: one path per file -> inputs, labels, and how many of the rows are the training set;
            None where its authors left the split to the user.
        shape: of an input.
        classes: how many there are; labels count them from 0.
        standardize: whether each feature or channel is taken to mean 0 and deviation 1 on the
            rows that a run fits.
    """

    read: Callable[..., tuple[np.ndarray, np.ndarray, int | None]]
    shape: tuple[int, ...]
    classes: int
    files: tuple[File, ...] = ()
    standardize: bool = False

    def load(self, name: str, evaluate_on: str, folder: Path) -> Data:
        """Return the data set, split.

        To choose options (`evaluate_on="validation"`) a run fits three quarters of the training
        set, is judged by the last one and never sees the test set; the final runs (`"test"`) fit
        all of the training set. Where the authors did not split, a fifth is the test set. All
        splits are stratified by class and always the same.

        Raises:
            MissingDataError: the files are not in the folder and cannot be fetched.
            ValueError: a file is not what its name says; `evaluate_on` is none of the two.
        """
        if evaluate_on not in ("validation", "test"):
            raise ValueError(f"evaluate_on must be 'validation' or 'test', got {evaluate_on!r}")
        inputs, labels, n_train = self.read(*self._paths(name, folder))
        self._check(name, inputs, labels)
        if n_train is None:
            train, test = _divide(np.arange(len(labels)), labels, 1 / 5)
        else:
            train, test = np.arange(n_train), np.arange(n_train, len(labels))
        if evaluate_on == "test":
            fit, judge = train, test
        else:
            fit, judge = _divide(train, labels, 1 / 4)
        if self.standardize:
            over = tuple(i for i in range(inputs.ndim) if i != 1)
            mean = inputs[fit].mean(over, keepdims=True, dtype=np.float64)
            deviation = inputs[fit].std(over, keepdims=True, dtype=np.float64)
            inputs = (inputs - mean) / np.maximum(deviation, 1e-12)
        x, y = torch.from_numpy(np.float32(inputs)), torch.from_numpy(np.int64(labels))
        return Data(x[fit], y[fit], x[judge], y[judge])

    def _check(self, name: str, inputs: np.ndarray, labels: np.ndarray) -> None:
        """Raise ValueError unless inputs and labels are of the data set's kind."""
        if inputs.shape[1:] != self.shape:
            problem = f"inputs have the shape {inputs.shape[1:]}, not {self.shape}"
        elif not np.isfinite(inputs).all():
            problem = "not all inputs are finite"
        elif labels.min() < 0 or labels.max() >= self.classes:
            problem = f"labels are from {labels.min()} to {labels.max()}, of {self.classes} classes"
        else:
            return
        files = " and ".join(file.name for file in self.files)
        raise ValueError(f"{files} cannot be those of {name}: {problem}")

    def _paths(self, name: str, folder: Path) -> list[Path]:
        missing = [file for file in self.files if not file.find(folder)]
        try:
            for file in missing:
                file.fetch(folder)
        except (urllib.error.URLError, OSError) as error:
            needed = "\n".join(f"  {file.name} from {file.url}" for file in missing)
            raise MissingDataError(
                f"{name} is not in {folder} and cannot be fetched ({error}). "
                f"Put there, or name the folder that has them by --data:\n{needed}"
            ) from error
        return [path for file in self.files if (path := file.find(folder))]


def _divide(rows: np.ndarray, labels: np.ndarray, share: float) -> list[np.ndarray]:
    return train_test_split(rows, test_size=share, random_state=SPLIT_SEED, stratify=labels[rows])


def _read_digits() -> tuple[np.ndarray, np.ndarray, None]:
    bunch = load_digits()
    return bunch.images[:, None] / 16, bunch.target, None


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Where a file is broken or something else, raise ValueError with its name and what to do."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as {what} ({error}): remove it, and it is fetched again, or "
            "put the file of its authors there"
        ) from error


def read_idx(path: Path) -> np.ndarray:
    """Return the array of bytes in an IDX file, gzipped or not (the format of MNIST)."""
    with _reading(path, "an IDX file of unsigned bytes"):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08" or len(content) < 4:
            raise ValueError("its first bytes are other ones")
        start = 4 + 4 * content[3]
        shape = np.frombuffer(content[4:start], ">u4").astype(int)
        return np.frombuffer(content[start:], np.uint8).reshape(shape)


def _read_mnist(*paths: Path) -> tuple[np.ndarray, np.ndarray, int]:
    images, labels, test_images, test_labels = map(read_idx, paths)
    for i, (x, y) in enumerate(((images, labels), (test_images, test_labels))):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise ValueError(
                f"{paths[2 * i]} and {paths[2 * i + 1]} must have images and a label for each, "
                f"got arrays of the shapes {x.shape} and {y.shape}"
            )
    inputs = np.concatenate([images, test_images])[:, None] / np.float32(255)
    return inputs, np.concatenate([labels, test_labels]), len(labels)


def read_table(path: Path, columns: int, delimiter: str | None) -> np.ndarray:
    """Return a text file of numbers as float64 (rows, columns)."""
    with _reading(path, "a table of numbers"):
        table = np.loadtxt(path, delimiter=delimiter, ndmin=2)
        if table.shape[1] != columns:
            raise ValueError(f"it must have {columns} columns, got {table.shape[1]}")
        return table


def _read_pendigits(train: Path, test: Path) -> tuple[np.ndarray, np.ndarray, int]:
    parts = [read_table(path, 17, ",") for path in (train, test)]
    table = np.concatenate(parts)
    return table[:, :16] / 100, table[:, 16].astype(int), len(parts[0])


def _read_sdd(path: Path) -> tuple[np.ndarray, np.ndarray, None]:
    table = read_table(path, 49, None)
    return table[:, :48], table[:, 48].astype(int) - 1, None


def _read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Read the binary version, the archive itself or its folder: records of label and image."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    with _reading(path, "CIFAR-10's binary version"):
        if path.is_dir():
            batches = [(path / name).read_bytes() for name in names]
        else:
            with tarfile.open(path) as archive:
                files = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
                batches = [file.read() for file in files if file]
        if any(len(batch) % 3073 for batch in batches):
            raise ValueError("its records must have 3073 bytes each")
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32) / np.float32(255)
    return images, records[:, 0].astype(int), sum(map(len, batches[:5])) // 3073


def _idx_files(base: str, *checksums: str) -> tuple[File, ...]:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        File(f"{base}/{part}-ubyte.gz", md5, f"{part}-ubyte")
        for part, md5 in zip(parts, checksums, strict=True)
    )


_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases"

DATA = {
    # 1,797 images of 8 x 8, ten classes; comes with scikit-learn
    "digits": Source(_read_digits, (1, 8, 8), 10),
    # 60,000 + 10,000 images of 28 x 28, ten classes
    "mnist": Source(
        _read_mnist,
        (1, 28, 28),
        10,
        _idx_files(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion_mnist": Source(
        _read_mnist,
        (1, 28, 28),
        10,
        _idx_files(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    # 7,494 + 3,498 digits as eight points of a pen's way each, ten classes
    "pendigits": Source(
        _read_pendigits,
        (16,),
        10,
        (File(f"{_UCI}/pendigits/pendigits.tra"), File(f"{_UCI}/pendigits/pendigits.tes")),
    ),
    # Sensorless Drive Diagnosis: 58,509 rows of 48 features of very different sizes, 11 classes
    "sdd": Source(
        _read_sdd,
        (48,),
        11,
        (File(f"{_UCI}/00325/Sensorless_drive_diagnosis.txt"),),
        standardize=True,
    ),
    # 50,000 + 10,000 colour images of 32 x 32, ten classes
    "cifar10": Source(
        _read_cifar10,
        (3, 32, 32),
        10,
        (
            File(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c32a1d4ab5d03f1284b67883e8d87530",
                "cifar-10-batches-bin",
            ),
        ),
        standardize=True,
    ),
}
"""The data sets by name."""
