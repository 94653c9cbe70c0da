"""Entry points for pytest-benchmark: pytest benchmarks -k "tiny-v1 and cpu" --benchmark-autosave

Not part of the tests.  Times are wall-clock; the step of a GPU case waits for the GPU.
"""

import pytest
import torch
from jobs import PROVIDERS, UnavailableError, seed
from registry import CASES, Case
from runner import count, gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", [case for case in CASES.values() if DEVICE.type == "cuda" or not case.heavy], ids=str)
def test_bench(benchmark, case: Case, provider: str) -> None:
    job = case.job(DEVICE)
    try:
        steps = {"reference": job.step("reference"), provider: job.step(provider)}
    except UnavailableError as error:
        pytest.skip(f"not run: {error}")
    outcome = {name: {"status": "ok"} for name in steps}
    gate(job, steps, outcome, DEVICE)
    assert outcome[provider]["status"] == "ok", outcome[provider]["reason"]
    benchmark.extra_info.update(count(job, steps[provider], provider == "compile", DEVICE))
    seed(0)

    def step() -> None:
        steps[provider]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
