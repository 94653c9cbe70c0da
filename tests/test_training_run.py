"""Batches, corpora and checkpoints; and the training example, which survives ``kill -9`` without a trace."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fastflow
from fastflow.demo import SPEECH
from fastflow.training.batches import FrameBatches
from fastflow.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fastflow.training.corpus import collate, lengths, read, read_folder, read_parquet, speaker_vector
from fastflow.training.rng import preserved_rng, rng_state, set_rng_state

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "benchmarks" / "train_flow.py"
TINY = ["tiny", "tiny2", "tiny3"]


def make_flow(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fastflow.from_preset(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers, three files each of 1 to 2.5 s, cut from the shipped speech."""
    import soundfile

    root = tmp_path_factory.mktemp("speech")
    wav, rate = soundfile.read(SPEECH)
    for number in range(6):
        path = root / f"speaker{number % 2}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wav[number * rate // 2 :][: int((1 + 0.3 * number) * rate)], rate)
    return root


# ------------------------------------------------------------------------------------------------ batches
def take(batches: FrameBatches, count: int) -> list[list[int]]:
    return [next(batches) for _ in range(count)]


def test_an_epoch_holds_every_sample_once_and_no_batch_is_too_large() -> None:
    sizes = torch.randint(10, 300, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = FrameBatches(sizes, 2000)
    seen, padded = [], 0
    while batches.epoch == 0 and len(seen) < len(sizes):
        batch = next(batches)
        assert max(sizes[i] for i in batch) * len(batch) <= 2000
        padded += max(sizes[i] for i in batch) * len(batch)
        seen += batch
    assert sorted(seen) == list(range(len(sizes)))
    assert sum(sizes) / padded > 0.95  # rows of like length lie together
    assert [i for batch in take(batches, 5) for i in batch] != seen[: len(seen)]
    assert batches.epoch == 1


def test_a_sample_longer_than_a_batch_is_alone() -> None:
    batches = FrameBatches([10, 5000, 10], 100)
    assert sorted(map(sorted, take(batches, 2))) == [[0, 2], [1]]


def test_batches_resume_in_the_middle_of_an_epoch() -> None:
    sizes = list(range(10, 210))
    whole = FrameBatches(sizes, 700, seed=3)
    take(whole, 45)
    state = whole.state_dict()
    again = FrameBatches(sizes, 700, seed=3)
    again.load_state_dict(state)
    assert take(again, 100) == take(whole, 100)
    with pytest.raises(ValueError, match="max_frames was 700 when the state was saved and is 800 now"):
        FrameBatches(sizes, 800, seed=3).load_state_dict(state)


def test_ranks_share_an_epoch_in_equal_numbers_of_batches() -> None:
    sizes = list(range(10, 211))
    ranks = [FrameBatches(sizes, 700, rank=rank, world=3) for rank in range(3)]
    taken = []
    while all(batches.epoch == 0 for batches in ranks):
        taken.append([next(batches) for batches in ranks])
    assert len({batches.epoch for batches in ranks}) == 1
    flat = [i for row in taken[:-1] for batch in row for i in batch]
    assert len(flat) == len(set(flat))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], 10), "at least one sample"),
        (([5], 0), "max_frames must be at least 1"),
        (([5], 10, 2, 2), r"rank must lie in 0\.\.1"),
        (([5], 10, 0, 2), "only 1 batches for 2 processes"),
    ],
)
def test_batches_refuse_numbers_out_of_range(arguments: tuple, match: str) -> None:
    sizes, frames, *place = arguments
    with pytest.raises(ValueError, match=match):
        FrameBatches(sizes, frames, **dict(zip(("rank", "world"), place, strict=False)))


# ------------------------------------------------------------------------------------------------ corpora
@pytest.mark.parametrize("name", TINY)
def test_a_folder_of_speech_trains_a_flow(name: str, folder: Path) -> None:
    flow = make_flow(name)
    samples = read(folder, flow)
    assert len(samples) == 6
    assert len({tuple(sample.speaker.tolist()) for sample in samples}) == 2
    assert max(sample.tokens.max() for sample in samples) < 256
    assert torch.equal(samples[0].speaker, speaker_vector("speaker0", 192))
    batch = collate(samples)
    assert batch["speech_feat_len"].tolist() == sorted(lengths(samples), reverse=True)
    flow(batch, "cpu")["loss"].backward()
    assert flow.input_embedding.weight.grad.abs().sum() > 0


def test_equal_sounds_have_equal_tokens_across_files(folder: Path) -> None:
    """File 0 holds the first second, file 2 begins a second later: the clusters are those of the whole corpus."""
    first, third = (s for s in read_folder(folder, make_flow("tiny2"), clusters=16) if s.name[-5] in "04")
    late, early = third.tokens, first.tokens
    assert len(set(late.tolist()) & set(early.tolist())) > 3


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no audio file"):
        read_folder(tmp_path, make_flow("tiny3"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read(tmp_path / "nothing", make_flow("tiny3"))


def write_parquet(path: Path, name: str, **changes) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="not run: parquet, pyarrow is not installed")
    import pyarrow
    import soundfile

    rate = {"tiny": 50}.get(name, 25)
    wav, sample_rate = soundfile.read(SPEECH)
    rows = []
    for number, seconds in enumerate((1.0, 1.53)):
        data = io.BytesIO()
        soundfile.write(data, wav[: int(seconds * sample_rate)], sample_rate, format="WAV")
        rows.append(
            {
                "utt": f"u{number}",
                "audio_data": data.getvalue(),
                "wav": "u.wav",
                "text": "hello",
                "spk": "s",
                "utt_embedding": torch.randn(192).tolist(),
                "spk_embedding": torch.ones(192).tolist(),
                "speech_token": list(range(int(seconds * rate) + number)),
                **changes,
            }
        )
    rows.append({**rows[0], "utt": "silent", "speech_token": []})  # upstream drops it, too
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", TINY)
def test_cosyvoices_parquet_trains_a_flow(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "parquet_000000000.tar", name)
    (tmp_path / "data.list").write_text(f"{tmp_path / 'parquet_000000000.tar'}\n")
    flow = make_flow(name)
    samples = read(tmp_path / "data.list", flow)
    assert [sample.name for sample in samples] == ["u0", "u1"]
    assert all(sample.speaker.norm() == pytest.approx(1.0) for sample in samples)
    if name != "tiny":
        assert all(len(sample.mel) == 2 * len(sample.tokens) for sample in samples)
        assert [len(sample.tokens) for sample in samples] == [25, 39]  # 38.25 tokens of speech, 39 with the padding
    flow(collate(samples), "cpu")["loss"].backward()
    found = read_parquet(tmp_path / "parquet_000000000.tar", flow, use_spk_embedding=True)
    assert found[0].speaker.std() == pytest.approx(0, abs=1e-6)


def test_parquet_without_a_column_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", "tiny2", audio_data=b"not audio")
    with pytest.raises(ValueError, match="audio_data of u0 is not audio"):
        read(tmp_path, make_flow("tiny2"))
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["speech_token"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet lacks speech_token; it has utt, audio_data"):
        read(tmp_path, make_flow("tiny2"))


# ------------------------------------------------------------------------------------------------ checkpoints
def test_checkpoints_are_whole_and_the_latest_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"x": torch.full((3,), float(step)), "step": step})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000030.pt"]
    assert load_checkpoint(checkpoints(tmp_path)[-1])["step"] == 30


def test_a_run_killed_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})

    def die(state, file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"step": 2})
    assert [load_checkpoint(path)["step"] for path in checkpoints(tmp_path)] == [1]


def test_what_cannot_be_loaded_safely_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['flow'\]\[1\] is a Linear"):
        save_checkpoint(tmp_path, 1, {"flow": [1, nn.Linear(1, 1)]})
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-1.pt")


def test_generators_go_on_from_a_saved_state(tmp_path: Path) -> None:
    import random

    draw = lambda: (random.random(), torch.rand(3).tolist())  # noqa: E731
    cpu = torch.device("cpu")
    save_checkpoint(tmp_path, 0, rng_state(cpu))
    first = draw()
    set_rng_state(load_checkpoint(checkpoints(tmp_path)[0]), cpu)
    with preserved_rng(cpu):
        assert draw() == first
    assert draw() == first
    with pytest.raises(ValueError, match="saved on a CPU"):
        set_rng_state(rng_state(cpu), torch.device("cuda"))


# ------------------------------------------------------------------------------------------------ the example
def command(folder: Path, out: Path, *more: str) -> list[str]:
    if not TRAIN.is_file():
        pytest.skip("not run: the training example is only in the source tree")
    options = ["--steps", "20", "--save-every", "5", "--max-frames", "300", "--picture-every", "0", "--no-tensorboard"]
    base = ["--data", str(folder), "--out", str(out), "--preset", "tiny3", "--device", "cpu", *options]
    return [sys.executable, str(TRAIN), *base, *more]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}


def figures(out: Path) -> list[dict[str, str]]:
    path = out / "figures.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(folder, whole), env=ENVIRONMENT, check=True, capture_output=True, timeout=300)

    with subprocess.Popen(command(folder, killed), env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while len(figures(killed)) < 12 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(figures(killed)) < 20
    again = subprocess.run(
        command(folder, killed), env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=300
    )
    assert "resuming after" in again.stdout

    assert [row["step"] for row in figures(whole)] == [str(step) for step in range(20)]
    assert figures(killed) == figures(whole)  # every figure of every step, to the last bit
    weights = [torch.load(out / "flow.pt", weights_only=True) for out in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    fastflow.from_preset("tiny3").load_state_dict(weights[1])


# Runs the script that is its first argument, then prints which threads are left.
WATCHED = """
import contextlib, pathlib, runpy, sys, time

def threads():
    for task in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield task.read_text().strip()

del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    until = time.monotonic() + 10  # what has ended is listed for a moment still
    while any("gloo" in name for name in threads()) and time.monotonic() < until:
        time.sleep(0.05)
    print("threads left:", *threads())
"""


def test_the_example_trains_in_two_processes(folder: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched.py"
    watched.write_text(WATCHED)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(watched)]
    more = ["--steps", "3", "--accumulate", "2", "--max-frames", "200", "--bf16", "--freeze", "speaker"]
    done = subprocess.run(
        [*start, *command(folder, tmp_path, *more)[1:]], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(figures(tmp_path)) == 3
    assert len(load_checkpoint(checkpoints(tmp_path)[-1])["rng"]) == 2
    assert done.stdout.count("threads left:") == 2
    assert "gloo" not in done.stdout  # a thread of gloo's that outlives the interpreter may abort the process


def test_the_examples_errors_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, tmp_path / "out"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == f"train_flow: no audio file (.wav, .flac, .ogg, .mp3) below {tmp_path}"
