"""``fastflow demo``: train a small flow on a few seconds of speech, beside its reference, and synthesise the mel.

The speech that ships with the package is synthetic.  It was made by espeak-ng 1.51::

    espeak-ng -v en-us -s 150 -w speech.wav \
        "The quick brown fox jumps over the lazy dog. Good speech is worth hearing twice. How are you today?"

and stored losslessly by ``soundfile.write("speech.flac", *soundfile.read("speech.wav", dtype="int16"))``.

Two more things stand in for parts of CosyVoice that are not the flow: k-means clusters of the mel for its speech
tokenizer, and a fixed random vector for its speaker x-vector.  Everything else is the real thing: the mel, the flow's
own loss with its randomness, and its own inference.
"""

import argparse
import contextlib
import copy
import importlib.util
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import audio
from fastflow.backend import use_backend
from fastflow.config import PRESETS, from_preset
from fastflow.testing.counters import Counts, SavedTensors

SPEECH = Path(__file__).parent / "data" / "speech.flac"
MEL = {
    "MaskedDiffWithXvec": audio.COSYVOICE_1,
    "CausalMaskedDiffWithXvec": audio.COSYVOICE_2,
    "CausalMaskedDiffWithDiT": audio.COSYVOICE_3,
}
CLUSTERS = 128
LONGEST = 20.0  # seconds of a file that are used
PROMPT = 1.5  # seconds at the start of the utterance that the synthesis is given
CROP = 2.0  # seconds of a row of a training batch
ROWS = 2
STEPS = 500
SHORTEST = 3.0  # seconds: a prompt and as much again
LEARNING_RATE = 1e-3
WARM_UP = 0.05  # share of the steps
CLIP = 5.0  # largest gradient norm, as in CosyVoice's recipes


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's and torch's generators, on which the flow draws, and put them back afterwards."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


@dataclass
class Utterance:
    """An utterance as the flow sees it.

    Attributes:
        mel: ``[frames, 80]`` float32 log-mel.
        tokens: ``[tokens]`` int32 stand-in speech tokens, aligned with the mel.
        speaker: ``[192]`` float32 stand-in x-vector.
        token_rate: tokens per second.
        spec: parameters of the mel.
    """

    mel: Tensor
    tokens: Tensor
    speaker: Tensor
    token_rate: int
    spec: audio.MelSpec

    def frames(self, tokens: int) -> int:
        """Frames that ``tokens`` tokens last, rounded down."""
        return tokens * self.spec.sample_rate // (self.token_rate * self.spec.hop)

    def seconds(self, frames: int) -> float:
        return frames * self.spec.hop / self.spec.sample_rate

    def crops(self, rng: random.Random, device: torch.device) -> dict[str, Tensor]:
        """A training batch of ROWS random crops of CROP seconds (or of the whole, if that is shorter)."""
        tokens = min(int(CROP * self.token_rate), len(self.tokens))
        frames = self.frames(tokens)
        # One token less than possible may start the crop: its first frame is rounded up.
        starts = [rng.randint(0, max(len(self.tokens) - tokens - 1, 0)) for _ in range(ROWS)]
        first_frames = [-(-start * self.spec.sample_rate // (self.token_rate * self.spec.hop)) for start in starts]
        batch = {
            "speech_token": torch.stack([self.tokens[s : s + tokens] for s in starts]),
            "speech_token_len": torch.full((ROWS,), tokens, dtype=torch.int32),
            "speech_feat": torch.stack([self.mel[f : f + frames] for f in first_frames]),
            "speech_feat_len": torch.full((ROWS,), frames, dtype=torch.int32),
            "embedding": self.speaker.expand(ROWS, -1),
        }
        return {name: x.to(device) for name, x in batch.items()}


def stand_in_tokens(mel: Tensor, count: int, clusters: int, seed: int) -> Tensor:
    """k-means clusters of the mel ``[frames, 80]``, averaged over ``count`` equal spans: ``[count]`` int32.

    They stand in for the speech tokenizer: like its tokens they are discrete and aligned with the speech, unlike them
    they are cut from the very mel that the flow is to produce.
    """
    from scipy.cluster.vq import kmeans2

    features = F.adaptive_avg_pool1d(mel.T[None], count)[0].T.double().numpy()
    _, labels = kmeans2(features, min(clusters, count), iter=50, minit="++", seed=seed, missing="warn")
    return torch.from_numpy(labels).int()


def read_utterance(flow: Any, path: Path, seed: int) -> Utterance:
    """Load speech and make what the flow takes of it: mel, tokens and speaker.

    Raises:
        FileNotFoundError, ValueError: no such file, not audio, NaN samples, or less than SHORTEST seconds.
    """
    spec, rate = MEL[type(flow).__name__], flow.input_frame_rate
    wav = audio.load(path, spec.sample_rate)
    if (seconds := len(wav) / spec.sample_rate) < SHORTEST:
        raise ValueError(f"{path} is too short: {seconds:.2f} s, at least {SHORTEST:.0f} s are needed")
    mel = audio.log_mel(wav[: int(LONGEST * spec.sample_rate)], spec)
    # Only whole tokens: the frames of `count` tokens, which may be fewer than there are.
    count = len(mel) * rate * spec.hop // spec.sample_rate
    mel = mel[: count * spec.sample_rate // (rate * spec.hop)]
    tokens = stand_in_tokens(mel, count, min(CLUSTERS, flow.vocab_size), seed)
    speaker = torch.randn(flow.spk_embed_affine_layer.in_features, generator=torch.Generator().manual_seed(seed))
    return Utterance(mel, tokens, F.normalize(speaker, dim=0), rate, spec)


@dataclass
class Arm:
    """One of the two trainings: a flow, its optimiser, and what was measured of it.

    Attributes:
        losses: loss of each step.
        seconds: wall time of each step.
        peak_bytes: the most GPU memory that a step needed beyond what was there before it; 0 on the CPU.
        saved_bytes: bytes that one step keeps for the backward pass.
        ops: compute ops that one step dispatches, forward and backward, by name.
    """

    backend: str
    flow: Any
    device: torch.device
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    saved_bytes: int = 0
    ops: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.flow.parameters(), lr=LEARNING_RATE, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """A linear rise, then half a cosine down to zero."""
        warm_up = max(1, int(WARM_UP * self.steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up)))

    def count(self, batch: dict[str, Tensor], seed: int) -> None:
        """Count the ops and the saved bytes of one step, which trains nothing."""
        with seeded(seed, self.device), use_backend(self.backend), Counts() as counts:
            with SavedTensors((*self.flow.parameters(), *batch.values())) as saved:
                loss = self.flow(batch, self.device)["loss"]
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.saved_bytes, self.ops = saved.bytes, counts.ops

    def step(self, batch: dict[str, Tensor], seed: int) -> None:
        before = self._mark()
        start = time.perf_counter()
        with seeded(seed, self.device), use_backend(self.backend):
            loss = self.flow(batch, self.device)["loss"]
            loss.backward()
        nn.utils.clip_grad_norm_(self.flow.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())  # waits for the GPU
        self.seconds.append(time.perf_counter() - start)
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device) - before)

    def _mark(self) -> int:
        """Wait for the GPU and begin to look for the peak of its memory; what is in use now."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def train(arms: list[Arm], utterance: Utterance, steps: int, seed: int) -> None:
    """Train all arms on the same batches with the same random draws; who goes first alternates."""
    from tqdm import tqdm

    crops = random.Random(seed)
    for arm in arms:
        arm.count(utterance.crops(random.Random(seed), arm.device), seed)
    with tqdm(range(steps), desc="training", unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            batch = utterance.crops(crops, arms[0].device)
            for arm in arms if step % 2 else arms[::-1]:
                arm.step(batch, seed + step)
            progress.set_postfix({arm.backend: f"{arm.losses[-1]:.3f}" for arm in arms})


def synthesise(flow: Any, utterance: Utterance, device: torch.device, seed: int, **options: Any) -> Tensor:
    """The flow's own inference from the tokens, prompted by the first PROMPT seconds; ``options`` go to its solver.

    Returns:
        ``[frames, 80]`` on the CPU; the prompt's frames are the true ones.
    """
    prompt_tokens = int(PROMPT * utterance.token_rate)
    prompt_frames = utterance.frames(prompt_tokens)
    prompt, rest = utterance.tokens[None].to(device).split([prompt_tokens, len(utterance.tokens) - prompt_tokens], 1)
    arguments = {
        "token": rest,
        "token_len": torch.tensor([rest.shape[1]], dtype=torch.int32, device=device),
        "prompt_token": prompt,
        "prompt_token_len": torch.tensor([prompt_tokens], dtype=torch.int32, device=device),
        "prompt_feat": utterance.mel[None, :prompt_frames].to(device),
        "prompt_feat_len": torch.tensor([prompt_frames], dtype=torch.int32, device=device),
        "embedding": utterance.speaker[None].to(device),
    }
    if type(flow).__name__ == "MaskedDiffWithXvec":
        arguments["flow_cache"] = torch.zeros(1, 80, 0, 2, device=device)
    else:
        arguments.update(streaming=False, finalize=True)
    was_training = flow.training
    with seeded(seed, device):
        mel, _ = flow.eval().inference(**arguments, **options)
    flow.train(was_training)
    return torch.cat([utterance.mel[:prompt_frames], mel[0].T.cpu()])


def l1(mel: Tensor, utterance: Utterance) -> float:
    """Mean absolute difference from the target behind the prompt, natural log units."""
    prompt_frames = utterance.frames(int(PROMPT * utterance.token_rate))
    return (mel - utterance.mel)[prompt_frames:].abs().mean().item()


def smooth(losses: list[float]) -> list[float]:
    """Centred running mean over a tenth of the steps: single losses are noisy by the draw of the time."""
    half = len(losses) // 20
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def differences(arms: list[Arm]) -> list[float]:
    """Relative difference of the two losses at each step."""
    ours, reference = arms
    return [abs(a - b) / abs(b) for a, b in zip(ours.losses, reference.losses, strict=True)]


def show(axis: Any, mel: Tensor, utterance: Utterance) -> Any:
    """Draw a mel ``[T, 80]`` over seconds, on the colour scale of the utterance's own, and return the image."""
    scale = {"vmin": utterance.mel.min().item(), "vmax": utterance.mel.max().item(), "cmap": "magma"}
    axis.set_ylabel("mel channel")
    extent = (0, utterance.seconds(len(mel)), 0, mel.shape[1])
    return axis.imshow(mel.T.numpy(), origin="lower", aspect="auto", extent=extent, **scale)


def draw(path: Path, title: str, utterance: Utterance, mel: Tensor, arms: list[Arm]) -> None:
    """One picture: tokens, target and generated mel on one time axis and one colour scale, and both loss curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10.5), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=14)
    grid = figure.add_gridspec(4, 2, height_ratios=[1.1, 3, 3, 3])
    seconds = utterance.seconds(len(mel))

    axis = figure.add_subplot(grid[0, :])
    axis.step(torch.linspace(0, seconds, len(utterance.tokens) + 1)[:-1], utterance.tokens, where="post", linewidth=0.9)
    axis.set(xlim=(0, seconds), ylabel="cluster", xticklabels=[])
    axis.set_title(f"stand-in speech tokens: {utterance.token_rate} per second, k-means of the mel", fontsize=11)

    panels = []
    names = ("target", "generated from the tokens; left of the line: the prompt, given")
    for row, (name, shown) in enumerate(zip(names, (utterance.mel, mel), strict=True), start=1):
        axis = figure.add_subplot(grid[row, :])
        image = show(axis, shown, utterance)
        axis.set_title(name, fontsize=11)
        panels.append(axis)
    panels[0].set_xticklabels([])
    panels[1].set_xlabel("time (s)")
    panels[1].axvline(PROMPT, color="white", linestyle="--", linewidth=1.5)
    figure.colorbar(image, ax=panels, label="log magnitude (natural log)", pad=0.01)

    axis = figure.add_subplot(grid[3, 0])
    for arm, style in zip(arms, ("-", "--"), strict=True):
        (line,) = axis.plot(smooth(arm.losses), style, linewidth=2, label=f"{arm.backend} (running mean)", zorder=3)
        axis.plot(arm.losses, linewidth=0.6, alpha=0.35, color=line.get_color())
    axis.set(xlabel="training step", ylabel="flow-matching loss", yscale="log")
    axis.set_title("loss of both trainings, same batches and draws", fontsize=11)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")

    axis = figure.add_subplot(grid[3, 1])
    gaps = differences(arms)
    axis.set(xlabel="training step", ylabel="relative difference")
    axis.set_title("difference of the two losses", fontsize=11)
    axis.grid(alpha=0.3)
    if any(gaps):
        axis.semilogy([gap or math.nan for gap in gaps], ".", markersize=4)
    else:
        axis.plot(gaps)
        axis.text(0.5, 0.6, "none: bit-identical", ha="center", transform=axis.transAxes)
    figure.savefig(path)


def check_requirements() -> None:
    """Fail before any work if one of the packages that only the demo needs is missing."""
    needed = ("soundfile", "scipy", "matplotlib", "tqdm")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'fastflow[demo]'")


def build(preset: str, path: Path, seed: int, device: torch.device, steps: int) -> tuple[list[Arm], Utterance]:
    """The utterance, and two copies of one freshly initialised flow: fastflow's backends first, then the reference.

    The bias of the last layer starts at the target's mean, which saves the steps that it would take to get there.
    Dropout is off: fused attention draws its own mask, and both trainings are to see the same.
    """
    with seeded(seed, torch.device("cpu")):
        flow: Any = from_preset(preset)
    utterance = read_utterance(flow, path, seed)
    estimator = flow.decoder.estimator
    last = estimator.proj_out if hasattr(estimator, "proj_out") else estimator.final_proj
    with torch.no_grad():
        last.bias.copy_(utterance.mel.mean(0))
    for module in flow.modules():
        for name in ("p", "dropout_rate"):  # of nn.Dropout, and of attention
            if hasattr(module, name):
                setattr(module, name, 0.0)
    flow.to(device)
    return [Arm("auto", flow, device, steps), Arm("reference", copy.deepcopy(flow), device, steps)], utterance


def tell_beginning(args: argparse.Namespace, utterance: Utterance, arms: list[Arm]) -> None:
    flow, spec = arms[0].flow, utterance.spec
    size = sum(parameter.numel() for parameter in flow.parameters()) / 1e6
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    speech = "the shipped sentences, synthetic speech by espeak-ng" if args.wav is None else str(args.wav)
    frames, tokens = len(utterance.mel), len(utterance.tokens)
    print(f"flow      preset {args.preset}: {type(flow).__name__}, {size:.2f} M parameters, float32")
    print(f"device    {where}, {torch.get_num_threads()} CPU threads")
    print(f"speech    {utterance.seconds(frames):.2f} s: {speech}")
    print(f"mel       {frames} frames at {spec.sample_rate} Hz, hop {spec.hop}, as CosyVoice computes it")
    print(f"tokens    {tokens} at {utterance.token_rate} Hz: k-means of the mel, a STAND-IN for CosyVoice's tokenizer")
    print("speaker   a fixed random vector, a STAND-IN for CosyVoice's x-vector")
    print(f"training  {args.steps} steps of {ROWS} crops, in lockstep: fastflow (auto) and the plain-PyTorch reference")


def tell_comparison(arms: list[Arm]) -> None:
    """Distance of the losses; ratios of time and memory, and how much of a step is fastflow's own so far."""
    ours, reference = arms
    gaps = differences(arms)
    if any(gaps):
        print(f"losses    differ by {statistics.median(gaps):.1e} (median) and {max(gaps):.1e} (largest), relative")
    else:
        print("losses    are bit-identical")
    # Each pair ran back to back, so the median of their ratios outlives a noisy machine.
    ratios = [a / b for a, b in zip(ours.seconds, reference.seconds, strict=True)]
    milliseconds = [1e3 * statistics.median(arm.seconds) for arm in arms]
    print(
        f"time      {milliseconds[0]:.0f} ms per step against {milliseconds[1]:.0f} ms: "
        f"ratio {statistics.median(ratios):.2f}"
    )
    print(
        f"memory    {ours.saved_bytes / 2**20:.1f} MiB saved for backward against "
        f"{reference.saved_bytes / 2**20:.1f} MiB: ratio {ours.saved_bytes / reference.saved_bytes:.2f}"
    )
    if reference.peak_bytes:
        print(
            f"          {ours.peak_bytes / 2**20:.0f} MiB peak of a step against {reference.peak_bytes / 2**20:.0f} "
            f"MiB: ratio {ours.peak_bytes / reference.peak_bytes:.2f}"
        )
    fused = {name: count for name, count in ours.ops.items() if name.startswith("fastflow::")}
    listed = ", ".join(f"{name.removeprefix('fastflow::')} x {count}" for name, count in fused.items()) or "none"
    print(f"ops       {ours.ops.total()} per step against {reference.ops.total()}; of these fastflow's own: {listed}")


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """The whole demo; prints what it does and finds, writes demo.png, generated.wav and target.wav.

    Returns:
        ``arms``, ``utterance``, ``mel`` (generated), ``l1`` and ``l1_untrained``.
    """
    arms, utterance = build(args.preset, args.wav or SPEECH, args.seed, args.device, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    tell_beginning(args, utterance, arms)
    untrained = l1(synthesise(arms[0].flow, utterance, args.device, args.seed), utterance)
    train(arms, utterance, args.steps, args.seed)
    tell_comparison(arms)

    mel = synthesise(arms[0].flow, utterance, args.device, args.seed)
    trained = l1(mel, utterance)
    tenth = max(1, args.steps // 10)
    first, last = (statistics.fmean(part) for part in (arms[0].losses[:tenth], arms[0].losses[-tenth:]))
    print(f"loss      {first:.2f} in the first tenth of the steps, {last:.2f} in the last")
    print(f"synthesis 10 solver steps after a prompt of {PROMPT} s; distance from the target (mean L1 of the log-mel):")
    print(f"          {trained:.2f}, before training {untrained:.2f}")
    gains = f"loss {first:.2f} → {last:.2f}, mel L1 {untrained:.2f} → {trained:.2f}"
    draw(args.out / "demo.png", f"fastflow demo, preset {args.preset}: {gains}", utterance, mel, arms)
    write_wav(args.out / "generated.wav", mel, utterance.spec)
    write_wav(args.out / "target.wav", utterance.mel, utterance.spec)
    print(f"picture   {args.out / 'demo.png'}")
    print(f"sound     {args.out / 'generated.wav'}, and {args.out / 'target.wav'} from the true mel, to compare with:")
    print("          both by Griffin-Lim, a STAND-IN for CosyVoice's vocoder")
    return {"arms": arms, "utterance": utterance, "mel": mel, "l1": trained, "l1_untrained": untrained}


def write_wav(path: Path, mel: Tensor, spec: audio.MelSpec) -> None:
    import soundfile

    soundfile.write(path, audio.griffin_lim(mel, spec).numpy(), spec.sample_rate, subtype="PCM_16")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: torch sees {torch.cuda.device_count()} GPUs")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fastflow demo``."""
    parser.add_argument(
        "--wav", type=Path, metavar="FILE", help=f"speech of your own, {SHORTEST:.0f} to {LONGEST:.0f} s of it are used"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="tiny, tiny2, tiny3 are small v1, v2, v3 (default tiny)"
    )
    parser.add_argument("--steps", type=_positive, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="where to write (default ./demo_out)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, noise and clusters (default 0)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=device, help=f"cpu, cuda or cuda:N (default here {device})")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of torch (default: torch's choice)")


def run(args: argparse.Namespace) -> int:
    """``fastflow demo``.

    Raises:
        ValueError, FileNotFoundError: the speech cannot be used.
        ImportError: a package of the extra ``demo`` is missing.
        RuntimeError: the backend chosen by FASTFLOW_BACKEND cannot run here.
    """
    check_requirements()
    if args.threads:
        torch.set_num_threads(args.threads)
    run_demo(args)
    return 0
