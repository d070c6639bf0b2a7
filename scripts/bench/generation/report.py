"""The report of generation, in Markdown; ``picture.py`` draws it."""

from __future__ import annotations

from scripts.bench import machine, records, report
from scripts.bench.generation import breakdown, measure, memory
from scripts.bench.records import Record

# The contestants that ratios refer to, if they took part, with the heading of the column.
REFERENCES = {"bf16": "over bf16", "llama_q6_k": "over llama.cpp"}

EXPLANATION = f"""\
ms, p25, p75: quartiles of a pass: of a prompt until its first token, or of one more token of every
  sequence. {report.UNSTEADY} marks a median whose quartiles are more than
  {records.UNSTEADY_SPREAD:.0%} of it apart, or that comes from less than three samples.
tokens/s: of all sequences together.
of floor: the time in which this machine reads the weights and the cache once, over the median.
over: how many times as fast.
peak memory: of a process that generates {memory.TOKENS} tokens after {memory.PROMPT}, pages of
  mapped files included. It loads BitLinear's models with from_pretrained, after another process
  has saved them, and llama.cpp's from its file. It makes the other models itself.
before the model: the part of Python and its modules."""


def render(results: Record) -> str:
    """Return everything that was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    sizes = results["model"]
    heading = [
        f"{machine.display_name(results['machine'])}, "
        f"{report.plural(results['machine']['threads'], 'thread')}",
        f"shape {sizes['shape']}: {sizes['num_hidden_layers']} layers, {sizes['hidden_size']} x "
        f"{sizes['intermediate_size']}, vocabulary {sizes['vocab_size']}; "
        f"kernel: {results['chosen_kernel']}",
        versions,
    ]
    if results["read"]:
        heading.append(f"reading memory: {results['read'][-1]['gbps']:.0f} GB/s")
    parts = ["  \n".join(heading), _times(results), EXPLANATION, _contestants(results)]
    return "\n\n".join([*parts, *_notes(results)])


def _times(results: Record) -> str:
    labels = {
        name: f"**{kind['label']}**" if kind["ours"] else kind["label"]
        for name, kind in results["contestants"].items()
    }
    present = {key: text for key, text in REFERENCES.items() if key in labels}
    words = ("phase", "contestant")
    header = (
        "phase", "length", "batch", "contestant", "ms", "p25", "p75", "tokens/s", "of floor",
        *present.values(),
    )  # fmt: skip
    rows = []
    for cell in results["cells"]:
        for name, figures in cell["contestants"].items():
            share = figures["share_of_floor"]
            times = [f"{figures[key] / 1e3:.4g}" for key in ("median_us", "p25_us", "p75_us")]
            rows.append(
                (
                    cell["phase"],
                    str(cell["length"]),
                    str(cell["batch"]),
                    labels[name],
                    report.marked(times[0], figures),
                    *times[1:],
                    f"{figures['tokens_per_s']:.4g}",
                    "" if share is None else f"{share:.0%}",
                    *(_ratio(cell, name, reference) for reference in present),
                )
            )
    return report.markdown(header, rows, words=words)


def _ratio(cell: Record, name: str, reference: str) -> str:
    ours, other = cell["contestants"][name], cell["contestants"].get(reference)
    if other is None:
        return ""
    return report.marked(f"{other['median_us'] / ours['median_us']:.2f}x", ours, other)


def _contestants(results: Record) -> str:
    """Return the bytes of each contestant, and the parts of its token."""
    header = (
        "contestant", "a token reads", "peak memory", "before the model", "of a GPU",
        *(f"{part}, ms" for part in breakdown.PARTS),
    )  # fmt: skip
    rows = []
    for kind in results["contestants"].values():
        memory = kind["memory"] or {}
        us = (kind["parts"] or {}).get("us", {})
        rows.append(
            (
                kind["label"],
                _gigabytes(kind["token_bytes"]),
                *(_gigabytes(memory.get(f"{key}_bytes")) for key in ("peak", "before", "gpu_peak")),
                *(f"{us[part] / 1e3:.3g}" if us else "" for part in breakdown.PARTS),
            )
        )
    return report.markdown(header, rows, words=("contestant",))


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def _notes(results: Record) -> list[str]:
    kinds = results["contestants"].values()
    lines = [f"{kind['label']}: {kind['note']}" for kind in kinds if kind["note"]]
    for skipped in results["skipped"]:
        cells = skipped["cells"]
        where = f" in {'; '.join(map(measure.title, cells))}" if cells else ""
        lines.append(f"skipped: {skipped['contestant']}{where}: {skipped['reason']}")
    if not results["complete"]:
        lines.append(f"interrupted after {report.plural(len(results['cells']), 'cell')}")
    return lines
