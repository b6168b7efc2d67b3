"""What the command lines share: strict options with suggestions, errors as one message, tables of checks."""

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.errors import LaceError
from engine.runtimes import MissingRuntime
from engine.verify import Check, ParityError

OK, CHECK_FAILED, BAD_INPUT, MISSING_PACKAGE = 0, 1, 2, 3
STOPPED = 130  # what a shell reports for a process that Ctrl-C ended
EXIT_CODES = "exit codes: 0 success, 1 a check failed, 2 bad usage or input, 3 a package is missing"


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Like parse_args; an unknown option is answered with the nearest known one. Exits with 2 on bad usage."""
    options, extra = parser.parse_known_args(arguments)
    for word in extra:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognised argument {word!r}{hint}")
    return options


def guarded(work: Callable[[], int]) -> int:
    """Run ``work`` and turn the errors that we raise on purpose into one red message and an exit code."""
    try:
        return work()
    except ParityError as error:
        complain(error)
        return CHECK_FAILED
    except LaceError as error:
        complain(error)
        is_missing = isinstance(error, MissingRuntime) or isinstance(error.__cause__, ImportError)
        return MISSING_PACKAGE if is_missing else BAD_INPUT
    except ModuleNotFoundError as error:
        complain(f"the package {error.name!r} is missing; install it with: pip install 'lace-engine[export]'")
        return MISSING_PACKAGE
    except OSError as error:
        complain(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the interpreter's own end
        complain("stopped")
        return STOPPED


def complain(message: object) -> None:
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (str(message), "red")), soft_wrap=True)


def write_json(text: str) -> None:
    """To standard output as it is: rich would wrap and colour it."""
    sys.stdout.write(text + "\n")


def worst_of_each(checks: Sequence[Check]) -> list[Check]:
    """One row for what is checked for every attribute: the worst one, by name. Failures are all shown."""
    shown: list[Check] = []
    groups: dict[str, list[Check]] = {}
    for check in checks:
        _, dot, kind = check.name.partition(".")
        if dot and check.passed:
            groups.setdefault(kind, []).append(check)
        else:
            shown.append(check)
    for kind, members in groups.items():
        worst = max(members, key=lambda check: check.error or 0.0)
        name = f"{kind}, worst of {len(members)}: {worst.name.partition('.')[0]}" if len(members) > 1 else worst.name
        shown.append(replace(worst, name=name))
    return shown


def checks_table(checks: Sequence[Check]) -> Table:
    table = Table(title="answers against the original network", title_justify="left")
    for column, justify in (("check", "left"), ("found", "right"), ("limit", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    verdicts = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]not checked[/]"}
    for check in worst_of_each(checks):
        found = "" if check.error is None else f"{check.error:.3g}"
        sign = ">=" if check.name.endswith("psnr") else "<="
        table.add_row(check.name, found, f"{sign} {check.limit:.3g}", verdicts[check.passed])
    return table
