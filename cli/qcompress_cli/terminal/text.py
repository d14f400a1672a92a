"""Makes text from untrusted files safe for a terminal."""


def printable(text: str) -> str:
    r"""Return the text with everything that a terminal acts on (escape sequences, bells) written out; newlines stay.

    >>> printable("conv1.\x1b[31mweight")
    'conv1.\\x1b[31mweight'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
