"""Text from files that one does not trust, made safe for a terminal."""


def printable(text: str) -> str:
    r"""The text with everything that a terminal would act on (escape sequences, bells) written out; newlines stay.

    >>> printable("conv1.\x1b[31mweight")
    'conv1.\\x1b[31mweight'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
