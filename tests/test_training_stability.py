"""The study finds the part that breaks first, says so in words and pictures, and makes its own speech."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from fastflow.demo import SPEECH

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "train_stability.py").is_file():
    pytest.skip("not run: the study is only in the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import train_stability as study  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def figures(**changes: list[float]) -> dict[str, list[float]]:
    """200 ordinary steps."""
    noise = random.Random(0)
    ordinary = lambda: [math.exp(noise.gauss(0, 0.1)) for _ in range(200)]  # noqa: E731
    columns = {name: ordinary() for name in ("loss", "gradient/embedding", "gradient/encoder", "gradient/estimator")}
    return {**columns, "update/encoder": [math.nan, 1e-3, 2e-3], "logit/estimator": [math.nan, 7.0], **changes}


def test_a_calm_run_has_no_part_that_breaks() -> None:
    found = study.find("ours", 0, figures(), "")
    assert not found.diverged
    assert found.breaks_first is None
    assert found.final == pytest.approx(1.0, rel=0.1)
    assert found.largest_update == {"encoder": 2e-3}
    assert found.largest_logit == {"estimator": 7.0}


def test_the_part_that_spikes_first_is_found_though_another_spikes_more() -> None:
    run = figures()
    run["gradient/encoder"][120] = 30.0
    run["gradient/estimator"][130:140] = [500.0] * 10
    run["loss"][140:] = [5.0] * 60
    found = study.find("question", 1, run, "")
    assert found.diverged
    assert found.diverged_at < 145
    assert (found.breaks_first, found.breaks_at) == ("encoder", 120)
    assert found.spikes["encoder"] == 1
    assert found.spikes["estimator"] >= 5
    assert study.conclusions([found]) == [
        f"* **question**: 1 of 1 runs diverged; encoder was the first to spike in 1 of 1; final loss {found.final:.3f}."
    ]


def test_a_spike_that_passes_is_not_a_divergence() -> None:
    run = figures()
    run["loss"][100] = 20.0
    assert not study.find("question", 0, run, "").diverged


def test_what_is_not_finite_diverges() -> None:
    run = figures()
    run["loss"][150:] = [math.nan] * 50
    run["gradient/estimator"][150:] = [math.nan] * 50
    found = study.find("question", 0, run, "")
    assert found.diverged
    assert (found.breaks_first, found.breaks_at) == ("estimator", 150)
    assert study.find("question", 0, figures(), "step 200: the loss is nan").diverged


def test_the_whole_study_runs(tmp_path: Path, capsys) -> None:
    wav, rate = soundfile.read(SPEECH)
    for number in range(4):
        (tmp_path / f"speaker{number % 2}").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"speaker{number % 2}" / f"{number}.wav", wav[number * rate // 2 :][:rate], rate)
    out = tmp_path / "out"
    options = [
        "--tiny",
        "--preset",
        "tiny3",
        "--data",
        str(tmp_path),
        "--steps",
        "6",
        "--seeds",
        "2",
        "--device",
        "cpu",
    ]
    assert study.main([*options, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(f["recipe"], f["seed"]) for f in results["findings"]] == [
        (recipe, seed) for recipe in ("question", "decoder", "ours") for seed in (0, 1)
    ]
    for name in ("loss.png", "gradients.png"):
        assert (out / name).stat().st_size > 10_000
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "| decoder | 0.001 | frozen | 5 | 2 |" in text
    frozen, trained = (study.read_figures(out / name / "0") for name in ("decoder", "question"))
    assert "gradient/embedding" not in frozen
    assert "gradient/embedding" in trained


def test_speech_comes_from_espeak(tmp_path: Path) -> None:
    try:
        study.make_speech(tmp_path, voices=2, sentences=2)
    except RuntimeError as error:
        if "espeak-ng is missing" in str(error):
            pytest.skip("not run: espeak-ng is not installed")
        raise
    files = sorted(tmp_path.rglob("*.wav"))
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        f"{voice}/000{number}.wav" for voice in ("en-gb", "en-us") for number in range(2)
    ]
    assert all(soundfile.info(file).duration > 1 for file in files)
    assert len({file.read_bytes() for file in files}) == 4


def test_without_espeak_the_message_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert study.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert "apt install espeak-ng" in capsys.readouterr().err


def test_help_describes_the_recipes() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "train_stability.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert all(word in done.stdout for word in ("question", "decoder", "ours", "--full"))
