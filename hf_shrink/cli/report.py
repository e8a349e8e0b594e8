"""`hf-shrink report`: print the table of a shrunken model and write its report again."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_shrink.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("report", help="print the table of a shrunken model and write its report again")
    parser.add_argument("directory", metavar="DIR", help="output folder of a run")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.record import RECORD_NAME, read_record
    from hf_shrink.errors import CheckpointError
    from hf_shrink.reporting import print_table, write_report

    folder = Path(options.directory)
    if not (folder / RECORD_NAME).is_file():
        raise CheckpointError(f"{folder} has no {RECORD_NAME}; give the output folder of an hf-shrink run")
    record = read_record(folder / RECORD_NAME)
    for path in write_report(folder, record):
        print(path)
    print_table(record.report, title=str(folder))
