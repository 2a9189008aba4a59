"""Whether a Slurm job goes back to the queue: asked by the scripts in slurm/ when their ranks have ended in order.

    scontrol show job "$SLURM_JOB_ID" | python -m distloop.commands.requeue answer --config configs/digits.yaml …

`answer` or `lost`: whether all nodes of the job answer, or one is lost. After it come the arguments of the run, in
whose directory it is found how the run ended. Exit code 0 says that the job is to be requeued, 3 that it is not.
Slurm's tools are not called from here: it may run in a container.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from distloop.config.load import load_config
from distloop.config.settings import path_of
from distloop.errors import UsageError
from distloop.ranks.stopping import StopReason
from distloop.run.files import STATUS

DONE = 3
TIME_IS_OVER = (StopReason.SIGUSR1, StopReason.SIGUSR2, StopReason.SLURM_LIMIT)


def decide(
    status: Mapping[str, Any], job: Mapping[str, str], max_requeues: int, node_lost: bool = False
) -> tuple[bool, str]:
    """Whether to requeue, and a line that says why or why not; no line where nothing is to be said.

    `status` is the run's status.json, `job` what `scontrol show job` says. SIGTERM alone is no reason to come
    back: it is what scancel sends.
    """
    restarts = int(job.get("Restarts", 0))
    ours = str(status.get("slurm_job")) == job.get("JobId") and status.get("slurm_restart") == restarts
    if not node_lost and (not ours or status.get("state") != "stopped"):
        return False, ""  # finished, failed, or never begun, since another one owns the run
    text, step, attempt = str(status.get("reason")), status.get("step"), int(status.get("attempt", 1))
    reason = StopReason.of(text)
    preempted = job.get("PreemptTime", "None") != "None"
    if job.get("JobState") != "RUNNING":
        return False, f"not requeued: Slurm is ending the job ({job.get('JobState')})"
    if not node_lost and not (reason in TIME_IS_OVER or (preempted and reason is StopReason.SIGTERM)):
        return False, f"not requeued: the run was stopped by {text}; the same sbatch command continues it"
    if job.get("Requeue") == "0":
        return False, "not requeued: the job was submitted with --no-requeue; the same sbatch command continues it"
    if restarts >= max_requeues:
        return False, f"not requeued: restarted {restarts} times already (stop.max_requeues)"
    if ours and attempt > 1 and step == status.get("first_step") and not preempted:
        return False, (
            f"not requeued: no progress, attempt {attempt} began and ended with step {step}. Give the job more time "
            "(--time), or save and start faster."
        )
    why = "a node is lost" if node_lost else "preempted" if preempted else text
    if step is None:
        return True, f"requeued before the run had begun ({why})"
    return True, f"requeued after step {step} of {status.get('total_steps')} ({why}); it continues there"


def main(arguments: list[str]) -> int:
    """Read Slurm's view of the job from standard input; print the decision; return the exit code."""
    job = dict(re.findall(r"(\w+)=(\S*)", sys.stdin.read()))
    job["JobId"] = os.environ.get("SLURM_JOB_ID", "")  # a task of an array is shown by its own number, too
    nodes, *arguments = arguments
    try:
        config = load_config(arguments, quiet=True)
        file = path_of(config) / STATUS
        status = json.loads(file.read_text()) if file.exists() else {}
    except SystemExit:  # --help, or a mistake on the command line: the ranks have answered it
        return DONE
    except (UsageError, OSError, ValueError) as error:
        print(f"distloop: not requeued: {error}", file=sys.stderr)
        return DONE
    requeue, line = decide(status, job, config.stop.max_requeues, nodes == "lost")
    if line:
        print(f"distloop: {line}", flush=True)
    return 0 if requeue else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
