"""Checksums of file contents, by which damaged files are detected."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "sha256"  # the key under which every file stores its digest


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of tensors, plain values and containers of these; the same in every process.

    For tensors, it covers dtype, shape and the exact values, but neither device nor memory layout; for mappings, not
    the order.

    Raises:
        TypeError: any other kind of value.
    """
    # the types that torch.load accepts with weights_only
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    # every part is prefixed with its type and size, so that no two values are encoded alike
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
    """Compare the digest of a file's contents with the one stored when it was written.

    Raises:
        ValueError: they differ.
    """
    if digest(value) != wanted:
        raise ValueError(
            f"{path}: its contents are not what was written (their checksum differs): the file is damaged or was "
            "changed; use a backup copy, or create it again"
        )
