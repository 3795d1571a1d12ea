"""Llamas of several sizes through llama.cpp at 16 bits, in turn: tokens a second, and the size of the GGUF file.

Before that, greedy tokens of llama.cpp in float32 must be those of Transformers in float32. Prompts are random tokens,
and the words of the GGUF files are the numbers of their tokens. `pip install xllamacpp` gives llama.cpp.

    python benchmarks/llama_cpp.py --models runs/original,runs/smaller --output runs/llama_cpp.json
"""

from __future__ import annotations

import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from shared import parse_arguments, save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_fista.run.checkpoints.checkpoint import checkpoint_files, read_tensors
from optimum_fista.run.speed.measure import processor_name

try:
    import xllamacpp
except ImportError:  # `--help` needs no llama.cpp
    xllamacpp = None


def write_gguf(folder: Path, file: Path, dtype: torch.dtype) -> None:
    """Write a Llama as GGUF: matrices in `dtype`, vectors in float32."""
    config = LlamaConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)  # without heads it is not hidden_size / num_attention_heads
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    files = checkpoint_files(folder)
    for name, tensor in read_tensors(files, sorted(files)):
        new_name = names.get_name(name, try_suffixes=(".weight",))
        if new_name.endswith(
            ("attn_q.weight", "attn_k.weight")
        ):  # llama.cpp rotates neighbours, Transformers the halves of a head
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        tensor = tensor.to(dtype if tensor.ndim > 1 else torch.float32)
        writer.add_tensor(new_name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def server_of(file: Path, threads: int) -> Any:
    """llama.cpp with one model."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 1024, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = 0
    return xllamacpp.Server(parameters)


def generate(server: Any, prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Greedy decoding: what llama.cpp answers, with the text and its own times."""
    options = {"n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    return server.handle_completions({"prompt": prompt.tolist(), **options})


def require_same_tokens(folder: Path, file: Path, prompt: Tensor, new_tokens: int, threads: int) -> None:
    """End the program unless llama.cpp and Transformers write the same greedy tokens in float32."""
    write_gguf(folder, file, torch.float32)
    (answer,) = generate(server_of(file, threads), prompt, new_tokens)["choices"]
    found = [int(word) for word in re.findall(r"<(\d+)>", answer["text"])]
    file.unlink()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    wanted = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), pad_token_id=0, **options)
    if found != wanted[0, len(prompt) :].tolist():
        raise SystemExit(f"{folder.name}: llama.cpp writes {found}, Transformers {wanted[0, len(prompt) :].tolist()}")


def main() -> None:
    helps = {"models": "folders of Llamas; ratios are to the first", "checked": "greedy tokens to compare; 0 = none"}
    numbers = {"prompt_tokens": 512, "new_tokens": 32, "checked": 24, "rounds": 5, "threads": 1}
    arguments = parse_arguments(__doc__, helps=helps, models=[""], **numbers, output=Path("runs/llama_cpp.json"))
    if xllamacpp is None:
        raise SystemExit("llama.cpp is missing: pip install xllamacpp")
    folders = [Path(name) for name in arguments.models]
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(LlamaConfig.from_pretrained(folder).vocab_size for folder in folders)
    prompt = torch.randint(0, vocabulary, (arguments.prompt_tokens,), generator=generator)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        servers = {}
        for index, folder in enumerate(folders):
            file = Path(temporary) / f"{index}.gguf"
            if arguments.checked:
                require_same_tokens(folder, file, prompt[:16], arguments.checked, arguments.threads)
            write_gguf(folder, file, torch.float16)
            servers[folder.name] = server_of(file, arguments.threads)
            rows[folder.name] = {"file_bytes": file.stat().st_size, "prefill": [], "decode": []}
        for turn in range(arguments.rounds + 1):  # the first one warms up
            for name, server in servers.items():
                times = generate(server, prompt, arguments.new_tokens)["timings"]
                if turn:
                    rows[name]["prefill"].append(times["prompt_per_second"])
                    rows[name]["decode"].append(times["predicted_per_second"])
    first = next(iter(rows.values()))
    for name, row in rows.items():
        for key in ("prefill", "decode"):
            speed, base = statistics.median(row[key]), statistics.median(first[key])
            print(f"{name}: {key} {speed:.1f} tokens/s ({speed / base:.2f}x)")
        print(f"{name}: {row['file_bytes'] / 2**20:.0f} MiB ({row['file_bytes'] / first['file_bytes']:.2f}x)")
    arguments.models = [folder.name for folder in folders]
    machine = {"processor": processor_name(), "xllamacpp": xllamacpp.__version__}
    save(arguments, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
