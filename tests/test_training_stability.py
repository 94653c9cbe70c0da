"""The study finds the rate at which a recipe breaks and the part that breaks, and makes its own speech."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from fastflow import from_preset
from fastflow.demo import SPEECH
from fastflow.training.parts import parts

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "train_stability.py").is_file():
    pytest.skip("not run: the study is only in the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import stability_report as findings  # noqa: E402
import train_stability as study  # noqa: E402

sys.path.remove(str(BENCHMARKS))


STEPS = 200
PARTS = ("embedding", "encoder", "estimator")


def figures(*, level: float = 1.0, **changes: list[float]) -> dict[str, list[float]]:
    """200 ordinary steps: noise about a constant loss and about gradient norms of 1."""
    noise = random.Random(0)
    ordinary = lambda: [math.exp(noise.gauss(0, 0.1)) for _ in range(STEPS)]  # noqa: E731
    columns = {"loss": [level * x for x in ordinary()], **{f"gradient/{part}": ordinary() for part in PARTS}}
    return {**columns, "update/encoder": [math.nan, 1e-3, 2e-3], "logit/estimator": [math.nan, 7.0], **changes}


def outcome(name: str, lr: float, seed: int = 0, broke: bool = False, **more: Any) -> findings.Outcome:
    found = findings.judge(name, lr, seed, figures(), "")
    return replace(found, broke=broke, **more)


def test_a_calm_run_holds() -> None:
    found = findings.judge("ours", 0.1, 0, figures(), "", calmer=figures()["loss"])
    assert (found.broke, found.broke_at, found.jumps) == (False, None, {})
    assert found.end == pytest.approx(1.0, rel=0.1)
    assert found.signs["gradient/encoder"] == pytest.approx(1.0, rel=0.2)
    assert found.signs["update/encoder"] == 2e-3
    assert found.signs["logit/estimator"] == 7.0


def test_a_run_that_rises_breaks_and_one_that_only_spikes_does_not() -> None:
    run = figures()
    run["loss"][100] = 20.0
    assert not findings.judge("question", 0.1, 0, run, "").broke
    run["loss"][140:] = [5.0] * 60
    found = findings.judge("question", 0.1, 0, run, "", calmer=figures()["loss"])
    assert found.broke
    assert 140 <= found.broke_at < 145


def test_a_run_that_never_learns_breaks_by_comparison_with_a_calmer_one() -> None:
    stuck = figures(level=8.0)
    assert not findings.judge("question", 0.1, 0, stuck, "").broke  # it never was better
    found = findings.judge("question", 0.1, 0, stuck, "", calmer=figures()["loss"])
    assert (found.broke, found.broke_at) == (True, 0)
    slow = figures(level=8.0)["loss"]
    assert not findings.judge("question", 0.1, 0, figures(), "", calmer=slow).broke


def test_what_is_not_finite_breaks() -> None:
    run = figures()
    run["loss"][150:] = [math.nan] * 50
    run["gradient/estimator"][150:] = [math.nan] * 50
    found = findings.judge("question", 0.1, 0, run, "")
    assert (found.broke, found.broke_at, found.end) == (True, 150, math.inf)
    assert found.jumps == {"estimator": 150}
    assert findings.judge("question", 0.1, 0, figures(), "step 200: a weight is not finite").broke


def test_the_first_part_is_named_only_when_every_seed_agrees() -> None:
    run = figures()
    run["gradient/encoder"][120] = 30.0
    run["gradient/estimator"][130:140] = [500.0] * 10
    run["gradient/embedding"][190] = 500.0  # after the loss has left
    run["loss"][140:] = [5.0] * 60
    found = findings.judge("question", 0.1, 0, run, "", calmer=figures()["loss"])
    assert found.jumps == {"encoder": 120, "estimator": 130}
    assert findings.first_part([found, found]) == "encoder in every seed"
    other = replace(found, jumps={"estimator": 90, "encoder": 95})
    assert findings.first_part([found, other]).startswith("no consistent first part (")
    assert findings.first_part([replace(found, jumps={})]) == "no consistent first part (none jumped)"


def test_the_margin_ends_at_the_first_seed_that_breaks() -> None:
    ladder = [outcome("question", lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1)]
    ladder += [outcome("question", 0.1, 0, broke=True), outcome("question", 0.1, 1)]
    assert findings.margin(ladder, "question") == (1e-2, None)
    ladder += [outcome("question", 1.0, seed, broke=True) for seed in (0, 1)]
    assert findings.margin(ladder, "question") == (1e-2, 1.0)
    assert findings.margin([outcome("question", 1e-3, broke=True)], "question") == (None, 1e-3)


def test_the_part_that_breaks_alone_is_the_one_that_is_named() -> None:
    runs = [outcome("question", 1e-2), outcome("question", 0.1, broke=True)]
    runs += [outcome("hot encoder", 1e-2), outcome("hot estimator", 1e-2, broke=True)]
    lines = findings.conclusions(runs, {"question": 1e-3})
    assert lines[0] == ("* **question** holds up to 0.01, 10 times its own rate of 0.001; every seed breaks at 0.1.")
    assert lines[1] == "* **What breaks**: estimator, alone at the breaking rate, breaks every seed."


def test_no_gradient_before_the_estimator_is_seen_when_it_stays_away() -> None:
    run = figures()
    for part in ("embedding", "encoder"):
        run[f"gradient/{part}"][150:] = [0.0] * 50
    run["gradient/embedding"][50:60] = [0.0] * 10  # and comes back
    assert findings.silence(run) == 150
    run["gradient/encoder"][-1] = 1.0
    assert findings.silence(run) is None
    assert findings.silence({"gradient/estimator": [1.0]}) is None


def rates(name: str, recipe: study.Recipe) -> dict[str, float]:
    """The learning rate of every parameter of a preset."""
    flow = from_preset(name)
    rate = {id(p): group["lr"] for group in recipe.optimizer(flow).param_groups for p in group["params"]}
    return {name: rate[id(p)] for name, p in flow.named_parameters()}


def test_one_part_alone_is_hot() -> None:
    hot = study.hot_parts(from_preset("tiny"), 1e-2, 0.1)
    for name, rate in rates("tiny", hot["hot encoder"]).items():
        assert rate == (0.1 if name.startswith("encoder") else 1e-2), name
    for name, rate in rates("tiny", hot["hot all but estimator"]).items():
        assert rate == (1e-2 if name.startswith("decoder.") else 0.1), name


def test_the_estimator_is_divided_into_its_stream_and_the_rest() -> None:
    hot = study.hot_parts(from_preset("tiny"), 1e-2, 0.1)
    stream = {name for name, rate in rates("tiny", hot["hot estimator's stream"]).items() if rate == 0.1}
    rest = {name for name, rate in rates("tiny", hot["hot estimator but its stream"]).items() if rate == 0.1}
    assert stream | rest == {name for name in rates("tiny", study.Recipe()) if name.startswith("decoder.")}
    assert not stream & rest
    assert "decoder.estimator.mid_blocks.1.0.res_conv.weight" in stream
    assert "decoder.estimator.down_blocks.0.2.conv.weight" in stream
    assert "decoder.estimator.mid_blocks.1.1.0.attn1.to_q.weight" in rest
    assert "hot estimator's stream" not in study.hot_parts(from_preset("tiny3"), 1e-2, 0.1)  # a DiT has none


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of the whole study in its smallest size, and its arguments; at a rate of 10,000 every part breaks."""
    folder = tmp_path_factory.mktemp("study")
    wav, rate = soundfile.read(SPEECH)
    for number in range(4):
        (folder / f"speaker{number % 2}").mkdir(exist_ok=True)
        soundfile.write(folder / f"speaker{number % 2}" / f"{number}.wav", wav[number * rate // 2 :][: rate // 2], rate)
    options = ["--tiny", "--data", str(folder), "--steps", "2", "--seeds", "1", "--device", "cpu"]
    options += ["--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "TINY", replace(study.TINY, rates=(1e-3, 1e4), frames=50))
        patch.setattr(study, "STREAMS", ("tiny",))
        assert study.main(options) == 0
    return folder / "out", options


def test_the_whole_study_runs(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    found = [(o["name"], o["lr"]) for o in results["outcomes"]]
    both = (1e-3, 1e4)
    assert found[:2] == [("question", lr) for lr in both]
    changes = [*(f"hot {part}" for part in parts(from_preset("tiny"))), "hot all but estimator"]
    changes += ["hot estimator's stream", "hot estimator but its stream"]
    assert [name for name, _ in found[2 : 2 + len(changes)]] == changes
    found = found[2 + len(changes) :]
    assert found[:4] == [(recipe, lr) for recipe in ("ours", "decoder") for lr in both]
    assert [name for name, _ in found[4:]] == ["clipping at 1", "groups and AdamW", "warm-up x 2", "batch x 2"]
    assert results["outcomes"][0]["signs"]["stream"] > 1
    text = (out / "report.md").read_text()
    assert "| hot estimator | inf | 1 of 1 |" in text
    for name in ("loss.png", "gradients.png"):
        assert (out / name).stat().st_size > 10_000


def test_a_frozen_condition_is_that_of_our_recipe_and_gets_no_gradient(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    frozen, trained = (findings.read_figures(out / "runs" / name / "0.001" / "0") for name in ("decoder", "question"))
    assert [column for column in frozen if column.startswith("gradient/")] == ["gradient/estimator"]
    assert "gradient/encoder" in trained


def test_a_run_that_is_there_is_not_repeated_and_a_report_needs_no_training(
    finished: tuple[Path, list[str]], monkeypatch
) -> None:
    out, options = finished
    before = (out / "report.md").read_text()
    monkeypatch.setattr(study, "TINY", replace(study.TINY, rates=(1e-3, 1e4), frames=50))
    monkeypatch.setattr(study, "STREAMS", ("tiny",))
    for picture in ("draw_loss", "draw_gradients"):
        monkeypatch.setattr(study, picture, lambda *_: None)
    (out / "runs" / "decoder" / "10000" / "0" / "done.json").unlink()
    trained = []
    train = study.Study.train
    monkeypatch.setattr(study.Study, "train", lambda self, *given: trained.append(given[-1]) or train(self, *given))
    assert study.main([*options, "--report"]) == 0
    assert trained == []
    assert (out / "report.md").read_text() != before
    assert study.main(options) == 0
    assert trained == ["decoder, 10000, seed 0"]
    assert (out / "report.md").read_text() == before


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


def test_help_describes_the_recipes(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        study.main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("question", "decoder", "ours", "--full"))
