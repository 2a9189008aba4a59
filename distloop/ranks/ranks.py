"""The processes that train together, from the point of view of one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import CodeType
from typing import Any

from distloop.errors import add_note
from distloop.ranks.attempt_base import AttemptBase
from distloop.ranks.digests import Digests
from distloop.ranks.out_of_memory import is_out_of_memory
from distloop.ranks.roll_call import RollCall
from distloop.ranks.stopping import StopReason, Watch, end_launcher
from distloop.ranks.talking import Result, from_main
from distloop.ranks.user_code import note_user_code
from distloop.ranks.verdicts import Verdict


class _NotOpen(AttemptBase):
    """The attempt until its run directory is open."""

    def __init__(self, roll_call: RollCall) -> None:
        self._roll_call = roll_call

    def cut_off(self, state: str, reason: str) -> None:
        self._roll_call.cut_off(state, reason)


class Ranks:
    """This process's rank, its position in the program, and the common end of all ranks. As a context it reports an
    error that leaves it, before an outer context closes anything: so all ranks learn which of them failed first."""

    def __init__(self, watch: Watch, code: CodeType | None = None) -> None:
        """`code`: that of the function with the training loop; messages name its lines."""
        self.watch = watch
        self.roll_call = RollCall(watch)
        watch.attempt = _NotOpen(self.roll_call)
        self.position = self.roll_call.position
        self.position.code, self.position.compares = code, int(os.environ.get("WORLD_SIZE", 1)) > 1
        self.digests = Digests()  # on rank 0: of the checkpoint from which the run may go on
        self.messages: list[str] = []  # for the console, which does not exist yet
        self.note: str | None = None  # on errors that a loop of another version may meet
        self.on_memory: Callable[[], str] | None = None  # what to set once memory runs out
        self.stopped_by: StopReason | None = None
        self.names: dict[str, str] = {}  # of data, model and task in the config, by their keys
        self.noted: BaseException | None = None

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
        """Call `function` on rank 0 and return its result on all ranks. Collective; see talking.from_main()."""
        return from_main(function, self.position)

    def still_at_work(self) -> None:
        """On rank 0, while the others wait for it: it is at work, and does not count as a rank that hangs."""
        self.position.enter(self.position.phase)

    def report_failure(self, error: BaseException) -> Verdict:
        """Tell the other ranks of `error`. Returns why the run ends, which one rank prints: the same on all ranks."""
        if self.note and isinstance(error, (AttributeError, ImportError, TypeError)):
            error.add_note(self.note)
            self.note = None  # it is told again when outer contexts close
        if error is not self.noted:
            self.noted = error
            note_user_code(error, self.position, self.names)
            if self.on_memory is not None and is_out_of_memory(error):
                add_note(error, f"out of memory: {self.on_memory()}")
        return self.roll_call.report_failure(error)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.report_failure(error)

    def exit_code(self, function: Callable[[], Any]) -> int:
        """Call `function`, as all ranks do; returns this process's exit code: 0, or that of the first failure.
        Without a failure the process group ends in order, and after a stop by a signal the launcher, too."""
        try:
            function()
            if self.stopped_by is not None:
                end_launcher(self.stopped_by, os.environ)
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException as error:
            return self.report_failure(error).code
        finally:
            self.roll_call.close()
        return 0
