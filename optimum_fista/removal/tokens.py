"""Removing tokens: the embedding, head, tokenizer and ids in a model's files become those of a smaller vocabulary.

`remove_tokens` makes such a run, in this order:

1. `count_model` (`removal.counted_model`) counts the tokens of a text, some of which is held out;
2. `plan_counted` (`removal.tokens_plan`) decides which tokens stay, and makes a `TokensPlan`;
3. `write_plan` measures on the held-out text what the removal costs (`removal.token_loss`), notes the SHA-256 of the
   dense model, and writes the smaller model, in an output folder that is locked.

No decoder layer is pruned: the tokens that stay decide the rows of the embedding and the head that stay
(`removal.token_tensors`), and all other tensors are copied from file to file as they are stored.

A *row* is one of the embedding: most rows belong to a token, and some models have more rows than tokens. An *id* is the
number of a token and of its row; `new_ids` has the new id of each row that stays, by its old id. *Pieces* are held-out
texts: strings that no token is counted on.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
)

from optimum_fista.atomic import write_file
from optimum_fista.bars import tqdm
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder import checkpoint
from optimum_fista.folder.gguf_file import CHECK_IDS_KEY
from optimum_fista.folder.output import JOURNAL, locked_output, new_output
from optimum_fista.folder.writing import write_all_but_weights
from optimum_fista.removal.earlier_masks import packed_masks_of
from optimum_fista.removal.token_ids import (
    configuration_files,
    renumbered,
)
from optimum_fista.removal.token_loss import measure_bits_per_byte
from optimum_fista.removal.tokens_plan import TokensPlan, ids_of_tokens, plan_tokens
from optimum_fista.report import PruningReport
from optimum_fista.source import loading
from optimum_fista.source.files import copy_source
from optimum_fista.source.loading import dense_sha256
from optimum_fista.source.model_folder import names_in, read_json, write_index
from optimum_fista.source.stored_tensor import (
    weight_files,
    write_stored,
)
from optimum_fista.text.loss import MEASURING_ERRORS

# Files that describe the old tokenizer, such as vocab.json, merges.txt, tokenizer.model. The new one is in
# tokenizer.json alone, and its settings stay in tokenizer_config.json.
_OLD_TOKENIZER = re.compile(
    r"(vocab|encoder|merges|added_tokens|tekken)\.(json|txt|bpe)|.*\.(model(\.\w+)?|tiktoken|spm|vocab)"
)


def remove_tokens(
    name: str,
    texts: Iterable[Any],
    output_dir: Path,
    config: FistaPruningConfig,
    *,
    text_name: str | None,
    device: str | None,
    dtype: str | torch.dtype,
    overwrite: bool,
    progress: bool,
    on_begin: Callable[[PruningReport], None],
    to_measure: Sequence[str],
) -> PruningReport:
    """Remove tokens from a model's files, write the smaller model to `output_dir`, and return the report.

    Downloads the weights of a Hub id into the cache. `output_dir` is locked against other runs from start to end.

    Args:
        name: The dense model: a folder or a Hub id. It is only read.
        texts: Texts on which tokens are counted, or batches of ids (see `count_model`). They are read once.
        output_dir: The new folder. Nothing is written there before all of it is ready.
        config: Its `pattern` says what is removed, such as "vocab:0.35".
        text_name: Name of the texts, for the report.
        device: Where to compute the loss; `None`: the accelerator if there is one.
        dtype: What the caller asked for; tensors are copied as they are stored, so another dtype is only warned of.
        overwrite: Replace a model that `output_dir` already holds.
        progress: Show progress bars.
        on_begin: Is called with the report when the plan is made.
        to_measure: Names of texts that the caller measures afterwards. Until then the report says that they are not.
    """
    started = time.perf_counter()
    with locked_output(output_dir):  # which `write_plan` may lock again
        plan = plan_tokens(name, texts, config, text_name=text_name, progress=progress)
        plan.report.texts_not_measured = list(to_measure)
        on_begin(plan.report)
        return write_plan(
            plan,
            output_dir,
            started=started,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )


def write_plan(
    plan: TokensPlan,
    output_dir: Path,
    *,
    started: float,
    device: str | None,
    dtype: str | torch.dtype,
    overwrite: bool,
    progress: bool,
) -> PruningReport:
    """Measure what a plan costs, and write its smaller model to `output_dir`; returns the plan's report.

    Changes that report (bits per byte, seconds, warnings) and the configuration of `plan.model`, which gets a summary
    of the run. `output_dir` is locked against other runs meanwhile. `started` is when the run began, by
    `time.perf_counter`; the other arguments are those of `remove_tokens`.
    """
    stored_dtype = plan.report.model["dtype"]
    asked_dtype = str(dtype).removeprefix("torch.")  # "auto", or a name such as "bfloat16"
    if asked_dtype not in ("auto", stored_dtype):
        plan.report.warn(
            f"dtype={dtype} is not used: tensors are copied as they are stored ({stored_dtype})."
        )
    # `unfinished` is a folder beside `output_dir`.
    with locked_output(output_dir) as unfinished:
        # if this process is killed, the next run on `output_dir` deletes the temporary files in this folder
        _measure_held_out(plan, unfinished / JOURNAL, device, progress)
        _note_digest(plan, unfinished / JOURNAL)
        # `folder` is in `unfinished`. It becomes `output_dir` at the end, if nothing fails.
        with new_output(output_dir, overwrite, plan.source) as folder:
            _write_model(plan, folder, started, progress)
    return plan.report


def _measure_held_out(
    plan: TokensPlan, offload_parent: Path, device: str | None, progress: bool
) -> None:
    """Measure the held-out text with all tokens and with those that stay, and set `plan.report.bits_per_byte`.

    The dense model is loaded and run. If that fails because the memory or the disk is full, a file can't be read or a
    number is NaN (`MEASURING_ERRORS`), the report gets a warning instead: the files of the result do not depend on
    these numbers.

    Args:
        plan: Its `held_out` are pieces of text that no token was counted on, and `dense_tokenizer` and `tokenizer` the
            contents of the old and of the new tokenizer.json. Only its report changes.
        offload_parent: An existing folder. A temporary folder is made in it, and deleted again.
        device: Where to compute, such as "cuda:0"; `None`: the accelerator if there is one.
        progress: Show a progress bar.
    """
    if not plan.held_out:
        plan.report.warn(
            "bits per byte are not measured: the text is too short to hold some of it out. Pass at least 50,000 "
            'characters of it, or batches with "held_out".'
        )
        return
    dense_tokenizer = Tokenizer.from_str(json.dumps(plan.dense_tokenizer))
    smaller_tokenizer = Tokenizer.from_str(json.dumps(plan.tokenizer))
    old_ids = torch.tensor(list(plan.new_ids))  # its keys are in the order of the new ids
    try:
        with tempfile.TemporaryDirectory(prefix="offload-", dir=offload_parent) as offload:
            numbers = measure_bits_per_byte(
                plan.name,
                plan.held_out,
                dense_tokenizer=dense_tokenizer,
                smaller_tokenizer=smaller_tokenizer,
                kept=old_ids,
                bos=plan.bos,
                offload_folder=Path(offload),
                device=device,
                compute_dtype=plan.report.config["compute_dtype"],
                progress=progress,
            )
    except MEASURING_ERRORS as error:
        plan.report.warn(
            f"bits per byte are not measured ({type(error).__name__}: {error}). The files do not depend on them."
        )
        return
    plan.report.bits_per_byte = numbers | {"text": plan.report.calibration["source"]}


def _note_digest(plan: TokensPlan, offload_parent: Path) -> None:
    """Set the SHA-256 of the dense model in `plan.report`, by which `recover` later knows its teacher.

    All weights of the dense model are read. If that fails (`MEASURING_ERRORS`), there is a warning instead, because the
    files of the result do not depend on the SHA-256. A temporary folder is made in `offload_parent`, and deleted again.
    """
    model = plan.report.model
    try:
        with tempfile.TemporaryDirectory(prefix="offload-", dir=offload_parent) as offload:
            model["sha256"] = dense_sha256(plan.name, model["dtype"], Path(offload))
    except MEASURING_ERRORS as error:
        plan.report.warn(
            f"the dense model has no SHA-256 in the report ({type(error).__name__}: {error}), so recover can't check "
            "its teacher."
        )


def _write_model(plan: TokensPlan, folder: Path, started: float, progress: bool) -> None:
    """Write all files of the smaller model into an unfinished, empty folder.

    Adds the seconds since `started` (by `time.perf_counter`) to the report, and a summary of the run to the
    configuration of `plan.model`. `plan.source` is the folder of the dense model, which is only read. `plan.quantized`
    are the quantization settings of its `config.json`, which the result has, too.
    """
    copy_source(plan.source, folder)  # all files but weights and what a run writes
    _write_tokenizer(plan, folder)
    _write_weights(plan, folder, progress)
    plan.report.seconds["total"] = time.perf_counter() - started

    write_all_but_weights(
        folder,
        plan.model,
        tokenizer=None,
        report=plan.report,
        # Of an earlier run that set weights to zero: the decoder layers keep them.
        masks=packed_masks_of(plan.source, plan.report.carried),
        packed=None,
        quantized=plan.quantized,
    )
    _write_table(plan, folder)


def _write_tokenizer(plan: TokensPlan, folder: Path) -> None:
    """Replace the files of the tokenizer, and write new ids into the configurations of generation and processor.

    `tokenizer_config.json` gets new ids, too. `config.json` is written later. The old tokenizer's other files, such as
    vocab.json and merges.txt, are deleted. `folder` is the unfinished folder, which has copies of the dense model's
    files. `plan.tokenizer` is the content of the new tokenizer.json, and `plan.new_ids` has a new id for each row of
    the embedding that stays. The keys of a configuration, such as "eos_token_id", tell which of its numbers are
    ids.

    Transformers then loads the new tokenizer from these files. If it gives other ids, this is a ValueError, and
    `new_output` deletes the whole unfinished folder.
    """
    for file in list(folder.iterdir()):
        # neither tokenizer.json, which is replaced below, nor tokenizer_config.json
        if _OLD_TOKENIZER.fullmatch(file.name):
            file.unlink()
    for name, values in configuration_files(folder).items():
        changed = renumbered(values, plan.new_ids)
        if changed != values:
            write_file(folder / name, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    content = json.dumps(plan.tokenizer, indent=2, ensure_ascii=False)
    write_file(folder / "tokenizer.json", content)

    with loading.reading(str(folder)):  # which makes errors name the folder
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocabulary = loaded.get_vocab()  # ids by token
    last_token = max(vocabulary, key=lambda token: vocabulary[token])  # which has the highest id
    last_id = vocabulary[last_token]
    if last_id >= len(plan.new_ids):
        raise ValueError(
            f"model={str(plan.source)!r}: Transformers gives the token {last_token!r} the id {last_id}, "
            f"and the smaller embedding would have {len(plan.new_ids)} rows, so no token can be removed. Check the "
            "added tokens in its tokenizer_config.json."
        )
    if vocabulary != ids_of_tokens(plan.tokenizer):
        raise ValueError(
            f"model={str(plan.source)!r}: {type(loaded).__name__} of Transformers gives other ids than the smaller "
            "tokenizer.json, so no token can be removed."
        )


def _write_weights(plan: TokensPlan, folder: Path, progress: bool) -> None:
    """Write the tensors to files with the names of the source's files, and an index if there are several.

    `plan.stored` has all tensors of the result, by name; the values of each are read from the source when its file is
    written. Tensors of other files than safetensors go to "model.safetensors". `folder` is the unfinished folder.
    """
    # name of the file that has a tensor, by the tensor's name
    files_of_source: dict[str, str] = {}
    for file in weight_files(plan.source):
        if file.suffix == ".safetensors":
            files_of_source |= dict.fromkeys(names_in(file), file.name)
    weight_map = {name: files_of_source.get(name, "model.safetensors") for name in plan.stored}

    file_names = sorted(set(weight_map.values()))
    for file_name in tqdm(file_names, desc="Writing weights", unit="file", disable=not progress):
        tensors = {
            name: tensor for name, tensor in plan.stored.items() if weight_map[name] == file_name
        }
        write_stored(folder / file_name, tensors)
    if file_names != ["model.safetensors"]:
        metadata = {"total_parameters": plan.model.num_parameters()}
        write_index(folder, "model", weight_map, metadata)


def _write_table(plan: TokensPlan, folder: Path) -> None:
    """Write a table of the rows that stay into the unfinished folder, as rows of the first dense model.

    That is the model before any run removed tokens. The table's "kept" has, for each row of the result in their order,
    its row in the first model; its "num_tokens" is the number of rows of the first model. `CHECK_IDS_KEY` has what
    llama.cpp's converter needs to know of the first model's tokenizer. `plan.source`, the folder of the model that this
    run was given, has such a table if an earlier run has removed tokens.
    """
    # Rows of the given model. The keys of `new_ids` are in the order of the new rows.
    old_ids = list(plan.new_ids)
    num_rows = plan.report.model["vocabulary"]["before"]

    # The row in the first model of each row of the given model, int64; None if no run has removed tokens before.
    earlier = checkpoint.kept_tokens(plan.source)
    # With another number, the table is out of date: somebody has resized the embedding since the earlier run.
    if earlier is None or len(earlier) != num_rows:
        # The given model is the first one.
        table: dict[str, Any] = {
            "kept": old_ids,
            "num_tokens": num_rows,
            CHECK_IDS_KEY: list(plan.check_ids),
        }
    else:
        table = read_json(plan.source / checkpoint.VOCABULARY_FILE)  # all but "kept" stays
        # Row `old` of the given model is row `earlier[old]` of the first one.
        table["kept"] = earlier[old_ids].tolist()
    write_file(folder / checkpoint.VOCABULARY_FILE, json.dumps(table) + "\n")
