"""Errors that end a run with one message instead of a traceback."""


class UsageError(Exception):
    """A mistake that the user can correct: printed as one message, exit code 2.

    The message says what is wrong, where, and what to do. The only argument is the message, since torch raises the
    exception of a DataLoader worker again from its message alone.
    """

    def __str__(self) -> str:
        text = super().__str__()
        # From a DataLoader worker the text is "Caught UsageError in … Original Traceback … UsageError: MESSAGE".
        marker = f"{type(self).__name__}: "
        return text.rsplit(marker, 1)[-1].strip() if text.startswith("Caught ") else text


class RunFailed(Exception):
    """A failure with a known cause that is no mistake of the user: printed as one message, exit code 1."""


class Unanswered(RunFailed):
    """Rank 0 does not answer, so that another rank has to say what is wrong."""


class StoppedEarly(Exception):
    """The run is asked to stop before it has begun: printed as one message, exit code 0. Nothing is lost."""


NOTE = "distloop: "  # the first word of what distloop notes on an error


def add_note(error: BaseException, text: str) -> None:
    """Note on an error of the user's code what is known of it: the note follows the error's message in a traceback,
    also in that which comes from a loader process. What is a message for the user is left alone."""
    if not isinstance(error, (UsageError, RunFailed, StoppedEarly)):
        error.add_note(f"{NOTE}{' '.join(text.split())}")  # one line, by which it is found again


def suggest(word: str, known: list[str]) -> str:
    """ " Did you mean 'x'?" with the word of `known` nearest to `word`, else the list of them if it is short."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(sorted(known))}." if len(known) <= 20 else ""
