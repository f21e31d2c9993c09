"""Device time of an operation by CUDA events: in a CUDA graph and launched one by one, with a warm and a cold L2."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

_REPEATS = 5


def device_times(make: Callable[[], Call], bytes_moved: int, stream_bytes_per_second: float) -> dict[str, float]:
    """Microseconds per call and the bandwidth they imply, as plain numbers for `extra_info`.

    Args:
        make: returns a call on its own inputs; called once for each input set.
        bytes_moved: least number of bytes that one call must read and write.
        stream_bytes_per_second: bandwidth of a large copy on this device (:func:`copy_bandwidth`).

    `graph_*` is the time inside a replayed CUDA graph: kernels without launch overhead. `eager_*` is launched one by
    one, and shows where the host is the bottleneck. `*_warm` repeats one input set, `*_cold` cycles through enough of
    them that none is left in L2 at its next turn.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rotation = max(8, min(256, 2 * cache // max(1, bytes_moved)))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # one for all: autograd runs backward on the forward's stream
        calls = [make() for _ in range(rotation)]
        warm, cold = [calls[0]] * min(32, rotation), calls
        times = {
            "graph_warm_us": _graph_time(warm),
            "graph_cold_us": _graph_time(cold),
            "eager_warm_us": _event_time(lambda: _run(warm)) / len(warm),
            "eager_cold_us": _event_time(lambda: _run(cold)) / len(cold),
        }
    gigabytes_per_second = bytes_moved / times["graph_cold_us"] / 1e3
    return {
        **times,
        "bytes": bytes_moved,
        "gb_per_s": gigabytes_per_second,
        "share_of_copy": gigabytes_per_second * 1e9 / stream_bytes_per_second,
    }


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a device-to-device copy far larger than L2."""
    elements = min(2**28, torch.cuda.get_device_properties(0).total_memory // 32)
    source = torch.rand(elements, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_event_time(lambda: target.copy_(source)) * 1e-6)


def _run(calls: list[Call]) -> None:
    for call in calls:
        call()


def _event_time(call: Call) -> float:
    """Median microseconds between events around the call."""
    call()
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _graph_time(calls: list[Call]) -> float:
    """Microseconds per call, with all of them captured in one graph on the current stream."""
    _run(calls)  # compiles, allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        _run(calls)
    return _event_time(graph.replay) / len(calls)
