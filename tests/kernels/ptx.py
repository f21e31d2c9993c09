"""An emulator of sm_75 PTX in NumPy: runs what Triton compiles for a kernel, without a GPU.

    with emulated():  # a process without TRITON_INTERPRET
        y, pooled = gated_residual_fwd(shortcut, branch, gate, True, True)  # CPU tensors

or, for one launch that `budget.recorded` kept, `emulate(launch)`.

The threads of a block run in lock step, the blocks one after another. An instruction or a modifier that is not known
raises NotImplementedError with its text. What would fault on a GPU raises EmulatorError: an access outside the
arguments' memory, a misaligned one, divergent branches. So does what lock step would hide: a value that another warp
stored and that is read before a block barrier, or announced by a release without one. Memory and registers that were
never written read as NaN.

Not modelled: time, caches, order between blocks beyond the given one. The approximate functions are exact to fp32, an
MMA is summed in fp64 and rounded once, and denormals are kept, so hardware agrees up to rounding.
"""

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fastgate import kernels
from tests.kernels.budget import Launch, compile_launch, intercepted

Array = np.ndarray
Index = tuple[int, int, int]

WARP = 32
_DTYPES = {
    **{f"{kind}{bits}": f"u{bits // 8}" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"f{bits}": f"f{bits // 8}" for bits in (16, 32, 64)},
    "f16x2": "f2",  # [threads, 2]
    "pred": "?",
}


class EmulatorError(RuntimeError):
    """The program did what a GPU would fault on, or what depends on the order of warps."""


def emulate(
    launch: Launch,
    *,
    capability: int = 75,
    tensors: Mapping[str, Any] | None = None,
    order: Callable[[list[Index]], Iterable[Index]] = iter,
    edit: Callable[[str], str] = str,
) -> Any:
    """Compile a recorded launch and run its whole grid; the CPU tensors among its arguments are changed in place.

    `tensors` (torch or NumPy) take the place of the pointer arguments of these names, as for a launch on meta tensors.
    `order` arranges the program ids, e.g. `reversed`. `edit` changes the PTX first, for tests that must fail. Returns
    Triton's compiled kernel.
    """
    arguments = launch.arguments | {name: torch.as_tensor(value) for name, value in (tensors or {}).items()}
    launch = replace(launch, arguments=arguments)
    compiled = compile_launch(launch, capability)
    memory = Memory()
    values: list[int | float] = []

    def append(value: Any) -> None:
        if isinstance(value, tuple):  # a NamedTuple's fields are arguments of their own
            for field in value:
                append(field)
        elif value is not None:
            values.append(memory.address(value) if isinstance(value, torch.Tensor) else value)

    for parameter in launch.kernel.params:
        if not parameter.is_constexpr:
            append(arguments[parameter.name])
    program = Program(edit(compiled.asm["ptx"]), compiled.metadata.num_warps, compiled.metadata.shared)
    program.run(launch.grid, memory, values, order)
    memory.copy_back()
    return compiled


@contextmanager
def emulated(
    launches: list[Launch] | None = None,
    *,
    arch: int = 75,
    order: Callable[[list[Index]], Iterable[Index]] = iter,
    edit: Callable[[str], str] = str,
) -> Iterator[None]:
    """Triton's launches run in the emulator, and are appended to `launches`.

    Launchers take CPU tensors and believe to be on a GPU of this architecture; so do the operations of
    `fastgate.functional` with impl="triton". See `emulate` for the rest.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("interpreted kernels have no PTX: run in a process without TRITON_INTERPRET")
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")  # later they would be for the interpreter

    def run(launch: Launch) -> None:
        emulate(launch, capability=arch, order=order, edit=edit)
        if launches is not None:
            launches.append(launch)

    # the operations take CPU tensors for the interpreter only
    with patch.dict(os.environ, TRITON_INTERPRET="1"), intercepted(run, arch=arch):
        yield


class Memory:
    """Global memory: the storages of the tensors, apart from each other so that no access reaches the wrong one."""

    _GAP = 256

    def __init__(self) -> None:
        self.bytes = np.full(self._GAP, 0xFF, np.uint8)
        self.valid = np.zeros(self._GAP, bool)
        self._storages: dict[int, tuple[int, Array]] = {}

    def address(self, tensor: torch.Tensor) -> int:
        """Where the tensor's first element is; copies its storage in when it is seen first."""
        if tensor.device.type != "cpu":
            raise ValueError(f"expected CPU tensors, got one on {tensor.device}")
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._storages[key] = (len(self.bytes), data)
            gap = self._GAP + -len(data) % self._GAP
            self.bytes = np.concatenate([self.bytes, data, np.full(gap, 0xFF, np.uint8)])
            self.valid = np.concatenate([self.valid, np.ones(len(data), bool), np.zeros(gap, bool)])
        return self._storages[key][0] + tensor.storage_offset() * tensor.element_size()

    def copy_back(self) -> None:
        """Put the results into the tensors."""
        for start, data in self._storages.values():
            data[:] = self.bytes[start : start + len(data)]


class Accesses:
    """Who stored and read each byte of a memory since the block's last barrier; warps are the units."""

    _MANY = 63

    def __init__(self, size: int) -> None:
        self._writer = np.zeros(size, np.int64)
        self._reader = np.zeros(size, np.int64)
        self._era = 0
        self.writers: set[int] = set()
        self.barrier()

    def barrier(self) -> None:
        self._era += 64  # marks of earlier eras are smaller, so nothing need be cleared
        self.writers.clear()

    def _foreign(self, marks: Array, warps: Array) -> Array:
        """Which marks another warp left since the barrier."""
        return (marks >= self._era) & (marks != self._era + warps[:, None])

    def stored(self, index: Array, warps: Array) -> None:
        self._writer[index] = self._era + warps[:, None]
        self.writers.update(np.unique(warps).tolist())

    def read(self, index: Array, warps: Array) -> None:
        """Raise if another warp stored one of these bytes."""
        if self.writers and self._foreign(self._writer[index], warps).any():
            raise EmulatorError("no barrier between another warp's store and this read")

    def read_and_remember(self, index: Array, warps: Array) -> None:
        self.read(index, warps)
        several = self._foreign(self._reader[index], warps)
        self._reader[index] = marks = np.broadcast_to(self._era + warps[:, None], index.shape)
        several |= self._reader[index] != marks  # by another warp in this very instruction
        self._reader[index[several]] = self._era + self._MANY

    def overwritten(self, index: Array, warps: Array, changed: Array) -> None:
        """Raise if another warp read one of these bytes, or stored one that now changes."""
        if self._foreign(self._reader[index], warps).any():
            raise EmulatorError("no barrier between another warp's read and this store")
        if self.writers and (changed & self._foreign(self._writer[index], warps)).any():
            raise EmulatorError("no barrier between another warp's store and this one of another value")


class Block:
    """One block's state: registers, shared memory, what its warps touched since the last barrier."""

    def __init__(self, program: "Program", memory: Memory, global_accesses: Accesses, index: Index, grid: Index):
        self.threads = program.threads
        self.arguments: dict[str, int] = {}
        self.registers: dict[str, Array] = {}
        self.memory = memory
        self.shared = np.full(program.shared_bytes, 0xFF, np.uint8)
        self.shared_accesses = Accesses(program.shared_bytes)
        self.global_accesses = global_accesses
        lanes = np.arange(self.threads, dtype=np.uint32)
        self.warps = (lanes // WARP).astype(np.int64)
        constants = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1}
        constants |= {f"%ctaid.{axis}": value for axis, value in zip("xyz", index, strict=True)}
        constants |= {f"%nctaid.{axis}": value for axis, value in zip("xyz", grid, strict=True)}
        self.registers |= {"%tid.x": lanes, "%laneid": lanes % np.uint32(WARP), "%warpid": lanes // np.uint32(WARP)}
        self.registers |= {name: np.full(self.threads, value, np.uint32) for name, value in constants.items()}

    def active(self, mask: Array | None) -> Array | slice:
        return slice(None) if mask is None else mask

    def barrier(self) -> None:
        self.shared_accesses.barrier()
        self.global_accesses.barrier()


Step = Callable[[Block, Array | None], None]
Read = Callable[[Block], Array]
Write = Callable[[Block, Array, Array | None], None]


class Program:
    """A kernel's PTX, decoded once."""

    max_steps = 10_000_000  # instructions of one block

    def __init__(self, ptx: str, num_warps: int, shared_bytes: int):
        self.threads = num_warps * WARP
        self.shared_bytes = max(shared_bytes, 16)
        self.parameters: list[str] = []
        self._widths: dict[str, str] = {}
        self._labels: dict[str, int] = {}
        self._steps: list[tuple[Read | None, bool, str, Any]] = []  # predicate, negated, text, what to do
        self._decode(ptx)

    def _decode(self, ptx: str) -> None:
        head, _, rest = ptx.partition("\n{\n")
        body, _, tail = rest.partition("\n}")
        if not body or ".func" in head + tail:
            raise NotImplementedError("PTX that is not one kernel without functions")
        self.parameters = re.findall(r"^\s*\.param .*?(\w+_param_\d+)", head, re.M)
        text = re.sub(r"//[^\n]*", "", body)
        for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%?[A-Za-z_]+)", text):
            self._widths[prefix] = kind
        # braces on their own, or before .reg, enclose inline assembly
        text = re.sub(r"^\s*[{}]\s*$|^\s*\{(?=\s*\.reg)|;\s*\}\s*$", ";", text, flags=re.M)
        text = re.sub(r"(\$\w+):", r"\1:;", re.sub(r"^\s*\.(?:loc|pragma|file)\b[^\n]*$", "", text, flags=re.M))
        for statement in filter(None, (" ".join(part.split()) for part in text.split(";"))):
            if statement.endswith(":"):
                self._labels[statement[:-1]] = len(self._steps)
            elif not statement.startswith(".reg"):
                self._steps.append(self._decode_statement(statement))

    def _decode_statement(self, statement: str) -> tuple[Read | None, bool, str, Any]:
        found = re.fullmatch(r"(?:@(!?)(%\w+) )?([\w.:]+) ?(.*)", statement)
        if found is None:
            raise NotImplementedError(statement)
        negated, predicate, opcode, rest = found.groups()
        name, *modifiers = re.sub(r"::", "_", opcode).split(".")
        # commas inside {} and [] do not separate operands
        operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
        if name in ("bra", "ret", "exit"):
            action: Any = operands[0] if name == "bra" else None
        else:
            instruction = _INSTRUCTIONS.get(name)
            kinds = [modifier for modifier in modifiers if modifier in _DTYPES]
            unknown = set(modifiers) - set(kinds) - (instruction.modifiers if instruction else set())
            if instruction is None or unknown:
                raise NotImplementedError(f"PTX instruction not known to the emulator: {statement}")
            try:
                action = instruction.decode(self, modifiers, kinds, operands)
            except (NotImplementedError, ValueError, IndexError, KeyError) as error:
                raise NotImplementedError(f"{statement}: {error}") from error
        return self.read(predicate, "pred") if predicate else None, bool(negated), statement, action

    def run(
        self,
        grid: Sequence[int],
        memory: Memory,
        values: Sequence[int | float],
        order: Callable[[list[Index]], Iterable[Index]] = iter,
    ) -> None:
        """Run every block. `values`: addresses, integers, fp32 scalars; Triton's scratch pointers after them are 0."""
        x, y, z = (*grid, 1, 1)[:3]
        bits = [int(np.float32(v).view(np.uint32)) if isinstance(v, float) else int(v) for v in values]
        if len(bits) > len(self.parameters):
            raise ValueError(f"the kernel takes {len(self.parameters)} arguments, got {len(bits)}")
        bits += [0] * (len(self.parameters) - len(bits))
        accesses = Accesses(len(memory.bytes))
        for index in order([(i, j, k) for k in range(z) for j in range(y) for i in range(x)]):
            accesses.barrier()
            block = Block(self, memory, accesses, index, (x, y, z))
            block.arguments = dict(zip(self.parameters, bits, strict=True))
            with np.errstate(all="ignore"):
                self._run_block(block)

    def _run_block(self, block: Block) -> None:
        at = 0
        for _ in range(self.max_steps):
            if at == len(self._steps):
                return
            predicate, negated, text, action = self._steps[at]
            at += 1
            mask = None
            if predicate:
                mask = predicate(block) ^ negated
                if not mask.any():
                    continue
                if mask.all():
                    mask = None
            if callable(action):
                try:
                    action(block, mask)
                except (EmulatorError, NotImplementedError) as error:
                    raise type(error)(f"{error}, in: {text}") from None
            elif mask is not None:
                raise EmulatorError(f"divergent control flow: {text}")
            elif action is None:
                return
            else:
                at = self._labels[action]
        raise EmulatorError(f"more than {self.max_steps} instructions: an endless loop?")

    def width(self, name: str) -> str:
        """The declared type of a register."""
        found = re.match(r"%?[A-Za-z_]+", name)
        return self._widths[name if name in self._widths else found[0] if found else name]

    def read(self, operand: str, kind: str) -> Read:
        """A function that gives the operand's value on every thread in the NumPy type of a PTX type."""
        if operand.startswith("%"):
            return self._read_register(operand, kind)
        if operand == "global_smem":
            value = 0
        elif operand[:2] in ("0f", "0F", "0d", "0D"):  # an IEEE bit pattern
            value = int(operand[2:], 16)
        else:
            value = int(operand.removesuffix("U"), 0)
        raw = np.full(self.threads, value & 0xFFFFFFFFFFFFFFFF, np.uint64)
        constant = raw.astype(bool) if kind == "pred" else _view(raw, kind)
        return lambda block: constant

    def _read_register(self, operand: str, kind: str) -> Read:
        if operand.startswith(("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid")):
            return lambda block: _view(block.registers[operand], kind)
        declared = self.width(operand)
        poison = self._poison(declared)
        if kind == "pred":
            return lambda block: block.registers.get(operand, poison)
        return lambda block: _view(block.registers.get(operand, poison), kind)

    def write(self, operand: str) -> Write:
        """A function that stores a value into a register on the threads of a mask."""
        if operand == "_":
            return lambda block, value, mask: None
        declared = self.width(operand)
        bits, poison = _unsigned(declared), self._poison(declared)

        def store(block: Block, value: Array, mask: Array | None) -> None:
            if value.ndim == 2:
                value = np.ascontiguousarray(value).view(np.uint32).reshape(-1)
            if value.dtype.itemsize != bits.itemsize:  # a wider register: sign- or zero-extended
                if value.dtype.kind == "f":
                    value = value.view(f"u{value.dtype.itemsize}")
                value = value.astype(f"{value.dtype.kind}{bits.itemsize}")
            value = value.view(bits)
            if mask is not None:
                value = np.where(mask, value, block.registers.get(operand, poison))
            block.registers[operand] = value

        return store

    def _poison(self, kind: str) -> Array:
        """A register that was never written, or under a false predicate only: all ones."""
        return np.full(self.threads, -1, f"i{_unsigned(kind).itemsize}").view(_unsigned(kind))

    def address(self, operand: str) -> Read:
        """Byte addresses [threads] of `[%rd1+16]`."""
        base, _, offset = operand.strip("[] ").partition("+")
        base = base.strip()
        kind = "u64" if base.startswith("%") and self.width(base) in ("b64", "u64", "s64") else "u32"
        read, shift = self.read(base, kind), int(offset or "0", 0)
        return lambda block: read(block).astype(np.int64) + shift


def _unsigned(kind: str) -> np.dtype:
    return np.dtype(bool) if kind == "pred" else np.dtype(f"u{np.dtype(_DTYPES[kind]).itemsize}")


def _view(bits: Array, kind: str) -> Array:
    """Register contents as a PTX type; of a wider register the low bits."""
    dtype = np.dtype(_DTYPES[kind])
    size = 4 if kind == "f16x2" else dtype.itemsize
    if bits.dtype.itemsize != size:
        bits = bits.astype(f"u{size}")
    return bits.view(dtype).reshape(-1, 2) if kind == "f16x2" else bits.view(dtype)


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _bytes(memory: Array, valid: Array | None, address: Array, size: int) -> Array:
    """Byte indices [lanes, size] of aligned accesses, after the checks that hardware would make."""
    if (address % size).any():
        raise EmulatorError(f"misaligned address {address[address % size != 0][0]}")
    if (address < 0).any() or (address + size > len(memory)).any():
        raise EmulatorError(f"out of bounds: {address.min()} to {address.max() + size} of {len(memory)}")
    index = address[:, None] + np.arange(size)
    if valid is not None and not valid[index].all():
        raise EmulatorError(f"address {address[~valid[index].all(axis=1)][0]} is outside every tensor")
    return index


@dataclass(frozen=True)
class Instruction:
    """How to decode an opcode, and the modifiers (besides types) that it is known with."""

    decode: Callable[[Program, list[str], list[str], list[str]], Step]
    known: str = ""

    @property
    def modifiers(self) -> set[str]:
        return set(self.known.split())


def _nothing(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    return lambda block, mask: None


def _barrier(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    """A block barrier; that of a warp has nothing to do in lock step."""
    whole = "warp" not in modifiers
    if whole and operands != ["0"]:
        raise NotImplementedError("barriers other than number 0 of all threads")

    def run(block: Block, mask: Array | None) -> None:
        if mask is not None:
            raise EmulatorError("barrier that not all threads reach")
        if whole:
            block.barrier()

    return run


def _mov(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    target, source = operands
    kind = kinds[0]
    if kind == "pred" or not (target + source).count("{"):
        read, write = program.read(source, kind), program.write(target)
        return lambda block, mask: write(block, read(block), mask)
    total = np.dtype(_DTYPES[kind]).itemsize
    if target.startswith("{"):
        writes = [program.write(part) for part in _vector(target)]
        read = program.read(source, f"u{8 * total}")

        def unpack(block: Block, mask: Array | None) -> None:
            parts = np.ascontiguousarray(read(block)).view(f"u{total // len(writes)}").reshape(-1, len(writes))
            for i, write in enumerate(writes):
                write(block, parts[:, i].copy(), mask)

        return unpack
    parts = _vector(source)
    reads = [program.read(part, f"u{8 * total // len(parts)}") for part in parts]
    write = program.write(target)

    def pack(block: Block, mask: Array | None) -> None:
        write(block, np.stack([read(block) for read in reads], axis=1).view(f"u{total}").reshape(-1), mask)

    return pack


def _ld(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    kind = kinds[-1]
    if "param" in modifiers:
        name, target = operands[1].strip("[] "), program.write(operands[0])

        def parameter(block: Block, mask: Array | None) -> None:
            raw = np.full(block.threads, block.arguments[name] & 0xFFFFFFFFFFFFFFFF, np.uint64)
            target(block, _view(raw, kind), mask)

        return parameter
    registers, address = [program.write(register) for register in _vector(operands[0])], program.address(operands[1])
    element, local = np.dtype(_DTYPES[kind]), _is_shared(modifiers)
    size = element.itemsize * len(registers)

    def load(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        memory, valid = (block.shared, None) if local else (block.memory.bytes, block.memory.valid)
        index = _bytes(memory, valid, address(block)[lanes], size)
        if local:
            block.shared_accesses.read_and_remember(index, block.warps[lanes])
        else:
            block.global_accesses.read(index, block.warps[lanes])
        data = memory[index].view(element)
        for i, write in enumerate(registers):
            value = np.zeros(block.threads, element)
            value[lanes] = data[:, i]
            write(block, value, mask)

    return load


def _is_shared(modifiers: list[str]) -> bool:
    if {"shared", "shared_cta"} & set(modifiers):
        return True
    if "global" in modifiers:
        return False
    raise NotImplementedError("generic, local or constant addresses")


def _st(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    unsigned = f"u{8 * np.dtype(_DTYPES[kinds[-1]]).itemsize}"
    reads, address = [program.read(part, unsigned) for part in _vector(operands[1])], program.address(operands[0])
    size, local = np.dtype(_DTYPES[unsigned]).itemsize * len(reads), _is_shared(modifiers)

    def store(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        warps = block.warps[lanes]
        memory, valid = (block.shared, None) if local else (block.memory.bytes, block.memory.valid)
        index = _bytes(memory, valid, address(block)[lanes], size)
        accesses = block.shared_accesses if local else block.global_accesses
        data = np.stack([read(block)[lanes] for read in reads], axis=1).view(np.uint8)
        for warp in np.unique(warps):
            part = warps == warp
            places = index[part]
            before = memory[places]
            # of lanes that store to one address the last wins: copies of a sum may be rounded differently
            memory[places] = data[part]
            accesses.overwritten(places, warps[part], memory[places] != before)
            accesses.stored(places, warps[part])

    return store


def _ldmatrix(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    registers, address = [program.write(part) for part in _vector(operands[0])], program.address(operands[1])
    if not _is_shared(modifiers) or f"x{len(registers)}" not in modifiers or "m8n8" not in modifiers:
        raise NotImplementedError("ldmatrix of another shape")
    transposed = "trans" in modifiers

    def load(block: Block, mask: Array | None) -> None:
        _converged(mask)
        rows = address(block).reshape(-1, WARP)
        for i, write in enumerate(registers):  # lanes 8i to 8i+7 hold the addresses of matrix i's rows
            index = _bytes(block.shared, None, rows[:, 8 * i : 8 * i + 8].reshape(-1), 16)
            block.shared_accesses.read_and_remember(index, np.repeat(np.arange(len(rows)), 8))
            matrix = block.shared[index].view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            write(block, matrix.view(np.uint32).reshape(-1), None)  # a lane: two neighbours of a row

    return load


def _converged(mask: Array | None) -> None:
    if mask is not None:
        raise EmulatorError("a warp-wide instruction that not all threads reach")


def _mma(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    if "m16n8k8" not in modifiers or kinds != ["f32", "f16", "f16", "f32"]:
        raise NotImplementedError("tensor cores of sm_75 for fp16: m16n8k8, f32.f16.f16.f32 only")
    targets = [program.write(part) for part in _vector(operands[0])]
    a, b = ([program.read(part, "f16x2") for part in _vector(operand)] for operand in operands[1:3])
    c = [program.read(part, "f32") for part in _vector(operands[3])]
    if (len(targets), len(a), len(b), len(c)) != (4, 2, 1, 4):
        raise NotImplementedError("operands of m16n8k8")

    def run(block: Block, mask: Array | None) -> None:
        _converged(mask)
        # lane = 4 * group + pair holds [group, 2 pair] and [group, 2 pair + 1] of each 8 x 8 (accumulators: 8 x 8) part
        left = np.concatenate([read(block).reshape(-1, 8, 8) for read in a], axis=1).astype(np.float64)
        right = b[0](block).reshape(-1, 8, 8).transpose(0, 2, 1).astype(np.float64)  # lanes hold columns of B
        halves = [np.stack([c[i](block), c[i + 1](block)], axis=1).reshape(-1, 8, 8) for i in (0, 2)]
        result = (left @ right + np.concatenate(halves, axis=1)).astype(np.float32)
        for i, write in enumerate(targets):
            write(block, result[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2].reshape(-1), None)

    return run


def _shfl(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    target, _, in_range = operands[0].partition("|")
    write = program.write(target)
    write_range = program.write(in_range) if in_range else None
    read, read_b, read_c = (program.read(operand, "u32") for operand in operands[1:4])
    mode = next(modifier for modifier in modifiers if modifier in ("up", "down", "bfly", "idx"))

    def run(block: Block, mask: Array | None) -> None:
        _converged(mask)
        value, b, c = read(block), read_b(block).astype(np.int64), read_c(block).astype(np.int64)
        lane = np.arange(block.threads) % WARP
        segment, clamp = (c >> 8) & 31, c & 31
        limit = (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": (lane & segment) | (b & ~segment & 31),
        }[mode]
        valid = source >= limit if mode == "up" else source <= limit
        write(block, value[np.where(valid, source, lane) + block.warps * WARP], None)
        if write_range:
            write_range(block, valid, None)

    return run


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
}


def _atomic(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    """`atom` returns the old value, `red` does not; lanes follow each other in order."""
    returns = len(operands) == 3
    address, read = program.address(operands[-2]), program.read(operands[-1], kinds[-1])
    write = program.write(operands[0]) if returns else None
    function = next(function for name, function in _ATOMICS.items() if name in modifiers)
    dtype, releases, local = (
        np.dtype(_DTYPES[kinds[-1]]),
        {"release", "acq_rel"} & set(modifiers),
        _is_shared(modifiers),
    )

    def run(block: Block, mask: Array | None) -> None:
        lanes = block.active(mask)
        warps = block.warps[lanes]
        if releases and block.global_accesses.writers - set(warps.tolist()):
            raise EmulatorError("no barrier between another warp's store and this release")
        memory, valid = (block.shared, None) if local else (block.memory.bytes, block.memory.valid)
        places = _bytes(memory, valid, address(block)[lanes], dtype.itemsize)
        old = np.zeros(block.threads, dtype)
        before = []
        for place, operand in zip(places, read(block)[lanes], strict=True):
            current = memory[place].view(dtype)[0]
            before.append(current)
            memory[place] = np.array([function(current, operand)], dtype).view(np.uint8)
        if local:
            block.shared_accesses.stored(places, warps)
        if write:
            old[lanes] = before
            write(block, old, mask)

    return run


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    to, source = kinds
    write = program.write(operands[0])
    reads = [program.read(operand, source) for operand in operands[1:]]
    if to == "f16x2":  # the first source is the upper half
        high, low = reads
        return lambda block, mask: write(block, np.stack([low(block), high(block)], axis=1).astype(np.float16), mask)
    read, dtype = reads[0], np.dtype(_DTYPES[to])
    rounds = [function for name, function in _ROUND.items() if name in modifiers]
    if source[0] == "f" and to[0] in "us" and not rounds:
        raise NotImplementedError("conversion to integer without a rounding")

    def run(block: Block, mask: Array | None) -> None:
        value = read(block)
        for function in rounds:
            value = function(value)
        if value.dtype.kind == "f" and dtype.kind in "iu":  # saturates; NaN gives 0
            info = np.iinfo(dtype)
            value = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=info.max, neginf=info.min)
            low, high = value <= info.min, value >= info.max
            value = np.where(low | high, 0, value).astype(dtype)
            value = np.where(low, info.min, np.where(high, info.max, value))
        write(block, value.astype(dtype), mask)

    return run


_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}
_COMPARE |= {"ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _setp(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    name, kind = modifiers[0], kinds[0]
    first, second = (program.read(operand, kind) for operand in operands[1:3])
    targets = [program.write(target) for target in operands[0].split("|")]
    combine = next((_BOOLEAN[modifier] for modifier in modifiers[1:] if modifier in _BOOLEAN), None)
    if (combine is None) != (len(operands) == 3) or len(targets) != 1 + (kind == "f16x2"):
        raise NotImplementedError("form of setp")
    third = program.read(operands[3].removeprefix("!"), "pred") if combine else None
    unordered = kind[0] == "f" and len(name) == 3 and name.endswith("u")  # true where one is NaN
    compare = None if name in ("num", "nan") else _COMPARE[name[:2] if unordered else name]

    def run(block: Block, mask: Array | None) -> None:
        left, right = first(block), second(block)
        nan = np.isnan(left) | np.isnan(right) if kind[0] == "f" else np.zeros(left.shape, bool)
        if compare is None:
            result = nan if name == "nan" else ~nan
        else:
            result = compare(left, right)
            result = result | nan if unordered else result & ~nan
        if combine and third:
            other = third(block)
            result = combine(result, ~other if operands[3].startswith("!") else other)
        for i, write in enumerate(targets):  # a target for each half of f16x2
            write(block, result[:, i].copy() if result.ndim == 2 else result, mask)

    return run


def _selp(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    yes, no = (program.read(operand, kinds[0]) for operand in operands[1:3])
    choose, write = program.read(operands[3], "pred"), program.write(operands[0])
    return lambda block, mask: write(block, np.where(choose(block), yes(block), no(block)), mask)


def _elementwise(function: Callable[..., Array]) -> Callable[..., Step]:
    def decode(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
        write, reads = program.write(operands[0]), [program.read(operand, kinds[0]) for operand in operands[1:]]
        return lambda block, mask: write(block, function(*(read(block) for read in reads)), mask)

    return decode


def _rounded_once(function: Callable[..., Array]) -> Callable[..., Step]:
    """Computed in fp64 and rounded to the type at the end."""

    def rounded(*values: Array) -> Array:
        return function(*(value.astype(np.float64) for value in values)).astype(values[0].dtype)

    return _elementwise(rounded)


def _extreme(ignores_nan: Callable[..., Array], keeps_nan: Callable[..., Array]) -> Callable[..., Step]:
    def decode(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
        function = keeps_nan if "NaN" in modifiers or kinds[0][0] != "f" else ignores_nan
        return _elementwise(function)(program, modifiers, kinds, operands)

    return decode


def _multiply(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    """`mul` and integer `mad`: low, high or wide."""
    kind = kinds[0]
    bits = 8 * np.dtype(_DTYPES[kind]).itemsize
    wide = f"{kind[0]}{2 * bits}" if "wide" in modifiers else kind
    first, second = (program.read(operand, kind) for operand in operands[1:3])
    third = program.read(operands[3], wide) if len(operands) == 4 else None
    write = program.write(operands[0])

    def run(block: Block, mask: Array | None) -> None:
        left, right = first(block), second(block)
        if "wide" in modifiers:
            value = left.astype(_DTYPES[wide]) * right.astype(_DTYPES[wide])
        elif "hi" in modifiers:
            # Python integers: exact for 64 bits too
            value = ((left.astype(object) * right.astype(object)) >> bits).astype(left.dtype)
        else:
            value = left * right
        write(block, value if third is None else value + third(block), mask)

    return run


def _quotient(left: Array, right: Array) -> Array:
    if left.dtype.kind == "f":
        return left / right
    return (left - _remainder(left, right)) // np.where(right == 0, 1, right).astype(left.dtype)


def _remainder(left: Array, right: Array) -> Array:
    return np.fmod(left, np.where(right == 0, 1, right).astype(left.dtype))  # sign of the dividend, as in PTX


def _shift(left: bool) -> Callable[..., Step]:
    def decode(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
        value, amount = program.read(operands[1], kinds[0]), program.read(operands[2], "u32")
        write = program.write(operands[0])
        bits = 8 * np.dtype(_DTYPES[kinds[0]]).itemsize

        def run(block: Block, mask: Array | None) -> None:
            number, by = value(block), amount(block)
            small = np.minimum(by, bits - 1).astype(number.dtype)
            result = number << small if left else number >> small
            if left or number.dtype.kind == "u":  # an arithmetic shift by more keeps the sign
                result = np.where(by >= bits, 0, result).astype(number.dtype)
            write(block, result, mask)

        return run

    return decode


def _bit_field_extract(value: Array, start: Array, length: Array) -> Array:
    signed = value.dtype.kind == "i"
    start, length = (np.asarray(part).astype(np.int64) & 255 for part in (start, length))
    field = (value.astype(np.int64) & 0xFFFFFFFF) >> np.minimum(start, 63) & ((1 << np.minimum(length, 32)) - 1)
    if signed:
        # the sign is the field's last bit, or bit 31 where the field reaches beyond
        last = np.clip(np.minimum(start + length - 1, 31), 0, 31)
        sign = (value.astype(np.int64) >> last & 1) * (length > 0)
        used = np.clip(np.minimum(length, 32 - start), 0, 32)
        field = field | (-(sign << used))
    return field.astype(value.dtype)


def _bit_field_insert(source: Array, base: Array, start: Array, length: Array) -> Array:
    start, length = (part.astype(np.int64) & 255 for part in (start, length))
    field = ((1 << np.minimum(length, 32)) - 1) << np.minimum(start, 32)
    return (base & ~field | source.astype(np.int64) << np.minimum(start, 32) & field).astype(base.dtype)


def _permute_bytes(first: Array, second: Array, selector: Array) -> Array:
    pool = np.stack([first, second], axis=1).view(np.uint8)  # eight bytes per thread
    result = np.zeros((len(first), 4), np.uint8)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = pool[np.arange(len(first)), nibble & np.uint32(7)]
        sign = np.where(byte & 128, 255, 0)
        result[:, i] = np.where(nibble & np.uint32(8), sign, byte)
    return result.view(np.uint32).reshape(-1)


def _lookup(program: Program, modifiers: list[str], kinds: list[str], operands: list[str]) -> Step:
    """`lop3`: bit i of the table is the result where the inputs' bits spell i."""
    table = int(operands[4], 0)
    write, reads = program.write(operands[0]), [program.read(operand, "u32") for operand in operands[1:4]]

    def run(block: Block, mask: Array | None) -> None:
        inputs = [read(block) for read in reads]
        result = np.zeros(block.threads, np.uint32)
        for i in range(8):
            if table >> i & 1:
                a, b, c = (value if i >> (2 - k) & 1 else ~value for k, value in enumerate(inputs))
                result |= a & b & c
        write(block, result, mask)

    return run


_FLOAT = "rn ftz approx full"
_ORDER = "relaxed acquire release acq_rel gpu cta sys"
_MEMORY = "global shared shared_cta param v2 v4 ca cg cs lu cv wb wt nc volatile L1_evict_first L1_evict_last weak"
_INSTRUCTIONS = {
    **dict.fromkeys(("bar", "barrier"), Instruction(_barrier, "sync cta warp")),
    **dict.fromkeys(("membar", "fence"), Instruction(_nothing, f"gl sc {_ORDER}")),
    "mov": Instruction(_mov),
    "ld": Instruction(_ld, f"{_MEMORY} {_ORDER}"),
    "st": Instruction(_st, f"{_MEMORY} {_ORDER}"),
    "ldmatrix": Instruction(_ldmatrix, "sync aligned m8n8 x1 x2 x4 trans shared shared_cta"),
    "mma": Instruction(_mma, "sync aligned m16n8k8 row col"),
    "shfl": Instruction(_shfl, "sync up down bfly idx"),
    **dict.fromkeys(("atom", "red"), Instruction(_atomic, f"global shared shared_cta {_ORDER} {' '.join(_ATOMICS)}")),
    "cvt": Instruction(_cvt, f"rn {' '.join(_ROUND)}"),
    "setp": Instruction(_setp, f"ftz num nan {' '.join(_COMPARE)} ltu leu gtu geu equ neu {' '.join(_BOOLEAN)}"),
    "selp": Instruction(_selp),
    "and": Instruction(_elementwise(np.bitwise_and)),
    "or": Instruction(_elementwise(np.bitwise_or)),
    "xor": Instruction(_elementwise(np.bitwise_xor)),
    "not": Instruction(_elementwise(np.invert)),
    "neg": Instruction(_elementwise(np.negative), "ftz"),
    "abs": Instruction(_elementwise(np.abs), "ftz"),
    "add": Instruction(_elementwise(np.add), _FLOAT),
    "sub": Instruction(_elementwise(np.subtract), _FLOAT),
    "min": Instruction(_extreme(np.fmin, np.minimum), "ftz NaN"),
    "max": Instruction(_extreme(np.fmax, np.maximum), "ftz NaN"),
    "mul": Instruction(_multiply, f"lo hi wide {_FLOAT}"),
    "mad": Instruction(_multiply, "lo hi wide"),
    "div": Instruction(_elementwise(_quotient), _FLOAT),
    "rem": Instruction(_elementwise(_remainder)),
    "shl": Instruction(_shift(left=True)),
    "shr": Instruction(_shift(left=False)),
    "bfe": Instruction(_elementwise(_bit_field_extract)),
    "bfi": Instruction(_elementwise(_bit_field_insert)),
    "prmt": Instruction(_elementwise(_permute_bytes)),
    "lop3": Instruction(_lookup),
    "fma": Instruction(_rounded_once(lambda a, b, c: a * b + c), _FLOAT),
    "ex2": Instruction(_rounded_once(np.exp2), _FLOAT),
    "lg2": Instruction(_rounded_once(np.log2), _FLOAT),
    "rcp": Instruction(_rounded_once(np.reciprocal), _FLOAT),
    "sqrt": Instruction(_rounded_once(np.sqrt), _FLOAT),
    "rsqrt": Instruction(_rounded_once(lambda a: 1.0 / np.sqrt(a)), _FLOAT),
}
