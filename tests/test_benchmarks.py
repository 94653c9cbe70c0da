"""The benchmarks time only what is right, time all providers alike, and write down what the numbers depend on."""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
if not (BENCHMARKS / "run.py").exists():
    pytest.skip("not run: the benchmarks are only in the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import jobs  # noqa: E402
import plot  # noqa: E402
import registry  # noqa: E402
import run  # noqa: E402
import runner  # noqa: E402
import upstream  # noqa: E402

from fastflow import config  # noqa: E402
from fastflow.testing import tolerances  # noqa: E402

CPU = torch.device("cpu")
FAST = runner.Effort(seconds=0.01, min_rounds=2, max_rounds=3)


def softplus(x: torch.Tensor, backend: str = "reference") -> torch.Tensor:
    return F.softplus(x)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.softplus(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


WRONG_OPS = {
    "value": lambda x, backend: F.softplus(x) * 1.001,
    "gradient": lambda x, backend: WrongGradient.apply(x),
    "nan": lambda x, backend: F.softplus(x) + torch.where(x == x.max(), torch.nan, 0.0),
    "one row": lambda x, backend: F.softplus(x)[:1].expand_as(x),
}


def case_of(op) -> registry.Case:
    """A case whose provider "cpu" is ``op``."""

    def job(device: torch.device) -> jobs.OpJob:
        x = torch.linspace(-3, 3, 40, device=device).view(4, 10)
        return jobs.OpJob(op, softplus, {"x": x}, {}, sums=())

    return registry.Case("planted/op", "a planted op", job, quick=True)


@pytest.fixture(autouse=True)
def _planted_errors_stay_out_of_the_summary(monkeypatch):
    monkeypatch.setattr(tolerances, "history", [])


@pytest.fixture
def every_backend_runs(monkeypatch):
    monkeypatch.setattr(jobs, "_require_backend", lambda provider, device: None)


@pytest.mark.parametrize("wrong", WRONG_OPS)
def test_a_wrong_provider_gets_no_time(wrong, every_backend_runs):
    measured = runner.run_case(case_of(WRONG_OPS[wrong]), ["cpu"], CPU, FAST)
    planted = measured["providers"]["cpu"]
    assert planted["status"] == "wrong"
    assert planted["reason"]
    assert "ms" not in planted
    assert "ms" in measured["providers"]["reference"]


def test_a_right_provider_gets_times_and_counts(every_backend_runs):
    measured = runner.run_case(case_of(softplus), ["cpu"], CPU, FAST)
    for numbers in measured["providers"].values():
        assert numbers["status"] == "ok"
        assert numbers["ms"]["p20"] <= numbers["ms"]["median"] <= numbers["ms"]["p80"]
        assert numbers["ops"] == 2  # softplus and its gradient
        assert numbers["syncs"] == 0
        assert numbers["saved_bytes"] == 0  # the input is given
    assert measured["providers"]["reference"]["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}


def test_a_crash_is_reported_and_fails(every_backend_runs):
    def crash(x, backend):
        raise RuntimeError("planted crash")

    measured = runner.run_case(case_of(crash), ["cpu"], CPU, FAST)
    assert measured["providers"]["cpu"] == {"status": "failed", "reason": "RuntimeError: planted crash"}


def test_a_backend_that_lacks_an_op_is_unavailable(every_backend_runs):
    def lacking(x, backend):
        raise RuntimeError("attention: backend 'cpu' cannot run: it does not support torch.float32")

    measured = runner.run_case(case_of(lacking), ["cpu"], CPU, FAST)
    assert measured["providers"]["cpu"]["status"] == "unavailable"


@pytest.mark.parametrize(("op", "exit_code"), [(softplus, 0), (WRONG_OPS["gradient"], 1)])
def test_the_exit_code_tells_whether_all_providers_are_right(op, exit_code, every_backend_runs, monkeypatch, capsys):
    monkeypatch.setattr(run, "CASES", {"planted/op": case_of(op)})
    monkeypatch.setattr(run, "QUICK", FAST)
    assert run.main(["--quick", "--only", "planted/*", "--providers", "cpu", "--device", "cpu"]) == exit_code
    assert ("planted/op cpu wrong" in capsys.readouterr().err) == bool(exit_code)


def test_a_flow_with_one_wrong_gradient_is_wrong():
    job = registry.CASES["tiny-v1/train-2x60"].job(CPU)
    jobs.seed(0)
    with job.without_dropout():
        eager = job.step("reference")()
        jobs.seed(0)
        truth = job.truth()()
    job.check(eager, eager, truth)
    name = "grad encoder.encoders.0.feed_forward.w_1.weight"
    for wrong in (eager[name] * 1.01, torch.zeros_like(eager[name]), torch.full_like(eager[name], torch.nan)):
        with pytest.raises(AssertionError, match=r"encoders\.0\.feed_forward\.w_1\.weight: error"):
            job.check({**eager, name: wrong}, eager, truth)
    assert truth[name].dtype == torch.float64


def test_a_float64_run_draws_the_numbers_of_the_float32_run():
    def draws(dtype: torch.dtype) -> list[torch.Tensor]:
        jobs.seed(3)
        like = torch.empty(2, 3, 40, dtype=dtype)
        return [torch.rand([2, 1, 1], dtype=dtype), torch.randn_like(like), torch.rand(5)]

    plain = draws(torch.float32)
    with jobs._DrawsInFloat32():
        wide = draws(torch.float64)
    assert [x.dtype for x in wide] == [torch.float64, torch.float64, torch.float32]
    assert all(torch.equal(x.double(), y.double()) for x, y in zip(plain, wide, strict=True))


def test_providers_alternate_within_a_round_and_share_its_random_numbers():
    seen = []

    def step(name: str) -> jobs.Step:
        return lambda: seen.append((name, torch.initial_seed())) or {}

    runner_effort = runner.Effort(seconds=0, min_rounds=3, max_rounds=3)
    steps = {name: step(name) for name in "abc"}
    samples, loops, rates = runner.alternate(steps, CPU, runner_effort)
    assert [len(times) for times in samples.values()] == [3, 3, 3]
    assert len(rates) == 3
    rounds = [[entry for entry in seen[6:] if entry[1] == number][::loops] for number in range(3)]
    firsts = [dict.fromkeys(name for name, _ in entries) for entries in rounds]
    assert [list(order) for order in firsts] == [list("abc"), list("bca"), list("cab")]


def test_the_share_of_the_matmul_rate_is_that_of_the_same_round(every_backend_runs, monkeypatch):
    """On a machine whose speed changes, neither the first rate nor the median one gives the same."""
    rates = [100e9, 10e9, 40e9]
    taken = {"reference": [1.0, 2.0, 4.0], "cpu": [0.5, 1.0, 2.0]}
    monkeypatch.setattr(runner, "alternate", lambda *_: (taken, 1, rates))
    monkeypatch.setattr(runner, "count", lambda *_: {"flops": 80e9})
    measured = runner.run_case(case_of(softplus), ["cpu"], CPU, FAST)
    assert measured["matmul_gflops"]["median"] == 40
    assert measured["providers"]["reference"]["matmul_share"] == pytest.approx(0.8)
    assert measured["providers"]["cpu"]["matmul_share"] == pytest.approx(1.6)


def test_summary_is_median_and_percentiles():
    assert runner.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert runner.summary([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


def test_the_quick_run_writes_valid_json_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="not run: plots need matplotlib")
    out = tmp_path / "results" / "quick.json"
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--only", "tiny-v1/train*", "--device", "cpu"]
    process = subprocess.run([*command, "--threads", "1", "--out", out], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "date", "matmul_gflops", "build", "not_run"} <= set(result)
    (case,) = result["cases"]
    reference = case["providers"]["reference"]
    assert reference["status"] == "ok"
    assert reference["ms"]["median"] > 0
    assert reference["ops"] > 500
    assert reference["saved_bytes"] > 2**20
    assert 0 < reference["matmul_share"] < 1
    assert reference["bytes"] > reference["saved_bytes"]
    for picture in ("quick.png", "quick-roofline.png"):
        assert (out.parent / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in process.stdout
    assert "tiny-v1/train-2x60" in process.stdout


def test_cases_are_found_by_name():
    assert [case.name for case in run.choose("v3/infer*", False, "cpu")] == ["v3/infer-50+100", "v3/infer-5s+10s"]
    quick = run.choose(None, True, "cpu")
    assert quick
    assert all(case.quick for case in quick)
    assert not any(case.heavy for case in run.choose(None, False, "cpu"))
    assert len(run.choose(None, False, "cuda")) == len(registry.CASES)
    assert run.main(["--only", "no/such/case"]) == 2


def test_the_providers_of_a_case_fit_the_device():
    op, flow = registry.CASES["interpolate/8x500-860x80"], registry.CASES["v2/train-4x200"]
    assert run.default_providers(op, False, "cpu") == ["reference", "compile", "cpu", "cosyvoice"]
    assert run.default_providers(flow, False, "cpu") == ["reference", "cpu", "cosyvoice"]
    on_gpu = ["reference", "compile", "auto", "cuda", "triton", "graphed", "cosyvoice"]
    assert run.default_providers(flow, False, "cuda") == on_gpu
    assert "compile" not in run.default_providers(flow, True, "cuda")


@pytest.mark.parametrize("name", ["tiny-v1", "tiny-v2", "tiny-v3"])
def test_every_memory_mode_is_checked_counted_and_timed(name):
    case = registry.CASES[f"{name}/train-2x60"]
    measured = runner.run_case(case, ["auto", *jobs.MEMORY_MODES], CPU, FAST)["providers"]
    assert list(measured) == ["reference", "auto", "none", "selective", "block"]
    assert all(numbers["status"] == "ok" and "ms" in numbers for numbers in measured.values())
    saved, ops = ({mode: measured[mode][key] for mode in jobs.MEMORY_MODES} for key in ("saved_bytes", "ops"))
    assert saved["none"] > saved["selective"] > saved["block"] > 0
    assert ops["none"] < ops["block"]


def test_a_memory_mode_has_a_flow_of_its_own_with_the_same_weights():
    job = registry.CASES["tiny-v1/train-2x60"].job(CPU)
    job.flow.encoder.recompute = "selective"
    flow = job._module("block")
    assert {part.recompute for part in flow.modules() if hasattr(part, "recompute")} == {"block"}
    assert job.flow.recompute == "auto"
    assert job.flow.encoder.recompute == "selective"
    shared = {id(parameter) for parameter in job.flow.parameters()}
    assert {id(parameter) for parameter in flow.parameters()} == shared


@pytest.mark.parametrize("mode", jobs.MEMORY_MODES)
@pytest.mark.parametrize(("name", "reason"), [("interpolate/1x40-68x80", "an op"), ("tiny-v1/infer-1s+2s", "synth")])
def test_memory_modes_are_of_training_steps(name, reason, mode):
    job = registry.CASES[name].job(CPU)
    with pytest.raises(jobs.UnavailableError, match=f"a memory mode is one of a .*training step; {reason}"):
        job.step(mode)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("interpolate/1x40-68x80", "an op"), ("tiny-v1/infer-1s+2s", "synthesis"), ("tiny-v1/train-2x60", "need a GPU")],
)
def test_graphed_steps_are_training_steps_on_a_gpu(name, reason):
    with pytest.raises(jobs.UnavailableError, match=reason):
        registry.CASES[name].job(CPU).step("graphed")


def test_a_graphed_step_has_the_results_of_the_reference():
    job = registry.CASES["tiny-v1/train-2x60"].job(CPU)
    job.device = SimpleNamespace(type="cuda")  # where the step is, of a flow on the CPU, which has no graphs
    step = job.step("graphed")
    with job.without_dropout():
        jobs.seed(0)
        got = step()
        job.device = CPU
        jobs.seed(0)
        want = job.step("reference")()
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-4)


def test_every_provider_has_a_colour():
    assert set(plot.COLOURS) == set(jobs.PROVIDERS) - {"reference"}


def test_the_published_workloads_are_registered():
    for version in ("v1", "v2", "v3"):
        assert {f"{version}/train-4x200", f"{version}/train-4x500", f"{version}/infer-5s+10s"} <= set(registry.CASES)
    assert {"interpolate/8x500-860x512", "interpolate/8x500-860x80"} <= set(registry.CASES)
    assert registry.CASES["v1/train-2x1000"].heavy


@pytest.mark.parametrize(("name", "tokens", "frames"), [("tiny", 58, 100), ("tiny3", 50, 100)])
def test_a_training_batch_has_rows_of_falling_length(name, tokens, frames):
    batch = registry._training(name, 4, frames, CPU).inputs
    assert batch["speech_token"].shape == (4, tokens)
    assert batch["speech_token_len"].tolist() == [tokens * share // 10 for share in (10, 9, 8, 7)]
    assert batch["speech_feat_len"][0] == frames
    assert batch["speech_feat_len"].unique().numel() == 4


def test_inference_has_the_named_tokens_of_prompt_and_target():
    spec, inputs = config.preset("tiny"), registry._inference("tiny", 50, 100, CPU).inputs
    assert inputs["prompt_token"].shape[1] == spec["input_frame_rate"]
    assert inputs["token"].shape[1] == 2 * spec["input_frame_rate"]
    assert inputs["prompt_feat"].shape[1] == 22050 // 256


def test_after_the_given_minutes_the_rest_is_listed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "CASES", {name: case_of(softplus) for name in ("a", "b")})
    monkeypatch.setattr(run, "QUICK", FAST)
    out = tmp_path / "result.json"
    arguments = ["--quick", "--minutes", "1e-9", "--out", str(out), "--device", "cpu", "--no-plot"]
    assert run.main(arguments) == 3
    assert json.loads(out.read_text())["not_run"] == ["planted/op", "planted/op"]
    assert "not run within" in capsys.readouterr().err


@pytest.mark.parametrize("absent", [(), ("rich", "tqdm")], ids=["all", "without rich and tqdm"])
def test_the_table_has_every_number_with_and_without_rich(absent, every_backend_runs, monkeypatch, capsys):
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.console", None)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(run, "CASES", {"planted/op": case_of(WRONG_OPS["value"])})
    monkeypatch.setattr(run, "QUICK", FAST)
    run.main(["--quick", "--providers", "cpu", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "planted/op: a planted op" in printed
    assert "reference" in printed
    assert "1.00 (1.00-1.00)" in printed
    assert "cpu wrong: " in printed


def test_upstream_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(upstream, "NEEDED", ("torch", "no_such_package"))
    assert upstream.missing() == "not importable: no_such_package"
    job = registry.CASES["tiny-v1/train-2x60"].job(CPU)
    with pytest.raises(jobs.UnavailableError, match="no_such_package"):
        job.step("cosyvoice")


def test_unused_packages_of_upstream_get_stand_ins_that_do_not_stay(tmp_path, monkeypatch):
    package = tmp_path / "planted_upstream"
    package.mkdir()
    (tmp_path / "diffusers.py").touch()
    (package / "__init__.py").touch()
    (package / "flow.py").write_text(
        "import absent_audio.compliance.kaldi as kaldi\n"
        "from absent_logs import only_once\n"
        "@only_once\n"
        "def answer():\n"
        "    return 42\n"
        "class Tokeniser(kaldi.Base):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    module = upstream._import("planted_upstream.flow")
    assert module.answer() == 42
    assert not any(name.startswith("absent_") for name in sys.modules)


def test_a_package_that_upstream_computes_with_gets_no_stand_in(tmp_path, monkeypatch):
    (tmp_path / "diffusers.py").touch()
    (tmp_path / "planted_needs.py").write_text("import einops_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(upstream, "NEEDED", ("einops_absent",))
    with pytest.raises(ModuleNotFoundError, match="einops_absent"):
        upstream._import("planted_needs")


def test_upstream_agrees_where_it_is_importable():
    if reason := upstream.missing():
        pytest.skip(f"not run: {reason}")
    measured = runner.run_case(registry.CASES["tiny-v1/train-2x60"], ["cosyvoice"], CPU, FAST)
    assert measured["providers"]["cosyvoice"]["status"] == "ok"


# A GPU machine for gpu.sh: every tool is there, says that it worked, and exits with the status in STATUS_<tool>.
STAND_IN_PYTHON = """#!/bin/bash
option() { while [[ $1 != "$2" ]]; do set -- "$1" "${@:3}"; done; echo "$3"; }  # NAME ARGUMENTS: what follows NAME
case "$*" in
"- "*) exec REAL_PYTHON "$@" ;;                       # reads the report of the tests
"-m pip"*) exit "${STATUS_pip:-0}" ;;
"-m pytest"*)
    for argument; do [[ $argument != --junitxml=* ]] || echo "<t>$REPORT</t>" >"${argument#*=}"; done
    echo "3 passed"; exit "${STATUS_pytest:-0}" ;;
"-c "*) echo some-gpu ;;
benchmarks/run.py*) echo "$@" >"$(option --out "$@")"; exit "${STATUS_run:-0}" ;;
benchmarks/plot.py*) touch "${2%.json}.png" ;;
"-") cat >/dev/null; exit "${STATUS_probe:-0}" ;;      # is there a GPU, is fastflow built
*) exit 99 ;;
esac
"""
STAND_IN_SANITIZER = """#!/bin/bash
echo "$@"; [[ ${SILENT:-} ]] || echo "3 passed"; [[ ${BROKEN_TOOL:-} != "$2" ]] || exit 99
"""


@pytest.fixture
def gpu_machine(tmp_path):
    """Run gpu.sh in a copy of the tree's outline; returns exit status, output, and the files that came out."""
    for name, text in {
        "benchmarks/gpu.sh": (BENCHMARKS / "gpu.sh").read_text(),
        "kernels/__init__.py": "",
        "kernels/interpolate.py": "",
        "tests/test_interpolate.py": "",
        "bin/python": STAND_IN_PYTHON.replace("REAL_PYTHON", sys.executable),
        "bin/compute-sanitizer": STAND_IN_SANITIZER,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run_script(*arguments: str, **environment: str) -> tuple[int, str, set[str]]:
        out = tmp_path / "out"
        paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "OUT": str(out)}
        process = subprocess.run(
            ["bash", tmp_path / "benchmarks" / "gpu.sh", *arguments],
            env={**os.environ, **paths, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return process.returncode, process.stdout, {file.name for file in out.glob("*")}

    return run_script


TODAY = datetime.date.today().isoformat()


def test_the_gpu_script_runs_all_parts_and_hands_out_what_they_wrote(gpu_machine):
    status, printed, files = gpu_machine()
    assert status == 0, printed
    assert [f"=== {part}: exit status 0" in printed for part in ("build", "tests", "sanitizer", "bench")] == [True] * 4
    logs = {"memcheck.log", "racecheck.log", "initcheck.log", "synccheck.log"}
    assert files == {"tests.xml", *logs, f"some-gpu-{TODAY}.json", f"some-gpu-{TODAY}.png"}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ((), {"STATUS_probe": "1"}),
        (("build",), {"STATUS_pip": "1"}),
        (("tests",), {"STATUS_pytest": "1"}),
        (("tests",), {"REPORT": '<skipped message="not run: this machine has no GPU"/>'}),
        (("sanitizer",), {"BROKEN_TOOL": "racecheck"}),
        (("sanitizer", "memcheck"), {"SILENT": "1"}),
        (("sanitizer", "nocheck"), {}),
        (("bench",), {"STATUS_run": "1"}),
        (("bench",), {"STATUS_run": "3"}),
        ((), {"STATUS_run": "1"}),
        ((), {"STATUS_pip": "1"}),
    ],
    ids=str,
)
def test_the_gpu_script_fails_if_anything_fails(gpu_machine, arguments, environment):
    status, printed, _ = gpu_machine(*arguments, **environment)
    assert status != 0, printed


def test_the_gpu_script_passes_arguments_on(gpu_machine, tmp_path):
    assert gpu_machine("bench", "v3/*")[0] == 0
    assert "--only v3/* " in (tmp_path / "out" / f"some-gpu-{TODAY}-v3.json").read_text().replace("\n", " ")
    assert gpu_machine("sanitizer", "initcheck")[0] == 0
    log = (tmp_path / "out" / "initcheck.log").read_text()
    assert "--tool initcheck" in log
    assert "--kernel-name kns=interpolate" in log
    assert "tests/test_interpolate.py" in log


def test_the_gpu_script_is_sound_and_refuses_unknown_parts(gpu_machine):
    script = BENCHMARKS / "gpu.sh"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    status, printed, _ = gpu_machine("no-such-part")
    assert status == 2
    assert "build | tests | sanitizer | bench" in printed
