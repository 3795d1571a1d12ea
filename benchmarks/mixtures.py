"""Make a mixture of experts of SmolLM2-135M (or another small Llama), for measurements of experts that are removed.

`--kind split` cuts each MLP into a shared expert and 32 small ones, 16 of them for a token; `--kind copied` makes 8
copies of the MLPs in the second half of the layers, 2 of them for a token. `mixture_start.py` says how, and which
classes of Transformers they are. The mixture is then trained to predict as the dense model does, and as the text goes
on, on three domains in equal parts (`mixture_texts.py`): web text, Python and German.

    python benchmarks/mixtures.py MODEL --kind split --web openwebtext.txt --folder runs/split

The same command resumes, and the result has the same bits. `--folder` gets:

- `texts/`: the texts, of each domain a part that is trained on and a part that is held out;
- `training.pt`: the state from which the training resumes;
- `log.json`: settings, the dense model's held-out loss by domain, and rows of that of the mixture: step, tokens,
  processor seconds, mean loss of the training, held-out loss in nats a token;
- `model/`: the mixture in bfloat16 with its tokenizer, written again at each row;
- `use.json`: of the finished mixture, how often each expert is chosen in each layer by domain, and the losses of the
  files in `model/`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from mixture_start import copied, split
from mixture_texts import DOMAINS, make_texts, text_file
from shared import parse_arguments, settings_of
from torch import Tensor
from torch.nn.functional import linear, one_hot
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from optimum_fista.atomic import write_file
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.model.predictor import Predictor
from optimum_fista.source.loading import load_model
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import evaluation_windows
from optimum_fista.train.distillation import root_mean_square
from optimum_fista.train.divergence import LiveTeacher, divergence
from optimum_fista.train.recovery_plan import round_head
from optimum_fista.versions import library_versions

WARM_UP = 0.02  # share of the steps
DECAY = 0.3  # share of the steps, the last ones, in which the learning rate goes to zero
BALANCE = 0.01  # weight of the penalty on uneven use, for a softmax router
BIAS_STEP = 1e-3  # by which a selection bias is moved after a step, for a sigmoid router
EPSILON = 1e-10  # that of Adam, for gradients by weights whose root mean square is 1
START_WINDOWS = 8  # of each domain, to cluster by
SIZES = {"split": (32, 16), "copied": (8, 2)}  # experts of a layer, and those that a token gets
OUTER = ("model.embed_tokens", "lm_head")  # names of what is not trained begin so


def experts_as_channels(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute fused experts as one MLP with the channels of all, each times its expert's weight for the token.

    Weights of experts that a token does not get are zero. For many small experts on a CPU this is faster than a loop,
    although it computes products that are not needed. The arguments are those of Transformers: the module that holds
    the experts, [tokens, hidden], and the chosen experts and their weights [tokens, active].
    """
    num_experts = len(experts.gate_up_proj)
    gate_up = linear(hidden_states, experts.gate_up_proj.flatten(0, 1))
    channels = experts._apply_gate(gate_up.unflatten(-1, (num_experts, -1)))
    weights = torch.zeros(len(hidden_states), num_experts, dtype=channels.dtype)
    weights = weights.scatter(1, top_k_index, top_k_weights.to(channels.dtype))

    weighted = channels * weights[:, :, None]  # [tokens, experts, channels of an expert]
    # [experts, hidden, channels] -> [hidden, experts * channels]
    down = experts.down_proj.transpose(0, 1).flatten(1)
    return linear(weighted.flatten(1), down)


ALL_EXPERTS_FUNCTIONS.register("channels", experts_as_channels)


class RouterWatch:
    """Sees which experts the routers of a mixture choose, while its hooks are on.

    Attributes:
        routers: The routers, in the order of the layers.
        counts: How often each expert was chosen since they were set to zero, [layers, experts].
        penalties: Of each softmax router in the latest passes, E sum_e f_e P_e: f_e is the share of the choices that
            expert e got, P_e its mean probability, and E the number of experts (Switch, arXiv 2101.03961, equation 4).
            Whoever reads them clears them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the routers of `model`, and put a hook on each."""
        kinds = (Glm4MoeTopkRouter, Ernie4_5_MoeTopKRouter)
        self.routers: list[Any] = [part for part in model.modules() if isinstance(part, kinds)]
        self.counts = torch.zeros(len(self.routers), self.routers[0].num_experts)
        self.penalties: list[Tensor] = []
        self._hooks = [
            router.register_forward_hook(self._hook_of(layer))
            for layer, router in enumerate(self.routers)
        ]

    def _hook_of(self, layer: int) -> Any:
        """The hook of a router, which adds its choices to `self.counts[layer]`."""

        def look(router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            """Count the chosen experts of all tokens of a pass, and note the penalty."""
            logits, _, chosen = output
            counts = one_hot(chosen, router.num_experts).sum((0, 1)).float()
            self.counts[layer] += counts
            if isinstance(router, Ernie4_5_MoeTopKRouter) and torch.is_grad_enabled():
                shares = counts / counts.sum()
                probabilities = logits.softmax(-1).mean(0)
                self.penalties.append(router.num_experts * (shares * probabilities).sum())

        return look

    def take_counts(self) -> Tensor:
        """Return the counts, and begin to count again."""
        counts = self.counts
        self.counts = torch.zeros_like(counts)
        return counts

    def balance(self) -> None:
        """Move the selection biases of sigmoid routers towards even use by the counts, which begin again.

        Experts that were chosen more often than the mean become less likely (DeepSeek-V3, arXiv 2412.19437, 2.1.2).
        """
        counts = self.take_counts()
        for router, counts_of_layer in zip(self.routers, counts, strict=True):
            if isinstance(router, Glm4MoeTopkRouter):
                excess = counts_of_layer - counts_of_layer.mean()
                router.e_score_correction_bias -= BIAS_STEP * excess.sign()

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def routers_in_float32(model: PreTrainedModel) -> None:
    """Let the sigmoid routers of a mixture compute in float32 inside autocast, as they do without it."""
    for router in model.modules():
        if isinstance(router, Glm4MoeTopkRouter):
            router.forward = torch.autocast("cpu", enabled=False)(router.forward)


def rate_share(step: int, steps: int) -> float:
    """The share of the learning rate at a step, counted from 0: up, constant, and down to zero after the last step."""
    rising = (step + 1) / max(1, round(WARM_UP * steps))
    falling = (steps - step) / max(1, round(DECAY * steps))
    return min(1.0, rising, falling)


def training_order(num_windows: int, length: int, seed: int) -> Tensor:
    """Numbers of windows, int64 [length]: all of them in random order, then all in another order, and so on.

    A shorter order is the start of a longer one.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(length / num_windows)
    orders = [torch.randperm(num_windows, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:length]


def windows_of(
    tokenizer: PreTrainedTokenizerBase, file: Path, length: int, most: int | None
) -> Tensor:
    """Consecutive windows of a text file: token ids [windows, length]."""
    return evaluation_windows(tokenizer, load_text(str(file), "test"), length, most)


def start_of(arguments: Namespace, dense: LlamaForCausalLM, windows: dict[str, Tensor]) -> Any:
    """The mixture that `arguments` ask for before its training, clustered by a few windows of each domain.

    Raises:
        SystemExit: If the kind is not known.
    """
    if arguments.kind not in SIZES:
        raise SystemExit(f"--kind {arguments.kind} is not known; pass split or copied.")
    default_experts, default_active = SIZES[arguments.kind]
    options = {
        "experts": arguments.experts or default_experts,
        "active": arguments.active or default_active,
        "seed": arguments.seed,
    }

    samples = []
    for domain in DOMAINS:
        places = torch.linspace(0, len(windows[domain]) - 1, START_WINDOWS).long()
        samples.append(windows[domain][places])
    ids = torch.cat(samples)

    if arguments.kind == "split":
        return split(dense, ids, expert_channels=arguments.expert_channels, **options)
    dense_layers = dense.config.num_hidden_layers // 2
    return copied(dense, ids, dense_layers=dense_layers, **options)


def optimizer_of(mixture: PreTrainedModel, arguments: Namespace) -> torch.optim.AdamW:
    """AdamW for all trained parameters: those of MLPs and routers, and the others at a smaller rate.

    As in a recovery, the rate is relative to the root mean square of a parameter, so a step moves weights by about the
    same share everywhere.
    """
    groups = []
    for name, parameter in mixture.named_parameters():
        if parameter.requires_grad:
            size = root_mean_square(parameter.detach())
            share = 1.0 if ".mlp." in name else arguments.rest_share
            rate = arguments.relative_step * share * size
            group = {"params": [parameter], "lr": rate, "eps": EPSILON / size}
            group["base"] = rate  # of which `lr` is a share, by the step
            groups.append(group)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def mark_trained(mixture: PreTrainedModel) -> None:
    """Turn gradients off for embeddings, head and selection biases, and on for all other parameters."""
    for name, parameter in mixture.named_parameters():
        is_selection_bias = name.endswith("e_score_correction_bias")
        parameter.requires_grad_(not name.startswith(OUTER) and not is_selection_bias)


class Training:
    """The training of a mixture in float32 with products in bfloat16, which is saved and resumes.

    It changes the mixture: its weights, its head, which gets a weight of its own in bfloat16, and its routers, which
    keep hooks. In `arguments.folder` it writes `training.pt`, `log.json` and `model/`.

    Attributes:
        step: Steps that are done.
        record: What `log.json` holds.
    """

    def __init__(
        self,
        *,
        mixture: Any,
        teacher: LlamaForCausalLM,
        trained: dict[str, Tensor],
        held_out: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        arguments: Namespace,
    ) -> None:
        """Prepare the mixture, and read the state of an earlier start, or measure the losses before the training.

        Args:
            mixture: The mixture before the training, in float32.
            teacher: The dense model in bfloat16.
            trained: Token ids [windows, length] to train on, by domain.
            held_out: Token ids [windows, length] to measure the loss on, by domain.
            tokenizer: Saved with the model.
            arguments: Those of the command.

        Raises:
            SystemExit: If the folder holds a training with other settings.
        """
        self._mixture = mixture
        self._trained = trained
        self._held_out = held_out
        self._tokenizer = tokenizer
        self._arguments = arguments
        self._losses: list[float] = []  # of the passes since the latest row
        self._seconds_before = 0.0  # processor seconds of earlier starts
        self._file_of_state = arguments.folder / "training.pt"

        mark_trained(mixture)
        round_head(mixture, torch.bfloat16)
        routers_in_float32(mixture)
        mixture.set_experts_implementation("channels" if arguments.kind == "split" else "eager")
        self._optimizer = optimizer_of(mixture, arguments)
        self._watch = RouterWatch(mixture)

        self._tokens_of_step = len(DOMAINS) * arguments.sequence_length * arguments.accumulate
        self._steps = math.ceil(arguments.tokens / self._tokens_of_step)
        num_passes = self._steps * arguments.accumulate
        self._orders = {
            domain: training_order(len(windows), num_passes, arguments.seed)
            for domain, windows in trained.items()
        }

        self.step = 0
        # A run may be made longer or shorter as long as its rate has not begun to fall: its steps stay the same.
        without = ("web", "folder", "tokens", "save_minutes", "threads")
        self.record: dict[str, Any] = {
            "settings": settings_of(arguments, *without),
            "versions": library_versions(),
            "parameters": mixture.num_parameters(),
        }
        if self._file_of_state.exists():
            self._resume()
        else:
            self.record["dense"] = losses_of(teacher, held_out)
            self.record["rows"] = [{"step": 0, "held_out": losses_of(mixture, held_out)}]
            self._write_log()

        with torch.autocast("cpu", torch.bfloat16):
            self._student = Predictor(mixture)
            self._teacher = LiveTeacher(teacher)
        self._watch.take_counts()  # of what was not training
        self._began = time.process_time()

    def run(self) -> None:
        """Train until the last step."""
        arguments = self._arguments
        last_save = time.monotonic()
        self._mixture.train()
        bar = trange(self.step, self._steps, initial=self.step, total=self._steps, mininterval=10)
        for _ in bar:
            self._update()
            is_last = self.step == self._steps
            if self.step % arguments.every == 0 or is_last:
                self._add_row()
                bar.write(json.dumps(self.record["rows"][-1]))
            is_due = time.monotonic() - last_save > 60 * arguments.save_minutes
            if is_due or is_last:
                self._save()
                last_save = time.monotonic()
        self._watch.remove()

    def _update(self) -> None:
        """Make one step: passes on windows of all domains, one update of the weights and of the selection biases."""
        accumulate = self._arguments.accumulate
        share = rate_share(self.step, self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * share

        first = self.step * accumulate
        for number in range(first, first + accumulate):
            windows = [self._trained[domain][self._orders[domain][number]] for domain in DOMAINS]
            with torch.autocast("cpu", torch.bfloat16):
                loss = divergence(
                    self._student,
                    self._teacher,
                    torch.stack(windows),
                    label_share=self._arguments.label_share,
                )
            self._losses.append(loss.item())
            if self._watch.penalties:
                loss = loss + BALANCE * torch.stack(self._watch.penalties).mean()
                self._watch.penalties.clear()
            (loss / accumulate).backward()

        self._optimizer.step()
        self._optimizer.zero_grad()
        self._watch.balance()
        self.step += 1

    def _add_row(self) -> None:
        """Measure the held-out losses, add a row to the record, and write `log.json` and `model/`."""
        row = {"step": self.step, "tokens": self.step * self._tokens_of_step}
        row["seconds"] = self._seconds()
        row["training"] = sum(self._losses) / len(self._losses)
        self._losses.clear()
        row["held_out"] = losses_of(self._mixture, self._held_out)
        self._watch.take_counts()  # of what was not training

        self.record["rows"].append(row)
        self._write_log()
        save_model(self._mixture, self._tokenizer, self._arguments.folder / "model")

    def _seconds(self) -> float:
        """Processor seconds of the training, those of earlier starts included."""
        return round(self._seconds_before + time.process_time() - self._began, 1)

    def _write_log(self) -> None:
        """Write the record to `log.json`."""
        text = json.dumps(self.record, indent=1) + "\n"
        write_file(self._arguments.folder / "log.json", text)

    def _save(self) -> None:
        """Write the state from which the training resumes: all but embeddings and head, which do not change."""
        weights = {
            name: weight
            for name, weight in self._mixture.state_dict().items()
            if not name.startswith(OUTER)
        }
        state = {
            "weights": weights,
            "optimizer": self._optimizer.state_dict(),
            "record": self.record,
            "losses": self._losses,
            "step": self.step,
            "seconds": self._seconds(),
        }
        unfinished = self._file_of_state.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self._file_of_state)

    def _resume(self) -> None:
        """Read the state of an earlier start, which must have had the same settings."""
        state = torch.load(self._file_of_state)
        if state["record"]["settings"] != self.record["settings"]:
            raise SystemExit(
                f"{self._arguments.folder} holds a run with other settings: pass another --folder."
            )
        self.record = state["record"]
        self.step = state["step"]
        self._losses = state["losses"]
        self._seconds_before = state["seconds"]
        self._mixture.load_state_dict(state["weights"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])


def losses_of(model: PreTrainedModel, windows: dict[str, Tensor]) -> dict[str, float]:
    """Mean negative log-likelihood of a token by domain; products are in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return {
            domain: math.log(evaluate_perplexity(model, ids, progress=False).perplexity)
            for domain, ids in windows.items()
        }


def save_model(mixture: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a mixture in bfloat16 and its tokenizer to a folder, which is replaced. Selection biases stay float32."""
    weights = {
        name: weight if name.endswith("e_score_correction_bias") else weight.bfloat16()
        for name, weight in mixture.state_dict().items()
    }
    with torch.device("meta"):
        copy = type(mixture)(mixture.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()  # the head, which has a weight of its own in training

    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    copy.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    # Servers may look for the settings of rotary embeddings at the top, as older versions of Transformers wrote them.
    config_file = unfinished / "config.json"
    settings = json.loads(config_file.read_text())
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in settings["rope_parameters"]:
            settings[name] = settings["rope_parameters"][name]
    config_file.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def use_by_domain(model: PreTrainedModel, windows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shares of the choices that each expert gets, by domain: [layers, experts], each row sums to 1.

    Args:
        model: The mixture.
        windows: Token ids [windows, length] by domain.
    """
    watch = RouterWatch(model)
    shares = {}
    with torch.no_grad():
        for domain, ids in windows.items():
            for window in ids:
                model.base_model(input_ids=window[None], use_cache=False)
            counts = watch.take_counts()
            shares[domain] = counts / counts.sum(1, keepdim=True)
    watch.remove()
    return shares


def information(shares: Tensor) -> Tensor:
    """Bits that the expert of a choice tells about its domain (mutual information), by layer.

    `shares` [domains, layers, experts] are those of `use_by_domain`; all domains are equally likely. The result is
    [layers], at most log2 of the number of domains.
    """
    mean = shares.mean(0)
    return (shares * (shares / mean).clamp(min=1e-30).log2()).nan_to_num().sum(-1).mean(0)


def use_table(shares: dict[str, Tensor]) -> list[str]:
    """A table by layer: bits about the domain, the most and least used expert, and those that differ most by domain."""
    stacked = torch.stack([*shares.values()])  # [domains, layers, experts]
    bits = information(stacked)
    mean = stacked.mean(0)
    rows = []
    for layer, bits_of_layer in enumerate(bits.tolist()):
        of_layer = stacked[:, layer]
        favourite = [f"{domain} {int(of_layer[i].argmax())}" for i, domain in enumerate(shares)]
        ratio = of_layer.max(0).values / of_layer.min(0).values.clamp(min=1e-6)
        row = (
            layer,
            f"{bits_of_layer:.3f}",
            f"{mean[layer].min():.3f}",
            f"{mean[layer].max():.3f}",
        )
        rows.append((*row, f"{ratio.median():.1f}", f"{ratio.max():.1f}", ", ".join(favourite)))
    columns = ("mixture", "bits about the domain", "least share", "largest share")
    columns += ("ratio of shares, median", "largest", "most used expert")
    return markdown_lines(columns, rows)


def main() -> None:
    """Make the texts, start or resume the training, and measure the files that were written."""
    helps = {
        "kind": "split or copied",
        "web": "text file of web documents",
        "folder": "where everything is written",
        "experts": "experts of a layer, without the shared one (default: 32, or 8 copies)",
        "active": "experts that a token gets (default: 16, or 2 copies)",
        "expert_channels": "channels of a split expert; the others are shared",
        "tokens": "tokens to train on, of all domains together",
        "accumulate": "passes in an update, each with a sequence of each domain",
        "relative_step": "how far a step moves weights of MLPs and routers, as a share of their root mean square",
        "rest_share": "the same for other weights, as a share of that",
        "label_share": "share of the text's own cross-entropy in the loss",
        "every": "steps from row to row of the log",
        "save_minutes": "minutes from state to state",
        "max_windows": "held-out sequences of each domain",
    }
    sizes = {"sequence_length": 512, "max_windows": 16, "expert_channels": 32}
    schedule = {"tokens": 6_000_000, "accumulate": 2, "relative_step": 1e-3, "rest_share": 0.5}
    schedule |= {"label_share": 0.5, "every": 100, "save_minutes": 10.0, "seed": 0, "threads": 1}
    arguments = parse_arguments(
        __doc__,
        "model",
        "web",
        "folder",
        helps=helps,
        kind="split",
        experts=int,
        active=int,
        **sizes,
        **schedule,
    )
    arguments.folder = Path(arguments.folder)
    torch.set_num_threads(arguments.threads)

    texts = arguments.folder / "texts"
    make_texts(Path(arguments.web), texts)
    dense, tokenizer = load_model(arguments.model, device="cpu", dtype=torch.float32)
    length = arguments.sequence_length
    trained = {
        domain: windows_of(tokenizer, text_file(texts, domain, "trained"), length, None)
        for domain in DOMAINS
    }
    held_out = {
        domain: windows_of(
            tokenizer, text_file(texts, domain, "held-out"), length, arguments.max_windows
        )
        for domain in DOMAINS
    }

    mixture = start_of(arguments, dense, trained)
    del dense
    teacher, _ = load_model(arguments.model, device="cpu", dtype=torch.bfloat16)
    training = Training(
        mixture=mixture,
        teacher=teacher,
        trained=trained,
        held_out=held_out,
        tokenizer=tokenizer,
        arguments=arguments,
    )
    training.run()

    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model")
    shares = use_by_domain(model, held_out)
    use = {
        "losses": losses_of(model, held_out),
        "dense": training.record["dense"],
        "shares": {domain: part.tolist() for domain, part in shares.items()},
        "bits": information(torch.stack([*shares.values()])).tolist(),
    }
    write_file(arguments.folder / "use.json", json.dumps(use) + "\n")
    print("\n".join(use_table(shares)))


if __name__ == "__main__":
    main()
