"""The base of all errors that are meant for a person."""


class ReplicaError(Exception):
    """Something was refused or has failed; ``str(error)`` is ONE sentence for the user.

    The sentence says what was wrong, where (file and key, option, peer) and what to do. It is shown as it
    is: on the standard error of a command, in the log, or as the answer of the daemon. It never holds a
    traceback. Every module derives its own errors from this class.
    """


class Refused(ReplicaError):
    """A verb that cannot be carried out as things are."""
