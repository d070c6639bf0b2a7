"""``tensors``: from known ternary weights and scales through files to the same bytes and scales."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from bitlinear.groups import round_scales
from tests import oracle
from tests.integrations.gguf.files import (
    GROUPS,
    I2_S,
    LAYOUTS,
    Writer,
    gguf,
    i2_s_bytes,
    integration,
    layout_of,
    quantize,
    read_one,
)

BLOCKS = {"TQ1_0": 256, "TQ2_0": 256, **{kind: block for kind, (_, block) in GROUPS.items()}}
KINDS = [*BLOCKS, *LAYOUTS]
SCALES = [37.0, 2.0**-9, 0.1]


def read_scale(scale, kind):
    """The scale that a file of this kind holds."""
    return np.float32(scale) if kind in LAYOUTS else np.float32(np.float16(scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "k"), [(1, 256), (5, 512), (12, 768)])
def test_bytes_and_scale_are_those_of_the_weights(kind, scale, n, k, tmp_path):
    t = oracle.ternary(n, k, seed=n)
    path = Writer(tmp_path / "x.gguf").add_ternary("blk.0.ffn_up.weight", t, scale, kind).write()
    tensor = read_one(path, i2_s_layout=layout_of(kind))
    assert tensor.name == "blk.0.ffn_up.weight"
    assert tensor.in_features == k
    assert tensor.w_packed.dtype == torch.uint8
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()
    oracle.assert_same_bits(tensor.w_scale, torch.tensor([read_scale(scale, kind)]))


@pytest.mark.parametrize(("layout", "n", "k"), [("x86", 3, 128), ("arm", 3, 64), ("arm", 5, 192)])
def test_i2_s_with_rows_of_one_or_three_blocks(layout, n, k, tmp_path):
    t = oracle.ternary(n, k)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, layout).write()
    assert read_one(path, i2_s_layout=layout).w_packed.tolist() == oracle.pack(t).tolist()


@pytest.mark.parametrize(("n", "k"), [(4, 192), (32, 4), (32, 20)])
def test_i2_s_with_blocks_across_rows(n, k, tmp_path):
    t = oracle.ternary(n, k)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, "x86").write()
    tensor = read_one(path, i2_s_layout="x86")
    assert tensor.in_features == k
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()


def test_i2_s_with_blocks_across_rows_in_several_chunks(tmp_path):
    t = np.tile(oracle.ternary(8, 192), (1000, 1))  # 1.5 million weights
    block = i2_s_bytes(t[:8], 37.0, 128)
    data = np.concatenate([np.tile(block[:-32], 1000), block[-32:]])
    path = Writer(tmp_path / "x.gguf").add("a.weight", data, I2_S, t.shape).write()
    np.testing.assert_array_equal(read_one(path, i2_s_layout="x86").w_packed, oracle.pack(t))


def test_the_other_layout_gives_other_weights(tmp_path):
    t = oracle.ternary(4, 256)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, "x86").write()
    assert read_one(path, i2_s_layout="arm").w_packed.tolist() != oracle.pack(t).tolist()


def test_i2_s_needs_its_layout(tmp_path):
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", oracle.ternary(4, 256), 1, "x86")
    path.write()
    with pytest.raises(ValueError, match=r"a\.weight has type I2_S.*='x86' .*or 'arm'"):
        integration.tensors(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"one of \['x86', 'arm'\], but it is 'x64'"):
        integration.tensors(tmp_path / "x.gguf", i2_s_layout="x64")


def test_i2_s_of_no_whole_blocks_is_of_the_other_layout(tmp_path):
    t = oracle.ternary(3, 64)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, "arm").write()
    with pytest.raises(ValueError, match=r"no whole number of blocks of 128"):
        integration.tensors(path, i2_s_layout="x86")


@pytest.mark.parametrize("kind", BLOCKS)
def test_equal_scales_of_each_row_become_scales_per_row(kind, tmp_path):
    t = oracle.ternary(6, 512)
    t[3, 256:] = 0  # The quantiser writes the scale 0 for this block.
    t[4] = 0
    scales = np.array([[0.25], [8], [0.5], [37], [3], [2]], np.float32)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, scales, kind).write()
    tensor = read_one(path)
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()
    assert tensor.w_scale.tolist() == [[0.25], [8], [0.5], [37], [37], [2]]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("spread", [1, 4, 12])
def test_different_scales_within_a_row_become_scales_of_groups(spread, kind, tmp_path, caplog):
    block = BLOCKS[kind]
    t = oracle.ternary(4, 768)
    t[1, 256:512] = 0  # The scale of these blocks means nothing.
    exponents = np.random.default_rng(0).uniform(-spread, 0, (4, 768 // block))
    scales = np.float32(np.float16(2.0**exponents))
    path = Writer(tmp_path / "x.gguf")
    path = path.add_ternary("a.weight", t, oracle.spread(scales, block, 768), kind).write()
    caplog.set_level("INFO", "bitlinear")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensor = read_one(path)
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()
    assert tensor.group_size == block
    used = (t.reshape(4, -1, block) != 0).any(axis=2)
    largest = np.where(used, scales, 0).max(axis=1, keepdims=True)
    wanted = torch.from_numpy(np.where(used, scales, largest))
    rounded = round_scales(wanted)
    oracle.assert_same_bits(tensor.w_scale, rounded)
    assert ("scales are rounded" in caplog.text) == (not torch.equal(rounded, wanted))
    if spread < 4:
        assert torch.equal(rounded, wanted)
    change = ((rounded - wanted).abs() / wanted).max()
    assert [str(w.message).startswith("a.weight: ") for w in caught] == [True] * (change > 2**-7)


def test_q2_0_of_llama_cpp(tmp_path):
    """Its own encoder writes the largest magnitude of a block as its scale."""
    import ctypes

    pytest.importorskip("llama_cpp")
    from llama_cpp import _ggml

    t = oracle.ternary(5, 320)
    scales = np.float16(np.random.default_rng(0).uniform(0.5, 2, (5, 5))).astype(np.float32)
    values = np.ascontiguousarray((t * oracle.spread(scales, 64, 320)).astype(np.float32))
    data = np.zeros((5, 18 * 5), np.uint8)
    encode = _ggml.libggml.quantize_q2_0
    encode.restype, encode.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_void_p] * 2
        + [
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ],
    )
    assert encode(values.ctypes.data, data.ctypes.data, 5, 320, None) == data.size
    path = Writer(tmp_path / "x.gguf").add("a.weight", data, 42, t.shape).write()
    tensor = read_one(path)
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()
    assert tensor.w_scale.tolist() == scales.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_have_the_scale_one(kind, tmp_path):
    t = np.zeros((2, 256), np.int64)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 0.0, kind).write()
    tensor = read_one(path, i2_s_layout=layout_of(kind))
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()
    assert tensor.w_scale.tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, -37.0, np.inf, np.nan])
def test_scales_that_are_not_positive_are_refused(kind, bad, tmp_path):
    t = oracle.ternary(4, 512)
    if kind in LAYOUTS:
        writer = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, bad, kind)
        place = "block 0 in row 0"
    else:
        writer = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, kind)
        scale = np.array([bad], np.float16).view(np.uint8)
        data = writer.data[0] = np.array(writer.data[0])
        blocks = data.reshape(4, 512 // BLOCKS[kind], -1)
        blocks[2, -1, slice(0, 2) if kind in ("Q2_0", "PQ2_0") else slice(-2, None)] = scale
        place = f"block {blocks.shape[1] - 1} in row 2"
    iterator = integration.tensors(writer.write(), i2_s_layout=layout_of(kind))
    with pytest.raises(ValueError, match=rf"a\.weight: the scale of {place} must be finite and"):
        next(iterator)


@pytest.mark.parametrize("kind", ["TQ2_0", *LAYOUTS])
def test_an_invalid_code_is_refused(kind, tmp_path):
    t = oracle.ternary(4, 512)
    t[2, 300] = 2  # Its code is 3.
    if kind in LAYOUTS:
        writer = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 1.0, kind)
    else:
        data = quantize(np.clip(t, -1, 1), 1.0, kind)
        data[2, 66 + (300 - 256) % 32] |= 3 << 2
        writer = Writer(tmp_path / "x.gguf").add("a.weight", data, kind)
    iterator = integration.tensors(writer.write(), i2_s_layout=layout_of(kind))
    with pytest.raises(ValueError, match=r"a\.weight: the weight in row 2 and column 300 .*code 3"):
        next(iterator)


def test_every_byte_of_tq1_0_is_read_as_the_library_reads_it(tmp_path):
    data = np.arange(54 * 6, dtype=np.int64).astype(np.uint8).reshape(3, 108)
    data[:, [52, 106]], data[:, [53, 107]] = 0x00, 0x3C  # The scale 1 in fp16.
    path = Writer(tmp_path / "x.gguf").add("a.weight", data, "TQ1_0").write()
    wanted = gguf.dequantize(data, gguf.GGMLQuantizationType.TQ1_0).astype(np.int64)
    assert read_one(path).w_packed.tolist() == oracle.pack(wanted).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_beside_the_tensor_multiplies(kind, tmp_path):
    t, factor = oracle.ternary(4, 256), np.float32(0.1)
    writer = Writer(tmp_path / "x.gguf").add("blk.0.attn_q.scale", np.array([factor]))
    path = writer.add_ternary("blk.0.attn_q.weight", t, 37.0, kind).write()
    tensor = read_one(path, i2_s_layout=layout_of(kind))
    oracle.assert_same_bits(tensor.w_scale, torch.tensor([np.float32(37) * factor]))


@pytest.mark.parametrize("factor", [[0.0], [-1.0], [np.nan], [1.0, 2.0]])
def test_other_factors_are_refused(factor, tmp_path):
    writer = Writer(tmp_path / "x.gguf").add("a.scale", np.array(factor, np.float32))
    path = writer.add_ternary("a.weight", oracle.ternary(4, 256), 1.0, "TQ2_0").write()
    with pytest.raises(ValueError, match=r"a\.scale must be (one number|finite and positive)"):
        integration.tensors(path)


def test_a_product_that_fp32_cannot_hold_is_refused(tmp_path):
    writer = Writer(tmp_path / "x.gguf").add("a.scale", np.array([3e38], np.float32))
    path = writer.add_ternary("a.weight", oracle.ternary(4, 256), 37.0, "TQ2_0").write()
    iterator = integration.tensors(path)
    with pytest.raises(ValueError, match=r"a\.weight: scales times 3e\+38 must be finite"):
        next(iterator)


def test_tensors_come_one_at_a_time_in_the_order_of_the_file(tmp_path):
    writer = Writer(tmp_path / "x.gguf")
    kinds = {"c": "TQ2_0", "a": "TQ1_0", "b": "x86"}
    for seed, (name, kind) in enumerate(kinds.items()):
        writer.add_ternary(f"{name}.weight", oracle.ternary(4, 256, seed), seed + 1.0, kind)
    writer.add("f.weight", np.ones((4, 256), np.float32))
    writer.add("q.weight", gguf.quantize(np.ones((4, 256)), gguf.GGMLQuantizationType.Q8_0), "Q8_0")
    iterator = integration.tensors(writer.write(), i2_s_layout="x86")
    assert iter(iterator) is iterator
    found = [(tensor.name, tensor.w_scale.item()) for tensor in iterator]
    assert found == [("c.weight", 1), ("a.weight", 2), ("b.weight", 3)]


def test_experts_are_refused(tmp_path):
    data = quantize(oracle.ternary(8, 256), 1.0, "TQ2_0").reshape(2, 4, 66)
    path = Writer(tmp_path / "x.gguf").add("e.weight", data, "TQ2_0").write()
    with pytest.raises(
        ValueError, match=r"e\.weight: .*2 dimensions, .*\[2, 4, 256\]: vectors and experts"
    ):
        integration.tensors(path)


def test_temporaries_are_small(tmp_path):
    n, k = 4096, 2048  # 2^23 weights
    data = np.full((n, k // 256, 66), 0b01_10_00_01, np.uint8)
    data[..., 64:] = np.array([37.0], np.float16).view(np.uint8)
    path = Writer(tmp_path / "x.gguf").add("a.weight", data.reshape(n, -1), "TQ2_0").write()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(value, torch.Tensor) and value._base is None:
                    # Only scales, one for each of 256 weights, are floats.
                    assert not value.is_floating_point() or value.numel() <= n * k // 256
                    sizes.append(value.numel() * value.element_size())
            return result

    with Watch():
        tensor = read_one(path)
    assert tensor.w_scale.tolist() == [37]
    whole = n * k // 4  # The packed weights, which index_put returns once for each chunk.
    assert max(sizes) == whole
    assert max(size for size in sizes if size != whole) <= 2**20


def test_results_in_inference_mode_are_no_inference_tensors(tmp_path):
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", oracle.ternary(4, 256), 1.0, "TQ2_0")
    path.write()
    with torch.inference_mode():
        tensor = read_one(tmp_path / "x.gguf")
    assert not tensor.w_packed.is_inference()
    assert not tensor.w_scale.is_inference()


def test_a_default_device_is_not_obeyed(tmp_path):
    t = oracle.ternary(4, 256)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, "TQ2_0").write()
    with torch.device("meta"):
        tensor = read_one(path)
    assert tensor.w_packed.tolist() == oracle.pack(t).tolist()
    assert tensor.w_scale.tolist() == [37]


def test_the_encoder_of_the_tests_follows_the_definition():
    t = np.zeros((1, 128), np.int64) - 1
    t[0, [1, 33, 65, 97]] = [1, 0, 1, 0]
    data = i2_s_bytes(t, 2.0, 128)
    assert len(data) == 32 + 32
    assert data[:32].tolist() == [0, 0b10_01_10_01, *[0] * 30]
    assert data[32:36].view(np.float32).tolist() == [2]
    assert I2_S == 36
