"""A random walk of windows over all faults of boards and packages: `python -m tests.energy.walk WINDOWS [SEED]`.

Every window, and every lap in it, is compared with what was really used between its boundaries.
"""

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fastgate.energy import Energy, EnergyError, EnergyMeter, rapl
from fastgate.energy.sources import NvmlCounter, Sampler, Source
from tests.energy.fake import T4, T4_TOO, Fake, build

# chance of a fault, or of the end of one, in each of the one to twelve stretches of a window
FAULTS = 0.1
RANGE = 65_532_610_987  # microjoules, of AMD's counters
# a counter of millijoules is read twice, and checked by a power in milliwatts
JOULES, WATTS = 0.002, 0.001


class Machine:
    """Two boards, or one without a counter, or a CPU package; each may be at fault in the ways that have been seen."""

    def __init__(self, kind: str, fake: Fake, chance: random.Random, folder: Path, faults: float, steady: bool) -> None:
        self.kind, self.fake, self.chance, self.rate, self.steady = kind, fake, chance, faults, steady
        self.boards = {"boards": 2, "no counter": 1, "package": 0}[kind]
        for identity in (T4, T4_TOO)[: self.boards]:
            fake.board(identity, chance.uniform(5, 70), counter=kind == "boards", tick=0.1)
        self.watts = chance.uniform(5, 200)
        self.used = 0.0  # joules of the package
        self.counted = chance.uniform(0, RANGE)
        self.zone = folder / "intel-rapl:0"
        # the file of the package: whether it is unreadable, what it shows, how far back the next reading will be
        self.gone, self.shown, self.back = False, 0, 0
        self.moved = False  # its counter, since it was read: two faults that undo one another nobody could see
        if kind == "package":
            self.zone.mkdir(parents=True)
            (self.zone / "name").write_text("package-0")
            (self.zone / "max_energy_range_uj").write_text(str(RANGE))
            self.show()
        self.sampled: list[Source] = []

    def true_joules(self) -> float:
        return self.used + sum(self.fake.true_mj(i) for i in range(self.boards)) / 1e3

    def show(self) -> None:
        self.shown = self.shown - self.back if self.back else int(self.counted) % RANGE
        (self.zone / "energy_uj").write_text("" if self.gone else str(max(self.shown, 0)))
        self.back = 0

    def run(self, seconds: float) -> None:
        """Let time pass; boards and packages are read meanwhile, most of the time."""
        while seconds > 0:
            step = seconds
            if self.kind == "no counter":
                step = min(seconds, self.chance.uniform(0.2, 3) if self.chance.random() < self.rate / 5 else 0.05)
            elif self.kind == "package":
                step = min(seconds, 0.001 if seconds < 0.02 else rapl.RaplPackage.sample_seconds)
            else:
                late = self.chance.random() < self.rate / 20
                step = min(seconds, self.chance.uniform(0.2, 3) if late else NvmlCounter.sample_seconds)
            self.fake.run(step)
            self.used += step * self.watts * (self.kind == "package")
            self.counted += step * self.watts * 1e6
            seconds -= step
            if self.kind == "package":
                self.show()
            for source in self.sampled:
                with suppress(EnergyError):
                    source.read()
                    self.moved = False

    def change_power(self) -> None:
        self.watts = self.chance.uniform(5, 200)
        for i in range(self.boards):
            self.fake.set_watts(i, self.chance.uniform(5, 70))

    def go_wrong(self) -> None:
        """One fault, or the end of one."""
        fake, chance = self.fake, self.chance
        if self.kind == "package":
            chance.choice([self.reset_package, self.step_back, self.jump_package, self.sleep, self.lose_package])()
            return
        i = chance.randrange(self.boards)
        faults: list[Callable[[], None]] = [
            lambda: fake.glitch_power(i, chance.choice([2**32 - 1, 0])),
            lambda: fake.set_slowness_us(chance.choice([0, 0, 20_000, 100_000, 700_000])),
            lambda: fake.set_error(i, chance.choice([0, 0, 15, 999])),
        ]
        if self.kind == "boards":
            faults += [
                lambda: fake.set_counter_mj(i, chance.choice([0, chance.uniform(0, 1e6)])),
                lambda: fake.set_counter_mj(i, fake.exact_mj(i) + 10 ** chance.uniform(-1, 9.7)),
                lambda: fake.set_counter_mj(i, max(fake.exact_mj(i) - 10 ** chance.uniform(0, 6), 0)),
                lambda: fake.set_stalled(i, chance.choice([0, 1])),
                lambda: fake.glitch_energy(i, chance.choice([2**64 - 1, 2**32 - 1, 0, chance.randrange(10**8)])),
            ]
        chance.choice(faults)()

    def mend(self) -> None:
        """Nothing is at fault from now on."""
        self.fake.set_slowness_us(0)
        for i in range(self.boards):
            self.fake.set_error(i, 0)
            self.fake.set_stalled(i, 0)
        self.gone = False

    def reset_package(self) -> None:
        """To 0, though not before it shows what is used in a second: that nobody could see."""
        if self.counted % RANGE > 1e9 and not self.moved:
            self.counted, self.moved = 0.0, True
        self.show()

    def step_back(self) -> None:
        """The next reading is below the one before, if that could be read."""
        self.back = 0 if self.gone else round(10 ** self.chance.uniform(0, 9))

    def jump_package(self) -> None:
        """By more than a package may have used since it was last read, and by less than a turn of the counter."""
        if not self.moved:
            self.counted += 10 ** self.chance.uniform(9.5, 10.5)
            self.moved = True
        self.show()

    def sleep(self) -> None:
        """Long enough to wrap, perhaps more than once; nobody reads meanwhile."""
        seconds = self.chance.uniform(60, 1500)
        self.fake.run(seconds)
        self.used += seconds * self.watts
        self.counted += seconds * self.watts * 1e6
        self.show()

    def lose_package(self) -> None:
        self.gone, self.back = not self.gone, 0
        self.show()


def walk(
    fake: Fake, seed: int, windows: int, kind: str, *, faults: float = FAULTS, steady: bool = True
) -> Counter[str]:
    """What became of so many windows and of the laps in them.

    Args:
        kind: of machine.
        faults: chance of a fault, or of the end of one, in each stretch of a window.
        steady: the power changes between windows only, so that the power at both edges is that of the window.
    """
    chance = random.Random(f"{kind} {seed}")
    fake.reset()
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rapl, "ROOT", Path(folder))
        patch.setattr(Sampler, "ensure_running", lambda self: None)  # its thread would run in real time
        machine = Machine(kind, fake, chance, Path(folder), faults, steady)
        with ticking(machine):
            meter = fake.meter("cpu" if kind == "package" else None)
        machine.sampled = meter.sources
        machine.run(100)
        while sum(verdicts.values()) < windows:
            for energy, true_joules in one_window(meter, machine):
                verdict = judge(energy, true_joules)
                verdicts[verdict] += 1
                if verdict.startswith("WRONG"):
                    print(f"{kind}, seed {seed}: {verdict}: true {true_joules}, said {energy}")
        meter.close()
    return verdicts


@contextmanager
def ticking(machine: Machine) -> Iterator[None]:
    """The package counts while the meter learns how often its counter is renewed."""
    sleep = machine.fake.clock.sleep
    machine.fake.clock.sleep = machine.run if machine.kind == "package" else sleep  # type: ignore[method-assign]
    yield
    machine.fake.clock.sleep = sleep  # type: ignore[method-assign]


def one_window(meter: EnergyMeter, machine: Machine) -> Iterator[tuple[Energy, float]]:
    """Work in a window with a lap or two, each with what was really used."""
    chance = machine.chance
    if chance.random() < 0.3:
        machine.mend()
    machine.change_power()
    machine.run(chance.choice([0.3, 2.0]) if machine.steady else chance.choice([0.0, 0.3, 2.0]))
    window = meter.begin("walk")
    begin = start = machine.true_joules()
    for _ in range(chance.choice([1, 1, 2, 3])):
        if start != begin or window.laps:
            used = machine.true_joules() - start
            yield window.lap(), used
            start = machine.true_joules()
        for _ in range(chance.choice([1, 2, 4])):
            machine.run(10 ** chance.uniform(-2, 1.5))
            if not machine.steady and chance.random() < 0.5:
                machine.change_power()
            if chance.random() < machine.rate:
                machine.go_wrong()
    used = machine.true_joules() - begin
    yield window.end(), used


def judge(energy: Energy, true_joules: float) -> str:
    """One word for a result."""
    if energy.microjoules is not None and energy.microjoules < 0:
        return "WRONG negative"
    if energy.joules is None:
        return "unknown, and why" if energy.warnings else "WRONG unknown without a reason"
    if energy.joules == 0:
        return "WRONG zero"
    bound = energy.error_bound_joules
    resolution = (JOULES + WATTS * energy.seconds) * len(energy.per_device)
    if bound is not None and abs(energy.joules - true_joules) <= bound + resolution:
        return "right" + (", warned" if energy.warnings else "")
    return "outside its bound, warned" if energy.warnings else "WRONG outside its bound without a warning"


def main() -> None:
    """Print the figures of a walk of every kind of machine, with steady and with changing power."""
    windows, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        fake = Fake(build(Path(folder)))
        fake.install()
        for steady in (True, False):
            for kind in ("boards", "no counter", "package"):
                verdicts = walk(fake, seed, windows, kind, faults=FAULTS, steady=steady)
                power = "steady" if steady else "changing"
                print(f"{kind}, {power} power: {dict(sorted(verdicts.items()))}")
        fake.uninstall()


if __name__ == "__main__":
    main()
