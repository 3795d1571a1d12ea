"""Results that a change of structure must not change: masks, weights and reports of pruned models.

This writes `golden.json` anew: `PYTHONPATH=.:tests:tests/support python tests/test_golden.py --record`.

conftest.py pins the instructions, and with it masks and counts are the same on nearly every x86 processor with AVX2
that was tried; weights and errors are then equal but for the last bits, because float32 square roots and Cholesky
factors of MKL differ between processors. Where weights were recorded on the same kind of processor (`exact`), they are
compared bit for bit.
"""

import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PINNED
from launched import exit_codes, launch, prune
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import PreTrainedModel

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback, PruningReport

GOLDEN = Path(__file__).with_name("golden.json")
Digest = dict[str, Any]


def arithmetic() -> str:
    """Hash of results that tell this machine's floating-point sums from another's.

    Two processors may multiply large matrices alike and small ones not, so several sizes and factorizations are tried.
    """
    generator = torch.Generator().manual_seed(0)
    results = []
    for rows, columns in ((200, 300), (32, 48), (16, 24), (7, 13)):
        a = torch.randn(rows, columns, generator=generator)
        gram = a @ a.T + torch.eye(rows)
        factor = torch.linalg.cholesky(gram)
        results += [gram, factor, torch.cholesky_inverse(factor), torch.linalg.eigh(gram)[1]]
        results += [
            torch.cholesky_solve(a, factor),
            torch.linalg.solve_triangular(factor, a, upper=False),
        ]
        results += [a.bfloat16() @ a.T.bfloat16(), a.exp(), a.square().sum(0).sqrt(), a @ a[0]]
        results += [
            torch.nn.functional.silu(a),
            a.softmax(-1),
            a.norm(dim=1),
            a.double() @ a.T.double(),
        ]
    return _sha(*(t.float().numpy().tobytes() for t in results), torch.__version__.encode())[:16]


def _sha(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensors_sha(tensors: dict[str, torch.Tensor]) -> str:
    parts = []
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().contiguous().view(-1).view(torch.uint8)
        parts += [name.encode(), str(tuple(tensor.shape)).encode(), content.numpy().tobytes()]
    return _sha(*parts)[:16]


def _digest(
    weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], report: PruningReport | None
) -> Digest:
    """What is kept of a result: hashes of what is equal everywhere, sums of what is equal but for the last bits."""
    # The layout of a packed tensor holds a checksum, which changes with the last bit of a weight.
    summed = [name for name in sorted(weights) if not name.endswith("_layout")]
    values = torch.cat([weights[name].detach().double().flatten() for name in summed])
    found = {
        "masks": _tensors_sha(masks),
        "exact": _tensors_sha(weights),
        "sums": [float(values.norm()), float(values @ torch.arange(len(values)).double().cos())],
    }
    if report is not None:
        operators = [
            (o.name, o.shape, o.num_kept, o.method, o.iterations, o.converged, o.num_tokens)
            for o in report.operators
        ]
        errors = [
            error
            for o in report.operators
            for error in (o.fit_error, o.l1_penalty)
            if error is not None
        ]
        errors += [
            error for layer in report.layers if (error := layer.hidden_state_error) is not None
        ]
        found["counts"] = _sha(json.dumps([operators, report.left_dense]).encode())[:16]
        found["errors"] = math.fsum(errors)
    return found


def _tokens(family: str) -> torch.Tensor:
    if family == "llama":
        return tiny_tokens()
    return torch.randint(0, VOCAB_SIZE, (8, 24), generator=torch.Generator().manual_seed(1))


def _model(family: str) -> PreTrainedModel:
    return tiny_llama() if family == "llama" else tiny_model(family)


# Most cases have the correction that takes the longest way through the code: it needs the hidden states of the dense
# and of the pruned network, and the outputs of each decoder layer in both.
LONGEST_WAY = {"error_correction": 0.5, "residual_correction": 1.0}
DEFAULT: dict[str, Any] = {"error_correction": None, "residual_correction": None}


def config_of(options: dict[str, Any]) -> FistaPruningConfig:
    """The configuration with these options; those of the default method that are not given are `LONGEST_WAY`."""
    if options.get("method", "obs_admm") == "obs_admm":
        options = LONGEST_WAY | options
    return FistaPruningConfig(**options)


def in_memory(
    family: str = "llama", dtype: torch.dtype = torch.float32, padded: bool = False, **options: Any
) -> Digest:
    """Prune a model where it is."""
    model, tokens = _model(family).to(dtype), _tokens(family)
    batches: list[Any] = list(tokens.split(4))
    if padded:
        mask = torch.ones_like(tokens)
        mask[::2, -5:] = 0
        batches = [
            {"input_ids": i, "attention_mask": m}
            for i, m in zip(tokens.split(4), mask.split(4), strict=True)
        ]
    pruner = FistaPruner(config_of(options), progress=False)
    report = pruner.prune(model, batches)
    return _digest(dict(model.named_parameters()), pruner.result(model)[1], report)


class _Failure(Exception):
    """The run ends here."""


class _FailsInTheSecondLayer(PruningCallback):
    def on_operator_end(self, operator: Any) -> None:
        if ".1." in operator.name:
            raise _Failure


def _folder_digest(folder: Path, report: PruningReport | None = None) -> Digest:
    weights = {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
    masks = folder / "fista" / "masks.safetensors"
    return _digest(weights, load_file(masks) if masks.exists() else {}, report)


def streamed(
    family: str = "llama", packed: bool = False, resumed: bool = False, **options: Any
) -> Digest:
    """Prune from files to files, `resumed` after a failure in the second decoder layer."""
    config = config_of(options)
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "source"), Path(scratch, "out")
        _model(family).save_pretrained(source)
        where: dict[str, Any] = {"output_dir": output, "packed": packed}
        batches = list(_tokens(family).split(4))
        if resumed:
            pruner = FistaPruner(config, progress=False, callbacks=[_FailsInTheSecondLayer()])
            with pytest.raises(_Failure):
                pruner.prune(source, batches, **where)
        report = FistaPruner(config, progress=False).prune(source, batches, **where)
        return _folder_digest(output, report)


def by_ranks(**options: Any) -> Digest:
    """Prune from files to files by two processes."""
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "source"), Path(scratch, "out")
        tiny_llama().save_pretrained(source)
        assert exit_codes(launch(2, prune, source, output, config_of(options))) == [0, 0]
        return _folder_digest(output)


METHODS = ("fista", "magnitude", "wanda", "sparsegpt", "dsnot", "admm", "alps", "obs_admm")
CASES: dict[str, Callable[[], Digest]] = {}
for _method in METHODS:
    for _pattern in ("unstructured", "2:4"):
        CASES[f"{_method} {_pattern}"] = lambda m=_method, p=_pattern: in_memory(
            method=m, pattern=p
        )
    CASES[f"{_method} streamed"] = lambda m=_method: streamed(method=m, sparsity=0.6)
for _correction in ("none", "intra", "full", 0.25):
    for _allocation in ("uniform", "fisher"):
        CASES[f"correction {_correction} {_allocation}"] = lambda c=_correction, a=_allocation: (
            in_memory(error_correction=c, allocation=a, sparsity=0.6)
        )
for _family in ("gpt2", "gemma3_text", "opt", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3"):
    CASES[f"{_family} in memory"] = lambda f=_family: in_memory(f)
    CASES[f"{_family} streamed"] = lambda f=_family: streamed(f)
CASES |= {
    "paper": lambda: in_memory(**_paper()),
    "paper 2:4": lambda: in_memory(**_paper(pattern="2:4")),
    "by rows": lambda: in_memory(scope="row", method="sparsegpt", allocation="uniform"),
    "1:4 and overrides": lambda: in_memory(
        pattern="1:4", overrides={"*.down_proj": 0.3, "*.q_proj": "4:8"}
    ),
    "residual only": lambda: in_memory(error_correction=0.0, residual_correction=1.0),
    "no residual": lambda: in_memory(residual_correction=0.0),
    "padded": lambda: in_memory(padded=True),
    "padded gpt2": lambda: in_memory("gpt2", padded=True),
    "bfloat16": lambda: in_memory(dtype=torch.bfloat16, compute_dtype="float32"),
    "held out": lambda: in_memory(held_out=3),
    "some left dense": lambda: in_memory(exclude=("*.layers.1.*",)),
    "streamed": lambda: streamed(),
    "streamed 2:4": lambda: streamed(pattern="2:4"),
    "streamed intra": lambda: streamed(error_correction="intra"),
    "resumed": lambda: streamed(resumed=True),
    "resumed intra 2:4": lambda: streamed(resumed=True, error_correction="intra", pattern="2:4"),
    "packed": lambda: streamed(packed=True),
    "packed 2:4 gpt2": lambda: streamed("gpt2", packed=True, pattern="2:4"),
    "packed mixtral": lambda: streamed("mixtral", packed=True),
    "ranks intra": lambda: by_ranks(error_correction="intra"),
    "ranks none 2:4": lambda: by_ranks(error_correction="none", pattern="2:4"),
    "default": lambda: in_memory(**DEFAULT),
    "default bfloat16": lambda: in_memory(**DEFAULT, dtype=torch.bfloat16),
    "default 2:4": lambda: in_memory(**DEFAULT, pattern="2:4"),
    "default held out": lambda: in_memory(**DEFAULT, held_out=3),
    "default mixtral": lambda: in_memory("mixtral", **DEFAULT),
    "default gpt2 streamed": lambda: streamed("gpt2", **DEFAULT),
    "default resumed": lambda: streamed(**DEFAULT, resumed=True),
    "default ranks": lambda: by_ranks(**DEFAULT),
    "default channels": lambda: in_memory(**DEFAULT, pattern="channels:0.25"),
}


def _paper(**options: Any) -> dict[str, Any]:
    config = FistaPruningConfig.paper(**options)
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


KEPT = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"cases": {}, "exact": {}}


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="results were recorded on x86 processors only"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(CASES))
def test_results_are_those_recorded(name):
    found = CASES[name]()
    kept = KEPT["cases"][name]

    exact_weights = found.pop("exact")
    recorded_weights = KEPT["exact"].get(arithmetic(), {}).get(name)
    norm, projection = found.pop("sums")
    if recorded_weights is not None:
        assert exact_weights == recorded_weights
        # Equal weights have equal zeros and sums. On some processors another rounding moves a zero.
        del found["masks"]
    else:
        assert norm == pytest.approx(kept["sums"][0], rel=1e-5)
        assert projection == pytest.approx(kept["sums"][1], abs=1e-5 * norm)
    if "errors" in kept:
        # 3e-4 if another zero is chosen in one operator
        assert found.pop("errors") == pytest.approx(kept["errors"], rel=1e-3)
    assert found == {key: kept[key] for key in found}


def test_at_least_forty_configurations_are_recorded():
    assert len(CASES) >= 40
    assert set(KEPT["cases"]) == set(CASES)


if __name__ == "__main__":
    assert sys.argv[1:] == ["--record"], "usage: python tests/test_golden.py --record"
    os.environ.update(PINNED)
    torch.set_num_threads(1)
    import warnings

    warnings.simplefilter("ignore")
    cases = {name: run() for name, run in CASES.items()}
    exact = {name: case.pop("exact") for name, case in cases.items()}
    GOLDEN.write_text(
        json.dumps({"cases": cases, "exact": {arithmetic(): exact}}, indent=1, sort_keys=True)
        + "\n"
    )
    sys.stdout.write(f"{len(cases)} configurations recorded for {arithmetic()}\n")
