"""The mel is CosyVoice's, files of any rate load, and Griffin-Lim inverts the mel well enough to hear."""

import math

import numpy as np
import pytest
import soundfile
import torch

from fastflow import audio
from fastflow.audio import COSYVOICE_1, COSYVOICE_2, COSYVOICE_3, MelSpec

# (frame, channel) of the six values recorded below, with the mean and the standard deviation of the whole mel, from
# librosa 0.11.0 in float64: filters.mel(htk=False, norm="slaney"), |stft(center=False)| of the reflected signal.
SPOTS = [(0, 0), (3, 10), (10, 30), (15, 45), (20, 60), (24, 79)]
GOLDEN = {
    COSYVOICE_1: (43, [-0.348, -2.5123, -3.5007, -2.1763, -8.5585, -11.5129], -8.8251, 3.6778),
    COSYVOICE_2: (25, [0.2984, -6.4294, -4.4193, -11.5129, -11.5129, -5.3889], -8.096, 4.3097),
    COSYVOICE_3: (25, [0.2985, -5.3463, -7.706, -11.302, 1.3306, -6.3608], -8.3981, 4.1954),
}


def sine(hz: float, seconds: float, rate: int) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * rate), dtype=torch.float64) / rate).float()


def loudest_hz(wav: torch.Tensor, rate: int) -> float:
    return torch.fft.rfft(wav.double() * torch.hann_window(len(wav))).abs().argmax().item() * rate / len(wav)


@pytest.mark.parametrize("spec", GOLDEN)
def test_log_mel_agrees_with_librosa(spec: MelSpec) -> None:
    t = torch.arange(spec.sample_rate // 2, dtype=torch.float64) / spec.sample_rate
    wav = 0.5 * torch.sin(2 * math.pi * (200 * t + 6000 * t**2)) + 0.05 * torch.cos(2 * math.pi * 1234 * t)
    mel = audio.log_mel(wav.float(), spec)
    frames, values, mean, std = GOLDEN[spec]
    assert mel.shape == (frames, 80)
    assert [mel[i, j].item() for i, j in SPOTS] == pytest.approx(values, abs=2e-3)
    assert (mel.mean().item(), mel.std(correction=0).item()) == pytest.approx((mean, std), abs=2e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000, 22051])
def test_any_sample_rate_loads_at_the_rate_asked_for(tmp_path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", sine(440, 0.5, rate).numpy(), rate)
    wav = audio.load(tmp_path / "a.wav", 24000)
    assert len(wav) == pytest.approx(12000, abs=1)
    assert loudest_hz(wav, 24000) == pytest.approx(440, abs=2)
    assert wav[1000:-1000].abs().max().item() == pytest.approx(0.5, abs=0.01)


def test_stereo_is_averaged(tmp_path) -> None:
    left, right = sine(300, 0.2, 16000), sine(900, 0.2, 16000)
    soundfile.write(tmp_path / "a.flac", torch.stack([left, right], 1).numpy(), 16000)
    assert (audio.load(tmp_path / "a.flac", 16000) - (left + right) / 2).abs().max() < 1e-4


def test_too_loud_audio_is_scaled_to_a_peak_of_one(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", 6 * sine(300, 0.2, 16000).numpy(), 16000, subtype="FLOAT")
    assert audio.load(tmp_path / "a.wav", 16000).abs().max() == 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [(np.zeros(0), "holds no samples"), (np.full(100, np.nan), "NaN"), (np.full(100, np.inf), "infinite")],
)
def test_unusable_samples_are_refused(tmp_path, samples: np.ndarray, message: str) -> None:
    soundfile.write(tmp_path / "a.wav", samples.astype(np.float32), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=message):
        audio.load(tmp_path / "a.wav", 16000)


def test_what_is_not_audio_is_refused(tmp_path) -> None:
    (tmp_path / "a.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"a\.wav is not an audio file"):
        audio.load(tmp_path / "a.wav", 16000)
    with pytest.raises(FileNotFoundError, match=r"no such audio file: .*b\.wav"):
        audio.load(tmp_path / "b.wav", 16000)


def test_a_waveform_too_short_for_one_window_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 384 samples"):
        audio.log_mel(torch.zeros(384), COSYVOICE_1)


@pytest.mark.parametrize("spec", GOLDEN)
def test_griffin_lim_keeps_pitch_length_and_loudness(spec: MelSpec) -> None:
    wav = sine(440, 1.0, spec.sample_rate)
    mel = audio.log_mel(wav, spec)
    rebuilt = audio.griffin_lim(mel, spec, iterations=30)
    assert len(rebuilt) == len(mel) * spec.hop
    middle = slice(len(rebuilt) // 4, -len(rebuilt) // 4)
    # A mel channel is about 40 Hz wide here, and the mel says no more than which one the sine is in.
    assert loudest_hz(rebuilt[middle], spec.sample_rate) == pytest.approx(440, abs=40)
    power = rebuilt[middle].square().mean() / wav.square().mean()
    assert abs(10 * power.log10().item()) < 3  # dB


def test_griffin_lim_keeps_the_time_axis() -> None:
    wav = torch.zeros(22050)
    wav[9000:12000] = sine(700, 1.0, 22050)[:3000]
    rebuilt = audio.griffin_lim(audio.log_mel(wav, COSYVOICE_1), COSYVOICE_1)
    centre = (rebuilt.square() * torch.arange(len(rebuilt))).sum() / rebuilt.square().sum()
    assert centre.item() == pytest.approx(10500, abs=COSYVOICE_1.hop)


def test_griffin_lim_approaches_the_mel_of_speech() -> None:
    from fastflow.demo import SPEECH

    mel = audio.log_mel(audio.load(SPEECH, 22050)[:44100], COSYVOICE_1)
    errors = [
        (audio.log_mel(audio.griffin_lim(mel, COSYVOICE_1, iterations=n), COSYVOICE_1) - mel).abs().mean().item()
        for n in (0, 5, 60)
    ]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.5
