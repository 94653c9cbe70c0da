"""Fifty optimizer steps end where the reference's end: ``benchmarks/training_parity.py`` on a small scale."""

import functools
import json
import sys
from pathlib import Path

import pytest

from fastflow import CausalConditionalCFM
from fastflow.backend import current_backend
from fastflow.testing.tolerances import GATE

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "training_parity.py").is_file():
    pytest.skip("not run: the benchmarks are only in the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import training_parity as parity  # noqa: E402

sys.path.remove(str(BENCHMARKS))

VERSIONS = list(parity.PRESETS)
BOTH = ("reference", "auto")
in_float32 = functools.cache(functools.partial(parity.curves_of, steps=50, providers=BOTH, precisions=("float32",)))


@pytest.mark.parametrize("version", VERSIONS)
def test_in_float32_every_loss_is_the_references_within_1e_4(version: str) -> None:
    found = in_float32(version)
    got, want = found["auto float32"], found["reference float32"]
    assert len(want) == 50
    assert parity.largest(got, want) <= 1e-4
    assert got != want, "the kernels ran, so the last bits differ"
    first, last = (sum(part) / len(part) for part in (want[:4], want[-4:]))
    assert last < 0.95 * first, "it trains: the loss falls"


@pytest.mark.parametrize("version", VERSIONS)
def test_in_bfloat16_the_losses_are_as_near_to_float32_as_the_references(version: str) -> None:
    """By the root mean square over the steps; the factor is op parity's, for chance decides which is nearer.

    Fewer steps, as bfloat16 is slow on a CPU; the recorded run has all fifty.
    """
    found = parity.curves_of(version, 20, BOTH, ("bfloat16",))
    truth = in_float32(version)["reference float32"][:20]
    theirs, ours = (parity.rms(found[f"{provider} bfloat16"], truth) for provider in BOTH)
    assert theirs > 1e-5, "bfloat16 leaves a trace"
    assert ours <= GATE * theirs


def test_a_small_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """mu wrong by one part in a hundred, in our run alone."""
    right = CausalConditionalCFM.compute_loss

    def wrong(self, x1, mask, mu, *rest, **options):  # type: ignore[no-untyped-def]
        return right(self, x1, mask, mu * (1.01 if current_backend() == "auto" else 1), *rest, **options)

    monkeypatch.setattr(CausalConditionalCFM, "compute_loss", wrong)
    found = parity.curves_of("v3", 30, BOTH, ("float32",))
    assert parity.largest(found["auto float32"], found["reference float32"]) > 1e-4


def test_a_run_writes_table_record_and_picture(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(parity.upstream, "missing", lambda: "not importable: cosyvoice")
    monkeypatch.setattr(
        sys, "argv", ["training_parity.py", "--steps", "2", "--draws", "2", "--only", "v3", "--out", str(tmp_path)]
    )
    parity.main()
    (record,) = tmp_path.glob("training-parity-*.json")
    result = json.loads(record.read_text())
    first, second = result["curves"]["v3"]
    assert list(first) == [f"{p} {d}" for d in ("float32", "bfloat16") for p in BOTH]
    assert all(len(losses) == 2 for losses in first.values())
    assert first["reference float32"] != second["reference float32"], "each draw has weights and batches of its own"
    for apart in result["distances"]["v3"]:
        assert apart["auto float32"] < 1e-5 < apart["auto bfloat16"]
    values = [apart["auto bfloat16"] for apart in result["distances"]["v3"]]
    summary = {"median": pytest.approx(sum(values) / 2), "smallest": min(values), "largest": max(values)}
    assert result["summary"]["v3"]["auto bfloat16"] == summary
    assert record.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "cosyvoice is left out: not importable: cosyvoice" in printed
    assert "| | auto float32 | reference bfloat16 | auto bfloat16 |" in printed
