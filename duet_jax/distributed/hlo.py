"""What a compiled program does, read from its text: collectives, memory traffic, and how often loops run.

XLA's own cost analysis counts the body of a loop once, so that of a decoder whose layers are scanned it sees one
layer. How often a loop runs is in the text: CPUs and GPUs write it down, and in that for TPUs the loop's condition
compares a counter, which JAX starts at 0, with a constant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "token": 0, "opaque": 0}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that name values without moving them.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "iota", "domain"),
}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)|\b(?:branch_computations)=\{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: a name, the type of its result, an operation, its operands, and all that follows."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but not those that only combine two scalars."""
        if self.operation in ("all-reduce", "reduce-scatter", "reduce", "reduce-window", "sort", "scatter", "map"):
            return ()
        found = []
        for one, several in _CALLED.findall(self.rest):
            found += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective of a program.

    Attributes:
      count: how often one run of the program does it.
      bytes: of results, a chip.
      sent: bytes that each chip sends over its links where the chips of a group form a ring: for a group of n, an
        all-gather and an all-to-all send (n - 1) / n of the result, an all-reduce twice that, and a reduce-scatter
        n - 1 times its result, which is an nth of what is summed.
    """

    count: int
    bytes: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program, read from `compiled.as_text()`.

    Attributes:
      computations: instructions of each, by name.
      entry: name of the one that is run.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @cached_property
    def _runs(self) -> dict[str, int]:
        """How often each computation is run; a loop of unknown length counts once, as does each branch."""
        runs = {self.entry: 1}
        waiting = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            for instruction in self.computations[name]:
                inside = times * (self._trips(instruction) or 1)
                for called in instruction.called:
                    runs[called] = runs.get(called, 0) + inside
                    waiting.append((called, inside))
        return runs

    def _trips(self, instruction: Instruction) -> int | None:
        """How often a loop runs; None where that is not known."""
        found = _CONDITION.search(instruction.rest) if instruction.operation == "while" else None
        if found is None:
            return None
        told = _TRIPS.search(instruction.rest)
        if told is not None:
            return int(told.group(1))
        body = {i.name: i for i in self.computations[found.group(1)]}
        test = list(body.values())[-1]
        if test.operation != "compare" or "direction=LT" not in test.rest:
            return None
        bound = body.get(test.operands[1])
        return int(bound.operands[0]) if bound is not None and bound.operation == "constant" else None

    @property
    def open_loops(self) -> int:
        """Loops whose number of runs the compiler does not know; they are counted as if they ran once."""
        loops = [i for name in self._runs for i in self.computations[name] if i.operation == "while"]
        return sum(self._trips(loop) is None for loop in loops)

    def collectives(self) -> dict[str, Collective]:
        """Of each kind that occurs, in the order of `KINDS`."""
        # One that is started, worked beside and awaited stands in three computations, with the same channel.
        seen: dict[str, tuple[int, str, float, float]] = {}
        for name, runs in self._runs.items():
            for instruction in self.computations[name]:
                kind = instruction.operation.removesuffix("-start")
                if kind not in KINDS:
                    continue
                size, result = _group_size(instruction), _result_bytes(instruction)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    # TPUs have no reduce-scatter of their own: it is an all-reduce fused with the slice that is kept.
                    kind, result = "reduce-scatter", result / size
                share = (size - 1) / size
                factor = {"all-reduce": 2 * share, "reduce-scatter": size - 1.0, "collective-permute": 1.0}
                channel = _CHANNEL.search(instruction.rest)
                key = instruction.name if channel is None else channel.group(1)
                here = runs, kind, result, result * factor.get(kind, share)
                seen[key] = max(seen.get(key, here), here)
        found: dict[str, Collective] = {}
        for runs, kind, result, sent in seen.values():
            old = found.get(kind, Collective(0, 0.0, 0.0))
            found[kind] = Collective(old.count + runs, old.bytes + runs * result, old.sent + runs * sent)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def traffic(self) -> float:
        """Bytes that one run reads from and writes to memory: operands and results of all instructions.

        Fused instructions count from outside. An operand of which only slices are read counts as those, and a result
        that is an operand with a slice replaced counts as the slice. Arrays that the compiler keeps in a core's own
        memory count nothing.
        """
        fused = {
            called
            for body in self.computations.values()
            for i in body
            if i.operation in ("fusion", "async-start")
            for called in i.called
        }
        total = 0.0
        for name, runs in self._runs.items():
            if name not in fused:
                total += runs * sum(self._moved(name, instruction) for instruction in self.computations[name])
        return total

    @cached_property
    def _types(self) -> dict[tuple[str, str], str]:
        return {(name, i.name): i.type for name, body in self.computations.items() for i in body}

    def _moved(self, where: str, instruction: Instruction) -> float:
        if instruction.operation in FREE or instruction.operation.endswith("-done"):
            return 0.0
        if 'custom_call_target="AllocateBuffer"' in instruction.rest:
            return 0.0
        result = _main_memory(instruction.type)
        operands = [_main_memory(self._types.get((where, name), "")) for name in instruction.operands]
        if instruction.operation == "copy-start":
            # Its type names the destination and, a second time, the source.
            return _main_memory(instruction.type)
        if instruction.operation in ("dynamic-slice", "slice"):
            return result + min(operands[0], _bytes(instruction.type))
        if instruction.operation == "dynamic-update-slice":
            return 2 * min(result, operands[1])
        if instruction.operation == "gather":
            return result + min(operands[0], _bytes(instruction.type)) + operands[1]
        if instruction.operation == "scatter":
            return operands[1] + 3 * operands[2]
        if instruction.operation == "fusion":
            return self._moved_by_fusion(instruction, result, operands)
        return result + sum(operands)

    def _moved_by_fusion(self, fusion: Instruction, result: float, operands: list[float]) -> float:
        body = self.computations[fusion.called[0]]
        inside = {i.name: i for i in body}
        numbers = {i.name: int(i.operands[0]) for i in body if i.operation == "parameter"}
        users: dict[str, list[Instruction]] = {}
        for i in body:
            for name in i.operands:
                users.setdefault(name, []).append(i)
        for parameter, number in numbers.items():
            sizes = [_sliced(name, i) for name, i in _through_bitcasts(parameter, users)]
            known = [size for size in sizes if size is not None]
            if sizes and len(known) == len(sizes):
                operands[number] = min(operands[number], sum(known))
        roots = [body[-1]]
        if roots[0].operation == "tuple":
            roots = [inside[name] for name in roots[0].operands]
        for root in roots:
            while root.operation == "bitcast":
                root = inside[root.operands[0]]
            if root.operation == "dynamic-update-slice" and _main_memory(root.type):
                result += _bytes(inside[root.operands[1]].type) - _main_memory(root.type)
        return max(result, 0.0) + sum(operands)


def read(text: str) -> Module:
    """Reads the text of a compiled module."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None:
            head = _COMPUTATION.match(line)
            if head is not None and " = " not in line.split("(", 1)[0]:
                body = computations.setdefault(head.group(2), [])
                entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            body = None
        else:
            found = _INSTRUCTION.match(line)
            if found is not None:
                body.append(_instruction(*found.groups()))
    if not entry:
        raise ValueError("the text has no ENTRY computation; it is not that of a compiled program")
    return Module({name: tuple(body) for name, body in computations.items()}, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    operation = _OPERATION.match(rest)
    assert operation is not None, rest
    stop = _closing(rest, operation.end() - 1)
    inside = rest[operation.end() : stop]
    if operation.group(1) in ("parameter", "constant"):
        operands: tuple[str, ...] = (inside,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, kind, operation.group(1), operands, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")


def _bytes(kind: str) -> float:
    """Bytes of an array or of all arrays of a tuple."""
    return sum(_size(dtype, dims) for dtype, dims, _ in _ARRAY.findall(kind))


def _main_memory(kind: str) -> float:
    """Those that lie in main memory; the layout of others names another memory space, as S(1)."""
    return sum(_size(dtype, dims) for dtype, dims, layout in _ARRAY.findall(kind) if "S(" not in layout)


def _size(dtype: str, dims: str) -> float:
    width = BYTES.get(dtype)
    if width is None:
        bits = re.search(r"\d+", dtype)
        width = 1 if bits is None else int(bits.group()) / 8
    return width * math.prod(int(dim) for dim in dims.split(",") if dim)


def _result_bytes(collective: Instruction) -> float:
    """Bytes of a collective's result; one that is started gives its operands and results side by side."""
    plain = re.sub(r"\{[^{}]*\}", "", collective.type)
    if not collective.operation.endswith("-start") or not plain.startswith("("):
        return _bytes(plain)
    if collective.operation == "all-reduce-start":
        return _bytes(plain)
    depth, parts, start = 0, [], 1
    for place, letter in enumerate(plain):
        depth += {"(": 1, ")": -1, "[": 1, "]": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(plain[start:place])
            start = place + 1
    return _bytes(parts[1])


def _group_size(collective: Instruction) -> int:
    """Chips that take part together; 2 of a permutation, which is between pairs."""
    if collective.operation.startswith("collective-permute"):
        return 2
    iota = _IOTA_GROUPS.search(collective.rest)
    if iota is not None:
        return int(iota.group(1))
    mesh = _MESH_GROUPS.search(collective.rest)
    if mesh is not None:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh.group(1)))
        # An axis is named alone, or with the part of it that is meant: 'x':(2)4 is 4 chips.
        named = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    listed = _LISTED_GROUPS.search(collective.rest)
    if listed is None:
        raise ValueError(f"the collective {collective.name} does not say which chips take part")
    return listed.group(1).count(",") + 1


def _through_bitcasts(name: str, users: dict[str, list[Instruction]]) -> Iterator[tuple[str, Instruction]]:
    """Instructions that read a value, under its own name or as a bitcast of it."""
    for user in users.get(name, []):
        if user.operation == "bitcast":
            yield from _through_bitcasts(user.name, users)
        else:
            yield name, user


def _sliced(name: str, user: Instruction) -> float | None:
    """Bytes that an instruction reads of a value that it slices or replaces a slice of; None: all of it."""
    first = bool(user.operands) and user.operands[0] == name
    if first and user.operation in ("dynamic-slice", "gather", "slice"):
        return _bytes(user.type)
    if first and user.operation == "dynamic-update-slice":
        return 0.0
    return None
