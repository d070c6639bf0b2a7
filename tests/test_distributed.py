"""Training in several processes: DDP, FSDP2 (``fully_shard``), distributed checkpoints.

Two trainings that add gradients in different orders differ after several steps: the last bit of a
gradient sometimes decides between two ternary values, which changes the third digit of a loss. So
the tests compare each step of a distributed training with a step that one process computes from the
same weights (:func:`check_step`).
"""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import bitlinear
from bitlinear import BitLinear
from tests.processes import WORLD_SIZES, Transformer, assert_same_bits, mesh

try:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
except ImportError:
    pytest.skip("needs torch 2.6 or newer, for fully_shard", allow_module_level=True)

WHOLE = StateDictOptions(full_state_dict=True)

UNIT = 2.0**-24
"""The largest relative error of one fp32 operation."""


# --- The checks, which run in every process ---


def new_model():
    """Its features are not a multiple of 2 or 4: shards are uneven, and some are empty."""
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
    whole.load_state_dict(get_model_state_dict(model, options=WHOLE))
    return whole.to(dtype)


def gather_gradients(model):
    """The whole gradient of each parameter."""
    gradients = [parameter.grad for parameter in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in gradients]


def losses(model, x, target):
    return F.cross_entropy(model(x).float(), target, reduction="none")


def local_samples(tensor):
    """The samples of this process."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def all_samples(part):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach())
    return torch.cat(parts)


def synchronizing(model, last):
    """A context in which processes exchange gradients only after the ``last`` batch of a step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def step(model, optimizer, x, target, batches=1):
    """The losses of all samples, before a step of the optimizer on this process's samples.

    Their gradients are accumulated over ``batches``.
    """
    optimizer.zero_grad()
    found = []
    for number, part in enumerate(
        zip(local_samples(x).chunk(batches), local_samples(target).chunk(batches))
    ):
        with synchronizing(model, last=number == batches - 1):
            found.append(losses(model, *part))
            (found[-1].mean() / batches).backward()
    optimizer.step()
    return all_samples(torch.cat(found))


def parts(x, target, batches=1):
    """The samples, in the batches in which the processes take them."""
    count = batches * dist.get_world_size()
    return list(zip(x.chunk(count), target.chunk(count)))


def check_losses(found, model, parts):
    """Compare bits: each process has done the same operations with tensors of the same shapes."""
    assert_same_bits(found, torch.cat([losses(model, *part) for part in parts]).detach())


def check_gradients(found, model, parts):
    """Compare the mean over all batches with the one of ``model``, an ordinary model.

    The gradient of each batch is the same here, to the bit, for the reason of :func:`check_losses`.
    The sum of n numbers, in any order, has an error of less than n units of the sum of their
    magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); the division
    by n, a power of two, adds none.
    """
    each = [torch.autograd.grad(losses(model, *p).mean(), list(model.parameters())) for p in parts]
    for gradient, *gradients in zip(found, *each):
        terms = torch.stack(gradients).double()
        bound = len(parts) * UNIT * terms.abs().mean(dim=0)
        assert ((gradient - terms.mean(dim=0)).abs() <= bound).all()


def check_step(model, optimizer, alone, optimizer_alone, samples, batches=1):
    """Compare a step of ``model`` with a step of one process; return the losses.

    ``alone`` is an ordinary model with the same weights. Its optimizer has the same state and gets
    the same gradients, so that no difference grows from one step to the next.
    """
    found = step(model, optimizer, *samples, batches)
    gradients = gather_gradients(model)
    check_losses(found, alone, parts(*samples, batches))
    check_gradients(gradients, alone, parts(*samples, batches))

    for parameter, gradient in zip(alone.parameters(), gradients):
        parameter.grad = gradient
    optimizer_alone.step()
    stepped = gather(model)
    for parameter, wanted in zip(stepped.parameters(), alone.parameters()):
        # Optimizers compute each element alone. But a CPU can fuse multiplication and addition in
        # full vector registers only, and a shard has other tails than the whole tensor. In all
        # steps of a check an optimizer rounds an element less than 32 times: weights, and updates
        # of them that are below 1.
        assert (parameter - wanted).abs().max() <= 32 * UNIT * (1 + wanted.abs().max())
    alone.load_state_dict(stepped.state_dict())
    return found


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": shard,
    "fsdp, not resharded": lambda model: shard(model, reshard_after_forward=False),
}


def check_training(wrapper, batches=1):
    alone = new_model()
    model = WRAPPERS[wrapper](copy.deepcopy(alone))
    samples = batch()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (model, alone)]
    for _ in range(4):
        check_step(model, optimizers[0], alone, optimizers[1], samples, batches)
    with torch.no_grad():
        x, _ = samples
        assert_same_bits(model.eval()(x), gather(model)(x))


def check_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(new_model(), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, target = batch()
    for _ in range(3):
        now = gather(model, torch.bfloat16)
        check_losses(step(model, optimizer, x, target), now, parts(x.bfloat16(), target))
        assert not torch.equal(gather(model).head.weight.bfloat16(), now.head.weight)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def check_changes_between_samples(reshard_after_forward):
    """Half of the columns get no gradient, so that a step changes only the others."""
    layer = nn.Sequential(BitLinear(32, 33, bias=False))
    fully_shard(layer, mesh=mesh(), reshard_after_forward=reshard_after_forward)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    x = torch.randn(4, 32)
    x[:, ::2] = 0
    for _ in range(3):
        weight = layer[0].weight.full_tensor().detach().clone()  # one process shares it
        y = layer(x)
        assert_same_bits(y.detach(), bitlinear.training.straight_through_linear(x, weight))
        y.square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer[0].weight.full_tensor(), weight)


def check_memory():
    """Memory that resharding frees stays free."""
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
    model.unshard()  # The weights look like ordinary parameters now.
    with pytest.raises(ValueError, match=r"its weight is sharded by FSDP.*full_state_dict"):
        bitlinear.deploy(model)
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


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def new_training(seed):
    torch.manual_seed(seed)
    model = shard(new_model())
    return model, adamw(model)


def gather_state(model, optimizer):
    """The whole state of the optimizer as it is now; parts of it are shared otherwise."""
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE))


def check_saving(directory):
    samples = batch()
    model, optimizer = new_training(seed=1)
    for _ in range(2):
        step(model, optimizer, *samples)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(state, checkpoint_id=directory)
    expected = {
        "samples": samples,
        "model": gather(model).state_dict(),
        "optimizer": gather_state(model, optimizer),
        "losses": [step(model, optimizer, *samples) for _ in range(2)],
    }
    if dist.get_rank() == 0:
        torch.save(expected, directory / "expected.pt")


def check_resuming(directory, same_world_size):
    model, optimizer = new_training(seed=2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    expected = torch.load(directory / "expected.pt")
    resumed = gather_state(model, optimizer)
    assert_same_bits(gather(model).state_dict(), expected["model"])
    assert_same_bits(resumed["state"], expected["optimizer"]["state"])
    assert resumed["param_groups"] == expected["optimizer"]["param_groups"]

    alone = new_model()
    alone.load_state_dict(expected["model"])
    optimizer_alone = adamw(alone)
    set_optimizer_state_dict(alone, optimizer_alone, expected["optimizer"], options=WHOLE)
    for wanted in expected["losses"]:
        found = check_step(model, optimizer, alone, optimizer_alone, expected["samples"])
        if same_world_size:  # the same operations once more, with tensors of the same shapes
            assert_same_bits(found, wanted)


def check_a_whole_state_into_shards():
    whole = new_model()
    with torch.device("meta"):
        model = new_model()
    model = shard(model)
    model.to_empty(device=mesh().device_type)
    set_model_state_dict(model, whole.state_dict(), options=WHOLE)
    x, _ = batch()
    with torch.no_grad():
        assert_same_bits(model(x), whole(x))


# --- The tests ---


QUICK_WRAPPER, *SLOW_WRAPPERS = WRAPPERS


@pytest.mark.parametrize(
    "wrapper",
    [QUICK_WRAPPER, *(pytest.param(w, marks=pytest.mark.slow) for w in SLOW_WRAPPERS)],
)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_steps_are_those_of_one_process(processes, world_size, wrapper):
    processes.run(world_size, check_training, wrapper)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_several_batches_add_up(processes, wrapper):
    processes.run(2, check_training, wrapper, 2)


@pytest.mark.slow
def test_mixed_precision(processes):
    processes.run(2, check_mixed_precision)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_a_gathered_weight_is_quantised_again(processes, reshard_after_forward):
    processes.run(2, check_changes_between_samples, reshard_after_forward)


@pytest.mark.slow
def test_nothing_keeps_a_gathered_weight_alive(processes):
    processes.run(2, check_memory)


def test_a_gathered_model_can_be_deployed(processes):
    processes.run(2, check_deployment)


def test_layers_are_converted_before_they_are_sharded(processes):
    processes.run(2, check_conversion_after_sharding)


def test_a_layer_that_is_not_deployed_is_not_for_tensor_parallelism(processes):
    processes.run(2, check_tensor_parallel_training)


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint(processes, tmp_path):
    processes.run(2, check_saving, tmp_path)
    processes.run(2, check_resuming, tmp_path, True)
    model = new_model()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state["model"])
    expected = torch.load(tmp_path / "expected.pt")["model"]
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_training_goes_on_in_more_processes(processes, tmp_path):
    processes.run(2, check_saving, tmp_path)
    processes.run(4, check_resuming, tmp_path, False)


@pytest.mark.slow
def test_a_model_is_sharded_before_it_has_memory(processes):
    processes.run(2, check_a_whole_state_into_shards)


@pytest.mark.cuda
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_on_gpus(gpu_processes, reshard_after_forward):
    world_size = min(2, torch.cuda.device_count())
    gpu_processes.run(world_size, check_changes_between_samples, reshard_after_forward)
