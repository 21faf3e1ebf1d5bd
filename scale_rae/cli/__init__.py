"""The command line: `scale-rae …`, or `python cli.py …` in a checkout.

Nothing heavy is imported until a command needs it, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code.

    0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted.
    """
    try:
        from scale_rae.cli.app import run

        return run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
