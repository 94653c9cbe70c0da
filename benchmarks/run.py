"""Run the benchmarks: python benchmarks/run.py [--only GLOB] [--providers ...] [--quick] [--out FILE] [--threads N].

Exit code 1 if a provider is wrong or fails, 2 if nothing matched.
"""

import argparse
import datetime
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import PROVIDERS
from machine import describe
from registry import CASES, Case
from runner import FULL, QUICK, matmul_rate, run_case

DEFAULT_PROVIDERS = {
    "cpu": ("reference", "compile", "cpu", "cosyvoice"),
    "cuda": ("reference", "compile", "cuda", "triton", "cosyvoice"),
}
NUMBERS = {"ops": "ops", "syncs": "syncs", "saved_bytes": "saved MiB", "matmul_share": "of matmul"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fastflow's benchmarks", epilog="cases: " + ", ".join(CASES))
    parser.add_argument("--only", metavar="GLOB", help="cases by name; the default leaves out minutes-long ones on a CPU")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="the reference always runs too")
    parser.add_argument("--quick", action="store_true", help="few rounds, small cases, no torch.compile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here and a picture beside it")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="start no further case after this time; the rest is listed")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args(arguments)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be >= 1, got {args.threads}")
    return args


def choose(only: str | None, quick: bool, device: str) -> list[Case]:
    """The cases to run: those whose name matches, or else all that are not too heavy for the device."""
    if only:
        return [case for case in CASES.values() if fnmatch.fnmatchcase(case.name, only)]
    return [case for case in CASES.values() if (case.quick if quick else device == "cuda" or not case.heavy)]


def table(case: dict[str, Any]) -> Any:
    """A rich table of one case."""
    from rich.table import Table

    grid = Table(title=f"{case['name']}: {case['title']}", title_justify="left")
    grid.add_column("provider")
    for head in ("ms (p20-p80)", "/ reference (p20-p80)", "ops", "syncs", "saved MiB", "of matmul", "first call s"):
        grid.add_column(head, justify="right")
    for name, numbers in case["providers"].items():
        if "ms" not in numbers:
            grid.add_row(name, f"{numbers['status']}: {numbers['reason']}")
            continue
        ms, ratio = numbers["ms"], numbers["ratio"]
        grid.add_row(
            name,
            f"{ms['median']:.3g} ({ms['p20']:.3g}-{ms['p80']:.3g})",
            f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})",
            *("-" if numbers[key] is None else str(numbers[key]) for key in ("ops", "syncs")),
            f"{numbers['saved_bytes'] / 2**20:.1f}",
            f"{100 * numbers['matmul_share']:.1f}%",
            f"{numbers['first_call_s']:.2f}",
        )
    return grid


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        from rich.console import Console
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the benchmarks need rich and tqdm: pip install fastflow[demo]") from error
    args = parse(arguments)
    cases = choose(args.only, args.quick, args.device)
    if not cases:
        print(f"--only {args.only}: no such case; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    providers = args.providers or [p for p in DEFAULT_PROVIDERS[args.device] if not (args.quick and p == "compile")]
    rate = matmul_rate(device)
    result: dict[str, Any] = {
        **describe(device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "quick": args.quick,
        "matmul_gflops": rate / 1e9,
        "cases": [],
        "not_run": [],
    }
    console = Console()
    start = time.monotonic()
    with tqdm(cases, unit="case", disable=None) as bar:
        for case in bar:
            if args.minutes and time.monotonic() - start > 60 * args.minutes:
                result["not_run"].append(case.name)
                continue

            def tell(phase: str, name: str = case.name) -> None:
                bar.set_description(f"{name}: {phase}")

            measured = run_case(case, providers, device, QUICK if args.quick else FULL, rate, tell)
            result["cases"].append(measured)
            bar.clear()
            console.print(table(measured))
            if args.out:  # after every case, so that an interrupted run keeps what it has
                write(result, args.out)
    if result["not_run"]:
        console.print(f"not run within {args.minutes} minutes: {', '.join(result['not_run'])}", highlight=False)
    if args.out:
        write(result, args.out)
        console.print(f"wrote {args.out}", highlight=False)
        if not args.no_plot:
            from plot import plot

            picture = args.out.with_suffix(".png")
            plot(result, picture)
            console.print(f"wrote {picture}", highlight=False)
    bad = [
        f"{case['name']} {name} {numbers['status']}: {numbers['reason']}"
        for case in result["cases"]
        for name, numbers in case["providers"].items()
        if numbers["status"] in ("wrong", "failed")
    ]
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
