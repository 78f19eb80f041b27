"""What the accelerators can do, in one table: matrix units, memory, links; and the slices that there are of them."""

import dataclasses
import math
import re
from typing import Any

from gptjax.errors import ConfigError

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip, at its data sheet's best; bytes and seconds."""

    kind: str  # how JAX's device_kind begins
    peak_flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one link, one way
    links: int  # to other chips: two for each dimension of a torus; 1 where a switch connects all
    network_bandwidth: float  # bytes/s to other slices or nodes, one way, a chip's share of its host's


# Sources. TPU: Google Cloud's documentation, "System architecture" of v4, v5e, v5p and v6e, read on 2026-11-24; a
# chip's bidirectional ICI bandwidth there is 2 x links x link_bandwidth. Data center network: v5p says 50 Gbit/s a
# chip, v5e and v6e 6.4 and 25.6 Tbit/s for 256 chips; v4 says nothing, v5p's is taken. GPU: NVIDIA's data sheets of
# A100 40 and 80 GB, H100 SXM, H200, B200 (NVLink, one direction); the network is taken as one port of 400 Gbit/s a GPU
# (A100: 200), as in DGX systems.
CHIPS = (
    Chip("TPU v4", 275e12, 32 * GIB, 1228 * GB, 50 * GB, 6, 6.25 * GB),
    Chip("TPU v5 lite", 197e12, 16 * GIB, 819 * GB, 50 * GB, 4, 3.125 * GB),
    Chip("TPU v5", 459e12, 95 * GIB, 2765 * GB, 100 * GB, 6, 6.25 * GB),  # v5p
    Chip("TPU v6 lite", 918e12, 32 * GIB, 1638 * GB, 100 * GB, 4, 12.5 * GB),
    Chip("NVIDIA A100-SXM4-40GB", 312e12, 40 * GB, 1555 * GB, 300 * GB, 1, 25 * GB),
    Chip("NVIDIA A100", 312e12, 80 * GB, 2039 * GB, 300 * GB, 1, 25 * GB),
    Chip("NVIDIA H100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 1, 50 * GB),
    Chip("NVIDIA H200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 1, 50 * GB),
    Chip("NVIDIA B200", 2250e12, 180 * GB, 7700 * GB, 900 * GB, 1, 50 * GB),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of JAX's device_kind, None if the table has none."""
    return next((chip for chip in CHIPS if device_kind.startswith(chip.kind)), None)


def device_memory(device: Any) -> float:
    """Returns the bytes of an accelerator's memory: what it says itself, or the table for one that is not there."""
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:  # of a topology: gptjax.plan compiles for chips that are elsewhere
        stats = {}
    chip = find_chip(getattr(device, "device_kind", ""))
    return stats.get("bytes_limit", chip.memory_bytes if chip else math.inf)


# What XLA must know of a GPU to compile for it, from NVIDIA's data sheets and the CUDA programming guide's table of
# compute capabilities: capability, multiprocessors, float32 lanes and KiB of shared memory of each, MiB of L2, GHz.
TARGETS = {
    "NVIDIA A100": ((8, 0), 108, 64, 164, 40, 1.41),
    "NVIDIA H100": ((9, 0), 132, 128, 228, 50, 1.98),
    "NVIDIA H200": ((9, 0), 132, 128, 228, 50, 1.98),
    "NVIDIA B200": ((10, 0), 148, 128, 228, 126, 1.965),
}


def gpu_target(chip: Chip) -> str:
    """Returns XLA's description of a GPU (a GpuTargetConfigProto, as text), to compile for without one."""
    (major, minor), cores, lanes, shared, cache, clock = TARGETS[chip.kind]
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
            core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
            threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            shared_memory_per_core: {shared * 1024} shared_memory_per_block: {48 * 1024}
            shared_memory_per_block_optin: {(shared - 1) * 1024}
            l2_cache_size: {cache * 2**20} device_address_bits: 64 ecc_enabled: true
            device_memory_size: {int(chip.memory_bytes)} memory_bandwidth: {int(chip.memory_bandwidth)}
        }}"""


TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
GPUS = {"a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
# Slices that Google Cloud offers (its documentation of each version, read on 2026-11-24); of 3D ones the larger are
# whole cubes of 4 x 4 x 4, of which 2,048 chips are the most here.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": CUBIC, "v5e": FLAT, "v5p": CUBIC, "v6e": FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """What --topology names."""

    kind: str  # v5e, h100, ...
    shape: str  # 4x4; of GPUs, how many a node has
    slices: int
    chip: Chip

    @property
    def devices(self) -> int:
        return self.slices * math.prod(map(int, self.shape.split("x")))

    @property
    def is_tpu(self) -> bool:
        return self.chip.kind.startswith("TPU")

    @property
    def is_local(self) -> bool:
        return self.kind == "local"

    def __str__(self) -> str:
        return f"{self.slices} x {self.kind}:{self.shape}" if self.slices > 1 else f"{self.kind}:{self.shape}"


def parse_topology(text: str, slices: int) -> Topology:
    """Returns the topology that `text` names.

    Raises:
        ConfigError: there is none of that name; the nearest ones are told.
    """
    kind, _, shape = text.partition(":")
    kinds = TPUS | GPUS
    if kind not in kinds:
        raise ConfigError(f"--topology={text}: no such chip; known: {', '.join(kinds)}, as in v5e:4x4 or h100:8")
    chip = find_chip(kinds[kind])
    assert chip is not None, kind
    count = math.prod(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else 0
    if kind in GPUS:
        if not shape.isdigit() or not count:
            raise ConfigError(f"--topology={text}: expected {kind}:N, GPUs in a node; more nodes by --slices")
    elif shape not in SLICES[kind]:
        by_distance = sorted(
            SLICES[kind], key=lambda s: abs(math.log(math.prod(map(int, s.split("x"))) / (count or 16)))
        )
        near = ", ".join(f"{kind}:{s}" for s in by_distance[:3])
        raise ConfigError(f"--topology={text}: no such slice; nearest: {near}")
    return Topology(kind, shape, slices, chip)


def local_topology(chip: Chip, devices: int, slices: int) -> Topology:
    """Returns the topology of so many devices that are here, of one kind."""
    return Topology("local", str(devices // slices), slices, chip)
