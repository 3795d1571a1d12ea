"""Several processes make the same folder as one, and what one of them loses is only its current layer."""

import itertools
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from folder_files import files_of
from launched import (
    exit_codes,
    launch,
    prune,
    prune_killed_once,
    prune_other_tokens,
    prune_until,
    run_code,
    torchrun,
)
from pruning import plan_of
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.output import unfinished_folder
from optimum_fista.prune.ranks import (
    Ranks,
    joined_ranks,
    launched_processes,
    require_independent_layers,
    share_layers,
)

LAYERS = 5
INTRA = FistaPruningConfig(0.5, error_correction="intra")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = save_tiny_folder(tmp_path_factory.mktemp("source"))
    tiny_llama(num_hidden_layers=LAYERS).to(torch.bfloat16).save_pretrained(folder)
    return folder


def files_of_one_process(
    source: Path, output: Path, config: FistaPruningConfig
) -> dict[str, bytes]:
    """The files that one process writes, by name."""
    FistaPruner(config, progress=False).prune(source, tiny_tokens().split(4), output_dir=output)
    return files_of(output)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, bytes]:
    return files_of_one_process(source, tmp_path_factory.mktemp("whole") / "pruned", INTRA)


@pytest.mark.parametrize("count", [2, LAYERS + 1])
def test_several_processes_write_the_same_files_as_one(source, expected, tmp_path, count):
    assert exit_codes(launch(count, prune, source, tmp_path / "pruned", INTRA)) == [0] * count
    assert files_of(tmp_path / "pruned") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize(
    "config",
    [
        FistaPruningConfig(pattern="2:4", method="sparsegpt", error_correction="none"),
        FistaPruningConfig(0.5, method="wanda", error_correction="intra", held_out=3),
        FistaPruningConfig(
            pattern="channels:0.25/4+layers:0.4", method="wanda", error_correction="intra"
        ),
    ],
    ids=["2:4", "held out", "channels and layers removed"],
)
def test_two_processes_write_the_same_model_as_one_with_other_configurations(
    source, tmp_path, config
):
    assert exit_codes(launch(2, prune, source, tmp_path / "pruned", config)) == [0, 0]
    found = files_of(tmp_path / "pruned")
    wanted = files_of_one_process(source, tmp_path / "whole", config)
    if config.held_out:  # only one process measures a perplexity, which these files hold
        for name in ("README.md", "config.json", "fista/report.json"):
            assert found.pop(name) != wanted.pop(name)
    assert found == wanted


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_loses_its_current_layer(source, expected, tmp_path, victim):
    output = tmp_path / "pruned"
    log = tmp_path / "log"

    codes = exit_codes(launch(2, prune_until, "killed", victim, 1, source, output, INTRA, log))

    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 3
    finished = sorted((unfinished_folder(output) / "journal").glob("layer-*.json"))
    assert len(finished) == (4 if victim else 3)  # of shares of three and two
    assert not output.exists()
    said = log.with_name(f"log-{1 - victim}").read_text()
    assert re.search(
        rf"RankError: rank {1 - victim} of 2 stops: another process of this run has ended or can't be reached; see "
        rf"what that one wrote before \(this one saw only: .*\); {len(finished)} of 5 decoder layers are finished and "
        r"kept in .*pruned.unfinished.*; start again with the same output",
        said,
    )
    for count in (1, 3):
        again = tmp_path / f"again-{count}"
        shutil.copytree(unfinished_folder(output), unfinished_folder(again))
        if count == 1:
            files_of_one_process(source, again, INTRA)
        else:
            assert exit_codes(launch(count, prune, source, again, INTRA)) == [0] * count
        assert files_of(again) == expected


def test_a_rank_that_fails_lets_the_others_finish_their_layers(source, expected, tmp_path):
    output = tmp_path / "pruned"
    log = tmp_path / "log"

    assert exit_codes(launch(2, prune_until, "fails", 0, 1, source, output, INTRA, log)) == [3, 3]
    assert (tmp_path / "log-0").read_text() == "RuntimeError: no more of this"
    assert re.fullmatch(
        r"RankError: rank 0 of 2 failed: RuntimeError: no more of this; 3 of 5 decoder layers are finished and kept in "
        r"'.*pruned.unfinished'; start again with the same output",
        (tmp_path / "log-1").read_text(),
    )
    assert exit_codes(launch(2, prune, source, output, INTRA)) == [0, 0]
    assert files_of(output) == expected


def test_several_processes_are_refused_if_layers_need_the_result_of_those_before():
    for config, shown in (
        (FistaPruningConfig(pattern="channels:0.25"), 0.5),
        (FistaPruningConfig(error_correction="full"), "full"),
    ):
        require_independent_layers(config, 1)
        with pytest.raises(
            ValueError, match=rf"error_correction={shown!r}: .*correction intra\) or 'none', or"
        ):
            require_independent_layers(config, 2)


def test_calibration_that_differs_by_rank_is_refused(source, tmp_path):
    codes = exit_codes(
        launch(2, prune_other_tokens, source, tmp_path / "pruned", INTRA, tmp_path / "log")
    )

    assert codes == [3, 3]
    message = "ValueError: calibration differ from those of rank 0: start every process with the same model"
    assert (tmp_path / "log-1").read_text().startswith(message)
    assert "rank 1 of 2 failed: ValueError: calibration differ" in (tmp_path / "log-0").read_text()


def test_a_process_that_was_not_launched_with_others_is_its_only_rank(monkeypatch):
    assert launched_processes() == 1
    with joined_ranks("cpu") as ranks:
        assert ranks == Ranks(device="cpu")
        assert ranks.first(lambda: 3) == ranks.each(lambda: 3) == 3
        with pytest.raises(KeyError):
            ranks.each({}.popitem)


def test_accelerate_launches_the_command(source, tmp_path):
    arguments = [
        "prune",
        str(source),
        "--error-correction",
        "intra",
        "--num-samples",
        "8",
        "--sequence-length",
        "16",
    ]
    arguments += ["--calibration", "self", "--device", "cpu"]
    launcher = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    launcher += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "optimum_fista"]
    code = "from accelerate.commands.launch import main; main()"

    process = run_code(code, *launcher, *arguments, "--output", tmp_path / "pruned")

    assert process.returncode == 0, process.stderr
    for once in (
        "35 operators pruned by ",
        f"saved to {tmp_path / 'pruned'}",
        "optimum-fista verify ",
    ):
        assert process.stdout.count(once) == 1  # one of the processes speaks for both
    assert verify_checkpoint(tmp_path / "pruned").num_operators == 7 * LAYERS


def test_a_run_that_torchrun_restarts_writes_the_same_files(
    source, expected, tmp_path, tmp_path_factory
):
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    attempts = tmp_path_factory.mktemp("attempts")

    assert torchrun(options, prune_killed_once, source, tmp_path / "pruned", INTRA, attempts) == 0
    finished = {path.name: path.read_text() == "finished" for path in attempts.iterdir()}
    assert finished == {"0-0": False, "0-1": False, "1-0": True, "1-1": True}
    assert files_of(tmp_path / "pruned") == expected


def test_layers_that_only_lose_experts_cost_something():
    model = tiny_model("mixtral", num_hidden_layers=3)

    costs = plan_of(model, FistaPruningConfig(pattern="experts:0.25")).costs

    assert costs[0] > 0
    assert costs == [costs[0]] * 3


def time_of_rank(share: list[int], costs: list[float]) -> float:
    """The time of a rank: 1 for each layer of the dense network up to its last pruned one, and what pruning costs."""
    pruned = [index for index in share if costs[index]]
    return 1 + pruned[-1] + sum(costs[index] for index in pruned) if pruned else 0


def least_time_of_all_splits(unfinished: list[int], costs: list[float], num_ranks: int) -> float:
    """The least time of the slowest rank over all contiguous splits, one by one."""
    cuts = itertools.combinations_with_replacement(range(len(unfinished) + 1), num_ranks - 1)
    ends = [(0, *cut, len(unfinished)) for cut in cuts]
    return min(
        max(time_of_rank(unfinished[a:b], costs) for a, b in itertools.pairwise(end))
        for end in ends
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("unfinished", "costs"),
    [
        (list(range(6)), [4.0] * 6),
        (list(range(9)), [0.5] * 9),
        ([1, 2, 5, 7], [4.0] * 9),
        (list(range(6)), [0.0, 4.0, 0.0, 8.0, 1.0, 0.0]),
        ([0, 5], [0.0, 4.0, 4.0, 4.0, 4.0, 0.0]),
        ([3], [4.0] * 4),
    ],
)
def test_layers_are_split_as_well_as_the_best_of_all_contiguous_splits(
    unfinished, costs, num_ranks
):
    shares = share_layers(unfinished, costs, num_ranks)

    assert len(shares) == num_ranks
    assert [index for share in shares for index in share] == unfinished
    assert max(time_of_rank(share, costs) for share in shares) == least_time_of_all_splits(
        unfinished, costs, num_ranks
    )
    assert share_layers([], costs, num_ranks) == [[]] * num_ranks
