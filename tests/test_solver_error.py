"""The table of the solvers' errors: ``benchmarks/solver_error.py``."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="not run: the demo needs scipy")
pytest.importorskip("soundfile", reason="not run: the demo needs soundfile")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "solver_error.py").exists():
    pytest.skip("not run: the benchmarks are only in the source tree", allow_module_level=True)


def test_a_run_writes_table_record_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import solver_error

    monkeypatch.setattr(solver_error, "EVALUATIONS", (2, 4))
    monkeypatch.setattr(solver_error, "REFERENCE", {"n_timesteps": 4, "schedule": "cosine"})
    monkeypatch.setattr(solver_error, "CHECK", {"n_timesteps": 4, "schedule": "sway"})
    model = tmp_path / "model.pt"
    results = []
    for _ in range(2):  # trained, then loaded
        arguments = ["--steps", "1", "--model", str(model), "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["solver_error.py", *arguments])
        solver_error.main()
        (record,) = tmp_path.glob("solver-error-tiny-*.json")
        results.append(json.loads(record.read_text()))
    assert results[0]["errors"] == results[1]["errors"]
    assert record.with_suffix(".png").exists()
    errors = results[0]["errors"]
    assert errors["euler, cosine, 4"] == 0, "it is the reference"
    assert errors["euler, linear, 4"] > 0
    assert errors["midpoint, cosine, 4"] != errors["euler, cosine, 4"]
    assert results[0]["reference_error"] == pytest.approx(0, abs=1e-5), "sway of -1 is the cosine schedule"
    assert "| euler, cosine |" in capsys.readouterr().out
    assert str(tmp_path) not in record.read_text()
