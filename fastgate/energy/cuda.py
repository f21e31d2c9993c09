"""The GPUs visible to this process: from torch if it has initialized CUDA, otherwise from CUDA_VISIBLE_DEVICES.

This module never imports torch or initializes CUDA: both would cost memory and prevent forking.
"""

import os
import re
import sys
from typing import Any

from fastgate.energy.errors import DeviceMissing, EnergyError
from fastgate.energy.nvml import Board


def running_torch() -> Any:
    """The torch module if it was imported and has initialized CUDA, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def visible_boards(boards: list[Board]) -> list[Board]:
    """The boards that are visible to this process, in CUDA's order.

    Args:
        boards: all boards of the machine, in PCI order.

    Raises:
        EnergyError: CUDA's order cannot be determined.
    """
    torch = running_torch()
    if torch is not None:
        return [_require(torch, index, boards) for index in range(torch.cuda.device_count())]
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return boards
    entries = parse_visible_devices(variable)
    if entries and isinstance(entries[0], int):
        check_order(boards)
    chosen: list[Board] = []
    for entry in entries:
        board = boards_at(boards, entry) if isinstance(entry, int) else match_uuid(boards, entry)
        if board is None:  # as in CUDA, the first entry without a match ends the list
            break
        if board in chosen:
            return []
        chosen.append(board)
        if isinstance(entry, str) and entry.startswith("MIG-"):
            break  # CUDA uses one slice per process: the first
    return chosen


def boards_at(boards: list[Board], index: int) -> Board | None:
    """The board at an index, None past the end."""
    return boards[index] if index < len(boards) else None


def check_order(boards: list[Board]) -> None:
    """Raise if CUDA's device order may differ from the PCI order, so that integer indices are ambiguous.

    Raises:
        EnergyError: boards of different models, which CUDA sorts by its own estimate of speed.
    """
    order = os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    names = sorted({board.name for board in boards})
    if order != "PCI_BUS_ID" and len(names) > 1 and running_torch() is None:
        raise EnergyError(
            f"an index is ambiguous for {', '.join(names)}: CUDA sorts GPUs of different models by speed; set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, identify the GPU by its UUID, or create the meter after torch has "
            "initialized CUDA"
        )


def parse_visible_devices(variable: str) -> list[int] | list[str]:
    """The entries of CUDA_VISIBLE_DEVICES up to the first invalid one; none at all if one is repeated.

    CUDA reads an integer from the start of each entry, and UUIDs only if the first entry is one.
    """
    for prefix in ("GPU-", "MIG-"):
        if variable.startswith(prefix):
            uuids: list[str] = []
            for entry in variable.split(","):
                if entry in uuids:
                    return []
                if not entry.startswith(prefix):
                    break
                uuids.append(entry)
            return uuids
    indices: list[int] = []
    for entry in variable.split(","):
        number = re.match(r"\+?[0-9]+", entry.strip())
        if number is None:
            break
        if int(number[0]) in indices:
            return []
        indices.append(int(number[0]))
    return indices


def match_uuid(boards: list[Board], text: str) -> Board | None:
    """The one board whose UUID, or one of whose MIG slices' UUIDs, starts with `text`; None for none or several."""
    if text.startswith("MIG-GPU-"):  # drivers before R470: MIG-<UUID of the board>/<GPU instance>/<compute instance>
        text = text.removeprefix("MIG-").partition("/")[0]
    if text.startswith("MIG-"):
        found = [board for board in boards for uuid in board.mig_uuids() if uuid.startswith(text)]
    else:
        found = [board for board in boards if board.uuid.startswith(text)]
    return found[0] if len(found) == 1 else None


def torch_board(torch: Any, index: int, boards: list[Board]) -> Board | None:
    """The board of torch's CUDA device `index`: by UUID, or by PCI id if the UUID is that of a MIG slice."""
    properties = torch.cuda.get_device_properties(index)
    uuid = str(properties.uuid).removeprefix("GPU-")
    bus_id = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    found = match_uuid(boards, f"GPU-{uuid}") or match_uuid(boards, f"MIG-{uuid}")
    return found or next((board for board in boards if board.pci_bus_id == bus_id), None)


def _require(torch: Any, index: int, boards: list[Board]) -> Board:
    board = torch_board(torch, index, boards)
    if board is None:
        name = torch.cuda.get_device_properties(index).name
        raise DeviceMissing(f"cuda:{index} ({name}): NVML does not know this device; see `nvidia-smi -L`")
    return board


def synchronize(boards: list[Board]) -> None:
    """Wait until torch's work on these boards is done; without torch or CUDA there is none."""
    torch = running_torch()
    if torch is None or not boards:
        return
    for index in range(torch.cuda.device_count()):
        # a device without torch memory has no work, and synchronizing would create a context there
        if torch.cuda.memory_reserved(index) > 0 and torch_board(torch, index, boards) in boards:
            torch.cuda.synchronize(index)
