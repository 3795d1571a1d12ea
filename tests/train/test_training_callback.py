import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_llama import tiny_tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_fista import MaskedTrainingCallback, save_masked
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.train.recovery import CHECKPOINTING
from optimum_fista.train.training import find_masks

IDS = tiny_tokens(32).tolist()


def trainer_of(model, folder, masks=None, **options) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        CHECKPOINTING: True,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 8,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = Dataset.from_dict({"input_ids": IDS, "labels": IDS})
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[MaskedTrainingCallback(masks)],
    )


def reload(saved, **options):
    return AutoModelForCausalLM.from_pretrained(saved.folder, **options)


def test_zeros_stay_zero_through_checkpoints(saved, tmp_path):
    masks = find_masks(saved.model, saved.pruner)

    trainer_of(reload(saved), tmp_path / "run", saved.folder).train()

    for step in (4, 8):
        tensors = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        for name, mask in masks.items():
            assert not bool(tensors[name][~mask].any()), name


def test_a_resumed_training_ends_with_the_same_bits(saved, tmp_path):
    whole = reload(saved)
    resumed = reload(saved)
    trainer_of(whole, tmp_path / "run", saved.folder).train()

    trainer = trainer_of(resumed, tmp_path / "run", saved.folder)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))

    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert len(moments) == len(list(resumed.parameters()))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
        assert not torch.equal(parameter, saved.model.get_parameter(name)), name
    save_masked(resumed, tmp_path / "out", saved.folder)
    assert verify_checkpoint(tmp_path / "out").num_zeros == saved.report.totals["num_zeros"]


def test_the_best_checkpoint_that_is_loaded_at_the_end_is_masked(saved, tmp_path):
    model = reload(saved)
    trainer = trainer_of(
        model,
        tmp_path / "run",
        bf16=True,
        optim="adafactor",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=4,
    )

    trainer.train()

    save_masked(model, tmp_path / "out", saved.folder)
    assert verify_checkpoint(tmp_path / "out").num_operators == 14
    assert not torch.equal(model.lm_head.weight, saved.model.lm_head.weight)


def test_no_hook_is_left_after_a_training_and_a_second_run_works(saved, tmp_path):
    model = reload(saved)
    weight = model.model.layers[0].mlp.up_proj.weight
    trainer = trainer_of(model, tmp_path / "run", max_steps=2)

    trainer.train()
    hooks_after_first = dict(weight._backward_hooks or {})
    trainer.args.max_steps = 3
    trainer.train()

    assert not hooks_after_first
    assert not weight._backward_hooks
    assert float((weight == 0).float().mean()) == 0.5  # the zeros of 2:4


def test_a_dense_model_is_refused(llama, tmp_path):
    trainer = trainer_of(llama, tmp_path / "run")

    with pytest.raises(ValueError, match="LlamaForCausalLM is not pruned"):
        trainer.train()


def test_weights_that_deepspeed_keeps_are_refused(saved, tmp_path):
    trainer = trainer_of(reload(saved), tmp_path / "run")
    trainer.args.deepspeed_plugin = object()

    with pytest.raises(
        ValueError, match="does not know the weights that DeepSpeed and FSDP1 keep: use FSDP2"
    ):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
