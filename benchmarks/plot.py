"""One picture of a result file: time, compute ops and saved bytes of every provider, relative to the reference.

python benchmarks/plot.py FILE.json... draws FILE.png beside each.
"""

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


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the cases of a result file to a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install fastflow[demo]; --no-plot does without") from error
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
    machine, versions = result["machine"], result["versions"]
    commit = (result["commit"] or "unknown")[:8] + (", modified" if result["dirty"] else "")
    figure.suptitle(
        f"{machine['name']}, {machine['threads']} threads, torch {versions['torch']}, commit {commit}, "
        f"{result['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        plot(json.loads(Path(argument).read_text()), Path(argument).with_suffix(".png"))
