"""PTX as text, into instructions: the language of the "Parallel Thread Execution ISA", as far as Triton writes it."""

import re
import struct
from dataclasses import dataclass, field

import numpy as np


class Unsupported(Exception):
    """PTX that the emulator does not know."""


@dataclass(frozen=True)
class Address:
    """`[base + offset]`. `base` is a register, a symbol, or a number; several are a tensor's coordinates."""

    base: "str | int"
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 mul.wide.s32 %rd1, %r2, 4;`: parts ("mul", "wide", "s32"), operands ("%rd1", "%r2", 4).

    A vector {...} is a tuple of operands. `line` is the place in the source file that it was compiled from.
    """

    parts: tuple[str, ...]
    operands: tuple
    guard: str = ""
    negated: bool = False
    line: str = ""

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    @property
    def where(self) -> str:
        """The instruction and what it was compiled from, for a message."""
        return f"`{self}`" + (f" ({self.line})" if self.line else "")

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(map(_written, self.operands))}".strip()


@dataclass
class Program:
    """One kernel. `labels` are places in `instructions`; `parameters` are (name, type) in order."""

    name: str
    target: str
    parameters: list[tuple[str, str]]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)  # lists of labels, by name
    symbols: dict[str, int] = field(default_factory=dict)  # shared memory's, as offsets into it
    static_shared: int = 0


def _written(operand) -> str:
    if isinstance(operand, tuple):
        return "{" + ", ".join(map(_written, operand)) + "}"
    if isinstance(operand, Address):
        return f"[{operand.base}+{operand.offset}]" if operand.offset else f"[{operand.base}]"
    return str(operand)


def parse(text: str) -> Program:
    """The one kernel in `text`. Raises ValueError for what is no PTX as Triton writes it."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text))
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\((.*?)\)(.*?)\{", text, re.DOTALL)
    target = re.search(r"\.target\s+(\w+)", text)
    if entry is None or target is None:
        raise ValueError("no kernel (.visible .entry) in this PTX")
    parameters = [_parameter(part) for part in entry.group(2).split(",") if part.strip()]
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry.group(3))
    program = Program(entry.group(1), target.group(1), parameters, int(threads.group(1)) if threads else 0)
    for name, size in re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        program.symbols[name] = program.static_shared
        program.static_shared += int(size or 0)
    body = text[entry.end() : _end_of(text, entry.end())]
    line = ""
    for statement in _statements(body):
        while label := re.match(r"([$\w]+):\s*", statement):
            program.labels[label.group(1)] = len(program.instructions)
            statement = statement[label.end() :]
            if listed := re.match(r"\.branchtargets\s+(.*)", statement):
                program.targets[label.group(1)] = _split(listed.group(1))
        if location := re.match(r"\.loc\s+(\d+)\s+(\d+)", statement):
            line = f"{files.get(location.group(1), '?')}:{location.group(2)}"
        elif statement and not statement.startswith("."):
            program.instructions.append(_instruction(statement, line))
    return program


def _parameter(text: str) -> tuple[str, str]:
    kind = re.search(r"\.([usfb]\d+)\b", text).group(1)
    return text.split("[")[0].split()[-1], kind


def _end_of(text: str, start: int) -> int:
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found.group() == "{" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError("a kernel in this PTX has no end")


def _statements(body: str):
    """Statements without their semicolons. `.loc` and labels have none: a line each.

    What a scope of its own declares, as inline assembly does, gets names that are nobody else's.
    """
    body = re.sub(r"^\s*\.loc\b[^\n]*", lambda found: f"{found.group()};", body, flags=re.MULTILINE)
    scopes: list[dict[str, str]] = []
    count = 0
    for part in body.split(";"):
        part = " ".join(part.split())
        while part and (part[0] == "}" or re.match(r"\{\s*(?:\.reg|@|[a-zA-Z]|$)", part)):  # a scope, not a vector
            if part[0] == "{":
                scopes.append({})
                count += 1
            else:
                scopes.pop()
            part = part[1:].strip()
        if scopes:
            if declared := re.match(r"\.reg\s+\.\w+\s+(.+)", part):
                scopes[-1] |= {name.strip(): f"%{name.strip('% ')}__{count}" for name in declared.group(1).split(",")}
            if label := re.match(r"(\w+):", part):
                scopes[-1][label.group(1)] = f"{label.group(1)}__{count}"
            for name, own in scopes[-1].items():
                part = re.sub(rf"(?<![\w%]){re.escape(name)}(?!\w)", own, part)
        yield part


def _instruction(text: str, line: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*)$", text)
    if found is None:
        raise ValueError(f"not an instruction: {text}")
    negated, guard, name, rest = found.groups()
    operands = tuple(_operand(part) for part in _split(rest))
    return Instruction(tuple(name.replace("::", "_").split(".")), operands, guard or "", bool(negated), line)


def _split(text: str) -> list[str]:
    """At commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def _operand(text: str):
    if text.startswith("{"):
        return tuple(_operand(part) for part in _split(text[1:-1]))
    if text.startswith("["):
        return _address(text[1:-1])
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.float32(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.float64(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def _address(text: str) -> Address:
    base, *coordinates = _split(text)
    found = re.fullmatch(r"\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*", base)
    if found is None:
        raise ValueError(f"not an address: [{text}]")
    start = _operand(found.group(1))
    return Address(start, int(found.group(2) or "0", 0), _operand(coordinates[0]) if coordinates else ())
