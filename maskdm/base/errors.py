"""The errors that are the user's to mend: shown as one message, never as a traceback, and nothing in it obeyed."""


class UserError(Exception):
    """Something the user can put right: what was got, what was expected, what to do.

    The command line prints the message and exits with `exit_code`.

    Args:
        message: for the user.
        reason: what is wrong, alone, where callers need it.
    """

    exit_code = 1

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ParamsError(UserError):
    """params.yaml or a command-line argument is wrong: found before any work starts."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; the update of that step, and every later one, was not made."""


def printable(text: str, most: int = 300) -> str:
    """Text of unknown origin, such as a name out of an archive, as a message may show it.

    Args:
        text: what a terminal would obey in it, and what is not a character, is escaped.
        most: characters: it is cut in the middle if it has more.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
