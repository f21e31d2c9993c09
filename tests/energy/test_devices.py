"""Which board is metered: CUDA_VISIBLE_DEVICES in all its forms, torch devices, UUIDs, MIG."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgate as fg
from fastgate.energy import EnergyError, cuda, errors
from fastgate.energy.devices import parse_devices
from tests.energy.fake import A100, T4, T4_TOO, Fake

AAAA, BBBB, AACC = T4[0], T4_TOO[0], A100[0]


def metered(meter: fg.EnergyMeter) -> list[str]:
    return [source.key for source in meter.sources]


@pytest.fixture
def two(fake: Fake) -> Fake:
    """Two T4s; NVML counts them against their PCI order."""
    fake.board(T4_TOO, 35.0)
    fake.board(T4, 70.0)
    return fake


@pytest.mark.parametrize(
    ("variable", "boards"),
    [
        pytest.param(None, [AAAA, BBBB], id="unset"),
        pytest.param("", [], id="empty"),
        pytest.param("0", [AAAA], id="first-in-pci-order"),
        pytest.param("1", [BBBB], id="second"),
        pytest.param("1,0", [BBBB, AAAA], id="reordered"),
        pytest.param("1,-1,0", [BBBB], id="stops-at-minus-one"),
        pytest.param("0,7,1", [AAAA], id="stops-at-a-missing-one"),
        pytest.param(" 1 , x,0", [BBBB], id="stops-at-a-word"),
        pytest.param("1,1", [], id="repeated"),
        pytest.param("-1", [], id="none-by-minus-one"),
        pytest.param("NoDevFiles", [], id="none-by-word"),
        pytest.param(AAAA, [AAAA], id="uuid"),
        pytest.param("GPU-b", [BBBB], id="uuid-prefix"),
        pytest.param("GPU-b,GPU-a", [BBBB, AAAA], id="uuid-prefixes"),
        pytest.param("GPU-", [], id="ambiguous-prefix"),
        pytest.param("GPU-b,GPU-zz,GPU-a", [BBBB], id="stops-at-an-unknown-uuid"),
        pytest.param("GPU-b,0", [BBBB], id="stops-at-an-index-among-uuids"),
        pytest.param("GPU-bb,GPU-bbb", [], id="the-same-board-twice"),
    ],
)
def test_visible_devices(two: Fake, monkeypatch: pytest.MonkeyPatch, variable: str | None, boards: list[str]) -> None:
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    meter = two.meter()
    assert metered(meter) == boards
    watts = {AAAA: 70.0, BBBB: 35.0}
    with meter.window("w") as w:
        two.run(2)
    if boards:
        assert w.result.per_device == {uuid: 2 * watts[uuid] for uuid in boards}
    else:
        assert w.result.joules is None
        assert f"this process sees no GPU with CUDA_VISIBLE_DEVICES={variable!r}" in w.result.warnings[0]


@given(st.lists(st.sampled_from(["0", "1", "2", "+1", "-1", " 3", "x", "", "4z", "12", "01"]), max_size=5))
def test_integers_are_read_as_torch_reads_them(entries: list[str]) -> None:
    variable = ",".join(entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert cuda.parse_visible_devices(variable) == torch.cuda._parse_visible_devices()


@given(st.lists(st.sampled_from(["GPU-a", "GPU-b", "MIG-c", "GPU-", "0", " GPU-d", ""]), min_size=1, max_size=4))
def test_uuids_are_read_as_torch_reads_them(entries: list[str]) -> None:
    variable = ",".join(entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert cuda.parse_visible_devices(variable) == torch.cuda._parse_visible_devices()


@pytest.mark.parametrize(
    ("devices", "boards"),
    [
        (0, [AAAA]),
        ("cuda:1", [BBBB]),
        ("cuda", [AAAA]),
        (torch.device("cuda:1"), [BBBB]),
        (torch.device("cuda"), [AAAA]),
        (BBBB, [BBBB]),
        ("GPU-bbbb", [BBBB]),
        ([1, "cuda:0"], [BBBB, AAAA]),
        (["cuda:1", BBBB, 1, torch.device("cpu")], [BBBB]),
        ("cpu", []),
        ([], []),
    ],
)
def test_devices(two: Fake, devices: Any, boards: list[str]) -> None:
    assert metered(two.meter(devices)) == boards


def test_an_index_counts_what_cuda_shows(two: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert metered(two.meter(0)) == [BBBB]
    with pytest.raises(ValueError, match=r"expected a CUDA index below 1 .*CUDA_VISIBLE_DEVICES.* got 1"):
        two.meter("cuda:1")
    assert metered(two.meter(AAAA)) == [AAAA]  # a UUID means that board, shown or not


@pytest.mark.parametrize(
    ("devices", "kind"),
    [("tpu", ValueError), ("0", ValueError), ("cuda:x", ValueError), ("", ValueError), (1.0, TypeError),
     (True, TypeError), (-1, ValueError), ([None], TypeError), (torch.device("meta"), ValueError)],
)  # fmt: skip
def test_what_is_no_device(devices: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="devices: expected a torch device, a CUDA index, 'cuda:N', 'cpu', or a UUID"):
        parse_devices(devices)


def test_unknown_uuids_are_refused_with_the_known_ones(two: Fake) -> None:
    with pytest.raises(ValueError, match=f"expected the UUID of one board, .* of {AAAA}, {BBBB}; got 'GPU-zz'"):
        two.meter("GPU-zz")
    with pytest.raises(ValueError, match="expected the UUID of one board"):
        two.meter("GPU-")


def test_boards_of_different_models_have_no_known_order(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(A100, 300.0)  # first on the PCI bus, and CUDA's first if it is the fastest
    fake.board(T4, 70.0)
    assert set(metered(fake.meter())) == {AACC, AAAA}  # all of them need no order
    assert metered(fake.meter("GPU-aaaa")) == [AAAA]
    with fake.meter(0).window("w") as w:
        fake.run(1)
    assert (w.result.joules, w.result.per_device) == (None, {"cuda:0": None})
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in w.result.warnings[0]
    with pytest.raises(EnergyError, match="an index is ambiguous for NVIDIA A100, Tesla T4"):
        fake.meter(0, require=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(EnergyError, match="CUDA sorts GPUs of different models by speed"):
        fake.meter(require=True)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert metered(fake.meter()) == [AAAA]
    assert metered(fake.meter(0)) == [AAAA]


class RunningCuda:
    """torch.cuda where CUDA runs, in its own order of devices: the second board first."""

    def __init__(self, order: list[tuple[str, str, str]], memory: dict[int, int] | None = None) -> None:
        self.order, self.memory, self.waited = order, memory or {}, list[int]()

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 1

    def device_count(self) -> int:
        return len(self.order)

    def get_device_properties(self, index: int) -> SimpleNamespace:
        uuid, name, bus = self.order[index]
        domain, pci_bus, rest = bus.split(":")
        return SimpleNamespace(
            name=name,
            uuid=uuid.removeprefix("GPU-"),  # torch leaves it away
            pci_domain_id=int(domain, 16),
            pci_bus_id=int(pci_bus, 16),
            pci_device_id=int(rest.partition(".")[0], 16),
        )

    def memory_reserved(self, index: int) -> int:
        return self.memory.get(index, 0)

    def synchronize(self, index: int) -> None:
        self.waited.append(index)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in dir(self):
            if not name.startswith("_") and callable(getattr(self, name)) and name != "install":
                patch.setattr(torch.cuda, name, getattr(self, name))


def test_running_cuda_says_itself_which_board_is_which(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(T4, 70.0)
    fake.board(A100, 300.0)
    RunningCuda([A100, T4]).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # too late to matter: CUDA has been initialised
    assert metered(fake.meter(0)) == [AACC]
    assert metered(fake.meter("cuda:1")) == [AAAA]
    assert metered(fake.meter("cuda")) == [AAAA]  # the current device
    assert metered(fake.meter()) == [AACC, AAAA]


def test_a_mig_slice_in_torch_is_found_by_pci_id(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(T4, 70.0)
    fake.board(A100, 300.0)
    RunningCuda([("GPU-5555", *A100[1:])]).install(monkeypatch)
    assert metered(fake.meter(0)) == [AACC]
    RunningCuda([("GPU-5555", "unknown", "00000000:77:00.0")]).install(monkeypatch)
    with pytest.raises(errors.DeviceMissing, match=r"cuda:0 \(unknown\): NVML does not know this device"):
        fake.meter(0, require=True)


def test_waits_on_metered_devices_with_torch_work_only(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(T4, 70.0)
    fake.board(T4_TOO, 35.0)
    fake.board(A100, 300.0)
    running = RunningCuda([A100, T4, T4_TOO], memory={0: 1, 1: 1})
    running.install(monkeypatch)
    meter = fake.meter([1, 2])
    running.waited.clear()
    with meter.window("w"):
        assert running.waited == [1]
        fake.run(1)
        assert running.waited == [1]  # never inside
    assert running.waited == [1, 1]


def test_mig_needs_allow_shared(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(A100, 300.0)
    for uuid in (b"MIG-1111-a", b"MIG-1111-b"):
        fake.add_slice(0, uuid)
    for variable in ("MIG-1111-b", "MIG-1111-b,MIG-1111-a", f"MIG-{AACC}/7/0", "0", None):
        if variable is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        with fake.meter().window("w") as w:
            fake.run(3)
        assert (w.result.joules, w.result.per_device) == (None, {AACC: None})
        assert "pass allow_shared=True" in w.result.warnings[0]
        with fake.meter(allow_shared=True).window("w") as w:
            fake.run(3)
        # once, not once per slice
        assert (w.result.joules, w.result.per_device) == (900.0, {AACC: 900.0})
        assert w.result.warnings == (f"{AACC}: the whole GPU is metered, all MIG slices included",)
    with pytest.raises(errors.NotSupported, match="pass allow_shared=True"):
        fake.meter("MIG-1111-a", require=True)
    assert metered(fake.meter("MIG-1111-a", allow_shared=True)) == [AACC]
    with pytest.raises(ValueError, match="expected the UUID of one board"):
        fake.meter("MIG-2222", allow_shared=True)


def test_a_board_outside_the_container_is_skipped(two: Fake) -> None:
    two.hide(0, 4)  # NVML's first
    meter = two.meter()
    assert metered(meter) == metered(two.meter(0)) == [AAAA]
    with meter.window("w") as w:
        two.run(3)
    assert w.result.joules == 210.0
    assert w.result.warnings[0].startswith("NVML device 0 is not metered: nvmlDeviceGetHandleByIndex: no permission")
    with pytest.raises(ValueError, match=r"index below 1 .* got 1 \(NVML device 0 is not metered: .*no permission"):
        two.meter(1)
    with pytest.raises(EnergyError, match="not among the boards that this process may use"):
        two.meter(BBBB, require=True)


def test_without_pci_ids_nvmls_order_is_taken_and_said(two: Fake) -> None:
    two.fail("nvmlDeviceGetPciInfo_v3", 13)
    meter = two.meter()
    assert metered(meter) == [BBBB, AAAA]
    assert meter.notes == ["this driver does not report PCI ids: GPUs are listed in NVML's order"]
