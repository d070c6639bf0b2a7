"""Captured steps on an NVIDIA GPU: the tokens of transformers, and no stale graph."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import bitlinear
from tests.calls import Calls
from tests.integrations.transformers.checkpoints import transformers
from tests.integrations.transformers.models import make_llama
from tests.integrations.transformers.test_captured import (
    CALLS,
    SETTINGS,
    Recorder,
    ours,
    theirs,
)
from tests.integrations.transformers.test_captured import IDS as CPU_IDS

from bitlinear.integrations.transformers import decode_step, fuse, generate  # isort: skip
from bitlinear.integrations.transformers import quantize_head, small_kernels  # isort: skip
from bitlinear.integrations.transformers.attention import (  # isort: skip
    attention,
    rotate_and_attend,
)
from bitlinear.integrations.transformers.decoding import speed_up_decoding  # isort: skip
from bitlinear.integrations.transformers.rotation import NewToken  # isort: skip

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def _compile():
    with torch.compiler.set_stance("default"):
        yield


@pytest.fixture(scope="module", params=["float32", "bfloat16", "bfloat16-kernel"])
def model(request):
    """In bfloat16 with heads of 8, which our kernel of attention does not take, and of 64."""
    dtype, _, kernel = request.param.partition("-")
    torch.manual_seed(0)
    made = make_llama(head_dim=64 if kernel else 8).to("cuda", getattr(torch, dtype)).eval()
    made = fuse(bitlinear.deploy(bitlinear.convert(made)))
    speed_up_decoding(made)
    return made


@pytest.fixture
def replays(monkeypatch):
    """The number of replays of each graph."""
    counts = []
    capture, replay = decode_step.DecodeStep._capture, torch.cuda.CUDAGraph.replay

    def count_capture(step):
        counts.append(0)
        return capture(step)

    def count_replay(graph):
        counts[-1] += 1
        replay(graph)

    monkeypatch.setattr(decode_step.DecodeStep, "_capture", count_capture)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count_replay)
    return counts


def on_gpu(settings):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


IDS = CPU_IDS.cuda() if torch.cuda.is_available() else CPU_IDS


@pytest.mark.parametrize(
    ("call", "compiles"), [*((call, False) for call in CALLS), ("padded", True), ("sample", True)]
)
def test_the_tokens_are_those_of_transformers(model, call, compiles):
    settings = {**SETTINGS, **on_gpu(CALLS[call])}
    wanted = theirs(model, IDS, **settings, disable_compile=True)
    after = torch.rand(3, device="cuda")
    assert torch.equal(ours(model, IDS, **settings, disable_compile=not compiles), wanted)
    assert torch.equal(torch.rand(3, device="cuda"), after)


def test_all_steps_but_the_first_are_replays(model, replays):
    generate(model, IDS, max_new_tokens=12, pad_token_id=0)
    generate(model, IDS[:1], max_new_tokens=3, streamer=(streamer := Recorder()))
    assert replays == [10, 1]
    assert len(streamer.values) == 1 + 3


@pytest.mark.parametrize("head", [None, "int8"])
def test_each_call_takes_the_model_as_it_is(head):
    torch.manual_seed(1)
    made = make_llama(hidden_size=64).to("cuda", torch.bfloat16).eval()
    made = fuse(bitlinear.deploy(bitlinear.convert(made)))
    if head:
        quantize_head(made)
    first = ours(made, IDS, **SETTINGS)
    for change in (negate_norm, add_hook, use_eager):
        change(made)
        second = ours(made, IDS, **SETTINGS)
        assert not torch.equal(first, second) or change is use_eager
        assert torch.equal(second, theirs(made, IDS, **SETTINGS, disable_compile=True))
        first = second


@torch.no_grad()
def negate_norm(model):
    model.model.norm.weight = torch.nn.Parameter(-model.model.norm.weight)


def add_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -2 * output)


def use_eager(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("model", ["float32"], indirect=True)
def test_a_compiled_model(model):
    config = transformers.CompileConfig(fullgraph=True, dynamic=False)
    tokens = ours(model, IDS, compile_config=config, **SETTINGS)
    assert torch.equal(tokens, theirs(model, IDS, disable_compile=True, **SETTINGS))


@pytest.mark.parametrize("model", ["bfloat16", "bfloat16-kernel"], indirect=True)
def test_a_compiled_model_in_bf16(model):
    """It rounds in other places, so its tokens can be others; its logits are near.

    In compiled code, torch computes the attention.
    """
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    settings["attention_mask"] = mask
    config = transformers.CompileConfig(fullgraph=True, dynamic=False)
    compiled = ours(model, IDS, compile_config=config, pad_token_id=0, **settings)
    wanted = ours(model, IDS, disable_compile=True, pad_token_id=0, **settings)
    assert compiled.sequences.shape == wanted.sequences.shape
    # The second token reads the first, which comes from the prompt in both.
    got, expected = compiled.logits[1].float(), wanted.logits[1].float()
    assert (got - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("model", ["bfloat16", "bfloat16-kernel"], indirect=True)
@torch.no_grad()
def test_new_tokens_in_a_growing_cache(model, request):
    """Padded, because without a mask torch computes the attention."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:  # Random models attend to all tokens almost equally.
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).w_scale *= 20
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0

    def decode(model, shown=mask, steps=4):
        cache = transformers.DynamicCache(config=model.config)
        logits = [model(IDS, attention_mask=shown, cache=cache).logits[:, -1:]]
        for step in range(steps):
            shown = torch.cat([shown, torch.ones_like(shown[:, :1])], dim=1)
            ids = IDS[:, step : step + 1]
            logits.append(model(ids, attention_mask=shown, cache=cache).logits)
        return torch.cat(logits, dim=1).float()

    with_sdpa = copy.deepcopy(model)
    with_sdpa.set_attn_implementation("sdpa")
    exact = decode(copy.deepcopy(with_sdpa).float())
    with Calls(torch.ops.bitlinear.attend.default) as calls:
        ours = decode(model)
    has_kernel = request.node.callspec.params["model"] == "bfloat16-kernel"
    assert calls.count == (4 * len(model.model.layers) if has_kernel else 0)
    # Both round to bf16 elsewhere; which of the two is nearer to fp32 is chance.
    assert (ours - exact).norm() <= 1.4 * (decode(with_sdpa) - exact).norm()


def test_a_step_that_waits_for_the_gpu_cannot_be_captured(model):
    def wait(module, args, output):
        output.sum().item()

    raises = pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph")
    with model.model.layers[1].register_forward_hook(wait), raises:
        generate(model, IDS, max_new_tokens=5)
    torch.cuda.synchronize()
    wanted = theirs(model, IDS, **SETTINGS, disable_compile=True)
    assert torch.equal(ours(model, IDS, **SETTINGS), wanted)


@pytest.mark.parametrize(
    ("dtype", "kind", "batch", "heads", "key_heads", "length", "head_dim"),
    [  # cuDNN takes half a second for each
        (torch.bfloat16, "bool", 1, 20, 5, 192, 128),
        (torch.bfloat16, "numbers", 16, 20, 5, 2112, 128),
        (torch.float16, "numbers", 3, 4, 4, 701, 64),
        (torch.bfloat16, "bool", 2, 16, 2, 257, 64),
        (torch.float16, "bool", 1, 24, 8, 2049, 128),
        (torch.float16, "numbers", 2, 18, 2, 300, 64),  # nine heads share a key head
        (torch.bfloat16, "bool", 16, 6, 1, 9, 24),
        (torch.bfloat16, "numbers", 2, 4, 2, 64, 256),
        (torch.float32, "bool", 3, 8, 2, 64, 32),
    ],
)
@torch.no_grad()
def test_attention_of_one_token(dtype, kind, batch, heads, key_heads, length, head_dim):
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, batch, key_heads, length, head_dim, device="cuda", dtype=dtype)
    mask = torch.rand(batch, 1, 1, length, device="cuda") < 0.7
    mask[..., 0] = True
    groups = heads // key_heads
    scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * 0.2
    scores = scores.masked_fill(~mask, -torch.inf)
    wanted = scores.softmax(-1) @ value.double().repeat_interleave(groups, 1)
    if kind == "numbers":
        mask = torch.zeros(mask.shape, device="cuda", dtype=dtype).masked_fill_(~mask, -torch.inf)
    layer = torch.nn.Module()
    layer.num_key_value_groups = groups
    got, _ = attention(layer, query, key, value, mask, scaling=0.2)
    assert got.shape == (batch, 1, heads, head_dim)
    tolerance = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.transpose(1, 2).double(), wanted, atol=tolerance, rtol=0)


ROTATE = transformers.models.llama.modeling_llama.apply_rotary_pos_emb


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "length", "head_dim"),
    [(1, 20, 5, 192, 128), (3, 8, 1, 2112, 64), (2, 4, 4, 21, 128), (16, 20, 5, 1100, 128)],
)
@torch.no_grad()
def test_one_kernel_has_the_bits_of_its_parts(dtype, batch, heads, key_heads, length, head_dim):
    """Of the rotation, the copy to the cache and the attention, with any length of the cache."""
    rows = torch.randn(batch, 1, heads + 2 * key_heads, head_dim, device="cuda", dtype=dtype)
    q, k, v = rows.transpose(1, 2).split([heads, key_heads, key_heads], dim=1)
    cos, sin = torch.randn(2, batch, 1, head_dim, device="cuda", dtype=dtype)
    shape = (batch, key_heads, length, head_dim)
    keys, values = torch.randn(2, *shape, device="cuda", dtype=dtype)
    layer = torch.nn.Module()
    layer.num_key_value_groups = heads // key_heads
    for position in {0, 15, 16, length // 2, length - 1}:
        index = torch.tensor([position], device="cuda")
        visible = torch.arange(length, device="cuda") <= position
        visible = visible.repeat(batch, 1)[:, None, None]
        visible[0, ..., :position] &= torch.rand(position, device="cuda") < 0.8
        additive = torch.zeros(visible.shape, device="cuda", dtype=dtype)
        additive.masked_fill_(~visible, -torch.inf)
        cache = (keys.clone(), values.clone(), index)
        token = NewToken(ROTATE, q, k, v, cos, sin)
        got = rotate_and_attend(attention, token, cache, additive, scaling=0.1)
        rotated, new_key = ROTATE(q, k, cos, sin)
        keys.index_copy_(2, index, new_key)
        values.index_copy_(2, index, v)
        assert torch.equal(cache[0], keys)
        assert torch.equal(cache[1], values)
        wanted, _ = attention(layer, rotated, keys, values, visible, scaling=0.1)
        assert torch.equal(got, wanted)
        longer = [torch.nn.functional.pad(t, (0, 0, 0, 300)) for t in (keys, values)]
        mask = torch.nn.functional.pad(visible, (0, 300))
        assert torch.equal(attention(layer, rotated, *longer, mask, scaling=0.1)[0], wanted)


@torch.no_grad()
def test_what_the_kernel_cannot_compute_writes_nothing():
    keys, values = torch.zeros(2, 1, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = torch.ones(3, 1, 2, 1, 64, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.ones(2, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    token = NewToken(ROTATE, q, k, v, cos, sin)
    mask = torch.ones(1, 1, 1, 8, device="cuda", dtype=torch.bool)
    cache = (keys, values, torch.tensor([3], device="cuda"))
    cannot = [
        (functools.partial(attention), token, mask),
        (attention, token._replace(rotate=functools.partial(ROTATE)), mask),
        (attention, token, None),
        (attention, token._replace(cos=cos.float(), sin=sin.float()), mask),
        (attention, token, mask.float()),
        (attention, NewToken(ROTATE, *(x[..., :32] for x in token[1:])), mask),
    ]
    got = [rotate_and_attend(attend, new, cache, shown) for attend, new, shown in cannot]
    assert got == [None] * len(cannot)
    assert not keys.any()
    assert rotate_and_attend(attention, token, cache, mask) is not None
    assert keys.any()
    with pytest.raises(ValueError, match="mask must be"):
        torch.ops.bitlinear.attend(q, keys, values, mask[..., :7], 1.0)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        torch.ops.bitlinear.attend(q.repeat(1, 1, 1, 2)[..., ::2], keys, values, mask, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_round_as_eager_ones(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 1, 32, device="cuda", dtype=dtype) for n in (4, 2, 2))
    cos, sin = torch.randn(2, 2, 1, 32, device="cuda", dtype=dtype)
    position = torch.tensor([3], device="cuda")
    rotate = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    scores = torch.randn(3, 32000, device="cuda", dtype=dtype)
    results = []
    for enabled in (False, True):
        keys, values = torch.zeros(2, 2, 2, 5, 32, device="cuda", dtype=dtype)
        with small_kernels.compiling(enabled):
            arguments = (rotate, q, k, v, cos, sin, keys, values, position)
            rotated = small_kernels.call(small_kernels.rotate_and_store, *arguments)
            results.append(
                (rotated, keys, values, small_kernels.call(small_kernels.largest, scores))
            )
    tolerance = {"atol": 0, "rtol": 0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **tolerance)
