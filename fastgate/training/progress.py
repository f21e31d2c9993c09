"""The progress of a long run: one line per epoch, and in a terminal a live bar below."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastgate import processes


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Stop printing, where Rich would end the process: training continues even if nobody reads the output."""
        self.quiet = True


class RunProgress:
    """Progress over the steps of one run; use as a context manager.

    Args:
        title: name of the run.
        total_steps: steps of the whole run.
        done_steps: steps already done, in a resumed run.
        console: the console to draw on; default: standard error of the main process.
    """

    def __init__(self, title: str, total_steps: int, done_steps: int = 0, console: Console | None = None) -> None:
        self.console = console or _Console(stderr=True, quiet=not processes.is_main())
        self.title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total_steps, completed=done_steps)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self) -> None:
        """Advance by one training step."""
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(f"{self.title}: {text}", highlight=False, soft_wrap=True)
