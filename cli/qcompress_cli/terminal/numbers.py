"""Formats numbers for tables and sentences."""

from collections.abc import Sequence


def number(value: float | None) -> str:
    """Return three significant digits, all digits from 100 to a million; a dash for None.

    >>> number(-0.012345), number(1234.5), number(None), number(0.0), number(0.0000123), number(2e9)
    ('-0.0123', '1,234', '–', '0', '1.2e-05', '2e+09')
    """
    if value is None:
        return "–"
    if 100 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.2g}" if "e" in text else text


def share(value: float | None) -> str:
    """Return a share in percent; it is 0 only if it is exactly 0.

    >>> share(0.00271), share(0.0), share(0.0000003), share(None)
    ('0.27', '0', '<0.01', '–')
    """
    if value is None:
        return "–"
    percent = 100 * value
    if percent == 0:
        return "0"
    return "<0.01" if percent < 0.005 else f"{percent:.2f}"


def told_apart(error: float, limit: float) -> tuple[str, str]:
    """Return an error and its limit with enough digits to see which is larger.

    >>> told_apart(2.31e-7, 1e-4), told_apart(1.0004e-4, 1e-4), told_apart(0.0, 0.0)
    (('2.3e-07', '0.0001'), ('0.00010004', '0.0001'), ('0', '0'))
    """
    for digits in (2, 3, 5, 9, 17):
        shown = f"{error:.{digits}g}", f"{limit:.{digits}g}"
        if shown[0] != shown[1] or error == limit:
            break
    return shown


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text.

    >>> shape_text((16, 3, 3, 3)), shape_text(())
    ('16x3x3x3', 'scalar')
    """
    return "x".join(str(n) for n in shape) or "scalar"


def counted(count: int, word: str) -> str:
    """Return a count with its noun.

    >>> counted(1, "weight"), counted(2300, "weight")
    ('1 weight', '2,300 weights')
    """
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
