"""The names of topologies, and GPUs as the compiler sees them."""

import pytest

from gptjax.chips import find_chip
from gptjax.errors import ConfigError
from gptjax.plan.topology import GPUS, SLICES, TARGETS, TPUS, gpu_target, local_topology, parse_topology
from tests.helpers import raises


def test_every_name_has_a_chip():
    for kind in (TPUS | GPUS).values():
        assert find_chip(kind).kind == kind


@pytest.mark.parametrize(
    ("text", "slices", "devices"),
    [("v5e:4x4", 1, 16), ("v5e:16x16", 2, 512), ("v5p:8x16x16", 1, 2048), ("v4:2x2x1", 1, 4), ("h100:8", 4, 32)],
)
def test_topology_text_gives_devices_and_name(text, slices, devices):
    topology = parse_topology(text, slices)
    assert topology.devices == devices
    assert topology.is_tpu == (text[0] == "v")
    assert str(topology) == (text if slices == 1 else f"{slices} x {text}")


def test_letters_of_a_chip_may_be_large():
    assert parse_topology("H100:8", 2) == parse_topology("h100:8", 2)
    assert parse_topology("V5E:4x4", 1) == parse_topology("v5e:4x4", 1)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (
            "v9:4x4",
            "known: v4, v5e, v5p, v6e, t4, v100, a10, l4, l40s, a6000, 3090, 4090, 5090, a100, h100, h200, b200",
        ),
        ("v5e:4x5", "nearest: v5e:4x4, "),
        ("v5e:4x4x4", "nearest: v5e:8x8"),
        ("v5p:4x4", "nearest: v5p:2x2x4"),
        ("v5e", "nearest: "),
        ("h100:4x4", "--slices"),
        ("h100:0", "--slices"),
        ("h100:" + "9" * 5000, "--slices"),
        ("h100:\u00b2", "--slices"),
        ("v5e:" + "9" * 5000 + "x4", "nearest: "),
        ("v5e:" + "9" * 400 + "x4", "nearest: "),
        ("", "known: "),
    ],
)
def test_unknown_chip_or_slice_is_refused(text, remedy):
    with raises(ConfigError, "--topology", value=text, remedy=remedy):
        parse_topology(text, 1)


def test_every_gpu_can_be_described_to_the_compiler():
    for kind in GPUS.values():
        chip = find_chip(kind)
        text = gpu_target(chip)
        assert f"device_memory_size: {int(chip.memory_bytes)} memory_bandwidth: {int(chip.memory_bandwidth)}" in text
        assert text.count("{") == text.count("}")
        assert TARGETS[kind].capability >= (8, 0) or not chip.has_bfloat16, kind
    assert "major: 8 minor: 0  }" in gpu_target(find_chip("NVIDIA A100")), "no features of a later architecture"


def test_local_topology_is_named_local():
    topology = local_topology(find_chip("TPU v5 lite"), 8, 2)
    assert (topology.devices, topology.is_local, topology.is_tpu) == (8, True, True)
    assert str(topology) == "2 x local:4"


def test_slice_shapes_are_unique_and_sorted_by_chips():
    for kind, shapes in SLICES.items():
        assert len(set(shapes)) == len(shapes), kind
        assert [parse_topology(f"{kind}:{shape}", 1).devices for shape in shapes] == sorted(
            parse_topology(f"{kind}:{shape}", 1).devices for shape in shapes
        ), kind
