"""How many examples hypothesis tries: `make test-all` tries all of them, `make test` a third."""

from typing import Any, Final

import hypothesis

THOROUGH: Final = 60  # examples of a test that does not say how many


def examples(count: int, **options: Any) -> hypothesis.settings:
    """Return settings for a test with some number of examples; to be used like `hypothesis.settings`."""
    share = hypothesis.settings.default.max_examples / THOROUGH
    return hypothesis.settings(max_examples=max(1, round(share * count)), **options)
