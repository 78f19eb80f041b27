"""The table of chips, and the names of topologies."""

import pytest

from gptjax.chips import CHIPS, GPUS, SLICES, TPUS, find_chip, gpu_target, local_topology, parse_topology
from gptjax.errors import ConfigError


def test_every_name_has_a_chip():
    for kind in (TPUS | GPUS).values():
        assert find_chip(kind).kind == kind
    assert find_chip("cpu") is None


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v4", 275e12), ("NVIDIA H200", 989e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("TPU v6 lite", 918e12)],
)  # fmt: skip
def test_peak_by_what_jax_calls_a_device(device_kind, peak):
    assert find_chip(device_kind).peak_flops == peak


def test_no_kind_hides_another():
    for number, chip in enumerate(CHIPS):
        assert find_chip(chip.kind) is CHIPS[number], "an earlier row's kind begins like this one"


def test_figures_are_in_bytes_and_seconds():
    for chip in CHIPS:
        assert 1e14 < chip.peak_flops < 1e16, chip.kind
        assert 1e10 < chip.memory_bytes < 1e12, chip.kind
        assert chip.network_bandwidth < chip.link_bandwidth * chip.links < chip.memory_bandwidth, chip.kind


@pytest.mark.parametrize(
    ("text", "slices", "devices"),
    [("v5e:4x4", 1, 16), ("v5e:16x16", 2, 512), ("v5p:8x16x16", 1, 2048), ("v4:2x2x1", 1, 4), ("h100:8", 4, 32)],
)
def test_topologies(text, slices, devices):
    topology = parse_topology(text, slices)
    assert topology.devices == devices
    assert topology.is_tpu == (text[0] == "v")
    assert str(topology) == (text if slices == 1 else f"{slices} x {text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", r"--topology=v9:4x4: no such chip; known: v4, v5e, v5p, v6e, a100, h100, h200, b200"),
        ("v5e:4x5", r"--topology=v5e:4x5: no such slice; nearest: v5e:4x4, "),
        ("v5e:4x4x4", r"no such slice; nearest: v5e:8x8"),
        ("v5p:4x4", r"no such slice; nearest: v5p:2x2x4"),
        ("v5e", r"no such slice"),
        ("h100:4x4", r"expected h100:N"),
        ("h100:0", r"expected h100:N"),
        ("", r"no such chip"),
    ],
)
def test_what_there_is_not(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text, 1)


def test_every_gpu_can_be_described_to_the_compiler():
    for kind in GPUS.values():
        chip = find_chip(kind)
        text = gpu_target(chip)
        assert f"device_memory_size: {int(chip.memory_bytes)} memory_bandwidth: {int(chip.memory_bandwidth)}" in text
        assert text.count("{") == text.count("}")
    assert "major: 8 minor: 0  }" in gpu_target(find_chip("NVIDIA A100")), "no features of a later architecture"


def test_what_is_here_is_named_so():
    topology = local_topology(find_chip("TPU v5 lite"), 8, 2)
    assert (topology.devices, topology.is_local, topology.is_tpu) == (8, True, True)
    assert str(topology) == "2 x local:4"


def test_slices_are_named_by_their_chips():
    for kind, shapes in SLICES.items():
        assert len(set(shapes)) == len(shapes), kind
        assert [parse_topology(f"{kind}:{shape}", 1).devices for shape in shapes] == sorted(
            parse_topology(f"{kind}:{shape}", 1).devices for shape in shapes
        ), kind
