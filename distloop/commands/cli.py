"""The `distloop` command: one word for each of the things it does, each imported only when it is asked for."""

from __future__ import annotations

import os
import sys

COMMANDS = {
    "train": "train a model, or continue a run",
    "evaluate": "validate a run's weights again, or on other data",
    "sync": "upload to W&B what stayed offline or never arrived",
    "status": "a table of runs, or one run in detail",
    "report": "a run, or several side by side, as one HTML file",
    "doctor": "check machines, devices and network before a big job",
}
USAGE = (
    "usage: distloop COMMAND …\n\n"
    + "".join(f"  {command:<8} {what}\n" for command, what in COMMANDS.items())
    + "\ndistloop COMMAND --help explains each; distloop --version"
)


def main() -> None:
    """Do what the command line says; leaves with the command's exit code."""
    from distloop.ranks import leaving, talking

    talking.speak_clearly()
    word, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "train":
        from distloop.ranks.start import main, prepare_process

        prepare_process()  # before the long imports: from here on a signal is a wish to stop, not the end
        from distloop.train import train

        leaving.leave(main(train, arguments))
    elif word == "status":
        from distloop.commands.status import main as status

        sys.exit(status(arguments))
    elif word == "report":
        from distloop.commands.report.page import main as report

        sys.exit(report(arguments))
    elif word == "sync":
        from distloop.commands.sync import main as sync

        code = sync(arguments)
        sys.stdout.flush()
        os._exit(code)  # wandb's own exit hooks may wait for a server
    elif word == "evaluate":
        from distloop.commands.evaluate import main as evaluate

        leaving.leave(evaluate(arguments))
    elif word == "doctor":
        from distloop.commands.doctor.main import main as doctor

        leaving.leave(doctor(arguments))
    elif word in ("--help", "-h"):
        print(USAGE)
    elif word == "--version":
        from distloop import __version__

        print(f"distloop {__version__}")
    else:
        from distloop.errors import suggest

        problem = f"distloop: there is no command {word!r}.{suggest(word, list(COMMANDS))}\n\n" if word else ""
        print(f"{problem}{USAGE}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
