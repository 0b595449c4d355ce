"""The errors that are the user's to mend: shown as one message, never as a traceback."""


class UserError(Exception):
    """Something the user can put right: what was got, what was expected, what to do.

    The command line prints the message and exits with `exit_code`.
    """

    exit_code = 1


class ParamsError(UserError):
    """params.yaml or a command-line argument is wrong: found before any work starts."""

    exit_code = 2
