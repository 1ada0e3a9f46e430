"""The tables of the README and of the zoo's page, from `bench/results/*.json`: `python -m bench.report`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import record
from graphopt.tools.zoo.build import GROUPS
from graphopt.tools.zoo.inputs import BATCH
from graphopt.tools.zoo.row import SHOWN, TOKENS, Row
from graphopt.tools.zoo.table import totals

README = Path(__file__).parent.parent / "README.md"
PAGES = (README, Path(__file__).parent / "results" / "zoo.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]], note: str) -> str:
    """A table, its first column left-aligned and the others right, with a line under it."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"\n{table}\n\n{note}\n\n"


def machine(result: Mapping[str, dict]) -> str:
    """Where it was measured: a number means nothing without."""
    m = result["machine"]
    return f"{m['processor']}; torch {m['torch']}, transformers {m['transformers']}"


def calls() -> str:
    """Calls in a lowered decoder layer, before and after."""
    result = record.read("models")
    layer, operators = result["calls"]["layer"], result["calls"]["operators"]
    before, after = layer["captured"], layer["lower"]
    work = [side["calls"] - side["views"] for side in (before, after)]
    rows = [
        ("calls of one decoder layer", before["calls"], after["calls"]),
        ("of these, views (no data moved)", before["views"], after["views"]),
        ("of these, work", *work),
        ("ATen operators that a whole step runs", operators["eager"], operators["graphopt"]),
    ]
    note = (
        "One token of the demo's Llama (8 layers, 512 wide, 8 heads on 2, static cache). Before: the "
        "captured graph, and eager. A call of ours may run several ATen operators; the last row counts those."
    )
    return markdown(("", "before", "after"), rows, note)


def models() -> str:
    """The demo's models against eager."""
    result = record.read("models")
    rows = [
        (f"{row['work']}, {row['backend']}", _ms(row["eager"]), _ms(row["ours"]), f"{row['speedup']:.2f}x")
        for row in result["rows"]
    ]
    step = next(r for r in result["rows"] if r["backend"] == "graphopt" and "gigabytes_per_second" in r)
    threads = result["threads"]
    note = (
        f"{machine(result)}; fp32, {threads} thread{'s' if threads > 1 else ''}, {result['clock']}, "
        f"medians of {result['turns']} interleaved turns. The decode step reads "
        f"{result['step_megabytes']:.0f} MB of weights, at {step['gigabytes_per_second']:.1f} GB/s; copying "
        "(reads and writes) runs at "
        f"{result['copy']:.1f} GB/s."
    )
    return markdown(("", "eager", "compiled", "speed-up"), rows, note)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms"


def passes() -> str:
    """What the rewriting costs."""
    result = record.read("passes")
    deepest = max(result["nodes"], key=int)
    times, beside = result["milliseconds"][deepest], (result["dynamo"][deepest], result["capture"][deepest])
    rows = [
        (f"rewriting, per 1000 nodes ({result['rules']} rules)", *_against_mark(result["per_1000_nodes"])),
        ("rewriting, each further identical layer", *_against_mark(result["further_layer"])),
        *((f"{name}, {deepest} layers", f"{ms:.0f} ms", "") for name, ms in times.items()),
        (f"beside it: Dynamo, {deepest} layers", f"{beside[0]} ms", ""),
        (f"beside it: capture, {deepest} layers", f"{beside[1]} ms", ""),
        ("beside it: tracing the rules, once a process", f"{result['first_use']} ms", ""),
    ]
    note = (
        f"{machine(result)}; CPU time, medians of {result['rounds']} rounds; a Llama of {deepest} layers "
        f"({result['nodes'][deepest]} captured nodes). From 4 layers to {deepest} the time grows as nodes "
        f"to the power of {result['growth_exponent']:.2f}. Rewriting is canonicalize, recognise and merge."
    )
    return markdown(("", "time", "mark"), rows, note)


def _against_mark(row: Mapping[str, float]) -> tuple[str, str]:
    sign = "met" if row["met"] else "**missed**"
    return f"{row['milliseconds']:.0f} ms", f"{row['mark']:.0f} ms, {sign}"


def compiled() -> str:
    """Launches and registers of decode steps, for each target."""
    result = record.read("compile")
    targets = list(dict.fromkeys(row["target"] for row in result["rows"]))
    by_model: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        by_model.setdefault(row["model"], {})[row["target"]] = row
    rows = [
        (model, row[targets[0]]["launches_per_layer"], row[targets[0]]["outside"],
         *(f"{row[t]['most_registers']} / {row[t]['most_shared'] / 1024:.0f}" for t in targets))
        for model, row in by_model.items()
    ]  # fmt: skip
    faults = sum(len(row["faults"]) for row in result["rows"])
    note = (
        "Launches are the same for each target. Registers of a thread and kB of shared memory, of the kernel "
        f"that takes most. Spills, local memory or too much shared memory: {faults or 'none'}. A static "
        f"cache of {result['length']}; {result['layers']} layers. Triton {result['triton']}."
    )
    head = ("", "launches a layer", "outside of layers", *targets)
    return markdown(head, rows, note)


def zoo() -> str:
    """What is recognised of every model type in transformers, by the groups of their heads."""
    result = record.read("zoo")
    rows = [Row.from_dict(values) for values in result["rows"]]
    groups = [(group, [row for row in rows if row.group == group]) for group in GROUPS]
    lines = [_zoo_line(group, members) for group, members in groups if members]
    m = result["machine"]
    handed = sum(any(run.handed_back for run in row.runs.values()) for row in rows)
    broken = sum(row.broken is not None for row in rows)
    ways = sorted({way for row in rows for name in row.runs for way in name.split(" / ")})
    note = (
        f"Tiny random models; torch {m['torch']}, transformers {m['transformers']}. Each type is run as "
        f"{', '.join(ways)} (dtype, padding). Right: every graph keeps the accuracy rule against its fp64 "
        f"oracle. Decode: greedy tokens of a padded prompt, {TOKENS} a row, with the type's own cache, are "
        "eager's, and each call keeps the rule. Recognised: of what an eager run counts in the types that "
        "build. "
        f"{broken} types do not build or run in eager; {handed} run as they were written, in part at least."
    )
    head = ("", "types", "build", "right", "decode", "norms", "attentions", "MLPs", "ropes", "expert blocks")
    return markdown(head, [*lines, _zoo_line("all", rows)], note)


def types() -> str:
    """A line for each type of the zoo; under them what came nearest where something is missing."""
    rows = sorted((Row.from_dict(x) for x in record.read("zoo")["rows"]), key=_order)
    head = ("type", "", *SHOWN, "graphs", "unmatched", "right", "greedy tokens")
    lines = [_type_line(row) for row in rows if row.broken is None]
    broken = [f"* `{row.type}` ({row.group}): {_plain(row.broken)}" for row in rows if row.broken is not None]
    missing = [
        "\n".join([f"* `{row.type}`: {', '.join(row.missing())}", *(f"  * {_plain(x)}" for x in row.near())])
        for row in rows
        if row.broken is None and row.missing()
    ]
    parts = ["Recognised of what is there.", "", "Not recognised, with what came nearest:", "", *missing]
    parts += ["", "Not built, or not run in eager:", "", *broken] if broken else []
    return markdown(head, lines, "\n".join(parts))


def _order(row: Row) -> tuple[int, str]:
    return GROUPS.index(row.group), row.type


def _type_line(row: Row) -> tuple[object, ...]:
    fractions = [f"{row.found(what)}/{row.there[what]}" if row.there.get(what) else "" for what in SHOWN]
    graphs = max(run.graphs for run in row.runs.values())
    share = max(sum(run.unmatched.values()) for run in row.runs.values())
    tokens = f"{row.decoded.tokens}/{TOKENS * BATCH}" if row.decoded else ""
    return row.type, row.group, *fractions, graphs, f"{share:.0%}", "yes" if row.right else "no", tokens


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return re.sub(r"([<>*_`|\[\]])", r"\\\1", " ".join(text.split()))


def _zoo_line(name: str, rows: Sequence[Row]) -> tuple[object, ...]:
    found = totals(rows)
    numbers = (found.types, found.built, found.right, found.decoded)
    return name, *numbers, *(_part(*found.kinds[what]) for what in SHOWN)


def _part(found: int, there: int) -> str:
    return f"{found / there:.1%} of {there}" if there else ""


TABLES: Mapping[str, Callable[[], str]] = {
    "calls": calls,
    "models": models,
    "passes": passes,
    "compiled": compiled,
    "zoo": zoo,
    "types": types,
}


def fill(text: str) -> str:
    """The text with every `<!-- table: name -->` ... `<!-- end -->` filled anew.

    Raises KeyError for a name that is not in `TABLES`.
    """
    return MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> None:
    """Rewrite the tables of all pages."""
    for page in PAGES:
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
