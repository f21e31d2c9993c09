"""Gates over the epochs: a picture with a row per layer, a column per epoch, the open ratio as colour."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgate.files import write_atomically


def draw_gate_map(maps: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw maps side by side, on one colour scale.

    Args:
        maps: each with its `name`, the `first_epoch` (counted from 1), `open_ratios` `[epochs][layers]` from 0 to 1 and
            `changes`, how many epochs lay before lambda changed, marked by pink lines.
        title: of the figure.
        path: the image to write; its suffix says the format.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3 + 2.4 * len(maps), 4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, one in zip(axes, maps, strict=True):
        layers_by_epochs = list(zip(*one["open_ratios"], strict=True))
        layers, epochs, start = len(layers_by_epochs), len(one["open_ratios"]), one["first_epoch"] - 0.5
        image = axis.imshow(
            layers_by_epochs,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=1,
            extent=(start, start + epochs, layers + 0.5, 0.5),
        )
        axis.set(title=one["name"], xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        for index, epochs_before in enumerate(one["changes"]):
            axis.axvline(epochs_before + 0.5, color="deeppink", linewidth=2, label=None if index else "λ changes")
        if one["changes"]:
            axis.legend(loc="lower right", fontsize="small")
    axes[0].set_ylabel("residual layer")
    figure.colorbar(image, ax=list(axes), label="open ratio over the training images")
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=120))
