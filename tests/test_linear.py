from __future__ import annotations

import contextlib
import copy
import io
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from bitlinear import BitLinear, packing, quantize
from tests import oracle


def deployed(in_features=20, out_features=6, bias=True, **kwargs):
    return BitLinear(in_features, out_features, bias=bias, **kwargs).deploy()


def state_bytes(layer):
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))


# --- It is an nn.Linear ---


def test_it_is_an_nn_linear_to_the_code_around_it():
    torch.manual_seed(1)
    layer = BitLinear(20, 6, dtype=torch.bfloat16)
    torch.manual_seed(1)
    linear = nn.Linear(20, 6, dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.is_deployed) == (20, 6, False)
    for name, parameter in linear.named_parameters():
        assert torch.equal(getattr(layer, name), parameter)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, linear.weight)


def test_repr():
    assert (
        repr(BitLinear(20, 6, bias=False))
        == "BitLinear(in_features=20, out_features=6, bias=False, quant_type=ai8pc_wpt)"
    )
    assert repr(deployed(eps=0.5)).endswith(
        "bias=True, quant_type=ai8pc_wpt, eps=0.5, deployed=True)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "fp4"}, r"one of \['ai8pc_wpt'\], but it is 'fp4'"),
        ({"eps": 0.0}, "eps must be between 2e-36 and 1e"),
        ({"eps": float("nan")}, "eps must be between"),
        ({"in_features": 0}, "at least 1, but they are 0 and 6"),
        ({"out_features": 0}, "at least 1, but they are 20 and 0"),
        ({"in_features": 500_001}, "at most 500000 .* but it is 500001: split the layer"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BitLinear(**{"in_features": 20, "out_features": 6, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64.0, 4), r"in_features must be an integer, but it is 64\.0"),
        ((64, "4"), "out_features must be an integer, but it is '4'"),
        # Where nn.Linear has device and dtype.
        ((4, 4, True, "cpu", torch.float32), "eps must be a number, but it is 'cpu': pass device"),
        ((4, 4, True, None), "eps must be a number, but it is None"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        BitLinear(*arguments)
    with pytest.raises(TypeError, match="dtype must be floating point"):
        BitLinear(4, 4, dtype=torch.complex64)


@pytest.mark.parametrize("make", [BitLinear, deployed])
def test_wrong_inputs(make):
    layer = make(20, 6)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(TypeError, match=r"float32, float16 or bfloat16.*convert it"):
            layer(torch.ones(2, 20, dtype=dtype))
    with pytest.raises(ValueError, match=r"in_features = 20, but x has shape \[2, 21\]"):
        layer(torch.ones(2, 21))
    with pytest.raises(ValueError, match=r"x is on meta and .* is on cpu"):
        layer(torch.ones(2, 20, device="meta"))
    with pytest.raises(TypeError, match=r"needs a torch\.Tensor, but got ndarray: convert it"):
        layer(np.ones((2, 20), np.float32))


# --- Deploying ---


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(7, 70), (2, 3, 70), (70,), (0, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_eval_and_deployed_agree_to_the_bit(shape, dtype, bias):
    layer = BitLinear(70, 33, bias=bias).eval()
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        before = layer(x)
        oracle.assert_same_bits(layer.deploy()(x), before)


@pytest.mark.parametrize("k", [1, 130_000, 140_000])
def test_eval_and_deployed_agree_for_any_number_of_features(k):
    layer = BitLinear(k, 3)
    x = torch.rand(2, k)
    before = layer(x).detach()
    oracle.assert_same_bits(layer.deploy()(x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_deploy_packs_what_the_oracle_packs(bias):
    layer = BitLinear(70, 33, bias=bias)
    w, b = layer.weight.detach(), layer.bias
    assert layer.deploy() is layer
    assert layer.is_deployed
    assert not list(layer.parameters())
    assert dict(layer.named_buffers()).keys() == {"w_packed", "w_scale"} | (
        {"bias"} if bias else set()
    )
    assert layer.state_dict().keys() == dict(layer.named_buffers()).keys()
    assert (layer.w_scale.dtype, layer.w_scale.shape) == (torch.float32, (1,))
    t = oracle.ternarize(w, layer.w_scale)
    np.testing.assert_array_equal(layer.w_packed.numpy(), oracle.pack(t))
    np.testing.assert_allclose(layer.w_scale.item(), oracle.weight_scale(w), rtol=3e-7)
    assert layer.bias is None if b is None else torch.equal(layer.bias, b)


def test_deploy_packs_large_layers_chunk_by_chunk():
    layer = BitLinear(4096, 300)
    t, _ = quantize.quantize_weights(layer.weight.detach())
    assert torch.equal(packing.unpack_ternary(layer.deploy().w_packed, 4096), t)


def test_deploy_is_idempotent_and_stays_in_train_mode():
    layer = deployed()
    tensors = dict(layer.named_buffers())
    layer.deploy().train()
    assert layer.training
    assert layer.is_deployed
    assert all(tensor is tensors[name] for name, tensor in layer.named_buffers())
    assert not layer(torch.randn(2, 20)).requires_grad


def test_a_missing_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = deployed().nonsense


def test_memory_of_a_deployed_layer():
    layer = BitLinear(1024, 1024)
    before = state_bytes(layer)
    assert before == 4 * 1024 * 1025
    assert state_bytes(layer.deploy()) <= 0.064 * before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_deploy_refuses_weights_that_are_not_finite(bad):
    layer = BitLinear(20, 6)
    with torch.no_grad():
        layer.weight[3, 4] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        layer.deploy()
    assert not layer.is_deployed
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.bias, nn.Parameter)


def test_an_optimizer_that_still_holds_the_bias_does_not_reach_the_deployed_one():
    layer = BitLinear(20, 6)
    parameter = layer.bias
    layer.deploy()
    bias = layer.bias.clone()
    with torch.no_grad():
        parameter.add_(1)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (20,), (0, 20)])
@pytest.mark.parametrize("scale", [(1,), (6, 1)])
def test_the_gradient_of_the_input_of_a_deployed_layer(shape, dtype, scale):
    """``dx = (dy * s_w) @ t``, of which LoRA and the layers in front learn."""
    layer = deployed()
    layer.load_state_dict({**layer.state_dict(), "w_scale": torch.rand(scale) + 0.1})
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        oracle.assert_same_bits(y, layer(x))
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted = (grad.double() @ layer.dequantize().double()).to(dtype)
    torch.testing.assert_close(x.grad, wanted)
    assert x.grad.dtype == dtype
    assert all(buffer.grad is None for buffer in layer.buffers())


def test_layers_in_front_of_a_deployed_one_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), deployed(32, 3))
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 3)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(10 * model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.9


def test_the_bias_of_a_deployed_layer_may_become_a_parameter():
    layer, x, grad = deployed(), torch.randn(5, 20), torch.randn(5, 6)
    y = layer(x)
    layer.bias = nn.Parameter(layer.bias.clone())
    assert torch.equal(layer(x), y)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_the_bias_of_a_deployed_layer_may_want_a_gradient():
    layer, x, grad = deployed(), torch.randn(5, 20), torch.randn(5, 6)
    layer.bias.requires_grad_()
    layer(x).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))
    layer.w_scale.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"w_scale has no gradient.*undeploy"):
        layer(x).backward(grad)


def test_a_deployed_layer_in_training_mode_has_nothing_to_train():
    with pytest.raises(RuntimeError, match="does not require grad"):
        deployed().train()(torch.randn(2, 20)).sum().backward()


def test_bad_tokens_and_zeros():
    layer = deployed()
    x = torch.randn(3, 20)
    clean = layer(x)
    x[1, 3] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert torch.equal(layer(torch.zeros(20)), layer.bias)


# --- Back to training ---


def magnitudes(t, w_scale):
    """``w_scale / mean|t|``, of each scale."""
    dims = (1,) if w_scale.dim() == 2 else (0, 1)
    return w_scale.double() / t.double().abs().mean(dims, keepdim=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_undeploy_gives_back_parameters(bias, dtype):
    layer = BitLinear(70, 33, bias=bias, dtype=dtype)
    names = dict(layer.named_parameters()).keys()
    layer.deploy()
    t, w_scale = packing.unpack_ternary(layer.w_packed, 70), layer.w_scale
    assert layer.undeploy() is layer
    assert layer.undeploy() is layer  # Idempotent.
    assert not layer.is_deployed
    assert not list(layer.buffers())
    assert dict(layer.named_parameters()).keys() == names
    assert all(p.requires_grad and p.dtype == dtype for p in layer.parameters())
    wanted = t * magnitudes(t, w_scale)
    # One unit in the last place, where the mean would not round to the scale otherwise.
    torch.testing.assert_close(
        layer.weight.double(), wanted, rtol=torch.finfo(dtype).eps, atol=0, check_dtype=False
    )
    layer(torch.randn(2, 70)).sum().backward()
    assert layer.weight.grad is not None
    layer.deploy()
    assert torch.equal(packing.unpack_ternary(layer.w_packed, 70), t)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("seed", range(20))
def test_undeploy_keeps_the_function(seed, zeros):
    generator = torch.Generator().manual_seed(seed)
    layer = BitLinear(64, 33)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.weight[torch.rand(33, 64, generator=generator) < zeros] = 0
    layer.deploy()
    x, packed, scale = torch.randn(5, 64), layer.w_packed, layer.w_scale
    y = layer(x)
    oracle.assert_same_bits(layer.undeploy()(x), y)
    layer.deploy()
    assert torch.equal(layer.w_packed, packed)
    assert torch.equal(layer.w_scale, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_undeploy_keeps_the_function_in_16_bits_where_the_weight_is_large(dtype):
    layer = BitLinear(512, 256, dtype=dtype).deploy()
    x = torch.randn(5, 512, dtype=dtype)
    y = layer(x)
    oracle.assert_same_bits(layer.undeploy()(x), y)


def test_undeploy_of_a_layer_of_zeros():
    layer = BitLinear(20, 6)
    nn.init.zeros_(layer.weight)
    x = torch.randn(3, 20)
    y = layer.deploy()(x)
    assert not layer.undeploy().weight.any()
    oracle.assert_same_bits(layer(x), y)


def test_undeploy_with_a_scale_per_output_feature():
    layer = deployed()
    state = layer.state_dict()
    state["w_scale"] = torch.rand(6, 1) + 0.1
    layer.load_state_dict(state)
    t = packing.unpack_ternary(layer.w_packed, 20)
    wanted = (t * magnitudes(t, state["w_scale"])).float()
    torch.testing.assert_close(layer.undeploy().weight.detach(), wanted, rtol=2**-23, atol=0)


def test_undeploy_refuses_a_scale_below_eps():
    """Training would raise it to eps, and the function would be another one."""
    layer, x = deployed(), torch.randn(3, 20)
    layer.w_scale.fill_(5e-7)
    with unchanged(layer), pytest.raises(ValueError, match=r"w_scale is 5e-07, .* eps = 1e-06"):
        layer.undeploy()
    layer.eps = 1e-7
    y = layer(x)
    oracle.assert_same_bits(layer.undeploy()(x), y)


def test_deploy_refuses_a_weight_of_another_shape():
    layer, x = BitLinear(20, 6), torch.randn(3, 12)
    layer.weight = nn.Parameter(torch.randn(6, 12))  # as after pruning by hand
    y = layer(x)
    with pytest.raises(ValueError, match=r"shape \[6, 12\], but .* are \[6, 20\]: set these"):
        layer.deploy()
    layer.in_features = 12
    oracle.assert_same_bits(layer.deploy()(x), y)


def test_undeploy_refuses_what_would_overflow():
    layer = BitLinear(1000, 1000, bias=False, dtype=torch.float16)
    nn.init.zeros_(layer.weight)
    layer.deploy()
    layer.w_packed[0, 0] |= 0b10_00_00_00  # one weight of 1: it alone would have to be 10^6
    layer.w_packed[0, 0] &= 0b10_11_11_11
    layer.w_scale.fill_(1.0)
    with pytest.raises(ValueError, match=r"overflow float16.*call float\(\)"):
        layer.undeploy()
    assert layer.is_deployed
    assert layer.float().undeploy().weight.max() == 1e6


@pytest.mark.parametrize("make", [BitLinear, deployed])
@pytest.mark.parametrize("scale", [(1,), (6, 1)])
def test_dequantize(make, scale):
    layer = make(20, 6)
    if layer.is_deployed:
        layer.load_state_dict({**layer.state_dict(), "w_scale": torch.rand(scale) + 0.1})
    weight = layer.dequantize()
    assert (weight.dtype, weight.requires_grad) == (torch.float32, False)
    layer.deploy()
    t = packing.unpack_ternary(layer.w_packed, 20)
    assert torch.equal(weight, t * layer.w_scale)


# --- from_linear ---


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_parameters_and_keeps_everything(bias):
    linear = nn.Linear(20, 6, bias=bias, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    layer = BitLinear.from_linear(linear, eps=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.training, layer.eps, layer.weight.requires_grad) == (False, 0.5, False)
    assert dict(layer.named_parameters()).keys() == dict(linear.named_parameters()).keys()
    assert layer.deploy().undeploy().weight.dtype == torch.bfloat16


def test_from_linear_on_another_device():
    assert BitLinear.from_linear(nn.Linear(20, 6, device="meta")).weight.is_meta


def test_from_linear_refuses_what_has_no_plain_weight():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Linear, but got Conv1d"):
        BitLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="LazyLinear: it is lazy"):
        BitLinear.from_linear(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="parametrized"):
        BitLinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    pruned = nn.Linear(4, 3)
    prune.l1_unstructured(pruned, "weight", 2)
    with pytest.raises(TypeError, match="pruning"):
        BitLinear.from_linear(pruned)
    with pytest.raises(TypeError, match="deployed BitLinear"):
        BitLinear.from_linear(deployed())
    with pytest.raises(ValueError, match="quant_type"):
        BitLinear.from_linear(nn.Linear(4, 3), quant_type="int4")


# --- Training ---


def test_it_trains_with_an_optimizer():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 3)).argmax(1)
    model = nn.Sequential(BitLinear(16, 64), nn.ReLU(), BitLinear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.9


# --- Moving and converting ---


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.half().float(),
    ],
)
def test_conversions_leave_packed_weights_and_scale(change):
    layer = deployed()
    before = {name: t.clone() for name, t in layer.named_buffers()}
    model = nn.Sequential(layer)
    assert change(model) is model
    for name in ("w_packed", "w_scale"):
        after = getattr(layer, name)
        assert after.dtype == before[name].dtype
        assert torch.equal(after, before[name])
    x = torch.randn(3, 20)
    t = packing.unpack_ternary(layer.w_packed, 20)
    oracle.assert_same_bits(layer(x), oracle.expected(x, t, before["w_scale"], layer.bias))


def test_conversions_of_an_undeployed_layer_are_those_of_nn_linear():
    layer = BitLinear(20, 6).half()
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert layer(torch.randn(2, 20)).dtype == torch.float32


def test_moving_between_devices():
    layer = deployed().half().to("meta")
    assert {t.device.type for t in layer.buffers()} == {"meta"}
    assert {n: t.dtype for n, t in layer.named_buffers()} == {
        "w_packed": torch.uint8,
        "w_scale": torch.float32,
        "bias": torch.float16,
    }
    layer.to_empty(device="cpu")
    assert {t.device.type for t in layer.buffers()} == {"cpu"}
    assert layer.w_scale.dtype == torch.float32


def test_share_memory():
    layer = deployed().share_memory()
    assert all(t.is_shared() for t in layer.buffers())


@pytest.mark.parametrize("make", [BitLinear, deployed])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make, clone):
    layer, x = make(20, 6, eps=1e-3), torch.randn(3, 20)
    copied = clone(layer)
    assert torch.equal(copied(x), layer(x))
    assert repr(copied) == repr(layer)
    for name, tensor in layer.state_dict().items():
        assert copied.state_dict()[name].data_ptr() != tensor.data_ptr()
    copied.undeploy()
    assert layer.is_deployed == (make is deployed)


def test_a_whole_model_through_torch_save():
    model, x = nn.Sequential(deployed(), BitLinear(6, 3)), torch.randn(3, 20)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


# --- state_dict ---


def through_torch(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def through_mmap(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)


def through_safetensors(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    return safetensors.torch.load_file(tmp_path / "state.safetensors")


@pytest.mark.parametrize("carry", [through_torch, through_mmap, through_safetensors])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("from_deployed", [True, False])
@pytest.mark.parametrize("into_deployed", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_either_state_loads_into_either_layer(
    carry, bias, from_deployed, into_deployed, assign, tmp_path
):
    def model(is_deployed):
        layer = BitLinear(20, 6, bias=bias)
        return nn.Sequential(nn.Identity(), layer.deploy() if is_deployed else layer)

    source, target, x = model(from_deployed), model(into_deployed), torch.randn(3, 20)
    state = carry(source.state_dict(), tmp_path)
    assert str(target.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert target[1].is_deployed == from_deployed
    assert target.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(target(x), source(x))
    assert {p.requires_grad for p in target.parameters()} <= {True}
    if assign:  # Without a copy, as for any other module.
        for name, tensor in target.state_dict().items():
            assert tensor.data_ptr() == state[name].data_ptr()


def test_a_state_from_nn_linear_and_back():
    linear, layer = nn.Linear(20, 6), BitLinear(20, 6)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)
    nn.Linear(20, 6).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("into_deployed", [True, False])
def test_a_meta_layer_takes_a_deployed_state_without_a_copy(into_deployed):
    source, x = deployed(), torch.randn(3, 20)
    target = BitLinear(20, 6, device="meta")
    if into_deployed:
        target.deploy()
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.w_packed.data_ptr() == source.w_packed.data_ptr()
    assert torch.equal(target(x), source(x))


def test_a_meta_layer_takes_a_float_state_in_place_of_packed_weights():
    source, x = BitLinear(20, 6), torch.randn(3, 20)
    target = BitLinear(20, 6, device="meta").deploy()
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(x), source(x))


def original_project_state():
    """As its deployed layers write it: a scalar scale, no metadata, K a multiple of four."""
    t = oracle.ternary(6, 20, seed=3)
    state = {
        "w_packed": torch.from_numpy(oracle.pack(t)),
        "w_scale": torch.tensor(0.037),
        "bias": torch.randn(6),
    }
    return t, state


@pytest.mark.parametrize("assign", [True, False])
def test_a_checkpoint_of_the_original_project_loads_and_gives_its_results(assign):
    t, state = original_project_state()
    layer = BitLinear(20, 6)
    layer.load_state_dict(state, assign=assign)
    assert layer.w_scale.shape == (1,)
    assert state["w_scale"].shape == ()  # The caller's dictionary is untouched.
    x = torch.randn(3, 20)
    oracle.assert_same_bits(layer(x), oracle.expected(x, t, 0.037, state["bias"]))


def test_a_scale_per_output_feature_loads_and_gives_its_results():
    t, state = original_project_state()
    state["w_scale"] = torch.rand(6, 1) + 0.1
    for layer in (BitLinear(20, 6), deployed()):
        layer.load_state_dict(state)
        x = torch.randn(3, 20)
        wanted = oracle.expected(x, t, state["w_scale"], state["bias"])
        oracle.assert_same_bits(layer(x), wanted)


def test_the_format_version_is_in_the_metadata():
    state = nn.Sequential(deployed()).state_dict()
    assert state._metadata["0"]["version"] == packing.FORMAT_VERSION == 1


def with_version(state, version):
    state._metadata[""]["version"] = version
    return state


def corrupt(name, change):
    def apply(state):
        state[name] = change(state[name])
        return state

    return apply


@contextlib.contextmanager
def unchanged(layer):
    """Checks that what happens leaves the layer as it was."""
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(3, layer.in_features)
    y, kinds = layer(x), [type(layer._parameters.get(name)) for name in ("weight", "bias")]
    yield
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert [type(layer._parameters.get(name)) for name in ("weight", "bias")] == kinds
    assert torch.equal(layer(x), y)


def set_byte(packed):
    packed = packed.clone()
    packed[2, 1] = 0b01_11_00_01
    return packed


def drop(name):
    def apply(state):
        del state[name]
        return state

    return apply


SHAPE = "size mismatch for {}: .* shape {}, but this layer needs {}"
CORRUPT = [
    ("code 3, first in byte 1 of row 2", corrupt("w_packed", set_byte)),
    (
        r"size mismatch for w_packed: .*\[6, 4\], .* needs \[6, 5\]",
        corrupt("w_packed", lambda w: w[:, :4]),
    ),
    (
        r"size mismatch for w_packed: .*\[5, 5\], .* needs \[6, 5\]",
        corrupt("w_packed", lambda w: w[:5]),
    ),
    (
        "w_packed must be uint8, but it is int8",
        corrupt("w_packed", lambda w: w.to(torch.int8)),
    ),
    ("w_packed must be a tensor, but it is a list", corrupt("w_packed", lambda w: w.tolist())),
    (r"w_scale must be float32, but it is torch\.float16", corrupt("w_scale", lambda s: s.half())),
    (
        r"w_scale must have shape \[1\] or \[6, 1\].*\[6, 5\].*per group",
        corrupt("w_scale", lambda s: s.expand(6, 5)),
    ),
    (r"w_scale must have shape .* it has \[2\]", corrupt("w_scale", lambda s: s.expand(2))),
    ("w_scale must be finite and positive", corrupt("w_scale", lambda s: -s)),
    ("w_scale must be finite and positive", corrupt("w_scale", lambda s: s * 0)),
    ("w_scale must be finite and positive", corrupt("w_scale", lambda s: s * float("nan"))),
    (r"size mismatch for bias: .*\[7\], .* needs \[6\]", corrupt("bias", lambda b: torch.ones(7))),
    ("bias must be floating point", corrupt("bias", lambda b: b.long())),
    ("w_scale is missing", drop("w_scale")),
    ("w_packed is missing", drop("w_packed")),
    ("both 'weight' and packed weights", lambda s: {**s, "weight": torch.ones(6, 20)}),
    (
        "format version 2, but this bitlinear reads up to version 1: upgrade",
        lambda s: with_version(s, 2),
    ),
]


@pytest.mark.parametrize(("message", "change"), CORRUPT)
@pytest.mark.parametrize("into_deployed", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_corrupt_state_is_refused_and_changes_nothing(message, change, into_deployed, assign):
    state = change(deployed().state_dict())
    layer = BitLinear(20, 6)
    if into_deployed:
        layer.deploy()
    with unchanged(layer), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    assert layer.is_deployed == into_deployed


def test_the_message_names_the_layer():
    model = nn.ModuleDict({"head": deployed()})
    state = model.state_dict()
    state["head.w_scale"] = state["head.w_scale"] * 0
    with pytest.raises(RuntimeError, match="While loading head: w_scale must be finite"):
        nn.ModuleDict({"head": BitLinear(20, 6)}).load_state_dict(state)


def test_a_bias_too_many_or_too_few():
    state = deployed().state_dict()
    for layer in (BitLinear(20, 6, bias=False), deployed(bias=False)):
        with unchanged(layer), pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
            layer.load_state_dict(state)
    del state["bias"]
    for layer in (BitLinear(20, 6), deployed()):
        with unchanged(layer), pytest.raises(RuntimeError, match=r"Missing key.*bias"):
            layer.load_state_dict(state)


BAD_FLOATS = [
    (r"size mismatch for weight: .*\[6, 21\]", lambda s: {**s, "weight": torch.ones(6, 21)}),
    (r"size mismatch for bias: .*\[7\]", lambda s: {**s, "bias": torch.ones(7)}),
    (r"weight must be floating point", lambda s: {**s, "weight": torch.ones(6, 20).to(torch.int8)}),
    (r"Missing key.*bias", drop("bias")),
    (r"Missing key.*w", drop("weight")),
    (r"Unexpected key.*other", lambda s: {**s, "other": torch.ones(1)}),
    (r"weight is on the meta device", lambda s: {**s, "weight": torch.ones(6, 20, device="meta")}),
    (r"reads up to version 1: upgrade", lambda s: with_version(s, 2)),
]


@pytest.mark.parametrize(("message", "change"), BAD_FLOATS)
@pytest.mark.parametrize("into_deployed", [True, False])
def test_a_bad_float_state_is_refused_and_changes_nothing(message, change, into_deployed):
    state = change(BitLinear(20, 6).state_dict())
    layer = BitLinear(20, 6)
    if into_deployed:
        layer.deploy()
    with unchanged(layer), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


# --- The metadata of a state ---


@pytest.mark.parametrize("from_deployed", [True, False])
@pytest.mark.parametrize("carry", [through_torch, lambda state, _: copy.deepcopy(state)])
def test_the_metadata_names_the_layer(carry, from_deployed, tmp_path):
    source = BitLinear(20, 6, eps=0.5)
    state = carry(
        nn.Sequential(source.deploy() if from_deployed else source).state_dict(), tmp_path
    )
    wanted = {"version": 1, "in_features": 20, "eps": 0.5, "quant_type": "ai8pc_wpt"}
    assert state._metadata["0"] == wanted
    target = nn.Sequential(BitLinear(20, 6))
    message = r"While loading 0: .* eps=0\.5, but this one has eps=1e-06"
    with unchanged(target[0]), pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    target[0].eps = 0.5
    target.load_state_dict(state)
    x = torch.randn(3, 20)
    assert torch.equal(target(x), source(x))


def test_a_row_of_six_weights_is_not_one_of_seven():
    """Both have two bytes, and the slot between them is a weight of 0 of the longer one."""
    layer = BitLinear(7, 3)
    message = "in_features=6, but this one has in_features=7"
    with unchanged(layer), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(BitLinear(6, 3).deploy().state_dict())


def test_a_state_of_another_quantisation_is_refused():
    state = deployed().state_dict()
    state._metadata[""]["quant_type"] = "ai16pc_wpt"
    with pytest.raises(RuntimeError, match="quant_type='ai16pc_wpt', but this one has"):
        deployed().load_state_dict(state)


def test_a_deployed_state_ends_a_blend():
    layer = BitLinear(20, 6)
    layer.quantization_strength = 0.5
    source = deployed()
    layer.load_state_dict(source.state_dict())
    assert layer.quantization_strength == 1
    x = torch.randn(3, 20)
    assert torch.equal(layer.undeploy()(x), source(x))


def test_not_strict():
    source = deployed()
    state = source.state_dict()
    del state["bias"]
    state["other"] = torch.ones(1)
    layer = BitLinear(20, 6)
    bias = layer.bias.detach().clone()
    result = layer.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["bias"], ["other"])
    assert torch.equal(layer.w_packed, source.w_packed)
    assert torch.equal(layer.bias, bias)

    unbiased = BitLinear(20, 6, bias=False)
    assert unbiased.load_state_dict(source.state_dict(), strict=False).unexpected_keys == ["bias"]
    assert unbiased.is_deployed
    assert unbiased.bias is None

    before = layer.w_packed
    assert layer.load_state_dict({}, strict=False).missing_keys == ["w_packed", "w_scale", "bias"]
    assert layer.w_packed is before
    layer.load_state_dict({"bias": torch.ones(6)}, strict=False)
    assert torch.equal(layer.bias, torch.ones(6))


def test_a_state_with_parameters_in_it():
    state = deployed().state_dict()
    state["bias"] = nn.Parameter(state["bias"])
    layer = BitLinear(20, 6)
    layer.load_state_dict(state, assign=True)
    assert not list(layer.parameters())


def test_a_parametrised_layer_cannot_become_deployed():
    layer = nn.utils.parametrizations.weight_norm(BitLinear(20, 6))
    with pytest.raises(RuntimeError, match="cannot become a deployed one: it is parametrized"):
        layer.load_state_dict(deployed().state_dict(), strict=False)


# --- Inference mode ---


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_deployed_in_inference_mode_is_a_layer_like_any_other(bias):
    layer = BitLinear(20, 6, bias=bias)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        layer.deploy()
    layer.load_state_dict(layer.state_dict())
    layer.undeploy()
    layer(torch.randn(2, 20)).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        layer.deploy()
        layer.undeploy()
        layer.deploy()
    layer.load_state_dict(state)
    layer(torch.randn(2, 20)).sum().backward()
    assert layer.weight.grad is not None
