"""The `distloop` command, the first word of which names one of the commands below."""

import importlib
import os
import sys

# word -> (module of this package, what it does). A module is imported only when it is asked for.
COMMANDS = {
    "init": ("init", "write configs, scripts, an example and the loop to a folder of your own"),
    "train": ("", "train a model, or continue a run"),
    "evaluate": ("evaluate", "validate a run's weights again, or on other data"),
    "sync": ("sync", "upload to W&B what stayed offline or never arrived"),
    "status": ("status", "a table of runs, or one run in detail"),
    "report": ("report.page", "a run, or several side by side, as one HTML file"),
    "doctor": ("doctor.main", "check machines, devices and network before a big job"),
    "tokens": ("tokens", "make a data set for a language model from text files"),
    "pack": ("pack", "make a store of small pictures of a folder of pictures"),
    "copy": ("copy", "write the loop to a file of your own, to change it"),
}
USAGE = (
    "usage: distloop COMMAND …\n\n"
    + "".join(f"  {command:<8} {what}\n" for command, (_, what) in COMMANDS.items())
    + "\ndistloop COMMAND --help explains each; distloop --version"
)


def main(words: list[str] | None = None) -> None:
    """Run the command that the command line, or `words`, names; ends the process with the command's exit code."""
    from distloop.ranks import talking

    talking.speak_clearly()
    word, *arguments = (sys.argv[1:] if words is None else words) or [""]
    if word == "train":
        from distloop.ranks.leaving import leave
        from distloop.ranks.start import main, prepare_process

        prepare_process()  # before the long imports: from here on a signal is a wish to stop, not the end
        from distloop.train import train

        leave(main(train, arguments))
    elif word in COMMANDS:
        code = importlib.import_module(f"distloop.commands.{COMMANDS[word][0]}").main(arguments)
        if word in ("evaluate", "doctor"):
            from distloop.ranks.leaving import leave

            leave(code)
        elif word == "sync":
            sys.stdout.flush()
            os._exit(code)  # wandb's own exit hooks may wait for a server
        sys.exit(code)
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
