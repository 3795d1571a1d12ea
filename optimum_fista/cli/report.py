"""`optimum-fista report`: write a page about a pruned model."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Write one HTML page about a pruned model: what was pruned, where the errors are, how long it took.

The page needs no network and has no scripts. It is made from the report in the folder, packed or not.

example:
  optimum-fista report ./model-50
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder saved by optimum-fista")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="FILE.html",
        help="page to write, in place of an earlier one (default DIR/fista/report.html)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page of a folder, by default into it, and print where it is; returns the exit code.

    The file may replace an earlier page, but no other file. A page in the folder is noted in the list of its files.
    `arguments` are those that `add_arguments` describes.
    """
    # These imports take seconds, and `--help` must not wait for them.
    from optimum_fista.atomic import require_same_kind, require_writable
    from optimum_fista.folder.output import write_about
    from optimum_fista.page.render import read_pruned_report, render_page
    from optimum_fista.source.model_folder import bytes_of_weight_files

    output = arguments.output or arguments.folder / "fista" / "report.html"
    require_writable(output)
    # The template `page.html` has this title.
    require_same_kind(output, "a page of this command", b": pruning report</title>")
    report = read_pruned_report(arguments.folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_about(output, render_page(report, bytes_of_weight_files(arguments.folder)))
    print(f"saved to {output}")
    return 0
