"""Reads from the schedule of a compiled program how much of its communication kernels hide.

The text of a compiled program is its schedule: a device runs the instructions of a computation in their order. An
asynchronous collective runs from its start to its end, next to the kernels between the two.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from gptjax.plan.hlo import Instruction, called, count_runs, operands, parse
from gptjax.plan.hlo_kernels import is_kernel, read_kernel
from gptjax.plan.traffic import DONE, STARTS, Collective, collectives_by_place, continues_a_collective

Computations = Mapping[str, list[Instruction]]
SCHEDULED = ("while", "call", "conditional")  # their computations are schedules of their own
VIEWS = ("get-tuple-element", "tuple", "bitcast", "opt-barrier")
NO_ENDS = ("copy-done", "slice-done", "send-done")  # of copies; of what was sent to a host, whose sum recv-done brings
RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')  # names a transfer between slices


@dataclasses.dataclass(frozen=True)
class Speeds:
    """How fast a device is taken to be."""

    memory: float  # bytes/s
    flops: float  # FLOP/s of its matrix units
    seconds_to_send: Callable[[Collective], float]  # of one run of a collective


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A collective, and how long it takes in one step."""

    collective: Collective
    seconds: float  # of all its runs
    hidden: float  # of these, the seconds next to kernels


def read_overlaps(
    text: str,
    mesh_shape: Mapping[str, int],
    slices: int = 1,
    *,
    speeds: Speeds,
) -> list[Overlap]:
    """Returns the collectives of a compiled module's text in program order, each with the time that kernels hide.

    A kernel hides one collective at a time, for as long as it runs. Latencies are not counted. mesh_shape, slices: as
    in read_collectives.
    """
    computations = parse(text)
    schedules = _Schedules(computations, collectives_by_place(computations, mesh_shape, slices), speeds)
    return list(schedules.all_overlaps())


def hidden_share(overlaps: Iterable[Overlap]) -> float:
    """Returns the share of all communication that is hidden, 0 if there is none."""
    overlaps = list(overlaps)
    seconds = sum(overlap.seconds for overlap in overlaps)
    return sum(overlap.hidden for overlap in overlaps) / seconds if seconds else 0.0


class _Schedules:
    """The computations of a program that are schedules, with the seconds of their instructions."""

    def __init__(
        self,
        computations: Computations,
        places: Mapping[tuple[str, str], Collective],
        speeds: Speeds,
    ) -> None:
        self._computations = computations
        self._speeds = speeds
        self._runs = count_runs(computations, through=SCHEDULED)
        self._collectives = collections.defaultdict(list)  # by computation
        for (computation, instruction), collective in places.items():
            self._collectives[computation].append((instruction, collective))
        self._total: dict[str, float] = {}  # seconds of the kernels in one run of a computation

    def all_overlaps(self) -> Iterator[Overlap]:
        """Yields the collectives of all schedules."""
        for name in self._computations:
            if self._runs[name]:
                yield from self._overlaps(name)

    def _overlaps(self, name: str) -> Iterator[Overlap]:
        """Yields the collectives of the schedule `name`, in the order in which they end."""
        instructions = self._computations[name]
        by_name = {instruction.name: instruction for instruction in instructions}
        # For each kernel so far the seconds in which it hides nothing yet.
        idle: dict[str, float] = {}
        started: dict[str, tuple[int, list[Collective]]] = {}  # start -> (kernels before it, its collectives)
        for instruction in instructions:
            found = self._collectives_of(name, instruction)
            if found and self._is_start(instruction):
                started[instruction.name] = len(idle), found
            elif found:
                yield from self._waited_for(found)
            elif self._is_end(instruction):
                start, chain = self._start_of(instruction, by_name, started)
                if start is None:
                    continue  # of a copy
                first, ended = started.pop(start)
                hiding = list(idle)[first:]
                if self._is_fused(instruction):
                    # Only the fusions that are compiled together with the collective advance it.
                    hiding = [kernel for kernel in hiding if kernel in chain]
                yield from self._hidden_by(hiding, idle, ended)
            else:
                seconds = self._seconds(instruction, by_name, name)
                if seconds:
                    idle[instruction.name] = seconds
        for _, found in started.values():  # ends in another computation
            yield from self._waited_for(found)

    def _hidden_by(self, kernels: list[str], idle: dict[str, float], found: list[Collective]) -> Iterator[Overlap]:
        """Yields `found`, hidden by as much as `kernels` have idle, and takes that time from `idle`."""
        for collective in found:
            seconds = self._speeds.seconds_to_send(collective)
            hidden = 0.0
            for kernel in kernels:
                used = min(idle[kernel], seconds - hidden)
                idle[kernel] -= used
                hidden += used
            yield Overlap(collective, collective.count * seconds, collective.count * hidden)

    def _waited_for(self, found: list[Collective]) -> Iterator[Overlap]:
        for collective in found:
            yield Overlap(collective, collective.count * self._speeds.seconds_to_send(collective), 0.0)

    def _collectives_of(self, name: str, instruction: Instruction) -> list[Collective]:
        """Returns the collectives that an instruction is, or that are in the computations that it calls."""
        found = [collective for place, collective in self._collectives[name] if place == instruction.name]
        if instruction.opcode in SCHEDULED:
            return found
        for callee in called(instruction):
            for inner in self._computations.get(callee, ()):
                found += self._collectives_of(callee, inner)
        return found

    def _is_start(self, instruction: Instruction) -> bool:
        return instruction.opcode.endswith("-start") or instruction.opcode == "send" or self._calls(instruction, STARTS)

    def _is_end(self, instruction: Instruction) -> bool:
        if instruction.opcode in NO_ENDS:
            return False
        return instruction.opcode.endswith("-done") or self._is_fused(instruction)

    def _is_fused(self, instruction: Instruction) -> bool:
        """Returns whether an instruction ends a TPU's collective that runs within fusions."""
        return self._calls(instruction, DONE)

    def _calls(self, instruction: Instruction, target: str) -> bool:
        if instruction.opcode != "fusion":
            return False
        return any(target in inner.text for name in called(instruction) for inner in self._computations.get(name, ()))

    def _start_of(
        self,
        end: Instruction,
        by_name: Mapping[str, Instruction],
        started: Mapping[str, object],
    ) -> tuple[str | None, set[str]]:
        """Returns (the start that `end` belongs to, or None; the fusions that advance it)."""
        chain: set[str] = set()
        pending = operands(end)
        seen = set(pending)
        while pending:
            name = pending.pop()
            if name in started:
                return name, chain
            instruction = by_name.get(name)
            if instruction is None:
                continue
            if instruction.opcode == "recv":
                return _sent_by(instruction, by_name, started), chain
            continues = any(continues_a_collective(callee, ()) for callee in called(instruction))
            if continues:
                chain.add(name)
            if continues or instruction.opcode in VIEWS or instruction.opcode.endswith("-update"):
                new = [operand for operand in operands(instruction) if operand not in seen]
                seen.update(new)
                pending += new
        return None, chain

    def _seconds(self, instruction: Instruction, by_name: Mapping[str, Instruction], caller: str) -> float:
        """Returns the seconds of one run of a kernel in the schedule `caller`, or of the kernels in a loop there."""
        if instruction.opcode in SCHEDULED:
            total = 0.0
            for callee in called(instruction):
                if self._runs.get(callee):
                    total += self._total_seconds(callee) * self._runs[callee]
            return total / self._runs[caller]
        if not is_kernel(instruction):
            return 0.0
        kernel = read_kernel(instruction, by_name, self._computations)
        return 0.0 if kernel.is_copy else kernel.seconds(self._speeds.memory, self._speeds.flops)

    def _total_seconds(self, name: str) -> float:
        """Returns the seconds of the kernels in one run of a computation; waits for collectives are not included."""
        if name not in self._total:
            instructions = self._computations[name]
            by_name = {instruction.name: instruction for instruction in instructions}
            kernels = [one for one in instructions if not self._collectives_of(name, one) and not self._is_end(one)]
            self._total[name] = sum(self._seconds(one, by_name, name) for one in kernels)
        return self._total[name]


def _sent_by(recv: Instruction, by_name: Mapping[str, Instruction], started: Iterable[str]) -> str | None:
    """Returns which of the sends in `started` belongs to a recv: one of the same rendezvous."""
    rendezvous = RENDEZVOUS.findall(recv.text)
    return next((name for name in started if RENDEZVOUS.findall(by_name[name].text) == rendezvous), None)
