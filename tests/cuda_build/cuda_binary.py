"""Reads what nvcc made of the kernels: registers, local memory, loads and stores. Text in, facts out; runs no tool."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"float": 4, "__nv_bfloat16": 2, "__half": 2, "Sqrt8": 1}
SHORT = {
    "float": "f32",
    "__nv_bfloat16": "bf16",
    "__half": "f16",
    "Sqrt8": "s8",
    "true": "1",
    "false": "0",
}


@dataclass(frozen=True)
class Rule:
    """What one pass over a row must do 16 bytes at a time. Numbers count the kernel's template arguments that are types
    of logits: a loop must load those in `loads` and store those in `stores`."""

    loads: tuple[int, ...]
    stores: tuple[int, ...] = ()


@dataclass
class Kernel:
    symbol: str
    registers: int = 0
    stack: int = 0  # bytes; registers that spill are on it
    shared: int = 0
    threads: int = 0
    local_accesses: int = 0
    loads: list[list[int]] = field(default_factory=list)  # widths in bytes, by straight stretch of a loop
    stores: list[list[int]] = field(default_factory=list)
    name: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def types(self) -> list[str]:
        return [a for a in self.arguments if a in BYTES]

    @property
    def title(self) -> str:
        shown = [SHORT.get(a, re.sub(r"^\(.*\)|^.*::", "", a)) for a in self.arguments]
        return f"{self.name}<{', '.join(shown)}>" if shown else self.name


def resources(usage: str, counted: int) -> dict[str, Kernel]:
    """Kernels by symbol, from `cuobjdump -res-usage`. counted: the bytes of a block's shared memory there that are the
    driver's."""
    found = re.findall(r"^ *Function (\S+):\n *REG:(\d+) STACK:(\d+) SHARED:(\d+) ", usage, re.MULTILINE)
    return {
        symbol: Kernel(symbol, int(registers), int(stack), max(0, int(shared) - counted))
        for symbol, registers, stack, shared in found
    }


def launch_bounds(elf: str) -> dict[str, int]:
    """Threads of a block by symbol, from `cuobjdump -elf`; kernels without __launch_bounds__ are absent."""
    bounds, symbol, awaiting = {}, None, False
    for line in elf.splitlines():
        if line.startswith("."):
            symbol = line[9:].strip() if line.startswith(".nv.info.") else None
        elif symbol and "EIATTR_MAX_THREADS" in line:
            awaiting = True
        elif awaiting and (found := re.search(r"Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", line)):
            x, y, z = (int(size, 16) for size in found.groups())
            bounds[symbol], awaiting = x * y * z, False
    return bounds


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
# LDGSTS carries a row into shared memory without a register between.
LOAD, STORE = re.compile(r"^(LDG|LDGSTS)\b"), re.compile(r"^STG\b")
ENDS_STRETCH = re.compile(r"^(BRA|BRX|JMP|EXIT|RET|CALL|BSYNC|BREAK|WARPSYNC)\b")


def memory_accesses(sass: str) -> dict[str, tuple[int, list[list[int]], list[list[int]]]]:
    """By symbol, from `cuobjdump -sass`: how many instructions touch local memory, and the widths in bytes of the
    global loads and stores of each straight stretch of code inside a loop."""
    out = {}
    for part in sass.split("Function :")[1:]:
        symbol, _, text = part.partition("\n")
        code = [(int(m[1], 16), m[2], m[3]) for m in map(INSTRUCTION.match, text.splitlines()) if m]
        local = sum(bool(re.match(r"(LDL|STL)\b", opcode)) for _, opcode, _ in code)
        stretches = list(_stretches(code))
        loads = [[_width(o) for o in stretch if LOAD.match(o)] for stretch in stretches]
        stores = [[_width(o) for o in stretch if STORE.match(o)] for stretch in stretches]
        out[symbol.strip()] = local, [w for w in loads if w], [w for w in stores if w]
    return out


def _stretches(code: list[tuple[int, str, str]]) -> Iterator[list[str]]:
    """Opcodes between one branch or branch target and the next, where they lie in a loop: between the target of a
    branch backward and that branch."""
    branches = [
        (at, int(target[1], 16))
        for at, opcode, rest in code
        if opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)\s*$", rest.strip()))
    ]
    loops = [(target, at) for at, target in branches if target < at]
    targets = {target for _, target in branches}
    stretch: list[str] = []
    for at, opcode, _ in code:
        if at in targets:
            yield stretch
            stretch = []
        if any(begin <= at <= end for begin, end in loops):
            stretch.append(opcode)
        if ENDS_STRETCH.match(opcode):
            yield stretch
            stretch = []
    yield stretch


def _width(opcode: str) -> int:
    """LDG.E.128.CONSTANT -> 16; without a width, 4."""
    parts = opcode.split(".")
    if {"U8", "S8"} & set(parts):
        return 1
    if {"U16", "S16"} & set(parts):
        return 2
    return next((int(part) // 8 for part in parts if part in ("64", "128", "256")), 4)


def demangled(symbols: list[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name and template arguments by symbol; needs binutils' c++filt, which comes with the compiler."""
    run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {symbol: _parts(text) for symbol, text in zip(symbols, run.stdout.splitlines(), strict=True)}


def _parts(signature: str) -> tuple[str, tuple[str, ...]]:
    """void vcrd::cuda::(anonymous namespace)::name<float, (vcrd::Divergence)2>(float const*) -> its name, arguments."""
    text = signature.replace("(anonymous namespace)::", "")
    name = re.search(r"(\w+)\s*(?=[<(]|$)", re.sub(r"^(\w+\s+)?(\w+::)*", "", text))[1]
    rest = text[text.index(name) + len(name) :]
    if not rest.startswith("<"):
        return name, ()
    depth, arguments, begin = 0, [], 1
    for at, character in enumerate(rest):
        if character in "<(":
            depth += 1
        if character == "," and depth == 1 or character == ">" and depth == 1:
            arguments.append(rest[begin:at].strip())
            begin = at + 1
        if character in ">)":
            depth -= 1
            if depth == 0:
                break
    return name, tuple(a if a.startswith("(") else a.rpartition("::")[2] for a in arguments)


def faults(kernel: Kernel, rule: Rule | None) -> list[str]:
    """A sentence on each thing that the kernel must not do. `rule` None: it reads no rows of logits."""
    out = []
    if kernel.stack or kernel.local_accesses:
        out.append(
            f"spills registers or has arrays in local memory: {kernel.stack} bytes of stack, "
            f"{kernel.local_accesses} accesses"
        )
    if rule is None:
        return out
    widest = max(BYTES[kernel.types[i]] for i in (*rule.loads, *rule.stores))

    def widths(numbers: tuple[int, ...]) -> list[int]:
        # Equal columns of every tensor: the wider type's are 16 bytes, a narrower type's as many columns of fewer.
        return sorted(16 * BYTES[kernel.types[i]] // widest for i in numbers)

    def held(stretches: list[list[int]], needed: list[int]) -> bool:
        return any(all(s.count(w) >= needed.count(w) for w in needed) for s in stretches)

    for what, stretches, needed in (
        ("loads", kernel.loads, widths(rule.loads)),
        ("stores", kernel.stores, widths(rule.stores)),
    ):
        if needed and not held(stretches, needed):
            wanted = " and ".join(f"{width * 8}" for width in needed)
            got = ", ".join(f"{w * 8}" for w in sorted({w for s in stretches for w in s})) or "none"
            out.append(f"has no loop with {wanted}-bit {what} side by side; the widths in its loops: {got}")
    return out


@dataclass(frozen=True)
class Chip:
    """Of one multiprocessor. Every block also takes 1 KB of shared memory that the driver keeps.

    counted: how much of it cuobjdump counts for a kernel with shared memory.
    """

    shared: int
    counted: int = 0
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


CHIPS = {"sm_80": Chip(164 << 10), "sm_90a": Chip(228 << 10, 1024), "sm_100": Chip(228 << 10, 1024)}


def occupancy(kernel: Kernel, chip: Chip, threads: int) -> float:
    """The share of a multiprocessor's threads that fit at once, with static shared memory alone."""
    warps = -(-threads // 32)
    registers_of_warp = -(-kernel.registers * 32 // 256) * 256  # handed out 256 at a time
    # Each of four schedulers has a quarter of the registers, and a warp stays with one.
    by_registers = 4 * (chip.registers // 4 // max(256, registers_of_warp)) // warps
    by_shared = chip.shared // (-(-kernel.shared // 128) * 128 + 1024)
    blocks = min(chip.blocks, chip.threads // (32 * warps), by_registers, by_shared)
    return blocks * warps * 32 / chip.threads
