"""Accelerator data sheet (matmul peaks, memory, links), and the available slice shapes."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

from gptjax.errors import ConfigError
from gptjax.gpu_memory import planned_fraction

GB = 1e9  # data sheets of GPUs and of bandwidths
GIB = 2.0**30  # TPU documentation


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip from its data sheet, in bytes and seconds."""

    kind: str  # a prefix of JAX's device_kind
    peak_flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s per link and direction
    links: int  # to other chips: two for each dimension of a torus; 1 to a switch
    network_bandwidth: float  # bytes/s per direction to other slices or nodes: the chip's share of its host's

    @property
    def run_bytes(self) -> float:
        """The memory available to a run, if nothing else uses the chip."""
        if self.kind.startswith("NVIDIA"):
            return self.memory_bytes * planned_fraction()
        return self.memory_bytes


# TPU figures are from Google Cloud's documentation, "System architecture" of v4, v5e, v5p and v6e, read on 2026-11-24.
# It gives a chip's bidirectional ICI bandwidth, which is 2 x links x link_bandwidth. For the data-center network it
# gives 50 Gbit/s per chip for v5p, and 6.4 and 25.6 Tbit/s per 256 chips for v5e and v6e. It gives none for v4, for
# which the table repeats v5p's.
# GPU figures are from NVIDIA's data sheets of A100 40 and 80 GB, H100 SXM, H200 and B200 (NVLink, one direction). The
# network is assumed to have one port of 400 Gbit/s per GPU (A100: 200), as in DGX systems.
CHIPS = (
    Chip(
        kind="TPU v4",
        peak_flops=275e12,
        memory_bytes=32 * GIB,
        memory_bandwidth=1228 * GB,
        link_bandwidth=50 * GB,
        links=6,  # a 3D torus
        network_bandwidth=6.25 * GB,
    ),
    Chip(
        kind="TPU v5 lite",
        peak_flops=197e12,
        memory_bytes=16 * GIB,
        memory_bandwidth=819 * GB,
        link_bandwidth=50 * GB,
        links=4,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="TPU v5",  # v5p; find_chip meets the longer "TPU v5 lite" first
        peak_flops=459e12,
        memory_bytes=95 * GIB,
        memory_bandwidth=2765 * GB,
        link_bandwidth=100 * GB,
        links=6,
        network_bandwidth=6.25 * GB,
    ),
    Chip(
        kind="TPU v6 lite",
        peak_flops=918e12,
        memory_bytes=32 * GIB,
        memory_bandwidth=1638 * GB,
        link_bandwidth=100 * GB,
        links=4,
        network_bandwidth=12.5 * GB,
    ),
    Chip(
        kind="NVIDIA A100-SXM4-40GB",
        peak_flops=312e12,
        memory_bytes=40 * GB,
        memory_bandwidth=1555 * GB,
        link_bandwidth=300 * GB,
        links=1,
        network_bandwidth=25 * GB,
    ),
    Chip(
        kind="NVIDIA A100",
        peak_flops=312e12,
        memory_bytes=80 * GB,
        memory_bandwidth=2039 * GB,
        link_bandwidth=300 * GB,
        links=1,
        network_bandwidth=25 * GB,
    ),
    Chip(
        kind="NVIDIA H100",
        peak_flops=989e12,
        memory_bytes=80 * GB,
        memory_bandwidth=3350 * GB,
        link_bandwidth=450 * GB,
        links=1,
        network_bandwidth=50 * GB,
    ),
    Chip(
        kind="NVIDIA H200",
        peak_flops=989e12,
        memory_bytes=141 * GB,
        memory_bandwidth=4800 * GB,
        link_bandwidth=450 * GB,
        links=1,
        network_bandwidth=50 * GB,
    ),
    Chip(
        kind="NVIDIA B200",
        peak_flops=2250e12,
        memory_bytes=180 * GB,
        memory_bandwidth=7700 * GB,
        link_bandwidth=900 * GB,
        links=1,
        network_bandwidth=50 * GB,
    ),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of JAX's device_kind, None if it is not in the table."""
    return next((chip for chip in CHIPS if device_kind.startswith(chip.kind)), None)


def peak_flops(device: Any) -> float:
    """Returns the peak bfloat16 FLOP/s of a device, or nan where it is not known."""
    chip = find_chip(device.device_kind)
    return chip.peak_flops if chip else math.nan


def device_memory(device: Any) -> float:
    """Returns the bytes of an accelerator that a run may use: JAX's limit, or the table's for a virtual device."""
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:  # a virtual device: gptjax.plan compiles for chips that this machine does not have
        stats = {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = find_chip(getattr(device, "device_kind", ""))
    return chip.run_bytes if chip else math.inf


class GpuTarget(NamedTuple):
    """The properties of a GPU by which XLA chooses and tunes kernels."""

    capability: tuple[int, int]
    multiprocessors: int
    float32_lanes: int  # per multiprocessor
    shared_kib: int  # per multiprocessor
    l2_mib: int
    clock_ghz: float


# Sources: NVIDIA's data sheets, and the CUDA programming guide's table of compute capabilities.
TARGETS = {
    "NVIDIA A100": GpuTarget(
        capability=(8, 0),
        multiprocessors=108,
        float32_lanes=64,
        shared_kib=164,
        l2_mib=40,
        clock_ghz=1.41,
    ),
    "NVIDIA H100": GpuTarget(
        capability=(9, 0),
        multiprocessors=132,
        float32_lanes=128,
        shared_kib=228,
        l2_mib=50,
        clock_ghz=1.98,
    ),
    "NVIDIA H200": GpuTarget(
        capability=(9, 0),
        multiprocessors=132,
        float32_lanes=128,
        shared_kib=228,
        l2_mib=50,
        clock_ghz=1.98,
    ),
    "NVIDIA B200": GpuTarget(
        capability=(10, 0),
        multiprocessors=148,
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
            threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            shared_memory_per_core: {target.shared_kib * 1024} shared_memory_per_block: {48 * 1024}
            shared_memory_per_block_optin: {(target.shared_kib - 1) * 1024}
            l2_cache_size: {target.l2_mib * 2**20} device_address_bits: 64 ecc_enabled: true
            device_memory_size: {int(chip.memory_bytes)} memory_bandwidth: {int(chip.memory_bandwidth)}
        }}"""


TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
GPUS = {"a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
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
        return self.chip.kind.startswith("TPU")

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
    kind, _, shape = text.partition(":")
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
