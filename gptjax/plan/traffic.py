"""Reads the collectives of a compiled program: kind, mesh axes, bytes sent per device, and runs per step."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from gptjax.plan.hlo import Instruction, array_bytes, arrays, count_runs, parse, tuple_elements

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# XLA's loop over a matmul that hides an all-gather or a reduce-scatter as collective-permutes.
WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
WINDOWED_KIND = {"ag": "all-gather (windowed)", "rs": "reduce-scatter (windowed)"}
SCATTERED = "all-reduce-scatter"  # prefix of a fusion that is a reduce-scatter, written as all-reduce and slice
# An asynchronous collective appears where it starts, in each fusion that it overlaps, and where it ends. Only the
# start counts; these mark the others.
OVERLAPPED = "async_collective_fusion"
STARTS = 'custom_call_target="AsyncCollectiveStart"'
DONE = 'custom_call_target="AsyncCollectiveDone"'
ACROSS = "_xla_megascale_transfer_type"  # marks a transfer to another slice
NETWORK = "all-reduce (DCN)"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, with all its runs in one step."""

    kind: str  # of KINDS, of WINDOWED_KIND, or NETWORK
    axes: tuple[str, ...]  # mesh axes along which devices take part; a group may cover a part of an axis
    count: int  # runs per step
    bytes: float  # that one device sends in one run, with a ring
    dtype: str
    where: str  # the name scope in the model

    @property
    def total_bytes(self) -> float:
        """The bytes that one device sends per step."""
        return self.count * self.bytes


def read_collectives(
    text: str,
    mesh_shape: Mapping[str, int],
    slices: int = 1,
) -> list[Collective]:
    """Returns the collectives of a compiled module's text in program order, each with its runs per step.

    mesh_shape: sizes by axis; the program's devices are numbered in the order of the mesh. With several slices, each
    slice runs the same program on its share of `data`, and transfers between slices go through the hosts.

    Raises:
        ValueError: the text has a loop or a group of devices of a form that is not known.
    """
    return list(collectives_by_place(parse(text), mesh_shape, slices).values())


def collectives_by_place(
    computations: Mapping[str, list[Instruction]],
    mesh_shape: Mapping[str, int],
    slices: int = 1,
) -> dict[tuple[str, str], Collective]:
    """Returns the collectives of read_collectives by the names of their computation and instruction."""
    slice_shape = dict(mesh_shape)
    if "data" in slice_shape:
        slice_shape["data"] //= slices
    counts = count_runs(computations)
    found = {}
    for name, instructions in computations.items():
        if not counts.get(name) or continues_a_collective(name, instructions):
            continue
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            place = name, instruction.name
            if kind in KINDS:
                collective = _read_collective(instruction, name, mesh_shape=slice_shape)
                found[place] = dataclasses.replace(collective, count=counts[name])
            elif kind == "send" and ACROSS in instruction.text:
                found[place] = _read_send(instruction, counts[name], slices)
    return found


def continues_a_collective(name: str, instructions: Iterable[Instruction]) -> bool:
    """Returns whether a computation continues or ends a collective that another one starts."""
    return name.startswith(OVERLAPPED) or any(DONE in i.text for i in instructions)


def sum_traffic(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns the bytes that one device sends per step, by kind and axes."""
    traffic: dict[tuple[str, tuple[str, ...]], float] = {}
    for collective in collectives:
        key = collective.kind, collective.axes
        traffic[key] = traffic.get(key, 0.0) + collective.total_bytes
    return traffic


def _read_collective(
    instruction: Instruction,
    computation: str,
    *,
    mesh_shape: Mapping[str, int],
) -> Collective:
    """Returns the collective of an instruction in `computation`, for one run."""
    kind = instruction.opcode.removesuffix("-start")
    devices = math.prod(mesh_shape.values())
    groups = read_groups(instruction.text, devices, kind)
    size = max(map(len, groups))
    result = sum(array_bytes(result_shape(instruction)))
    sent = _ring_bytes(kind, result, size)
    name = kind
    window = WINDOWED.search(computation)
    if kind == "all-reduce" and computation.startswith(SCATTERED):
        name = "reduce-scatter"
        sent /= 2  # a reduce-scatter is the first half of the ring all-reduce in its text
    elif kind == "collective-permute" and window:
        name = WINDOWED_KIND[window[1]]
    find_axes = permuted_axes if kind == "collective-permute" else group_axes
    scope = re.search(r'op_name="([^"]*)"', instruction.text)
    dtypes = {array.dtype for array in arrays(instruction.shape)} - {"u32"}  # u32 is the handle of an asynchronous one
    return Collective(
        kind=name,
        axes=find_axes(groups, mesh_shape),
        count=1,
        bytes=sent,
        dtype="+".join(sorted(dtypes)),
        where=scope[1] if scope else "",
    )


def _ring_bytes(kind: str, result: float, size: int) -> float:
    """Returns the bytes that a device sends in a ring of `size` devices; `result` is the size of its result."""
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (size - 1)  # the result is one shard
    if kind == "all-reduce":
        return 2 * result * (size - 1) / size
    return result * (size - 1) / size


def _read_send(instruction: Instruction, count: int, slices: int) -> Collective:
    """Returns the all-reduce across slices of an instruction that sends one device's part to its host.

    Raises:
        ValueError: the transfer is no all-reduce.
    """
    if f'{ACROSS}="ALL_REDUCE"' not in instruction.text:
        raise ValueError(f"a transfer between slices of a kind that is not known: {instruction.text[:300]}")
    data_bytes = array_bytes(instruction.shape)[0]
    rendezvous = re.search(r'_rendezvous="([^"]*)"', instruction.text)
    return Collective(
        kind=NETWORK,
        axes=("data",),
        count=count,
        bytes=2 * data_bytes * (slices - 1) / slices,
        dtype=arrays(instruction.shape)[0].dtype,
        where=rendezvous[1] if rendezvous else "",
    )


def result_shape(instruction: Instruction) -> str:
    """Returns the shape of a collective's result: the shape of a -start is (operands, results), except all-reduce's."""
    is_start = instruction.opcode.endswith("-start")
    if is_start and not instruction.opcode.startswith("all-reduce"):
        return tuple_elements(instruction.shape)[1]
    return instruction.shape


def read_groups(
    text: str,
    devices: int,
    kind: str,
) -> list[tuple[int, ...]]:
    """Returns the groups of devices of a collective; the (source, target) pairs of a collective-permute.

    Raises:
        ValueError: they are of a form that is not known.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
        if pairs:
            return _listed_groups(pairs[1])
    # mesh['data'=2,'fsdp'=4], device_ids=(...) {'data'}
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{}]*)\))? \{([^}]*)\}", text)
    if named:
        return _named_groups(
            axes=named[1],
            order=named[2],
            grouped=named[3],
        )
    # [4,2]<=[2,4]T(1,0): 4 groups of 2, of the numbers that _iota returns
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        numbers = _iota(iota[2])
        return _rows(numbers.reshape(_numbers(iota[1])))
    # {{0,2},{1,3}}, or {} for one group of all
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if listed is not None:
        groups = _listed_groups(listed[1])
        return groups or [tuple(range(devices))]
    raise ValueError(f"groups of devices of a form that is not known: {text[:200]}")


def _listed_groups(text: str) -> list[tuple[int, ...]]:
    """Returns the groups of '{0,2},{1,3}'; empty ones are left out."""
    groups = re.findall(r"\{([\d,]+)\}", text)
    return [_numbers(group) for group in groups]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _named_groups(
    *,
    axes: str,
    order: str | None,
    grouped: str,
) -> list[tuple[int, ...]]:
    """Returns the groups of "'data'=2,'fsdp'=4" along "'data'", of devices in `order`, by default counted up."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    names = list(sizes)
    numbers = _iota(order) if order else np.arange(math.prod(sizes.values()))
    grid = numbers.reshape(tuple(sizes.values()))
    dims = [names.index(name) for name in re.findall(r"'(\w+)'", grouped)]
    return _along(grid, dims)


def _iota(text: str) -> np.ndarray:
    """Returns the numbers that '[2,4]T(1,0)' stands for, int [2, 4] counted up and then transposed to [4, 2]."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"order of devices of a form that is not known: {text[:200]}")
    shape = _numbers(match[1])
    grid = np.arange(math.prod(shape)).reshape(shape)
    if match[2] is None:
        return grid
    return grid.transpose(_numbers(match[2]))


def _along(grid: np.ndarray, dims: Collection[int]) -> list[tuple[int, ...]]:
    """Returns the groups of numbers in `grid` that differ in the given dims only."""
    rest = [d for d in range(grid.ndim) if d not in dims]
    size = math.prod(grid.shape[d] for d in dims)
    return _rows(grid.transpose([*rest, *dims]).reshape(-1, size))


def _rows(grid: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in grid]


def group_axes(groups: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ; a group may cover a part of an axis."""
    pairs = []
    for first, *others in groups:
        pairs += [(first, other) for other in others]
    return permuted_axes(pairs, mesh_shape)


def permuted_axes(pairs: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which source and target of any pair differ."""
    shape = tuple(mesh_shape.values())
    differing = set()
    for source, target in pairs:
        source_place = np.unravel_index(source, shape)
        target_place = np.unravel_index(target, shape)
        for d in range(len(shape)):
            if source_place[d] != target_place[d]:
                differing.add(d)
    return tuple(axis for d, axis in enumerate(mesh_shape) if d in differing)
