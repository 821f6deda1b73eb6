"""`python -m vcrd <command>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from vcrd.planning import command as plan
from vcrd.planning.options import OptionError, add_options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m vcrd", description="Validity-calibrated reasoning distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    planner = commands.add_parser(
        "plan",
        help=plan.SUMMARY,
        description=plan.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(planner)
    planner.set_defaults(run=plan.run, parser=planner)
    options = parser.parse_args(arguments)
    try:
        print(options.run(options))
    except OptionError as error:
        options.parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
