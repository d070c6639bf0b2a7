"""A small run of the language model, which several test files share."""

from __future__ import annotations

import json
from dataclasses import asdict

from scripts.char_training import Settings

TINY = Settings(width=32, depth=2, heads=2, context=24, batch=4, steps=80)
BUDGET = 0.1


def arguments(out, settings=TINY):
    """Return command-line arguments of a run into ``out``."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    return ["--out", str(out), "--save-every=5", f"--budget={BUDGET}", *options]


def results_of(out):
    """Return the results of a run into ``out``."""
    return json.loads((out / "results.json").read_text())


def losses_of(out):
    """Return the losses of a run into ``out``, by network."""
    networks = results_of(out)["networks"]
    return {name: network.get("losses") for name, network in networks.items()}
