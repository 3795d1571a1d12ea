"""The training of a recovery: how far it has come, and the best weights so far."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.digest import combined_sha256, tensor_sha256
from optimum_fista.model.reconstruction import rate_factor
from optimum_fista.model.replay import replaced_forwards
from optimum_fista.run.checkpoints.atomic import write_tensors
from optimum_fista.run.checkpoints.checkpoint import mark_retrained, read_report
from optimum_fista.run.checkpoints.loading import load_model, read_model
from optimum_fista.run.environment import processor
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.memory import available_bytes, release_free_memory
from optimum_fista.run.ranks import Ranks
from optimum_fista.run.reports.report import RecoveryReport, public_name
from optimum_fista.run.retraining.choice import RANK, choose, linear_operators
from optimum_fista.run.retraining.distillation import LargestLogits, TeacherCache, divergence, locked_cache
from optimum_fista.run.retraining.masks import find_masks, pruned_folder
from optimum_fista.run.retraining.sharding import local, shard, whole
from optimum_fista.run.retraining.training import MaskedTraining
from optimum_fista.run.streamed.journal import differences, read_record, write_record

logger = logging.getLogger(__name__)

TEACHER_FOLDER = "teacher"
"""Where an unfinished recovery keeps the teacher's largest logits."""
_RATES = {"all": 2e-4, "lora": 1e-3, "norms": 2e-3}
_WIDTH_OF_RATE = 576
"""Hidden size of the model on which the rate of `"all"` was tuned; with Adam it goes down as the width goes up."""
_WARM_UP = 0.05
_CLIP = 1.0
_EVALUATIONS = 4
_SAVE_SECONDS = 120.0
_SHARED = "pass a folder that all nodes share"


class RecoveryTraining:
    """One run: what is trained, how far it has come, and the best weights so far."""

    def __init__(
        self,
        source: str,
        teacher: str,
        windows: Tensor,
        count: int,
        options: dict[str, Any],
        device: torch.device,
        compute: torch.dtype,
        journal: Path,
        progress: bool,
        ranks: Ranks,
    ) -> None:
        self.source, self.teacher, self.options, self.device, self.compute = source, teacher, options, device, compute
        self.windows, self.held_out = windows[:count], windows[count:]
        self.steps = count // (options["batch_size"] * options["accumulate"])
        self.step, self.seconds, self.evaluations, self.best_step = 0, 0.0, list[list[float]](), 0
        self._journal, self._progress, self._stepping = journal, progress and not ranks.index, False
        self._ranks = ranks
        if not journal.exists():
            raise ValueError(f"output: rank 0 began {str(journal.parent)!r}, and it isn't here: {_SHARED}.")
        self._mesh: DeviceMesh | None = init_device_mesh(device.type, (ranks.count,)) if ranks.count > 1 else None
        ranks.each(self._load)

    def _load(self) -> None:
        self.model = read_model(self.source, dtype="auto")
        self._dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        if self._mesh is not None:
            shard(self.model, self._mesh, torch.float32)
        else:
            nn.Module.to(self.model, self.device)
            self.model.float()
        self.model.eval().requires_grad_(False)

    def _round(self) -> None:
        """Round the weights to what is saved of them."""
        for name, parameter in self.model.named_parameters():
            part = local(parameter.data)
            part.copy_(part.to(self._dtypes[name]))

    def _recovered(self) -> PreTrainedModel | None:
        """In rank 0 the model of the source, with the trained weights if these are better."""
        model = None if self._ranks.index else read_model(self.source, dtype="auto")
        for name, parameter in self.model.named_parameters() if self.best_step else ():
            value = whole(parameter.detach())
            if model is not None:
                model.get_parameter(name).data.copy_(value)
        if model is not None and self.best_step:
            mark_retrained(model)
        return model

    def prepare(self, opened: ExitStack, cache: Path | None, of_teacher: Mapping[str, Any]) -> None:
        """Choose what is trained, make the teacher ready, and take up the state of an earlier start."""
        ranks, record = self._ranks, self._journal / "choice.json"
        free = ranks.gather(available_bytes(self.device))
        choice = ranks.first(lambda: read_record(record) or self._choose(cache is not None, free))
        ranks.first(lambda: write_record(record, choice))
        self.kind = choice["train"]
        self._cache: TeacherCache | None = None
        self._teacher: PreTrainedModel | None = None
        if choice["cached"]:
            self._open_cache(cache or self._journal / TEACHER_FOLDER, of_teacher)
        else:
            self._teacher = ranks.each(self._load_teacher)
        if choice["checkpointed"]:
            opened.enter_context(_checkpointed_layers(self.model))
        self._peft_model = self._add_adapters() if self.kind == "lora" else None
        self._trained = self._trained_parameters()
        masks: dict[str, Tensor] = {}
        if self.kind == "all":
            found = ranks.each(lambda: find_masks(self.model, self.source))
            masks = {name: mask for name, mask in found.items() if not bool(mask.all())}
            opened.enter_context(MaskedTraining(self.model, masks))
        zeros = sum(ranks.gather(sum(int((~mask).sum()) for name, mask in masks.items() if name in self._trained)))
        self.num_trained = sum(parameter.numel() for parameter in self._trained.values()) - zeros
        rate = self.options["learning_rate"]
        width = self.model.config.get_text_config(decoder=True).hidden_size
        scale = min(1.0, _WIDTH_OF_RATE / width) if self.kind == "all" else 1.0
        self.rate = _RATES[self.kind] * scale if rate is None else rate
        self._optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=self.rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True if self.device.type == "cpu" else None,  # on others the default takes many tensors at once
        )
        self._best: dict[str, Tensor] = {}
        self._resume()

    def train(self) -> None:
        """Train to the last step, and put the best weights into the model; Ctrl-C keeps the steps done."""
        started = saved = time.perf_counter()
        before = self.seconds
        positions = self.windows[0].numel() * self.options["batch_size"] * self.options["accumulate"]
        every = math.ceil(self.steps / _EVALUATIONS)
        bar = tqdm(
            total=self.steps * positions,
            initial=self.step * positions,
            desc="Recovering",
            unit="token",
            unit_scale=True,
            disable=not self._progress,
        )
        with bar:
            try:
                while True:
                    due = self.step % every == 0 or self.step == self.steps
                    if due and (not self.evaluations or self.evaluations[-1][0] < self.step):
                        self._evaluate()
                        self.seconds = before + time.perf_counter() - started
                    if self._ranks.gather(time.perf_counter() - saved > _SAVE_SECONDS)[0]:
                        self._save()
                        saved = time.perf_counter()
                    if self.step == self.steps:
                        break
                    loss = self._take_step()
                    if not math.isfinite(loss):
                        logger.warning("the loss is no longer finite in step %d: training ends here", self.step + 1)
                        break
                    self.step += 1
                    self._stepping = False
                    self.seconds = before + time.perf_counter() - started
                    bar.update(positions)
                    bar.set_postfix_str(f"loss {loss:.3f}, held-out {self.evaluations[-1][2]:.4f}", refresh=False)
            except KeyboardInterrupt:
                if not self._stepping and self.evaluations and self._mesh is None:  # others may be elsewhere
                    self._save()
                raise
        for name, value in self._best.items():
            local(self._trained[name].data).copy_(value)

    def result(self, calibration: str) -> tuple[PreTrainedModel | None, RecoveryReport]:
        """The model to save, in its own dtypes, which rank 0 has, and what was done."""
        before, loss = self.evaluations[0][2], min(loss for _, _, loss in self.evaluations)
        self._teacher = None
        self._optimizer.state.clear()
        if self.best_step:
            if self._peft_model is not None:
                from optimum_fista.run.retraining.lora import merge_adapters

                merge_adapters(self._peft_model)
            self._round()
            if self._peft_model is not None or any(self._dtypes[name] != torch.float32 for name in self._best):
                loss = self._held_out_loss()  # of what is saved, which has to be better
            self.best_step = self.best_step if loss < before else 0
        used = {name: value for name, value in self.options.items() if name != "teacher_cache"}
        if self._cache is None:
            used.pop("top_k")
        found = RecoveryReport(
            teacher=public_name(self.teacher),
            train=self.kind,
            num_trained=self.num_trained,
            num_tokens=self.step * self.windows.numel() // self.steps,
            calibration={
                "source": public_name(calibration),
                "sha256": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
                "sequence_length": self.windows.shape[1],
                "held_out": len(self.held_out),
            },
            options=used | {"learning_rate": self.rate},
            evaluations=self.evaluations,
            best_step=self.best_step,
            held_out_loss_before=before,
            held_out_loss=loss if self.best_step else before,
            seconds=self.seconds,
        )
        return self._recovered(), found

    def _take_step(self) -> float:
        """Train on the sequences of one step; returns the loss, and changes nothing if that is not finite."""
        size, ranks = self.options["batch_size"], self._ranks
        passes = self.options["accumulate"] // ranks.count  # of this process; gradients are averaged over all
        total = torch.zeros((), device=self.device)
        start = (self.step * ranks.count + ranks.index) * passes
        for index in range(start, start + passes):
            first, last = index * size, (index + 1) * size
            ids = self.windows[first:last].to(self.device)
            with self._autocast():
                logits = self._logits(self.model, ids)[:, :-1].flatten(0, 1)
            target: Tensor | LargestLogits
            if self._cache is not None:
                target = self._cache.read(first, last).to(self.device)
            else:
                assert self._teacher is not None
                with torch.no_grad():
                    target = self._logits(self._teacher, ids)[:, :-1].flatten(0, 1)
            loss = divergence(logits, target, ids[:, 1:].flatten(), self.options["label_share"])
            (loss / passes).backward()
            total += loss.detach()
        value = sum(ranks.gather(float(total) / passes)) / ranks.count
        if math.isfinite(value):
            nn.utils.clip_grad_norm_(list(self._trained.values()), _CLIP)
            for group in self._optimizer.param_groups:
                group["lr"] = self.rate * rate_factor(self.step, self.steps, _WARM_UP)
            self._stepping = True  # until the step is counted
            self._optimizer.step()
        self._optimizer.zero_grad()
        return value

    def _logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Logits of sequences [sequences, tokens, vocabulary]."""
        found: Tensor = model(input_ids=ids.to(self.device), use_cache=False).logits
        return found

    def _autocast(self) -> AbstractContextManager[object]:
        if self.compute == torch.float32:
            return nullcontext()
        # Rounded weights in its cache would be whole, and of all decoder layers.
        return torch.autocast(self.device.type, self.compute, cache_enabled=self._mesh is None)

    def _held_out_loss(self) -> float:
        """The mean over the held-out sequences, of which every process measures some; infinite if one gives NaN."""
        total, count, ranks = 0.0, len(self.held_out), self._ranks
        for mine in range(ranks.index, count + ranks.index, ranks.count):  # all run the model equally often
            ids = self.held_out[min(mine, count - 1)][None]
            try:
                with self._autocast():
                    loss = math.log(evaluate_perplexity(self.model, ids, progress=False).perplexity)
            except ValueError:
                if not self.evaluations:
                    raise
                loss = math.inf
            total += loss if mine < count else 0.0
        return sum(ranks.gather(total)) / count

    def _evaluate(self) -> None:
        loss = self._held_out_loss()
        logger.info("held-out loss %.4f after step %d of %d", loss, self.step, self.steps)
        if self.evaluations and loss < min(found for _, _, found in self.evaluations):
            self.best_step = self.step
            self._best = {name: local(p.detach()).to("cpu", copy=True) for name, p in self._trained.items()}
        self.evaluations.append([self.step, round(self.seconds, 1), loss])

    def _save(self) -> None:
        """Write the state, each process its own in one file; the last one goes when all have done so."""
        tensors = {f"weights/{name}": local(parameter.detach()) for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = local(value)
        tensors |= {f"best/{name}": value for name, value in self._best.items()}
        values = {"step": self.step, "seconds": self.seconds, "evaluations": self.evaluations, "best": self.best_step}
        values["processor"] = processor()
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        digests = {name: tensor_sha256(value) for name, value in contiguous.items()}
        noted = json.dumps(values)
        metadata = {"state": noted, "sha256": combined_sha256({**digests, "": noted})}
        old = state_files(self._journal, self._ranks.index)
        new = self._journal / f"state-{self._ranks.index}-{self.step}.safetensors"
        self._ranks.each(lambda: write_tensors(new, contiguous, metadata))
        for file in old.values():
            if file != new:
                file.unlink()

    def _resume(self) -> None:
        """Take up the last state that all processes have, if there is one."""
        for begun in self._journal.glob(f".state-{self._ranks.index}-*"):  # by a process that was killed meanwhile
            begun.unlink()
        files = state_files(self._journal, self._ranks.index)
        kept = {step: found for step, file in files.items() if (found := open_state(file)) is not None}
        common = set.intersection(*map(set, self._ranks.gather([*kept])))
        if not common:
            return
        with kept[max(common)] as file:
            values = json.loads(file.metadata()["state"])
            state: dict[int, dict[str, Tensor]] = {}
            numbers = {name: number for number, name in enumerate(self._trained)}
            for key in file.keys():  # noqa: SIM118, it is no dictionary
                kind, _, name = key.partition("/")
                value = file.get_tensor(key)
                if kind == "weights":
                    local(self._trained[name].data).copy_(value)
                elif kind == "best":
                    self._best[name] = value
                else:
                    moment = value
                    if kind != "step":
                        moment = torch.zeros_like(self._trained[name].detach())
                        local(moment).copy_(value)
                    state.setdefault(numbers[name], {})[kind] = moment
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.seconds, self.best_step = values["step"], values["seconds"], values["best"]
        self.evaluations = values["evaluations"]
        logger.info("resuming after step %d of %d", self.step, self.steps)
        if changes := "; ".join(differences(values.get("processor", {}), processor())):
            logger.warning("the result may not be that of an uninterrupted run to the bit: %s", changes)

    def _load_teacher(self) -> PreTrainedModel:
        model, _ = load_model(
            self.teacher, device=str(self.device) if self._mesh is None else "cpu", dtype=self.compute
        )
        if self._mesh is not None:
            shard(model, self._mesh)
        return model.eval().requires_grad_(False)

    def _open_cache(self, folder: Path, of_teacher: Mapping[str, Any]) -> None:
        """Have all predictions of the teacher in a folder; the student makes room for it meanwhile."""
        ranks = self._ranks
        k = min(self.options["top_k"], self.model.config.get_text_config(decoder=True).vocab_size)
        with ExitStack() as filling:

            def begin() -> int:
                filling.enter_context(locked_cache(folder))
                self._cache = TeacherCache(folder, k, self.windows, of_teacher)
                return self._cache.finished

            if (finished := ranks.first(begin)) < len(self.windows):
                del self.model
                release_free_memory(collect=True)
                self._fill(finished, k)
                release_free_memory(collect=True)
                ranks.each(self._load)

            def read() -> TeacherCache:
                cache = self._cache
                if cache is None and folder.is_dir():
                    cache = TeacherCache(folder, k, self.windows, of_teacher)
                if cache is None or cache.finished < len(self.windows):
                    raise ValueError(f"teacher_cache: rank 0 filled {str(folder)!r}, and it isn't here: {_SHARED}.")
                return cache

            self._cache = ranks.each(read)

    def _fill(self, finished: int, k: int) -> None:
        """Have the teacher predict, each process another sequence at a time; rank 0 writes all."""
        ranks, count = self._ranks, len(self.windows)
        teacher = ranks.each(self._load_teacher)

        def predict(first: int) -> list[LargestLogits]:
            mine = min(first + ranks.index, count - 1)
            return ranks.gather(LargestLogits.of(self._logits(teacher, self.windows[mine : mine + 1])[0], k))

        bar = tqdm(total=count, initial=finished, desc="Teacher", unit="sequence", disable=not self._progress)
        with bar, torch.no_grad():
            if self._cache is not None:
                self._cache.fill(predict, bar.update)
            for first in range(finished, count, ranks.count) if self._cache is None else ():
                predict(first)

    def _choose(self, cached: bool, free_bytes: Sequence[int | None]) -> dict[str, Any]:
        dense = read_report(pruned_folder(self.source)).model.get("dense_num_parameters")
        shape = (self.options["batch_size"], self.windows.shape[1])
        return choose(self.model, dense, self.options["train"], shape, self.device, self.compute, free_bytes, cached)

    def _trained_parameters(self) -> dict[str, Tensor]:
        """What is trained, by name: outside of embeddings and head all, or what has one dimension; and adapters."""
        head, parameters = self.model.get_output_embeddings(), dict(self.model.named_parameters())
        modules = self.model.named_modules()
        outer = {name for name, module in modules if isinstance(module, nn.Embedding) or module is head}
        inner = [name for name in parameters if name.rpartition(".")[0] not in outer]
        chosen = {name for name in inner if self.kind == "all" or parameters[name].ndim == 1}
        return {n: p.requires_grad_() for n, p in parameters.items() if n in chosen or p.requires_grad}

    def _add_adapters(self) -> Any:
        from optimum_fista.run.retraining.lora import mask_adapters  # first: it says what to install

        from peft import LoraConfig, get_peft_model  # isort: skip

        # PEFT's "all-linear" takes fused experts too.
        names = [operator.name for operator in linear_operators(self.model)]
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(self.options["seed"])
            # By the type PEFT takes names of shared experts for those that fused experts had in Transformers 4.
            vars(self.model.config)["model_type"] = ""
            try:
                adapted = get_peft_model(self.model, settings)
            finally:
                del vars(self.model.config)["model_type"]
            return mask_adapters(adapted, self.source)


def state_files(journal: Path, rank: int = 0) -> dict[int, Path]:
    """The files in which a process keeps its part of an unfinished recovery, by the steps that were done then."""
    return {int(file.stem.rpartition("-")[2]): file for file in journal.glob(f"state-{rank}-*.safetensors")}


def open_state(file: Path) -> safe_open | None:
    """What an unfinished recovery keeps; `None` if it is not there, or damaged."""
    try:
        opened = safe_open(file, "pt")
        digests = {name: tensor_sha256(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        noted = opened.metadata() or {}
        if noted.get("sha256") == combined_sha256({**digests, "": noted.get("state", "")}):
            return opened
    except FileNotFoundError:
        return None
    except SafetensorError:
        pass
    logger.warning("%s is damaged and not used: the training begins anew", file)
    return None


def _checkpointed_layers(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Decoder layers keep their inputs alone, and run again in the backward pass."""
    layers = find_decoder_layers(model).modules
    twice = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return replaced_forwards(layers, [partial(twice, layer.forward) for layer in layers])
