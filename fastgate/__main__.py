"""The `fastgate` command, and `python -m fastgate`."""

import sys
from typing import Any


def main() -> Any:
    """Run the command line; if a dependency is missing, print a one-line error."""
    try:
        from fastgate.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed; the command line needs `pip install 'fastgate[train]'`",
            file=sys.stderr,
        )
        sys.exit(2)
    return run()


if __name__ == "__main__":
    main()
