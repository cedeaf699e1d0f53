"""Markdown tables of measured rows, and the comparison of two reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alexnet_kernels.bench.roofline import Ceilings
from alexnet_kernels.bench.row import DIRECTIONS, is_ours

Results = Mapping[str, dict[str, Any]]


def best(times: Mapping[str, dict[str, Any]], ours: bool) -> tuple[str, float] | None:
    """(name, seconds) of the fastest of our variants, or of the baselines."""
    valid = {n: t["median"] for n, t in times.items() if "median" in t and is_ours(n) == ours}
    name = min(valid, key=valid.__getitem__, default=None)
    return None if name is None else (name, valid[name])


def ratio(measured: dict[str, Any]) -> float | None:
    """The best baseline's time divided by the best of ours; None if one is missing."""
    mine, other = best(measured["times"], True), best(measured["times"], False)
    return other[1] / mine[1] if mine and other else None


def floor(result: dict[str, Any], measured: dict[str, Any], ceilings: Ceilings) -> float:
    """The least seconds at these rates; for a network, the sum over its layers."""
    parts = measured.get("layers") or [(measured["bytes"], measured["operations"])]
    return sum(ceilings.seconds(nbytes, operations, result["dtype"]) for nbytes, operations in parts)


def measurements(results: Results) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(row, direction, the row's result, the direction's measurement)."""
    for name, result in results.items():
        for direction in DIRECTIONS:
            if direction in result:
                yield name, direction, result, result[direction]


def full_name(name: str, direction: str) -> str:
    return name if name.endswith(direction) else f"{name}, {direction}"


def problems(results: Results) -> list[str]:
    """Wrong values and errors of our variants."""
    found = []
    for name, result in results.items():
        for kind in ("wrong", "errors"):
            found += [f"{name}, {variant}: {why}" for variant, why in result[kind].items() if is_ours(variant)]
    for name, direction, _, measured in measurements(results):
        for variant, timing in measured["times"].items():
            if "error" in timing and is_ours(variant):
                found.append(f"{name}, {variant}, {direction}: {timing['error']}")
    return found


def seconds_text(seconds: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def timing_text(timing: dict[str, Any], cuda: bool) -> str:
    """The median ± half the interquartile range relative to it; * marks a time with launch overhead."""
    spread = (timing["high"] - timing["low"]) / 2 / timing["median"]
    return f"{seconds_text(timing['median'])} ±{spread:.0%}{'*' if cuda and not timing['graph'] else ''}"


def table(results: Results, ceilings: Ceilings | None, cuda: bool) -> list[str]:
    """One line for each row and direction, and below them the wrong values and errors."""
    if not results:
        return []
    variants = [variant for *_, measured in measurements(results) for variant in measured["times"]]
    variants += [variant for result in results.values() for variant in (*result["wrong"], *result["errors"])]
    columns = [variant for variant in dict.fromkeys(variants) if is_ours(variant)]
    lines = [f"| | | {' | '.join([*columns, 'best peer', 'ratio', 'rate', '% of floor'])} |"]
    lines.append("|---|---|" + "---|" * (len(columns) + 4))
    for name, direction, result, measured in measurements(results):
        lines.append(line(name, direction, result, measured, columns, ceilings, cuda))
    notes = [
        (kind, variant, why, name)
        for name, result in results.items()
        for kind, found in (("WRONG", result["wrong"]), ("ERROR", result["errors"]))
        for variant, why in found.items()
    ]
    notes += [
        ("ERROR", variant, timing["error"], f"{name}, {direction}")
        for name, direction, _, measured in measurements(results)
        for variant, timing in measured["times"].items()
        if "error" in timing
    ]
    notes += [
        ("AGREES", variant, f"with eager at atol = rtol = {tolerance:g}", name)
        for name, result in results.items()
        for variant, tolerance in result.get("tolerances", {}).items()
        if is_ours(variant)
    ]
    return [*lines, "", *_bullets(notes)]


def _bullets(notes: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """One line for each (kind, variant, reason), from tuples of (kind, variant, reason, row)."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for *note, row in notes:
        rows.setdefault(tuple(note), []).append(row)  # type: ignore[arg-type]
    lines = [
        f"- {kind} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, {variant}: {why}"
        for (kind, variant, why), names in rows.items()
    ]
    return [*lines, ""] if lines else []


def line(
    name: str,
    direction: str,
    result: dict[str, Any],
    measured: dict[str, Any],
    columns: Sequence[str],
    ceilings: Ceilings | None,
    cuda: bool,
) -> str:
    times = measured["times"]
    mine, other = best(times, True), best(times, False)
    cells = []
    for column in columns:
        timing = times.get(column, {})
        state = "wrong" if column in result["wrong"] else "error" if column in result["errors"] else "-"
        cells.append(timing_text(timing, cuda) if "median" in timing else state)
    cells.append(f"{timing_text(times[other[0]], cuda)} ({other[0]})" if other else "-")
    cells.append(f"{other[1] / mine[1]:.2f}" if mine and other else "-")
    if mine is None:
        cells += ["-", "-"]
    else:
        if result["op"] == "net":
            cells.append(f"{result['batch'] / mine[1]:.3g} images/s")
        elif ceilings and ceilings.by_products(measured["bytes"], measured["operations"], result["dtype"]):
            cells.append(f"{measured['operations'] / mine[1] / 1e9:.3g} GFLOP/s")
        else:
            cells.append(f"{measured['bytes'] / mine[1] / 1e9:.3g} GB/s")
        if measured["cached"]:
            cells.append("in cache")
        else:
            cells.append(f"{100 * floor(result, measured, ceilings) / mine[1]:.0f}" if ceilings else "-")
    return f"| {name} | {'' if name.endswith(direction) else direction} | {' | '.join(cells)} |"


def ceilings_text(ceilings: Ceilings) -> str:
    gemms = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.gemm.items())
    return f"Measured here: copy {ceilings.copy / 1e9:.3g} GB/s (read and written); matrix products, TFLOP/s: {gemms}."


LEGEND = """\
Medians ± half the interquartile range, over interleaved rounds of the variants. **ratio** is the time of the best
baseline ("best peer") divided by the best of ours: above 1, ours is faster. **% of floor** is the least time for the
bytes and operations at the rates measured in the same run (for a network, the sum over its layers), divided by ours;
"in cache" means that the inputs fit in the cache. A variant that computes wrong values is not timed."""


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float = 0.1) -> tuple[list[str], list[str]]:
    """(Markdown lines, the rows that became slower) of two reports of `bench`.

    Changes are relative to the median change of the baselines, which is attributed to the machine. A time is a
    regression if it grew by more than `threshold` and the interquartile ranges do not overlap.
    """
    pairs: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []
    drifts = []
    for section in ("ops", "nets"):
        a, b = before.get(section, {}), after.get(section, {})
        measured_before = {(name, direction): m for name, direction, _, m in measurements(a)}
        for name, direction, _, measured in measurements(b):
            if (name, direction) in measured_before:
                old = measured_before[name, direction]["times"]
                for variant, timing in measured["times"].items():
                    if "median" in timing and "median" in old.get(variant, {}):
                        if is_ours(variant):
                            pairs.append((full_name(name, direction), variant, old[variant], timing))
                        else:
                            drifts.append(timing["median"] / old[variant]["median"])
    drift = statistics.median(drifts) if drifts else 1.0
    lines = [
        f"Baselines take {drift:.2f} times as long as before."
        if drifts
        else "No baseline was measured in both reports."
    ]
    if before.get("machine", {}).get("device") != after.get("machine", {}).get("device"):
        lines.append("The devices differ: the changes below are those of devices and kernels together.")
    lines += ["", "| | variant | before | after | change | |", "|---|---|---|---|---|---|"]
    slower = []
    change: Callable[[Any], float] = lambda pair: pair[3]["median"] / pair[2]["median"] / drift  # noqa: E731
    for pair in sorted(pairs, key=change, reverse=True):
        name, variant, old, new = pair
        apart = new["low"] > old["high"] * drift or new["high"] < old["low"] * drift
        verdict = ""
        if apart and change(pair) > 1 + threshold:
            verdict = "slower"
            slower.append(f"{name}, {variant}")
        elif apart and change(pair) < 1 / (1 + threshold):
            verdict = "faster"
        lines.append(
            f"| {name} | {variant} | {seconds_text(old['median'])} | {seconds_text(new['median'])} "
            f"| {change(pair) - 1:+.0%} | {verdict} |"
        )
    return lines, slower
