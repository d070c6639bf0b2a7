"""``torch.ops.bitlinear.attend`` on an NVIDIA GPU, against the reference and in fp64."""

from __future__ import annotations

import pytest
import torch

from bitlinear.attend import reference_attend
from tests import oracle
from tests.kernels.test_cuda import compiled
from tests.test_attend import in_float64, make, make_mask, rotated

HOPPER = (9, 0)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < HOPPER,
        reason="needs an NVIDIA GPU from Hopper on",
    ),
]

__all__ = ["compiled"]  # a fixture

attend = torch.ops.bitlinear.attend
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def operands(*sizes, dtype=torch.bfloat16, **named):
    """As on the CPU, on the GPU: query, keys, values, and the rest as a tuple."""
    query, keys, values, new = make(*sizes, **named)
    return (
        *(t.to("cuda", dtype) for t in (query, keys, values)),
        [t.to("cuda", dtype) for t in new],
    )


def position(at):
    return torch.tensor([at], device="cuda")


def all_of(keys):
    return torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool, device="cuda")


def assert_near(y, exact):
    limit = 3e-2 if y.dtype == torch.bfloat16 else 4e-3
    torch.testing.assert_close(y.double(), exact, atol=limit, rtol=limit, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127, 128, 129, 300, 2049])
@pytest.mark.parametrize(("groups", "shared", "size"), [(1, 8, 64), (5, 4, 128), (3, 1, 128)])
def test_it_rotates_writes_and_attends(groups, shared, size, length, kind, dtype):
    query, keys, values, new = operands(2, groups * shared, groups, size, length, dtype=dtype)
    mask = make_mask(kind, 2, length).cuda()
    for at in {0, length // 2, length - 1}:
        ours, theirs = (keys.clone(), values.clone()), (keys.clone(), values.clone())
        y = attend(query, *ours, mask, 0.3, position(at), *new)
        reference_attend(query, *theirs, mask, 0.3, position(at), *new)
        for a, b in zip(ours, theirs):
            oracle.assert_same_bits(a.cpu(), b.cpu())
        turned = rotated(query, *new[2:])
        assert_near(y, in_float64(turned, *ours, 0.3, mask))
        oracle.assert_same_bits(attend(turned, *ours, mask, 0.3).cpu(), y.cpu())


@DTYPES
def test_a_query_that_sees_no_key_gives_zeros(dtype):
    for length in (1, 16, 700):
        query, keys, values, new = operands(2, 8, 2, 64, length, dtype=dtype)
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device="cuda")
        mask[1] = False
        numbers = torch.zeros(mask.shape, dtype=dtype, device="cuda").masked_fill(~mask, -torch.inf)
        for shown in (mask, numbers):
            for rest in ((), (position(0), *new)):
                y = attend(query, keys.clone(), values.clone(), shown, 0.3, *rest)
                assert not y[1].any()
                assert y[0].any()


@pytest.mark.parametrize("at", [0, 15, 16, 47])
def test_values_that_are_not_finite_stay_in_their_sequence(at):
    query, keys, values, new = operands(2, 8, 2, 64, 48)
    shown = all_of(keys)
    query[0, 0, 0, 0] = float("nan")
    y = attend(query, keys.clone(), values.clone(), shown, 0.3, position(at), *new)[:, 0]
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()
    assert y[1].isfinite().all()
    query, new[0] = operands(2, 8, 2, 64, 48)[0], new[0].clone()
    new[0][1, 1, 0, 5] = float("nan")  # of the new key of heads 4 to 7
    y = attend(query, keys, values, shown, 0.3, position(at), *new)[:, 0]
    assert y[1, 4:].isnan().all()
    assert y[1, :4].isfinite().all()
    assert y[0].isfinite().all()
    assert keys[1, 1, at].isnan().any()


@pytest.mark.parametrize("at", [-1, 48, 2**40, -(2**40)])
def test_a_position_outside_the_cache_writes_nothing(at):
    query, keys, values, new = operands(2, 8, 2, 64, 48)
    before = keys.clone(), values.clone()
    y = attend(query, keys, values, all_of(keys), 0.3, position(at), *new)
    for now, old in zip((keys, values), before):
        oracle.assert_same_bits(now.cpu(), old.cpu())
    turned = rotated(query, *new[2:])
    oracle.assert_same_bits(y.cpu(), attend(turned, keys, values, all_of(keys), 0.3).cpu())


@pytest.mark.parametrize("name", ["query", "new_key", "new_value", "cos"])
def test_operands_in_the_memory_of_the_keys(name):
    """They are read as they were before the call."""
    query, keys, values, (key, value, cos, sin) = operands(1, 1, 1, 64, 300)
    arguments = {"query": query, "new_key": key, "new_value": value, "cos": cos, "sin": sin}
    rest = {"mask": all_of(keys), "scale": 0.3, "position": position(299)}
    shared = keys[:, :, 299:] if name != "cos" else keys[:, 0, 299:]
    separate = {**arguments, name: shared.clone()}
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted = attend(keys=wanted_keys, values=wanted_values, **rest, **separate)
    y = attend(keys=keys, values=values, **rest, **{**arguments, name: shared})
    for now, expected in ((y, wanted), (keys, wanted_keys), (values, wanted_values)):
        oracle.assert_same_bits(now.cpu(), expected.cpu())


def test_memory_that_would_be_written_twice_is_refused():
    query, keys, values, new = operands(2, 8, 2, 64, 48)
    both = torch.zeros(2 * 2 * 48 * 64 + 64, dtype=keys.dtype, device="cuda")
    shifted = [both[first : first + keys.numel()].view_as(keys) for first in (0, 64)]
    for pair in ((keys, values[:1].expand(2, -1, -1, -1)), shifted):
        with pytest.raises(RuntimeError, match="memory location"):
            attend(query, *pair, all_of(keys), 0.3, position(1), *new)


def test_autograd_learns_of_the_write():
    query, keys, values, new = operands(2, 8, 2, 64, 48)
    attend(query, keys, values, all_of(keys), 0.3)
    assert keys._version == values._version == 0
    attend(query, keys, values, all_of(keys), 0.3, position(1), *new)
    assert keys._version == values._version == 1
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        attend(query.repeat(1, 1, 1, 2)[..., ::2], keys, values, all_of(keys), 0.3)
    assert keys._version == 1


def test_the_operator_is_what_torch_expects():
    query, keys, values, new = operands(2, 8, 2, 64, 48)
    for rest in ((), (position(3), *new)):
        torch.library.opcheck(attend.default, (query, keys, values, all_of(keys), 0.3, *rest))


def test_a_graph_of_steps():
    """A captured step reads the position from the GPU, and so goes on in each replay."""
    query, keys, values, new = operands(1, 8, 2, 64, 100)
    at, shown = position(0), all_of(keys).zero_()
    step_keys, step_values = keys.clone(), values.clone()

    def step():
        shown.index_fill_(-1, at, True)
        y = attend(query, step_keys, step_values, shown, 0.3, at, *new)
        at.add_(1)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert at.item() == 21
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for index in range(21):
        visible = torch.arange(100, device="cuda")[None, None, None] <= index
        wanted = attend(query, wanted_keys, wanted_values, visible, 0.3, position(index), *new)
    oracle.assert_same_bits(y.cpu(), wanted.cpu())
    oracle.assert_same_bits(step_keys.cpu(), wanted_keys.cpu())
    oracle.assert_same_bits(step_values.cpu(), wanted_values.cpu())
