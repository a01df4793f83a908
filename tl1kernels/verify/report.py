"""The report of `verify`: its checks, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WIDTH = 20  # of a column


@dataclass(frozen=True)
class Check:
    """One cell of the report: the largest error over `cases` values, in `unit`, and its bound.

    `p999` is what 99.9 % of them are within; `differing`, of the checks of zeros, how many weights
    are 0 on one side alone, and the error is then how far from the threshold the farthest lies.
    """

    section: str
    row: str
    dtype: str
    against: str
    cases: int
    error: float
    bound: float
    unit: str
    p999: float
    differing: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound

    @property
    def what(self) -> str:
        """What was checked, in one line."""
        return f"{self.section} {self.row}, {self.dtype}"


@dataclass(frozen=True)
class Report:
    """All checks of one backend; `print` it for a table of errors by section, row and dtype.

    `lacking` are the penalties that were not checked, since the backend does not have them.
    """

    backend: str
    seed: int
    checks: tuple[Check, ...]
    lacking: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers and strings."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {
            "backend": self.backend,
            "seed": self.seed,
            "passed": self.passed,
            "lacking": list(self.lacking),
            "checks": checks,
        }

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, seed {self.seed}"]
        for section in dict.fromkeys(check.section for check in self.checks):
            lines += ["", *_table([c for c in self.checks if c.section == section])]
        failed = [check for check in self.checks if not check.passed]
        if self.lacking:
            lines += [
                "",
                f"not checked, since {self.backend} lacks them: {', '.join(self.lacking)}",
            ]
        lines += ["", f"{len(self.checks) - len(failed)} of {len(self.checks)} checks passed"]
        # Again at the end, where a log that was cut short still has them.
        lines += [f"FAIL {c.what}: {c.error:.3g}, bound {c.bound:g} {c.unit}" for c in failed]
        if failed:
            lines += [f"the same command with --seed {self.seed} repeats it"]
        return "\n".join(lines)


def _table(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the lines of one section: a row of errors for each thing checked, a column a dtype."""
    first = checks[0]
    cells = {(check.row, check.dtype): check for check in checks}
    rows, dtypes = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    width = max(map(len, (*rows, "bound")))
    against = f"against {first.against}, in {first.unit}"
    yield f"{first.section}: largest error / 99.9 % within, {against}"
    yield f"  {'':{width}}" + "".join(f"{dtype:>{WIDTH}}" for dtype in dtypes)
    for row in rows:
        line = f"  {row:{width}}"
        for dtype in dtypes:
            cell = cells.get((row, dtype))
            line += f"{'' if cell is None else _cell(cell):>{WIDTH}}"
        yield line
    bounds = [next(c.bound for c in checks if c.dtype == dtype) for dtype in dtypes]
    yield f"  {'bound':{width}}" + "".join(f"{bound:>{WIDTH}g}" for bound in bounds)


def _cell(check: Check) -> str:
    text = f"{check.error:.3g}"
    if check.differing is not None:
        text += f" ({check.differing} differ)" if check.differing else ""
    elif check.p999 != check.error:
        text += f" / {check.p999:.3g}"
    return text if check.passed else text + " FAIL"
