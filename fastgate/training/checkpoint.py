"""checkpoint.pt: everything needed to resume a run, loadable with `weights_only=True`."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fastgate.digests import KEY, check_digest, digest
from fastgate.files import write_atomically

FORMAT = "fastgate-checkpoint"
VERSION = 2
_WITHOUT_DIGEST = 1  # the version whose files cannot be checked for damage


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of these to `path`, atomically."""
    state = {"format": FORMAT, "version": VERSION, **state}
    state[KEY] = digest(state)
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, without running code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, or not a checkpoint of this version or an earlier one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint written by fastgate train, found none")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: expected a whole checkpoint of fastgate train, got a damaged or foreign file ({reason})"
        ) from error
    version = state.get("version") if isinstance(state, dict) and state.get("format") == FORMAT else None
    if version == _WITHOUT_DIGEST and KEY not in state:
        warnings.warn(f"{path}: a checkpoint of an earlier version, which cannot be checked for damage", stacklevel=2)
        return state
    if version != VERSION:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT!r} version {VERSION}, got another file")
    wanted = state.pop(KEY, None)
    check_digest(path, state, wanted)
    return state
