"""Pictures of a result file: time, compute ops and saved bytes of every provider, relative to the reference; and a
roofline (Williams, Waterman, Patterson 2009), how near each comes to what the machine can do at best.

python benchmarks/plot.py FILE.json... draws FILE.png and FILE-roofline.png beside each.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

PANELS = (("time", "ratio"), ("compute ops", "ops"), ("bytes saved for backward", "saved_bytes"))
COLOURS = {
    "compile": "tab:orange",
    "auto": "tab:cyan",
    "cpu": "tab:blue",
    "cuda": "tab:green",
    "triton": "tab:purple",
    "graphed": "navy",
    "none": "tab:olive",
    "selective": "tab:pink",
    "block": "tab:brown",
    "cosyvoice": "tab:red",
}


def _relative(case: dict[str, Any], provider: str, key: str) -> tuple[float, float, float] | None:
    """Value and whisker ends relative to the reference; None where there is nothing to show."""
    numbers, reference = case["providers"][provider], case["providers"]["reference"]
    if key == "ratio":
        ratio = numbers.get("ratio")
        return (ratio["median"], ratio["p20"], ratio["p80"]) if ratio else None
    if numbers.get(key) is None or not reference.get(key):
        return None
    return (numbers[key] / reference[key],) * 3


def _pyplot() -> Any:
    """Matplotlib's, without a screen; an ImportError says what to install."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install fastflow[demo]; --no-plot does without") from error
    return plt


def _origin(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    commit = (result["commit"] or "unknown")[:8] + (", modified" if result["dirty"] else "")
    return (
        f"{machine['name']}, {machine['threads']} threads, torch {versions['torch']}, commit {commit}, {result['date']}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the cases of a result file to a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    cases = [case for case in result["cases"] if "ratio" in case["providers"]["reference"]]
    providers = [p for p in COLOURS if any("ratio" in case["providers"].get(p, {}) for case in cases)]
    height = 1.8 + 0.16 * (len(providers) + 1) * len(cases)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, height), sharey=True, constrained_layout=True)
    for panel, (title, key) in zip(axes, PANELS, strict=True):
        for i, case in enumerate(cases):
            for j, provider in enumerate(providers):
                shown = _relative(case, provider, key) if provider in case["providers"] else None
                if shown is None:
                    continue
                y = i + 0.8 * ((j + 0.5) / len(providers) - 0.5)
                value, low, high = shown
                panel.barh(y, value, 0.8 / len(providers), color=COLOURS[provider])
                if high > low:
                    panel.plot([low, high], [y, y], color="black", linewidth=0.8)
                panel.text(max(value, high), y, f" {value:.2f}", va="center", fontsize=7)
        panel.axvline(1, color="0.5", linewidth=1.5)
        panel.set_xlim(0, 1.15 * max(1.0, panel.get_xlim()[1]))
        panel.set_title(f"{title} / reference (less is better)", fontsize=9)
    axes[0].set_yticks(range(len(cases)), [f"{case['name']}\n{case['title']}" for case in cases], fontsize=7)
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[provider]) for provider in providers]
    figure.legend(handles, providers, fontsize=8, loc="outside lower center", ncols=len(providers))
    figure.suptitle(_origin(result), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def roofline(result: dict[str, Any], path: Path) -> None:
    """Draw FLOP/s over FLOP per byte that the ops move, below the rates of a matrix product and of a copy.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    colours = {"reference": "0.5", **COLOURS}
    figure, axes = plt.subplots(figsize=(8, 5.5), constrained_layout=True)
    ridge = result["matmul_gflops"] / result["copy_gbytes"]
    shown, reached = set(), [ridge]
    for marker, case in zip(itertools.cycle("osD^vP*X<>ph"), result["cases"], strict=False):
        axes.scatter([], [], marker=marker, color="0.3", label=case["name"])
        for provider, numbers in case["providers"].items():
            if "ms" not in numbers or not numbers.get("flops") or not numbers.get("bytes"):
                continue
            intensity, rate = numbers["flops"] / numbers["bytes"], numbers["flops"] / numbers["ms"]["median"] / 1e6
            axes.scatter(intensity, rate, marker=marker, color=colours[provider], s=40)
            shown.add(provider)
            reached.append(intensity)
    x = [min(reached) / 4, ridge, max(reached) * 4]
    axes.plot(x, [min(result["matmul_gflops"], result["copy_gbytes"] * i) for i in x], color="black", linewidth=1)
    for provider in (p for p in colours if p in shown):
        axes.scatter([], [], marker="s", color=colours[provider], label=provider)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that the ops move", ylabel="GFLOP/s")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=7)
    roof = f"roof: a matrix product's {result['matmul_gflops']:.0f} GFLOP/s, a copy's {result['copy_gbytes']:.1f} GB/s"
    axes.set_title(f"{_origin(result)}\n{roof}", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(result: dict[str, Any], file: Path) -> list[Path]:
    """Both pictures beside the result file; of an older one, which does not count bytes, the first only."""
    drawers = {file.with_suffix(".png"): plot}
    if "copy_gbytes" in result:
        drawers[file.with_name(f"{file.stem}-roofline.png")] = roofline
    for path, drawer in drawers.items():
        drawer(result, path)
    return list(drawers)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        draw(json.loads(Path(argument).read_text()), Path(argument))
