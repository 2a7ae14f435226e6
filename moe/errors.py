"""Errors meant for people: each names the value, the rule and the fix, and has its own exit code."""


class UserError(Exception):
    """A mistake that the user can mend. `exit_code` is what the entry points return to the shell."""

    exit_code = 1


class ConfigError(UserError):
    """A key, a value or a combination in the config that cannot work."""

    exit_code = 2


class DataError(UserError):
    """Data that is missing, unreadable, empty or not what the config says."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or made by another model."""

    exit_code = 4


# A run that was asked to stop (SIGTERM, Ctrl-C) and has saved its state: start it again to go on.
EXIT_PREEMPTED = 75
