"""What one of several processes does, for test_torch_distributed.py.

    python tests/torch_ranks.py RANK WORLD FOLDER SCENARIO[,name=value...] ...

Scenarios run one after the other; what went wrong in each is written to FOLDER. Every scenario
trains a model that is distributed and, in every process, the same model that is not, on the same
data, and compares parameters and step sizes; between processes step sizes are the same to the last
bit.
"""

import copy
import functools
import io
import json
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from metaopt_torch import MetaOptimizer, wrap
from torch.distributed import optim as sharded_optim
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import metaopt as mo

sys.path.append(str(Path(__file__).parents[1]))

from tests.test_scope import Factored

STEPS = 6


class Model(torch.nn.Module):
    """Leaves of sizes that no number of processes divides, one of them smaller than that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.down = torch.nn.Linear(7, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> Any:
        return self.scale * self.down(torch.tanh(self.norm(self.up(x))))


class Even(torch.nn.Module):
    """A block for tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(8)
        self.up = torch.nn.Linear(8, 12)
        self.down = torch.nn.Linear(12, 8)

    def forward(self, x: Any) -> Any:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Branches(torch.nn.Module):
    """Layers of which one is used, and which the data says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Any, which: int) -> Any:
        return self.layers[which](x)


#: Any callable makes the optimizer of one process, whatever its annotation says.
zero_optimizer: Any = sharded_optim.ZeroRedundancyOptimizer
DEFAULTS: dict[str, Any] = {
    "base": mo.AdamW(eps=1e-3, weight_decay=0.1),
    "meta": mo.AdamW(eps=1e-3),
    "step_size": 0.02,
    "meta_lr": 0.05,
    "compile": False,
    "discount": 1.0,
}


def optimizer(
    params: Any,
    *,
    inner: bool = False,
    several: bool = False,
    learned: bool = False,
    **options: Any,
) -> Any:
    """Return one of ours; with `inner` one of torch's that is wrapped, `several` discounts.

    With `learned`, numbers of AdamW are, too.
    """
    options = DEFAULTS | ({"discount": (0.9, 1.0)} if several else {}) | options
    if learned:
        decay, beta = mo.Learned(0.1, meta_lr=1e-2), mo.Learned(0.9, meta_lr=1e-2)
        options["base"] = mo.AdamW(betas=(beta, 0.999), eps=1e-3, weight_decay=decay)
    if not inner:
        return MetaOptimizer(params, **options)
    base = options.pop("base")
    of_torch = torch.optim.AdamW(params, lr=1.0, eps=base.eps, weight_decay=base.weight_decay)
    return wrap(of_torch, **options)


def batch(t: int, features: int, samples: int = 12) -> Any:
    x = torch.randn(samples, features, generator=torch.Generator().manual_seed(t))
    return x.double()


def loss_of(net: Any, x: Any) -> Any:
    return (net(x) - torch.sin(x.sum(dim=-1, keepdim=True))).square().mean()


def mine(x: Any) -> Any:
    """Return this process's share of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def full(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_equal(opt: Any, net: Any, twin_opt: Any, twin: Any, *, allowed: float = 1e-12) -> None:
    """Compare with the model that is not distributed, and with the other processes."""
    check_params(net, twin, allowed)
    check_blocks(opt, twin_opt, allowed)


def check_params(net: Any, twin: Any, allowed: float) -> None:
    for (name, got), want in zip(net.named_parameters(), twin.parameters(), strict=True):
        error = float((full(got.detach()) - want.detach()).abs().max())
        assert error <= allowed, f"{name} differs by {error}"


def check_blocks(opt: Any, twin_opt: Any, allowed: float) -> None:
    sizes, wanted = opt.step_sizes(), twin_opt.step_sizes()
    assert sizes.keys() == wanted.keys()
    for key, size in sizes.items():
        error = float((full(size) / wanted[key] - 1.0).abs().max())
        assert error <= allowed, f"step size of {key} differs by {error}"
        whole = full(size).contiguous()
        others = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(others, whole)
        assert all(torch.equal(other, whole) for other in others), "step sizes differ by process"
    for name, values in twin_opt.hyperparameters().items():
        for key, value in values.items():
            error = float((full(opt.hyperparameters()[name][key]) / value - 1.0).abs().max())
            assert error <= allowed, f"{name} of {key} differs by {error}"
    ours, theirs = opt.diagnostics(), twin_opt.diagnostics()
    for key, norm in theirs["trace_norm"].items():
        error = float((full(ours["trace_norm"][key]) - norm).abs().max())
        assert error <= 1e-9, f"trace norm of {key} differs by {error}"
    for key, count in theirs["restarts"].items():
        assert torch.equal(ours["restarts"][key], count), key


def counted(step: Callable[[], Any]) -> dict[str, int]:
    """Return how often each collective is called in a step."""
    with CommDebugMode() as comm:
        step()
    return {str(name).rpartition(".")[2]: n for name, n in comm.get_comm_counts().items()}


def train(net: Any, opt: Any, t: int, share: Callable[[Any], Any], features: int) -> None:
    opt.zero_grad()
    loss_of(net, share(batch(t, features))).backward()
    if opt.config.skip_nonfinite and t == 3:
        poison(net)
    if opt.config.held_out and t % 3 != 1:
        with opt.meta_gradients():
            loss_of(net, share(batch(100 + t, features))).backward()


def poison(net: Any) -> None:
    """Put NaN in one entry of a gradient, which one process alone holds."""
    grad = next(param.grad for name, param in net.named_parameters() if name.endswith("up.weight"))
    whole = full(grad).clone()
    whole[-1, -1] = float("nan")
    if isinstance(grad, DTensor):
        part = distribute_tensor(whole, grad.device_mesh, grad.placements)
        grad.to_local().copy_(part.to_local())
    else:
        grad.copy_(whole)


def compared(
    net: Any, twin: Any, share: Callable[[Any], Any], meshes: int, features: int, options: Any
) -> None:
    """Train both; `meshes` is the number of sums over devices that a step may take."""
    opt, twin_opt = (optimizer(n.named_parameters(), **options) for n in (net, twin))
    for t in range(STEPS):
        train(net, opt, t, share, features)
        train(twin, twin_opt, t, lambda x: x, features)
        comms = counted(opt.step)
        assert sum(comms.values()) == meshes, comms
        assert comms.get("all_reduce", 0) == meshes, comms
        twin_opt.step()
    check_equal(opt, net, twin_opt, twin)
    if options.get("skip_nonfinite"):
        assert int(opt.diagnostics()["skipped"]) == 1


def ddp(view: bool = False, **options: Any) -> None:
    """DDP: gradients are averaged already, no sum is needed; with `view` they are in one buffer."""
    twin = Model().double()
    net = torch.nn.parallel.DistributedDataParallel(
        copy.deepcopy(twin), gradient_as_bucket_view=view
    )
    opt, twin_opt = optimizer(net.parameters(), **options), optimizer(twin.parameters(), **options)
    for t in range(STEPS):
        train(net, opt, t, mine, 5)
        train(twin, twin_opt, t, lambda x: x, 5)
        assert not counted(opt.step)
        twin_opt.step()
    check_equal(opt, net, twin_opt, twin)


def algoperf() -> None:
    """AlgoPerf's submission under DDP, the masked examples all in the last process's share."""
    from tests.algoperf_harness import Run, TorchDigits, submission

    submission_torch, parallel = submission("torch"), torch.nn.parallel.DistributedDataParallel
    submission_torch.MetaOptimizer = functools.partial(MetaOptimizer, compile=False)

    class Doubled(TorchDigits):
        distributed = False

        def init_model_fn(self, rng: Any) -> tuple[Any, Any]:
            model = super().init_model_fn(rng)[0].double()
            return (parallel(model) if self.distributed else model), None

        def placed(self, batch: Any) -> Any:
            whole = super().placed(batch)
            whole |= {name: whole[name].double() for name in ("inputs", "weights")}
            return {name: mine(part) for name, part in whole.items()} if self.distributed else whole

    workload = Doubled()
    workload.distributed = True
    run, twin = Run(submission_torch, workload), Run(submission_torch, Doubled())
    for _ in range(2):
        for one in (run, twin):
            one.train(one.workload.batches(seed=1), STEPS)
        check_equal(
            run.optimizer_state["optimizer"],
            run.params,
            twin.optimizer_state["optimizer"],
            twin.params,
        )
        for one in (run, twin):
            one.evaluate()
        check_params(run.params, twin.params, 1e-12)


def sharded(mesh: Any = None) -> tuple[Any, Any]:
    """Return a model under FSDP2, every layer by itself, and one that is not distributed."""
    twin = Model().double()
    net = copy.deepcopy(twin)
    for layer in (net.up, net.norm, net.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, twin


def fsdp(**options: Any) -> None:
    """FSDP2: every parameter sharded along its first axis."""
    net, twin = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    net.set_reshard_after_backward(True)
    compared(net, twin, mine, 1, 5, options)


def scaled(**options: Any) -> None:
    """FSDP2 and a GradScaler: what overflows on one device has step sizes rest on all."""
    net, twin = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    opt, twin_opt = (optimizer(n.named_parameters(), **options) for n in (net, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t in range(STEPS):
        for own, one, share in ((net, opt, mine), (twin, twin_opt, lambda x: x)):
            one.zero_grad()
            loss_of(own, share(batch(t, 5))).backward()
            if own is net:
                with one.meta_gradients(scaler=scaler):
                    scaler.scale(loss_of(own, share(batch(100 + t, 5)))).backward()
                    if t == 3:
                        poison(net)
            elif t != 3:
                with one.meta_gradients():
                    loss_of(own, batch(100 + t, 5)).backward()
            one.step()
    check_equal(opt, net, twin_opt, twin)


def own_meshes(**options: Any) -> None:
    """FSDP2 without a mesh given: every call makes one of its own, all alike."""
    net, twin = sharded()
    compared(net, twin, mine, 1, 5, options)


def empty_part(**options: Any) -> None:
    """FSDP2 of one parameter with one row: all processes but the first hold nothing."""
    torch.manual_seed(0)
    twin = torch.nn.Sequential(torch.nn.Linear(5, 1, bias=False)).double()
    net = copy.deepcopy(twin)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    compared(net, twin, mine, 1, 5, options)


def hsdp(**options: Any) -> None:
    """HSDP: sharded within rows of the mesh, replicated between them."""
    net, twin = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    compared(net, twin, mine, 1, 5, options)


def wrapped(twin: Any, **options: Any) -> Any:
    """Return a copy of a model under FSDP1, one layer by itself."""
    net = copy.deepcopy(twin)
    return wrapped_here(net, **options)


def wrapped_here(net: Any, **options: Any) -> Any:
    net.up = FullyShardedDataParallel(net.up, device_id=torch.device("cpu"), **options)
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)


def clean(net: Any) -> list[tuple[str, Any]]:
    """Return parameters by the names that they have in the model alone."""
    return [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in net.named_parameters()]


def fsdp1(
    strategy: str = "FULL_SHARD",
    orig: Any = True,
    given: bool = False,
    late: bool = False,
    **options: Any,
) -> None:
    """FSDP1: parameters are plain tensors that hold a part, or nothing at all."""
    twin: Any = Model().double()
    whole = {"use_orig_params": orig is True, "sharding_strategy": ShardingStrategy[strategy]}
    if strategy == "HYBRID_SHARD":
        whole["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    net: Any = copy.deepcopy(twin)
    opt = optimizer(net.named_parameters(), **options)
    net = wrapped_here(net, **whole)
    if given:
        options["process_group"] = net.process_group
    if not late:
        opt = optimizer(clean(net) if orig is True else net.parameters(), **options)
    options.pop("process_group", None)
    twin_opt = optimizer(twin.named_parameters(), **options)
    if orig is True and strategy != "NO_SHARD":
        assert any(param.numel() == 0 for param in net.parameters()) or dist.get_rank() == 0
    for t in range(STEPS):
        for n, o, share in ((net, opt, mine), (twin, twin_opt, lambda x: x)):
            o.zero_grad()
            loss_of(n, share(batch(t, 5))).backward()
            if options.get("skip_nonfinite") and t == 3:
                n.up.weight.grad.view(-1)[-1:] = float("nan")  # which one process alone holds
        comms = counted(opt.step)
        assert sum(comms.values()) == (strategy != "NO_SHARD"), comms
        twin_opt.step()
    with FullyShardedDataParallel.summon_full_params(net, writeback=False):
        check_params(net, twin, 1e-12)
    if options.get("blocks") == "weight":
        wanted = twin_opt.step_sizes()
        for name, size in opt.step_sizes().items():
            pieces: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(pieces, size)
            error = float((torch.cat(pieces) / wanted[name].reshape(-1) - 1.0).abs().max())
            assert error <= 1e-12, f"step sizes of {name} differ by {error}"
        return
    check_blocks(opt, twin_opt, 1e-12)
    if options.get("skip_nonfinite"):
        assert int(opt.diagnostics()["skipped"]) == 1


def fsdp1_branches(**options: Any) -> None:
    """FSDP1 where a layer has a gradient on one process alone, and where none has one."""
    twin: Any = Branches().double()
    net = FullyShardedDataParallel(
        copy.deepcopy(twin), use_orig_params=True, device_id=torch.device("cpu")
    )
    opt, twin_opt = optimizer(clean(net), **options), optimizer(twin.named_parameters(), **options)
    for t in range(STEPS):
        opt.zero_grad()
        net(batch(t, 5), min(dist.get_rank(), t % 2)).square().mean().backward()
        opt.step()
    sizes = torch.stack([*opt.step_sizes().values()])
    others = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
    dist.all_gather(others, sizes)
    assert all(torch.equal(other, sizes) for other in others), others
    start = twin_opt.step_sizes()
    for name, size in opt.step_sizes().items():
        assert (float(size) == float(start[name])) == name.startswith("layers.2."), name


def fsdp1_saved(**options: Any) -> None:
    """The state under FSDP1 goes through torch's own functions to another run and goes on."""
    twin: Any = Model().double()
    nets = [wrapped(twin, use_orig_params=True) for _ in range(2)]
    opts = [optimizer(clean(net), **options) for net in nets]
    twin_opt = optimizer(twin.named_parameters(), **options)
    for t in range(STEPS):
        train(nets[0], opts[0], t, mine, 5)
        opts[0].step()
        train(twin, twin_opt, t, lambda x: x, 5)
        twin_opt.step()
    model, state = get_state_dict(nets[0], opts[0])
    set_state_dict(nets[1], opts[1], model_state_dict=model, optim_state_dict=state)
    for t in range(STEPS, 2 * STEPS):
        train(nets[1], opts[1], t, mine, 5)
        opts[1].step()
        train(twin, twin_opt, t, lambda x: x, 5)
        twin_opt.step()
    with FullyShardedDataParallel.summon_full_params(nets[1], writeback=False):
        check_params(nets[1], twin, 1e-11)
    check_blocks(opts[1], twin_opt, 1e-11)


def by_hand(**options: Any) -> None:
    """Plain tensors that someone cut, and says over which processes."""
    twin: Any = Model().double()
    net: Any = copy.deepcopy(twin)
    world, rank = dist.get_world_size(), dist.get_rank()
    for name, param in [*net.named_parameters()]:
        owner, _, own = name.rpartition(".")
        part = torch.nn.Parameter(param.detach().reshape(-1).tensor_split(world)[rank].clone())
        setattr(net.get_submodule(owner), own, part)
    opt = optimizer(net.named_parameters(), process_group=dist.group.WORLD, **options)
    twin_opt = optimizer(twin.named_parameters(), **options)
    for t in range(STEPS):
        train(twin, twin_opt, t, lambda x: x, 5)
        if t == 3:  # a copy goes on over the same processes
            opt = copy.deepcopy(opt)
        whole: Any
        for param, whole in zip(opt.param_groups[0]["params"], twin.parameters(), strict=True):
            param.grad = whole.grad.reshape(-1).tensor_split(world)[rank].clone()
        opt.step()
        twin_opt.step()
    check_blocks(opt, twin_opt, 1e-12)


def zero(direct: bool = False, **options: Any) -> None:
    """ZeroRedundancyOptimizer: every process has whole parameters of its own; resumed, too.

    With `direct` it is given the arguments, and writes all of them into the groups.
    """
    twin: Any = Model().double()
    nets = [copy.deepcopy(twin) for _ in range(2)]
    make = functools.partial(optimizer, **options)
    twin_opt = optimizer(twin.parameters(), **options)
    opts = [
        zero_optimizer(net.parameters(), MetaOptimizer, **(DEFAULTS | options))
        if direct
        else zero_optimizer(net.parameters(), make)
        for net in nets
    ]
    for t in range(2 * STEPS):
        net, opt = nets[t >= STEPS], opts[t >= STEPS]
        train(twin, twin_opt, t, lambda x: x, 5)
        same: Any
        for param, same in zip(net.parameters(), twin.parameters(), strict=True):
            param.grad = same.grad.clone()
        twin_opt.step()
        opt.step()
        if t == STEPS - 1:
            opt.consolidate_state_dict()
            state: list[Any] = [opt.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(state)
            nets[1].load_state_dict(net.state_dict())
            opts[1].load_state_dict(state[0])
        check_params(net, twin, 1e-12)
        check_blocks(opt.optim, twin_opt, 1e-12)


def zero_refused() -> None:
    """What ZeroRedundancyOptimizer would keep of one process alone."""
    net = Model().double()
    for blocks in ("tensor", "node", "weight"):
        with pytest.raises(ValueError, match=r'ZeroRedundancyOptimizer .* must be "scalar"'):
            zero_optimizer(net.parameters(), functools.partial(optimizer, blocks=blocks))
    with pytest.raises(ValueError, match="`held_out` does not go with ZeroRedundancyOptimizer"):
        zero_optimizer(net.parameters(), functools.partial(optimizer, held_out=True))
    groups = [
        {"params": [net.scale], "block": "scale"},
        {"params": [*net.up.parameters(), *net.down.parameters()], "block": "rest"},
    ]
    with pytest.raises(ValueError, match=r"equal blocks, by group; process 0 has \[\['scale'\]"):
        zero_optimizer(groups, optimizer)


def refused() -> None:
    """What is cut in a way that cannot be followed is refused, by name and with a way out."""
    net = wrapped(Model().double(), use_orig_params=True)
    for more in ({"blocks": "node"}, {"blocks": mo.blocks.node(1)}):
        with pytest.raises(ValueError, match="`blocks` gives 'scale' a step size for every unit"):
            optimizer(clean(net), **more)
    opt, state = optimizer(clean(net)), optimizer([torch.ones(3)]).core_state()
    for ask in (opt.core_state, lambda: opt.load_core_state(state)):
        with pytest.raises(ValueError, match="needs whole parameters; of 'scale'"):
            ask()
    with pytest.raises(ValueError, match='`curvature` other than "none" needs all parameters'):
        optimizer(clean(net), curvature="exact", hvp="central")
    with pytest.raises(ValueError, match="`held_out` does not go with FullyShardedDataParallel"):
        optimizer(clean(net), held_out=True)
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    with pytest.raises(ValueError, match="`process_group` must be one that this process"):
        optimizer(clean(net), process_group=own[dist.get_rank() - 1])
    megatron: Any = torch.nn.Parameter(torch.ones(3))
    megatron.tensor_model_parallel = False
    with pytest.raises(ValueError, match=r"'w'.* is Megatron's .* Pass `process_group=`"):
        optimizer([("w", megatron)])
    assert optimizer([("w", megatron)], process_group=dist.group.WORLD).step_sizes()
    lost: Any = torch.nn.Parameter(torch.ones(3))
    lost._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"'w'.* FullyShardedDataParallel .* not to be found"):
        optimizer([("w", lost)])


def tensor_parallel(**options: Any) -> None:
    """Columns of one layer and rows of the next sharded; the norm, replicated, counted once."""
    twin = Even().double()
    net = copy.deepcopy(twin)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(
        net, mesh, {"norm": SequenceParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    # the norm's input and output are replicated here, as its parameters are
    for name, param in list(net.norm.named_parameters()):
        setattr(net.norm, name, torch.nn.Parameter(param.data))
    placements = {
        type(p)
        for param in net.parameters()
        if isinstance(param, DTensor)
        for p in param.placements
    }
    assert Replicate in placements
    assert Shard in placements
    _parallel_steps(net, twin, mesh, options)


def _parallel_steps(net: Any, twin: Any, mesh: Any, options: Any) -> None:
    """Train with gradients of the model that is not distributed, which are the same."""
    opt, twin_opt = (optimizer(n.named_parameters(), **options) for n in (net, twin))
    for t in range(STEPS):
        train(twin, twin_opt, t, lambda x: x, 8)
        for param, same in zip(net.parameters(), twin.parameters(), strict=True):
            param.grad = distribute_tensor(same.grad.clone(), mesh, param.placements)
        comms = counted(opt.step)
        assert comms == {"all_reduce": 1}, comms
        twin_opt.step()
    check_equal(opt, net, twin_opt, twin)


def two_meshes(**options: Any) -> None:
    """Parameters of two meshes, and plain ones beside them: a sum for each mesh."""
    world = dist.get_world_size()
    twin = Model().double()
    net = copy.deepcopy(twin)
    wide, square = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    net.up.weight = torch.nn.Parameter(distribute_tensor(net.up.weight.data, wide, [Shard(0)]))
    net.down.weight = torch.nn.Parameter(
        distribute_tensor(net.down.weight.data, square, [Shard(0), Shard(1)])
    )
    opt, twin_opt = (optimizer(n.named_parameters(), **options) for n in (net, twin))
    for t in range(STEPS):
        train(twin, twin_opt, t, lambda x: x, 5)
        for param, same in zip(net.parameters(), twin.parameters(), strict=True):
            assert same.grad is not None
            grad = same.grad.clone()
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        comms = counted(opt.step)
        assert comms == {"all_reduce": 2}, comms
        twin_opt.step()
    check_equal(opt, net, twin_opt, twin)


def curvature(**options: Any) -> None:
    """Central differences under FSDP2, where double backward is impossible."""
    exact = {"curvature": "exact", "hvp": "central", **options}
    net, twin = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    opts = [optimizer(n.named_parameters(), **exact) for n in (net, twin)]
    for t in range(STEPS):
        for n, opt, share in zip((net, twin), opts, (mine, lambda x: x), strict=True):

            def closure(n: Any = n, opt: Any = opt, share: Any = share, t: int = t) -> Any:
                opt.zero_grad()
                loss = loss_of(n, share(batch(t, 5)))
                loss.backward()
                return loss.detach()

            opt.step(closure)
    check_equal(opts[0], net, opts[1], twin, allowed=1e-7)
    plain = optimizer(net.named_parameters(), curvature="exact")
    loss_of(net, mine(batch(0, 5))).backward(create_graph=True)
    with pytest.raises((ValueError, RuntimeError), match='hvp="central"'):
        plain.step()


def whole_leaves() -> None:
    """A rule that sees whole leaves takes those of DDP, and refuses FSDP2's by name."""
    ddp(base=Factored(), blocks="node")
    net, _ = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(ValueError, match=r"`params\['scale'\]` is sharded, but Factored"):
        optimizer(net.named_parameters(), base=Factored())
    flat = wrapped(Model().double())
    with pytest.raises(ValueError, match="is sharded, but Factored"):
        optimizer(flat.named_parameters(), base=Factored())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    twin = Model().double()
    net = copy.deepcopy(twin)
    for layer in net.children():
        for name, param in list(layer.named_parameters()):
            copied = distribute_tensor(param.data, mesh, [Replicate()])
            setattr(layer, name, torch.nn.Parameter(copied))
    opt, twin_opt = (optimizer(n.named_parameters(), base=Factored()) for n in (net, twin))
    for t in range(STEPS):
        train(twin, twin_opt, t, lambda x: x, 5)
        for param, same in zip(net.parameters(), twin.parameters(), strict=True):
            whole: Any = same.grad
            distributed = isinstance(param, DTensor)
            param.grad = distribute_tensor(whole, mesh, [Replicate()]) if distributed else whole
        opt.step()
        twin_opt.step()
    check_equal(opt, net, twin_opt, twin)
    assert full(opt.state[net.up.weight]["row"]).shape == (7,)


def averages(**options: Any) -> None:
    """Evaluations at averaged weights leave no mark under FSDP2; FSDP1 is refused."""
    net, opt, twin, twin_opt = _optimized(options | {"several": True})
    x = batch(100, 5)
    for t in range(STEPS):
        train(net, opt, t, mine, 5)
        train(twin, twin_opt, t, lambda x: x, 5)
        opt.step()
        twin_opt.step()
        with torch.no_grad():
            before = net(x)  # FSDP2 holds on to whole weights of the outermost module
            with opt.averaged_params(), twin_opt.averaged_params():
                torch.testing.assert_close(net(x), twin(x), rtol=1e-12, atol=1e-12)
            assert torch.equal(net(x), before)
        found, wanted = (o.averaged_params(copy=True) for o in (opt, twin_opt))
        for name, mean in wanted.items():
            assert isinstance(found[name], DTensor)
            torch.testing.assert_close(full(found[name]), mean, rtol=1e-12, atol=1e-12)
    check_equal(opt, net, twin_opt, twin)
    flat = wrapped(twin, use_orig_params=True)
    opt = optimizer(clean(flat), several=True)
    with pytest.raises(ValueError, match="FullyShardedDataParallel holds a part"):
        opt.averaged_params()
    parts = opt.averaged_params(copy=True)
    assert all(torch.equal(parts[name], param) for name, param in clean(flat))


def save(folder: Path, **options: Any) -> None:
    """Train half a run and write it with torch.distributed.checkpoint."""
    net, opt, twin, twin_opt = _optimized(options)
    for t in range(STEPS):
        train(net, opt, t, mine, 5)
        opt.step()
    model, state = get_state_dict(net, opt)
    dcp.save({"model": model, "opt": state}, checkpoint_id=folder / "checkpoint")
    del twin, twin_opt


def load(folder: Path, **options: Any) -> None:
    """Read it on another number of processes, go on, and compare with a run in one piece."""
    net, opt, twin, twin_opt = _optimized(options)
    before = {name: full(param.detach()).clone() for name, param in net.named_parameters()}
    model, state = get_state_dict(net, opt)
    for name, param in net.named_parameters():  # to look at the state moves nothing
        assert torch.equal(full(param.detach()), before[name])
    dcp.load({"model": model, "opt": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(net, opt, model_state_dict=model, optim_state_dict=state)
    for t in range(2 * STEPS):
        train(twin, twin_opt, t, lambda x: x, 5)
        twin_opt.step()
        if t >= STEPS:
            train(net, opt, t, mine, 5)
            opt.step()
    check_equal(opt, net, twin_opt, twin, allowed=1e-11)


def copies(folder: Path, **options: Any) -> None:
    """After packing, the state can be saved, pickled, copied; each copy goes on as the run does."""
    net, opt, twin, twin_opt = _optimized(options)
    for t in range(STEPS):
        train(net, opt, t, mine, 5)
        opt.step()
        train(twin, twin_opt, t, lambda x: x, 5)
        twin_opt.step()
    state, held = opt.state_dict(), opt.state[net.up.weight]["exp_avg"]
    torch.save(state, file := io.BytesIO())
    whole = sum(t.to_local().nbytes for s in opt.state.values() for t in s.values() if t.dim())
    assert len(file.getvalue()) < 1.5 * whole + 200_000  # each leaf's own part of a buffer alone
    file.seek(0)
    saving: Any = dcp.async_save({"opt": get_optimizer_state_dict(net, opt)}, checkpoint_id=folder)
    saving.result()
    loaded = [
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
    ]
    for p in net.parameters():
        p.grad = None  # torch cannot copy those of FSDP2
    copied = copy.deepcopy(opt)
    start = [param.detach().clone() for param in net.parameters()]
    train(net, opt, STEPS, mine, 5)
    train(twin, twin_opt, STEPS, lambda x: x, 5)
    before = held.to_local().clone()
    for p, same in zip(copied.param_groups[0]["params"], net.parameters(), strict=True):
        p.grad = same.grad
    opt.step()
    copied.step()
    twin_opt.step()
    assert opt.state[net.up.weight]["exp_avg"] is held
    assert not torch.equal(held.to_local(), before)  # which the step went on with
    check_equal(opt, net, twin_opt, twin)
    for p, same in zip(copied.param_groups[0]["params"], net.parameters(), strict=True):
        assert torch.equal(full(p.detach()), full(same.detach()))
    other, other_opt, _, _ = _optimized(options)
    fresh = get_optimizer_state_dict(other, other_opt)
    dcp.load({"opt": fresh}, checkpoint_id=folder)
    for again in (None, *loaded):
        with torch.no_grad():
            for p, begin in zip(other.parameters(), start, strict=True):
                p.copy_(begin)
        if again is None:
            set_optimizer_state_dict(other, other_opt, fresh)
        else:
            other_opt.load_state_dict(again)
        train(other, other_opt, STEPS, mine, 5)
        other_opt.step()
        check_equal(other_opt, other, twin_opt, twin)


def _optimized(options: Any) -> tuple[Any, Any, Any, Any]:
    net, twin = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    opts = [optimizer(n.named_parameters(), **options) for n in (net, twin)]
    return net, opts[0], twin, opts[1]


SCENARIOS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        ddp,
        algoperf,
        fsdp,
        scaled,
        own_meshes,
        empty_part,
        hsdp,
        fsdp1,
        fsdp1_branches,
        fsdp1_saved,
        by_hand,
        zero,
        zero_refused,
        refused,
        tensor_parallel,
        two_meshes,
        curvature,
        whole_leaves,
        averages,
        save,
        load,
        copies,
    )
}


def main(rank: str, world: str, folder: str, *scenarios: str) -> None:
    """Run scenarios as one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / f"store_{world}"), int(world))
    rest: dict[str, Any] = {"rank": int(rank), "world_size": int(world), "store": store}
    # a process that fails leaves the others waiting
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **rest)
    failures = {}
    for scenario in scenarios:
        name, *words = scenario.split(",")
        options: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            options[key] = True if value == "True" else value
        if name in ("save", "load", "copies"):
            options["folder"] = Path(folder) / name.replace("load", "save") / ",".join(words)
        try:
            SCENARIOS[name](**options)
        except Exception:
            failures[scenario] = traceback.format_exc()
        try:
            failed = torch.tensor(len(failures))
            dist.all_reduce(failed)
        except RuntimeError:  # some wait for others elsewhere
            failures.setdefault(scenario, traceback.format_exc())
        if failures or int(failed):  # the processes may have come apart
            break
    (Path(folder) / f"failures_{world}_{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
