"""Warnings about models that ``convert`` leaves mostly in floating point."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from bitlinear import convert, deploy
from tests.models import Block, Model, OwnForward, parametrized


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.up_proj = nn.Parameter(torch.randn(4, 8, 16))


class Vision(nn.Module):
    """A patch embedding, a table of positions and a class token in front of linear layers."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 64, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.gate = nn.Parameter(torch.zeros(2, 8))


HARDLY = {
    "LSTM": (nn.LSTM(8, 8), r"weight_ih_l0 \[32, 8\] \(LSTM: a recurrent layer"),
    "attention": (nn.MultiheadAttention(8, 2), r"in_proj_weight \[24, 8\] \(MultiheadAttention: "),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16), r"which hold 50\.0% of the weights"),
    "1 x 1": (
        nn.Sequential(nn.Conv2d(8, 8, 1)),
        r"0\.weight .*kernel of size 1 it is an nn\.Linear",
    ),
    "1 x 1 of an image": (nn.Sequential(nn.Conv2d(3, 8, 1)), r"\(Conv2d: a convolution; with"),
    "CNN": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4096, 8)),
        r"1 of 3 weight matrices ternary, which hold 99\.2% of the weights",
    ),
    "experts": (Experts(), r"up_proj \[4, 8, 16\] \(Experts: several matrices in one parameter"),
    "own forward": (nn.Sequential(OwnForward(8, 8)), r"0\.weight .*OwnForward defines forward"),
    "parametrized": (nn.Sequential(parametrized()), r"original1 .*: it is parametrized; call"),
    "lazy": (nn.Sequential(nn.LazyLinear(8)), r"0\.weight \(LazyLinear: it is lazy; run it once"),
    "a parameter": (
        nn.ParameterList([torch.randn(8, 8)]),
        r"\(ParameterList: it is not an nn\.Linear",
    ),
}


@pytest.mark.parametrize("kind", HARDLY)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_that_stays_in_floating_point_warns(kind):
    model, message = copy.deepcopy(HARDLY[kind][0]), HARDLY[kind][1]
    with pytest.warns(UserWarning, match=r"(?s)^convert\(\) made .*" + message) as caught:
        convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "name their modules in exclude" in str(caught[0].message)


def test_the_largest_of_many_are_named():
    model = nn.Sequential(*(nn.Conv2d(8, width, 3) for width in range(2, 9)))
    with pytest.warns(
        UserWarning, match=r"(?s)6\.weight.*5\.weight.*4\.weight.*3\.weight.*and 3 m"
    ):
        convert(model)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Model, {}),
        (lambda: Model().embed, {}),
        (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), {}),
        (Vision, {}),
        (lambda: convert(Model()), {}),
        (lambda: deploy(convert(Model())), {}),
        (Model, {"filter_fn": lambda name, _: False}),
        (Model, {"exclude": "*"}),
        (lambda: nn.LSTM(8, 8), {"exclude": "*"}),
        (lambda: nn.ModuleDict({"lstm": nn.LSTM(8, 8)}), {"exclude": "lstm"}),
        (lambda: nn.ModuleDict({"a": Experts(), "b": Block()}), {"exclude": ("b.*", "a")}),
    ],
)
def test_models_that_convert_without_a_warning(make, arguments):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, **arguments)


def test_a_weight_tied_to_an_embedding_does_not_count():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(99, 8), "decoder": OwnForward(8, 99), "x": Block()}
    )
    model["decoder"].weight = model["embed"].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
