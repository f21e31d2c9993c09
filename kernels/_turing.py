"""fp16 `tl.dot` on the tensor cores of sm_75 (T4, RTX 20).

Since version 3.3 Triton compiles a dot for sm_75 to scalar fp32 FMAs, which for fp16 operands also spill. Its lowering
to Turing's `mma.sync.m16n8k8` still exists but is no longer reachable. Triton's stage hook makes it reachable: generate
the TTGIR as for sm_80, retag it as sm_75, and run the later stages as usual.

A launcher requests this with a launch option (`plan_dot`). Triton has no custom options, so ours is a name added to
`allowed_dot_input_precisions`, which has no effect but is part of both cache keys (in memory and on disk), also in
Triton 3.6, which leaves the hook itself out of them. The hook acts only on launches with this name and only on sm_75:
all other kernels of the process, and their cache keys on disk, are unaffected.

`FASTGATE_TURING_MMA` is 1 (use it), 0 (do not) or unset: use it if Triton's version is known to work. In
`tests/kernels/test_turing.py` an emulator executes the PTX, or the driver of a newer GPU compiles it.
"""

import dataclasses
import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton._C.libtriton import ir

# the minor versions whose PTX the emulator has executed
KNOWN_GOOD = ("3.6", "3.7", "3.8", "3.9")
_VARIABLE = "FASTGATE_TURING_MMA"
# increment when the compiled code changes, so that older cached binaries are not used
_MARK = "fastgate-turing-mma-1"

# tt.dot %a, %b, %c, ... : tensor<64x32xf16> * tensor<32x64xf16> -> tensor<64x64xf32>
_DOT = re.compile(r"\btt\.dot(?:_scaled)?\b")
_FP16_DOT = re.compile(r"\btt\.dot\b[^\n]*: *tensor<\d+x\d+xf16> *\* *tensor<\d+x\d+xf16> *-> *tensor<\d+x\d+xf32>")


class DotPlan(NamedTuple):
    """How a kernel should call `tl.dot`."""

    upcast: bool  # convert the operands to fp32 first
    options: dict[str, Any]  # launch options


def plan_dot(device: torch.device, dtype: torch.dtype) -> DotPlan:
    """How a kernel with operands of this dtype should call `tl.dot` on this device.

    Before sm_80 the operands are converted to fp32, since fp16 and bf16 dots would spill; but fp16 on sm_75 goes
    directly to the tensor cores if the hook is enabled.
    """
    arch = capability(device)
    if arch == 75 and dtype == torch.float16 and hook_wanted():
        return DotPlan(False, mma_options())
    return DotPlan(0 < arch < 80 and dtype != torch.float32, {})


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as a number, 75 for sm_75; 0 if not a CUDA device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def hook_wanted() -> bool:
    """Whether to use the hook, from `FASTGATE_TURING_MMA` and Triton's version."""
    setting = os.environ.get(_VARIABLE, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{_VARIABLE}={setting!r}: expected 0, 1 or unset")
    version = ".".join(triton.__version__.split(".")[:2])
    known = version in KNOWN_GOOD
    if setting == "1" and not known:
        raise RuntimeError(
            f"{_VARIABLE}=1 requests fp16 tensor cores on sm_75, which are known to work with Triton "
            f"{', '.join(KNOWN_GOOD)}, but this is Triton {triton.__version__}. Unset it to run without them."
        )
    return known and setting != "0"


def mma_options() -> dict[str, Any]:
    """Options of a launch whose fp16 dots should use the tensor cores on sm_75; installs the hook."""
    current = knobs.runtime.add_stages_inspection_hook
    if not isinstance(current, _StageHook):
        knobs.runtime.add_stages_inspection_hook = _StageHook(current)
    return {"allowed_dot_input_precisions": ("ieee", "tf32", _MARK)}


class _StageHook:
    """Replaces the TTGIR stage of marked kernels; a hook installed earlier by another tool still runs."""

    def __init__(self, previous: Any):
        self.previous = previous

    def __call__(
        self, backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, arch: Any = None
    ) -> tuple[str, str] | None:
        if backend is None:
            # Triton 3.7 and later query the hook's part of the cache keys at every launch: ours is the mark
            return self.previous() if self.previous else ("", "")
        if self.previous:
            self.previous(backend, stages, options, language, arch)
        if arch == 75 and _MARK in options.allowed_dot_input_precisions:
            # one stage: the pipeliner would emit cp.async, which sm_75 lacks
            single_stage = dataclasses.replace(options, num_stages=1)
            stages["ttgir"] = lambda module, metadata: _turing_ttgir(backend, module, metadata, single_stage)
        return None


def _turing_ttgir(backend: Any, module: Any, metadata: dict, options: Any) -> Any:
    """TTGIR for sm_75 in which dots have Turing's MMA layout."""
    text = str(module)
    if len(_FP16_DOT.findall(text)) != len(_DOT.findall(text)) or not _DOT.search(text):
        # other dots compile incorrectly (3-D dots add to the wrong batch) or not at all (bf16, tf32)
        raise ValueError("tensor cores on sm_75 were requested, but not all dots are tl.dot of 2-D fp16 into fp32")
    module = backend.make_ttgir(module, metadata, options, 80)
    text, targets = re.subn(r'"cuda:80"', '"cuda:75"', str(module))
    if targets != 1:
        raise RuntimeError(f"Triton {triton.__version__}: expected one target in its TTGIR, got {targets}")
    # version 2.1 of the layout selects m16n8k8; a dot too small for a layout has none and becomes FMAs
    return _parse(text.replace("versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1"), module)


def _parse(text: str, original: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # Triton parses files only
        path = Path(folder) / "kernel.ttgir"
        path.write_text(text)
        module = ir.parse_mlir_module(str(path), original.context)
    module.context = original.context
    return module
