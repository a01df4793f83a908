"""The README's contract names tests that exist, and says what tests/contract.py says."""

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
