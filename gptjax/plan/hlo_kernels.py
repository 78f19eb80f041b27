"""Reads the kernels of a compiled program: bytes of memory traffic, FLOPs of matmuls, and the least time of each."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from gptjax.plan.hlo import Array, Instruction, arrays, called, count_runs, operands, parse

Computations = Mapping[str, list[Instruction]]
Users = Mapping[str, list[tuple[Instruction, int]]]  # name -> (instruction, position of that operand) of each user

CONTROL = {"while", "call", "conditional", "async-start"}  # run other computations; no kernels themselves
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency",
    "async-done", "async-update", "copy-done", "slice-done", "partition-id", "replica-id",
    "send", "send-done", "recv", "recv-done",
}  # fmt: skip
FREE_CALLS = {"ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"}
COPIES = {"copy-start", "slice-start"}  # a TPU's DMA next to kernels: takes memory bandwidth, and no launch
SLICES = {"slice", "dynamic-slice", "gather"}  # read as much of their first operand as they return
UPDATES = {"dynamic-update-slice", "scatter"}  # change their first operand in place
# Each element of the result needs only the elements at the same place of the operands, or moves one. So a slice of the
# result reads no more than that slice of an operand.
ELEMENTWISE = {"bitcast", "reshape", "transpose", "copy", "convert", "add", "subtract", "multiply", "divide", "negate"}

# Matmuls [T, H] @ [H, T] or [T, T] @ [T, H] in an attention kernel, forward or backward, by the kernel's name. A prefix
# decides, so the longer of two names comes first.
ATTENTION = {
    "__cudnn$fmhaSoftmaxBackward": 5,
    "__cudnn$fmhaSoftmax": 2,
    "splash_mha_dkv": 4,  # 5 where it returns dq as well, see FUSED_BACKWARD
    "splash_mha_dq": 3,
    "splash_mha_fwd": 2,
}
FUSED_BACKWARD = "splash_mha_dkv"
ATTENTION_DTYPES = ("bf16", "f16", "f32")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program, with all its runs in one step."""

    name: str
    where: str  # the name scope in the model
    kind: str  # its opcode, or the target of its custom call
    count: int  # runs per step
    bytes: float  # read and written by one run
    flops: float  # of the matmuls in one run; attention's over pairs that the causal mask leaves
    is_copy: bool

    def seconds(self, bandwidth: float, peak_flops: float) -> float:
        """Returns the least seconds of all its runs, with `bandwidth` bytes/s and `peak_flops` FLOP/s."""
        memory_seconds = self.bytes / bandwidth
        compute_seconds = self.flops / peak_flops
        return self.count * max(memory_seconds, compute_seconds)


def read_kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a compiled module's text that one device launches, in program order.

    Bytes are those of operands and results in the device's memory; slices, lookups and in-place updates count only the
    part that they touch. FLOPs are 2 M N K of each matmul; fused attention counts half of all pairs of positions.
    """
    computations = parse(text)
    runs = count_runs(computations, through=CONTROL)
    found = []
    for name, instructions in computations.items():
        if not runs[name]:
            continue
        by_name = _by_name(instructions)
        for instruction in instructions:
            if is_kernel(instruction):
                kernel = read_kernel(instruction, by_name, computations)
                found.append(dataclasses.replace(kernel, count=runs[name]))
    return found


def is_kernel(instruction: Instruction) -> bool:
    """Returns whether a device launches a kernel, or a copy, for an instruction."""
    if instruction.opcode in FREE or instruction.opcode in CONTROL:
        return False
    return _target(instruction) not in FREE_CALLS


def buffers(text: str) -> Iterator[Array]:
    """Yields each array that a compiled module's text places in memory, except those within kernels."""
    computations = parse(text)
    runs = count_runs(computations, through=CONTROL)
    for name, instructions in computations.items():
        if not runs[name]:
            continue
        for instruction in instructions:
            yield from arrays(instruction.shape)


def read_kernel(
    instruction: Instruction,
    by_name: Mapping[str, Instruction],
    computations: Computations,
) -> Kernel:
    """Returns the kernel of an instruction, for one run."""
    scope = re.search(r'op_name="([^"]*)"', instruction.text)
    return Kernel(
        name=instruction.name,
        where=scope[1] if scope else "",
        kind=_target(instruction) or instruction.opcode,
        count=1,
        bytes=_moved(instruction, by_name, computations),
        flops=_flops(instruction, by_name, computations),
        is_copy=instruction.opcode in COPIES,
    )


def _by_name(instructions: Iterable[Instruction]) -> dict[str, Instruction]:
    return {instruction.name: instruction for instruction in instructions}


def _target(instruction: Instruction) -> str:
    """Returns the target of a custom call, "" for another instruction."""
    if instruction.opcode != "custom-call":
        return ""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    return found[1] if found else ""


# Bytes


def _moved(
    instruction: Instruction,
    by_name: Mapping[str, Instruction],
    computations: Computations,
) -> float:
    """Returns the bytes that one run of an instruction reads and writes."""
    given = [by_name[name] for name in operands(instruction) if name in by_name]
    if instruction.opcode in COPIES:
        return _copied(instruction)
    if instruction.opcode == "fusion":
        return _moved_by_fusion(instruction, given, computations)
    if instruction.opcode in SLICES:
        indices = sum(_in_memory(operand.shape) for operand in given[1:])
        return 2 * _in_memory(instruction.shape) + indices
    if instruction.opcode in UPDATES:
        update_and_indices = sum(_in_memory(operand.shape) for operand in given[1:])
        return update_and_indices + _update(instruction, by_name)
    results = arrays(instruction.shape)
    if _target(instruction).startswith("__cublas"):
        results = results[:1]  # the others are its workspace
    distinct = _by_name(given).values()  # an operand that is used twice is read once
    read = sum(_in_memory(operand.shape) for operand in distinct)
    return read + _total(results)


def _moved_by_fusion(
    fusion: Instruction,
    given: list[Instruction],
    computations: Computations,
) -> float:
    body = computations[called(fusion)[0]]
    read = 0.0
    for position, operand in enumerate(given):
        share = _read_share(position, body, computations)
        read += _in_memory(operand.shape) * share
    return read + _written(fusion.shape, body, computations)


def _total(found: Iterable[Array]) -> float:
    return sum(array.bytes for array in found if array.is_in_memory)


def _in_memory(shape: str) -> float:
    return _total(arrays(shape))


def _copied(copy: Instruction) -> float:
    """Returns the bytes that an asynchronous copy reads from memory and writes to it.

    A copy between memory and the chip counts once. A slice reads only the part that it returns.
    """
    source, result = arrays(copy.shape)[:2]
    read = dataclasses.replace(result, tiles=source.tiles)
    return _total([read, result])


def _read_share(
    parameter: int,
    body: list[Instruction],
    computations: Computations,
) -> float:
    """Returns the share of a fusion's operand that it reads: its slices of the operand, or 1."""
    parameters = [i for i in body if i.opcode == "parameter"]
    operand = next(i for i in parameters if f" parameter({parameter})" in i.text)
    users = collections.defaultdict(list)
    for instruction in body:
        for position, name in enumerate(operands(instruction)):
            users[name].append((instruction, position))
    share = _used_share(operand.name, _size(operand), users, computations)
    return min(1.0, share)


def _used_share(
    name: str,
    size: int,
    users: Users,
    computations: Computations,
) -> float:
    """Returns the share of `name`, with `size` elements, that its users read; slices that overlap count twice."""
    share = 0.0
    for user, position in users.get(name, ()):
        if user.opcode in SLICES and position == 0:
            share += _size(user) / max(size, 1)
        elif user.opcode in UPDATES and position == 0:
            continue  # the unchanged elements stay in place
        elif user.opcode == "fusion":
            body = computations[called(user)[0]]
            share += _read_share(position, body, computations)
        elif user.opcode in ELEMENTWISE and _size(user) == size and users.get(user.name):
            share += _used_share(user.name, size, users, computations)
        else:
            return 1.0
    return share


def _size(instruction: Instruction) -> int:
    """Returns the number of elements of an instruction's result."""
    return sum(array.size for array in arrays(instruction.shape))


def _written(
    shape: str,
    body: list[Instruction],
    computations: Computations,
) -> float:
    """Returns the bytes that a fusion writes; for an in-place update only the changed elements."""
    by_name = _by_name(body)
    root = body[-1]
    roots = [by_name[name] for name in operands(root)] if root.opcode == "tuple" else [root]
    results = arrays(shape)
    if len(roots) != len(results):
        return _total(results)  # nested tuples: no root per result
    total = 0.0
    for one, result in zip(roots, results, strict=True):
        if result.is_in_memory:
            total += _written_by_root(_skip_views(one, by_name), result, by_name, computations)
    return total


def _skip_views(instruction: Instruction, by_name: Mapping[str, Instruction]) -> Instruction:
    """Returns the instruction that computes the elements which bitcasts, copies and reshapes pass on."""
    while instruction.opcode in ("bitcast", "copy", "reshape"):
        source = operands(instruction)[0]
        if source not in by_name:
            break
        instruction = by_name[source]
    return instruction


def _written_by_root(
    root: Instruction,
    result: Array,
    by_name: Mapping[str, Instruction],
    computations: Computations,
) -> float:
    if root.opcode in UPDATES:
        return min(_update(root, by_name), 2 * result.bytes)
    if root.opcode == "fusion":
        body = computations[called(root)[0]]
        return _written(root.shape, body, computations)
    return result.bytes


def _update(instruction: Instruction, by_name: Mapping[str, Instruction]) -> float:
    """Returns the bytes that an in-place update moves in its first operand; a scatter adds, so it also reads them."""
    is_scatter = instruction.opcode == "scatter"
    update = by_name[operands(instruction)[2 if is_scatter else 1]]
    target = arrays(instruction.shape)[0]
    bytes_per_element = target.bytes / max(target.size, 1)
    accesses = 2 if is_scatter else 1
    return accesses * _size(update) * bytes_per_element


# FLOPs


def _flops(
    instruction: Instruction,
    by_name: Mapping[str, Instruction],
    computations: Computations,
) -> float:
    """Returns the FLOPs of the matmuls in an instruction, and in the computations that it runs."""
    given = operands(instruction)
    if instruction.opcode == "dot":
        contracted = _listed(instruction.text, r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2 * _size(instruction) * _contracted(by_name[given[0]], contracted)
    if instruction.opcode == "convolution":
        lhs, rhs = (arrays(by_name[name].shape)[0] for name in given[:2])
        return _convolution_flops(instruction, lhs.dims, rhs.dims)
    if instruction.opcode == "custom-call":
        return _call_flops(instruction, [by_name[name] for name in given if name in by_name])
    if instruction.opcode != "fusion" and instruction.opcode not in CONTROL:
        return 0.0
    total = 0.0
    for name in called(instruction):
        inner = _by_name(computations.get(name, ()))
        for one in inner.values():
            total += _flops(one, inner, computations)
    return total


def _call_flops(call: Instruction, given: list[Instruction]) -> float:
    """Returns the FLOPs of a custom call: a cuBLAS matmul or fused attention, 0 for others."""
    target = _target(call)
    if target.startswith("__cublas"):
        contracted = _listed(call.text, r'"lhs_contracting_dimensions":\[([\d",]*)\]')
        result = arrays(call.shape)[0]
        return 2 * result.size * _contracted(given[0], contracted)
    kernel = call.name if target == "tpu_custom_call" else target
    matmuls = _attention_matmuls(kernel)
    if not matmuls:
        return 0.0
    if kernel.startswith(FUSED_BACKWARD) and _gradients(call) == 3:
        matmuls += 1  # dq = ds k; its weights are those of dk and dv
    heads = []  # the operands with a head dimension; others are masks, block tables and statistics
    for operand in given:
        heads += [a for a in arrays(operand.shape) if len(a.dims) == 4 and a.dtype in ATTENTION_DTYPES]
    query, key = heads[:2]
    # cuDNN has [B, T, N, H], Pallas has [B, N, T, H].
    positions = key.dims[1 if target.startswith("__cudnn") else 2]
    # Each query meets half of the positions: every attention kernel of gptjax is causal.
    return matmuls * 2 * query.size * positions / 2


def _gradients(call: Instruction) -> int:
    """Returns how many of q, k and v a kernel returns gradients of; dq has a dimension more, the blocks of keys."""
    return sum(len(array.dims) >= 4 and array.dtype in ATTENTION_DTYPES for array in arrays(call.shape))


def _attention_matmuls(kernel: str) -> int:
    for prefix, count in ATTENTION.items():
        if kernel.startswith(prefix):
            return count
    return 0


def _listed(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    if found is None:
        return []
    return [int(n) for n in re.findall(r"\d+", found[1])]


def _contracted(lhs: Instruction, dims: Iterable[int]) -> int:
    sizes = arrays(lhs.shape)[0].dims
    return math.prod(sizes[d] for d in dims)


def _convolution_flops(
    convolution: Instruction,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
) -> float:
    """Returns 2 x batch x features out x features in x pairs of an output and a kernel position that meet an input.

    TPUs compute matmuls as convolutions, with windows that are mostly padding; those FLOPs are not done. lhs and rhs
    are the shapes of input and kernel.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.text)
    assert labels is not None, convolution.text[:300]
    input_labels, kernel_labels, output_labels = labels.groups()
    output = arrays(convolution.shape)[0].dims
    pairs = 1
    for at, window in enumerate(_windows(convolution.text, len(lhs) - 2)):
        spatial = str(at)  # the label of a spatial dim is its number
        pairs *= _valid_pairs(
            lhs[input_labels.index(spatial)],
            output[output_labels.index(spatial)],
            **window,
        )
    groups = re.search(r"batch_group_count=(\d+)", convolution.text)
    batch = lhs[input_labels.index("b")]
    if groups:
        batch //= int(groups[1])
    features_out = rhs[kernel_labels.index("o")]
    features_in = rhs[kernel_labels.index("i")]
    return 2 * batch * features_out * features_in * pairs


def _windows(text: str, count: int) -> list[dict[str, int]]:
    """Returns size, stride, padding and dilations of each of `count` spatial dims of a convolution.

    The text has them as in window={size=3x1 pad=1_1x0_0}; a field that is missing has its default in all dims.
    """
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def read(name: str, at: int, default: int) -> int:
        if name not in fields:
            return default
        value = fields[name].split("x")[at]
        return int(value.split("_")[0])  # of the padding LOW_HIGH, the low one

    windows = []
    for at in range(count):
        windows.append(
            {
                "size": read("size", at, 1),
                "stride": read("stride", at, 1),
                "low": read("pad", at, 0),
                "lhs_dilate": read("lhs_dilate", at, 1),
                "rhs_dilate": read("rhs_dilate", at, 1),
            }
        )
    return windows


def _valid_pairs(
    input_size: int,
    output_size: int,
    *,
    size: int,
    stride: int,
    low: int,
    lhs_dilate: int,
    rhs_dilate: int,
) -> int:
    """Returns how many pairs of an output and a kernel position meet an element of the input, in one spatial dim."""
    pairs = 0
    for output_at in range(output_size):
        for kernel_at in range(size):
            place = output_at * stride - low + kernel_at * rhs_dilate
            is_element = place % lhs_dilate == 0  # dilation puts zeros between elements
            if is_element and 0 <= place // lhs_dilate < input_size:
                pairs += 1
    return pairs
