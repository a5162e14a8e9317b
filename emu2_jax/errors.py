"""The one kind of error that is the user's to fix.

Every module raises `UserError` (or a subclass) for bad input. The command line prints its message as one line and
exits with code 2; any other exception is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: the message says what was wrong, where, what was wanted and, if there is one, the next step."""

    on_all_hosts = False  #: whether every host of a run raises it at the same place, so that they can end in good order


class ConfigError(UserError):
    """A config path, value or combination is not valid. The message starts with the dotted path."""


class DataError(UserError):
    """A shard, member or sample cannot be used. The message names the file, the member and the byte offset."""


class CheckpointError(UserError):
    """A work directory or checkpoint cannot be used for what was asked."""


class HostsError(UserError):
    """The hosts of a run do not come together, or are not alike. Raised on all of them."""

    on_all_hosts = True


class WeightsError(UserError):
    """A weight file cannot be used. The message names the file, and the tensor where there is one."""


class NotFiniteError(UserError):
    """A network gave numbers that are not finite. The message names the network."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
