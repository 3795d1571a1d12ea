"""Public names can be the first thing that a process imports of Transformers and of this package."""

import subprocess
import sys
from pathlib import Path

import optimum_fista

# One interpreter, with what takes long and imports neither, copied for every name.
_SCRIPT = """
import os, sys
import accelerate, jinja2, scipy.optimize, tokenizers
import torch._dynamo.convert_frame, torch.distributed.tensor, torch.export
import transformers.loss.loss_utils, transformers.models.auto, transformers.tokenization_utils_tokenizers
from huggingface_hub import HfApi
assert not {"optimum_fista", "transformers.quantizers"} & set(sys.modules)
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(f"from optimum_fista import {name}")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"from optimum_fista import {name} failed")
"""


def test_public_names_can_be_imported_first():
    names = [
        "FistaPruner",
        "FistaPruningConfig",
        "load_model",
        "masked_training",
        "recover",
    ]

    done = subprocess.run([sys.executable, "-c", _SCRIPT, *names], capture_output=True, text=True)

    assert not done.returncode, done.stderr


def test_the_import_loads_neither_torch_nor_transformers():
    code = "import sys, optimum_fista; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_optimum_fista_is_an_alias():
    from optimum.fista import FistaPruningConfig

    assert FistaPruningConfig is optimum_fista.FistaPruningConfig


def test_public_names_are_listed():
    assert {*optimum_fista.__all__} <= {*dir(optimum_fista)}
    assert "__version__" in dir(optimum_fista)


def test_a_configuration_is_made_without_transformers():
    code = """if True:
        import sys
        from optimum_fista import FistaPruningConfig
        FistaPruningConfig(pattern="2:4", method="wanda").resolved()
        sys.exit("transformers" in sys.modules)
    """

    done = subprocess.run([sys.executable, "-c", code])

    assert done.returncode == 0


def test_no_code_of_the_package_replaces_things_as_tests_do():
    files = Path(optimum_fista.__file__).parent.rglob("*.py")
    assert not [file.name for file in files if "unittest" in file.read_text()]
