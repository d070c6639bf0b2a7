"""The argument ``exclude`` of ``convert``."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from bitlinear import convert
from tests.models import ALL, Model, converted


@pytest.mark.parametrize(
    ("exclude", "left_alone"),
    [
        ((), set()),
        (("lm_head",), {"lm_head"}),
        ("lm_head", {"lm_head"}),
        (("up",), {"blocks.0.up", "blocks.1.up"}),
        (("0.up", "1.down"), {"blocks.0.up", "blocks.1.down"}),
        (("blocks.1.up",), {"blocks.1.up"}),
        (("blocks.0.*",), {"blocks.0.up", "blocks.0.down"}),
        (("*.up", "lm_*"), {"blocks.0.up", "blocks.1.up", "lm_head"}),
        (("head", "p", "blocks", "up.0"), set()),
    ],
)
@pytest.mark.filterwarnings("ignore:exclude=")
def test_exclude_by_qualified_name(exclude, left_alone):
    assert converted(convert(Model(), exclude=exclude)) == ALL - left_alone
    # The same pattern works if the model is inside another one.
    outer = nn.ModuleDict({"model": Model()})
    wanted = {f"model.{name}" for name in ALL - left_alone}
    assert converted(convert(outer, exclude=exclude)) == wanted


@pytest.mark.parametrize("exclude", [None, (3,), ("lm_head", nn.ReLU)])
def test_patterns_that_are_not_strings_raise(exclude):
    with pytest.raises(TypeError, match=r"exclude must hold names .* but it holds .*filter_fn"):
        convert(Model(), exclude=exclude)


@pytest.mark.parametrize(
    ("exclude", "advice"),
    [
        ("blocks", r"'blocks\.\*' to exclude the layers inside, such as blocks\.0\.up"),
        ("blocks.1", r"'blocks\.1\.\*' to exclude the layers inside, such as blocks\.1\.up"),
        ("head", r"its layers are lm_head, blocks\.0\.up"),
        (("up", "down.0"), r"'down\.0' matches no linear layer"),
    ],
)
def test_a_pattern_without_a_match_warns(exclude, advice):
    with pytest.warns(UserWarning, match=advice) as caught:
        convert(Model(), exclude=exclude)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("exclude", [("lm_head",), "lm_head", (), ("embed",), ("lm_head", "up")])
def test_patterns_that_do_not_warn(exclude):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Model().blocks if exclude == ("lm_head",) else Model(), exclude=exclude)
