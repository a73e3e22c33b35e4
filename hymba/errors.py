"""Errors whose message is meant for the user: one line, what was wrong and what to do."""


class UserError(ValueError):
    """A mistake in the user's input. The command line prints it without a traceback, exit 2."""
