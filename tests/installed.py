"""Use an installed package without a clone: prune, verify, report, pack, and generate.

`.ci/wheel-test` runs this in a new environment that has no compiler on its path.
"""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_fista
import optimum_fista.packed

sys.path.append(str(Path(__file__).with_name("support")))
from tiny_llama import TEXT, save_tiny_folder

PRUNE = "prune model --output pruned --calibration text.txt --num-samples 8 --sequence-length 16 --device cpu"


def run(command: str) -> str:
    """Run one of the installed commands, and return what it printed."""
    print(f"  {command}", flush=True)  # noqa: T201
    program, *rest = command.split()
    done = subprocess.run(
        [Path(sys.executable).parent / program, *rest],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def main() -> None:
    """Go through the commands in an empty folder."""
    home = Path(optimum_fista.__file__).resolve()
    clone = Path(__file__).resolve().parents[1]
    assert home.is_relative_to(sys.prefix), home
    assert str(clone) not in sys.path
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        save_tiny_folder(Path("model"))
        Path("text.txt").write_text(TEXT)
        assert "7,680 of 15,360 weights zero" in run(f"optimum-fista {PRUNE}")
        assert "14 operators keep their pattern" in run("optimum-cli fista verify pruned")
        run("optimum-fista report pruned")
        assert "<table" in Path("pruned", "fista", "report.html").read_text()
        run("optimum-fista pack pruned --output packed")
        tokens = AutoTokenizer.from_pretrained("packed")("the sea is", return_tensors="pt")
        models = [AutoModelForCausalLM.from_pretrained(name) for name in ("packed", "pruned")]
        answers = [
            model.generate(**tokens, max_new_tokens=8, do_sample=False)[0].tolist()
            for model in models
        ]
        assert answers[0] == answers[1]


if __name__ == "__main__":
    main()
