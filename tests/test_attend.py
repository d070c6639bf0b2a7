"""The attention of one token as an operator: rotation, cache and attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitlinear
from bitlinear.attend import reference_attend
from tests import oracle

attend = torch.ops.bitlinear.attend
compiled = pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")


def make(batch=2, heads=4, groups=2, size=16, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    rows = draw(batch, 1, heads + 2 * groups, size).transpose(1, 2)
    query, key, value = rows.split([heads, groups, groups], dim=1)
    keys, values = draw(2, batch, groups, length, size)
    return query, keys, values, (key, value, *draw(2, batch, 1, size))


def in_float64(query, keys, values, scale, mask):
    """The attention of a rotated query."""
    batch, groups, _, size = keys.shape
    q = query.double().reshape(batch, groups, -1, size)
    scores = q @ keys.double().transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ values.double()).reshape(batch, 1, -1, size)


def rotated(query, cos, sin):
    first, second = query.chunk(2, dim=-1)
    return query * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def is_near(y, exact):
    return ((y - exact).abs() <= exact.abs() / 256 + 2e-5).all()


SHAPES = {
    "batch": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "shared": st.integers(1, 9),
    "size": st.sampled_from([16, 48, 64, 128, 256]),
    "length": st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, 300]),
    "mask": st.sampled_from([None, "one", "each"]),
    "seed": st.integers(0, 999),
}


def make_mask(kind, batch, length):
    if kind is None:
        return None
    mask = torch.rand(1 if kind == "one" else batch, 1, 1, length) < 0.7
    mask[0, ..., 0] &= length % 2 == 0  # with one key, there is none that counts
    return mask


@given(**SHAPES)
def test_it_attends(batch, groups, shared, size, length, mask, seed):
    query, keys, values, _ = make(batch, groups * shared, groups, size, length, seed)
    mask = make_mask(mask, batch, length)
    y = attend(query, keys, values, mask, size**-0.5)
    assert (y.shape, y.dtype) == ((batch, 1, groups * shared, size), torch.bfloat16)
    exact = in_float64(query, keys, values, size**-0.5, mask)
    assert is_near(y, exact)
    assert is_near(reference_attend(query, keys, values, mask, size**-0.5), exact)


@given(**SHAPES, place=st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_it_rotates_and_writes_first(batch, groups, shared, size, length, mask, seed, place):
    query, keys, values, new = make(batch, groups * shared, groups, size, length, seed)
    mask = make_mask(mask, batch, length)
    position = None if place is None else torch.tensor([int(place * (length - 1))])
    at = length - 1 if position is None else position.item()
    before = keys.clone(), values.clone()
    theirs = keys.clone(), values.clone()
    y = attend(query, keys, values, mask, 0.3, position, *new)
    reference = reference_attend(query, *theirs, mask, 0.3, position, *new)
    for ours, other, old in zip((keys, values), theirs, before):
        oracle.assert_same_bits(ours, other)
        rest = torch.arange(length) != at
        oracle.assert_same_bits(ours[:, :, rest], old[:, :, rest])
    turned = rotated(query, *new[2:])
    exact = in_float64(turned, keys, values, 0.3, mask)
    assert is_near(y, exact)
    assert is_near(reference, exact)
    oracle.assert_same_bits(attend(turned, keys, values, mask, 0.3), y)


def test_one_rotation_for_all():
    query, keys, values, (key, value, cos, sin) = make()
    one = [t[:1] for t in (cos, sin)]
    each = [t.expand(2, -1, -1) for t in one]
    ours = attend(query, keys.clone(), values.clone(), None, 0.3, None, key, value, *one)
    wanted = attend(query, keys, values, None, 0.3, None, key, value, *each)
    oracle.assert_same_bits(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_takes_other_dtypes_and_masks(dtype):
    query, keys, values = (t.to(dtype) for t in make()[:3])
    shown = make_mask("each", 2, 20)
    numbers = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, -torch.inf)
    exact = in_float64(query, keys, values, 0.3, shown)
    for mask in (shown, numbers):
        assert is_near(reference_attend(query, keys, values, mask, 0.3), exact)


def test_values_that_are_not_finite_stay_in_their_sequence():
    query, keys, values, new = make()
    query[0, 0, 0, 0] = float("nan")
    y = attend(query, keys, values, None, 0.3, None, *new)[:, 0]
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()
    assert y[1].isfinite().all()
    keys[1, 1, 3, 2] = float("inf")
    assert attend(query, keys, values, None, 0.3, None, *new)[1, 0, :2].isfinite().all()


def test_views_and_threads():
    query, keys, values, new = make(2, 20, 5, 128, 640)
    room = torch.zeros(2, 7, 900, 128, dtype=torch.bfloat16)[:, 1:6, :640]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for strided in (False, True):
                k = room.copy_(keys) if strided else keys.clone()
                q = query if strided else query.contiguous()
                results.append(attend(q, k, values.clone(), None, 0.1, None, *new))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        oracle.assert_same_bits(result, results[0])


def test_no_heads_and_one_key():
    query, keys, values, (key, value, *angles) = make(length=1)
    y = attend(query[:, :0], keys, values, None, 0.1, None, key, value, *angles)
    assert y.shape == (2, 1, 0, 16)
    oracle.assert_same_bits(values, value.contiguous())
    rows = torch.randn(2, 1, 5, 16).bfloat16().transpose(1, 2)
    strided = rows[:, 1:3], rows[:, 3:]  # their tokens have another stride
    oracle.assert_same_bits(
        attend(rows[:, :1].expand(-1, 2, -1, -1), *strided, None, 0.1),
        attend(rows[:, :1].expand(-1, 2, -1, -1), *(t.contiguous() for t in strided), None, 0.1),
    )


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_nothing_to_attend_to(batch, length):
    query, keys, values, _ = make(length=length)
    for function in (attend, reference_attend):
        y = function(query[:batch], keys[:batch], values[:batch], None, 0.1)
        assert y.shape == (batch, 1, 4, 16)
        assert not y.any()


def test_the_operator_is_what_torch_expects():
    query, keys, values, new = make()
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    for rest in ((None, 0.3), (mask, 0.3), (mask, 0.3, torch.tensor([3]), *new)):
        torch.library.opcheck(attend.default, (query, keys, values, *rest))


QUERY, KEYS, VALUES, NEW = make()
MASK = torch.ones(2, 1, 1, 20, dtype=torch.bool)
WRONG = {
    "dtype": ({"query": QUERY.double()}, "query must be float32.*but it is float64"),
    "tokens": ({"query": QUERY.expand(-1, -1, 2, -1)}, r"of shape \[2, 4, 2, 16\]"),
    "heads": ({"query": QUERY[:, :3]}, "3 heads a multiple of the key heads"),
    "keys": ({"keys": KEYS.float()}, "keys must be bfloat16.*but it is float32"),
    "values": ({"values": VALUES[:, :, :5]}, r"values must be .*of shape \[2, 2, 20, 16\]"),
    "mask": ({"mask": MASK[..., :7]}, r"mask must be bool, of shape \[2, 1, 1, 20\]"),
    "number": ({"mask": MASK.float()}, "mask must be bfloat16.*but it is float32"),
    "position": ({"position": torch.tensor(3)}, r"position must be int64, of shape \[1\]"),
    "together": ({"new_value": None}, "come together.*but 3 of them are given"),
    "alone": (dict.fromkeys(("new_key", "new_value", "cos", "sin")), "but 0 of them"),
    "new key": ({"new_key": NEW[0][:, :1]}, r"new_key must be .*of shape \[2, 2, 1, 16\]"),
    "cos": ({"cos": NEW[2][..., :8]}, r"cos must be .*of shape \[2, 1, 16\]"),
    "sin": ({"sin": NEW[3][:1]}, r"sin must be .*of shape \[2, 1, 16\]"),
}


def arguments_of(changes):
    names = ("new_key", "new_value", "cos", "sin")
    tensors = {"query": QUERY, "keys": KEYS, "values": VALUES, "mask": MASK, "scale": 0.3}
    return {**tensors, "position": torch.tensor([3]), **dict(zip(names, NEW)), **changes}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_the_same_everywhere(case):
    changes, message = WRONG[case]
    arguments = arguments_of(changes)
    on_meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    before = KEYS.clone()
    texts = []
    for function, given_arguments in (
        (attend, arguments),
        (reference_attend, arguments),
        (attend, on_meta),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            function(**given_arguments)
        texts.append(str(caught.value).split("\n")[0].replace("on meta", "on cpu"))
    assert len(set(texts)) == 1
    oracle.assert_same_bits(KEYS, before)


@compiled
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": MASK.bfloat16()}, NotImplementedError, "a mask of bool"),
        (
            {"keys": KEYS.transpose(2, 3).contiguous().transpose(2, 3)},
            NotImplementedError,
            "one behind the other",
        ),
    ],
)
def test_what_the_kernel_of_the_cpu_cannot_compute(changes, error, message):
    arguments = arguments_of(changes)
    versions = [arguments[name]._version for name in ("keys", "values")]
    with pytest.raises(error, match=message):
        attend(**arguments)
    # A refused call leaves everything as it was.
    assert [arguments[name]._version for name in ("keys", "values")] == versions


@pytest.mark.parametrize("position", [20, -1])
def test_a_position_outside_the_cache(position):
    before = KEYS.clone()
    for function in (attend, reference_attend):
        with pytest.raises(ValueError, match=f"between 0 and 19, but it is {position}"):
            function(**arguments_of({"position": torch.tensor([position])}))
    oracle.assert_same_bits(KEYS, before)


@pytest.mark.parametrize("function", [attend, reference_attend])
@pytest.mark.parametrize("name", ["query", "new_key", "new_value", "cos"])
def test_operands_in_the_memory_of_the_keys(name, function):
    """They are read as they were before the call."""
    query, keys, values, (key, value, cos, sin) = make(batch=1, heads=1, groups=1, length=300)
    arguments = {"query": query, "new_key": key, "new_value": value, "cos": cos, "sin": sin}
    rest = {"mask": None, "scale": 0.3, "position": None}
    shared = keys[:, :, 299:] if name != "cos" else keys[:, 0, 299:]
    separate = {**arguments, name: shared.clone()}
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted = function(keys=wanted_keys, values=wanted_values, **rest, **separate)
    y = function(keys=keys, values=values, **rest, **{**arguments, name: shared})
    oracle.assert_same_bits(y, wanted)
    oracle.assert_same_bits(keys, wanted_keys)
    oracle.assert_same_bits(values, wanted_values)


@compiled
def test_memory_that_would_be_written_twice_is_refused():
    both = torch.zeros(1296, dtype=torch.bfloat16)
    shifted = [both[first : first + 1280].view(2, 2, 20, 16) for first in (0, 16)]
    for changes in (
        {"values": VALUES[:1].expand(2, -1, -1, -1)},
        {"keys": shifted[0], "values": shifted[1]},
    ):
        with pytest.raises(RuntimeError, match="memory location"):
            attend(**arguments_of(changes))


def test_autograd_learns_of_the_write():
    query, keys, values, new = make()
    attend(query, keys, values, None, 0.3)
    assert keys._version == 0
    w = torch.ones_like(keys, requires_grad=True)
    loss = (w * keys).sum()
    with torch.no_grad():
        attend(query, keys, values, None, 0.3, None, *new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled
@pytest.mark.parametrize("name", ["query", "keys", "values", "mask", "new_key", "cos", "position"])
def test_freed_memory_is_an_error(name):
    arguments = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in arguments_of({}).items()
    }
    if name == "query":  # a copy would read it
        arguments[name] = torch.stack([arguments[name]] * 2, dim=-1)[..., 0]
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
        attend(**arguments)


def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match=r"keys must be .* on cpu, but it is .* on meta"):
        reference_attend(QUERY, KEYS.to("meta"), VALUES, None, 0.3)
