"""A compiled program's text, parsed: what runs, how often, and where its values are from.

The text is that of `compiled.as_text()`, of any backend. XLA writes an instruction once for each
place; inside a `while` it runs as often as the loop does, and inside a loop in a loop as often as
both multiplied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Instructions that move a value without computing with it: what comes out is what went in.
MOVES = {
    "bitcast",
    "bitcast-convert",
    "broadcast",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "dynamic-slice",
    "optimization-barrier",
    "pad",
    "reshape",
    "slice",
    "transpose",
}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: as written.
        type: of the result, such as `bf16[8,128]{1,0}`, or a tuple of such.
        operands: names in the same computation.
        literal: what stands between the parentheses.
        rest: attributes, metadata, backend config.
        root: whether the computation returns it.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the value of `name=%value` or `name=value`."""
        match = re.search(rf"(?:^|[ ,]){name}=%?([^,\s]+)", self.rest)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, or of the parameter."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1].replace("\\'", "'") if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program: computation → instruction name → Instruction, in the order of the text."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[str, Instruction]]]:
        """Of each computation, the places that call it: (computation, instruction)."""
        found: dict[str, list[tuple[str, Instruction]]] = {name: [] for name in self.computations}
        for name, body in self.computations.items():
            for instruction in body.values():
                for called in called_by(instruction):
                    if called in found:
                        found[called].append((name, instruction))
        return found

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs in one execution of the program.

        A branch of a conditional counts as if it always ran; a loop of `uncounted` as if once.
        """
        memo: dict[str, int] = {}

        def count(name: str) -> int:
            if name not in memo:
                memo[name] = 1 if name == self.entry else 0
                for caller, instruction in self.callers[name]:
                    times = self.trip_count(caller, instruction)
                    memo[name] += count(caller) * (1 if times is None else times)
            return memo[name]

        for name in self.computations:
            count(name)
        return memo

    @property
    def uncounted(self) -> list[str]:
        """Names of the loops whose trip count is known only as they run, by the data."""
        return [
            i.name
            for name, body in self.computations.items()
            for i in body.values()
            if self.trip_count(name, i) is None
        ]

    def trip_count(self, computation: str, instruction: Instruction) -> int | None:
        """Returns how often an instruction runs what it calls: 1, or a loop's trip count.

        None: the text does not tell.
        """
        if instruction.opcode != "while":
            return 1
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', instruction.rest)
        return int(known[1]) if known else self._counted(computation, instruction)

    def _counted(self, computation: str, loop: Instruction) -> int | None:
        """Reads a `while` of the form that a scan has: i = start; while i < limit: i += step."""
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        test = next(i for i in condition.values() if i.root)
        if test.opcode == "fusion":  # the comparison alone, wrapped
            condition = self.computations[test.attribute("calls")] | condition
            test = next(i for i in condition.values() if i.opcode == "compare")
        elements = [condition[name] for name in test.operands if name in condition]
        index = next((e for e in elements if e.opcode == "get-tuple-element"), None)
        limit = next((_constant(e) for e in elements if e.opcode == "constant"), None)
        if test.opcode != "compare" or index is None or limit is None:
            return None
        place = int(index.attribute("index"))
        caller = self.computations[computation]
        start = _constant(_element(caller, caller[loop.operands[0]], place))
        step = 1
        after = _element(body, next(i for i in body.values() if i.root), place)
        if after is not None and after.opcode == "add":
            steps = [_constant(body[name]) for name in after.operands if name in body]
            step = next((s for s in steps if s is not None), 1)
        inclusive = "direction=LE" in test.rest
        return max(0, math.ceil((limit + inclusive - (start or 0)) / step))

    def origins(self, computation: str, name: str) -> set[str]:
        """Returns the entry's parameters that a value is moved from, by their JAX names.

        Empty for a value that was computed. Casts, slices, copies, tuples, fusions of these and
        what a loop is started with are followed; a slice of a stack is of that parameter.
        """
        return self._origins(computation, name, None, frozenset())

    def _origins(self, computation: str, name: str, place: int | None, seen: frozenset) -> set[str]:
        here = (computation, name, place)
        instruction = self.computations[computation].get(name)
        if instruction is None or here in seen:
            return set()
        seen |= {here}
        follow = functools.partial(self._origins, seen=seen)
        if instruction.opcode == "parameter":
            if computation == self.entry:
                return {instruction.op_name}
            number, found = int(instruction.literal), set()
            for caller, call in self.callers[computation]:
                if len(call.operands) > number:
                    found |= follow(caller, call.operands[number], place)
            return found
        if instruction.opcode == "get-tuple-element":
            index = int(instruction.attribute("index"))
            return follow(computation, instruction.operands[0], index)
        if instruction.opcode == "tuple" and place is not None:
            return follow(computation, instruction.operands[place], None)
        if instruction.opcode == "while":
            return follow(computation, instruction.operands[0], place)
        if instruction.opcode in ("fusion", "call", "async-start"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            root = next((i for i in self.computations[called].values() if i.root), None)
            return set() if root is None else follow(called, root.name, place)
        if instruction.opcode == "dynamic-update-slice":  # a shard put among zeros, to be summed
            return follow(computation, instruction.operands[1], None)
        if instruction.opcode in MOVES and instruction.operands:
            return follow(computation, instruction.operands[0], None)
        return set()


def parse(text: str) -> Module:
    """Returns the Module of a program's text.

    An attribute may span lines, which are left out.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = None, None
    for line in text.splitlines():
        if body is None:
            match = _COMPUTATION.match(line)
            if match:
                body = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            body = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                body[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no entry computation")
    return Module(computations, entry)


def shapes_of(type_: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns (dtype, dimensions) of each array in a type.

    >>> shapes_of("(bf16[8,128]{1,0:T(8,128)(2,1)}, u32[])")
    (('bf16', (8, 128)), ('u32', ()))
    """
    return tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(type_)
    )


def bytes_of(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    """Returns the bytes of arrays, without padding.

    >>> bytes_of((("bf16", (8, 128)), ("s4", (3,)), ("pred", ())))
    2051
    """
    total = 0
    for dtype, dims in shapes:
        bits = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}.get(dtype)
        bits = int(re.match(r"[suf](\d+)", dtype)[1]) if bits is None else bits
        total += -(-math.prod(dims) * bits // 8)
    return total


def called_by(instruction: Instruction) -> Iterator[str]:
    """Yields the computations that an instruction runs."""
    yield from _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _balanced(rest)
    literal = rest[1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    if not operands and opcode not in ("constant", "parameter", "iota"):
        operands = tuple(re.findall(r"([A-Za-z_][\w.\-]*)(?:,|$)", literal))
    return Instruction(
        match[1], opcode, type_, operands, literal, rest[end:], "ROOT " in line[: match.end()]
    )


def _balanced(text: str) -> int:
    """Returns where the parenthesis that `text` begins with is closed, plus one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced: {text[:80]}")


def _constant(instruction: Instruction | None) -> int | None:
    """Returns the value of an integer constant."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def _element(body: dict[str, Instruction], value: Instruction, place: int) -> Instruction | None:
    """Returns what stands at a place of a tuple, through copies."""
    while value.opcode in ("copy", "bitcast", "optimization-barrier", "tuple"):
        if value.opcode == "tuple":
            value = body.get(value.operands[place])
            while value is not None and value.opcode in ("copy", "bitcast"):
                value = body.get(value.operands[0])
            return value
        value = body[value.operands[0]]
    return None
