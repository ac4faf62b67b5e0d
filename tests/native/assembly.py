"""What the compiler made of a loop: x86-64 code as objdump prints it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.native import cpu_program

_REGISTER_BYTES = {"zmm": 64, "ymm": 32, "xmm": 16}
_INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\t(?:(?:data16|rep|repz|cs|notrack|bnd|lock) )*(\S+)\s*([^#]*)")
_ADDRESS = re.compile(r"(-?0x[0-9a-f]+)?\((%\w+)?(?:,(%\w+),(\d))?\)")
# A vector of narrow elements in memory beside one of twice the width in the register.
_HALF = re.compile(r"vpmovzx(bw|wd|dq)|vpmovsx(bw|wd|dq)|vpmov(wb|dw|qd)|vcvt(ph2psx?|ps2ph|ps2pd|dq2pd)")
_EXTRACT = re.compile(r"vextract[fi](128|32x4|64x2|32x8|64x4)")
_SCALAR = re.compile(r"v?(mov|add|sub|mul|div|sqrt|max|min|fn?m(add|sub)\d+)s[sd]|v?mov[dq]|v?pinsr\w|v?pextr\w")
_CONSTANT = re.compile(r"(add|sub)q? +\$(-?0x[0-9a-f]+),(%r\w+)")
_ARITHMETIC = re.compile(r"v?(add|sub|mul|fn?m(add|sub)\d+)ps")
_FP64 = re.compile(r"v?(add|sub|mul|fn?m(add|sub)\d+|cvt\w*)[ps]d|v?cvt(tp|p|s)d2\w+")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    mnemonic: str
    operands: str

    def vector_bytes(self) -> int:
        """Of the widest vector register that is named; 0 if none is."""
        return max((size for name, size in _REGISTER_BYTES.items() if f"%{name}" in self.operands), default=0)

    def memory_bytes(self) -> int:
        """How much a packed instruction reads or writes."""
        if extract := _EXTRACT.fullmatch(self.mnemonic):
            return 32 if extract[1] in ("32x8", "64x4") else 16
        return self.vector_bytes() // (2 if _HALF.fullmatch(self.mnemonic) else 1)

    def stores(self) -> bool:
        """Whether the memory operand, if there is one, is the destination."""
        return self.operands.rstrip().endswith(")")

    def target(self) -> int | None:
        """Where a jump goes; None for any other instruction, and for a jump through a register."""
        found = re.match(r"([0-9a-f]+)\b", self.operands) if self.mnemonic.startswith("j") else None
        return int(found[1], 16) if found else None


def functions(binary: Path) -> dict[str, list[Instruction]]:
    """Every function of an object file or library by its demangled name, with ``[clone .x]`` where it is a version."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in cpu_program.run("objdump", "-d", "-C", "--no-show-raw-insn", binary).splitlines():
        if line.endswith(">:"):
            body = found[line.partition("<")[2][:-2]] = []
        elif match := _INSTRUCTION.match(line):
            body.append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


class Loop:
    """An innermost loop.

    Attributes:
        body: Its instructions.
        loaded: Bytes per turn at addresses that move; what is read twice counts once.
        stored: Likewise, written.
    """

    def __init__(self, body: Sequence[Instruction]) -> None:
        self.body = body
        moving = {
            registers[-1]
            for i in body
            if i.mnemonic.startswith(("add", "sub", "lea", "inc", "dec"))
            and (registers := re.findall(r"%r\w+", i.operands))
            and i.operands.rstrip().endswith(registers[-1])
        }
        ranges: dict[bool, dict[tuple[str, ...], set[int]]] = {True: defaultdict(set), False: defaultdict(set)}
        moved: dict[str, int] = defaultdict(int)  # so far in the turn, by constants
        for i in body:
            if constant := _CONSTANT.fullmatch(f"{i.mnemonic} {i.operands.strip()}"):
                moved[constant[3]] += int(constant[2], 16) * (1 if constant[1] == "add" else -1)
            address = _ADDRESS.search(i.operands)
            if address is None or i.mnemonic.startswith(("nop", "lea", "prefetch")):
                continue
            displacement, *registers = (part or "" for part in address.groups())
            if moving & set(registers):
                start = int(displacement or "0", 16) + moved[registers[0]]
                ranges[i.stores()][tuple(registers)].update(range(start, start + i.memory_bytes()))
        self.loaded = sum(map(len, ranges[False].values()))
        self.stored = sum(map(len, ranges[True].values()))

    def narrowest_arithmetic(self) -> int:
        """Bytes of the narrowest vector that fp32 is added or multiplied in; 0 if there is none."""
        return min((i.vector_bytes() for i in self.body if _ARITHMETIC.fullmatch(i.mnemonic)), default=0)

    def unwelcome(self) -> list[str]:
        """The instructions that have no place in a packed fp32 loop: scalar, gathering, fp64, calls, spills."""
        return [f"{i.mnemonic} {i.operands}".strip() for i in self.body if _is_unwelcome(i)]


def _is_unwelcome(i: Instruction) -> bool:
    spill = i.stores() and "(%rsp" in i.operands
    names = _SCALAR.fullmatch(i.mnemonic) or _FP64.fullmatch(i.mnemonic)
    return bool(spill or names or i.mnemonic.startswith("call") or "gather" in i.mnemonic or "scatter" in i.mnemonic)


def innermost_loops(function: Iterable[Instruction]) -> list[Loop]:
    """The loops that are one straight piece of code, but for branches inside it: those that hold no other loop."""
    instructions = list(function)
    first = instructions[0].address
    found: list[Loop] = []
    for end, jump in enumerate(instructions):
        target = jump.target()
        if target is None or not first <= target <= jump.address:
            continue
        body = [i for i in instructions[: end + 1] if i.address >= target]
        # Code that was moved out of line jumps back as well; what lies between was never a loop.
        if any(i.mnemonic in ("ret", "jmp") for i in body) or any(loop.body[0].address >= target for loop in found):
            continue
        found.append(Loop(body))
    return found
