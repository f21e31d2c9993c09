"""Reads the machine code (SASS) of compiled kernels: loops, pipes, load widths, and the least time a GPU needs for it.

Nothing here runs on a GPU or knows what one measures. `busy` counts the cycles that each part of a multiprocessor is
occupied, assuming that nothing ever waits; the largest of them, or DRAM, is a lower bound of a kernel's time. Rates
are in `GPUS` alone.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU. Per multiprocessor there are four schedulers, each of one warp instruction per cycle.

    From data sheets; `l1_bytes`, the pipes' cycles and `mma_macs` of sm_75 are from published microbenchmarks, by
    memory, and unverified on silicon.
    """

    name: str
    capability: int
    multiprocessors: int
    hertz: float
    dram: float  # bytes per second
    l1_bytes: int  # between L1 or shared memory and registers, per cycle and multiprocessor
    mma_macs: int  # fp16 multiply-adds of a scheduler's tensor core per cycle
    integer_multiply: int  # cycles of a warp's IMAD in the FMA pipe

    def seconds(self, cycles: float) -> float:
        """Of work that is spread evenly over all multiprocessors."""
        return cycles / self.multiprocessors / self.hertz


T4 = Gpu("T4", 75, 40, 1.59e9, 320e9, 64, 128, 2)
H100 = Gpu("H100", 90, 132, 1.755e9, 3.35e12, 128, 1024, 2)
GPUS = {75: T4, 90: H100}

_MMA = {"HMMA", "HGMMA"}
_MEMORY = {
    *("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "LD", "ST", "LDC"),
    *("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "SHFL"),
}
_FMA = {"FFMA", "FADD", "FMUL", "IMAD", "IMUL"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FLO", "POPC", "FRND", "BREV", "I2FP"}
_HALF = {"HADD2", "HFMA2", "HMUL2", "HSETP2", "HSET2", "HMNMX2"}
_CONTROL = {
    *("BRA", "BRX", "BSSY", "BSYNC", "EXIT", "BAR", "WARPSYNC", "NOP", "YIELD", "DEPBAR", "CALL", "RET", "ERRBAR"),
    *("MEMBAR", "CCTL", "LDGDEPBAR", "WARPGROUP", "SYNCS", "FENCE", "BREAK", "JMP", "ELECT", "NANOSLEEP"),
}
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*(.*?);", re.M
)


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction."""

    address: int
    predicate: str  # e.g. @!P0; empty where it always executes
    operation: str  # with its modifiers, e.g. LDG.E.128.SYS
    operands: str

    @property
    def name(self) -> str:
        """Without modifiers."""
        return self.operation.split(".")[0]

    @property
    def pipe(self) -> str:
        """Which part of a multiprocessor it occupies."""
        name = self.name
        for pipe, names in (
            ("tensor", _MMA), ("memory", _MEMORY), ("fma", _FMA), ("special", _SPECIAL), ("half", _HALF),
            ("control", _CONTROL),
        ):  # fmt: skip
            if name in names:
                return pipe
        return "uniform" if re.match(r"U[A-Z]|R2UR|S2UR|VOTEU", name) and name != "UMOV" else "integer"

    @property
    def bytes(self) -> int:
        """Per thread, of a load or store."""
        for modifier, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if modifier in self.operation:
                return size
        return 4

    @property
    def macs(self) -> int:
        """Multiply-adds of one warp."""
        if self.name == "HGMMA":
            m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", self.operation)[0])
            return m * n * k // 4  # four warps share it
        if self.name == "HMMA":
            return 1024 if "1688" in self.operation else 2048
        return 0


@dataclass(frozen=True)
class Code:
    """A kernel's machine code and what it takes."""

    text: str
    instructions: list[Instruction]
    registers: int
    stack: int  # bytes per thread: spills


def disassemble(compiled: Any) -> Code:
    """The machine code of Triton's compiled kernel, by the cuobjdump of its wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        text = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource line: {usage.stdout}{usage.stderr}")
    return Code(text, parse(text), int(found[1]), int(found[2]))


def parse(text: str) -> list[Instruction]:
    """The instructions of a listing, without the padding behind the last one (a branch to itself, then NOPs)."""
    found = [
        Instruction(int(address, 16), predicate.strip(), operation, operands)
        for address, predicate, operation, operands in _INSTRUCTION.findall(text)
    ]
    for index, each in enumerate(found):
        if each.name == "BRA" and re.search(rf"0x{each.address:x}\b", each.operands):
            return found[:index]
    return found


def successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """What can execute after each instruction, as indices."""
    index = {each.address: i for i, each in enumerate(instructions)}
    following = []
    for i, each in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", each.operands) if each.name in ("BRA", "BRX") else None
        # BRA.U and BRA.DIV have their condition among the operands or in the warp
        always = not each.predicate and each.operation in ("BRA", "EXIT", "RET", "RET.REL.NODEC", "BRA.RELY")
        after = [] if always or i + 1 == len(instructions) else [i + 1]
        if target and int(target[1], 16) in index:
            after.append(index[int(target[1], 16)])
        following.append(after)
    return following


def loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops, by what can reach their backward branch: a compiler may lay other code between."""
    following = successors(instructions)
    preceding: list[list[int]] = [[] for _ in instructions]
    for i, after in enumerate(following):
        for j in after:
            preceding[j].append(i)
    bodies: dict[int, set[int]] = {}
    # behind the last exit lies what only a warp that has diverged runs, and returns from
    last = max((i for i, each in enumerate(instructions) if each.name == "EXIT"), default=len(instructions))
    for i, after in enumerate(following):
        for head in after:
            if head > i or i > last:
                continue
            body, reached = {head}, [i]
            while reached:
                at = reached.pop()
                if at not in body:
                    body.add(at)
                    reached += preceding[at]
            if head == 0 or 0 not in body:  # else a way leads past the head: code laid out backwards, not a loop
                bodies[head] = bodies.get(head, set()) | body
    return [[instructions[i] for i in sorted(body)] for body in bodies.values()]


def ending(instructions: Sequence[Instruction]) -> list[Instruction]:
    """What can only follow the atomic that counts finished programs: what the last one alone runs, but for a few."""
    following = successors(instructions)
    preceding: list[list[int]] = [[] for _ in instructions]
    for i, after in enumerate(following):
        for j in after:
            preceding[j].append(i)
    counts = [i for i, each in enumerate(instructions) if each.name.startswith("ATOM")]
    after, before = _reached(counts, following), _reached(counts, preceding)
    return [instructions[i] for i in sorted(after - before - set(counts))]


def _reached(start: Iterable[int], edges: Sequence[Sequence[int]]) -> set[int]:
    reached: set[int] = set()
    todo = [j for i in start for j in edges[i]]
    while todo:
        at = todo.pop()
        if at not in reached:
            reached.add(at)
            todo += edges[at]
    return reached


def hot_loop(instructions: Sequence[Instruction], without: Iterable[Instruction] = ()) -> list[Instruction]:
    """The innermost loop with tensor-core instructions, or where there are none, with the most loads; else nothing.

    Loops that lie in `without` do not count.
    """
    left_out = set(without)
    bodies = [body for body in loops(instructions) if not set(body) <= left_out]
    multiplying = [body for body in bodies if macs(body) > 0]
    innermost = [body for body in multiplying if not any(set(other) < set(body) for other in multiplying)]
    if innermost:
        return max(innermost, key=macs)
    loading = [body for body in bodies if loaded(body) > 0]
    return max(loading, key=loaded, default=[])


def macs(instructions: Iterable[Instruction]) -> int:
    """Multiply-adds of one warp on the tensor cores."""
    return sum(each.macs for each in instructions)


def loaded(instructions: Iterable[Instruction]) -> int:
    """Bytes that one warp loads from global memory."""
    return sum(32 * each.bytes for each in instructions if each.name in ("LDG", "LDGSTS"))


def widths(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Loads from global memory by their width in bits."""
    loads = (each for each in instructions if each.name in ("LDG", "LDGSTS"))
    return dict(sorted(Counter(f"{each.name}.{8 * each.bytes}" for each in loads).items()))


def busy(instructions: Sequence[Instruction], gpu: Gpu) -> Counter[str]:
    """Cycles of a multiprocessor that one warp occupies each of its parts; four warps share it, but for memory."""
    cycles: Counter[str] = Counter(issue=len(instructions))
    for each in instructions:
        pipe = each.pipe
        if pipe == "tensor":
            cycles[pipe] += each.macs / gpu.mma_macs
        elif pipe == "fma":
            slow = gpu.capability < 80 or each.name in ("IMAD", "IMUL")
            cycles[pipe] += gpu.integer_multiply if slow else 1
        elif pipe in ("integer", "half"):
            cycles[pipe] += 2
        elif pipe == "special":
            cycles[pipe] += 8
        elif pipe == "memory":
            cycles[pipe] += 4 * _path_bytes(each) / gpu.l1_bytes
    return Counter({part: value / 4 for part, value in cycles.items()})


def _path_bytes(each: Instruction) -> int:
    """Bytes on the path between L1 and registers, with perfect coalescing and no bank conflicts."""
    if each.name in ("LDSM", "STSM"):
        return 512 if ".4" in each.operation else 256 if ".2" in each.operation else 128
    if each.name == "LDC":
        return 0
    return max(128, 32 * each.bytes)
