"""The command line: `tl1kernels train | verify | info`, also `python -m tl1kernels`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 for a failed check, 2 for bad usage."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"tl1kernels: {error}", file=sys.stderr)
        return 2


class UsageError(Exception):
    """The command cannot run as asked; the message says why."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl1kernels",
        description="Proximal optimizers for PyTorch that leave exact zeros.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train", help="train the same network with every regularizer and compare"
    )
    train.add_argument("dataset", choices=["digits"], help="scikit-learn's DIGITS; no network")
    train.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="folder for results [%(default)s]"
    )
    train.add_argument("--methods", nargs="+", metavar="NAME", help="which to train [all]")
    train.add_argument("--seeds", type=_positive, default=5, help="runs per method [%(default)s]")
    train.add_argument("--jobs", type=_positive, help="runs at a time [one per core]")
    train.add_argument("--epochs", type=_positive, help="epochs of every run [100]")
    train.add_argument(
        "--search",
        action="store_true",
        help="choose lam and a on the validation split and write OUT/chosen.json",
    )
    train.set_defaults(run=_train)

    verify = commands.add_parser("verify", help="check a backend against independent oracles")
    verify.add_argument("--backend", default="reference", help="name of a backend [%(default)s]")
    verify.add_argument("--seed", type=int, help="of the random input [a fresh one, printed]")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)

    info = commands.add_parser("info", help="what is built, what runs where, and why not the rest")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _train(args: argparse.Namespace) -> int:
    try:
        from tl1kernels.train import command
    except ModuleNotFoundError as error:
        raise UsageError(f"train needs {error.name}: pip install 'tl1kernels[train]'") from error
    return command.run(args)


def _verify(args: argparse.Namespace) -> int:
    from tl1kernels import backends
    from tl1kernels.verify import verify

    try:
        backends.require(args.backend)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    report = verify(args.backend, args.seed)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0 if report.passed else 1


def _info(args: argparse.Namespace) -> int:
    from tl1kernels.info import info

    report = info()
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0
