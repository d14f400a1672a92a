"""Exit codes, the same for every command; 0 is fine."""

from typing import Final

CHECK_FAILED: Final = 1
BAD_INPUT: Final = 2
OUR_BUG: Final = 70
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141  # the reader of stdout went away: 128 + SIGPIPE
