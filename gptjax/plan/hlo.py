"""Parses the HLO text of a compiled program: computations, instructions, arrays, and trip counts of loops."""

import dataclasses
import math
import re
from collections.abc import Container, Iterator, Mapping

DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)\s.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")  # dtype, dims, order, tiles


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled module: its name, result shape and opcode, and the text after its name."""

    name: str
    shape: str
    opcode: str
    text: str


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape, with its layout in memory."""

    dtype: str
    dims: tuple[int, ...]
    tiles: str = ""  # a TPU's tiling and memory space: T(8,128)(2,1)S(1)
    order: tuple[int, ...] = ()  # of the dims, the innermost first

    @property
    def size(self) -> int:
        """The number of elements, without padding."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The bytes in memory: a TPU pads the innermost dims to whole tiles."""
        if not self.order:
            return DTYPE_BYTES[self.dtype] * self.size
        padded = [self.dims[d] for d in self.order]
        tile = re.match(r"T\(([\d,]+)\)", self.tiles)
        if tile:
            # The text has a tile's outermost dim first.
            innermost_first = [int(length) for length in reversed(tile[1].split(","))]
            for at, length in enumerate(innermost_first[: len(padded)]):
                padded[at] = math.ceil(padded[at] / length) * length
        return DTYPE_BYTES[self.dtype] * math.prod(padded)

    @property
    def is_in_memory(self) -> bool:
        """Whether the array is in the device's main memory (S(0)), not within the chip or on the host."""
        return re.search(r"S\([1-9]\d*\)", self.tiles) is None


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
                if line.startswith("ENTRY"):
                    entry = match[1]
        elif line == "}":
            current = None
        elif match := _INSTRUCTION.match(line):
            name, definition = match.groups()
            shape, opcode = _split_shape(definition)
            if opcode:
                current.append(Instruction(name, shape, opcode, definition))
    if entry:
        computations[entry] = computations.pop(entry)
    return computations


def _split_shape(text: str) -> tuple[str, str]:
    """Returns (shape, opcode) of 'f32[2]{0} add(%a, %b)' or '(f32[2], u32[]) all-gather-start(%a)'."""
    for at, depth in enumerate(_depths(text)):
        if text[at] == " " and depth == 0:
            rest = text[at + 1 :]
            opcode = re.split(r"[^\w\-]", rest, maxsplit=1)[0]
            return text[:at], opcode
    return text, ""


def _depths(text: str) -> Iterator[int]:
    """Yields, for each letter of `text`, how many brackets are open after it."""
    depth = 0
    for letter in text:
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        yield depth


def count_runs(
    computations: Mapping[str, list[Instruction]],
    through: Container[str] | None = None,
) -> dict[str, int]:
    """Returns how often each computation runs in one run of the entry; each branch of a conditional counts.

    through: follow only the calls of instructions with these opcodes; None: follow all calls.

    Raises:
        ValueError: a loop has no known trip count.
    """
    calls = {}
    for name in computations:
        calls[name] = list(_calls(name, computations, through))
    counts = dict.fromkeys(computations, 0)
    entry = list(computations)[-1]
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        counts[name] += times
        for callee, repeated in calls[name]:
            pending.append((callee, times * repeated))
    return counts


def called(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs."""
    names = _CALLED.findall(instruction.text)
    for branches in _BRANCHES.findall(instruction.text):
        for branch in branches.split(","):
            names.append(branch.strip().removeprefix("%"))
    return names


def _calls(
    name: str,
    computations: Mapping[str, list[Instruction]],
    through: Container[str] | None,
) -> Iterator[tuple[str, int]]:
    """Yields (computation, runs) of each computation that one run of `name` runs."""
    for instruction in computations[name]:
        if through is not None and instruction.opcode not in through:
            continue
        is_loop = instruction.opcode == "while"
        repeated = trip_count(instruction, computations) if is_loop else 1
        for callee in called(instruction):
            if callee in computations:
                yield callee, repeated


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """Returns how often the body of a while loop runs, if a counter goes from 0 to a limit in constant steps.

    Raises:
        ValueError: the loop has another form.
    """
    known = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.text)
    if known:
        return int(known[1])
    condition = _part_of_loop(loop, "condition", computations)
    body = _part_of_loop(loop, "body", computations)
    compares = [i for i in condition.values() if i.opcode == "compare"]
    compare = next((i for i in compares if "direction=LT" in i.text), None)
    if compare is not None:
        counter, limit = (condition.get(name) for name in operands(compare))
        index = re.search(r"get-tuple-element\(.*\), index=(\d+)", counter.text) if counter else None
        if index and limit and limit.opcode == "constant":
            step = _step(int(index[1]), body)
            if step:
                return math.ceil(_constant(limit) / step)
    raise ValueError(f"the loop {loop.name}: cannot tell how often it runs")


def _part_of_loop(
    loop: Instruction,
    part: str,
    computations: Mapping[str, list[Instruction]],
) -> dict[str, Instruction]:
    """Returns the instructions by name of a loop's part, "condition" or "body"."""
    found = re.search(rf"\b{part}=%?([\w.\-]+)", loop.text)
    assert found is not None, loop.text[:200]
    return {i.name: i for i in computations[found[1]]}


def _step(index: int, body: Mapping[str, Instruction]) -> int:
    """Returns the constant that a loop's body adds to entry `index` of its tuple, 0 if it does something else."""
    root = list(body.values())[-1]
    if root.opcode != "tuple":
        return 0
    value = body.get(operands(root)[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = body.get(operands(value)[0])
    if value is None or value.opcode != "add":
        return 0
    for name in operands(value):
        added = body.get(name)
        if added is not None and added.opcode == "constant":
            return _constant(added)
    return 0


def operands(instruction: Instruction) -> list[str]:
    """Returns the names of an instruction's operands."""
    opcode_at = len(instruction.shape) + 1
    rest = instruction.text[opcode_at + len(instruction.opcode) :]
    for at, depth in enumerate(_depths(rest)):
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", rest[: at + 1])
    return []


def _constant(instruction: Instruction) -> int:
    match = re.search(r"constant\((-?\d+)\)", instruction.text)
    return int(match[1]) if match else 0


def tuple_elements(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape, '(f32[2], (s32[], u32[]))' -> ['f32[2]', '(s32[], u32[])']."""
    inner = shape[1:-1]
    elements = [""]
    for letter, depth in zip(inner, _depths(inner), strict=True):
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return [element.strip() for element in elements]


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape such as '(f32[2,3]{1,0:T(8,128)}, bf16[4])'."""
    found = []
    for dtype, dims, order, tiles in _ARRAY.findall(shape):
        if dtype in DTYPE_BYTES:  # others are no data, as token[]
            found.append(Array(dtype, dims=_numbers(dims), tiles=tiles, order=_numbers(order)))
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def array_bytes(shape: str) -> list[float]:
    """Returns the bytes of each array in a shape such as '(f32[2,3]{1,0}, bf16[4])' as sent, without padding."""
    return [DTYPE_BYTES[array.dtype] * array.size for array in arrays(shape)]
