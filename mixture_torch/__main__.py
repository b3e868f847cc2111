"""The command line: `mixture-diagnostics`, and `python -m mixture_torch`."""

import sys

INSTALL = 'pip install "mixture-diagnostics[demo]", or "mixture-diagnostics[cli]" without the demo'


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: The words after the program's name; None takes them from the process.
    """
    try:
        from mixture_torch.app.cli import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"Error: the command line needs {missing}: {INSTALL}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it imports, which takes seconds
        return 130
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
