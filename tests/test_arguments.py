"""The checks of ``eps`` and of ``quant_type``."""

from __future__ import annotations

import numpy as np
import pytest

from bitlinear import arguments


@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-37, 1e-36, 1e19, float("nan"), float("inf")])
def test_eps_must_leave_its_scale_normal_and_its_reciprocal_finite(eps):
    with pytest.raises(ValueError, match=r"between 2e-36 and 1e\+18 \(eps / 127, 127 / eps"):
        arguments.check_eps(eps)
    arguments.check_eps(2e-36)
    assert np.float32(2e-36) / np.float32(127) >= np.finfo(np.float32).tiny
    assert np.isfinite(np.float32(127) / np.float32(2e-36))


def test_quant_types():
    with pytest.raises(ValueError, match=r"one of \['ai8pc_wpt', .*, but it is 'int4'"):
        arguments.parse_quant_type("int4")
    for name, quant_type in arguments.QUANT_TYPES.items():
        assert arguments.parse_quant_type(name) == quant_type
        assert quant_type.name == name


@pytest.mark.parametrize("name", ["ai8pc_wpg32", "ai16pc_wpg96", "ai8pc_wpg4096"])
def test_types_with_groups(name):
    quant_type = arguments.parse_quant_type(name)
    assert quant_type.group_size == int(name.partition("wpg")[2])
    assert quant_type.name == name
    assert arguments.parse_weight_type(name.partition("_")[2]) == quant_type.group_size


@pytest.mark.parametrize(
    "groups",
    [
        "wpg",
        "wpg0",
        "wpg-32",
        "wpg33",
        "wpg032",
        "wpg32 ",
        "wpg1e3",
        "wpg500032",
        pytest.param("wpg" + "9" * 5000, id="too long"),
    ],
)
def test_names_that_are_no_types_with_groups(groups):
    for parse, name in (
        (arguments.parse_quant_type, f"ai8pc_{groups}"),
        (arguments.parse_weight_type, groups),
    ):
        with pytest.raises(
            ValueError, match=r"wpg<G> with a multiple G of 32 from 32 to 500000, but it is"
        ):
            parse(name)
    with pytest.raises(ValueError, match=r"but it is \['wpt'\]"):
        arguments.parse_weight_type(["wpt"])
