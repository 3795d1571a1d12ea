"""What belongs to the process and to the caller's model is, after every call, as it was before."""

import os
import random
import sys

import numpy as np
import torch
from pruning import prune
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens

from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.pruner import FistaPruner


def surroundings(model):
    """What a call must not change, by name: settings of the process, random states, and what hangs on the model."""
    return {
        # Libraries that are imported on the way may add finders of their own.
        "import machinery": [
            f for f in sys.meta_path if type(f).__module__.startswith("optimum_fista")
        ],
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_float32_matmul_precision(),
        ),
        "gradients": torch.is_grad_enabled(),
        "torch's random state": torch.get_rng_state().tolist(),
        "NumPy's random state": str(np.random.get_state()),
        "Python's random state": random.getstate(),
        "requires_grad": {
            name: parameter.requires_grad for name, parameter in model.named_parameters()
        },
        "modes": [module.training for module in model.modules()],
        "hooks": sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ),
    }


def test_calls_leave_the_process_and_the_model_as_they_were(tmp_path):
    model = tiny_llama().train()
    batches = tiny_tokens().split(4)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    save_tiny_folder(tmp_path / "dense")
    steps = {
        "prune in memory": lambda: prune(model, batches),
        "streamed prune": lambda: FistaPruner(progress=False).prune(
            tmp_path / "dense", batches, output_dir=tmp_path / "pruned"
        ),
        "evaluate": lambda: evaluate_perplexity(model, tiny_tokens(), progress=False),
        "pack": lambda: pack_folder(tmp_path / "pruned", tmp_path / "packed"),
    }

    for name, step in steps.items():
        before = surroundings(model)

        step()

        after = surroundings(model)
        assert {key for key in before if before[key] != after[key]} == set(), name
