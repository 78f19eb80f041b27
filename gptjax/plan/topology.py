"""The devices that a plan is for: TPU slices, nodes of GPUs, and GPUs as XLA's compiler sees them."""

import dataclasses
import math
import re
from typing import NamedTuple

from gptjax.chips import Chip, find_chip
from gptjax.errors import ConfigError


class GpuTarget(NamedTuple):
    """The properties of a GPU by which XLA chooses and tunes kernels."""

    capability: tuple[int, int]
    multiprocessors: int
    threads: int  # per multiprocessor
    float32_lanes: int  # per multiprocessor
    shared_kib: int  # per multiprocessor
    l2_mib: int
    clock_ghz: float


# Sources: NVIDIA's data sheets, and the CUDA programming guide's table of compute capabilities.
TARGETS = {
    "Tesla T4": GpuTarget(
        capability=(7, 5),
        multiprocessors=40,
        threads=1024,
        float32_lanes=64,
        shared_kib=64,
        l2_mib=4,
        clock_ghz=1.59,
    ),
    "Tesla V100": GpuTarget(
        capability=(7, 0),
        multiprocessors=80,
        threads=2048,
        float32_lanes=64,
        shared_kib=96,
        l2_mib=6,
        clock_ghz=1.53,
    ),
    "NVIDIA A10": GpuTarget(
        capability=(8, 6),
        multiprocessors=72,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=6,
        clock_ghz=1.695,
    ),
    "NVIDIA L4": GpuTarget(
        capability=(8, 9),
        multiprocessors=58,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=48,
        clock_ghz=2.04,
    ),
    "NVIDIA L40S": GpuTarget(
        capability=(8, 9),
        multiprocessors=142,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=96,
        clock_ghz=2.52,
    ),
    "NVIDIA RTX A6000": GpuTarget(
        capability=(8, 6),
        multiprocessors=84,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=6,
        clock_ghz=1.8,
    ),
    "NVIDIA GeForce RTX 3090": GpuTarget(
        capability=(8, 6),
        multiprocessors=82,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=6,
        clock_ghz=1.695,
    ),
    "NVIDIA GeForce RTX 4090": GpuTarget(
        capability=(8, 9),
        multiprocessors=128,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=72,
        clock_ghz=2.52,
    ),
    "NVIDIA GeForce RTX 5090": GpuTarget(
        capability=(12, 0),
        multiprocessors=170,
        threads=1536,
        float32_lanes=128,
        shared_kib=100,
        l2_mib=96,
        clock_ghz=2.407,
    ),
    "NVIDIA A100": GpuTarget(
        capability=(8, 0),
        multiprocessors=108,
        threads=2048,
        float32_lanes=64,
        shared_kib=164,
        l2_mib=40,
        clock_ghz=1.41,
    ),
    "NVIDIA H100": GpuTarget(
        capability=(9, 0),
        multiprocessors=132,
        threads=2048,
        float32_lanes=128,
        shared_kib=228,
        l2_mib=50,
        clock_ghz=1.98,
    ),
    "NVIDIA H200": GpuTarget(
        capability=(9, 0),
        multiprocessors=132,
        threads=2048,
        float32_lanes=128,
        shared_kib=228,
        l2_mib=50,
        clock_ghz=1.98,
    ),
    "NVIDIA B200": GpuTarget(
        capability=(10, 0),
        multiprocessors=148,
        threads=2048,
        float32_lanes=128,
        shared_kib=228,
        l2_mib=126,
        clock_ghz=1.965,
    ),
}


def gpu_target(chip: Chip) -> str:
    """Returns XLA's description of a GPU, a GpuTargetConfigProto as text, to compile for it on any machine."""
    target = TARGETS[chip.kind]
    major, minor = target.capability
    # From Hopper on XLA compiles for sm_90a, sm_100a, ...: with the instructions of this one architecture.
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{chip.kind}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
            name: "{chip.kind}"
            device_vendor: "NVIDIA Corporation"
            cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
            driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
            dnn_version: "9.10.0"
            core_count: {target.multiprocessors} fpus_per_core: {target.float32_lanes}
            clock_rate_ghz: {target.clock_ghz}
            threads_per_core_limit: {target.threads} threads_per_block_limit: 1024 threads_per_warp: 32
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            shared_memory_per_core: {target.shared_kib * 1024} shared_memory_per_block: {48 * 1024}
            shared_memory_per_block_optin: {(target.shared_kib - 1) * 1024}
            l2_cache_size: {target.l2_mib * 2**20} device_address_bits: 64 ecc_enabled: true
            device_memory_size: {int(chip.memory_bytes)} memory_bandwidth: {int(chip.memory_bandwidth)}
        }}"""


TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
GPUS = {
    "t4": "Tesla T4",
    "v100": "Tesla V100",
    "a10": "NVIDIA A10",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "a6000": "NVIDIA RTX A6000",
    "3090": "NVIDIA GeForce RTX 3090",
    "4090": "NVIDIA GeForce RTX 4090",
    "5090": "NVIDIA GeForce RTX 5090",
    "a100": "NVIDIA A100",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
# Slices that Google Cloud offers, by its documentation of each version, read on 2026-11-24. The larger 3D slices
# consist of full cubes of 4 x 4 x 4; those of more than 2,048 chips are left out.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": CUBIC, "v5e": FLAT, "v5p": CUBIC, "v6e": FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that --topology and --slices describe."""

    kind: str  # v5e, h100, ...
    shape: str  # of a slice, such as 4x4; for GPUs the number per node
    slices: int  # for GPUs the number of nodes
    chip: Chip

    @property
    def devices(self) -> int:
        """The number of devices in all slices or nodes."""
        return self.slices * _chips_of(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether the chips are TPUs; otherwise they are GPUs."""
        return self.chip.is_tpu

    @property
    def memory_bytes(self) -> float:
        """The memory available to a run on each chip; on this machine it is JAX's limit, from find_local."""
        return self.chip.memory_bytes if self.is_local else self.chip.run_bytes

    @property
    def is_local(self) -> bool:
        """Whether the devices are those of this machine."""
        return self.kind == "local"

    def __str__(self) -> str:
        name = f"{self.kind}:{self.shape}"
        return f"{self.slices} x {name}" if self.slices > 1 else name


def _chips_of(shape: str) -> int:
    """Returns the number of chips of a shape such as 4x4; 0 if it is not one."""
    size = "[1-9][0-9]{0,5}"  # few digits, so that the ratio of two shapes is a float
    if not re.fullmatch(f"{size}(x{size}){{0,2}}", shape):
        return 0
    return math.prod(map(int, shape.split("x")))


def parse_topology(text: str, slices: int) -> Topology:
    """Returns the topology of --topology=`text`, such as v5e:4x4 or h100:8.

    Raises:
        ConfigError: the chip or the slice does not exist; the message names the nearest ones.
    """
    kind, _, shape = text.lower().partition(":")  # H100:8 is how a catalogue writes it
    kinds = TPUS | GPUS
    if kind not in kinds:
        raise ConfigError(
            "no such chip",
            field="--topology",
            value=text,
            remedy=f"known: {', '.join(kinds)}, as in v5e:4x4 or h100:8",
        )
    chip = find_chip(kinds[kind])
    assert chip is not None, kind
    if kind in GPUS:
        if "x" in shape or not _chips_of(shape):
            raise ConfigError(
                f"expected {kind}:N, the number of GPUs per node",
                field="--topology",
                value=text,
                remedy="for more nodes add --slices",
            )
    elif shape not in SLICES[kind]:
        raise ConfigError(
            "no such slice",
            field="--topology",
            value=text,
            remedy=f"nearest: {', '.join(_nearest_slices(kind, shape))}",
        )
    return Topology(kind, shape, slices, chip)


def _nearest_slices(kind: str, shape: str) -> list[str]:
    """Returns the three slices whose number of chips is nearest to that of `shape`, by ratio."""
    wanted = _chips_of(shape) or 16

    def distance(offered: str) -> float:
        return abs(math.log(_chips_of(offered) / wanted))

    by_distance = sorted(SLICES[kind], key=distance)
    return [f"{kind}:{offered}" for offered in by_distance[:3]]


def local_topology(chip: Chip, devices: int, slices: int) -> Topology:
    """Returns the topology of this machine's `devices` devices; chip.memory_bytes must be JAX's limit per device."""
    per_slice = devices // slices
    return Topology("local", str(per_slice), slices, chip)
