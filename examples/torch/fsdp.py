"""MetaOptimizer under FSDP2: `fully_shard` the model, then make the optimizer.

    torchrun --nproc-per-node 2 examples/torch/fsdp.py [FILE]

Its state is sharded like the parameters; the step sizes are equal on every rank, by one sum over
the ranks a step. With FILE, the first rank writes the weights and the step sizes there.
"""

import sys

import torch
import torch.distributed as dist
from metaopt_torch import MetaOptimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import metaopt as mo


def model() -> torch.nn.Module:
    """Return a network of sizes that no number of ranks divides."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets of a step, for all ranks together."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(x[:, :1]) + x[:, 1:2]


def main(steps: int = 100) -> None:
    """Train on this rank's share of the data."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = dist.init_device_mesh(device, (ranks,))
    net = model().to(device)
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    opt = MetaOptimizer(net.named_parameters(), base=mo.AdamW(), blocks="tensor")
    for step in range(steps):
        x, y = (part.chunk(ranks)[rank].to(device) for part in batch(step))
        opt.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        opt.step()
    sizes = {name: float(size) for name, size in opt.step_sizes().items()}
    print(f"rank {rank}: {sizes}")
    weights = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if rank == 0 and len(sys.argv) > 1:
        torch.save({"net": weights, "step sizes": sizes}, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
