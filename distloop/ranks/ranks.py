"""The processes of a run, as one of them sees them."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

from distloop.ranks.roll_call import RollCall
from distloop.ranks.stopping import StopReason, Watch, end_launcher
from distloop.ranks.talking import from_main
from distloop.ranks.verdicts import Verdict

Result = TypeVar("Result")


class Ranks:
    """Who this process is among the others, where it is in the program, and how all of them end.

    A context: an error that leaves it is reported at once, before anything else is closed, so that all ranks learn
    which of them failed first.
    """

    def __init__(self, watch: Watch, code: CodeType | None = None) -> None:
        """`code`: that of the function whose lines tell where this rank is."""
        self.watch = watch
        self.roll_call = RollCall(watch)
        self.position = self.roll_call.position
        self.position.code = code
        self.messages: list[str] = []  # to be said when the console is there
        self.stopped_by: StopReason | None = None

    @property
    def rank(self) -> int:
        """This process's number; 0 before the ranks have met."""
        return self.roll_call.rank

    @property
    def world_size(self) -> int:
        return self.roll_call.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, called on rank 0 alone; a UsageError or RunFailed of it is raised on all ranks."""
        return from_main(function, self.position)

    def still_at_work(self) -> None:
        """Rank 0 is at work, although the others wait for it: it counts as moving."""
        self.position.enter(self.position.phase)

    def report_failure(self, error: BaseException) -> Verdict:
        """Why the run ends, when this rank has met `error`: all ranks agree on it, and it is said once."""
        return self.roll_call.report_failure(error)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.report_failure(error)

    def part(self) -> None:
        """The end of a run without failure: give up the process group, and end the launcher if a signal stopped us."""
        if self.stopped_by is not None:
            end_launcher(self.stopped_by, os.environ)
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def exit_code(self, function: Callable[[], Any]) -> int:
        """Call what all ranks do together; returns the exit code of this process: 0, or that of the first failure."""
        try:
            function()
            self.part()
        except BaseException as error:
            return self.report_failure(error).code
        finally:
            self.roll_call.close()
        return 0
