"""Write the greedy tokens of model folders by one client; `clients.py` starts this file in the client's environment.

Standard input has JSON: the name of the client, the prompts, and the folders by their kinds. For each folder, one line
of JSON is written to the file that the command line names: the tokens that follow each prompt, as ids or as text. An
error of the client takes the place of the tokens. Each client is a function here, called with a folder, the prompts and
how many tokens to write. Its imports are in the function, because an environment has the packages of one client.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The first tokens of a server that starts slowly may take so long.
_SECONDS_TO_START = 300


@dataclass(frozen=True)
class Prompt:
    """A question of a user, and the ids that the chat template of the model's folder makes of it."""

    question: str
    ids: list[int]


Answers = list[list[int]] | list[str]


def vllm(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Load a folder in vLLM, in float32."""
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4)
    parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
    outputs = model.generate(inputs, parameters)
    return [list(output.outputs[0].token_ids) for output in outputs]


def llama_cpp(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Write a folder as GGUF in float32 (`optimum-fista gguf`), and load that in llama.cpp.

    The prompts are texts here: llama.cpp cuts them into tokens, which must be as many as those of Transformers.
    """
    import xllamacpp
    from transformers import AutoTokenizer

    from optimum_fista.folder.gguf_file import write_gguf

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The tokens that are added to every text. Both programs do so.
    num_added = len(tokenizer("")["input_ids"])
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        write_gguf(folder, file, kind="f32")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = 512
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = 1
        parameters.cpuparams_batch.n_threads = 1
        parameters.verbosity = 0
        # The cache of keys and values is in 16 bits by default. Fused attention rounds, too: with it, tokens of
        # random models that were nearly tied came out otherwise.
        parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        attention = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = attention
        server = xllamacpp.Server(parameters)
        answers = []
        for prompt in prompts:
            content = {
                "prompt": tokenizer.decode(prompt.ids[num_added:]),
                "n_predict": new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "return_tokens": True,
            }
            answer = _post(f"{server.listening_address}/completion", content)
            num_tokens = answer["tokens_evaluated"]
            if num_tokens != len(prompt.ids):
                raise RuntimeError(
                    f"llama.cpp makes {num_tokens} tokens of a prompt of {len(prompt.ids)}"
                )
            answers.append(answer["tokens"])
    return answers


def openvino(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Export a folder by optimum-intel in float32, and load that in OpenVINO GenAI."""
    import numpy as np
    import openvino as ov
    import openvino_genai
    from optimum.exporters.openvino import main_export

    with tempfile.TemporaryDirectory() as exported:
        main_export(
            str(folder), exported, task="text-generation-with-past", ov_config=_float32_export()
        )
        # The cache of keys and values is in 8 bits by default.
        precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        pipeline = openvino_genai.LLMPipeline(exported, "CPU", **precision)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        answers = []
        for prompt in prompts:
            ids = ov.Tensor(np.array([prompt.ids], dtype=np.int64))
            (tokens,) = pipeline.generate(ids, config).tokens
            answers.append(list(tokens))
    return answers


def _float32_export() -> Any:
    """Make the options of an export that keeps float32."""
    from optimum.intel import OVConfig

    return OVConfig(dtype="fp32")


def onnx(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Export a folder by the model builder of ONNX Runtime GenAI in float32, and load that."""
    import onnxruntime_genai

    with tempfile.TemporaryDirectory() as exported:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
        command += ["-o", exported, "-p", "fp32", "-e", "cpu", "-c", f"{exported}/cache"]
        _require_success(command)
        model = onnxruntime_genai.Model(exported)
        answers = []
        for prompt in prompts:
            length = len(prompt.ids) + new_tokens
            parameters = onnxruntime_genai.GeneratorParams(model)
            parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
            generator = onnxruntime_genai.Generator(model, parameters)
            generator.append_tokens(prompt.ids)
            tokens = []
            while not generator.is_done():
                generator.generate_next_token()
                tokens.append(int(generator.get_next_tokens()[0]))
            answers.append(tokens)
    return answers


def serve(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Start `transformers serve` with a folder in float32, and ask it over HTTP; the answers are texts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://localhost:{port}/v1/models", server, log)
            return [_ask(port, folder, prompt.question, new_tokens) for prompt in prompts]
        finally:
            server.terminate()
            server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Any) -> None:
    """Wait until a server answers; RuntimeError with the last line of its log if it ends before, or takes too long."""
    end = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=10).read()
        except OSError:
            time.sleep(1)
        else:
            return
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    raise RuntimeError(f"the server does not answer: {lines[-1] if lines else 'it wrote no line'}")


def _ask(port: int, folder: Path, question: str, new_tokens: int) -> str:
    """Ask the server for the greedy answer to a question."""
    content = {
        "model": str(folder),
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.0,
        "max_tokens": new_tokens,
        "stream": False,
    }
    answer = _post(f"http://localhost:{port}/v1/chat/completions", content)
    text: str = answer["choices"][0]["message"]["content"]
    return text


def _post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    """Send JSON to a server and return its answer; RuntimeError with the end of what it says if it refuses."""
    request = urllib.request.Request(
        url, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS_TO_START) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()[-300:]) from error
    return answer


def compressed(scheme: str) -> Callable[[Path, Sequence[Prompt], int], Answers]:
    """Make the client that quantizes a folder by llm-compressor, in a scheme such as "W4A16", and loads that."""

    def answers_of(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
        """Quantize a folder, save and load it by Transformers; its tokens need not be those of the folder."""
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        with tempfile.TemporaryDirectory() as quantized:
            modifier = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
            oneshot(model=str(folder), recipe=modifier, output_dir=quantized)
            return transformers(Path(quantized), prompts, new_tokens)

    return answers_of


def peft(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Train a LoRA adapter on a folder for two steps; the tokens are those with the adapter switched off.

    RuntimeError if the adapter learns nothing, or if a weight of the folder changes: zeros under the masks stay.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    adapted = get_peft_model(model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.tensor([prompts[0].ids])
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if losses[-1] >= losses[0]:
        raise RuntimeError(f"the loss of the adapter does not fall: {losses}")

    with adapted.disable_adapter():
        answers = _greedy(adapted, prompts, new_tokens)
    restored = adapted.unload().state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, restored[name])]
    if changed:
        raise RuntimeError(f"the adapter has changed {len(changed)} tensors, such as {changed[0]}")
    return answers


def transformers(folder: Path, prompts: Sequence[Prompt], new_tokens: int) -> Answers:
    """Load a folder by Transformers in float32: what the clients are compared with."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return _greedy(model, prompts, new_tokens)


def _greedy(model: Any, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """Write the greedy tokens of a model of Transformers after each prompt, whatever ends a text."""
    import torch

    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(tokens[0, ids.shape[1] :].tolist())
    return answers


def _require_success(command: list[str]) -> None:
    """Run a command; RuntimeError with its last line if it fails."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"{command[2]} ended with {process.returncode}")


CLIENTS: dict[str, Callable[[Path, Sequence[Prompt], int], Answers]] = {
    "transformers": transformers,
    "vllm": vllm,
    "llama_cpp": llama_cpp,
    "openvino": openvino,
    "onnx": onnx,
    "serve": serve,
    "w4a16": compressed("W4A16"),
    "fp8": compressed("FP8_DYNAMIC"),
    "peft": peft,
}


def main() -> None:
    """Answer the request of the standard input, one line for each folder, in the file that the command line names."""
    (output,) = sys.argv[1:]
    request = json.load(sys.stdin)
    answers_of = CLIENTS[request["client"]]
    for kind, folder in request["folders"].items():
        prompts = [Prompt(**prompt) for prompt in request["prompts"][kind]]
        line: dict[str, Any] = {"kind": kind}
        begun = time.monotonic()
        try:
            line["answers"] = answers_of(Path(folder), prompts, request["new_tokens"])
        except (
            Exception
        ) as error:  # a client may raise anything, and the next kind is asked all the same
            text = " ".join(str(error).split()).replace(folder, kind)
            line["error"] = f"{type(error).__name__}: {text}"[:300]
        line["seconds"] = round(time.monotonic() - begun, 1)
        with Path(output).open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
