"""Entry point of the command `qcompress`: prepares for signals and closed streams before anything else is imported.

It imports only modules that Python has loaded already, or loads within a millisecond.
"""

import os
import signal
import sys
from types import FrameType

_BAD_INPUT, _INTERRUPTED = 2, 130  # as in `exits`


def main() -> None:
    """Entry point of the console script; exits."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:  # else the caller wants it ignored
            signal.signal(number, _interrupted)
    _fill_closed_streams()
    if sys.stdout is None:
        sys.stderr.write("error: stdout is closed, but results go there; redirect it to a file or to /dev/null.\n")
        sys.exit(_BAD_INPUT)
    for stream in (sys.stdout, sys.stderr):  # a σ must not end a command on a terminal that cannot show it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run the command line and return its exit code; this never raises."""
    try:
        from qcompress_cli import app

        return app.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C and SIGTERM, so that what is half written is removed.

    During an import it exits at once: a broken import can raise or print something else.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _fill_closed_streams() -> None:
    """Open the streams that the caller closed, so that no file of ours gets the number of a standard stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # this takes the lowest free number, which is `number`
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    main()
