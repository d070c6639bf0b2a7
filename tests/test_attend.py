"""The attention of one token as an operator: rotation, cache and attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear.decode_attention import reference_decode_attention
from tests import oracle

decode_attention = torch.ops.bitlinear.decode_attention


def make(batch=2, heads=4, groups=2, size=16, capacity=20, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    qkv = draw(batch, (heads + 2 * groups) * size)
    cos, sin = draw(2, batch, size)
    keys, values = draw(2, batch, groups, capacity, size)
    return qkv, cos, sin, keys, values


def in_float64(qkv, keys, values, count, scale, mask):
    """The attention with a cache that has the new token; queries are rotated."""
    batch, groups, _, size = keys.shape
    q = qkv.double().view(batch, groups, -1, size)
    k, v = keys[:, :, :count].double(), values[:, :, :count].double()
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).reshape(batch, -1)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 9),
    size=st.sampled_from([16, 48, 64, 128, 256]),
    length=st.sampled_from([0, 1, 15, 16, 126, 127, 128, 300]),
    mask=st.sampled_from([None, "one", "each"]),
    seed=st.integers(0, 999),
)
def test_it_rotates_appends_and_attends(batch, groups, shared, size, length, mask, seed):
    heads, scale = groups * shared, size**-0.5
    qkv, cos, sin, keys, values = make(batch, heads, groups, size, length + 3, seed)
    if mask is not None:
        mask = torch.rand(1 if mask == "one" else batch, length + 1) < 0.7
        mask[:, 0] = mask[:, 0] & (length % 2 == 0)  # for one key: none is seen
    before = (keys.clone(), values.clone())
    theirs = [keys.clone(), values.clone()]
    y = decode_attention(qkv, cos, sin, keys, values, length, scale, mask)
    reference = reference_decode_attention(qkv, cos, sin, *theirs, length, scale, mask)
    assert (y.shape, y.dtype) == ((batch, heads * size), torch.bfloat16)
    for ours, other, old in zip((keys, values), theirs, before):
        oracle.assert_same_bits(ours, other)
        rest = torch.arange(length + 3) != length
        oracle.assert_same_bits(ours[:, :, rest], old[:, :, rest])
    x = qkv.view(batch, -1, size)[:, :heads]
    first, second = x.chunk(2, dim=-1)
    q = x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    exact = in_float64(q, keys, values, length + 1, scale, mask)
    for result in (y, reference):
        assert ((result - exact).abs() <= exact.abs() / 256 + 2e-5).all()


def test_one_rotation_for_all():
    qkv, cos, sin, keys, values = make()
    cos, sin = cos[:1], sin[:1]
    each = [t.expand(2, -1) for t in (cos, sin)]
    ours = decode_attention(qkv, cos, sin, keys.clone(), values.clone(), 5, 0.3)
    oracle.assert_same_bits(ours, decode_attention(qkv, *each, keys, values, 5, 0.3))


def test_values_that_are_not_finite_stay_in_their_sequence():
    qkv, cos, sin, keys, values = make()
    qkv[0, 0] = float("nan")
    y = decode_attention(qkv, cos, sin, keys, values, 7, 0.3).view(2, 4, 16)
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()
    assert y[1].isfinite().all()
    keys[1, 1, 3, 2] = float("inf")
    y = decode_attention(qkv, cos, sin, keys, values, 7, 0.3).view(2, 4, 16)
    assert y[1, :2].isfinite().all()


def test_views_and_threads():
    qkv, cos, sin, keys, values = make(2, 20, 5, 128, 700)
    room = torch.zeros(2, 7, 900, 128, dtype=torch.bfloat16)[:, 1:6, :700]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for strided in (False, True):
                k = room.copy_(keys) if strided else keys
                x = qkv.T.contiguous().T if strided else qkv
                results.append(decode_attention(x, cos, sin, k, values, 640, 0.1))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        oracle.assert_same_bits(result, results[0])


def test_no_sequence():
    qkv, cos, sin, keys, values = (t[:0] for t in make())
    assert decode_attention(qkv, cos, sin, keys, values, 3, 0.1).shape == (0, 64)


def test_the_operator_is_what_torch_expects():
    for mask in (None, torch.ones(2, 8, dtype=torch.bool)):
        torch.library.opcheck(decode_attention.default, (*make(), 7, 0.3, mask))


QKV, COS, SIN, KEYS, VALUES = make()
MASK = torch.ones(2, 8, dtype=torch.bool)
WRONG = {
    "dtype": ({"qkv": QKV.float()}, TypeError, "must be bfloat16, but one is float32"),
    "sizes": (
        {"values": VALUES[..., :8].clone()},
        ValueError,
        "keys and values must have one shape",
    ),
    "order": ({"keys": KEYS.transpose(1, 2)}, ValueError, "one behind the other"),
    "head": (
        {"keys": KEYS[..., :8].clone(), "values": VALUES[..., :8].clone()},
        ValueError,
        "a multiple of 16, at most 256, but it is 8",
    ),
    "length": ({"length": 20}, ValueError, "below the capacity of the keys, 20, but it is 20"),
    "negative": ({"length": -1}, ValueError, "at least 0"),
    "heads": ({"qkv": QKV[:, :-16]}, ValueError, r"\(2, heads \* 16\).* shape \[2, 112\]"),
    "batch": ({"qkv": QKV[:1]}, ValueError, r"but it has shape \[1, 128\]"),
    "cos": ({"cos": COS[:, :8], "sin": SIN[:, :8]}, ValueError, r"\(1, 16\) or \(2, 16\)"),
    "sin": ({"sin": SIN[:1]}, ValueError, r"have shapes \[2, 16\] and \[1, 16\]"),
    "mask": ({"mask": MASK[:, :7]}, ValueError, r"bool, of shape \(1, 8\) or \(2, 8\)"),
    "mask of numbers": ({"mask": MASK.float()}, ValueError, "but it is float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_the_same_everywhere(case):
    changes, error, message = WRONG[case]
    given_arguments = {
        "qkv": QKV,
        "cos": COS,
        "sin": SIN,
        "keys": KEYS,
        "values": VALUES,
        "length": 7,
        "scale": 0.3,
        "mask": MASK,
        **changes,
    }
    on_meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in given_arguments.items()
    }
    before = KEYS.clone()
    texts = []
    for function, arguments in (
        (decode_attention, given_arguments),
        (reference_decode_attention, given_arguments),
        (decode_attention, on_meta),
    ):
        with pytest.raises(error, match=message) as caught:
            function(**arguments)
        texts.append(str(caught.value).split("\n")[0].replace("on meta", "on cpu"))
    assert len(set(texts)) == 1
    oracle.assert_same_bits(KEYS, before)


def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="qkv is on cpu and another one is on meta"):
        reference_decode_attention(QKV, COS, SIN, KEYS.to("meta"), VALUES, 7, 0.3)
