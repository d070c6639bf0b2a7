"""Training in several processes: DDP, FSDP2 (``fully_shard``), distributed checkpoints."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import WORLD_SIZES, Transformer, assert_same_bits, mesh
from torch import nn

import bitlinear
from bitlinear import BitLinear

try:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
except ImportError:
    pytest.skip("needs torch 2.6 or newer, for fully_shard", allow_module_level=True)

# Gradients are added in another order, which is 1e-7 of them. Quantisation mostly swallows that:
# the losses have been equal to the bit. But an activation, one of 32 or more that are added, may
# round to the next of its 255 values.
TOLERANCE = {"rtol": 1e-4, "atol": 0}


# --- What the checks below do, each in every process ---


def new_model():
    """Its features are no multiple of 2 or 4, so shards are uneven; some are empty."""
    return bitlinear.convert(Transformer(hidden=53, classes=3), exclude=())


def batch():
    return torch.randn(8, 5, 32), torch.randint(3, (8,))


def shard(model, reshard_after_forward=True, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh(), reshard_after_forward=reshard_after_forward, **options)
    return fully_shard(model, mesh=mesh(), reshard_after_forward=reshard_after_forward, **options)


def gather(model, dtype=torch.float32):
    """An ordinary model with the parameters that ``model`` has over all processes."""
    whole = new_model()
    whole.load_state_dict(
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    )
    return whole.to(dtype)


def losses(model, x, target):
    return F.cross_entropy(model(x).float(), target, reduction="none")


def mine(tensor):
    """The samples of this process."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def everyones(part):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach())
    return torch.cat(parts)


def step(model, optimizer, x, target):
    """The losses of all samples, before a step of the optimizer on this process's."""
    optimizer.zero_grad()
    part = losses(model, mine(x), mine(target))
    part.mean().backward()
    optimizer.step()
    return everyones(part)


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": shard,
    "fsdp, not resharded": lambda model: shard(model, reshard_after_forward=False),
}


def check_training(wrapper):
    alone = new_model()
    model = WRAPPERS[wrapper](copy.deepcopy(alone))
    x, target = batch()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (alone, model)]
    history = []
    for number in range(5):
        now = gather(model)
        loss = losses(alone, x, target)
        optimizers[0].zero_grad()
        loss.mean().backward()
        optimizers[0].step()
        distributed = step(model, optimizers[1], x, target)
        assert_same_bits(distributed, losses(now, x, target).detach())
        if number == 0:
            assert_same_bits(distributed, loss.detach())
        torch.testing.assert_close(distributed, loss.detach(), **TOLERANCE)
        history.append(loss.mean().item())
    assert history[-1] < 0.8 * history[0]
    with torch.no_grad():
        assert_same_bits(model.eval()(x), gather(model)(x))


def check_accumulation(wrapper):
    alone = new_model()
    model = WRAPPERS[wrapper](copy.deepcopy(alone))
    x, target = batch()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (alone, model)]
    for _ in range(2):
        loss = losses(alone, x, target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.mean().backward()
        halves = []
        for half in range(2):
            samples = [mine(t).chunk(2)[half] for t in (x, target)]
            last = half == 1
            if wrapper == "ddp":
                context = contextlib.nullcontext() if last else model.no_sync()
            else:
                context = contextlib.nullcontext()
                model.set_requires_gradient_sync(last)
            with context:
                halves.append(losses(model, *samples))
                (halves[-1].mean() / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(everyones(torch.cat(halves)), loss.detach(), **TOLERANCE)


def check_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(new_model(), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, target = batch()
    for _ in range(3):
        now = gather(model, torch.bfloat16)
        before = losses(now, x.bfloat16(), target)
        assert_same_bits(step(model, optimizer, x, target), before.detach())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def check_changes_between_samples(reshard_after_forward):
    """Every second column has no gradient, and those that tell one weight from another do not."""
    layer = nn.Sequential(BitLinear(32, 33, bias=False))
    fully_shard(layer, mesh=mesh(), reshard_after_forward=reshard_after_forward)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    x = torch.randn(4, 32)
    x[:, ::2] = 0
    for _ in range(3):
        weight = layer[0].weight.full_tensor().detach().clone()  # one process shares it
        y = layer(x)
        assert_same_bits(y.detach(), bitlinear.quantize.straight_through_linear(x, weight))
        y.square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer[0].weight.full_tensor(), weight)


def check_memory():
    """What resharding frees stays free."""
    model, unsharded = shard(new_model()), []
    layers = [m for m in model.blocks.modules() if isinstance(m, BitLinear)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: unsharded.append(layer.weight))
    with torch.no_grad():
        model(batch()[0])
    assert len(unsharded) == len(layers) == 12
    assert [weight.untyped_storage().size() for weight in unsharded] == [0] * len(layers)
    gc.collect()
    packed = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.uint8]
    assert len(packed) <= 1, [t.shape for t in packed]  # of the head, which is not resharded


def check_deployment():
    model = shard(new_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, target = batch()
    step(model, optimizer, x, target)
    with torch.no_grad():
        y = model(x)
    model.reshard()
    with pytest.raises(ValueError, match=r"blocks\.0\.q: its weight is sharded.*full_state_dict"):
        bitlinear.deploy(model)
    with pytest.raises(ValueError, match="its weight is sharded"):
        model.blocks[0].q.deploy()
    with torch.no_grad():
        assert_same_bits(bitlinear.deploy(gather(model))(x), y)
        assert_same_bits(model(x), y)


def check_conversion_after_sharding():
    model = fully_shard(nn.Sequential(nn.Linear(8, 8)), mesh=mesh())
    with pytest.raises(TypeError, match=r"sharded.*convert before sharding"):
        BitLinear.from_linear(model[0])


def check_tensor_parallel_training():
    model = parallelize_module(nn.Sequential(BitLinear(8, 8)), mesh(), {"0": ColwiseParallel()})
    with pytest.raises(TypeError, match=r"weight that is a DTensor.*train with FSDP2"):
        model(torch.randn(2, 8))
    with pytest.raises(ValueError, match="its weight is sharded"):
        model[0].deploy()


def new_training(seed):
    torch.manual_seed(seed)
    model = shard(new_model())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def check_saving(directory):
    x, target = batch()
    model, optimizer = new_training(seed=1)
    history = [step(model, optimizer, x, target) for _ in range(2)]
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(state, checkpoint_id=directory)
    whole = gather(model).state_dict()
    history += [step(model, optimizer, x, target) for _ in range(2)]
    if dist.get_rank() == 0:
        torch.save({"history": history, "model": whole}, directory / "expected.pt")


def check_resuming(directory, same_world_size):
    x, target = batch()
    model, optimizer = new_training(seed=2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    expected = torch.load(directory / "expected.pt")["history"]
    history = [step(model, optimizer, x, target) for _ in range(2)]
    assert_same_bits(history[0], expected[2])
    if same_world_size:
        assert_same_bits(history[1], expected[3])
    torch.testing.assert_close(history[1], expected[3], **TOLERANCE)


def check_a_whole_state_into_shards():
    whole = new_model()
    with torch.device("meta"):
        model = new_model()
    model = shard(model)
    model.to_empty(device=mesh().device_type)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole.state_dict(), options=options)
    x, _ = batch()
    with torch.no_grad():
        assert_same_bits(model(x), whole(x))


# --- The tests ---


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_losses_are_those_of_one_process(processes, world_size, wrapper):
    processes.run(world_size, check_training, wrapper)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_several_batches_add_up(processes, wrapper):
    processes.run(2, check_accumulation, wrapper)


def test_mixed_precision(processes):
    processes.run(2, check_mixed_precision)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_a_gathered_weight_is_quantised_again(processes, reshard_after_forward):
    processes.run(2, check_changes_between_samples, reshard_after_forward)


def test_nothing_keeps_a_gathered_weight_alive(processes):
    processes.run(2, check_memory)


def test_what_was_gathered_can_be_deployed(processes):
    processes.run(2, check_deployment)


def test_layers_are_converted_before_they_are_sharded(processes):
    processes.run(2, check_conversion_after_sharding)


def test_a_layer_that_is_not_deployed_is_not_for_tensor_parallelism(processes):
    processes.run(2, check_tensor_parallel_training)


def test_training_goes_on_from_a_checkpoint(processes, tmp_path):
    processes.run(2, check_saving, tmp_path)
    processes.run(2, check_resuming, tmp_path, True)
    processes.run(4, check_resuming, tmp_path, False)
    model = new_model()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state["model"])
    expected = torch.load(tmp_path / "expected.pt")["model"]
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


def test_a_model_is_sharded_before_it_has_memory(processes):
    processes.run(2, check_a_whole_state_into_shards)


@pytest.mark.cuda
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_on_gpus(gpu_processes, reshard_after_forward):
    world_size = min(2, torch.cuda.device_count())
    gpu_processes.run(world_size, check_changes_between_samples, reshard_after_forward)
