"""Reads what each kernel of a compiled program moves through memory and multiplies, and the least time that takes."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from gptjax.hlo import Array, Instruction, arrays, called, count_runs, operands, parse

Computations = Mapping[str, list[Instruction]]

CONTROL = {"while", "call", "conditional", "async-start"}  # run what they call; no kernels themselves
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency",
    "async-done", "async-update", "copy-done", "slice-done", "partition-id", "replica-id",
}  # fmt: skip
FREE_CALLS = {"ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"}
COPIES = {"copy-start", "slice-start"}  # of a TPU, beside kernels: they take memory's time, and are not launched
SLICES = {"slice", "dynamic-slice", "gather"}  # read of their first operand what they give
UPDATES = {"dynamic-update-slice", "scatter"}  # change their first operand where it is
# What computes each element from those in the same place, or moves it: of its operands no more is read than of it.
ELEMENTWISE = {"bitcast", "reshape", "transpose", "copy", "convert", "add", "subtract", "multiply", "divide", "negate"}

# Products of [T, H] and [H, T] (or [T, T] and [T, H]) in a kernel of attention, forward or backward, by its name.
ATTENTION = {
    "__cudnn$fmhaSoftmaxBackward": 5,
    "__cudnn$fmhaSoftmax": 2,
    "splash_mha_dkv": 4,
    "splash_mha_dq": 3,
    "splash_mha_fwd": 2,
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program, with all its runs in one step."""

    name: str
    where: str  # the name scope in the model
    kind: str  # its opcode, or what it calls
    count: int  # runs a step
    bytes: float  # read and written by one run
    flops: float  # of matrix products in one run; attention's over pairs that the causal mask leaves
    is_copy: bool

    def seconds(self, bandwidth: float, peak_flops: float) -> float:
        """Returns the least seconds of all its runs, at so many bytes and FLOPs a second."""
        return self.count * max(self.bytes / bandwidth, self.flops / peak_flops)


def read_kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a compiled module's text that are launched, in its order, for one device.

    Bytes are those of operands and results in the device's memory: of what is sliced, looked up or changed in place,
    that part. FLOPs are 2 M N K of each product; of fused attention, half of all pairs of positions.
    """
    computations = parse(text)
    runs = count_runs(computations, through=CONTROL)
    found = []
    for name, instructions in computations.items():
        by_name = {i.name: i for i in instructions}
        for i in instructions if runs[name] else ():
            if i.opcode not in FREE | CONTROL and _target(i) not in FREE_CALLS:
                found.append(_read_kernel(i, by_name, computations, runs[name]))
    return found


def buffers(text: str) -> Iterator[Array]:
    """Yields each array that a compiled module's text lays out in memory, those within kernels left out."""
    computations = parse(text)
    runs = count_runs(computations, through=CONTROL)
    for name, instructions in computations.items():
        for i in instructions if runs[name] else ():
            yield from arrays(i.shape)


def _read_kernel(i: Instruction, by_name: Mapping[str, Instruction], computations: Computations, runs: int) -> Kernel:
    scope = re.search(r'op_name="([^"]*)"', i.text)
    return Kernel(
        name=i.name,
        where=scope[1] if scope else "",
        kind=_target(i) or i.opcode,
        count=runs,
        bytes=_moved(i, by_name, computations),
        flops=_flops(i, by_name, computations),
        is_copy=i.opcode in COPIES,
    )


def _target(i: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', i.text) if i.opcode == "custom-call" else None
    return found[1] if found else ""


# Bytes


def _moved(i: Instruction, by_name: Mapping[str, Instruction], computations: Computations) -> float:
    given = [by_name[name] for name in operands(i) if name in by_name]
    if i.opcode in COPIES:
        return _copied(i)
    if i.opcode == "fusion":
        body = computations[called(i)[0]]
        read = [_in_memory(o.shape) * _read_share(n, body, computations) for n, o in enumerate(given)]
        return sum(read) + _written(i.shape, body, computations)
    if i.opcode in SLICES:
        return 2 * _in_memory(i.shape) + sum(_in_memory(o.shape) for o in given[1:])
    if i.opcode in UPDATES:
        return sum(_in_memory(o.shape) for o in given[1:]) + _update(i, by_name)
    results = arrays(i.shape)
    if _target(i).startswith("__cublas"):
        results = results[:1]  # the others are its workspace
    return sum(_in_memory(o.shape) for o in {o.name: o for o in given}.values()) + _total(results)


def _total(found: Iterable[Array]) -> float:
    return sum(a.bytes for a in found if a.is_in_memory)


def _in_memory(shape: str) -> float:
    return _total(arrays(shape))


def _copied(i: Instruction) -> float:
    """Returns the bytes that an asynchronous copy takes from memory, and those that it brings there."""
    source, result = arrays(i.shape)[:2]
    return _total([dataclasses.replace(result, tiles=source.tiles), result])


def _read_share(parameter: int, body: list[Instruction], computations: Computations) -> float:
    """Returns which share of a fusion's operand is read: the slices of it, or all."""
    name = next(i.name for i in body if i.opcode == "parameter" and f" parameter({parameter})" in i.text)
    users = collections.defaultdict(list)
    for i in body:
        for at, operand in enumerate(operands(i)):
            users[operand].append((i, at))
    return min(1.0, _used_share(name, _size(next(i for i in body if i.name == name)), users, computations))


def _used_share(
    name: str, size: int, users: Mapping[str, list[tuple[Instruction, int]]], computations: Computations
) -> float:
    share = 0.0
    for user, at in users.get(name, ()):
        if user.opcode in SLICES and at == 0:
            share += _size(user) / max(size, 1)
        elif user.opcode in UPDATES and at == 0:
            continue  # what is not changed stays where it is
        elif user.opcode == "fusion":
            share += _read_share(at, computations[called(user)[0]], computations)
        elif user.opcode in ELEMENTWISE and _size(user) == size and users.get(user.name):
            share += _used_share(user.name, size, users, computations)
        else:
            return 1.0
    return share


def _size(i: Instruction) -> int:
    return sum(a.size for a in arrays(i.shape))


def _written(shape: str, body: list[Instruction], computations: Computations) -> float:
    """Returns the bytes that a fusion writes: of what it changes in place, the changes."""
    by_name, root = {i.name: i for i in body}, body[-1]
    roots = [by_name[name] for name in operands(root)] if root.opcode == "tuple" else [root]
    results = arrays(shape)
    if len(roots) != len(results):
        return _total(results)
    total = 0.0
    for one, result in zip(roots, results, strict=True):
        while one.opcode in ("bitcast", "copy", "reshape") and operands(one)[0] in by_name:
            one = by_name[operands(one)[0]]
        if not result.is_in_memory:
            continue
        if one.opcode in UPDATES:
            total += min(_update(one, by_name), 2 * result.bytes)
        elif one.opcode == "fusion":
            total += _written(one.shape, computations[called(one)[0]], computations)
        else:
            total += result.bytes
    return total


def _update(i: Instruction, by_name: Mapping[str, Instruction]) -> float:
    """Returns the bytes that a change in place writes; a scatter adds, so it reads as much."""
    at = 2 if i.opcode == "scatter" else 1
    element = arrays(i.shape)[0]
    width = element.bytes / max(element.size, 1)
    return at * _size(by_name[operands(i)[at]]) * width


# FLOPs


def _flops(i: Instruction, by_name: Mapping[str, Instruction], computations: Computations) -> float:
    """Returns the FLOPs of the matrix products in an instruction, and in what it calls."""
    if i.opcode == "dot":
        dims = _listed(i.text, r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2 * _size(i) * _contracted(by_name[operands(i)[0]], dims)
    if i.opcode == "convolution":
        return _convolution_flops(i, *(arrays(by_name[name].shape)[0].dims for name in operands(i)[:2]))
    if i.opcode == "custom-call":
        return _call_flops(i, by_name)
    total = 0.0
    for name in called(i) if i.opcode in {"fusion"} | CONTROL else ():
        inner = {one.name: one for one in computations.get(name, ())}
        total += sum(_flops(one, inner, computations) for one in inner.values())
    return total


def _call_flops(i: Instruction, by_name: Mapping[str, Instruction]) -> float:
    target, given = _target(i), [by_name[name] for name in operands(i) if name in by_name]
    if target.startswith("__cublas"):
        dims = _listed(i.text, r'"lhs_contracting_dimensions":\[([\d",]*)\]')
        return 2 * arrays(i.shape)[0].size * _contracted(given[0], dims)
    kernel = i.name if target == "tpu_custom_call" else target
    products = next((count for name, count in ATTENTION.items() if kernel.startswith(name)), 0)
    if not products:
        return 0.0
    heads = [a for o in given for a in arrays(o.shape) if len(a.dims) == 4 and a.dtype in ("bf16", "f16", "f32")]
    query, key = heads[:2]
    # [B, T, N, H] of cuDNN, [B, N, T, H] of Pallas; both attend causally here: half of all pairs
    positions = key.dims[1 if target.startswith("__cudnn") else 2]
    return products * 2 * query.size * positions / 2


def _listed(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _contracted(lhs: Instruction, dims: Iterable[int]) -> int:
    return math.prod(arrays(lhs.shape)[0].dims[d] for d in dims)


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Returns 2 x batch x features out x features in x pairs of an output and a kernel position with an input there.

    TPUs compute products of matrices as convolutions, with windows that mostly lie in the padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    assert labels is not None, i.text[:300]
    result = arrays(i.shape)[0].dims
    pairs = 1
    for at, window in enumerate(_windows(i.text, len(lhs) - 2)):
        spatial = str(at)
        pairs *= _valid_pairs(lhs[labels[1].index(spatial)], result[labels[3].index(spatial)], **window)
    groups = re.search(r"batch_group_count=(\d+)", i.text)
    batch = lhs[labels[1].index("b")] // int(groups[1] if groups else 1)
    return 2 * batch * rhs[labels[2].index("o")] * rhs[labels[2].index("i")] * pairs


def _windows(text: str, count: int) -> list[dict[str, int]]:
    """Returns size, stride, padding and dilations of each spatial dim of a convolution."""
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    names = {"size": "size", "stride": "stride", "low": "pad", "lhs_dilate": "lhs_dilate", "rhs_dilate": "rhs_dilate"}

    def read(name: str, at: int) -> int:
        default = "0_0" if name == "pad" else "1"
        return int(fields.get(name, "x".join([default] * count)).split("x")[at].split("_")[0])

    return [{ours: read(theirs, at) for ours, theirs in names.items()} for at in range(count)]


def _valid_pairs(
    input_size: int, output_size: int, *, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns how many pairs of an output and a kernel position meet an element of the input."""
    places = (at * stride - low + tap * rhs_dilate for at in range(output_size) for tap in range(size))
    return sum(place % lhs_dilate == 0 and 0 <= place // lhs_dilate < input_size for place in places)
