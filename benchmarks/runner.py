"""Check, count and time one case, in this order: a provider that is wrong gets no time."""

import itertools
import math
import re
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jobs import Results, Step, UnavailableError, seed
from registry import Case, Job

from fastflow.testing.counters import Counts, SavedTensors, count_cuda_syncs

MIN_SAMPLE_S = 0.005  # shorter steps are repeated within one sample
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds within the given bounds, as many as fit in ``seconds`` per case."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = Effort(seconds=20, min_rounds=7, max_rounds=51)
QUICK = Effort(seconds=2, min_rounds=3, max_rounds=11)


def _time(step: Step, loops: int, device: torch.device) -> float:
    """Seconds per step, by CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(loops):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / loops
    begin = time.perf_counter()
    for _ in range(loops):
        step()
    return (time.perf_counter() - begin) / loops


class Matmul:
    """A large float32 matrix product, whose FLOP/s are what this machine reaches at the moment."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.size = device, MATMUL_SIZE[device.type]
        own = torch.Generator(device).manual_seed(0)  # leaves the numbers that the steps draw alone
        self.factors = [torch.randn(self.size, self.size, device=device, generator=own) for _ in range(2)]

    def __call__(self) -> float:
        """FLOP/s: the median of five, after one to warm up."""
        a, b = self.factors
        times = [_time(lambda: {"c": a @ b}, 1, self.device) for _ in range(6)]
        return 2 * self.size**3 / statistics.median(times[1:])


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes: the best of ten."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    times = [_time(lambda: {"target": target.copy_(source)}, 1, device) for _ in range(11)]
    return 2 * source.numel() * source.element_size() / min(times[1:])


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [samples[0]] * 4
    return {"median": statistics.median(samples), "p20": cuts[0], "p80": cuts[3]}


def _failure(error: Exception) -> dict[str, Any]:
    # A backend that lacks one op of a flow says so when the op is called.
    lacks_op = isinstance(error, RuntimeError) and re.search(r": backend '\w+' cannot run: ", str(error))
    if isinstance(error, UnavailableError) or lacks_op:
        return {"status": "unavailable", "reason": str(error)}
    if isinstance(error, AssertionError):
        return {"status": "wrong", "reason": str(error)}
    return {"status": "failed", "reason": "".join(traceback.format_exception_only(error)).strip()}


def _synchronised(step: Step, device: torch.device) -> tuple[Results, float]:
    begin = time.perf_counter()
    results = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results, time.perf_counter() - begin


def gate(job: Job, steps: dict[str, Step], outcome: dict[str, dict[str, Any]], device: torch.device) -> None:
    """Compare every provider with the reference and the reference in float64; the outcome of a failure says why."""
    truth_step = job.truth()
    with job.without_dropout():
        for number in job.gate_seeds:
            seed(number)
            truth = truth_step()
            seed(number)
            eager = steps["reference"]()
            for provider, step in steps.items():
                if outcome[provider]["status"] != "ok":
                    continue
                seed(number)
                try:
                    got, first_call_s = _synchronised(step, device)
                    job.check(got, eager, truth)
                except Exception as error:
                    outcome[provider] = _failure(error)
                else:
                    outcome[provider].setdefault("first_call_s", first_call_s)


def count(job: Job, step: Step, compiled: bool, device: torch.device) -> dict[str, int | None]:
    """Compute ops, what they move, host syncs, FLOPs and saved bytes of one step; compiled code cannot be counted."""
    seed(0)
    with SavedTensors(job.given) as saved:
        step()
    numbers: dict[str, int | None] = {
        "saved_bytes": saved.bytes,
        "ops": None,
        "syncs": None,
        "flops": None,
        "bytes": None,
    }
    if not compiled:
        seed(0)
        with Counts() as counts:
            step()
        numbers |= {name: getattr(counts, name).total() for name in ("ops", "syncs", "flops", "bytes")}
    if device.type == "cuda":
        seed(0)
        numbers["cuda_syncs"] = count_cuda_syncs(step)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seed(0)
        step()
        torch.cuda.synchronize(device)
        numbers["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return numbers


def alternate(
    steps: dict[str, Step], device: torch.device, effort: Effort
) -> tuple[dict[str, list[float]], int, list[float]]:
    """Time the steps in turn, each round with the same random numbers for all and another one first.

    Returns the seconds per step of each round, the number of steps in one sample, and for each round the FLOP/s that a
    matrix product reached before and after it, as their mean.
    """
    matmul = Matmul(device)
    seed(0)
    warm = {name: _time(step, 1, device) for name, step in steps.items()}
    warm = {name: min(warm[name], _time(step, 1, device)) for name, step in steps.items()}
    loops = max(1, math.ceil(MIN_SAMPLE_S / min(warm.values())))
    fitting = effort.seconds / (loops * sum(warm.values()))
    rounds = int(min(max(fitting, effort.min_rounds), effort.max_rounds))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    rates = [matmul()]
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seed(number)
            samples[name].append(_time(steps[name], loops, device))
        rates.append(matmul())
    return samples, loops, [(a + b) / 2 for a, b in itertools.pairwise(rates)]


def run_case(
    case: Case,
    providers: Sequence[str],
    device: torch.device,
    effort: Effort,
    progress: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: from the registry.
        providers: names; the reference always runs too.
        device: where.
        effort: how long to measure.
        progress: told what is being done.

    Returns:
        A dict for JSON: name, title, the GFLOP/s of a matrix product and, by provider, a status (ok, unavailable,
        wrong, failed) with the reason or the numbers: milliseconds, ratio to the reference of the same round, counts,
        share of the matrix product's FLOP/s around the same round.
    """
    progress("setting up")
    job = case.job(device)
    outcome: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for provider in dict.fromkeys(("reference", *providers)):
        outcome[provider] = {"status": "ok"}
        try:
            steps[provider] = job.step(provider)
        except Exception as error:
            outcome[provider] = _failure(error)
    progress("checking")
    gate(job, steps, outcome, device)
    steps = {name: step for name, step in steps.items() if outcome[name]["status"] == "ok"}
    for name, step in steps.items():
        progress(f"counting {name}")
        outcome[name] |= count(job, step, name == "compile", device)
    measured = {"name": case.name, "title": case.title, "device": device.type, "providers": outcome}
    if "reference" in steps:
        progress("timing")
        samples, loops, rates = alternate(steps, device, effort)
        measured["matmul_gflops"] = summary([rate / 1e9 for rate in rates])
        flops = outcome["reference"]["flops"]
        for name, times in samples.items():
            ratios = [t / r for t, r in zip(times, samples["reference"], strict=True)]
            outcome[name] |= {
                "ms": summary([1e3 * t for t in times]),
                "ratio": summary(ratios),
                "matmul_share": statistics.median(flops / t / rate for t, rate in zip(times, rates, strict=True)),
                "rounds": len(times),
                "steps_per_sample": loops,
            }
    return measured
