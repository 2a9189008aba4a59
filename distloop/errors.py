"""What ends a run with one message instead of a traceback."""


class UsageError(Exception):
    """Something the user can put right: shown as one message without a traceback, exit code 2.

    The message says what was wrong, where, and what to do. It takes a single string, so that a DataLoader
    worker can raise it in its parent (torch rebuilds exceptions from their message alone).
    """

    def __str__(self) -> str:
        text = super().__str__()
        # A DataLoader worker's exception arrives as "Caught UsageError in … Original Traceback …": the
        # last part after our own name is the message itself.
        marker = f"{type(self).__name__}: "
        return text.rsplit(marker, 1)[-1].strip() if text.startswith("Caught ") else text


class RunFailed(Exception):
    """The end of a run that is nobody's mistake on the command line, and known well enough to need no traceback:
    shown as one message, exit code 1."""


class Unanswered(RunFailed):
    """Rank 0, which would say what is wrong, does not answer itself."""


def suggest(word: str, known: list[str]) -> str:
    """ " Did you mean 'x'?" for the nearest of `known`, or the list of them when it is short."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(sorted(known))}." if len(known) <= 20 else ""
