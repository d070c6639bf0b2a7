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
    with pytest.raises(ValueError, match=r"one of \['ai8pc_wpt', .*'\], but it is 'int4'"):
        arguments.check_quant_type("int4")
    for name in arguments.QUANT_TYPES:
        arguments.check_quant_type(name)
