"""The command line: `mixture-diagnostics`, and `python -m mixture_torch`."""

import sys

EXTRAS = ("typer", "rich", "sklearn")
VIEWS = {"plot": "cli,plot", "report": "cli,report", "watch": "cli"}  # commands that need no more than these extras


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: The words after the program's name; None takes them from the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if extra := VIEWS.get(next(iter(words), "")):
            from mixture_torch.app.view import run
        else:
            from mixture_torch.app.cli import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRAS:
            raise
        command = f'pip install "mixture-diagnostics[{extra or "demo"}]"'
        print(f"Error: the command line needs {missing}: {command}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it imports, which takes seconds
        return 130
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
