"""`hf-shrink push`: the output folder of a run to the Hub."""

from __future__ import annotations

import argparse

from hf_shrink.cli.options import Commands

EXAMPLES = """\
The token is the one of `hf auth login`, or of the environment variable HF_TOKEN; it is no option, because command lines
can be read by others and stay in histories.

examples:
  hf-shrink push ./small me/my-model-w4
  hf-shrink push ./small me/my-model --revision w4       beside the dense model, on a branch
  hf-shrink push ./small org/my-model --pr               propose it
A push that broke off goes on with the same command; what has arrived is not sent again.
"""


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "push",
        help="push a finished folder to the Hub",
        description="Push the output folder of a run to the Hub: weights, tokenizer, model card, report and record.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="output folder of a run")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME, or NAME alone for the owner of the token")
    add_private(parser)
    parser.add_argument("--revision", metavar="R", help="a branch, made when it is not there; or refs/pr/N")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead of changing the repository")
    parser.add_argument(
        "--overwrite", action="store_true", help="also into a repository that holds something hf_shrink did not make"
    )
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: what was done and what came of it)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=command)


def add_private(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--private", action="store_true", help="make the repository private, where the push is what makes it"
    )


def command(options: argparse.Namespace) -> None:
    from hf_shrink.checkpoint.push import push_folder
    from hf_shrink.hub import Destination
    from hf_shrink.reporting import silence

    destination = Destination(
        options.repository, options.private or None, options.revision, options.pr, options.overwrite
    )
    with silence(options.quiet):
        pushed = push_folder(options.directory, destination, message=options.message)
    print(pushed.commit.commit_message)
    print(pushed.url)
