import io

from rich.console import Console

from fastgate.training.progress import RunProgress


def shown(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with RunProgress("resnet8 layer", total_steps=4, done_steps=2, console=console) as progress:
        progress.step()
        progress.note("epoch 1/2 loss 0.5000")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_has_a_live_bar_below_the_lines() -> None:
    text = shown(terminal=True)
    assert "resnet8 layer: epoch 1/2 loss 0.5000" in text
    assert "3/4" in text and "━" in text and "\x1b[" in text


def test_elsewhere_there_are_plain_lines_only() -> None:
    assert shown(terminal=False) == "resnet8 layer: epoch 1/2 loss 0.5000\n"
