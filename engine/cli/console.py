"""What the command lines share: strict options with suggestions, errors as one message, tables of checks.

Whatever is printed goes through ``Terminal``: no name or path can mark text up or send a sequence to the terminal.
"""

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from engine import __version__
from engine.errors import LaceError
from engine.runtimes import MissingRuntime
from engine.text import to_json, visible
from engine.verify import Check, ParityError

OK, CHECK_FAILED, BAD_INPUT, MISSING_PACKAGE, NOT_CHECKED = 0, 1, 2, 3, 4
STOPPED = 130  # what a shell reports for a process that Ctrl-C ended
UNREAD = 141  # and for one that wrote to a pipe that nobody reads
EXIT_CODES = ("exit codes: 0 success, 1 a check failed, 2 bad usage or input, 3 a package is missing, 4 something "
              "could not be checked, 130 stopped, 141 nobody reads the output")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
OTHER_PLACE = "choose another --out"
ADVICE = {
    errno.EACCES: f"allow it, or {OTHER_PLACE}",
    errno.EPERM: f"allow it, or {OTHER_PLACE}",
    errno.EROFS: OTHER_PLACE,
    errno.ENOSPC: f"free some space, or {OTHER_PLACE}",
    errno.EDQUOT: f"free some space, or {OTHER_PLACE}",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "give the name of a file",
    errno.ENOENT: "check the path",
}


class Terminal(Console):
    """A console that shows every text as it is: no markup, no emoji names, no highlighting, no control characters."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None):
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        # The last station before the screen: what did not come as a str, a Text for example, passes here as well.
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                segment = Segment(visible(segment.text, lines=True), segment.style)
            yield segment

    def say(self, text: object, style: str = "") -> None:
        """A line that is not broken to the width of the terminal, so that paths can be copied."""
        self.print(str(text), style=style or None, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # see ``guarded``


class Parser(argparse.ArgumentParser):
    """Options are never abbreviated; --version; what a message quotes cannot reach the terminal as a sequence."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, "epilog": EXIT_CODES, **settings})
        self.add_argument("--version", action="version", version=f"{self.prog.split()[0]} (lace-engine) {__version__}")

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(visible(message, lines=True), file)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Like parse_args; an unknown option is answered with the nearest known one. Exits with 2 on bad usage."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a letter that the terminal's encoding lacks is no error
    options, extra = parser.parse_known_args(arguments)
    for word in extra:
        near = difflib.get_close_matches(word.partition("=")[0], known_options(parser, options), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognised argument {word!r}{hint}")
    return options


def known_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Of the parser, and of the command that was chosen."""
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and (chosen := getattr(options, action.dest, None)):
            found += known_options(action.choices[chosen], options)
    return found


def guarded(work: Callable[[], int], out: object = None) -> int:
    """Run ``work`` and turn the errors that we raise on purpose into one red message and an exit code.

    out   the file or folder that is written, which an error of the system may not name
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        leave_pipe()
        return UNREAD
    except ParityError as error:
        return complain(error, CHECK_FAILED)
    except LaceError as error:
        is_missing = isinstance(error, MissingRuntime) or isinstance(error.__cause__, ImportError)
        return complain(error, MISSING_PACKAGE if is_missing else BAD_INPUT)
    except ModuleNotFoundError as error:
        return complain(f"the package {error.name!r} is missing; install it with: pip install 'lace-engine[train]'",
                        MISSING_PACKAGE)
    except OSError as error:
        return complain(os_problem(error, out), BAD_INPUT)
    except MemoryError as error:
        return complain(f"out of memory ({error or 'no number known'}): choose a smaller --capacity or --batch",
                        BAD_INPUT)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        return complain("the system starts no more threads: choose fewer --threads, or allow more (ulimit -u)",
                        BAD_INPUT)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the interpreter's own end
        return complain("stopped", STOPPED)


def leave_pipe() -> None:
    """Nobody reads standard output any more: what is still buffered goes nowhere, without a message at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file
        return


def os_problem(error: OSError, out: object = None) -> str:
    """What could not be read or written, why, and what to do."""
    where = out if error.filename is None else error.filename
    what = "the output" if where is None else os.fsdecode(where) if isinstance(where, str | bytes) else str(where)
    said = error.strerror or str(error) or type(error).__name__
    advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    verb = "write" if error.filename is None or error.errno in FULL else "open or create"
    return f"cannot {verb} {what}: {said[:1].lower()}{said[1:]}{advice}"


def complain(message: object, code: int = BAD_INPUT) -> int:
    """Print one red message; returns the exit code."""
    text = Text.assemble(("error: ", "bold red"), (visible(message, lines=True), "red"))
    try:
        Terminal(stderr=True).print(text, soft_wrap=True)
    except OSError:  # nobody reads that either
        return code
    return code


def require(extra: str, *packages: str) -> None:
    """Refuse to begin work that would end for want of a package. Raises MissingPackage, which names all that lack."""
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        named = " and ".join(map(repr, missing))
        what = f"the package {named} is missing; install it" if len(missing) == 1 else (
            f"the packages {named} are missing; install them")
        raise MissingPackage(f"{what} with: pip install 'lace-engine[{extra}]'")


def is_installed(package: str) -> bool:
    return sys.modules.get(package, ...) is not None and find_spec(package) is not None


class MissingPackage(MissingRuntime):
    """A command needs packages that are not installed."""


def write_json(value: Any) -> None:
    """To standard output as it is: rich would wrap and colour it."""
    sys.stdout.write(to_json(value) + "\n")


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[[int, int | None, str], None]]:
    """A bar on standard error, to be told (done, total, what is being done)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total, text: bar.update(task, completed=done, total=total or None, description=text or title)


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
    verdicts = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("not checked", "yellow")}
    table = new_table("answers against the original network", "check", "found>", "limit>", "")
    for check in worst_of_each(checks):
        found = "" if check.error is None else f"{check.error:.3g}"
        sign = ">=" if check.name.endswith("psnr") else "<="
        table.add_row(check.name, found, f"{sign} {check.limit:.3g}", verdicts[check.passed])
    return table


def new_table(title: str, *columns: str) -> Table:
    """Columns by their headings; one that ends in > is aligned to the right."""
    table = Table(title=visible(title), title_justify="left", min_width=min(len(title), 60))
    for heading in columns:
        table.add_column(visible(heading.removesuffix(">")), justify="right" if heading.endswith(">") else "left",
                         overflow="fold")
    return table


def add_rows(table: Table, rows: Iterable[Sequence[str | Text]]) -> Table:
    for row in rows:
        table.add_row(*row)
    return table
