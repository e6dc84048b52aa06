"""The `headgate` command. `commands.py` holds the table of rooms; a room is a module with `add_arguments(parser)` and
`run(args)`.

Exit status: 0 done; 1 the thing asked failed; 2 bad usage; 130 interrupted with Ctrl-C; 143 ended by SIGTERM.
"""

# Nothing is imported up here: Ctrl-C counts from the first moment.
__all__ = ["BENCHMARKS", "COMMANDS", "Command", "main", "parser"]


def main(argv=None) -> int:
    """Runs one command and returns its exit status.

    `argv` without the program's name; None: sys.argv, and the process is the command's own: its signals are too.
    """
    if argv is not None:
        from .commands import run

        return run(argv)
    from .signals import install, leave

    handler = install()
    try:
        import sys

        from .commands import run

        status = run(sys.argv[1:], handler)
    finally:
        handler.working = False
    if status:
        leave(status)
    return status


def __getattr__(name: str):
    from importlib import import_module

    if name in __all__:
        return getattr(import_module(".commands", __name__), name)
    raise AttributeError(f"headgate.cli has no attribute {name!r}")
