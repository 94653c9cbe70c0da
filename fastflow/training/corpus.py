"""Speech to train on, from a folder of audio files or from CosyVoice's parquet files."""

import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow import audio
from fastflow.demo import MEL

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
COLUMNS = ("utt", "audio_data", "speech_token")
CLUSTERS = 256
POOL = 20_000  # feature vectors that the clusters are made of


@dataclass
class Sample:
    """An utterance as the flow sees it.

    Attributes:
        name: of the utterance.
        mel: ``[frames, 80]`` float32 log-mel.
        tokens: ``[tokens]`` int32 speech tokens, which last as long as the mel.
        speaker: ``[192]`` float32 x-vector of length 1.
    """

    name: str
    mel: Tensor
    tokens: Tensor
    speaker: Tensor


def read_folder(
    folder: str | Path, flow: Any, *, clusters: int = CLUSTERS, seed: int = 0, longest: float = 30.0
) -> list[Sample]:
    """Every audio file below ``folder``, with stand-ins for what CosyVoice takes from other models.

    Tokens are k-means clusters of the whole corpus's mel, averaged over the duration of a token; a file's speaker is
    the folder it lies in, and its vector is random but fixed by that name.  So a flow trained on it learns to speak
    from clusters, not from CosyVoice's tokens.

    Args:
        flow: decides mel, token rate and widths.
        clusters: of the k-means, at most the flow's vocabulary.
        seed: of the k-means.
        longest: files are cut to so many seconds.

    Raises:
        ValueError: no audio file, or one that cannot be read.
        ImportError: soundfile, scipy or tqdm is missing.
    """
    from tqdm import tqdm

    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no audio file ({', '.join(SUFFIXES)}) below {folder}")
    spec, rate = MEL[type(flow).__name__], flow.input_frame_rate
    mels, features = [], []
    for path in tqdm(paths, desc="mel", unit="file", dynamic_ncols=True):
        mel = audio.log_mel(audio.load(path, spec.sample_rate)[: int(longest * spec.sample_rate)], spec)
        count = len(mel) * rate * spec.hop // spec.sample_rate
        mels.append(mel[: count * spec.sample_rate // (rate * spec.hop)])
        features.append(F.adaptive_avg_pool1d(mels[-1].T[None], count)[0].T)
    centres = cluster_centres(torch.cat(features), min(clusters, flow.vocab_size), seed)
    width = flow.spk_embed_affine_layer.in_features
    return [
        Sample(
            str(path.relative_to(folder)),
            mel,
            torch.cdist(feature, centres).argmin(1).int(),
            speaker_vector(path.parent.name, width),
        )
        for path, mel, feature in zip(paths, mels, features, strict=True)
    ]


def cluster_centres(features: Tensor, clusters: int, seed: int) -> Tensor:
    """Centres ``[clusters, C]`` of a k-means of ``features`` ``[N, C]``, or of 20,000 of them."""
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError as error:
        raise ImportError("clustering needs scipy: pip install 'fastflow[train]'") from error
    generator = torch.Generator().manual_seed(seed)
    chosen = features[torch.randperm(len(features), generator=generator)[:POOL]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster is a token that never occurs
        centres, _ = kmeans2(chosen.double().numpy(), min(clusters, len(chosen)), iter=20, minit="++", seed=seed)
    return torch.from_numpy(centres).float()


def speaker_vector(name: str, width: int) -> Tensor:
    """A random vector of length 1 that stands in for the x-vector of the speaker ``name``."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return F.normalize(torch.randn(width, generator=generator), dim=0)


def read_parquet(path: str | Path, flow: Any, *, use_spk_embedding: bool = False) -> list[Sample]:
    """Utterances of CosyVoice's parquet files (those that ``tools/make_parquet_list.py`` writes).

    Columns: ``utt``, ``audio_data`` (the bytes of an audio file), ``speech_token``, and ``utt_embedding`` or
    ``spk_embedding``.  The waveform is padded with zeros to whole tokens where the flow has a fixed number of frames
    per token; of tokens and mel the longer one is cut to the other.

    Args:
        path: a parquet file, a folder of them, or a ``data.list`` with one path a line.
        flow: decides mel and widths.
        use_spk_embedding: take the speaker's mean vector, as upstream does for fine-tuning.

    Raises:
        ValueError: no file, no utterance with tokens, or a missing column.
        ImportError: pyarrow or soundfile is missing.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'fastflow[train]'") from error
    embedding = "spk_embedding" if use_spk_embedding else "utt_embedding"
    samples = []
    for file in _parquet_files(Path(path)):
        table = pyarrow.parquet.ParquetFile(file)
        if missing := [name for name in (*COLUMNS, embedding) if name not in table.schema_arrow.names]:
            raise ValueError(f"{file} lacks {', '.join(missing)}; it has {', '.join(table.schema_arrow.names)}")
        for rows in table.iter_batches(batch_size=64, columns=[*COLUMNS, embedding]):
            samples += [_sample(row, row[embedding], flow) for row in rows.to_pylist() if row["speech_token"]]
    if not samples:
        raise ValueError(f"{path} holds no utterance with speech tokens")
    return samples


def _parquet_files(path: Path) -> list[Path]:
    if path.is_dir():  # upstream names them .tar
        files = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".tar"))
    elif path.suffix == ".list":
        files = [Path(line) for line in path.read_text().split("\n") if line.strip()]
    else:
        files = [path]
    if not files or not all(file.is_file() for file in files):
        absent = next((file for file in files if not file.is_file()), path)
        raise ValueError(f"no parquet file: {absent}")
    return files


def _sample(row: dict[str, Any], embedding: Any, flow: Any) -> Sample:
    spec, ratio = MEL[type(flow).__name__], getattr(flow, "token_mel_ratio", None)
    wav, tokens = _decode(row["audio_data"], row["utt"], spec.sample_rate), torch.tensor(row["speech_token"]).int()
    speaker = F.normalize(torch.tensor(embedding, dtype=torch.float32).flatten(), dim=0)
    if ratio is None:  # the length regulator stretches to any number of frames
        return Sample(row["utt"], audio.log_mel(wav, spec), tokens, speaker)
    mel = audio.log_mel(F.pad(wav, (0, -len(wav) % (ratio * spec.hop))), spec)
    count = min(len(tokens), len(mel) // ratio)
    return Sample(row["utt"], mel[: ratio * count], tokens[:count], speaker)


def _decode(data: bytes, name: str, sample_rate: int) -> Tensor:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading audio needs soundfile: pip install 'fastflow[train]'") from error
    try:
        wav, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the audio_data of {name} is not audio: {error.error_string}") from error
    wav = audio.resample(torch.from_numpy(wav).mean(1), rate, sample_rate)
    return wav / wav.abs().max().clamp(min=1)


def read(path: str | Path, flow: Any) -> list[Sample]:
    """:func:`read_parquet` for a parquet file, a ``data.list`` or a folder with parquet files, else read_folder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    holds_parquet = path.is_dir() and any(_is_parquet(file) for file in path.iterdir())
    return read_parquet(path, flow) if holds_parquet or path.is_file() else read_folder(path, flow)


def _is_parquet(file: Path) -> bool:
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return stream.read(4) == b"PAR1"


def lengths(samples: list[Sample]) -> list[int]:
    """Mel frames of each sample."""
    return [len(sample.mel) for sample in samples]


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """A training batch: padded with zeros, longest row first."""
    samples = sorted(samples, key=lambda sample: -len(sample.mel))
    pad = torch.nn.utils.rnn.pad_sequence
    tokens, mels = [sample.tokens for sample in samples], [sample.mel for sample in samples]
    return {
        "speech_token": pad(tokens, batch_first=True),
        "speech_token_len": torch.tensor([len(x) for x in tokens], dtype=torch.int32),
        "speech_feat": pad(mels, batch_first=True),
        "speech_feat_len": torch.tensor([len(x) for x in mels], dtype=torch.int32),
        "embedding": torch.stack([sample.speaker for sample in samples]),
    }
