"""What a file says, in one number: a damaged one does not have the number that it was written with."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "sha256"  # under which every file keeps its digest


def digest(value: Any) -> str:
    """SHA-256 of tensors, plain values and containers of these, the same in every process, in hexadecimal.

    Of tensors dtype, shape and values count to the bit, wherever they are and however they lie in memory; of mappings
    not the order.

    Raises:
        TypeError: another kind of value.
    """
    # what torch.load takes as weights
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    # every part says what it is and how much of it follows: no two values are written alike
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=repr):
            _feed(found, key)
            _feed(found, value[key])
        if notes := getattr(value, "__dict__", None):  # the versions of the modules of a state_dict
            _feed(found, notes)
    elif isinstance(value, list | tuple):
        found.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)} ".encode())
        for item in value:
            _feed(found, item)
    elif isinstance(value, set | frozenset):
        found.update(f"set {len(value)} ".encode())
        for item in sorted(value, key=repr):
            _feed(found, item)
    elif value is None or isinstance(value, bool | int | float | str):
        found.update(f"{json.dumps(value)} ".encode())
    elif isinstance(value, bytes | bytearray | complex | torch.dtype | torch.device):
        found.update(f"{type(value).__name__} {value!r} ".encode())
    else:
        raise TypeError(f"digest: expected tensors, plain values and containers of these, got {type(value).__name__}")


def check_digest(path: object, value: Any, wanted: object) -> None:
    """Compare the digest of what was read from a file with the one that it was written with.

    Raises:
        ValueError: they differ.
    """
    if digest(value) != wanted:
        raise ValueError(
            f"{path}: its contents are not what was written (their checksum differs): the file is damaged or was "
            "changed; take a copy of it, or make it anew"
        )
