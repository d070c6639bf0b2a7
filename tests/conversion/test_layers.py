"""The linear layers that ``convert`` leaves as they are, with the reason."""

from __future__ import annotations

import pytest
from torch import nn

from bitlinear import BitLinear, convert
from tests.models import Mixed, OwnForward, OwnHelper, parametrized, with_forward_replaced


def with_adapter():
    linear = nn.Linear(8, 8)
    linear.lora_A = nn.Linear(8, 2)
    return linear


def with_state_hook():
    linear = nn.Linear(8, 8)
    linear._register_load_state_dict_pre_hook(lambda *args: None)
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OwnForward, "it is a OwnForward, whose use of the weight is unknown: OwnForward defines"),
        (OwnHelper, "OwnHelper defines norm"),
        (Mixed, "Mixin defines scale"),
        (lambda *_: nn.LazyLinear(8), "it is lazy"),
        (lambda *_: parametrized(), "it is parametrized"),
        (lambda *_: nn.utils.weight_norm(nn.Linear(8, 8)), "computed, not a parameter"),
        (lambda *_: with_forward_replaced(), "its forward has been replaced"),
        (lambda *_: with_adapter(), "nn.Linear does not have: lora_A"),
        (lambda *_: with_state_hook(), "hooks that cannot be moved: _load_state_dict_pre_hooks"),
        (BitLinear, "it is a BitLinear already"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_not_converted_name_the_reason(make, reason, log):
    odd = make(8, 8)
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(8, 8)})
    convert(model, exclude=("lora_A",))
    assert model["odd"] is odd
    assert type(model["plain"]) is BitLinear
    (line,) = (line for line in log() if line.startswith("odd: "))
    assert line.startswith("odd: not converted: ")
    assert reason in line
