"""The command's exit codes and error lines, and what ``fastflow doctor`` reports."""

import json
import subprocess
import sys
import types

import pytest
import torch

from fastflow import backend, cli, doctor
from fastflow.testing import tolerances

DEMO = "fastflow.demo"


def call(*arguments: str) -> int:
    """The exit code of the command, also where argparse exits."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The error text, which must be a single line on stderr with nothing on stdout."""
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_lists_and_explains_every_command(command, capsys) -> None:
    assert call("--help") == 0
    assert command in capsys.readouterr().out
    if command != "bench":
        assert call(command, "--help") == 0
        assert f"fastflow {command}" in capsys.readouterr().out


def test_version(capsys) -> None:
    import fastflow

    assert call("--version") == 0
    assert capsys.readouterr().out == f"fastflow {fastflow.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a command is needed"),
        (("fly",), "invalid choice: 'fly'"),
        (("doctor", "--colour"), "unrecognized arguments: --colour"),
        (("report", "enormous"), "name must be one of"),
        (("demo", "--preset", "enormous"), "invalid choice: 'enormous'"),
        (("demo", "--steps", "0"), "--steps: must be a whole number >= 1, got '0'"),
        (("demo", "--device", "abacus"), "--device: must be cpu, cuda or cuda:N, got 'abacus'"),
        (("demo", "--device", "cuda:99"), "--device: cuda:99: torch sees"),
        (("demo", "--wav", "nowhere.wav"), "no such audio file: nowhere.wav"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(arguments, message, capsys) -> None:
    assert call(*arguments) == 2
    assert message in one_line(capsys)


def test_a_failure_on_the_way_is_exit_code_1(monkeypatch, capsys) -> None:
    def run(args) -> int:
        raise RuntimeError("interpolate: backend 'cuda' cannot run:\nno GPU")

    monkeypatch.setitem(sys.modules, DEMO, types.SimpleNamespace(add_arguments=lambda parser: None, run=run))
    assert call("demo") == 1
    assert one_line(capsys) == "fastflow demo: interpolate: backend 'cuda' cannot run: no GPU\n"


def test_an_interrupted_command_is_exit_code_130(monkeypatch, capsys) -> None:
    def run(args) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, DEMO, types.SimpleNamespace(add_arguments=lambda parser: None, run=run))
    assert call("demo") == 130
    assert one_line(capsys) == "fastflow demo: interrupted\n"


def test_bench_passes_its_arguments_and_exit_code_on(monkeypatch, tmp_path) -> None:
    (tmp_path / "run.py").write_text("import sys; sys.exit(7 if sys.argv[1:] == ['--only', 'x*'] else 0)")
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "run.py")
    assert call("bench", "--only", "x*") == 7


def test_bench_outside_a_source_tree_says_so(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "run.py")
    assert call("bench") == 2
    assert "source tree only" in one_line(capsys)


def test_doctor_reports_every_backend_as_json(capsys) -> None:
    assert call("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == set(backend.BACKENDS)
    for facts in found["backends"].values():
        assert facts["runs"] == bool(facts["self_test"])
        assert facts["self_test"].keys() | facts["why_not"].keys() == doctor.OPS.keys()
        assert all(test["passed"] for test in facts["self_test"].values())
        assert all(facts["why_not"].values())
    assert found["backends"]["reference"]["runs"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["ok"]


def test_doctor_says_which_variables_are_in_force(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FASTFLOW_CPU_CAPABILITY", "baseline")
    monkeypatch.setattr(doctor, "_self_test", lambda op, name: {"passed": True, "failure": None, "seconds": 0.0})
    assert call("doctor") == 0
    out = capsys.readouterr().out
    assert "FASTFLOW_CPU_CAPABILITY  baseline" in out
    assert torch.__version__ in out


def test_doctor_fails_where_a_backend_that_runs_is_wrong(monkeypatch, capsys) -> None:
    monkeypatch.setattr(tolerances, "history", [])  # keeps this out of the summary of the test run
    right = doctor.interpolate
    monkeypatch.setattr(doctor, "interpolate", lambda *args, **kwargs: right(*args, **kwargs) * 1.0001)
    assert call("doctor") == 1
    out = capsys.readouterr().out
    assert "BROKEN on cpu: interpolate: AssertionError: interpolate float32 out: largest error is" in out
    assert "a backend that can run is broken" in out


@pytest.mark.parametrize("op", ["self_attention", "transformer_block"])
def test_doctor_finds_an_attention_or_a_block_that_is_wrong_on_one_backend(op, monkeypatch) -> None:
    if backend.extension is None:
        pytest.skip(f"not run: {backend.extension_error}")
    monkeypatch.setattr(tolerances, "history", [])
    right = getattr(doctor, op)

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * (1.0001 if kwargs["backend"] == "cpu" else 1)

    monkeypatch.setattr(doctor, op, wrong)
    monkeypatch.setattr(doctor, "OPS", {op: doctor.OPS[op]})
    found = doctor.examine()["backends"]
    assert found["reference"]["self_test"][op]["passed"]
    assert f"{op} float32 out: largest error is" in found["cpu"]["self_test"][op]["failure"]


def test_doctor_survives_a_missing_compiled_module(monkeypatch, capsys) -> None:
    monkeypatch.setattr(backend, "extension", None)
    monkeypatch.setattr(backend, "extension_error", "no C++ compiler")
    monkeypatch.setattr(doctor, "_self_test", lambda op, name: {"passed": True, "failure": None, "seconds": 0.0})
    assert call("doctor") == 0
    out = capsys.readouterr().out
    assert "cpu        cannot run: no C++ compiler" in out
    assert "none: no C++ compiler" in out


def test_the_module_runs_as_a_script() -> None:
    done = subprocess.run([sys.executable, "-m", "fastflow.cli", "fly"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("fastflow: argument COMMAND: invalid choice: 'fly'")
