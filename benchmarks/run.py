"""Run the benchmarks: python benchmarks/run.py [--only GLOB] [--providers ...] [--quick] [--out FILE] [--threads N].

Exit code 1 if a provider is wrong or fails, 2 if nothing matched, 3 if time ran out before all cases were run.
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
from plot import draw
from registry import CASES, Case
from runner import FULL, QUICK, Matmul, copy_rate, run_case

from fastflow.training import keep_freed_memory

DEVICE_PROVIDERS = {"cpu": ("cpu", "cosyvoice"), "cuda": ("auto", "cuda", "triton", "graphed", "cosyvoice")}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fastflow's benchmarks", epilog="cases: " + ", ".join(CASES))
    parser.add_argument(
        "--only", metavar="GLOB", help="cases by name; the default leaves out minutes-long ones on a CPU"
    )
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


def default_providers(case: Case, quick: bool, device: str) -> list[str]:
    """All that can run on the device; but compiling a flow for a CPU takes minutes, so that must be asked for."""
    compiles = not quick and (device == "cuda" or not case.flow)
    return ["reference", *(["compile"] if compiles else []), *DEVICE_PROVIDERS[device]]


def choose(only: str | None, quick: bool, device: str) -> list[Case]:
    """The cases to run: those whose name matches, or else all that are not too heavy for the device."""
    if only:
        return [case for case in CASES.values() if fnmatch.fnmatchcase(case.name, only)]
    return [case for case in CASES.values() if (case.quick if quick else device == "cuda" or not case.heavy)]


TABLE_WIDTH = 120  # characters, no less than a table has
HEADS = ("ms (p20-p80)", "/ reference (p20-p80)", "ops", "syncs", "saved MiB", "of matmul", "first call s")


def _cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    ms, ratio = numbers["ms"], numbers["ratio"]
    return (
        f"{ms['median']:.3g} ({ms['p20']:.3g}-{ms['p80']:.3g})",
        f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})",
        *("-" if numbers[key] is None else str(numbers[key]) for key in ("ops", "syncs")),
        f"{numbers['saved_bytes'] / 2**20:.1f}",
        f"{100 * numbers['matmul_share']:.1f}%",
        f"{numbers['first_call_s']:.2f}",
    )


def show(case: dict[str, Any]) -> None:
    """Print one case as a table, and below it who did not run and why.  Plain lines where rich is not installed."""
    title = f"{case['name']}: {case['title']}"
    rows = {name: _cells(numbers) for name, numbers in case["providers"].items() if "ms" in numbers}
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for name, cells in rows.items():
            print(f"  {name}:", ", ".join(f"{cell} {head}" for cell, head in zip(cells, HEADS, strict=True)))
    else:
        grid = Table(title=title, title_justify="left")
        grid.add_column("provider", no_wrap=True)
        for head in HEADS:
            grid.add_column(head, justify="right")
        for name, cells in rows.items():
            grid.add_row(name, *cells)
        Console(width=max(Console().width, TABLE_WIDTH)).print(grid)  # narrower, it would cut the numbers
    for name, numbers in case["providers"].items():
        if numbers["status"] != "ok":
            print(f"  {name} {numbers['status']}: {numbers['reason']}")


class Progress:
    """A progress bar over the cases, or plain lines on stderr where tqdm is not installed."""

    def __init__(self, total: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=total, unit="case", disable=None)

    def tell(self, text: str) -> None:
        if self.bar is None:
            print(text, file=sys.stderr)
        else:
            self.bar.set_description(text)

    def case_done(self) -> None:
        if self.bar is not None:
            self.bar.update()
            self.bar.clear()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def measure(args: argparse.Namespace, cases: list[Case], result: dict[str, Any]) -> None:
    """Run the cases into ``result``, which is written after each, so that an interrupted run keeps what it has."""
    device = torch.device(args.device)
    start = time.monotonic()
    progress = Progress(len(cases))
    for case in cases:
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            result["not_run"].append(case.name)
            continue

        def tell(phase: str, name: str = case.name) -> None:
            progress.tell(f"{name}: {phase}")

        effort = QUICK if args.quick else FULL
        providers = args.providers or default_providers(case, args.quick, args.device)
        measured = run_case(case, providers, device, effort, tell)
        result["cases"].append(measured)
        if "matmul_gflops" in measured:
            result["matmul_gflops"] = max(result["matmul_gflops"], measured["matmul_gflops"]["p80"])
        progress.case_done()
        show(measured)
        if args.out:
            write(result, args.out)
    progress.close()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    cases = choose(args.only, args.quick, args.device)
    if not cases:
        print(f"--only {args.only}: no such case; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result: dict[str, Any] = {
        **describe(device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "quick": args.quick,
        "keeps_freed_memory": keep_freed_memory(),
        "matmul_gflops": Matmul(device)() / 1e9,  # the best of what is seen, in the end
        "copy_gbytes": copy_rate(device) / 1e9,
        "cases": [],
        "not_run": [],
    }
    measure(args, cases, result)
    if args.out:
        write(result, args.out)
        print(f"wrote {args.out}")
        if not args.no_plot:
            for path in draw(result, args.out):
                print(f"wrote {path}")
    bad = [
        f"{case['name']} {name} {numbers['status']}: {numbers['reason']}"
        for case in result["cases"]
        for name, numbers in case["providers"].items()
        if numbers["status"] in ("wrong", "failed")
    ]
    for line in bad:
        print(line, file=sys.stderr)
    if result["not_run"]:
        print(f"not run within {args.minutes:g} minutes: {', '.join(result['not_run'])}", file=sys.stderr)
    return 1 if bad else 3 if result["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
