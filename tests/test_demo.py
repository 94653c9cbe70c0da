"""The demo trains two copies in lockstep, synthesises with the flow's own inference, and leaves a picture and sound."""

import argparse
import random

import pytest
import soundfile
import torch

from fastflow import backend, cli, demo
from fastflow.audio import COSYVOICE_1, COSYVOICE_2

CPU = torch.device("cpu")
PRESETS = ("tiny", "tiny2", "tiny3")


@pytest.fixture(autouse=True)
def _one_thread():
    """The flows are too small to gain from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(tmp_path, **changes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    args = parser.parse_args(["--out", str(tmp_path / "out"), "--device", "cpu"])
    return argparse.Namespace(**{**vars(args), **changes})


def noise(path, seconds: float, rate: int = 16000, channels: int = 1):
    generator = torch.Generator().manual_seed(0)
    wav = 0.1 * torch.randn(int(seconds * rate), channels, generator=generator)
    soundfile.write(path, wav.numpy(), rate)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple:
    """The whole demo, with few steps: what it returns and what it wrote."""
    torch.set_num_threads(1)
    args = arguments(tmp_path_factory.mktemp("demo"), steps=24)
    return demo.run_demo(args), args.out


def test_the_loss_falls_and_the_mel_gets_nearer(trained) -> None:
    result, _ = trained
    for arm in result["arms"]:
        assert len(arm.losses) == 24
        assert sum(arm.losses[-6:]) < 0.7 * sum(arm.losses[:6])
    assert result["l1"] < 0.9 * result["l1_untrained"]


def test_both_arms_stay_together(trained) -> None:
    result, _ = trained
    assert max(demo.differences(result["arms"])) < 1e-3


def test_the_arms_run_on_the_backends_they_are_named_after(trained) -> None:
    ours, reference = trained[0]["arms"]
    assert not any(name.startswith("fastflow::") for name in reference.ops)
    if backend.extension is not None:
        assert ours.ops["fastflow::interpolate"] == ours.ops["fastflow::interpolate_backward"] == 1
    assert 0 < ours.saved_bytes <= reference.saved_bytes


def test_the_picture_is_not_blank(trained) -> None:
    from matplotlib.image import imread

    picture = imread(trained[1] / "demo.png")[..., :3]
    assert min(picture.shape[:2]) > 600
    assert picture.std() > 0.1


def test_the_sound_is_not_silent(trained) -> None:
    result, out = trained
    for name in ("generated.wav", "target.wav"):
        wav, rate = soundfile.read(out / name)
        assert rate == 22050
        assert len(wav) == len(result["utterance"].mel) * 256
        assert (wav**2).mean() ** 0.5 > 0.003


def test_the_prompt_is_kept_and_the_rest_generated(trained) -> None:
    result, _ = trained
    utterance, mel = result["utterance"], result["mel"]
    prompt = utterance.frames(75)
    assert mel.shape == utterance.mel.shape
    assert torch.equal(mel[:prompt], utterance.mel[:prompt])
    assert not torch.equal(mel[prompt:], utterance.mel[prompt:])


def test_the_same_seed_gives_the_same_curve() -> None:
    curves = []
    for _ in range(2):
        arms, utterance = demo.build("tiny", demo.SPEECH, 3, CPU, 2)
        reference = [arm for arm in arms if arm.backend == "reference"]
        demo.train(reference, utterance, 2, 3)
        curves.append(reference[0].losses)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tiny_preset_trains_and_synthesises(preset) -> None:
    arms, utterance = demo.build(preset, demo.SPEECH, 0, CPU, 1)
    demo.train(arms, utterance, 1, 0)
    assert arms[0].losses == pytest.approx(arms[1].losses, rel=1e-5)
    mel = demo.synthesise(arms[0].flow, utterance, CPU, 0)
    assert mel.shape == utterance.mel.shape
    assert mel.isfinite().all()
    assert arms[0].flow.training


def test_generators_are_put_back() -> None:
    before = random.getstate(), torch.get_rng_state()
    with demo.seeded(5, CPU):
        inside = random.random(), torch.rand(()).item()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    with demo.seeded(5, CPU):
        assert (random.random(), torch.rand(()).item()) == inside


def test_tokens_depend_on_the_seed_alone() -> None:
    mel = torch.randn(400, 80, generator=torch.Generator().manual_seed(0))
    tokens = demo.stand_in_tokens(mel, 200, 16, seed=1)
    assert torch.equal(tokens, demo.stand_in_tokens(mel, 200, 16, seed=1))
    assert not torch.equal(tokens, demo.stand_in_tokens(mel, 200, 16, seed=2))
    assert tokens.shape == (200,)
    assert tokens.min() >= 0
    assert tokens.max() < 16


def test_like_frames_get_like_tokens() -> None:
    mel = torch.zeros(300, 80)
    mel[100:200] = 1
    tokens = demo.stand_in_tokens(mel, 150, 2, seed=0)
    assert tokens.unique_consecutive().tolist() in ([0, 1, 0], [1, 0, 1])
    assert (tokens[50:100] == tokens[50]).all()


@pytest.mark.parametrize(("spec", "rate", "frames_per_token"), [(COSYVOICE_1, 50, 86.13), (COSYVOICE_2, 25, 50)])
def test_crops_keep_tokens_and_mel_aligned(spec, rate, frames_per_token) -> None:
    tokens = torch.arange(300, dtype=torch.int32)
    frames = 300 * spec.sample_rate // (rate * spec.hop)
    time = torch.arange(frames)[:, None].expand(-1, 80) * spec.hop / spec.sample_rate
    utterance = demo.Utterance(time, tokens, torch.zeros(192), rate, spec)
    for seed in range(20):
        batch = utterance.crops(random.Random(seed), CPU)
        length = int(batch["speech_token_len"][0])
        assert length == int(demo.CROP * rate)
        assert batch["speech_feat"].shape[1] == int(batch["speech_feat_len"][0]) == utterance.frames(length)
        starts = batch["speech_token"][:, 0] / rate
        late = batch["speech_feat"][:, 0, 0] - starts  # seconds from the start of the token to that of the frame
        assert late.min() >= -1e-5
        assert late.max() < spec.hop / spec.sample_rate


def test_frames_agree_with_the_flow_for_any_prompt() -> None:
    utterance = demo.Utterance(torch.zeros(0, 80), torch.zeros(0), torch.zeros(192), 50, COSYVOICE_1)
    for tokens in range(1, 1001):  # LONGEST seconds
        assert utterance.frames(tokens) == int(tokens / 50 * 22050 / 256)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_of_any_rate_becomes_an_utterance(preset, tmp_path) -> None:
    path = noise(tmp_path / "a.flac", 4.3, rate=44100, channels=2)
    arms, utterance = demo.build(preset, path, 0, CPU, 1)
    tokens, frames = len(utterance.tokens), len(utterance.mel)
    assert tokens == pytest.approx(4.3 * arms[0].flow.input_frame_rate, abs=1)
    assert frames == utterance.frames(tokens)
    assert utterance.seconds(frames) == pytest.approx(4.3, abs=0.05)


def test_long_speech_is_cut(tmp_path) -> None:
    _, utterance = demo.build("tiny3", noise(tmp_path / "a.wav", 25), 0, CPU, 1)
    assert utterance.seconds(len(utterance.mel)) == pytest.approx(demo.LONGEST, abs=0.05)


def test_too_short_speech_is_one_clear_line(tmp_path, capsys) -> None:
    path = noise(tmp_path / "a.wav", 2)
    assert cli.main(["demo", "--wav", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"fastflow demo: {path} is too short: 2.00 s, at least 3 s are needed\n"
    assert not (tmp_path / "out").exists()


def test_nan_speech_is_one_clear_line(tmp_path, capsys) -> None:
    soundfile.write(tmp_path / "a.wav", torch.full((80000,), torch.nan).numpy(), 16000, subtype="FLOAT")
    assert cli.main(["demo", "--wav", str(tmp_path / "a.wav")]) == 2
    assert capsys.readouterr().err == f"fastflow demo: {tmp_path / 'a.wav'} holds NaN or infinite samples\n"


def test_missing_packages_are_named(monkeypatch, capsys) -> None:
    found = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else found(name))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "fastflow demo: the demo needs tqdm: pip install 'fastflow[demo]'\n"


def test_the_demo_says_what_is_a_stand_in(trained, tmp_path, capsys) -> None:
    result, _ = trained
    demo.tell_beginning(arguments(tmp_path, steps=24), result["utterance"], result["arms"])
    demo.tell_comparison(result["arms"])
    out = capsys.readouterr().out
    assert out.count("STAND-IN") == 2
    assert "synthetic speech by espeak-ng" in out
