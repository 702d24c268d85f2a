"""The console: standard output and error, which may be closed, full, or without a reader."""

import contextlib
import os
import sys


class ConsoleError(OSError):
    """Standard output cannot be written."""


class Console:
    """Standard output or error; ConsoleError where it cannot be written, but where it is not needed: that is said once.

    One that is not needed is tried again each time: a disk may have room again.
    """

    def __init__(self, stream, name, is_needed):
        self.stream, self.name, self.is_needed, self.has_failed = stream, name, is_needed, False

    def write(self, text):
        """Writes a text."""
        return self._attempt(self.stream.write, text)

    def flush(self):
        """Sends what was written to its reader."""
        self._attempt(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _attempt(self, function, *args):
        try:
            return function(*args)
        except OSError as error:
            if self.is_needed:
                raise ConsoleError(error.errno, error.strerror) from error
            if not self.has_failed:
                self.has_failed = True
                report(f"warning: {self.name} cannot be written ({error}); the run goes on without")


def open_console(is_needed):
    """Makes the process's standard output and error Consoles. is_needed: whether output that is lost is an error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (`>&-`): the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be UTF-8, and a terminal may lack a letter
    sys.stdout = Console(sys.stdout, "standard output", is_needed)
    sys.stderr = Console(sys.stderr, "standard error", is_needed=False)


def report(text):
    """Prints a text on standard error; where nobody reads that either, the exit code tells."""
    with contextlib.suppress(OSError):
        print(text.rstrip(), file=sys.stderr, flush=True)


def end(code, fault=None):
    """Ends the process with this exit code, or with 1 in place of 0 where not all that it printed could be written.

    By os._exit: a process group left open by an error can hang or crash the interpreter's shutdown. fault: the
    ConsoleError that ends it, if any.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        fault = fault or error
    if fault and not isinstance(fault.__cause__, BrokenPipeError):  # else its reader has read enough (`| head`)
        report(f"error: the output cannot be written ({fault}) and is not whole; make room, or write it elsewhere")
    os._exit(code or int(fault is not None))
