"""Llamas (or Gemma 3) of several sizes in llama.cpp at 16, 8 and 4 bits, in turn: speed, memory, size of the file.

Before that, greedy tokens of llama.cpp in float32 must be those of Transformers in float32. Prompts are random tokens,
and the words of the GGUF files are the numbers of their tokens. The package `gguf` rounds weights to 8 and 4 bits
(Q8_0, Q4_0), and llama.cpp those of the kinds IQ4_NL and Q3_K. `pip install xllamacpp` gives llama.cpp as a wheel;
llama-cpp-python would have to be compiled. `frontier.py` measures what the rounding costs.

    python benchmarks/llama_cpp.py --models runs/original,runs/smaller --output runs/llama_cpp.json
"""

from __future__ import annotations

import ctypes
import re
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from shared import parse_arguments, save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.source.model_folder import checkpoint_files, read_tensors

try:
    import xllamacpp
except ImportError:  # `--help` needs no llama.cpp
    xllamacpp = None


# How GGUF stores so many bits a weight: 8, 5 and 4 in blocks of 32 with one scale in float16, Q3_K in blocks of 256.
KINDS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "8": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "5": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "4": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "IQ4_NL": (GGMLQuantizationType.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
    "Q3_K": (GGMLQuantizationType.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
}
CONTEXT = 1024  # tokens of all prompts of a server together, with those that follow


def kind_of(bits: str, shape: Sequence[int], is_head: bool) -> GGMLQuantizationType:
    """How a tensor is stored in a file of so many bits: vectors in float32, the head with 8 at least, but for `bits*`.

    llama.cpp's own converter rounds the head less than the rest, too (to Q6_K, or Q8_0 if its rows have no blocks of
    256), and writes IQ4_NL in the place of Q3_K if rows have no blocks of 256.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    name = bits.rstrip("*")
    rounds_head_less = bits not in ("32", "16") and not bits.endswith("*")
    if is_head and rounds_head_less:
        name = "8"
    kind, _ = KINDS[name]
    has_blocks_of_256 = shape[-1] % 256 == 0
    if kind is GGMLQuantizationType.Q3_K and not has_blocks_of_256:
        return GGMLQuantizationType.IQ4_NL
    return kind


def write_gguf(folder: Path, file: Path, bits: str) -> None:
    """Write a Llama, or the text model of a Gemma 3, as GGUF, with `bits` a weight (`kind_of`).

    Raises:
        SystemExit: If `bits` or the kind of model is not known, or the rows of a matrix can't be cut into blocks.
    """
    if bits.rstrip("*") not in KINDS:
        raise SystemExit(f"--bits {bits} is not known; pass some of {[*KINDS]}.")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("llama", "gemma3_text"):
        raise SystemExit(f"{folder} is a {config.model_type}: pass a llama or a gemma3_text.")
    is_gemma = config.model_type == "gemma3_text"

    writer = gguf.GGUFWriter(file, "gemma3" if is_gemma else "llama")
    _, file_type = KINDS[bits.rstrip("*")]
    writer.add_file_type(file_type)
    add_configuration(writer, config, is_gemma=is_gemma)
    architecture = gguf.MODEL_ARCH.GEMMA3 if is_gemma else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    files = checkpoint_files(folder)
    for name, tensor in read_tensors(files, sorted(files)):
        new_name = names.get_name(name, try_suffixes=(".weight",))
        is_norm = tensor.ndim == 1
        if is_gemma and is_norm:
            tensor = tensor + 1  # llama.cpp's norms scale by w, Gemma's by 1 + w
        elif not is_gemma and new_name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp rotates neighbours, Transformers the halves of a head
            halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        kind = kind_of(bits, tensor.shape, new_name == head)
        writer.add_tensor(new_name, rounded(name, tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_configuration(writer: gguf.GGUFWriter, config: PreTrainedConfig, *, is_gemma: bool) -> None:
    """Add the sizes of a model to a GGUF file that is being written, and a tokenizer whose words are numbers."""
    writer.add_block_count(config.num_hidden_layers)
    # a small model may have seen fewer tokens
    writer.add_context_length(max(config.max_position_embeddings, CONTEXT))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # if heads were removed, it is not hidden_size / num_attention_heads
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope_parameters
    if is_gemma:
        writer.add_sliding_window(config.sliding_window)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)


def rounded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Round a tensor as a GGUF file stores it in a kind; returns its values, or the bytes of its blocks.

    SystemExit if the rows of the tensor, which is called `name`, are not made of whole blocks.
    """
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise SystemExit(
            f"{name} has rows of {tensor.shape[-1]} weights; {kind.name} needs a multiple of {block}."
        )
    values = tensor.float().contiguous().numpy()
    if kind not in (GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.Q3_K):
        return gguf.quantize(values, kind)
    # `gguf` reads these kinds and can't write them, so llama.cpp's own function does
    rows, columns = values.shape
    written = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk(
        int(kind),
        ctypes.c_void_p(values.ctypes.data),
        ctypes.c_void_p(written.ctypes.data),
        ctypes.c_int64(0),  # first row
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,  # no importances
    )
    return written


def server_of(file: Path, threads: int, parallel: int = 1) -> Any:
    """llama.cpp with one model, for so many prompts at a time."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = CONTEXT
    parameters.kv_unified = True  # the prompts share these tokens
    parameters.n_parallel = parallel
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = 0
    return xllamacpp.Server(parameters)


def generate(server: Any, prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Greedy decoding: what llama.cpp answers, with the text and its own times."""
    options = {
        "n_predict": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = server.handle_completions({"prompt": prompt.tolist(), **options})
    if "error" in answer:
        raise SystemExit(f"llama.cpp refuses {prompt.numel()} tokens: {answer['error']}")
    return answer


def require_same_tokens(
    folder: Path, file: Path, prompt: Tensor, new_tokens: int, threads: int
) -> None:
    """End the program unless llama.cpp and Transformers write the same greedy tokens in float32."""
    write_gguf(folder, file, "32")
    (answer,) = generate(server_of(file, threads), prompt, new_tokens)["choices"]
    written_by_llama_cpp = [int(word) for word in re.findall(r"<(\d+)>", answer["text"])]
    file.unlink()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        pad_token_id=0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    written_by_transformers = ids[0, len(prompt) :].tolist()
    if written_by_llama_cpp != written_by_transformers:
        raise SystemExit(
            f"{folder.name}: llama.cpp writes {written_by_llama_cpp}, Transformers {written_by_transformers}"
        )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Each model as many times the first one with as many bits; and the first one as many times its first bits."""
    first = rows[0]
    lines = []
    for row in rows:
        first_with_its_bits = next(other for other in rows if other["bits"] == row["bits"])
        base = first if row is first_with_its_bits else first_with_its_bits
        ratios = []
        for key in ("decode", "prefill"):
            ratios.append(statistics.median(row[key]) / statistics.median(base[key]))
        for key in ("memory_bytes", "file_bytes"):
            ratios.append(row[key] / base[key])
        lines.append((row["model"], row["bits"], *(f"{ratio:.2f}x" for ratio in ratios)))
    return markdown_lines(("model", "bits", "decode", "prefill", "memory", "file"), lines)


def main() -> None:
    """Measure all models in all kinds, print the table, and write the record."""
    helps = {
        "models": "folders of models; ratios are to the first",
        "bits": "bits a weight",
        "checked": "greedy tokens to compare; 0 = none",
    }
    arguments = parse_arguments(
        __doc__,
        helps=helps,
        models=[""],
        bits=["16", "8", "4"],
        prompt_tokens=512,
        new_tokens=32,
        checked=24,
        rounds=5,
        threads=1,
        output=Path("runs/llama_cpp.json"),
    )
    if xllamacpp is None:
        raise SystemExit("llama.cpp is missing: pip install xllamacpp")
    torch.set_num_threads(arguments.threads)
    folders = [Path(name) for name in arguments.models]
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(AutoConfig.from_pretrained(folder).vocab_size for folder in folders)
    prompt = torch.randint(0, vocabulary, (arguments.prompt_tokens,), generator=generator)

    with tempfile.TemporaryDirectory() as temporary:
        if arguments.checked:
            file = Path(temporary) / "float32.gguf"
            for folder in folders:
                require_same_tokens(folder, file, prompt[:16], arguments.checked, arguments.threads)
        rows = measure(arguments, folders, prompt, Path(temporary))
    print("\n".join(table(rows)))
    arguments.models = [folder.name for folder in folders]
    machine = {"processor": processor_name(), "xllamacpp": xllamacpp.__version__}
    save(arguments, {"machine": machine, "rows": rows})


def measure(
    arguments: Namespace, folders: list[Path], prompt: Tensor, temporary: Path
) -> list[dict[str, Any]]:
    """Return a row for each model in each kind: bytes, and tokens a second of `arguments.rounds` rounds in turn.

    GGUF files are written to the folder `temporary`. All models are in memory together.
    """
    rows: list[dict[str, Any]] = []
    files: list[Path] = []
    for folder in folders:
        for bits in arguments.bits:
            file = temporary / f"{len(files)}.gguf"
            write_gguf(folder, file, bits)
            files.append(file)
            rows.append({"model": folder.name, "bits": bits, "file_bytes": file.stat().st_size})

    servers = []
    for row, file in zip(rows, files, strict=True):
        before = psutil.Process().memory_info().rss
        server = server_of(file, arguments.threads)
        generate(server, prompt, arguments.new_tokens)  # warms up
        row["memory_bytes"] = psutil.Process().memory_info().rss - before
        row["prefill"] = []
        row["decode"] = []
        servers.append(server)
    for _ in range(arguments.rounds):
        for row, server in zip(rows, servers, strict=True):
            times = generate(server, prompt, arguments.new_tokens)["timings"]
            row["prefill"].append(times["prompt_per_second"])
            row["decode"].append(times["predicted_per_second"])
    return rows


if __name__ == "__main__":
    main()
