"""The kernels' sm_75 code on the newer GPU that is here: its driver compiles the PTX forward."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from tests.kernels.budget import Launch, compile_launch, intercepted


@contextmanager
def jitted(launches: list[Launch], arch: int = 75) -> Iterator[None]:
    """Launches on CUDA tensors run what Triton compiles for `arch`, and are appended to `launches`."""
    driver = Driver()

    def run(launch: Launch) -> None:
        driver.launch(launch, compile_launch(launch, arch))
        launches.append(launch)

    with intercepted(run, arch=arch):
        yield


class Driver:
    """CUDA's driver: loads PTX and launches it on torch's current stream."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._functions: dict[tuple[JITFunction, str], ctypes.c_void_p] = {}

    def launch(self, launch: Launch, compiled: Any) -> None:
        """Launch Triton's compiled kernel with a recorded launch's arguments."""
        values: list[Any] = []

        def append(value: Any) -> None:
            if isinstance(value, tuple):
                for field in value:
                    append(field)
            elif isinstance(value, torch.Tensor):
                values.append(ctypes.c_uint64(value.data_ptr()))
            elif value is not None:
                values.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value))

        for parameter in launch.kernel.params:
            if not parameter.is_constexpr:
                append(launch.arguments[parameter.name])
        values += [ctypes.c_uint64(0)] * 2  # scratch memory that Triton appends, and these kernels do not ask for
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        metadata = compiled.metadata
        grid = (*launch.grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (32 * metadata.num_warps, 1, 1)
        function = self._function(launch, compiled)
        self._call("cuLaunchKernel", function, *grid, *block, metadata.shared, stream, addresses, None)
        torch.cuda.synchronize()

    def _function(self, launch: Launch, compiled: Any) -> ctypes.c_void_p:
        key = (launch.kernel, compiled.asm["ptx"])
        if key not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), compiled.asm["ptx"].encode())
            self._call("cuModuleGetFunction", ctypes.byref(function), module, compiled.metadata.name.encode())
            if compiled.metadata.shared > 48 * 1024:
                limit = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", function, limit, compiled.metadata.shared)
            self._functions[key] = function
        return self._functions[key]

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code}")
