"""Every fault of the catalogue has a test whose name begins with its id: `pytest -m faults -k k1` runs those of K1."""

import ast
import pathlib
import re

import pytest

from tests.faults import soak

pytestmark = pytest.mark.faults
TESTS = pathlib.Path(__file__).parents[1]

IDS = "A1 B1 B2 B3 C1 C2 C3 C4 C5 C6 D1 D2 D3 D4 D5 E1 F1 G1 G2 G3 G4 I1 I2 J1 K1 K2 K3 L1 L2 M1 M3 O1"
IDS += " O2 O3 O4 P1 P3 P4 P5 R1 S2 T1 T3 U1 V W1 W2 W3 X1 Z1 Z2"
PROMPT = set(IDS.split())
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
    found = found_ids()
    assert PROMPT - found == set()
    assert found - PROMPT - NIGHTLY == set(), "ids that no list has"


def test_every_nightly_fault_is_in_the_soak():
    assert set(soak.FAULTS) == NIGHTLY
