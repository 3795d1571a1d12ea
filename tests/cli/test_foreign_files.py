"""Random command lines into folders that hold files of others: not one of those is changed."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from killed import Killed, killed_at
from media_models import save_llava_folder
from quantized_models import fp8_deepseek
from tiny_llama import tiny_llama, tiny_tokenizer, tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.cli.main import main

QUICK = [
    "--num-samples",
    "4",
    "--sequence-length",
    "16",
    "--device",
    "cpu",
    "--method",
    "magnitude",
]
# Files of others.
FILES = [
    "notes.txt",
    "sub/config.json",
    "sub/deep/model.safetensors",
    "fista/mine.txt",
    "adapter.safetensors",
    "journal/lock.txt",
    ".hidden",
    "model.bin",
]
# Files of others with names that files of a model have.
ALIKE = [
    "README.md",
    "tokenizer.json",
    "generation_config.json",
    "fista/report.json",
    "vocab.json",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder, text_file, pruned_folder):
    """What command lines start from: models dense (multimodal and FP8 too), pruned, packed and in memory, a text."""
    folder = tmp_path_factory.mktemp("world")
    assert main(["pack", str(pruned_folder), "-o", str(folder / "packed")]) == 0
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    model = tiny_llama()
    pruner.prune(model, tiny_tokens().split(4))
    dense = [tiny_folder, save_llava_folder(folder / "multimodal"), fp8_deepseek(folder / "fp8")]
    tiny_tokenizer().save_pretrained(dense[-1])
    sources = {"dense": dense, "pruned": pruned_folder, "packed": folder / "packed"}
    return sources | {"text": text_file, "memory": (pruner, model)}


def identity(path: Path) -> tuple:
    """What tells whether a file was replaced or changed: its number, and its content or the target of a link."""
    status = path.lstat()
    if path.is_symlink():
        return status.st_ino, os.readlink(path)
    return status.st_ino, status.st_mode, status.st_mtime_ns, path.read_bytes()


def snapshot(root: Path) -> dict[Path, tuple]:
    """The identity of every file and link in a folder, at any depth."""
    return {path: identity(path) for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def foreign(folder: Path, chance: random.Random, names: list[str]) -> None:
    """Write some files of others, with random ones of these names, and a link into a folder."""
    for name in chance.sample(names, chance.randint(1, len(names) - 1)):
        if not os.path.lexists(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if chance.random() < 0.2:
                (folder / name).symlink_to(chance.choice(["../elsewhere/secret.txt", "nowhere"]))
            else:
                (folder / name).write_text("foreign")
    (folder / "linked").symlink_to("../elsewhere")


def scene(root: Path, chance: random.Random, world: dict, overwrite: bool) -> dict[Path, tuple]:
    """A random output with files of others in and around it; returns what must stay as it is."""
    foreign(root / "elsewhere", chance, [*FILES, "secret.txt"])
    foreign(root / ".out.old.mine", chance, FILES)
    if chance.random() < 0.15:
        foreign(root / "out.unfinished", chance, FILES)
    place = root / "out"
    kind = chance.choice(["none", "empty", "others", "alike", "pruned", "packed", "link", "file"])
    model: set[Path] = set()  # files that may be replaced
    if kind == "link":
        place = root / "behind"
        (root / "out").symlink_to("behind")
        kind = chance.choice(["others", "pruned", "gone"])
    if kind == "file":
        place.write_text("foreign")
    elif kind in ("pruned", "packed"):
        shutil.copytree(world[kind], place)
        model = set(snapshot(place)) if overwrite else set()
        foreign(place, chance, FILES)
    elif kind in ("others", "alike"):
        foreign(place, chance, FILES if kind == "others" else FILES + ALIKE)
    elif kind == "empty":
        place.mkdir()
    return {path: state for path, state in snapshot(root).items() if path not in model}


def command(
    chance: random.Random, world: dict, output: str, overwrite: bool
) -> tuple[str, list[str]]:
    """A random command that writes to `output`: its kind and its words; "save" stands for `save_pretrained`."""
    kind = chance.choice(["prune", "prune", "prune --packed", "pack", "unpack", "save", "save"])
    flags = ["--output", output, *(["--overwrite"] if overwrite else [])]
    if kind.startswith("prune"):
        flags = [
            *kind.split(),
            str(chance.choice(world["dense"])),
            *flags,
            *QUICK,
            "--calibration",
            str(world["text"]),
        ]
    elif kind in ("pack", "unpack"):
        flags = [kind, str(world["pruned" if kind == "pack" else "packed"]), *flags]
    return kind, flags


def test_no_command_changes_a_file_that_it_did_not_write(world, tmp_path, monkeypatch):
    ended: Counter = Counter()

    for seed in range(40):
        chance = random.Random(seed)
        root = tmp_path / str(seed)
        root.mkdir()
        monkeypatch.chdir(root)
        overwrite = chance.random() < 0.5
        before = scene(root, chance, world, overwrite)
        outputs = ["out", "./out/", str(root / "out")] * 3 + [".", ".."]
        kind, flags = command(chance, world, chance.choice(outputs), overwrite)

        try:
            with killed_at(chance.choice([chance.randint(0, 60), 10**9])):
                if kind == "save":
                    pruner, model = world["memory"]
                    tokenizer = chance.choice([None, tiny_tokenizer()])
                    pruner.save_pretrained(model, flags[1], tokenizer, overwrite=overwrite)
                    ended[kind, 0] += 1
                else:
                    ended[kind, main(flags)] += 1
        except Killed:
            ended[kind, "killed"] += 1
        except (OSError, ValueError):
            ended[kind, 1] += 1

        after = snapshot(root)
        assert {path: after.get(path) for path in before} == before, (seed, kind, flags)

    assert {code for _, code in ended} == {0, 1, "killed"}, ended
