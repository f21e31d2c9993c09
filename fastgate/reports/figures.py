"""Figures of a run."""

from pathlib import Path

from fastgate.files import write_atomically
from fastgate.training.run_folder import read_history


def draw_energy(runs: dict[str, Path], path: Path) -> bool:
    """Draw joules and accuracy over the epochs of runs: cumulative energy, training and evaluation together.

    Args:
        runs: name -> run folder.
        path: the image to write; its suffix says the format.

    Returns:
        Whether there was anything to draw: without metered epochs no file is written.
    """
    histories = {name: read_history(folder) for name, folder in runs.items()}
    curves = {
        name: [(line["joules"]["total"], line["eval"]["accuracy"]) for line in history]
        for name, history in histories.items()
        if history and all(line.get("joules", {}).get("total") is not None for line in history)
    }
    if not curves:
        return False

    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    over_epochs, accuracy = figure.subplots(1, 2)
    for name, points in curves.items():
        joules = [total for total, _ in points]
        over_epochs.plot(range(1, len(points) + 1), joules, label=name)
        accuracy.plot(joules, [value for _, value in points], label=name)
    over_epochs.set(xlabel="epoch", ylabel="joules so far (training and evaluation)")
    accuracy.set(xlabel="joules so far", ylabel="accuracy")
    over_epochs.legend()
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=120))
    return True
