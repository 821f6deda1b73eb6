"""`python -m vcrd <command>`, and `python -m vcrd --version`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from vcrd.cache import command as cache
from vcrd.doctor import command as doctor
from vcrd.doctor import versions
from vcrd.errors import OptionError
from vcrd.plan import command as plan
from vcrd.report import command as report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one sentence, without the usage text."""
        self.exit(2, f"{self.prog}: {message}\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(versions.text())
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m vcrd", description="Validity-calibrated reasoning distillation.")
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="print the versions of vcrd, its extension and what it runs on, for a report of an error",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    for name, command in (("plan", plan), ("doctor", doctor), ("report", report), ("cache", cache)):
        one = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(one)
        one.set_defaults(run=command.run, parser=one)
    options = parser.parse_args(arguments)
    try:
        text, status = options.run(options)
    except OptionError as error:
        options.parser.error(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if text:
        print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
