"""The errors that are the user's to mend: shown as one message, never as a traceback."""


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
