"""The command ``uta-fx``: its entry point, which needs torch alone to say what is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a mistake of the user ends it with one sentence and status 2."""
    try:
        from uta_fx.commands import app

        app()
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"uta-fx: {error}", file=sys.stderr)
        sys.exit(2)
