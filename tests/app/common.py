"""What the tests of the demo share: a short run."""

from mixture_torch.__main__ import main

BRIEF = ("--epochs", "2", "--batch-size", "128", "--device", "cpu")
EPOCH = 1797 // 128  # steps
STEPS = 2 * EPOCH


def demo(*arguments: str) -> int:
    """Runs a short demo and returns its exit code."""
    return main(["demo", *BRIEF, *arguments])
