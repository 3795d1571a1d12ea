"""`--target-size`: how many tokens and how many channels go is chosen by what they cost on held-out texts."""

import re
from types import SimpleNamespace

import pytest
import torch
from killed import interrupted_after
from rare_tokens import COMMON, RARE, bpe_tokenizer, save
from tiny_llama import QUICK
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli import size_candidates, size_costs, target_size
from optimum_fista.cli.main import build_parser, main
from optimum_fista.cli.size_costs import Costs
from optimum_fista.folder.checkpoint import kept_tokens, read_report
from optimum_fista.removal.counted_model import count_model
from optimum_fista.removal.tokens_plan import plan_counted
from optimum_fista.text.loss import MeasuredText

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tokens that stay|belong to no token|bits per byte|rank-deficient|lost more than)"
)


def repeated(words: str, number: int) -> str:
    """So many words, in the same order again and again."""
    one_round = words.split()
    return " ".join(one_round[index % len(one_round)] for index in range(number))


# Each has 4,096 tokens and more, most of them in words.
SEA = repeated(COMMON, 5000)
ZOO = repeated(f"{RARE} {COMMON}", 6000)


def train_channels(folder) -> None:
    """Train the MLPs of the model in a folder on both texts: all that it knows of them is in its channels."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    windows = []
    for text in (SEA, ZOO):
        ids = torch.tensor(bpe_tokenizer()(text)["input_ids"])
        windows += ids[: len(ids) // 32 * 32].view(-1, 32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        rows = torch.randint(len(windows), (16,), generator=generator)
        batch = torch.stack([windows[row] for row in rows])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model with a tokenizer, trained a little; do not write to it."""
    folder = save(tmp_path_factory.mktemp("choice") / "dense", spare=0)
    train_channels(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with texts: sea.txt and zoo.txt to measure on, text.txt, which lacks the words of the zoo, to count."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sea.txt").write_text(SEA)
    (folder / "zoo.txt").write_text(ZOO)
    (folder / "text.txt").write_text(repeated(COMMON, 300))
    return folder


@pytest.fixture
def free_tokens(monkeypatch):
    """Measure nothing of tokens: they cost nothing, and the dense model has 1 bit per byte."""

    def losses_of_plans(plans, texts, **_):
        return [[SimpleNamespace(dense=1.0, pruned=1.0) for _ in texts] for _ in plans]

    monkeypatch.setattr(size_costs, "measure_plans", losses_of_plans)


def command(dense, texts, output, *flags, size=0.9, calibration=None) -> list[str]:
    """The words of `prune --target-size`, which counts text.txt."""
    source = calibration or str(texts / "text.txt")
    words = ["prune", str(dense), "-o", str(output), "--target-size", str(size), *QUICK]
    return [*words, "--calibration", source, "--method", "wanda", *flags]


def planned(words: list[str]) -> size_candidates.Candidate:
    """What a command chooses, without its run."""
    return target_size.plan_size(build_parser().parse_args(words))


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of_candidates(text: str) -> list[str]:
    return [line for line in text.splitlines() if "parameters are left" in line]


def cost_in(line: str, name: str) -> float:
    """The cost on a text in the line of a candidate."""
    return float(re.search(rf"{name} (\d+\.\d+) times", line)[1])


def test_channels_go_if_a_text_needs_the_tokens_that_the_counted_text_lacks(
    dense, texts, tmp_path, capsys
):
    output = tmp_path / "sized"
    before = contents(dense)

    assert main(command(dense, texts, output, "--measure", str(texts / "zoo.txt"))) == 0

    report = read_report(output)
    assert kept_tokens(output) is None
    assert report.config["pattern"].startswith("channels:")
    assert names_in(tmp_path) == ["sized"]
    assert contents(dense) == before

    with_tokens, without = lines_of_candidates(capsys.readouterr().err)
    assert with_tokens.startswith("   vocab:0.")
    assert without.startswith("-> channels:0.")
    assert cost_in(without, "zoo.txt") < cost_in(with_tokens, "zoo.txt")
    # The trial had as many sequences as the run, 8, so it made the same model.
    (text,) = report.texts
    assert cost_in(without, "zoo.txt") == pytest.approx(report.times_of(text), abs=1e-3)


def test_tokens_go_if_channels_cost_more(dense, texts, tmp_path, capsys):
    words = command(dense, texts, tmp_path / "sized", "--measure", str(texts / "sea.txt"))

    chosen = planned(words)

    assert chosen.tokens is not None
    assert chosen.num_parameters <= 0.9 * chosen.dense_parameters
    with_tokens, without = lines_of_candidates(capsys.readouterr().err)
    assert with_tokens.startswith("-> vocab:0.")
    assert without.startswith("   channels:0.")
    assert cost_in(with_tokens, "sea.txt") < cost_in(without, "sea.txt")
    assert names_in(tmp_path) == []


def test_text_that_is_held_out_of_the_counting_decides_if_the_user_names_none(
    dense, texts, tmp_path, capsys
):
    long = tmp_path / "long.txt"
    long.write_text(repeated(COMMON, 15_000))  # a tenth of it is enough to measure

    chosen = planned(command(dense, texts, tmp_path / "sized", calibration=str(long)))

    assert chosen.tokens is not None
    with_tokens, without = lines_of_candidates(capsys.readouterr().err)
    of_tokens = cost_in(with_tokens, r"long\.txt \(held out\)")
    assert of_tokens < cost_in(without, r"long\.txt \(held out\)")
    assert names_in(tmp_path) == ["long.txt"]


def test_a_limit_decides_before_the_mean(monkeypatch, capsys):
    texts = [MeasuredText("a", (), at_most=None), MeasuredText("b", (), at_most=1.2)]
    # Costs on the texts a and b, by the number of parameters that are removed.
    of_tokens = {
        0: [1.0, 1.0],
        100: [1.0, 1.3],  # above the limit of b
    }
    of_channels = {
        0: [1.0, 1.0],
        300: [1.0, 1.0],
        400: [1.8, 1.1],  # a higher mean, but within the limit of b
    }
    costs = Costs(texts, of_tokens, of_channels)
    monkeypatch.setattr(target_size, "measure_costs", lambda *_, **__: costs)
    candidates = [candidate_of(100, 300), candidate_of(0, 400)]

    chosen = target_size._chosen(candidates, texts)

    assert chosen is candidates[1]
    assert "b 1.100 times (1.2 allowed)" in capsys.readouterr().err

    without_limits = [MeasuredText("a", (), at_most=None), MeasuredText("b", (), at_most=None)]
    costs = Costs(without_limits, costs.of_tokens, costs.of_channels)

    assert target_size._chosen(candidates, without_limits) is candidates[0]


def test_a_promise_that_no_candidate_keeps_stops_with_what_is_possible(
    dense, texts, tmp_path, capsys
):
    flags = ["--protect", f"{texts / 'zoo.txt'}=1.2", "--protect", f"{texts / 'sea.txt'}=1.2"]

    assert main(command(dense, texts, tmp_path / "sized", *flags)) == 1

    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --protect: each way to reach this size makes a text take more")
    assert len(re.findall(r"zoo\.txt \d+\.\d{3} times \(1\.2 allowed\)", error)) == 2
    possible = re.search(r"--target-size (0\.\d+) may keep to the limits \(an estimate", error)
    assert 0.9 < float(possible[1]) < 1
    assert error.endswith("Nothing is written.")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_trial_that_fails_or_is_interrupted_leaves_no_file(
    dense, texts, tmp_path, free_tokens, monkeypatch, error
):
    def fail(*_, **__):
        assert list(tmp_path.rglob("*.safetensors"))  # of the trial
        raise error

    monkeypatch.setattr(size_costs, "losses_of_folder", fail)
    words = command(dense, texts, tmp_path / "sized", "--measure", str(texts / "sea.txt"))

    status = main(words)

    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert names_in(tmp_path) == []


def test_ctrl_c_in_the_run_of_a_trial_leaves_no_file(dense, texts, tmp_path, free_tokens):
    words = command(dense, texts, tmp_path / "sized", "--measure", str(texts / "sea.txt"))

    with interrupted_after(0):
        status = main(words)

    assert status == 130
    assert names_in(tmp_path) == []


def test_a_run_that_resumes_makes_no_trial(dense, texts, tmp_path, capsys, monkeypatch):
    output = tmp_path / "sized"
    words = command(dense, texts, output, "--measure", str(texts / "zoo.txt"))
    zoo = MeasuredText("zoo.txt", (), at_most=None)
    # Any parameter that goes with the tokens makes the text cost 9 times, so channels are chosen.
    of_tokens = {0: [1.0], 1: [9.0]}
    of_channels = {0: [1.0]}
    costs = Costs([zoo], of_tokens, of_channels)
    monkeypatch.setattr(target_size, "measure_costs", lambda *_, **__: costs)
    with interrupted_after(0):
        assert main(words) == 130
    assert names_in(tmp_path) == ["sized.unfinished"]
    monkeypatch.setattr(target_size, "measure_costs", None)
    capsys.readouterr()

    assert main(words) == 0

    assert "the run that was begun goes on: channels:0." in capsys.readouterr().err
    assert kept_tokens(output) is None


def test_a_dry_run_names_the_candidates_and_makes_no_trial(
    dense, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(FistaPruner, "prune", None)
    monkeypatch.setattr(size_costs, "measure_plans", None)
    monkeypatch.setattr(size_costs, "losses_of_folder", None)
    flags = ["--measure", str(texts / "zoo.txt"), "--dry-run"]

    assert main(command(dense, texts, tmp_path / "sized", *flags)) == 0

    printed = capsys.readouterr().out
    first, second = lines_of_candidates(printed)
    assert first.startswith("vocab:0.")
    assert second.startswith("channels:0.")
    assert "which of these is chosen is found by trials" in printed
    assert names_in(tmp_path) == []


def test_a_method_that_removes_no_channels_leaves_tokens(
    dense, texts, tmp_path, free_tokens, capsys
):
    flags = ["--measure", str(texts / "sea.txt"), "--method", "sparsegpt"]

    chosen = planned(command(dense, texts, tmp_path / "sized", *flags, size=0.97))

    assert chosen.tokens is not None
    assert chosen.channels is None
    printed = capsys.readouterr().err
    assert "no channel is removed: " in printed
    assert "trial" not in printed


def test_a_limit_is_tried_even_if_only_channels_can_go(dense, texts, tmp_path, capsys):
    flags = ["--protect", f"{texts / 'sea.txt'}=1.01"]
    words = command(dense, texts, tmp_path / "sized", *flags, calibration="self")

    with pytest.raises(ValueError, match="each way to reach this size"):
        planned(words)

    assert "trial 1 of 1: channels:0." in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_a_disk_that_is_too_small_for_a_trial_is_reported_before_the_trial(
    dense, texts, tmp_path, capsys, monkeypatch
):
    disk = SimpleNamespace(free=1000)
    monkeypatch.setattr("optimum_fista.cli.overview.shutil.disk_usage", lambda _: disk)
    monkeypatch.setattr(size_costs, "measure_plans", None)

    assert main(command(dense, texts, tmp_path / "sized", "--measure", str(texts / "sea.txt"))) == 1

    assert "of disk, and 0.98kiB are free there" in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_removing_half_of_the_tokens_is_a_candidate_too(tmp_path):
    words = " ".join(f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst")
    dense = save(tmp_path / "dense", spare=0, words=words, intermediate_size=200)
    parsed = build_parser().parse_args(command(dense, tmp_path, tmp_path / "sized", size=0.7))
    text = repeated(COMMON, 300)
    counted = count_model(str(dense), [text], text_name="text", progress=False)
    unused = plan_counted(counted, FistaPruningConfig(pattern="vocab:unused"))

    candidates = size_candidates.find_candidates(parsed, counted.model, counted, unused)

    removed = [candidate.num_in_tokens for candidate in candidates]
    assert len(candidates) == 3
    assert removed[1] == pytest.approx(removed[0] / 2, abs=64 * 64)
    assert removed[2] == 0
    most = 0.7 * counted.model.num_parameters()
    one_channel_more = 2 * 3 * 32
    for candidate in candidates:
        assert most - one_channel_more < candidate.num_parameters <= most
        num_removed = candidate.dense_parameters - candidate.num_parameters
        assert candidate.num_in_channels + candidate.num_in_tokens == num_removed


def test_tokens_that_spare_no_channel_stay():
    def candidate(tokens, channels):
        return size_candidates.Candidate(
            tokens, channels, dense_parameters=1, num_parameters=1, request=None
        )

    all_tokens = candidate("all", "channels:0.1")
    half = candidate("half", "channels:0.2")
    none = candidate(None, "channels:0.2")

    assert size_candidates._without_needless_tokens([all_tokens, half, none]) == [all_tokens, none]


def candidate_of(in_tokens: int, in_channels: int) -> SimpleNamespace:
    return SimpleNamespace(
        num_in_tokens=in_tokens,
        num_in_channels=in_channels,
        dense_parameters=1000,
        num_parameters=1000 - in_tokens - in_channels,
        tokens=in_tokens or None,
        channels=in_channels or None,
    )


def test_a_cost_is_the_product_of_both_and_a_size_is_estimated_between_what_was_measured():
    texts = [MeasuredText("a", (), at_most=1.1), MeasuredText("b", (), at_most=None)]
    # Costs on the texts a and b, by the number of parameters that are removed.
    of_tokens = {
        0: [1.0, 1.0],
        100: [1.2, 1.0],
    }
    of_channels = {
        0: [1.0, 1.0],
        300: [1.1, 1.2],
        400: [2.0, 3.0],
    }
    costs = Costs(texts, of_tokens, of_channels)
    candidates = [candidate_of(100, 300), candidate_of(0, 400)]

    assert costs.of(candidates[0]) == pytest.approx([1.32, 1.2])
    assert costs.of(candidates[1]) == [2.0, 3.0]
    assert not costs.keep_to_limits([1.101, 1.0])
    assert costs.keep_to_limits([1.1, 9.0])
    # Channels alone cost 1.1 times at 300 of 1,000 parameters.
    assert costs.possible_size(candidates) == 0.7


def test_no_size_is_named_if_none_is_likely_to_keep_to_the_limits():
    texts = [MeasuredText("a", (), at_most=1.0)]
    costs = Costs(texts, {0: [1.0]}, {0: [1.0], 400: [2.0]})

    assert costs.possible_size([candidate_of(0, 400)]) is None


@pytest.mark.parametrize(
    ("most_channels", "channels_left"),
    [
        (2900, 2816),  # 2880 is the largest multiple of 64 that fits; one of 128 is near enough
        (4000, 3968),  # no smaller multiple of 128 than 3968 is needed: it fits
        (4090, 4032),  # 3968 would remove three times as many channels as 4032
    ],
)
def test_as_many_channels_stay_as_quantizers_take(most_channels, channels_left):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    per_channel = 2 * 3 * 32  # two decoder layers, three matrices
    num_parameters = model.num_parameters()
    most = num_parameters - (4096 - most_channels) * per_channel

    share, num_left = size_candidates._channels(model, most, target_share=0.5)

    assert share.num_kept(4096) == channels_left
    assert num_left == num_parameters - (4096 - channels_left) * per_channel
