"""Exit codes of all commands; 0 is success."""

from typing import Final

CHECK_FAILED: Final = 1
BAD_INPUT: Final = 2
OUR_BUG: Final = 70
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141  # the reader of stdout is gone: 128 + SIGPIPE
