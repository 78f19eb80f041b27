"""The list of mutants: each change applies to the code as it is, and is one."""

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_applies_once_and_stays_valid_python(mutant):
    source = (ROOT / mutant.file).read_text()
    changed = mutated(mutant, source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert all((ROOT / part.split("::")[0]).exists() for part in mutant.tests.split() if part.startswith("tests/"))


def test_mutants_have_unique_names():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
