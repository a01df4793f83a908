"""The command line: `tl1kernels train | bench | verify | info`, also `python -m tl1kernels`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tl1kernels import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    0, or 1 for a failed check or where nobody reads what is printed, 2 for bad usage, 130 after
    Ctrl-C.
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # at exit it is too late to catch that nobody reads
    except BrokenPipeError:
        # What is still buffered is flushed at exit, and would raise there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"tl1kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tl1kernels: interrupted", file=sys.stderr)
        return 130


class UsageError(Exception):
    """The command cannot run as asked; the message says why."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl1kernels",
        description="Proximal optimizers for PyTorch that leave exact zeros.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train", help="train the same network with every regularizer and compare"
    )
    train.add_argument(
        "dataset", help="digits (no network needed), mnist, fashion_mnist, pendigits, sdd, cifar10"
    )
    train.add_argument("--out", type=Path, help="folder for results [runs/DATASET]")
    train.add_argument(
        "--data",
        type=Path,
        help="folder with the data set's files, or for them; digits needs none [data/DATASET]",
    )
    train.add_argument(
        "--methods", nargs="+", metavar="NAME", help="which to train, any penalty [the paper's]"
    )
    train.add_argument("--seeds", type=_positive, default=5, help="runs per method [%(default)s]")
    train.add_argument("--jobs", type=_positive, help="runs at a time [one per core]")
    train.add_argument("--epochs", type=_positive, help="epochs of every run [the recipe's]")
    how_much = train.add_mutually_exclusive_group()
    how_much.add_argument(
        "--paper", action="store_true", help="all of the paper's tables and figures: more runs"
    )
    how_much.add_argument(
        "--tables", action="store_true", help="no curves, which need other lam: half of the runs"
    )
    train.add_argument(
        "--search",
        action="store_true",
        help="choose lam and a on the validation split and write OUT/chosen.json, no more; "
        "--seeds, --paper and --tables are of the runs without --search",
    )
    train.set_defaults(run=_train)

    bench = commands.add_parser(
        "bench", help="time steps on this machine, beside a copy and torch's fused optimizers"
    )
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="[a GPU if torch can use one, else cpu]"
    )
    bench.add_argument("--backend", help="name of a backend [the one that the device prefers]")
    bench.add_argument(
        "--size", type=_positive, help="rows and columns of large weights [4096, on a GPU 8192]"
    )
    bench.add_argument("--rounds", type=_positive, default=11, help="of each case [%(default)s]")
    bench.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for results [%(default)s]"
    )
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(run=_bench)

    verify = commands.add_parser("verify", help="check a backend against independent oracles")
    verify.add_argument("--backend", help="name of a backend [the one that CPU tensors run on]")
    verify.add_argument(
        "--device", help="cpu, cuda or cuda:1 [the CPU, or the GPU where Triton compiles]"
    )
    verify.add_argument("--seed", type=_count, help="of the random input [a fresh one, printed]")
    verify.add_argument(
        "--penalty", nargs="+", metavar="NAME", help="which to check, 'none' for groups alone [all]"
    )
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)

    info = commands.add_parser("info", help="what is built, what runs where, and why not the rest")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, 1)


def require_among(what: str, value: str, allowed: Iterable[str], where: str = "") -> None:
    """Raise UsageError unless the value of `what`, a flag or variable, is one of those allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise UsageError(f"{what} must be among {', '.join(allowed)}{where}, got {value!r}")


def choose_backend(flag: str | None, device_type: str) -> tuple[str, str]:
    """Return the backend to run on, and what names it: the flag, the environment, or the device.

    Raises:
        UsageError: no backend has that name, or it cannot run here.
    """
    from tl1kernels import backends

    if flag is not None:
        name, source = flag, "--backend"
    elif (asked := backends.asked_for()) is not None:
        name, source = asked, backends.ENVIRONMENT
    else:
        name, source = backends.preferred(device_type), "the default backend"
    require_among(source, name, backends.BACKENDS)
    try:
        backends.require(name)
    except RuntimeError as error:
        raise UsageError(f"{source}: {error}") from error
    return name, source


def try_step(backend: str, source: str, device: str) -> None:
    """Take a step of one weight, so that what hinders every step is said before any work.

    Raises:
        UsageError: it failed; the message names `source`, see `choose_backend`.
    """
    import torch

    from tl1kernels import prox

    try:
        prox(torch.ones(1, device=device), 1.0, lam=0.1, backend=backend)
    except RuntimeError as error:
        raise UsageError(f"{source}: {error}") from error


def make_out(folder: Path) -> None:
    """Make the folder of --out and try to write there, before any work.

    Raises:
        UsageError: there cannot be such a folder, or no file can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"tried")
            file.flush()
    except OSError as error:
        raise UsageError(
            f"--out must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
        ) from error


@contextmanager
def _extra(name: str, command: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{command} needs {error.name}: pip install 'tl1kernels[{name}]'"
        ) from error


def _train(args: argparse.Namespace) -> int:
    with _extra("train", "train"):
        from tl1kernels.train import command
    return command.run(args)


def _bench(args: argparse.Namespace) -> int:
    with _extra("bench", "bench"):
        from tl1kernels.bench import command
    try:
        return command.run(args)
    except command.WrongStepError as error:
        print(f"tl1kernels: {error}", file=sys.stderr)
        return 1


def _verify(args: argparse.Namespace) -> int:
    with _extra("verify", "verify"):
        from tl1kernels.verify import devices_of, penalties_of, verify
    backend, source = choose_backend(args.backend, "cpu")
    where = f" for backend {backend!r}"
    has = [name or "none" for name in penalties_of(backend)]
    for name in args.penalty or ():
        require_among("--penalty", name, has, where)
    devices = devices_of(backend)
    device = devices[0] if args.device is None else args.device
    require_among("--device", device, devices, where)
    try_step(backend, source, device)
    penalties = args.penalty and [None if name == "none" else name for name in args.penalty]
    report = verify(backend, args.seed, penalties, device)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0 if report.passed else 1


def _info(args: argparse.Namespace) -> int:
    from tl1kernels.info import info

    report = info()
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0
