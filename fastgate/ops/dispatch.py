"""Which implementation of an operation runs: `impl="auto" | "triton" | "torch"`."""

import os

IMPLEMENTATIONS = ("auto", "triton", "torch")


def resolve_impl(impl: str, operation: str) -> str:
    """Return the implementation that serves this call.

    `FASTGATE_IMPL` overrides `impl="auto"`. An explicit request that cannot be honoured raises; only `auto` falls
    back.

    Raises:
        ValueError: an unknown name, or `"triton"` for an operation that has no Triton kernel in this version.
    """
    source = "impl"
    if impl == "auto" and os.environ.get("FASTGATE_IMPL"):
        impl, source = os.environ["FASTGATE_IMPL"], "the environment variable FASTGATE_IMPL"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "triton":
        raise ValueError(
            f"{operation}: {source} asks for 'triton', but this version of fastgate has no Triton kernel for it; "
            "use 'auto' or 'torch'"
        )
    return "torch"
