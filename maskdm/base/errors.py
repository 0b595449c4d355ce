"""Errors that the user can fix: shown as one message, without a traceback or terminal control characters."""


class UserError(Exception):
    """An error that the user can fix; its message says what was got, what was expected and what to do.

    The command line prints the message and exits with `exit_code`.

    Args:
        message: the message for the user.
        reason: only what is wrong, for callers that write a message of their own.
    """

    exit_code = 1

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ParamsError(UserError):
    """params.yaml or a command-line argument is wrong; raised before any work starts."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; neither the update of that step nor any later one was made."""


def printable(text: str, most: int = 300) -> str:
    """Text of unknown origin, such as a file name from an archive, safe to show in a terminal.

    Args:
        text: the text; control characters and undecodable bytes are escaped.
        most: the largest number of characters; a longer text is cut in the middle.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
