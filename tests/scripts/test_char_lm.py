"""The language model: what it learns, that it survives being killed, and its notebook."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import bitlinear
from scripts import char_lm, char_training
from scripts.char_model import Cache, CharModel, generate
from scripts.char_training import LINEAR, TERNARY, Settings, Stopped, UnusableCheckpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = Settings(width=32, depth=2, heads=2, context=24, batch=4, steps=80)
BUDGET = 0.1

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Here and in what is started: networks so small wait for each other, not for arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    return char_training.load_text()


def arguments(out, settings=TINY):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    return ["--out", str(out), "--save-every=5", f"--budget={BUDGET}", *options]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output directory of a run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("finished")
    char_lm.main(arguments(out))
    return out


def results_of(out):
    return json.loads((out / "results.json").read_text())


def losses_of(out):
    return {name: its.get("losses") for name, its in results_of(out)["networks"].items()}


# --------------------------------------------------------------------------------- the text


def test_the_text_is_split_by_topics_that_share_nothing(text):
    train, validation = text.decode(text.train), text.decode(text.validation)
    assert len(train) > 250_000
    assert 0.05 < len(validation) / len(train) < 0.15
    assert "assert_stmt" in train
    paragraphs = [
        {its for its in part.split("\n\n") if its.strip()} for part in (train, validation)
    ]
    assert not paragraphs[0] & {its.strip("\n") for its in paragraphs[1]}


def test_batches_are_pieces_of_the_text_that_only_the_seed_and_the_step_choose(text):
    x, y = char_training.draw_batch(text, TINY, 7)
    assert x.shape == y.shape == (TINY.batch, TINY.context)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert text.decode(x[2]) in text.decode(text.train)
    again, _ = char_training.draw_batch(text, TINY, 7)
    assert torch.equal(again, x)
    for settings, step in ((TINY, 8), (replace(TINY, seed=1), 7)):
        other, _ = char_training.draw_batch(text, settings, step)
        assert not torch.equal(other, x)


# --------------------------------------------------------------------------------- the model


def network(kind, depth=2):
    model = CharModel(characters=50, width=32, depth=depth, heads=2, context=16)
    if kind != "linear":
        bitlinear.convert(model)
    return bitlinear.deploy(model) if kind == "deployed" else model


class LayerInputs:
    """The inputs of the BitLinear layers of a model in one call, and again in others.

    Where the same sum comes out with another last bit, an activation may be quantised to the next
    integer, and the layers behind it make much of that. So :meth:`compare` compares the inputs of
    each layer, and then gives it those that it had before.
    """

    def __init__(self, model):
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, bitlinear.BitLinear)
        }
        self._inputs = {}

    @contextlib.contextmanager
    def _hooks(self, hook):
        handles = [
            layer.register_forward_pre_hook(functools.partial(hook, name))
            for name, layer in self._layers.items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def record(self):
        return self._hooks(lambda name, _, args: self._inputs.update({name: args[0]}))

    def compare(self, positions, **tolerance):
        """In a call with the tokens at ``positions``, a slice."""

        def hook(name, _, args):
            wanted = self._inputs[name][:, positions]
            torch.testing.assert_close(args[0], wanted, **tolerance)
            return wanted

        return self._hooks(hook)


@pytest.mark.parametrize("kind", ["linear", "ternary", "deployed"])
@torch.inference_mode()
def test_the_cache_changes_nothing(kind):
    model = network(kind)
    tokens = torch.randint(50, (3, 16))
    inputs, tolerance = LayerInputs(model), {"rtol": 1e-4, "atol": 1e-4}
    with inputs.record():
        wanted = model(tokens)
    cache = Cache(model, batch=3)
    for positions in (slice(5), *(slice(i, i + 1) for i in range(5, 16))):
        # What is compared is a few sums of fp32 away from what was equal to the bit: the outputs
        # of the layers before. 1e-4 is a thousand units, on every CPU.
        with inputs.compare(positions, **tolerance):
            logits = model(tokens[:, positions], cache)
        torch.testing.assert_close(logits, wanted[:, positions], **tolerance)


@pytest.mark.parametrize("kind", ["linear", "ternary", "deployed"])
@torch.inference_mode()
def test_the_likeliest_character_goes_on(kind):
    """The same calls, so the same bits on every CPU."""
    model, prompt = network(kind), torch.randint(50, (4,))
    cache, tokens, written = Cache(model), prompt[None], []
    for _ in range(12):
        token = model(tokens, cache)[0, -1].argmax(keepdim=True)
        written.append(token)
        tokens = token[None]
    assert torch.equal(generate(model, prompt, 12), torch.cat(written))


@torch.inference_mode()
def test_the_cache_keeps_the_last_characters():
    model = network("linear", depth=1)  # with more, keys know of what has left the cache
    tokens = torch.randint(50, (1, 45))
    cache = Cache(model)
    for token in tokens.split(1, dim=1):
        last = model(token, cache)
    torch.testing.assert_close(last, model(tokens[:, -16:])[:, -1:], rtol=1e-4, atol=1e-4)
    assert len(generate(model, tokens[0], 3)) == 3


def test_only_the_head_stays_float():
    layers = dict(network("deployed").named_modules())
    assert type(layers["lm_head"]) is torch.nn.Linear
    deployed = [its for its in layers.values() if isinstance(its, bitlinear.BitLinear)]
    assert len(deployed) == 8
    assert all(its.is_deployed for its in deployed)


def test_drawn_characters_depend_on_the_seed_alone():
    model, prompt = network("linear"), torch.tensor([3])
    one, again, other = (generate(model, prompt, 20, 1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --------------------------------------------------------------------------------- training


def test_both_networks_learn(finished):
    """By a wide margin: with 20 seeds the losses began at 4.5 to 4.9 and fell by 1.3 to 1.9.

    Each version of Python has its own text, so no closer bound holds on all of them.
    """
    for name in (LINEAR, TERNARY):
        losses = losses_of(finished)[name]
        assert len(losses["train"]) == TINY.steps
        assert [step for step, _ in losses["validation"]] == list(range(8, 81, 8))
        assert losses["train"][0] > 4
        assert losses["validation"][-1][1] < losses["train"][0] - 1
        assert losses["validation"][-1][1] < losses["validation"][0][1]


def test_the_networks_begin_with_the_same_parameters(text):
    one, other = (its.state_dict() for its in char_training.Training(TINY, text).models.values())
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_learning_rates_rise_and_fall():
    shares = [char_training.share_of_rate(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert shares[10] == 1
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0.05 < shares[-1] < 0.06


def test_stopped_and_killed_it_ends_with_the_same_bits(finished, tmp_path, capsys):
    """The same operations on tensors of the same shapes, with one thread: bits of any one CPU."""
    command = [sys.executable, "-m", "scripts.char_lm", *arguments(tmp_path)]
    checkpoint = tmp_path / "checkpoint.pt"

    def saved_step():
        return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0

    def interrupt(number):
        before = saved_step()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while saved_step() == before:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert before < saved_step() < TINY.steps
        return process.returncode, errors

    code, errors = interrupt(signal.SIGTERM)
    assert code == 1
    stopped = f"stopped by SIGTERM after step {saved_step()} of {TINY.steps}: run the same again"
    assert stopped in errors
    code, _ = interrupt(signal.SIGKILL)
    assert code == -signal.SIGKILL

    # As if it had been killed while it was writing.
    (tmp_path / "checkpoint.pt.part").write_bytes(checkpoint.read_bytes()[:1000])
    before = saved_step()
    char_lm.main(arguments(tmp_path))
    assert f"| {before}/{TINY.steps} [" in capsys.readouterr().err
    assert losses_of(tmp_path) == losses_of(finished)


def test_a_signal_is_answered_after_the_step_and_then_no_more(text, tmp_path, monkeypatch):
    advance = char_training.Training.advance

    def interrupted(training):
        if training.step == 2:
            signal.raise_signal(signal.SIGINT)
        advance(training)

    monkeypatch.setattr(char_training.Training, "advance", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="by SIGINT after step 3 of 80"):
        char_training.train(TINY, text, tmp_path / "checkpoint.pt")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_training_does_nothing_more(finished, text, monkeypatch):
    monkeypatch.delattr(char_training.Training, "advance")
    training = char_training.train(TINY, text, finished / "checkpoint.pt")
    assert training.step == TINY.steps
    assert training.curves[TERNARY]["train"] == losses_of(finished)[TERNARY]["train"]


def test_restart_forgets_the_checkpoint(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    char_lm.main([*arguments(tmp_path, replace(TINY, steps=2)), "--restart"])
    assert len(losses_of(tmp_path)[TERNARY]["train"]) == 2


def test_a_checkpoint_of_other_settings_is_refused(finished, capsys):
    with pytest.raises(SystemExit) as end:
        char_lm.main(arguments(finished, replace(TINY, batch=3, ternary_rate=0.5)))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "batch is 4 there and 3 here; ternary_rate is 0.002 there and 0.5 here" in message
    assert "start over with --restart, or name another --out" in message


def test_a_checkpoint_of_another_text_is_refused(finished, text):
    other = text._replace(train=text.train[1:])
    with pytest.raises(UnusableCheckpoint, match=r"digest of the text is \w+ there and \w+ here"):
        char_training.train(TINY, other, finished / "checkpoint.pt")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "other"])
def test_a_damaged_checkpoint_is_refused(damage, finished, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    whole = (finished / "checkpoint.pt").read_bytes()
    half = len(whole) // 2
    contents = {
        "truncated": whole[:half],
        "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
        "empty": b"",
        "text": b"some text",
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    else:
        torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(SystemExit) as end:
        char_lm.main(arguments(tmp_path))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert re.search(r"checkpoint.pt is damaged, or no checkpoint \(.+\): start over", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be above 0, but it is 0"),
        ({"heads": 5}, "width must be a multiple of twice the heads, but it is 32, with 5 heads"),
    ],
)
def test_impossible_settings_are_refused(change, message, tmp_path, capsys):
    given = [f"--{name}={value}" for name, value in change.items()]
    with pytest.raises(SystemExit):
        char_lm.main([*arguments(tmp_path), *given])
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------- results


def test_without_matplotlib_nothing_begins():
    code = (
        "import sys, runpy; sys.modules['matplotlib'] = None; runpy.run_module('scripts.char_lm')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.endswith("pip install 'bitlinear[bench]'\n")


def test_results_are_complete(finished):
    results = results_of(finished)
    assert results["settings"] == asdict(TINY)
    assert {"machine", "versions", "kernel", "threads", "time"} < set(results)
    its = results["networks"]
    assert list(its) == [LINEAR, TERNARY, char_lm.DEPLOYED]
    for name, network in its.items():
        assert network["character"]["median_us"] > network["its_linear_layers"]["median_us"] > 0
        assert len(network["sample"]) == len(char_lm.PROMPT) + char_lm.SAMPLE
        assert network["bits_per_character"] == pytest.approx(network["validation_loss"] / 0.693147)
        assert ("step_s" in network) == (name != char_lm.DEPLOYED)
    weights = TINY.depth * 12 * TINY.width**2
    assert its[LINEAR]["bytes"] == its[TERNARY]["bytes"]
    scales = TINY.depth * 4
    assert its[LINEAR]["bytes"] - its[char_lm.DEPLOYED]["bytes"] == weights * 15 / 4 - 4 * scales


def test_deploying_changes_no_bit(finished):
    results = results_of(finished)
    assert char_lm.same_bits(results)
    results["networks"][char_lm.DEPLOYED]["validation_loss"] += 1e-15
    assert not char_lm.same_bits(results)


def test_the_picture_and_the_table(finished, tmp_path):
    assert (finished / "losses.png").read_bytes().startswith(b"\x89PNG")
    rows = char_lm.table(results_of(finished)).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [LINEAR, TERNARY, char_lm.DEPLOYED]


def test_the_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(SCRIPTS / "char_lm.ipynb", as_version=4)
    nbformat.validate(notebook)
    (cell,) = (its for its in notebook.cells if "parameters" in its.metadata.get("tags", ()))
    cell.source += f"\nsettings, out, budget = {TINY}, Path({str(tmp_path)!r}), {BUDGET}"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": SCRIPTS}}
    )
    client.execute()
    outputs = [output for its in notebook.cells for output in its.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(
        "| BitLinear, deployed" in output.get("data", {}).get("text/markdown", "")
        for output in outputs
    )
