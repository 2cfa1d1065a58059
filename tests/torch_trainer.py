"""The Trainer of transformers under FSDP2, as one of several processes; see test_torch_examples.py.

python tests/torch_trainer.py EXAMPLE FILE

The trainer makes the optimizer, then shards the model; Accelerate puts the shards in its groups.
"""

import importlib
import importlib.util
import sys
import tempfile
from typing import Any

import torch
from metaopt_torch import MetaOptimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainingArguments

import metaopt as mo

STEPS = 20


def on_cpus(made: Any) -> Any:
    """Return Accelerate's class, which passes the plugin over on CPUs, as one that takes it."""
    kinds = importlib.import_module("accelerate.utils").DistributedType

    def accelerator(*args: Any, fsdp_plugin: Any, **kwargs: Any) -> Any:
        made_one = made(*args, **kwargs)
        made_one.state.distributed_type = kinds.FSDP
        made_one.state.fsdp_plugin = fsdp_plugin
        return made_one

    return accelerator


def main(example: str, file: str) -> None:
    """Train, and have the first rank write weights and step sizes."""
    module = importlib.import_module("transformers.trainer")
    module.Accelerator = on_cpus(module.Accelerator)  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("example", example)
    assert spec is not None
    assert spec.loader is not None
    parts: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    model = parts.Regression()
    options = {
        "base": mo.AdamW(),
        "compile": False,
    }
    sharding: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=64 // 2,
            max_steps=STEPS,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            max_grad_norm=0.0,
            disable_tqdm=True,
            **sharding,
        )
        trainer = parts.InOrder(
            model,
            arguments,
            train_dataset=parts.Data(STEPS),
            optimizer_cls_and_kwargs=(MetaOptimizer, options),
        )
        trainer.train()
    opt = trainer.optimizer.optimizer
    sizes = {name: float(size) for name, size in opt.step_sizes().items()}
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if trainer.is_world_process_zero():
        torch.save({"net": weights, "step sizes": sizes}, file)
    # threads of a process group that still run when the interpreter ends may abort it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
