"""qexp doctor: whether this machine and this installation are fit for qexp, and what to do where they are not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.markup import escape
from rich.table import Table

from qexp.sections import ConfigError

USAGE = """\
qexp doctor: what this machine and this installation are like, and what to do; nothing is changed

usage: qexp doctor [--outputs DIR]

  qexp doctor                        libraries, engines, processor, and the folder outputs
  qexp doctor --outputs /mnt/shared  the same for another folder of results

Each check is ok, a note (all works, but there is something to know) or a problem, after which something will fail.
The exit code is 0 without problems, 1 with.

  --outputs DIR   what paths.outputs is or will be (without it: outputs)
"""
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def main(arguments: list[str]) -> int:
    """Check, and show what came of it; 1 where there is a problem. Errors: ConfigError."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    parser = argparse.ArgumentParser(prog="qexp doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--outputs", default="outputs")
    parser.error = _refuse
    outputs = Path(parser.parse_args(arguments).outputs)

    from qexp.doctor import PROBLEM, findings
    from qexp.report.terminal import console, output

    with console.status("looking ..."):
        found = findings(outputs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in "check", "state":
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for finding in found:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(escape(finding.check), state, escape(finding.what))
    output.print(table, soft_wrap=False)
    if todo := [finding for finding in found if finding.todo]:
        output.print("What to do:")
        width = max(len(finding.check) for finding in todo)
        for finding in sorted(todo, key=lambda finding: finding.state != PROBLEM):
            output.print(f"  {finding.check:<{width}}  {finding.todo}", markup=False)
    problems = sum(finding.state == PROBLEM for finding in found)
    output.print(f"\n{problems or 'no'} problem{'s' * (problems != 1)}")
    return 1 if problems else 0


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; qexp doctor --help shows what can be said")
