"""checkpoint.pt: everything a run needs to go on, loadable with `weights_only=True`."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fastgate.files import write_atomically

FORMAT = "fastgate-checkpoint"
VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of these to `path`: all of it or nothing."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **state}, file))


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, without running code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, or not a checkpoint of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint written by fastgate train, found none")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: expected a whole checkpoint of fastgate train, got a truncated or foreign file ({reason})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT!r} version {VERSION}, got another file")
    return state
