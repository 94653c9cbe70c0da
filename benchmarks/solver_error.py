"""How far the solvers are from the solution, for the same number of evaluations of the estimator.

``python benchmarks/solver_error.py`` trains the small flow of ``fastflow demo`` (or loads it, see --model), synthesises
the demo's sentence by every method and schedule, and compares the mel with that of 100 steps of the midpoint rule: mean
absolute difference of the log-mel behind the prompt, in natural log units.  It prints a table, and writes
``solver-error-<date>.json`` and a picture beside the other results.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from machine import describe

from fastflow import demo
from fastflow.config import PRESETS

EVALUATIONS = (4, 6, 8, 10, 12, 16, 20)  # 4, 6, 8 and 10 steps of one or two evaluations, and what lies between
REFERENCE = {"n_timesteps": 100, "method": "midpoint", "schedule": "cosine"}
CHECK = {"n_timesteps": 200, "method": "midpoint", "schedule": "linear"}  # how right the reference is
METHODS = {"euler": 1, "ab2": 1, "midpoint": 2}  # evaluations of a step
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": "cosine"},
    "sway -0.5": {"schedule": "sway", "sway_coefficient": -0.5},
    "linear": {"schedule": "linear"},
}


def trained(args: argparse.Namespace) -> tuple[Any, demo.Utterance]:
    """The demo's flow and utterance; ``args.model`` is read if it exists, and else written."""
    device = torch.device("cpu")
    (arm, _), utterance = demo.build(args.preset, demo.SPEECH, args.seed, device, args.steps)
    if args.model and args.model.exists():
        arm.flow.load_state_dict(torch.load(args.model, weights_only=True))
    else:
        demo.train([arm], utterance, args.steps, args.seed)
        if args.model:
            torch.save(arm.flow.state_dict(), args.model)
    return arm.flow, utterance


def measure(flow: Any, utterance: demo.Utterance, seed: int) -> dict[str, Any]:
    """Errors by method, schedule and evaluations; the noise is the same in every call."""
    from tqdm import tqdm

    def mel(**options: Any) -> Tensor:
        return demo.synthesise(flow, utterance, torch.device("cpu"), seed, **options)

    prompt = utterance.frames(int(demo.PROMPT * utterance.token_rate))

    def distance(a: Tensor, b: Tensor) -> float:
        return (a - b)[prompt:].abs().mean().item()

    truth = mel(**REFERENCE)
    errors = {}
    cases = [(method, schedule) for method in METHODS for schedule in SCHEDULES]
    for method, schedule in tqdm(cases, desc="solving", unit="row", dynamic_ncols=True):
        for evaluations in EVALUATIONS:
            steps = evaluations // METHODS[method]
            found = mel(n_timesteps=steps, method=method, **SCHEDULES[schedule])
            errors[f"{method}, {schedule}, {evaluations}"] = distance(found, truth)
    return {"errors": errors, "reference_error": distance(mel(**CHECK), truth), "target": demo.l1(truth, utterance)}


def table(errors: dict[str, float]) -> str:
    """Markdown, the least error of each column in bold."""
    rows = [(method, schedule) for method in METHODS for schedule in SCHEDULES]
    best = {n: min(errors[f"{m}, {s}, {n}"] for m, s in rows) for n in EVALUATIONS}
    lines = [
        f"| evaluations | {' | '.join(map(str, EVALUATIONS))} |",
        f"|---|{'---|' * len(EVALUATIONS)}",
    ]
    for method, schedule in rows:
        values = [(errors[f"{method}, {schedule}, {n}"], best[n]) for n in EVALUATIONS]
        cells = [f"**{value:.3f}**" if value == least else f"{value:.3f}" for value, least in values]
        lines.append(f"| {method}, {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    for method, colour in zip(METHODS, ("tab:red", "tab:blue", "tab:green"), strict=True):
        for schedule, style in zip(SCHEDULES, ("-", "--", ":"), strict=True):
            values = [result["errors"][f"{method}, {schedule}, {n}"] for n in EVALUATIONS]
            axis.loglog(
                EVALUATIONS, values, style, marker="o", markersize=4, color=colour, label=f"{method}, {schedule}"
            )
    axis.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS], minor=False)
    axis.minorticks_off()
    axis.set(xlabel="evaluations of the estimator", ylabel="error of the log-mel (mean absolute)")
    axis.set_title(f"Distance from the solution, preset {result['preset']} of the demo", fontsize=11)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="as of fastflow demo (default tiny)")
    parser.add_argument("--steps", type=int, default=demo.STEPS, help=f"training steps (default {demo.STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default 0)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="read the weights if it exists, else write them")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="where to write (benchmarks/results)")
    args = parser.parse_args()
    demo.check_requirements()

    flow, utterance = trained(args)
    today = datetime.date.today().isoformat()
    result = {"preset": args.preset, "steps": args.steps, "seed": args.seed, "date": today, "reference": REFERENCE}
    result["command"] = (
        f"python benchmarks/solver_error.py --preset {args.preset} --steps {args.steps} --seed {args.seed}"
    )
    result |= measure(flow, utterance, args.seed) | describe(torch.device("cpu"))
    print(table(result["errors"]))
    print(
        f"error of the reference itself {result['reference_error']:.5f}, its L1 from the target {result['target']:.3f}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"solver-error-{args.preset}-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(path.with_suffix(".png"), result)
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
