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
from transformers import AutoConfig, AutoModelForCausalLM

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
    keeps_head = is_head and bits not in ("32", "16") and not bits.endswith("*")
    kind = KINDS["8" if keeps_head else bits.rstrip("*")][0]
    return KINDS["IQ4_NL"][0] if kind is GGMLQuantizationType.Q3_K and shape[-1] % 256 else kind


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
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(
        max(config.max_position_embeddings, CONTEXT)
    )  # a small model may have seen fewer tokens
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(
        config.head_dim
    )  # without heads it is not hidden_size / num_attention_heads
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    if is_gemma:
        writer.add_sliding_window(config.sliding_window)
    rope = config.rope_parameters["full_attention"] if is_gemma else config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(KINDS[bits.rstrip("*")][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    architecture = gguf.MODEL_ARCH.GEMMA3 if is_gemma else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    files = checkpoint_files(folder)
    for name, tensor in read_tensors(files, sorted(files)):
        new_name = names.get_name(name, try_suffixes=(".weight",))
        if is_gemma:
            tensor = (
                tensor + 1 if tensor.ndim == 1 else tensor
            )  # llama.cpp's norms scale by w, Gemma's by 1 + w
        elif new_name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp rotates neighbours, Transformers the halves of a head
            tensor = (
                tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            )
        kind = kind_of(bits, tensor.shape, new_name == head)
        writer.add_tensor(new_name, rounded(name, tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Values of a tensor, or the bytes of its blocks."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise SystemExit(
            f"{name} has rows of {tensor.shape[-1]} weights; {kind.name} needs a multiple of {block}."
        )
    values = tensor.float().contiguous().numpy()
    if kind not in (KINDS["IQ4_NL"][0], KINDS["Q3_K"][0]):
        return gguf.quantize(values, kind)
    written = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    sizes = (ctypes.c_int64(size) for size in (0, *values.shape))  # first row, rows, columns
    library = ctypes.CDLL(
        xllamacpp.xllamacpp.__file__
    )  # `gguf` reads these kinds and can't write them
    library.ggml_quantize_chunk(
        int(kind),
        ctypes.c_void_p(values.ctypes.data),
        ctypes.c_void_p(written.ctypes.data),
        *sizes,
        None,
    )
    return written


def server_of(file: Path, threads: int, parallel: int = 1) -> Any:
    """llama.cpp with one model, for so many prompts at a time."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = CONTEXT, parallel, 0
    parameters.kv_unified = True  # the prompts share these tokens
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
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
    found = [int(word) for word in re.findall(r"<(\d+)>", answer["text"])]
    file.unlink()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    wanted = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), pad_token_id=0, **options
    )
    if found != wanted[0, len(prompt) :].tolist():
        raise SystemExit(
            f"{folder.name}: llama.cpp writes {found}, Transformers {wanted[0, len(prompt) :].tolist()}"
        )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Each model as many times the first one with as many bits; and the first one as many times its first bits."""
    lines = []
    for row in rows:
        same_bits = next(other for other in rows if other["bits"] == row["bits"])
        base = rows[0] if row is same_bits else same_bits
        speeds = [
            statistics.median(row[k]) / statistics.median(base[k]) for k in ("decode", "prefill")
        ]
        ratios = (
            *speeds,
            row["memory_bytes"] / base["memory_bytes"],
            row["file_bytes"] / base["file_bytes"],
        )
        lines.append((row["model"], row["bits"], *(f"{ratio:.2f}x" for ratio in ratios)))
    return markdown_lines(("model", "bits", "decode", "prefill", "memory", "file"), lines)


def main() -> None:
    helps = {
        "models": "folders of models; ratios are to the first",
        "bits": "bits a weight",
        "checked": "greedy tokens to compare; 0 = none",
    }
    numbers = {"prompt_tokens": 512, "new_tokens": 32, "checked": 24, "rounds": 5, "threads": 1}
    lists: dict[str, list[Any]] = {"models": [""], "bits": ["16", "8", "4"]}
    arguments = parse_arguments(
        __doc__, helps=helps, **lists, **numbers, output=Path("runs/llama_cpp.json")
    )
    if xllamacpp is None:
        raise SystemExit("llama.cpp is missing: pip install xllamacpp")
    torch.set_num_threads(arguments.threads)
    folders = [Path(name) for name in arguments.models]
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(AutoConfig.from_pretrained(folder).vocab_size for folder in folders)
    prompt = torch.randint(0, vocabulary, (arguments.prompt_tokens,), generator=generator)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for folder in folders:
            if arguments.checked:
                file = Path(temporary) / "float32.gguf"
                require_same_tokens(folder, file, prompt[:16], arguments.checked, arguments.threads)
            for bits in arguments.bits:
                file = Path(temporary) / f"{len(rows)}.gguf"
                write_gguf(folder, file, bits)
                row = {"model": folder.name, "bits": bits, "file_bytes": file.stat().st_size}
                rows.append(row | {"prefill": [], "decode": []})
        servers = []
        for index, row in enumerate(rows):
            before = psutil.Process().memory_info().rss
            servers.append(server_of(Path(temporary) / f"{index}.gguf", arguments.threads))
            generate(servers[-1], prompt, arguments.new_tokens)  # warms up
            row["memory_bytes"] = psutil.Process().memory_info().rss - before
        for _ in range(arguments.rounds):
            for row, server in zip(rows, servers, strict=True):
                times = generate(server, prompt, arguments.new_tokens)["timings"]
                row["prefill"].append(times["prompt_per_second"])
                row["decode"].append(times["predicted_per_second"])
    print("\n".join(table(rows)))
    arguments.models = [folder.name for folder in folders]
    machine = {"processor": processor_name(), "xllamacpp": xllamacpp.__version__}
    save(arguments, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
