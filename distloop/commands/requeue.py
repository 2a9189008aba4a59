"""Decide whether a Slurm job goes back to the queue. The scripts in slurm/ call it after their ranks have ended.

    scontrol show job "$SLURM_JOB_ID" | python -m distloop.commands.requeue answer --config configs/digits.yaml …

The first argument: `answer` if all nodes of the job answer, `lost` if a node is lost. The others are the run's, whose
directory says how the run ended. Exit code 0: requeue the job; 3: do not. It calls none of Slurm's tools, which a
container may lack.
"""

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
    """(whether to requeue, a line that says why or why not). The line is "" if the run has not stopped in this job.

    `status`: the content of the run's status.json. `job`: the fields of `scontrol show job`. SIGTERM without a
    preemption is no reason to requeue, since scancel sends it.
    """
    restarts = int(job.get("Restarts", 0))
    ours = str(status.get("slurm_job")) == job.get("JobId") and status.get("slurm_restart") == restarts
    preempted = job.get("PreemptTime", "None") != "None"
    not_begun = preempted and not ours  # the ranks were still starting, or loading their data
    if not node_lost and not not_begun and (not ours or status.get("state") != "stopped"):
        return False, ""  # it has finished or failed, or never began, since another job owns the run
    text, step, attempt = str(status.get("reason")), status.get("step"), int(status.get("attempt", 1))
    reason = StopReason.SIGTERM if not_begun else StopReason.of(text)
    if job.get("JobState") != "RUNNING":
        return False, f"not requeued: Slurm is ending the job ({job.get('JobState')})"
    if not node_lost and not (reason in TIME_IS_OVER or (preempted and reason is StopReason.SIGTERM)):
        return False, f"not requeued: the run was stopped by {text}; the same sbatch command continues it"
    if job.get("Requeue") == "0":
        return False, "not requeued: the job was submitted with --no-requeue; the same sbatch command continues it"
    if restarts >= max_requeues:
        return False, f"not requeued: restarted {restarts} times already (stop.max_requeues)"
    if ours and attempt > 1 and step == status.get("first_step") and not preempted:
        advice = "Give the job more time (--time), or save and start faster."
        return False, f"not requeued: no progress, attempt {attempt} began and ended with step {step}. {advice}"
    why = "a node is lost" if node_lost else "preempted" if preempted else text
    if step is None:
        return True, f"requeued before the run had begun ({why})"
    return True, f"requeued after step {step} of {status.get('total_steps')} ({why}); it continues there"


def main(arguments: list[str]) -> int:
    """Read the job from standard input, print the decision, return the exit code."""
    job = dict(re.findall(r"(\w+)=(\S*)", sys.stdin.read()))
    job["JobId"] = os.environ.get("SLURM_JOB_ID", "")  # Slurm shows the task of an array with two numbers
    nodes, *arguments = arguments
    try:
        config = load_config(arguments, quiet=True)
        file = path_of(config) / STATUS
        status = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except SystemExit:  # --help: the ranks have printed the answer
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
