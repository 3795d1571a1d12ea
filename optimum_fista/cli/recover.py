"""The command `optimum-fista recover`: `add_arguments` declares its flags, and `run` calls `recover` or `preview`."""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from optimum_fista.cli.flags import DEVICE, add_options, given_options
from optimum_fista.train.recovery_options import RecoveryOptions

DESCRIPTION = """\
Train the weights that a pruned model kept, so that it predicts as the dense model does. Zeros stay zero. A model that
was never pruned can be trained in the same way, to compare with.

The loss measures how far the predictions of the pruned model are from those of the dense model (the teacher) and from
the text. Part of the text is never trained on: the model is measured on it before, during and after the training, and
the best weights are saved. If none are better than before, the weights stay as they were. DIR is only read. If a run
is interrupted, give the same command again to resume it.

examples:
  optimum-fista recover ./model-50 --teacher ./model --calibration texts.txt
  optimum-fista recover ./model-24 --teacher meta-llama/Llama-3.2-1B --calibration c4 --tokens 10000000 --batch-size 8
  optimum-fista recover ./model-50 --teacher ./model --calibration texts.txt --train norms --output ./model-50-norms
  optimum-fista recover ./model --calibration texts.txt --label-share 1  # the dense model on text alone, to compare
  # several processes share the sequences, and with --use_fsdp --fsdp_version 2 the weights:
  accelerate launch --multi_gpu --num_processes 8 -m optimum_fista recover ./model-50 --teacher ./model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command to its parser; those of the training come from `RecoveryOptions`."""
    parser.usage = "%(prog)s DIR --teacher MODEL [options]"
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder or Hub id of a model, pruned (also packed) or dense")
    add(
        "--teacher",
        metavar="MODEL",
        help="the dense model: Hub id or folder (default: the Hub id in DIR's report, or DIR if it was never pruned)",
    )
    add(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: DIR's name and -recovered)",
    )
    add(
        "--calibration",
        action="append",
        metavar="SOURCE",
        help="self (the teacher writes it; default), a .txt or .jsonl file (text or messages), wikitext2, c4, ptb, "
        "pydoc, or OWNER/NAME of the Hub; repeatable: each text gives an equal share",
    )
    add_options(parser, RecoveryOptions)
    add("--device", **DEVICE)  # with the help that it has in all commands
    add(
        "--dry-run",
        action="store_true",
        help="only print what would be trained, and estimate memory and time",
    )
    add("--overwrite", action="store_true", help="replace a model that --output already holds")


def run(arguments: argparse.Namespace) -> int:
    """Recover a model into a folder, or only print the plan (`--dry-run`), and return the exit code, 0.

    `arguments` are the flags that `add_arguments` declares, and stay as they are. Prints the report and the commands
    that may come next, in rank 0 alone if several processes were launched together.
    """
    # Only now, so that --help is quick.
    from optimum_fista.cli.messages import command_ranks, messages_shown
    from optimum_fista.cli.overview import next_commands
    from optimum_fista.folder.checkpoint import REPORT_FILE, read_report
    from optimum_fista.folder.output import folder_beside
    from optimum_fista.train.preview import preview
    from optimum_fista.train.recovery import recover
    from optimum_fista.train.recovery_plan import plan_recovery

    output = arguments.output or folder_beside(arguments.folder, "-recovered")
    options = {
        "teacher": arguments.teacher,
        "output_dir": output,
        "calibration": arguments.calibration or "self",
        "device": arguments.device,
        "overwrite": arguments.overwrite,
        **given_options(arguments, RecoveryOptions),  # those of the training that the user has set
    }
    if arguments.dry_run:
        plan = plan_recovery(arguments.folder, processes=1, **options)
        print(preview(plan))
        return 0

    with command_ranks(arguments.device) as ranks, ExitStack() as opened:
        if ranks.index == 0:
            opened.enter_context(messages_shown("optimum_fista.train"))
        try:
            report = recover(arguments.folder, **options)
        except KeyboardInterrupt:
            if ranks.index == 0:
                print(
                    "\nthe same command resumes after the last step that was saved", file=sys.stderr
                )
            raise

    if ranks.index == 0:
        print(report)
        print(f"saved to {output}")
        is_pruned = (output / REPORT_FILE).exists()
        if is_pruned:
            has_zeros = read_report(output).num_zeros > 0
            dense_model = arguments.teacher or report.teacher
            print(next_commands(dense_model, output, None, has_zeros=has_zeros))
    return 0
