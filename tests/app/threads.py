"""The command line in a process that tells which threads it leaves: `python -m tests.app.threads demo`."""

import sys
from pathlib import Path

from mixture_torch.__main__ import main


def running() -> list[str]:
    """Names of this process's threads, on Linux."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    print("Left:", *sorted(running()))
    sys.exit(code)
