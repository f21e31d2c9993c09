"""A stand-in for CUDA graphs on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "nonzero", "equal")


class HostReads(AssertionError):
    """The host read a value, for which it would wait on a GPU; a capture fails there."""


class Tape(TorchDispatchMode):
    """Operations with the tensors and numbers that they had, done again on these very tensors, as a CUDA graph does.

    What is Python between them does not run again, and every number is that of the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _READS:
            raise HostReads(str(func))
        results = func(*args, **kwargs)
        read = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [
            (i, x)
            for i, x in enumerate(tree_leaves(results))
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in read
        ]
        if made or func._schema.is_mutable:  # else it is a view, which is there already
            self.operations.append((func, args, kwargs, made))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            results = tree_leaves(func(*args, **kwargs))
            for i, x in made:
                x.copy_(results[i])


class Tapes:
    """Has the methods of :class:`fastgate.training.step.CudaGraphs`.

    A recording on a CPU does what it records. So the first replay does nothing.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays: list[int] = []  # of each tape

    def run(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        tape, number = Tape(), len(self.tapes)
        with tape:
            function()
        self.tapes.append(tape)
        self.replays.append(0)

        def replay() -> None:
            if self.replays[number]:
                tape.replay()
            self.replays[number] += 1

        return replay
