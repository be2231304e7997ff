"""`python -m autosloth`: the commands."""

from __future__ import annotations

import sys

from .errors import INTERRUPTED


def main() -> None:
    """The console script; Ctrl-C ends it in the same way while the commands are still being imported."""
    try:
        from .cli import main as commands

        commands()
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
