"""MetaOptimizer in Accelerate under FSDP2: `prepare` shards the model and the optimizer with it.

    pip install accelerate && torchrun --nproc-per-node 2 examples/torch/accelerate_fsdp.py [FILE]

Make the optimizer before `prepare`, as every other; it steps the shards that it is given. With
FILE, the first rank writes the weights and the step sizes there.
"""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from metaopt_torch import MetaOptimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import metaopt as mo


def model() -> torch.nn.Module:
    """Return a network of sizes that no number of ranks divides."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets of a step, for all ranks together."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(x[:, :1]) + x[:, 1:2]


def sharding() -> Accelerator:
    """Return an accelerator that shards every layer."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    if accelerator.device.type == "cpu":  # where Accelerate passes the plugin over
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def main(steps: int = 50) -> None:
    """Train on this rank's share of the data."""
    accelerator = sharding()
    net = model()
    opt = MetaOptimizer(net.named_parameters(), base=mo.AdamW(), blocks="tensor")
    net, prepared = accelerator.prepare(net, opt)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for step in range(steps):
        x, y = (part.chunk(ranks)[rank].to(accelerator.device) for part in batch(step))
        prepared.zero_grad()
        accelerator.backward(torch.nn.functional.mse_loss(net(x), y))
        prepared.step()
    sizes = {name: float(size) for name, size in opt.step_sizes().items()}
    accelerator.print(sizes)
    weights = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if accelerator.is_main_process and len(sys.argv) > 1:
        torch.save({"net": weights, "step sizes": sizes}, sys.argv[1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
