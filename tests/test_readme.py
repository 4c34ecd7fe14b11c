"""The README names the tests that show its promises: each of them exists."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text()
NAMES = {name for path in TESTS.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}


def test_the_files_of_tests_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\b(test_[a-z_]+)\b", README))
    assert len(named) > 10
    assert not [name for name in named if not (TESTS / f"{name}.py").exists()]


def test_the_tests_of_which_the_readme_tells_a_part_exist() -> None:
    parts = re.findall(r"`…?([a-z]+(?:_[a-z]+)+)…`", README)
    assert len(parts) > 4
    assert not [part for part in parts if not any(part in name for name in NAMES)]
