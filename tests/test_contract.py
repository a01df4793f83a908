"""The README's contract names tests that exist, and says what tests/contract.py says."""

import subprocess
import sys

from tests import contract


def test_every_line_of_the_contract_has_its_tests():
    assert not contract.missing()


def test_the_readme_shows_the_contract():
    readme = (contract.ROOT / "README.md").read_text()
    assert contract.rendered(readme) == readme


def test_a_missing_test_or_another_table_is_noticed(monkeypatch):
    monkeypatch.setitem(contract.CONTRACT, "new", ("nothing", {"test_optim": ["test_nowhere"]}))
    assert contract.missing() == ["test_optim::test_nowhere"]
    readme = (contract.ROOT / "README.md").read_text()
    assert contract.rendered(readme) != readme


def test_the_command_tells_by_its_status_whether_the_readme_has_the_table():
    command = [sys.executable, "-m", "tests.contract", "--check"]
    done = subprocess.run(command, cwd=contract.ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
