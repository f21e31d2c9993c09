"""Selection of the boards to meter: torch devices, CUDA indices, UUIDs, or all that are visible to this process."""

import re
from collections.abc import Iterable
from typing import Any

from fastgate.energy.cuda import boards_at, check_order, match_uuid, running_torch, visible_boards
from fastgate.energy.errors import EnergyError
from fastgate.energy.nvml import Board, Session

# a torch.device (not typed, so that torch is optional), a CUDA index, or a string
Device = Any
_EXPECTED = "expected a torch device, a CUDA index, 'cuda:N', 'cpu', or a UUID beginning with GPU- or MIG-"


def parse_devices(devices: Device | Iterable[Device] | None) -> list[str] | None:
    """The requested devices as strings ("cuda:1", "GPU-..."), without "cpu"; None for all visible ones.

    Raises:
        TypeError, ValueError: not a device.
    """
    if devices is None:
        return None
    several = devices if isinstance(devices, list | tuple | set | frozenset) else [devices]
    return [text for text in dict.fromkeys(map(_parse_device, several)) if text != "cpu"]


def _parse_device(device: Device) -> str:
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    elif hasattr(device, "type") and hasattr(device, "index"):  # a torch.device prints as 'cuda:1'
        device = str(device)
    if not isinstance(device, str):
        raise TypeError(f"devices: {_EXPECTED}, or a list of these, got {device!r}")
    if not re.fullmatch(r"cpu(:0)?|cuda(:[0-9]+)?|(GPU|MIG)-.*", device):
        raise ValueError(f"devices: {_EXPECTED}, got {device!r}")
    return "cpu" if device.startswith("cpu") else device


def find_board(session: Session, device: str) -> Board:
    """Find the board of a parsed device.

    Raises:
        ValueError: there is no such device.
        EnergyError: the device cannot be determined or accessed.
    """
    boards, refused = session.boards()
    why = f" ({'; '.join(refused)})" if refused else ""
    if not device.startswith("cuda"):
        board = match_uuid(boards, device)
        if board is None and refused:
            raise EnergyError(f"{device}: not among the boards that this process may use{why}")
        if board is None:
            known = ", ".join(board.uuid for board in boards) or "none"
            raise ValueError(f"devices: expected the UUID of one board, or its beginning, of {known}; got {device!r}")
        return board
    _, _, number = device.partition(":")
    torch = running_torch()
    index = int(number) if number else (torch.cuda.current_device() if torch else 0)
    visible = visible_boards(boards)
    if visible is boards:
        check_order(boards)
    board = boards_at(visible, index)
    if board is None:
        raise ValueError(
            f"devices: expected a CUDA index below {len(visible)} (the GPUs visible to this process; see "
            f"CUDA_VISIBLE_DEVICES), got {index}{why}"
        )
    return board
