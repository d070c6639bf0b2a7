"""The pictures of the benchmark, from made-up results."""

from __future__ import annotations

import copy
import re

import pytest

pytest.importorskip("matplotlib")

from hypothesis import given
from hypothesis import strategies as st

from scripts.bench import charts, pictures, plot, records
from scripts.bench.contestants import KERNEL, LAYER, OTHER, PRODUCT
from scripts.bench.records import Cell
from scripts.bench.timing import Summary

MEDIANS = {"avx2": 10e-6, "scalar": 90e-6, "fp32": 40e-6, "int_mm": 20e-6, "undeployed": 3e-3}
ROLES = {"avx2": KERNEL, "scalar": KERNEL, "fp32": LAYER, "int_mm": PRODUCT, "undeployed": OTHER}


def results_of(shapes, tokens, threads):
    """Results in which a call takes M / threads times what ``MEDIANS`` says."""
    cells = []
    for (N, K), M, T in ((s, m, t) for s in shapes for t in threads for m in tokens):
        times = {
            name: Summary(median * M / T, median * M / T * 0.9, median * M / T * 1.1, 5)
            for name, median in MEDIANS.items()
        }
        # As for a shape that int_mm does not support.
        if M == 1:
            del times["int_mm"]
        cell = Cell(N, K, M, T, "float32")
        bounds = {"avx2": 1e-6}
        cells.append(records.record(cell, times, roles=ROLES, bounds=bounds, baseline="fp32"))
    return {
        "schema": records.SCHEMA,
        "time": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "Imaginary(R) CPU"},
        "versions": {"bitlinear": "0.1.0", "torch": "2.13.0"},
        "chosen_kernel": "avx2",
        "baseline": "fp32",
        "modes": [""],
        "contestants": {
            name: {"role": role, "label": f"label of {name}", "note": ""}
            for name, role in ROLES.items()
        },
        "peaks": [{"threads": 2, "read": [], "multiply_add_gops": {"avx2": 500.0}}],
        "cells": cells,
    }


SHAPES = [(64, 64), (128, 256)]


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Return a function that writes results to a file; their pictures are coarse, and so fast."""
    monkeypatch.setitem(charts.STYLE, "savefig.dpi", 30)

    def save(results):
        path = tmp_path / "name.json"
        records.write(path, results)
        return path

    return save


def texts(figure):
    """Return all text on a figure."""
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text() for artist in found)


def test_every_picture_is_drawn(saved, tmp_path, capsys):
    path = saved(results_of(SHAPES, [32, 1, 4], [1, 2, 4]))
    plot.main([str(path), "--output-dir", str(tmp_path / "pictures")])
    names = {"latency", "throughput", "speedup", "memory", "threads"}
    files = {tmp_path / "pictures" / f"name-{name}.png" for name in names}
    assert set((tmp_path / "pictures").iterdir()) == files
    assert set(capsys.readouterr().out.splitlines()) == set(map(str, files))
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_one_cell_is_enough(saved, tmp_path):
    path = saved(results_of([(64, 64)], [1], [2]))
    plot.main([str(path)])
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {f"name-{name}.png" for name in ("latency", "throughput", "speedup", "memory")}


def test_pictures_name_machine_versions_date_and_axes():
    results = results_of(SHAPES, [1, 4], [1, 2])
    for figure in (pictures.latency(results, (64, 64), 2), pictures.speedup(results, 2)):
        for part in ("Imaginary CPU", "2 threads", "torch 2.13.0", "2026-01-02"):
            assert part in texts(figure)
        assert "outputs x inputs" in texts(figure)


def test_lines_are_labelled_and_ours_is_on_top():
    results = results_of(SHAPES, [1, 4], [2])
    figure = pictures.throughput(results, (64, 64), 2)
    assert all(f"label of {name}" in texts(figure) for name in MEDIANS)
    assert "peak of multiply-adds" in texts(figure)
    *_, ours, peak = figure.axes[0].get_lines()
    assert ours.get_color() == charts.EMPHASIS
    assert list(ours.get_xdata()) == [1, 4]
    gops = 2 * 64 * 64 / (MEDIANS["avx2"] / 2) * 1e-9
    assert list(ours.get_ydata()) == pytest.approx([gops, gops], rel=1e-4)
    assert set(peak.get_ydata()) == {500}


def test_the_heat_maps_tell_complete_layers_from_bare_products():
    figure = pictures.speedup(results_of(SHAPES, [1, 4], [2]), 2)
    over_fp32, over_layer, over_product = figure.axes
    assert [label.get_text() for label in over_fp32.get_yticklabels()] == ["64 x 64", "128 x 256"]
    assert [text.get_text() for text in over_fp32.texts] == ["4.0"] * 4
    assert over_layer.get_title(loc="left") == "over the fastest complete layer (label of fp32)"
    assert [text.get_text() for text in over_layer.texts] == ["4.0"] * 4
    assert over_product.get_title(loc="left") == (
        "over the fastest bare product, which quantises nothing (label of int_mm)"
    )
    assert [text.get_text() for text in over_product.texts] == ["", "2.0"] * 2


def test_unsteady_times_are_marked():
    results = results_of([(64, 64)], [1, 4], [2])
    results["cells"][1]["contestants"]["fp32"]["p75_us"] *= 2
    over_fp32, over_layer, over_product = pictures.speedup(results, 2).axes
    assert [text.get_text() for text in over_fp32.texts] == ["4.0", "~4.0"]
    assert [text.get_text() for text in over_layer.texts] == ["4.0", "~4.0"]
    assert [text.get_text() for text in over_product.texts] == ["", "2.0"]
    figure = pictures.latency(results, (64, 64), 2)
    hollow = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[4]]


def test_scaling_is_relative_to_the_fewest_threads():
    figure = pictures.scaling(results_of(SHAPES, [1], [2, 4]), (64, 64))
    ours, ideal = figure.axes[1].get_lines()
    assert list(ours.get_ydata()) == pytest.approx([1, 2], rel=1e-4)
    assert list(ideal.get_ydata()) == [1, 2]
    assert "speed-up over 2 threads" in texts(figure)


def test_the_memory_is_the_bytes_of_a_state_dict():
    assert pictures.weight_bytes([(3, 8, 10)]) == {
        "nn.Linear fp32": 3 * 8 * 10 * 4,
        "nn.Linear bf16": 3 * 8 * 10 * 2,
        "BitLinear, deployed": 3 * (8 * 3 + 4),
    }
    parameters = sum(count * N * K for count, N, K in pictures.BLOCK) * pictures.BLOCKS
    assert parameters == 1_233_125_376


# No subnormals: a library that was built with fast-math may have switched them off.
@given(
    st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=12), st.floats(0.01, 0.2)
)
def test_labels_are_moved_apart_and_keep_their_order(wanted, gap):
    positions = charts.spread(wanted, gap)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    moved = [positions[index] for index in order]
    assert all(b - a >= gap - 1e-9 for a, b in zip(moved, moved[1:]))
    # Nothing is moved as a whole.
    assert sum(positions) == pytest.approx(sum(wanted))


def test_labels_that_have_room_stay_where_they_are():
    assert charts.spread([0.9, 0.1, 0.5], 0.2) == pytest.approx([0.9, 0.1, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99, but this version reads schemas 1 and 2"),
        ({"chosen_kernel": "absent"}, "no times of absent, the chosen kernel"),
        ({"cells": []}, "no times of avx2"),
    ],
)
def test_unusable_results_are_refused(change, message, saved, capsys):
    path = saved({**results_of([(64, 64)], [1], [2]), **change})
    with pytest.raises(SystemExit) as end:
        plot.main([str(path)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "32x32"], "--shape: .* has no 32 x 32"),
        (["--mode", "warm"], "--mode: .* has no results of warm"),
        (["--threads", "7"], "--threads: .* has no results on 7 threads"),
    ],
)
def test_results_that_are_missing_are_named(arguments, message, saved, capsys):
    path = saved(results_of([(64, 64)], [1], [2]))
    with pytest.raises(SystemExit):
        plot.main([str(path), *arguments])
    assert re.search(message, capsys.readouterr().err)


def gpu_results():
    """Return results of a GPU, on which warm weights halve every time."""
    results = results_of([(64, 64), (4096, 4096)], [1, 4], [2])
    cells = []
    for mode, share in (("cold", 1), ("warm", 2)):
        for cell in copy.deepcopy(results["cells"]):
            cell["contestants"]["bf16"] = cell["contestants"].pop("fp32")
            cell["fastest_layer"] = "bf16"
            for figures in cell["contestants"].values():
                figures["median_us"] /= share
                figures["gops"] *= share
                figures["speedup_over_bf16"] = figures.pop("speedup_over_fp32")
                figures["share_of_bound"] = None if share > 1 else figures["share_of_bound"]
            cells.append({**cell, "mode": mode})
    results["contestants"]["bf16"] = results["contestants"].pop("fp32")
    return {
        **results,
        "machine": {"cpu": "Imaginary(R) CPU", "gpu": {"name": "Imaginary GPU"}},
        "baseline": "bf16",
        "modes": ["cold", "warm"],
        "cells": cells,
    }


def test_pictures_of_a_gpu_show_one_mode(saved, tmp_path):
    path = saved(gpu_results())
    plot.main([str(path)])
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {f"name-{name}.png" for name in ("latency", "throughput", "speedup", "memory")}

    cold, warm = (records.of_mode(gpu_results(), mode) for mode in ("cold", "warm"))
    figure = pictures.latency(cold, (64, 64), 2)
    assert "Imaginary GPU" in texts(figure)
    assert "weights from memory" in texts(figure)
    assert "thread" not in texts(figure)
    *_, ours, bound = figure.axes[0].get_lines()
    assert list(ours.get_ydata()) == [5, 20]
    assert list(bound.get_ydata()) == pytest.approx([1, 1])
    figure = pictures.latency(warm, (64, 64), 2)
    assert "weights from the L2" in texts(figure)
    assert "bound" not in texts(figure)
    assert list(figure.axes[0].get_lines()[-1].get_ydata()) == [2.5, 10]

    assert "Top/s" in texts(pictures.throughput(cold, (64, 64), 2))
    over_bf16, *_ = pictures.speedup(cold, 2).axes
    assert over_bf16.get_title(loc="left") == "over nn.Linear bf16"
    assert [text.get_text() for text in over_bf16.texts] == ["4.0"] * 4


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "absent.json")])
    assert "absent.json" in capsys.readouterr().err
