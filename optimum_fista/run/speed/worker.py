"""A process of its own for one way to run a model: its memory is that model's alone, its speed is measured in turn."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from optimum_fista.model.architecture import input_embedding
from optimum_fista.run.checkpoints.loading import read_model
from optimum_fista.run.memory import device_counts, release_free_memory
from optimum_fista.run.packed_folders.packed_loading import FistaPackedConfig
from optimum_fista.run.texts.explained_errors import explained_length


class Worker:
    """A process that holds a model in one variant and runs it when asked.

    Args:
        name: The variant, such as `"packed bfloat16"`.
        folder: Model folder, a packed one if the variant is packed.
        device: Where to load it.
        threads: Threads of PyTorch on the CPU.
    """

    def __init__(self, name: str, folder: Path, device: str, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, folder, device, threads), daemon=True)
        self._process.start()
        other.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have it call one of the functions of `_Runner`, and return what that returns.

        Raises:
            RuntimeError: If it fails there, or the process is gone.
        """
        try:
            self._connection.send((name, arguments))
            error, result = self._connection.recv()
        except (EOFError, OSError) as gone:
            self._process.join(5)
            raise RuntimeError(
                f"{self.name}: its process has ended (exit code {self._process.exitcode}); if it was "
                "killed, the memory did not suffice: measure fewer variants at a time"
            ) from gone
        if error is not None:
            raise RuntimeError(f"{self.name}: {error}")
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


class _Runner:
    """What a worker can be asked for."""

    def __init__(self, name: str, folder: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.randn(64, 64) @ torch.randn(64, 64)
        self._before = psutil.Process().memory_info().rss
        runtime, dtype = name.split()
        config = {"quantization_config": FistaPackedConfig(runtime="packed")} if runtime == "packed" else {}
        model: Any = read_model(str(folder), dtype=getattr(torch, dtype), **config)
        for option in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, option, None)  # of sampling, which greedy decoding would warn of
        self.model: Any = nn.Module.to(model, device).eval()
        self.device = torch.device(device)
        release_free_memory(collect=True)

    def parameters(self) -> tuple[int, int]:
        """Size of the vocabulary, and bytes of all tensors of the state, each counted once."""
        tensors = {t.data_ptr() if t.device.type != "meta" else id(t): t for t in self.model.state_dict().values()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return input_embedding(self.model).shape[0], size

    def memory(self) -> int:
        """Bytes that loading and running the model have added: on the device, or resident in this process."""
        counts = device_counts(self.device)
        if counts is not None:
            return int(counts.max_memory_allocated(self.device))
        release_free_memory(collect=True)
        return int(psutil.Process().memory_info().rss) - self._before

    def generate(self, prompt: Tensor, new_tokens: int) -> tuple[float, Tensor]:
        """Seconds of greedy decoding, and the tokens [batch, new_tokens]."""
        ids = prompt.to(self.device)
        length, flags = ids.shape[1] + new_tokens, "--prompt-tokens + --new-tokens"
        started = self._now()
        with explained_length(self.model, length, "prompt_tokens + new_tokens", flags):
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
            )
        return self._now() - started, output[:, ids.shape[1] :].cpu()

    def prefill(self, prompt: Tensor) -> tuple[float, Tensor]:
        """Seconds of one forward pass, and the logits [batch, vocabulary] of the last token."""
        ids = prompt.to(self.device)
        started = self._now()
        with torch.no_grad(), explained_length(self.model, ids.shape[1], "prefill_tokens", "--prefill-tokens"):
            logits = self.model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]
        return self._now() - started, logits.float().cpu()

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _serve(connection: Connection, *model: Any) -> None:
    # Ctrl-C in a terminal reaches this process as well: it ends without a word
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    warnings.simplefilter("ignore")
    runner: _Runner | None = None
    with suppress(EOFError, OSError):  # the process that asks is gone
        while True:
            name, arguments = connection.recv()
            try:
                runner = runner or _Runner(*model)
                connection.send((None, getattr(runner, name)(*arguments)))
            except Exception as error:
                connection.send((f"{type(error).__name__}: {error}", None))
