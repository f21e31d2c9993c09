"""Windows on the stand-in for NVML: exact joules, and the failures of other meters come out right."""

import gc
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastgate as fg
from fastgate.energy import EnergyError, WindowOpenError, errors
from tests.energy.fake import T4, T4_TOO, TICK, Fake

AAAA, BBBB = T4[0], T4_TOO[0]


def test_exact_joules(fake: Fake) -> None:
    fake.board()
    meter = fake.meter()
    fake.run(5)
    with meter.window("epoch 3", items=280) as w:
        fake.run(4, watts=70)
    result = w.result
    assert (result.joules, result.seconds, result.mean_watts, result.joules_per_item) == (280.0, 4.0, 70.0, 1.0)
    assert result.items_per_joule == 1.0
    assert result.per_device == {AAAA: 280.0}
    assert (result.name, result.items, result.source) == ("epoch 3", 280, "nvml-counter")
    assert result.warnings == ()
    assert result.to_dict()["joules"] == 280.0


def test_two_boards_add_up(fake: Fake) -> None:
    fake.board(T4, 70.0)
    fake.board(T4_TOO, 35.0)
    meter = fake.meter()
    with meter.window("both") as w:
        fake.run(2)
    assert w.result.per_device == {AAAA: 140.0, BBBB: 70.0}
    assert (w.result.joules, w.result.mean_watts) == (210.0, 105.0)


def test_nested_and_overlapping_windows_are_independent(fake: Fake) -> None:
    fake.board(watts=50)
    meter, other = fake.meter(), fake.meter()
    with meter.window("same name") as outer:
        fake.run(2)
        with meter.window("same name") as inner, other.window("same name") as elsewhere:
            fake.run(3)
        early = meter.begin("early")
        fake.run(4)
        late = meter.begin("late")
        fake.run(5)
        early.end()
        fake.run(6)
    late.end()
    joules = [w.result.joules for w in (outer, inner, elsewhere, early, late)]
    assert joules == [50.0 * seconds for seconds in (20, 3, 3, 9, 11)]


def test_an_exception_closes_the_window_and_passes_through(fake: Fake) -> None:
    fake.board(watts=20)
    meter = fake.meter()
    with pytest.raises(KeyError, match="mine"), meter.window("failing") as w:
        fake.run(3)
        raise KeyError("mine")
    assert w.result.joules == 60.0


def test_the_users_exception_wins_over_one_of_waiting(fake: Fake) -> None:
    fake.board(watts=20)

    def wait() -> None:
        if broken:
            raise RuntimeError("CUDA error: device-side assert triggered")

    broken = False
    meter = fake.meter(synchronize=wait)
    with pytest.raises(KeyError, match="mine"), meter.window("failing") as w:
        fake.run(3)
        broken = True
        raise KeyError("mine")
    assert w.result.joules == 60.0
    broken = False
    with pytest.raises(RuntimeError, match="device-side assert"), meter.window("failing later") as w:
        fake.run(3)
        broken = True
    assert w.result.joules == 60.0


def test_result_before_the_end_raises(fake: Fake) -> None:
    fake.board()
    window = fake.meter().window("open")
    with pytest.raises(WindowOpenError, match="'open' has not begun"):
        window.end()
    with window as w, pytest.raises(WindowOpenError, match=r"'open' has not ended: .* after the `with` block"):
        w.result  # noqa: B018
    assert w.end() is w.result


def test_the_same_window_runs_again(fake: Fake) -> None:
    fake.board(watts=10)
    window = fake.meter().window("cell")
    for seconds in (3, 4):
        with window:
            fake.run(seconds)
        assert window.result.joules == 10.0 * seconds


def test_waits_before_the_first_and_the_last_reading(fake: Fake) -> None:
    fake.board(watts=100)
    meter = fake.meter(synchronize=lambda: fake.run(1))  # work that is still in flight
    with meter.window("waits") as w:
        fake.run(2)
    assert w.result.joules == 300.0  # its own second of waiting, not the one before


# up to 140 W: of a board limited to 70 W more than twice that is not believed
@given(st.lists(st.tuples(st.integers(1, 3_000_000), st.integers(1, 140)), min_size=1, max_size=8))
def test_laps_add_up_exactly(fake_for_hypothesis: Fake, steps: list[tuple[int, int]]) -> None:
    fake = fake_for_hypothesis
    fake.install()
    fake.reset()
    fake.board(tick=0.02)
    meter = fake.meter()
    with meter.window("epoch") as w:
        for microseconds, watts in steps:
            fake.run(microseconds / 1e6, watts)
            laps = [w.lap(items=1), meter.lap()]
            # one reading each, at the same moment; meter.lap()'s first also holds what came before the window
            assert laps[0].joules == laps[1].joules or len(w.laps) == 1
        fake.run(1.234567)
    assert sum(lap.microjoules for lap in w.laps) == w.result.microjoules
    assert len(w.laps) == len(steps) + 1
    assert sum(lap.seconds for lap in w.laps) == pytest.approx(w.result.seconds, abs=1e-9)
    assert w.result.microjoules % 1000 == 0  # millijoules came in
    meter.close()


@pytest.fixture(scope="module")
def fake_for_hypothesis(library) -> Fake:
    fake = Fake(library)
    yield fake
    fake.uninstall()


def test_laps_of_the_meter_add_up_to_its_total(fake: Fake) -> None:
    fake.board(watts=17)
    meter = fake.meter()
    laps = []
    for seconds in (1.05, 0.99, 0.5):
        fake.run(seconds)
        laps.append(meter.lap(items=2, name="mine"))
    fake.run(100)  # after the last lap: in none of them
    assert sum(lap.microjoules for lap in laps) == meter.total.microjoules
    assert (laps[1].name, laps[1].items) == ("mine", 2)
    assert laps[1].joules_per_item == laps[1].joules / 2


def test_laps_shorter_than_a_tick_add_up_too(fake: Fake) -> None:
    fake.board(T4, 70, tick=0.1)
    fake.board(T4_TOO, 30, tick=0.5)
    meter = fake.meter()
    fake.settle(0.5)
    with meter.window("w") as w:
        for _ in range(20):
            fake.run(0.13)
            w.lap()
    assert [lap.joules is None for lap in w.laps[:3]] == [True, True, True]
    assert w.laps[2].per_device == {AAAA: 7.0, BBBB: None}
    assert w.laps[3].per_device == {AAAA: 14.0, BBBB: 15.0} and w.laps[3].joules == 29.0
    assert sum(lap.microjoules for lap in w.laps) == w.result.microjoules == 2.6 * 70 * 10**6 - 1e6 * 7 + 75e6 + 7e6


def test_a_lap_reads_each_counter_once(fake: Fake) -> None:
    fake.board()
    meter = fake.meter()
    meter.lap()
    before = fake.calls()
    meter.lap()
    assert fake.calls() - before == 2  # energy, and power for the error bound


@given(st.lists(st.tuples(st.floats(0.001, 3), st.integers(1, 140)), min_size=3, max_size=3), st.floats(0, 0.1))
def test_the_error_bound_holds(fake_for_hypothesis: Fake, phases: list[tuple[float, int]], offset: float) -> None:
    fake = fake_for_hypothesis
    fake.install()
    fake.reset()
    fake.board(tick=TICK)
    meter = fake.meter()
    assert meter.sources[0].tick == pytest.approx(TICK, abs=0.001)
    before, inside, after = phases
    fake.run(before[0] + 0.2, before[1])  # long enough for the power reading to have seen it
    fake.run(offset)
    exact = fake.exact_mj(0)
    with meter.window("inside") as w:
        fake.run(inside[0], inside[1])
        exact = (fake.exact_mj(0) - exact) / 1000
    fake.run(after[0], after[1])
    if w.result.joules is None:
        assert inside[0] < TICK
    else:
        # a millijoule is the counter's resolution
        assert abs(w.result.joules - exact) <= w.result.error_bound_joules + 0.002
    meter.close()


def test_short_windows_say_so(fake: Fake) -> None:
    fake.board(watts=50)
    meter = fake.meter()
    with meter.window("under a tick") as under:
        fake.run(0.05)
    assert under.result.joules is None and under.result.mean_watts is None
    assert under.result.per_device == {AAAA: None}
    assert "shorter than a tick (100 ms)" in under.result.warnings[0]
    with meter.window("19 ticks") as short:
        fake.run(1.9)
    assert "shorter than 20 ticks of 100 ms" in short.result.warnings[0]
    assert short.result.error_bound_joules == pytest.approx(7, rel=0.1)  # one tick at the board's limit of 70 W
    with meter.window("enough") as enough:
        fake.run(2.1)
    assert enough.result.warnings == ()


def test_a_tick_that_was_not_seen_is_not_guessed(fake: Fake) -> None:
    fake.board(watts=50, tick=5.0)
    meter = fake.meter()
    with meter.window("w") as w:
        fake.run(10)
    assert w.result.joules == 500.0
    assert w.result.error_bound_joules is None
    assert "the error bound is unknown" in w.result.warnings[0]


def test_a_counter_that_went_backwards_is_unknown(fake: Fake) -> None:
    fake.board(T4, 70)
    fake.board(T4_TOO, 30)
    meter = fake.meter()
    fake.run(100)
    with meter.window("reset inside") as w:
        fake.set_counter_mj(0, 0)
        fake.run(2)
    assert w.result.per_device == {AAAA: None, BBBB: 60.0}
    assert (w.result.joules, w.result.source, w.result.error_bound_joules) == (None, "unavailable", None)
    assert f"{AAAA}: the counter went backwards (driver reloaded or GPU reset inside the window)" in w.result.warnings
    with meter.window("afterwards") as w:
        fake.run(2)
    assert w.result.joules == 200.0


@pytest.mark.parametrize("lost_at", ["begin", "end"])
def test_a_gpu_lost_inside_a_window(fake: Fake, lost_at: str) -> None:
    fake.board(T4, 70)
    fake.board(T4_TOO, 30)
    meter = fake.meter()
    if lost_at == "begin":
        fake.set_error(0, 15)
    with meter.window("w") as w:
        fake.run(2)
        fake.set_error(0, 15 if lost_at == "end" else 0)
    assert w.result.per_device == {AAAA: None, BBBB: 60.0}
    assert w.result.joules is None
    assert any("the GPU fell off the bus" in warning for warning in w.result.warnings)


def test_unknown_is_none_and_never_zero(fake: Fake) -> None:
    fake.board()
    fake.fail("nvmlDeviceGetTotalEnergyConsumption", 999)
    with fake.meter(0).window("w", items=3) as w:
        fake.run(2)
    unknown = w.result
    assert (unknown.joules, unknown.mean_watts, unknown.joules_per_item, unknown.items_per_joule) == (None,) * 4
    assert (unknown.source, unknown.error_bound_joules, unknown.seconds) == ("unavailable", None, 2.0)
    assert unknown.per_device == {AAAA: None}
    assert "NVML says" in unknown.warnings[0]


UNAVAILABLE = {
    9: (errors.DriverMissing, "kernel driver is not loaded"),
    12: (errors.LibraryMissing, "install the NVIDIA driver"),
    18: (errors.VersionMismatch, "reboot"),
    4: (errors.PermissionDenied, "give this user or container access"),
    999: (EnergyError, "NVML says"),
}


@pytest.mark.parametrize("code", UNAVAILABLE)
@pytest.mark.parametrize("devices", [None, "cuda:0", AAAA])
def test_no_nvml_is_none_with_the_remedy_or_a_typed_error(fake: Fake, code: int, devices: str | None) -> None:
    kind, remedy = UNAVAILABLE[code]
    fake.board()
    fake.fail("nvmlInitWithFlags", code)
    with fake.meter(devices).window("w", items=1) as w:
        fake.run(1)
    assert (w.result.joules, w.result.source, w.result.seconds) == (None, "unavailable", 1.0)
    assert remedy in w.result.warnings[0]
    assert w.result.per_device == ({"gpu": None, "cpu": None} if devices is None else {devices: None})
    with pytest.raises(kind, match=remedy) as caught:
        fake.meter(devices, require=True)
    assert type(caught.value) is kind


def test_without_any_library() -> None:
    with fg.EnergyMeter().window("w") as w:
        pass
    assert w.result.joules is None
    assert "libnvidia-ml.so.1 was not found; install the NVIDIA driver" in w.result.warnings[0]
    with pytest.raises(errors.LibraryMissing):
        fg.EnergyMeter(require=True)


def test_throttling_and_other_processes_are_said(fake: Fake) -> None:
    fake.board(watts=70)
    meter = fake.meter()
    fake.add_process(0, os.getpid())
    with meter.window("alone") as alone:
        fake.run(3)
    assert alone.result.warnings == ()
    fake.add_process(0, 1)
    fake.set_throttle(0, 4 | 32 | 1)
    with meter.window("disturbed") as disturbed:
        fake.run(3)
    assert disturbed.result.warnings == (
        f"{AAAA}: clocks are throttled by the power cap, temperature",
        f"{AAAA}: the joules include those of 1 other process(es) on the GPU",
    )
    assert disturbed.result.joules == 210.0


def test_a_meter_gives_nvml_back_and_only_its_own(fake: Fake) -> None:
    fake.board(watts=10)
    first, second = fake.meter(), fake.meter()
    assert fake.references() == 2
    first.close()
    first.close()
    assert fake.references() == 1
    with second.window("still works") as w:
        fake.run(3)
    assert w.result.joules == 30.0
    del second, w
    gc.collect()
    assert fake.references() == 0


def test_no_process_no_file_and_no_thread_for_a_counter(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    fake.board()
    monkeypatch.chdir(tmp_path)
    before, files = threading.active_count(), set(os.listdir("/tmp"))
    monkeypatch.setattr(os, "fork", None)
    monkeypatch.setattr("subprocess.Popen", None)
    meter = fake.meter()
    with meter.window("w"):
        fake.run(1)
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == [] and not [n for n in set(os.listdir("/tmp")) - files if "fastgate" in n]


def test_after_a_fork_the_child_meters_with_handles_of_its_own(fake: Fake) -> None:
    fake.board(watts=25)
    meter = fake.meter()
    window = meter.begin("across the fork")
    fake.run(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fake.run(3)
            with meter.window("in the child") as w:
                fake.run(2)
            says = f"{window.end().joules} {w.result.joules} {fake.initialised()}"
            del meter, w
            gc.collect()
        except BaseException as error:
            says = repr(error)
        os.write(write, says.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 1000).decode() == "150.0 50.0 2"
    os.close(read)
    fake.run(1)
    assert window.end().joules == 50.0  # the parent's NVML was not shut down by the child
    assert fake.initialised() == 1


def test_windows_in_threads_share_nothing(fake: Fake) -> None:
    fake.board(watts=40)
    meter = fake.meter()
    barrier = threading.Barrier(4)
    results: dict[int, list] = {}

    def work(number: int) -> None:
        mine = []
        for _ in range(50):
            with meter.window(f"thread {number}") as w:
                barrier.wait()
                if number == 0:
                    fake.run(1)
                barrier.wait()
            barrier.wait()
            mine.append(w.result.joules)
        results[number] = mine

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [40.0] * 50 for number in range(4)}


def test_a_window_costs_little(fake: Fake) -> None:
    fake.board()
    meter = fake.meter()
    start = time.perf_counter()
    for _ in range(200):
        with meter.window("w"):
            pass
    # what is ours of it; 1 ms is 1 % of an epoch of 0.1 s
    assert (time.perf_counter() - start) / 200 < 1e-3


@pytest.mark.parametrize(("items", "kind"), [(-1, ValueError), (1.5, TypeError), ("9", TypeError), (True, TypeError)])
def test_bad_items(fake: Fake, items: object, kind: type[Exception]) -> None:
    fake.board()
    with pytest.raises(kind, match="items: expected"):
        fake.meter().window("w", items=items)  # type: ignore[arg-type]


def test_bad_cpu() -> None:
    with pytest.raises(ValueError, match="cpu: expected one of auto, off, require, got 'on'"):
        fg.EnergyMeter(cpu="on")


def test_nothing_to_meter(fake: Fake) -> None:
    with fake.meter("cpu", cpu="off").window("w") as w:
        fake.run(1)
    assert w.result.joules is None
    assert w.result.warnings == ("nothing is metered: no GPU was requested, and cpu is 'off'",)


def test_a_forked_child_does_not_end_its_parents_session(fake: Fake) -> None:
    fake.board()
    meter = fake.meter()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        meter.close()
        os.write(write, str(fake.references()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 10) == b"1"
    os.close(read)
