"""Folders of short texts that stand for model folders, written as every run writes them."""

from pathlib import Path

from optimum_fista.run.checkpoints.output import new_output, require_output

OLD = ("config.json", "model.safetensors", "README.md", "tokenizer.json", "fista/report.json")
NEW = ("config.json", "model-00001-of-00001.safetensors", "README.md", "fista/report.json")


def write(folder: Path, names: tuple[str, ...], text: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """All files but the list of those that belong to the model."""
    files = [path for path in folder.rglob("*") if path.is_file() and "files.json" not in path.name]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def put(output: Path, names: tuple[str, ...] = NEW, text: str = "new", overwrite: bool = True) -> Path:
    """What every writer does."""
    require_output(output, overwrite)
    with new_output(output, overwrite) as folder:
        write(folder, names, text)
    return output
