"""Where the command `qcompress` starts: Ctrl-C and closed streams are looked after before anything else is imported.

At its top stands only what Python has loaded by then, or loads within a millisecond.
"""

import os
import signal
import sys
from types import FrameType

_BAD_INPUT, _INTERRUPTED = 2, 130  # as in `exits`


def main() -> None:
    """Entry point of the console script; exits."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, _interrupted)
    _fill_closed_streams()
    if sys.stdout is None:
        sys.stderr.write("error: stdout is closed, and results go there: redirect it to a file or to /dev/null.\n")
        sys.exit(_BAD_INPUT)
    for stream in (sys.stdout, sys.stderr):  # a σ must not end a command on a terminal that has none
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run the command line and return its exit code; nothing is raised."""
    try:
        from qcompress_cli import app

        return app.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. An import that is broken off can print a traceback, or turn into another error: it ends at once."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _fill_closed_streams() -> None:
    """Open what the caller closed: no file of ours may get the number of a stream that a library writes to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    main()
