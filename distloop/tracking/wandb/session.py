"""The calls of wandb: import it, begin a W&B run, describe it and end it."""

import contextlib
import os
from pathlib import Path
from typing import Any

from distloop.config.yaml_text import parse_yaml
from distloop.run.accounts import goodput, totals
from distloop.run.files import CONFIG, ENVIRONMENT, GIT_DIFF, STATUS, read_json

# Variables that a job or a W&B agent may have set: for another run, for how it is logged, for what wandb prints.
VARIABLES_TO_DROP = (
    *("RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SWEEP_ID", "SWEEP_PARAM_PATH", "SERVICE", "MODE", "DIR"),
    *("SILENT", "QUIET", "SHOW_INFO", "SHOW_WARNINGS", "SHOW_ERRORS"),
)


class WandbError(Exception):
    """W&B cannot be used; the message says why, in one line."""


def import_wandb() -> Any:
    """The module wandb, after the environment has been set for it. Raises WandbError if it cannot be imported."""
    for name in VARIABLES_TO_DROP:
        os.environ.pop(f"WANDB_{name}", None)
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # telemetry would delay the end
    # wandb writes rows to the disk within a second, not within fifteen.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    try:
        import wandb
    except Exception as error:  # it is not installed, or broken
        raise WandbError(f"wandb cannot be imported ({one_line(error)})") from None
    return wandb


def begin(wandb: Any, folder: Path, settings: dict[str, Any], mode: str, seconds: float, **resume: Any) -> Any:
    """Begin or continue a W&B run within so many seconds; returns wandb's run. Raises what wandb raises.

    `folder`: the run directory. `settings`: the section `tracking` of its config. `mode`: online | offline. `resume`:
    the arguments of wandb.init that name the run.
    """
    return wandb.init(
        mode=mode,
        dir=str(folder),
        **{key: settings[key] for key in ("project", "entity", "group", "notes")},
        tags=settings["tags"] or None,
        name=folder.resolve().name,
        settings=wandb.Settings(
            init_timeout=max(1.0, seconds),
            finish_timeout=settings["end_seconds"],
            finish_timeout_raises=True,
            # wandb would record argv, environment, git remote and output, which may hold secrets. We log our own.
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            console="off",
            quiet=True,
            x_stats_pid=os.getppid(),
        ),
        **resume,
    )


def describe(run: Any, folder: Path) -> None:
    """Give the W&B run the config, versions, commit and uncommitted changes that the run directory holds."""
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    config = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    config["environment"] = read_json(folder / ENVIRONMENT)
    run.config.update(config, allow_val_change=True)
    if (folder / GIT_DIFF).exists():
        run.save(str(folder / GIT_DIFF), base_path=str(folder), policy="now")


def end(run: Any, folder: Path, state: str, limit_seconds: float, output: Any) -> str | None:
    """End the W&B run: finished, stopped (to be continued) or failed. Returns why not all data arrived, or None.

    `output`: the stream that has received what wandb prints.
    """
    seconds, best = totals(folder), read_json(folder / STATUS).get("best") or {}
    summary = {"state": state, "goodput": goodput(seconds)}
    summary |= {f"time/{account}_seconds": value for account, value in seconds.items()}
    summary |= {f"best/{name}": value for name, value in best.items() if isinstance(value, (int, float))}
    run.summary.update(summary)
    if state == "stopped":
        run.mark_preempting()  # with an exit code other than 0, W&B shows the run as preempted
    try:
        run.finish(exit_code=0 if state == "finished" else 1)
    except TimeoutError:
        return f"the server did not take everything within {limit_seconds:g} s"
    lines = output.getvalue().splitlines()
    if any("not be synced" in line for line in lines):  # finish() returns as if all were well
        reasons = [line.removeprefix("wandb: ")[:200] for line in lines if "encountered" in line]
        return "the server did not take everything" + (f" ({reasons[-1]})" if reasons else "")
    return None


def tear_down(wandb: Any) -> None:
    """End wandb's own process. It would refuse to begin a run with an id that it has in use."""
    with contextlib.suppress(Exception):
        wandb.teardown()


def one_line(error: Exception) -> str:
    """The error's message in one line of at most 300 characters; its type if it has no message."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
