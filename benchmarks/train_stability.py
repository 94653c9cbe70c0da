"""Why does training a flow diverge?  Three recipes on the same speech, several seeds, and the part that breaks first.

    python benchmarks/train_stability.py --out stability             under an hour on two cores
    python benchmarks/train_stability.py --out stability --full      CosyVoice 1 from scratch, for a GPU
    python benchmarks/train_stability.py --out stability --tiny      two minutes: does it work here?

``question``: everything at CosyVoice's from-scratch recipe: Adam, learning rate 0.001, warm-up, then falling with the
square root of the step, gradients clipped at 5, two batches a step.  ``decoder``: the same, but only the estimator is
trained.  Its condition comes from a short pre-training of the whole flow by our recipe, after which the estimator gets
fresh weights: a random frozen encoder would ask whether speech can be learnt from random features, another question.
``ours``: everything by AdamW with groups, a lower learning rate, lower still before the estimator, clipping at 1, and
more batches a step.  All three start from the same weights and see the same data.

Speech is made by espeak-ng (``apt install espeak-ng``) unless ``--data`` names a folder of audio files.  Tokens are
k-means clusters of the mel, speaker vectors random but fixed.  ``report.md`` holds the findings, ``loss.png`` and
``gradients.png`` the curves, ``results.json`` the figures, the folders below every figure of every step.
"""

import argparse
import csv
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe

import fastflow
from fastflow.config import PRESETS
from fastflow.training import NonFiniteError, SpikeDetector, StabilityMonitor, freeze, parameter_groups
from fastflow.training.batches import FrameBatches
from fastflow.training.corpus import Sample, collate, lengths, read_folder
from fastflow.training.parts import parts
from fastflow.training.spikes import SMALLEST_HISTORY

VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "de", "fr-fr", "es", "it", "pt-br", "nl", "sv", "pl")
WORDS = """
the a one this every quick quiet distant river mountain speaker window morning number garden evening letter crosses
follows remembers carries answers reaches opens paints above behind without toward near golden slowly often again seven
twelve hundred music water paper winter summer silver bright hollow
"""


@dataclass(frozen=True)
class Config:
    """A size of the study.

    Attributes:
        frames: of a batch, padding included.
        warm_up: steps; the question's 2,500 come to an eighth of the 20,000 steps after which it diverged.
        ours: batches of a step in our recipe; the others have 2.
    """

    preset: str
    voices: int
    sentences: int
    steps: int
    warm_up: int
    frames: int
    ours: int
    seeds: int


TINY = Config("tiny", voices=2, sentences=4, steps=40, warm_up=5, frames=400, ours=3, seeds=1)
SMALL = Config("tiny", voices=6, sentences=20, steps=500, warm_up=62, frames=600, ours=4, seeds=3)
FULL = Config(
    "cosyvoice-fromscratch", voices=12, sentences=400, steps=20_000, warm_up=2500, frames=2000, ours=8, seeds=3
)


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained.

    Attributes:
        encoder_scale: of the learning rate before the estimator.
        grouped: AdamW with decay on weights only, else Adam.
        clip: largest gradient norm.
        accumulate: batches of a step.
        decoder_only: the condition is frozen.
    """

    lr: float
    encoder_scale: float
    grouped: bool
    clip: float
    accumulate: int
    decoder_only: bool = False


def recipes(config: Config, lr: float) -> dict[str, Recipe]:
    question = Recipe(lr, 1.0, grouped=False, clip=5.0, accumulate=2)
    return {
        "question": question,
        "decoder": replace(question, decoder_only=True),
        "ours": Recipe(0.3 * lr, 0.5, grouped=True, clip=1.0, accumulate=config.ours),
    }


# ------------------------------------------------------------------------------------------------ speech
def make_speech(folder: Path, voices: int, sentences: int) -> None:
    """Sentences of random words, read by espeak-ng's voices at several speeds and pitches; files that exist stay.

    Raises:
        RuntimeError: espeak-ng is missing or fails.
    """
    from tqdm import tqdm

    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("espeak-ng is missing: install it (apt install espeak-ng), or name audio files with --data")
    jobs = [(voice, number) for voice in VOICES[:voices] for number in range(sentences)]
    for voice, number in tqdm(jobs, desc="espeak-ng", unit="file", dynamic_ncols=True):
        path = folder / voice / f"{number:04d}.wav"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        words = random.Random(f"{voice} {number}")
        text = " ".join(words.choices(WORDS.split(), k=words.randint(5, 16)))
        options = ["-v", voice, "-s", str(words.randint(130, 190)), "-p", str(words.randint(30, 70)), "-w", str(path)]
        done = subprocess.run([program, *options, text], capture_output=True, text=True)
        if done.returncode:
            path.unlink(missing_ok=True)
            raise RuntimeError(f"espeak-ng fails for voice {voice}: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------------------ training
@dataclass
class Study:
    """What all runs share."""

    config: Config
    samples: list[Sample]
    device: torch.device
    out: Path
    bf16: bool

    def fresh(self, seed: int) -> Any:
        random.seed(seed)
        torch.manual_seed(seed)
        return fastflow.from_preset(self.config.preset).to(self.device)

    def condition(self, seed: int, recipe: Recipe) -> Any:
        """A flow whose condition is pre-trained by ``recipe`` and frozen, and whose estimator is fresh."""
        flow = self.fresh(seed)
        steps = max(1, self.config.steps // 4)
        self.train(flow, recipe, seed, steps, self.out / "pre-training" / str(seed))
        flow.decoder.load_state_dict(self.fresh(seed).decoder.state_dict())
        freeze(flow, *(part for part in parts(flow) if part != "estimator"))
        return flow

    def train(self, flow: Any, recipe: Recipe, seed: int, steps: int, folder: Path) -> str:
        """One run, its figures below ``folder``; what ended it early, or nothing."""
        from tqdm import tqdm

        shutil.rmtree(folder, ignore_errors=True)
        if recipe.grouped:
            groups = parameter_groups(flow, recipe.lr, encoder_scale=recipe.encoder_scale)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        else:
            optimizer = torch.optim.Adam((p for p in flow.parameters() if p.requires_grad), recipe.lr)
        warm_up = self.config.warm_up
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warm_up**0.5 * min((step + 1) ** -0.5, (step + 1) * warm_up**-1.5)
        )
        batches = FrameBatches(lengths(self.samples), self.config.frames, seed=seed)
        random.seed(seed)
        torch.manual_seed(seed)
        sample_every = max(1, steps // 50)
        with (
            StabilityMonitor(
                flow, optimizer, clip_norm=recipe.clip, sample_every=sample_every, log_dir=folder
            ) as monitor,
            tqdm(range(steps), desc=str(folder.relative_to(self.out)), unit="step", dynamic_ncols=True) as bar,
        ):
            for _ in bar:
                try:
                    loss = self.step(flow, batches, recipe.accumulate)
                    bar.set_postfix(loss=f"{monitor.step(loss).figures['loss']:.3f}", refresh=False)
                except NonFiniteError as error:
                    return str(error)
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
        return ""

    def step(self, flow: Any, batches: FrameBatches, accumulate: int) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for _ in range(accumulate):
            batch = collate([self.samples[i] for i in next(batches)])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = flow({name: x.to(self.device) for name, x in batch.items()}, self.device)["loss"] / accumulate
            loss.backward()
            total += loss.detach()
        return total


# ------------------------------------------------------------------------------------------------ findings
@dataclass(frozen=True)
class Finding:
    """What a run came to.

    Attributes:
        diverged: the smoothed loss ended above 1.5 times its lowest value, or something was not finite.
        diverged_at: the step of that lowest value, after which it rose.
        breaks_first: the part whose gradient norm was the first to spike, diverged or not.
        breaks_at: at which step.
        spikes: how many steps of each part spiked.
        final: mean loss of the last tenth of the steps.
        largest_update: of each part, the largest sampled update over weights.
        largest_logit: of encoder and estimator, the largest sampled attention logit.
        stopped: why the run ended early, if it did.
    """

    recipe: str
    seed: int
    diverged: bool
    diverged_at: int | None
    breaks_first: str | None
    breaks_at: int | None
    spikes: dict[str, int]
    final: float
    largest_update: dict[str, float]
    largest_logit: dict[str, float]
    stopped: str


def read_figures(folder: Path) -> dict[str, list[float]]:
    """The columns of ``figures.csv``; NaN for empty cells."""
    with open(folder / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "action"]
    return {name: [float(row[name] or "nan") for row in rows] for name in names}


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the last ``width`` values."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def find(recipe: str, seed: int, figures: dict[str, list[float]], stopped: str) -> Finding:
    losses = figures["loss"]
    width = max(1, len(losses) // 20)
    smoothed = smooth(losses, width)[width - 1 :]  # whole windows only
    lowest = min((x for x in smoothed if math.isfinite(x)), default=math.nan)
    diverged = bool(stopped) or not smoothed[-1] <= 1.5 * lowest
    window = max(SMALLEST_HISTORY, min(200, len(losses) // 5))
    spikes: dict[str, list[int]] = {}
    for name, norms in figures.items():
        if name.startswith("gradient/"):
            is_spike = SpikeDetector(window)
            spikes[name.removeprefix("gradient/")] = [
                step for step, norm in enumerate(norms) if is_spike(norm) or not math.isfinite(norm)
            ]
    first = min((part for part in spikes if spikes[part]), key=lambda part: spikes[part][0], default=None)
    return Finding(
        recipe,
        seed,
        diverged,
        smoothed.index(lowest) + width - 1 if diverged and math.isfinite(lowest) else None,
        first,
        spikes[first][0] if first else None,
        {part: len(steps) for part, steps in spikes.items()},
        statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        _largest(figures, "update/"),
        _largest(figures, "logit/"),
        stopped,
    )


def _largest(figures: dict[str, list[float]], prefix: str) -> dict[str, float]:
    known = {name: [x for x in xs if not math.isnan(x)] for name, xs in figures.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): max(values) for name, values in known.items() if values}


def report(study: Study, arms: dict[str, Recipe], findings: list[Finding]) -> str:
    """The findings as markdown."""
    config = study.config
    hours = sum(lengths(study.samples)) / 3600 / (50 if "2" in config.preset or "3" in config.preset else 22050 / 256)
    lines = [
        "# Which part breaks first?",
        "",
        f"Preset {config.preset}, {config.steps} steps, warm-up {config.warm_up}, {config.frames} frames a batch, "
        f"{len(study.samples)} utterances ({hours:.2f} h), on {study.device}.",
        "",
        "| recipe | learning rate | before the estimator | clip | batches a step |",
        "|---|---|---|---|---|",
    ]
    for name, recipe in arms.items():
        before = "frozen" if recipe.decoder_only else f"{recipe.encoder_scale * recipe.lr:.2g}"
        lines.append(f"| {name} | {recipe.lr:.2g} | {before} | {recipe.clip:g} | {recipe.accumulate} |")
    lines += [
        "",
        "| recipe | seed | final loss | diverged | first part to spike | spikes by part | largest update / weights "
        "| largest logit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in findings:
        diverged = f"after step {f.diverged_at}" if f.diverged else "no"
        first = f"{f.breaks_first}, step {f.breaks_at}" if f.breaks_first else "none"
        lines.append(
            f"| {f.recipe} | {f.seed} | {f.final:.3f} | {diverged} {f.stopped} | {first} | {_cells(f.spikes)} "
            f"| {_cells(f.largest_update)} | {_cells(f.largest_logit)} |"
        )
    return "\n".join([*lines, "", *conclusions(findings), ""])


def _cells(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items() if value) or "none"


def conclusions(findings: list[Finding]) -> list[str]:
    """One sentence for each recipe."""
    lines = []
    for recipe in dict.fromkeys(f.recipe for f in findings):
        runs = [f for f in findings if f.recipe == recipe]
        broken = [f for f in runs if f.diverged]
        line = f"* **{recipe}**: {len(broken)} of {len(runs)} runs diverged"
        firsts = [f.breaks_first for f in runs if f.breaks_first]
        for part in sorted(set(firsts), key=firsts.count, reverse=True)[:1]:
            line += f"; {part} was the first to spike in {firsts.count(part)} of {len(runs)}"
        lines.append(f"{line}; final loss {statistics.fmean(f.final for f in runs):.3f}.")
    return lines


# ------------------------------------------------------------------------------------------------ pictures
def draw_losses(path: Path, curves: dict[tuple[str, int], dict[str, list[float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    for number, recipe in enumerate(dict.fromkeys(recipe for recipe, _ in curves)):
        seeds = [figures["loss"] for (name, _), figures in curves.items() if name == recipe]
        for i, losses in enumerate(seeds):
            smoothed = smooth(losses, max(1, len(losses) // 20))
            axis.plot(smoothed, color=f"C{number}", alpha=0.8, label=recipe if i == 0 else None)
    axis.set(xlabel="optimizer step", ylabel="flow-matching loss (running mean)", yscale="log")
    axis.set_title("one line a seed")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path)


def draw_gradients(path: Path, curves: dict[tuple[str, int], dict[str, list[float]]]) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(recipe for recipe, _ in curves))
    figure = Figure(figsize=(5 * len(names), 4.5), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, recipe in zip(axes, names, strict=True):
        runs = [figures for (name, _), figures in curves.items() if name == recipe]
        gradients = [column for column in runs[0] if column.startswith("gradient/")]
        for number, column in enumerate(gradients):
            for i, figures in enumerate(runs):
                label = column.removeprefix("gradient/") if i == 0 else None
                axis.plot(figures[column], color=f"C{number}", linewidth=0.7, alpha=0.7, label=label)
        axis.set(title=recipe, xlabel="optimizer step", yscale="log")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient norm before clipping")
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------ the command
def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", dest="config", action="store_const", const=TINY, help="two minutes")
    size.add_argument("--full", dest="config", action="store_const", const=FULL, help="the real size, for a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--data", type=Path, metavar="DIR", help="audio files instead of espeak-ng's")
    parser.add_argument("--preset", choices=PRESETS, help="another flow (tiny; with --full cosyvoice-fromscratch)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; warm-up is an eighth")
    parser.add_argument("--seeds", type=int, help="runs of each recipe")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the question's recipe (0.001)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(device))
    parser.set_defaults(config=SMALL)
    args = parser.parse_args(arguments)
    if args.preset:
        args.config = replace(args.config, preset=args.preset)
    if args.steps:
        args.config = replace(args.config, steps=args.steps, warm_up=max(1, args.steps // 8))
    if args.seeds:
        args.config = replace(args.config, seeds=args.seeds)
    return args


def run(args: argparse.Namespace) -> list[Finding]:
    config = args.config
    speech = args.data or args.out / "speech"
    if args.data is None:
        make_speech(speech, config.voices, config.sentences)
    flow: Any = fastflow.from_preset(config.preset)
    study = Study(config, read_folder(speech, flow), args.device, args.out, args.bf16)
    arms, curves, findings = recipes(config, args.lr), {}, []
    for seed in range(config.seeds):
        for name, recipe in arms.items():
            folder = args.out / name / str(seed)
            flow = study.condition(seed, arms["ours"]) if recipe.decoder_only else study.fresh(seed)
            stopped = study.train(flow, recipe, seed, config.steps, folder)
            curves[name, seed] = read_figures(folder)
            findings.append(find(name, seed, curves[name, seed], stopped))
    findings.sort(key=lambda finding: list(arms).index(finding.recipe))
    draw_losses(args.out / "loss.png", curves)
    draw_gradients(args.out / "gradients.png", curves)
    text = report(study, arms, findings)
    (args.out / "report.md").write_text(text)
    results = {"config": asdict(config), "recipes": {name: asdict(recipe) for name, recipe in arms.items()}}
    results |= {"findings": [asdict(finding) for finding in findings], "where": describe(args.device)}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(text)
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        run(args)
    except (ValueError, RuntimeError, FileNotFoundError, ImportError) as error:
        print(f"train_stability: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
