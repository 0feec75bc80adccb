"""``python -m minigpt4``: the same as the ``minigpt4`` command."""

from __future__ import annotations

import sys

from minigpt4.cli import main

if __name__ == "__main__":
    sys.exit(main())
