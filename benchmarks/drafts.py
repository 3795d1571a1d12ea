"""What the layer that predicts more tokens loses if experts are removed: its loss, and how many drafts are accepted.

A small GLM-4-MoE with a prediction layer (MTP) is trained on bytes of a text, both together: the prediction layer sees
the hidden states of the last decoder layer and the embedding of the next byte, and predicts the byte after that. A step
of its router's bias keeps the load of experts even, as in DeepSeek-V3. Then the model is pruned from files to files,
and the prediction layer is measured on the last tenth of the text with experts chosen in four ways:

- `router`: by its own router, on the hidden states of the pruned model (what a run does),
- `trunk`: the numbers of the experts that stay in the last decoder layer,
- `random`: three draws,
- `all`: none is removed. It would need a configuration of its own, so such a model can't be saved.

`loss` is in nats per byte. `accepted` is the share of places where the greedy draft is the byte that the model itself,
pruned or not, finds most likely there, with the bytes of the text before it. The training takes minutes, and
begins anew if it is cut off.

    python benchmarks/drafts.py --text openwebtext.txt --folder runs/drafts --output runs/drafts.json
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from shared import parse_arguments, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm

from optimum_fista import FistaPruner, FistaPruningConfig

HIDDEN = 96
NUM_LAYERS = 3
NUM_EXPERTS = 16
BIAS_STEP = 2e-3
"""How much the bias of an expert changes in a step, if it got more or fewer tokens than the average."""


class Predictor(nn.Module):
    """A prediction layer with the names that GLM-4.5 gives its parts."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.enorm = Glm4MoeRMSNorm(HIDDEN)
        self.hnorm = Glm4MoeRMSNorm(HIDDEN)
        self.eh_proj = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        last_layer = config.num_hidden_layers - 1  # has experts, unlike the first one
        self.layer = Glm4MoeDecoderLayer(config, last_layer)
        self.norm = Glm4MoeRMSNorm(HIDDEN)

    def forward(self, model: PreTrainedModel, tokens: Tensor, hidden_states: Tensor) -> Tensor:
        """Return logits [batch, sequence - 1, bytes] for the byte two places later.

        `tokens` are [batch, sequence], and `hidden_states` [batch, sequence, hidden] are those that the final norm of
        `model` returns.
        """
        embeddings = model.get_input_embeddings()(tokens[:, 1:])
        both = [self.enorm(embeddings), self.hnorm(hidden_states[:, :-1])]
        entering = self.eh_proj(torch.cat(both, dim=-1))
        positions = torch.arange(entering.shape[1])[None]
        rotary = model.model.rotary_emb(entering, positions)
        output = self.layer(entering, position_embeddings=rotary, attention_mask=None)
        return model.lm_head(self.norm(output))


def balance(module: nn.Module, counts: dict[int, Tensor]) -> None:
    """Change the bias of each router in `module` by a step, against the load that `counts` has by the router's id."""
    for router in module.modules():
        if hasattr(router, "e_score_correction_bias") and id(router) in counts:
            load = counts[id(router)]
            step = BIAS_STEP * torch.sign(load.float().mean() - load.float())
            router.e_score_correction_bias.add_(step)


def count_tokens(module: nn.Module, counts: dict[int, Tensor]) -> None:
    """Have each mixture in `module` count the tokens of its experts in every pass, by the id of its router."""
    for mixture in module.modules():
        if not hasattr(mixture, "experts") or not hasattr(mixture, "gate"):
            continue
        router = mixture.gate

        def count(_: nn.Module, arguments: tuple[Any, ...], key: int = id(router)) -> None:
            """Count the experts that the router has chosen, the second argument of the experts."""
            counts[key] = torch.bincount(arguments[1].flatten(), minlength=NUM_EXPERTS)

        mixture.experts.register_forward_pre_hook(count)


def train(arguments: Namespace, data: Tensor, folder: Path) -> None:
    """Train the model and its prediction layer on bytes, and write both to a model folder."""
    torch.manual_seed(arguments.seed)
    config = Glm4MoeConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        moe_intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    predictor = Predictor(model.config)
    for parameter in predictor.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    counts: dict[int, Tensor] = {}
    for module in (model, predictor):
        count_tokens(module, counts)
    parameters = [*model.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    started = time.perf_counter()

    for step in range(arguments.steps):
        starts = torch.randint(len(data) - arguments.length, (arguments.batch_size,))
        tokens = torch.stack([data[start : start + arguments.length] for start in starts]).long()
        hidden_states = model.model(tokens, use_cache=False).last_hidden_state
        loss = loss_of(model.lm_head(hidden_states), tokens, distance=1)
        draft_loss = loss_of(predictor(model, tokens, hidden_states), tokens, distance=2)
        (loss + 0.5 * draft_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            balance(model, counts)
            balance(predictor, counts)
        if step % 100 == 0 or step == arguments.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step}: {loss:.3f}, draft {draft_loss:.3f}, {seconds:.0f} s", flush=True)

    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | stored(predictor), file, {"format": "pt"})


def stored(predictor: Predictor) -> dict[str, Tensor]:
    """The tensors of a prediction layer as GLM-4.5 stores them: each expert has matrices of its own."""
    prefix = f"model.layers.{NUM_LAYERS}."
    tensors: dict[str, Tensor] = {}
    for name, value in predictor.state_dict().items():
        if name == "norm.weight":
            name = "shared_head.norm.weight"
        name = name.removeprefix("layer.")
        if name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                tensors[f"{prefix}mlp.experts.{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}mlp.experts.{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(value):
                tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = matrix.clone()
        else:
            tensors[f"{prefix}{name}"] = value.clone()
    return tensors


def read_predictor(folder: Path, config: Glm4MoeConfig, kept: Sequence[int]) -> Predictor:
    """Read a prediction layer from a model folder, with the experts `kept` of those that it has there.

    `config` is that of a model with as many experts.
    """
    prefix = f"model.layers.{NUM_LAYERS}."
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {
            name.removeprefix(prefix): value
            for name, value in load_file(file).items()
            if name.startswith(prefix)
        }
    predictor = Predictor(config)
    state = {}
    for name in predictor.state_dict():
        inner = name.removeprefix("layer.")
        if name == "norm.weight":
            state[name] = tensors["shared_head.norm.weight"]
        elif inner == "mlp.experts.gate_up_proj":
            matrices = [
                torch.cat([tensors[f"mlp.experts.{e}.{k}_proj.weight"] for k in ("gate", "up")])
                for e in kept
            ]
            state[name] = torch.stack(matrices)
        elif inner == "mlp.experts.down_proj":
            state[name] = torch.stack([tensors[f"mlp.experts.{e}.down_proj.weight"] for e in kept])
        elif inner.startswith("mlp.gate."):
            state[name] = tensors[inner][list(kept)]
        else:
            state[name] = tensors[inner]
    predictor.load_state_dict(state)
    return predictor.eval()


def loss_of(logits: Tensor, tokens: Tensor, distance: int) -> Tensor:
    """Mean loss, in nats, of logits [batch, places, bytes] for the byte `distance` places later."""
    targets = tokens[:, distance:]
    logits = logits[:, : targets.shape[1]]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def measure(model: PreTrainedModel, predictor: Predictor, windows: Tensor) -> dict[str, float]:
    """Measure a model and its prediction layer on windows [windows, bytes] of a text."""
    sums = {"model_loss": 0.0, "loss": 0.0, "accepted": 0.0}
    batches = windows.split(16)
    for tokens in batches:
        hidden_states = model.model(tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden_states)
        drafts = predictor(model, tokens, hidden_states)
        # The draft at a place is of the byte two places later, which the model predicts one place later.
        is_accepted = drafts.argmax(-1) == logits[:, 1:].argmax(-1)
        values = {
            "model_loss": loss_of(logits, tokens, distance=1),
            "loss": loss_of(drafts, tokens, distance=2),
            "accepted": is_accepted.float().mean(),
        }
        for name, value in values.items():
            sums[name] += float(value) * len(tokens) / len(windows)
    return sums


def rows_of(folder: Path, data: Tensor, windows: Tensor, work: Path, seed: int) -> list[dict]:
    """Prune the model of a folder by 25% and 50%, and measure each way to choose the experts of its prediction layer.

    `data` are bytes to calibrate on, of which a seed draws sequences, and `windows` [windows, bytes] are measured.
    """
    dense = AutoModelForCausalLM.from_pretrained(folder)
    every_expert = range(NUM_EXPERTS)
    all_experts = read_predictor(folder, dense.config, every_expert)
    rows: list[dict] = [
        {"pattern": "dense", "experts": "all"} | measure(dense, all_experts, windows)
    ]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - windows.shape[1], (64,), generator=generator)
    tokens = torch.stack([data[start : start + windows.shape[1]] for start in starts]).long()

    for share in (0.25, 0.5):
        pattern = f"experts:{share}"
        output = work / f"{pattern.replace(':', '-')}-{seed}"
        pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)
        report = pruner.prune(folder, tokens.split(8), output_dir=output, overwrite=True)
        pruned = AutoModelForCausalLM.from_pretrained(output)
        (mixture,) = report.prediction_mixtures
        num_kept = len(mixture.groups_kept)
        choices: dict[str, Sequence[int]] = {
            "router": mixture.groups_kept,
            "trunk": report.mixtures[-1].groups_kept,
        }
        for draw in range(3):
            order = torch.randperm(NUM_EXPERTS, generator=generator)[:num_kept]
            choices[f"random {draw}"] = sorted(order.tolist())

        # What the run has written is what `router` chooses.
        written = read_predictor(output, pruned.config, range(num_kept))
        chosen = read_predictor(folder, pruned.config, mixture.groups_kept)
        for name, value in written.state_dict().items():
            assert torch.equal(value, chosen.state_dict()[name]), name

        measured = {
            name: measure(pruned, read_predictor(folder, pruned.config, kept), windows)
            for name, kept in choices.items()
        }
        measured["all"] = measure(pruned, all_experts, windows)
        for name, values in measured.items():
            kept = list(choices.get(name, every_expert))
            rows.append({"pattern": pattern, "experts": name, "kept": kept, "seed": seed} | values)
    return rows


def main() -> None:
    """Train the model if its folder is missing, measure, print the rows, and write them."""
    arguments = parse_arguments(
        __doc__,
        "text",
        folder=Path("runs/drafts"),
        output=Path("runs/drafts.json"),
        steps=1500,
        batch_size=8,
        length=128,
        rate=3e-3,
        seeds=3,
        seed=0,
        helps={
            "text": "file of the text to train and to measure on",
            "folder": "where the model is, or will be trained to",
            "steps": "steps of training",
            "batch_size": "sequences in a step",
            "length": "bytes in a sequence",
            "rate": "learning rate at the start",
            "seeds": "calibration draws",
            "seed": "of the training",
        },
    )
    text = torch.frombuffer(bytearray(Path(arguments.text).read_bytes()), dtype=torch.uint8)
    cut = len(text) * 9 // 10
    model_folder = arguments.folder / "model"
    if not (model_folder / "config.json").exists():
        train(arguments, text[:cut], model_folder)
    held_out = text[cut:]
    num_windows = min(256, len(held_out) // arguments.length)
    windows = held_out[: num_windows * arguments.length].view(num_windows, -1).long()

    rows = []
    for seed in range(arguments.seeds):
        rows += rows_of(model_folder, text[:cut], windows, arguments.folder, seed)
    for row in rows:
        print(
            f"{row['pattern']:<13}{row['experts']:<10}loss {row['loss']:.4f}  accepted {row['accepted']:.4f}"
            f"  model {row['model_loss']:.4f}"
        )
    save(arguments, {"rows": rows})


if __name__ == "__main__":
    main()
