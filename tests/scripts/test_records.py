"""Results: the records of a cell, the file and its older schema, the names of machines."""

from __future__ import annotations

import json

import pytest

from scripts.bench import contestants, machine, records, report
from scripts.bench.contestants import KERNEL, LAYER, OTHER, PRODUCT
from scripts.bench.records import Cell
from scripts.bench.timing import Summary
from tests.scripts.times import made_up

CELL = Cell(N=64, K=30, M=4, threads=2, dtype="float32")
ROLES = {
    "ours": KERNEL,
    "fp32": LAYER,
    "int8_dynamic": LAYER,
    "int_mm": PRODUCT,
    "fp8": PRODUCT,
    "undeployed": OTHER,
}


def record_of(**microseconds: float) -> records.Record:
    times = made_up(**microseconds)
    return records.record(CELL, times, roles=ROLES, bounds={"ours": 4e-6}, baseline="fp32")


def test_a_record_has_every_figure_of_a_kernel():
    cell = record_of(ours=10, fp32=40, int8_dynamic=20, int_mm=5, fp8=6, undeployed=1)
    assert (cell["fastest_layer"], cell["fastest_product"]) == ("int8_dynamic", "int_mm")
    assert cell["contestants"]["ours"] == {
        "median_us": 10,
        "p25_us": 9,
        "p75_us": 11,
        "samples": 7,
        "gops": pytest.approx(2 * 4 * 64 * 30 / 10e-6 * 1e-9),
        "gbps": pytest.approx(64 * 8 / 10e-6 * 1e-9),  # 30 weights take 8 bytes
        "share_of_bound": pytest.approx(0.4),
        "speedup_over_fp32": 4,
        "speedup_over_fastest_layer": 2,
        "speedup_over_fastest_product": 0.5,
    }
    assert cell["contestants"]["fp32"]["gbps"] is None
    assert cell["contestants"]["fp32"]["share_of_bound"] is None
    assert cell["contestants"]["undeployed"]["speedup_over_fastest_layer"] == 20
    assert records.lead(cell, "ours") == 2
    assert records.lead(cell, "ours", PRODUCT) == 0.5
    assert records.lead(cell, "absent") is None


def test_a_record_without_alternatives_has_no_speedups():
    cell = record_of(ours=10)
    assert (cell["fastest_layer"], cell["fastest_product"]) == (None, None)
    figures = cell["contestants"]["ours"]
    assert figures["speedup_over_fp32"] is None
    assert figures["speedup_over_fastest_layer"] is None
    assert figures["speedup_over_fastest_product"] is None


@pytest.mark.parametrize(
    ("time", "unsteady"),
    [
        (Summary(10e-6, 9e-6, 11e-6, 100), False),
        (Summary(10e-6, 9e-6, 12e-6, 100), True),
        (Summary(10e-6, 10e-6, 10e-6, 2), True),
    ],
    ids=["steady", "quartiles far apart", "few samples"],
)
def test_unsteady_times_are_marked(time, unsteady):
    figures = records.quartiles(time)
    assert records.is_unsteady(figures) == unsteady
    assert report.marked("10.0", figures) == ("~10.0" if unsteady else "10.0")


def test_one_reason_is_one_entry_of_skipped():
    results = {"skipped": []}
    other = Cell(64, 30, 8, 2, "float32")
    records.note_skipped(results, CELL, {"int_mm": "too small"})
    records.note_skipped(results, other, {"int_mm": "too small", "bf16": "absent"})
    assert [(s["contestant"], s["reason"], len(s["cells"])) for s in results["skipped"]] == [
        ("int_mm", "too small", 2),
        ("bf16", "absent", 1),
    ]


def test_messages_lose_their_paths():
    error = RuntimeError("cannot open /home/somebody/x.cpp, N/A\nmore")
    assert contestants.one_line(error) == "cannot open [path], N/A"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 0}', "schema 0, but this version reads schemas 1 and 2"),
        ("[]", "is not a results file"),
    ],
)
def test_another_file_is_refused(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_a_file_of_schema_1_is_read_without_its_stale_contestant(tmp_path):
    figures = {"p25_us": 1, "p75_us": 1, "samples": 9}
    medians = {"avx2": 10, "fp32": 40, "int_mm": 5, "undeployed": 30}
    results = {
        "schema": 1,
        "contestants": {
            "avx2": {"role": "kernel"},
            "fp32": {"role": "peer"},
            "int_mm": {"role": "peer"},
            "undeployed": {"role": "other"},
        },
        "cells": [
            {
                "fastest_peer": "int_mm",
                "contestants": {
                    name: {**figures, "median_us": median, "speedup_over_fastest_peer": 1}
                    for name, median in medians.items()
                },
            }
        ],
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    read = records.read(path)
    assert (read["baseline"], read["modes"], read["checked"]) == ("fp32", [""], [""])
    roles = {name: kind["role"] for name, kind in read["contestants"].items()}
    assert roles == {"avx2": KERNEL, "fp32": LAYER, "int_mm": PRODUCT}
    (cell,) = read["cells"]
    assert cell["mode"] == ""
    assert list(cell["contestants"]) == ["avx2", "fp32", "int_mm"]
    assert (cell["fastest_layer"], cell["fastest_product"]) == ("fp32", "int_mm")
    ours = cell["contestants"]["avx2"]
    assert ours["speedup_over_fastest_layer"] == ours["speedup_over_fp32"] == 4
    assert ours["speedup_over_fastest_product"] == 0.5
    assert "speedup_over_fastest_peer" not in ours


@pytest.mark.parametrize(
    ("brand", "flags", "numbers", "name"),
    [
        ("AMD EPYC 9R14", {"avx2"}, ("AuthenticAMD", "25", "17"), "AMD EPYC 9R14"),
        (
            "Intel(R) Xeon(R) Processor",
            {"avx512_vnni", "amx_int8"},
            ("GenuineIntel", "6", "143"),
            "Intel Xeon Processor (Sapphire Rapids; family 6 model 143; AMX)",
        ),
        # A hypervisor can show a number that does not fit the flags.
        (
            "Intel(R) Xeon(R) Processor",
            {"avx512_vnni", "amx_int8"},
            ("GenuineIntel", "6", "167"),
            "Intel Xeon Processor (Sapphire Rapids or newer, by its flags; family 6 model 167; "
            "AMX)",
        ),
        ("Imaginary CPU", set(), (), "Imaginary CPU"),
        (
            "Arm 0x41 part 0xd40",
            {"asimd", "i8mm"},
            ("0x41", "8", "0xd40"),
            "Arm 0x41 part 0xd40 (Neoverse V1; family 8 model 0xd40; i8mm)",
        ),
    ],
)
def test_a_generic_brand_gets_a_model_name(brand, flags, numbers, name):
    assert machine.cpu_name(brand, flags, *numbers) == name


def test_a_machine_is_named_after_its_gpu():
    described = {"cpu": "Imaginary CPU", "gpu": {"name": "Imaginary GPU"}}
    assert machine.display_name(described) == "Imaginary GPU"
    assert machine.display_name({"cpu": "Imaginary CPU"}) == "Imaginary CPU"
