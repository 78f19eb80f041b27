"""Every fault of the catalogue has a test whose name begins with its id: `pytest -m faults -k k1` runs those of K1."""

import ast
import pathlib
import re

import pytest

from tests.faults import soak

pytestmark = pytest.mark.faults
TESTS = pathlib.Path(__file__).parents[1]

PROMPT = set("K1 K2 K3 T1 T3 C1 C2 C3 C4 C5 D1 D2 L1 M1 M3 O1 O2 P1 P3 X1 G1 G2 G3 G4 B1 B2 V S2 W1 W2 F1".split())  # noqa: SIM905
NIGHTLY = set("K1 T3 T4 C2 F1 H1 H2".split())  # noqa: SIM905  # by `make soak`, in tests/faults/soak.py


def is_marked(node, source):
    """Returns whether a test, or all of its module, has the mark `faults`."""
    where = [ast.unparse(d) for d in node.decorator_list] + re.findall(r"^pytestmark = .*?^\S", source, re.M | re.S)
    return any("mark.faults" in text for text in where)


def found_ids():
    found = set()
    for path in TESTS.rglob("test_*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_([a-z]\d|v)_", node.name)):
                assert is_marked(node, source), f"{path.name}: {node.name} has a fault's id, and not the mark `faults`"
                found.add(match[1].upper())
    return found


def test_every_fault_has_a_test():
    assert PROMPT - found_ids() == set()


def test_every_nightly_fault_is_in_the_soak():
    assert set(soak.FAULTS) == NIGHTLY
