"""Speech in and out of the demo: load a file, log-mel as CosyVoice computes it, and a waveform by Griffin-Lim.

The flow never sees audio; these functions make its targets and let one hear its output without a vocoder.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MelSpec:
    """Parameters of a log-mel spectrogram; the window is a periodic Hann window of ``n_fft`` samples.

    Attributes:
        sample_rate: samples per second.
        n_fft: samples per window.
        hop: samples per frame.
        fmax: upper edge of the highest channel, Hz; the lowest channel starts at 0 Hz.
        channels: mel channels.
    """

    sample_rate: int
    n_fft: int
    hop: int
    fmax: float
    channels: int = 80


# From the published training recipes.  CosyVoice 3 alone sets no fmax, which means half the sample rate.
COSYVOICE_1 = MelSpec(sample_rate=22050, n_fft=1024, hop=256, fmax=8000)
COSYVOICE_2 = MelSpec(sample_rate=24000, n_fft=1920, hop=480, fmax=8000)
COSYVOICE_3 = MelSpec(sample_rate=24000, n_fft=1920, hop=480, fmax=12000)


def load(path: str | Path, sample_rate: int) -> Tensor:
    """Read an audio file (whatever libsndfile reads) as mono at ``sample_rate``.

    Channels are averaged; a waveform that exceeds 1 is scaled to a peak of 1, as CosyVoice's data pipeline does.

    Returns:
        ``[samples]`` float32 within [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an audio file, empty, or NaN or infinite samples.
        ImportError: soundfile or scipy is missing.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading audio needs soundfile: pip install 'fastflow[demo]'") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    try:
        data, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not an audio file that libsndfile reads: {error.error_string}") from error
    if not len(data):
        raise ValueError(f"{path} holds no samples")
    wav = torch.from_numpy(data).mean(1)
    if not wav.isfinite().all():
        raise ValueError(f"{path} holds NaN or infinite samples")
    wav = resample(wav, rate, sample_rate)
    return wav / wav.abs().max().clamp(min=1)


def resample(wav: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling of ``wav`` ``[samples]`` by a polyphase filter, to ceil(samples * new_rate / rate)."""
    if rate == new_rate:
        return wav
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError("resampling audio needs scipy: pip install 'fastflow[demo]'") from error
    divisor = math.gcd(rate, new_rate)
    return torch.from_numpy(resample_poly(wav.numpy(), new_rate // divisor, rate // divisor)).float()


def _hz_to_mel(hz: float) -> float:
    """The Slaney scale (Auditory Toolbox, 1998): linear below 1 kHz, 27 channels per factor 6.4 above."""
    return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) * 27 / math.log(6.4)


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


@lru_cache
def mel_filterbank(spec: MelSpec) -> Tensor:
    """Triangular filters of unit area over frequency in Hz (Slaney normalisation): ``[channels, n_fft // 2 + 1]``."""
    edges = _mel_to_hz(torch.linspace(0, _hz_to_mel(spec.fmax), spec.channels + 2, dtype=torch.float64))
    bins = torch.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1, dtype=torch.float64)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (upper - lower)).float()


def log_mel(wav: Tensor, spec: MelSpec) -> Tensor:
    """Log-mel spectrogram as CosyVoice's recipes compute it: log of the mel-weighted *magnitude* spectrum.

    ``mel = log(max(1e-5, W @ sqrt(|STFT(wav)|^2 + 1e-9)))``, frames not centred, the waveform reflected by
    (n_fft - hop) / 2 samples at both ends, so that frame i is centred on sample (i + 1/2) * hop.

    Args:
        wav: ``[samples]`` float32.

    Returns:
        ``[samples // hop, channels]`` float32, natural logarithm.

    Raises:
        ValueError: the waveform is too short to be reflected.
    """
    edge = (spec.n_fft - spec.hop) // 2
    if len(wav) <= edge:
        raise ValueError(f"the waveform must be longer than {edge} samples ({spec.sample_rate} Hz), got {len(wav)}")
    wav = F.pad(wav[None], (edge, edge), mode="reflect")
    spectrum = torch.stft(
        wav, spec.n_fft, spec.hop, window=torch.hann_window(spec.n_fft), center=False, return_complex=True
    )[0]
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return (mel_filterbank(spec) @ magnitude).clamp(min=1e-5).log().T.contiguous()


def griffin_lim(mel: Tensor, spec: MelSpec, iterations: int = 60, seed: int = 0) -> Tensor:
    """A waveform whose log-mel spectrogram resembles ``mel``, by fast Griffin-Lim.

    The magnitude spectrum is the non-negative part of the filterbank's pseudo-inverse applied to ``exp(mel)``.  Phases
    start at random and alternate between the two constraints with momentum 0.99 (Perraudin, Balazs and Søndergaard,
    "A fast Griffin-Lim algorithm", 2013).  It sounds metallic: it stands in for a neural vocoder.

    Args:
        mel: ``[frames, channels]``, natural logarithm; at least 2 windows (2 * n_fft / hop frames) long.

    Returns:
        ``[frames * hop]`` float32, scaled down to a peak of 1 if it exceeds that.
    """
    window = torch.hann_window(spec.n_fft)
    magnitude = (torch.linalg.pinv(mel_filterbank(spec)) @ mel.T.float().exp()).clamp(min=0)
    angle = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)) * 2 * math.pi
    phases, previous = torch.polar(torch.ones_like(angle), angle), torch.zeros(())
    for _ in range(iterations):
        wav = torch.istft(magnitude * phases, spec.n_fft, spec.hop, window=window)
        rebuilt = torch.stft(wav, spec.n_fft, spec.hop, window=window, return_complex=True)
        accelerated = rebuilt + 0.99 * (rebuilt - previous)
        phases, previous = accelerated / accelerated.abs().clamp(min=1e-16), rebuilt
    wav = torch.istft(magnitude * phases, spec.n_fft, spec.hop, window=window)
    # istft begins at the centre of frame 0, which log_mel puts half a hop after the start.
    wav = F.pad(wav, (spec.hop // 2, spec.hop - spec.hop // 2))
    return wav / wav.abs().max().clamp(min=1)
