"""The table of chips."""

import math
import types

import pytest

from gptjax.chips import CHIPS, find_chip, has_bfloat16, peak_flops


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v4", 275e12), ("NVIDIA H200", 989e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("TPU v6 lite", 918e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA RTX A6000", 154.8e12),
     ("Tesla T4", 8.1e12), ("Tesla V100-SXM2-32GB", 15.7e12), ("NVIDIA GeForce RTX 3090", 71e12),
     ("NVIDIA GeForce RTX 4090 D", 165.2e12), ("NVIDIA GeForce RTX 5090", 209.5e12)],
)  # fmt: skip
def test_peak_flops_are_found_by_jax_device_kind(device_kind, peak):
    assert find_chip(device_kind).peak_flops == peak


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", ""])
def test_a_longer_name_is_another_chip(device_kind):
    assert find_chip(device_kind) is None


def test_no_chip_kind_is_hidden_by_an_earlier_row():
    for number, chip in enumerate(CHIPS):
        assert find_chip(chip.kind) is CHIPS[number], "an earlier row's kind begins like this one"


def test_figures_are_in_bytes_and_seconds():
    for chip in CHIPS:
        assert (5e12 if not chip.has_bfloat16 else 5e13) < chip.peak_flops < 1e16, chip.kind
        assert 1e10 < chip.memory_bytes < 1e12, chip.kind
        assert chip.network_bandwidth < chip.link_bandwidth * chip.links < chip.memory_bandwidth, chip.kind


def test_peak_flops_of_an_unknown_device_is_nan():
    device = lambda kind: types.SimpleNamespace(device_kind=kind)  # noqa: E731
    assert peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(device("TPU v5 lite")) == 197e12
    assert peak_flops(device("TPU v5")) == 459e12
    assert math.isnan(peak_flops(device("cpu")))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({"device_kind": "Tesla T4", "compute_capability": "7.5"}, False),
        ({"device_kind": "Tesla V100-SXM2-16GB"}, False),
        ({"device_kind": "NVIDIA L4"}, True),
        ({"device_kind": "Quadro RTX 6000", "compute_capability": "7.5"}, False),
        ({"device_kind": "NVIDIA A10G", "compute_capability": "8.6"}, True),
    ],
)
def test_bfloat16_is_known_by_the_table_or_the_capability(device, expected):
    assert has_bfloat16(types.SimpleNamespace(**device)) is expected
