"""`optimum-fista recover`."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from optimum_fista.cli.options import DEVICE

DESCRIPTION = """\
Train the weights that a pruned model kept, so that it predicts as the dense model does. Zeros stay zero.

The loss is how far the pruned model's predictions are from those of the dense model (the teacher) and from the text.
Part of the text is never trained on: the model is measured on it before, during and after the training, and the best
weights are saved. If none were better than before, the weights stay as they were. DIR is only read. Give the same
command again to resume an interrupted run.

examples:
  optimum-fista recover ./model-50 --teacher ./model --calibration texts.txt
  optimum-fista recover ./model-24 --teacher meta-llama/Llama-3.2-1B --calibration c4 --tokens 10000000 --batch-size 8
  optimum-fista recover ./model-50 --teacher ./model --calibration texts.txt --train lora --output ./model-50-lora
  # several processes share the sequences, and with --use_fsdp --fsdp_version 2 the weights:
  accelerate launch --multi_gpu --num_processes 8 -m optimum_fista recover ./model-50 --teacher ./model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, those of every day first."""
    parser.usage = "%(prog)s DIR --teacher MODEL [options]"
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder or Hub id of a pruned model, packed or not")
    teachers = "the dense model, a Hub id or a model folder (default: the Hub id that DIR's report names)"
    add("--teacher", metavar="MODEL", help=teachers)
    add("--output", "-o", type=Path, metavar="DIR", help="folder to write to (default: DIR's name and -recovered)")
    sources = "self (the teacher writes it; default), a .txt or .jsonl file, wikitext2, c4, ptb, pydoc"
    add("--calibration", default="self", metavar="SOURCE", help=sources)
    add("--tokens", type=int, default=262_144, metavar="N", help="tokens to train on (default 262144)")
    trained = (
        "all kept weights but embeddings and head; lora (masked adapters, norms and biases); norms (and biases); or "
        "auto, the first of these that fits into memory (default)"
    )
    add("--train", choices=("auto", "all", "lora", "norms"), default="auto", help=trained)
    add("--device", **DEVICE)
    products = "dtype of products; weights are trained in float32 (default auto: bfloat16 if the device is fast in it)"
    add("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=products)
    add("--overwrite", action="store_true", help="replace a model that --output already holds")
    add = parser.add_argument_group("advanced").add_argument
    add("--sequence-length", type=int, metavar="N", help="tokens a sequence (default: 512, at most the model's limit)")
    add("--batch-size", type=int, default=2, metavar="N", help="sequences a forward and backward pass (default 2)")
    passes = (
        "passes before each update, of all processes together (default: about 256 updates, of at most 32 sequences; "
        "fewer for few tokens)"
    )
    add("--accumulate", type=int, metavar="N", help=passes)
    add("--held-out", type=int, default=8, metavar="N", help="sequences to measure on, never trained on (default 8)")
    rates = "largest learning rate (default: by --train and the model's width)"
    add("--learning-rate", type=float, metavar="RATE", help=rates)
    shares = "how much of the loss is the text's own cross-entropy, from 0 to 1 (default %(default)s)"
    add("--label-share", type=float, default=0.5, metavar="SHARE", help=shares)
    add("--seed", type=int, default=0, help="decides which text is drawn, and its order (default 0)")
    trackers = "a tracker of the Trainer, such as tensorboard (into OUTPUT-logs; default none)"
    add("--report-to", default="none", metavar="NAME", help=trackers)


def run(arguments: argparse.Namespace) -> int:
    """Recover, and say what it gained."""
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from optimum_fista.cli.overview import argument
    from optimum_fista.cli.progress import log_shown
    from optimum_fista.run.checkpoints.output import folder_beside
    from optimum_fista.run.ranks import joined_ranks
    from optimum_fista.run.retraining.recovery import recover, steps_kept

    names = "teacher calibration tokens train device compute_dtype overwrite sequence_length batch_size accumulate"
    names += " held_out learning_rate label_share seed report_to"
    options = {name: getattr(arguments, name) for name in names.split()}
    output = arguments.output or folder_beside(arguments.folder, "-recovered")
    with joined_ranks(arguments.device) as ranks, ExitStack() as opened:
        if ranks.index:
            set_verbosity_error()
            disable_progress_bar()
        else:
            opened.enter_context(log_shown("optimum_fista.run.retraining"))
        try:
            found = recover(arguments.folder, output_dir=output, **options)
        except KeyboardInterrupt:
            if not ranks.index:
                steps = steps_kept(output)
                resume = "give the same command again to resume"
                again = resume if steps else "the same command starts from the beginning"
                print(f"\n{steps or 'no'} steps are done and kept: {again}", file=sys.stderr)
            raise
    if ranks.count > 1:
        PartialState().destroy_process_group()
    if ranks.index:
        return 0
    name = argument(output)
    print(found)
    print(f"saved to {output}")
    print(f"next:\n  optimum-fista verify {name}    # counts the zeros in the files again")
    return 0
