"""Plots of a report of `alexnet-kernels bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alexnet_kernels.bench import tables
from alexnet_kernels.bench.roofline import Ceilings, ceilings

OURS, BASELINE, LINE = "#1f77b4", "#999999", "#333333"


def draw(report: dict[str, Any], prefix: Path) -> list[Path]:
    """Writes PREFIX_ratios.png, PREFIX_roofline.png and PREFIX_throughput.png, where the report has rows for them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    found = ceilings(report["ceilings"])
    for name, figure in (
        ("ratios", _ratios(pyplot, report)),
        ("roofline", _roofline(pyplot, report, found) if found else None),
        ("throughput", _throughput(pyplot, report)),
    ):
        if figure is not None:
            path = prefix.with_name(f"{prefix.name}_{name}.png")
            figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)
            written.append(path)
    return written


def _ratios(pyplot: Any, report: dict[str, Any]) -> Any:
    """The speed-up over the best baseline at the largest batch: one panel for networks and one for each op."""
    families: dict[str, list[tuple[str, float]]] = {}
    for section in ("nets", "ops"):
        rows = list(tables.measurements(report[section]))
        largest = max((result["batch"] for _, _, result, _ in rows), default=0)
        for name, direction, result, measured in rows:
            value = tables.ratio(measured)
            if value is not None and (direction == "step" or result["batch"] == largest):
                family = "networks" if section == "nets" else result["op"]
                label = tables.full_name(name, direction).removeprefix(f"{result['op']}, ")
                families.setdefault(family, []).append((label.replace(f", batch {largest}", ""), value))
    if not families:
        return None
    columns: list[list[str]] = [[], []]  # families, balanced by the number of bars
    lengths = [0, 0]
    for family, bars in families.items():
        shorter = lengths.index(min(lengths))
        columns[shorter].append(family)
        lengths[shorter] += len(bars) + 4
    width = 2 if columns[1] else 1
    figure = pyplot.figure(figsize=(7 * width, 1 + 0.19 * max(lengths)), layout="constrained")
    for part, names in zip(figure.subfigures(1, width, squeeze=False)[0], columns, strict=False):
        heights = [len(families[name]) + 3 for name in names]
        grid = part.subplots(len(names), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes, name in zip(grid[:, 0], names, strict=True):
            _bars(axes, name, sorted(families[name], key=lambda bar: bar[1]))
    figure.suptitle(f"best baseline's time / this package's, {_title(report)}")
    return figure


def _bars(axes: Any, title: str, bars: list[tuple[str, float]]) -> None:
    places = range(len(bars))
    axes.barh(places, [value for _, value in bars], color=[OURS if value >= 1 else BASELINE for _, value in bars])
    axes.set_yticks(places, [label for label, _ in bars], fontsize=7)
    beside = {"xytext": (2, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
    for place, (_, value) in zip(places, bars, strict=True):
        axes.annotate(f"{value:.3g}", (value, place), **beside)
    axes.set_xscale("log")
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    axes.axvline(1, color=LINE, linewidth=1)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_title(title, fontsize=9)


def _roofline(pyplot: Any, report: dict[str, Any], found: Ceilings) -> Any:
    """Operations per second against operations per byte, below the measured rates of the device."""
    points: list[tuple[str, float, float]] = []
    for _, _, result, measured in tables.measurements(report["ops"]):
        fastest = tables.best(measured["times"], True)
        if fastest and measured["operations"] and not measured["cached"]:
            x, y = measured["operations"] / measured["bytes"], measured["operations"] / fastest[1]
            points.append((result["dtype"], x, y))
    if not points:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    xs = [10**exponent for exponent in (-0.5, 0, 1, 2, 3, 3.5)]
    dtypes = dict.fromkeys(dtype for dtype, _, _ in points)
    for dtype, color in zip(dtypes, ("#1f77b4", "#d62728", "#2ca02c"), strict=False):
        peak = found.product(dtype)
        knee = peak / found.copy
        line = sorted([*xs, knee])
        label = f"{dtype}: copy and GEMM, measured"
        axes.plot(line, [min(peak, x * found.copy) for x in line], color=color, label=label)
        mine = [(x, y) for name, x, y in points if name == dtype]
        axes.scatter([x for x, _ in mine], [y for _, y in mine], s=12, color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second")
    axes.legend(fontsize=8)
    axes.set_title(f"convolutions and fully-connected layers, {_title(report)}")
    return figure


def _throughput(pyplot: Any, report: dict[str, Any]) -> Any:
    """Images per second against the batch, ours and the best baseline's, for networks measured at several batches.

    One panel for each dtype, memory format and purpose; a preset has the same colour in all panels.
    """
    panels: dict[str, dict[str, list[tuple[int, float, float | None]]]] = {}
    for name, direction, result, measured in tables.measurements(report["nets"]):
        mine, other = (tables.best(measured["times"], ours) for ours in (True, False))
        if mine:
            batch = result["batch"]
            preset, _, layout = name.partition(", batch")[0].partition(", ")
            lines = panels.setdefault(f"{layout}, {direction}", {})
            lines.setdefault(preset, []).append((batch, batch / mine[1], batch / other[1] if other else None))
    for lines in panels.values():
        for preset in [preset for preset, points in lines.items() if len(points) < 2]:
            del lines[preset]
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    columns = min(2, len(panels))
    shape = -(-len(panels) // columns), columns
    figure, grid = pyplot.subplots(*shape, figsize=(5 * columns, 3.5 * shape[0]), squeeze=False, layout="constrained")
    colors = {
        preset: f"C{i % 10}" for i, preset in enumerate(dict.fromkeys(p for lines in panels.values() for p in lines))
    }
    legend = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for preset, points in lines.items():
            points.sort()
            batches = [batch for batch, _, _ in points]
            legend[preset] = axes.plot(batches, [ours for _, ours, _ in points], color=colors[preset], marker="o")[0]
            others = [(batch, rate) for batch, _, rate in points if rate]
            if others:
                axes.plot(*zip(*others, strict=True), color=colors[preset], marker=".", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("batch")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supylabel("images per second (dotted: the best baseline)")
    figure.suptitle(_title(report))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _title(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['device']}, torch {machine['torch']}"
