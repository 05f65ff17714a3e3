"""`llava ...`: ask, chat, demo, doctor, assemble, check-data, train, merge, export, push; see `commands/`.

Imports live inside the commands: a command needs only its own extra. Whatever a user can get wrong ends in one line
on standard error and exit code 2.
"""

import argparse
import sys
from importlib.metadata import version

from spaces_demo.command import add_options as add_demo_options
from spaces_demo.command import run as run_demo

from .commands import answering, hub, models, training
from .commands.errors import USER_ERRORS, missing_extra, one_line


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    # argparse takes settings behind an option for unknown.
    if others and (options.run is not training.run_train or any(setting.startswith("-") for setting in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.settings += others
    try:
        return options.run(options) or 0
    except USER_ERRORS as error:
        print(f"llava: {one_line(error)}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"llava: {missing_extra(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava", description="Ask, assemble, train and share LLaVA models.")
    parser.add_argument("--version", action="version", version=f"anyllava {version('anyllava')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    answering.add_commands(commands)
    demo = commands.add_parser("demo", help="a web page to talk with models about pictures")
    add_demo_options(demo)
    demo.set_defaults(run=run_demo)
    models.add_commands(commands)
    training.add_commands(commands)
    hub.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
