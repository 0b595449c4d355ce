"""Text of unknown origin, such as a file's name out of an archive, as a message may show it."""

from __future__ import annotations

MOST = 300  # characters: what is longer tells nobody more


def printable(text: str, most: int = MOST) -> str:
    """Text without what a terminal would obey, or what is no character: escaped; cut in its middle if too long."""
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
