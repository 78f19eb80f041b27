"""Reads compiled programs: their computations and loops, and every collective, how often it runs, along which axes."""

import dataclasses
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping

import numpy as np

DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")  # XLA's loop of a product that hides a gather or a scatter
WINDOWED_KIND = {"ag": "all-gather (windowed)", "rs": "reduce-scatter (windowed)"}
SCATTERED = "all-reduce-scatter"  # how the name of a fusion begins that is a reduce-scatter, written as sum and slice
# A collective that runs beside something else stands once more in each fusion that it goes on in, and where it ends.
GOES_ON, DONE = "async_collective_fusion", 'custom_call_target="AsyncCollectiveDone"'
ACROSS = "_xla_megascale_transfer_type"  # marks what XLA sends to another slice
NETWORK = "all-reduce (network)"

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)\s.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, with all its runs in one step."""

    kind: str  # of KINDS, or of WINDOWED_KIND
    axes: tuple[str, ...]  # of the mesh, along which devices take part, or some of them
    count: int  # runs a step
    bytes: float  # sent by one device in one run, by a ring
    dtype: str
    where: str  # the name scope in the model

    @property
    def total_bytes(self) -> float:
        """What one device sends in a step."""
        return self.count * self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    text: str


def read_collectives(text: str, mesh_shape: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """Returns the collectives of a compiled module's text, in its order, each with how often it runs.

    mesh_shape: sizes by axis; the program's devices are numbered in the order of the mesh. Of several slices each has
    its own part of `data` and the same program; what goes across is sent through the hosts.

    Raises:
        ValueError: the text has a loop or a group of devices of a form that is not known.
    """
    mesh_shape = {axis: size // slices if axis == "data" else size for axis, size in mesh_shape.items()}
    computations = parse(text)
    counts, found = count_runs(computations), []
    for name, instructions in computations.items():
        goes_on = name.startswith(GOES_ON) or any(DONE in i.text for i in instructions)
        for instruction in instructions if counts.get(name) and not goes_on else ():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                found.append(_read_collective(instruction, kind, name, counts[name], mesh_shape))
            elif kind == "send" and ACROSS in instruction.text:
                found.append(_read_send(instruction, counts[name], slices))
    return found


def sum_traffic(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns the bytes that one device sends in a step, by kind and axes."""
    traffic: dict[tuple[str, tuple[str, ...]], float] = {}
    for c in collectives:
        traffic[c.kind, c.axes] = traffic.get((c.kind, c.axes), 0.0) + c.total_bytes
    return traffic


def parse(text: str) -> dict[str, list[Instruction]]:
    """Returns the instructions by computation; the last one is the entry."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            match = _COMPUTATION.match(line)
            if match and "->" in line:
                current = computations.setdefault(match[1], [])
                entry = match[1] if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif match := _INSTRUCTION.match(line):
            shape, opcode = _split_shape(match[2])
            if opcode:
                current.append(Instruction(match[1], shape, opcode, match[2]))
    if entry:
        computations[entry] = computations.pop(entry)
    return computations


def _split_shape(text: str) -> tuple[str, str]:
    """Returns (shape, opcode) of 'f32[2]{0} add(%a, %b)' or '(f32[2], u32[]) all-gather-start(%a)'."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            return text[:at], re.split(r"[^\w\-]", text[at + 1 :], maxsplit=1)[0]
    return text, ""


def count_runs(computations: Mapping[str, list[Instruction]], through: Container[str] | None = None) -> dict[str, int]:
    """Returns how often each computation runs in one run of the entry; of branches each is counted.

    through: only what instructions of these opcodes run; None: of all.
    """
    order, calls = list(computations), {name: list(_calls(name, computations, through)) for name in computations}
    counts = dict.fromkeys(order, 0)
    pending = [(order[-1], 1)]
    while pending:
        name, times = pending.pop()
        counts[name] += times
        pending += [(called, times * repeated) for called, repeated in calls[name]]
    return counts


def called(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs."""
    names = _CALLED.findall(instruction.text)
    for branches in _BRANCHES.findall(instruction.text):
        names += [branch.strip().removeprefix("%") for branch in branches.split(",")]
    return names


def _calls(
    name: str, computations: Mapping[str, list[Instruction]], through: Container[str] | None
) -> Iterator[tuple[str, int]]:
    """Yields (computation, runs) of whatever one run of `name` runs."""
    for instruction in computations[name]:
        if through is not None and instruction.opcode not in through:
            continue
        repeated = 1
        if instruction.opcode == "while":
            repeated = trip_count(instruction, computations)
        yield from ((other, repeated) for other in called(instruction) if other in computations)


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """Returns how often the body of a while loop runs: a counter goes from 0 to a limit, by a constant step.

    Raises:
        ValueError: it is no such loop.
    """
    known = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.text)
    if known:
        return int(known[1])
    condition, body = (re.search(rf"\b{part}=%?([\w.\-]+)", loop.text) for part in ("condition", "body"))
    assert condition is not None, loop.text[:200]
    assert body is not None, loop.text[:200]
    test = {i.name: i for i in computations[condition[1]]}
    compare = next((i for i in test.values() if i.opcode == "compare" and "direction=LT" in i.text), None)
    counter, limit = (test.get(name) for name in operands(compare)) if compare else (None, None)
    index = re.search(r"get-tuple-element\(.*\), index=(\d+)", counter.text) if counter else None
    if index and limit and limit.opcode == "constant":
        step = _step(int(index[1]), {i.name: i for i in computations[body[1]]})
        if step:
            return -(-_constant(limit) // step)
    raise ValueError(f"the loop {loop.name}: cannot tell how often it runs")


def _step(index: int, body: Mapping[str, Instruction]) -> int:
    """Returns the constant that is added to entry `index` of the loop's tuple, 0 if there is no such thing."""
    root = list(body.values())[-1]
    value = body.get(operands(root)[index]) if root.opcode == "tuple" else None
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = body.get(operands(value)[0])
    if value is None or value.opcode != "add":
        return 0
    added = [body.get(name) for name in operands(value)]
    return next((_constant(i) for i in added if i is not None and i.opcode == "constant"), 0)


def operands(instruction: Instruction) -> list[str]:
    """Returns the names of an instruction's operands."""
    rest = instruction.text[len(instruction.shape) + 1 + len(instruction.opcode) :]
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", rest[: at + 1])
    return []


def _constant(instruction: Instruction) -> int:
    match = re.search(r"constant\((-?\d+)\)", instruction.text)
    return int(match[1]) if match else 0


def _read_collective(
    instruction: Instruction, kind: str, computation: str, count: int, mesh_shape: Mapping[str, int]
) -> Collective:
    scattered = kind == "all-reduce" and computation.startswith(SCATTERED)
    groups = read_groups(instruction.text, math.prod(mesh_shape.values()), kind)
    size = max(map(len, groups))
    result = sum(array_bytes(result_shape(instruction)))
    moved = {
        "all-reduce": (1 if scattered else 2) * result * (size - 1) / size,
        "reduce-scatter": result * (size - 1),
        "collective-permute": result,
    }.get(kind, result * (size - 1) / size)
    window, name = WINDOWED.search(computation), "reduce-scatter" if scattered else kind
    scope = re.search(r'op_name="([^"]*)"', instruction.text)
    axes = permuted_axes(groups, mesh_shape) if kind == "collective-permute" else group_axes(groups, mesh_shape)
    return Collective(
        kind=WINDOWED_KIND[window[1]] if window and kind == "collective-permute" else name,
        axes=axes,
        count=count,
        bytes=moved,
        dtype="+".join(sorted({array.dtype for array in arrays(instruction.shape)} - {"u32"})),
        where=scope[1] if scope else "",
    )


def _read_send(instruction: Instruction, count: int, slices: int) -> Collective:
    """Returns the sum across slices that an instruction starts which sends one device's part to its host.

    Raises:
        ValueError: it is no sum.
    """
    if f'{ACROSS}="ALL_REDUCE"' not in instruction.text:
        raise ValueError(f"a transfer between slices of a kind that is not known: {instruction.text[:300]}")
    sent = array_bytes(instruction.shape)
    where = re.search(r'_rendezvous="([^"]*)"', instruction.text)
    moved = 2 * sent[0] * (slices - 1) / slices
    return Collective(NETWORK, ("data",), count, moved, arrays(instruction.shape)[0].dtype, where[1] if where else "")


def result_shape(instruction: Instruction) -> str:
    """Returns the shape of what a collective gives: one that only starts has its operands before that."""
    started = instruction.opcode.endswith("-start") and not instruction.opcode.startswith("all-reduce")
    return _elements(instruction.shape)[1] if started else instruction.shape


def _elements(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape, '(f32[2], (s32[], u32[]))' -> ['f32[2]', '(s32[], u32[])']."""
    found, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [element.strip() for element in found]


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape, as it lies in memory."""

    dtype: str
    dims: tuple[int, ...]
    tiles: str = ""  # how a TPU lays it out, and where: T(8,128)(2,1)S(1)
    order: tuple[int, ...] = ()  # of the dims, the innermost first

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """What it takes of memory: a TPU fills its last tiles up."""
        dims, tile = [self.dims[d] for d in self.order], re.match(r"T\(([\d,]+)\)", self.tiles)
        for at, part in enumerate(reversed(tile[1].split(",")) if tile else ()):
            if at < len(dims):
                dims[at] = -(-dims[at] // int(part)) * int(part)
        return DTYPE_BYTES[self.dtype] * (math.prod(dims) if dims else self.size)

    @property
    def is_in_memory(self) -> bool:
        """False of what the compiler keeps within the chip, or on the host."""
        return re.search(r"S\([1-9]\d*\)", self.tiles) is None


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape such as '(f32[2,3]{1,0:T(8,128)}, bf16[4])'."""
    found = _ARRAY.findall(shape)
    return [Array(d, _numbers(dims), tiles, _numbers(order)) for d, dims, order, tiles in found if d in DTYPE_BYTES]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def array_bytes(shape: str) -> list[float]:
    """Returns the bytes of each array in a shape such as '(f32[2,3]{1,0}, bf16[4])' as it is sent: without tiles."""
    return [DTYPE_BYTES[array.dtype] * array.size for array in arrays(shape)]


def read_groups(text: str, devices: int, kind: str) -> list[tuple[int, ...]]:
    """Returns the groups of devices that a collective works in; of a permute, the (source, target) pairs.

    Raises:
        ValueError: they are of a form that is not known.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
        if pairs:
            return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{}]*)\))? \{([^}]*)\}", text)
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2]) if named[2] else np.arange(math.prod(axes.values()))
        return _along(
            order.reshape(tuple(axes.values())), [list(axes).index(n) for n in re.findall(r"'(\w+)'", named[3])]
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return [tuple(map(int, row)) for row in _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if listed is not None:
        groups = [tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [tuple(range(devices))]
    raise ValueError(f"groups of devices of a form that is not known: {text[:200]}")


def _iota(text: str) -> np.ndarray:
    """Returns the numbers that '[2,4]T(1,0)' stands for, counted up in the first shape and then transposed."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"order of devices of a form that is not known: {text[:200]}")
    shape = [int(n) for n in match[1].split(",")]
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid.transpose([int(n) for n in match[2].split(",")]) if match[2] else grid


def _along(grid: np.ndarray, dims: Iterable[int]) -> list[tuple[int, ...]]:
    """Returns the groups of numbers in `grid` that differ in the given dims only."""
    dims = list(dims)
    rest = [d for d in range(grid.ndim) if d not in dims]
    size = math.prod(grid.shape[d] for d in dims)
    return [tuple(map(int, row)) for row in grid.transpose([*rest, *dims]).reshape(-1, size)]


def group_axes(groups: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ; they may be a part of an axis only."""
    return permuted_axes([(group[0], other) for group in groups for other in group[1:]], mesh_shape)


def permuted_axes(pairs: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which source and target of any pair differ."""
    axes, shape = list(mesh_shape), tuple(mesh_shape.values())
    places = [(np.unravel_index(source, shape), np.unravel_index(target, shape)) for source, target in pairs]
    return tuple(axis for d, axis in enumerate(axes) if any(a[d] != b[d] for a, b in places))
