"""Why does training a flow diverge?  How far each recipe is from breaking, which part breaks, and what helps.

    python benchmarks/train_stability.py --out stability             under an hour on two cores
    python benchmarks/train_stability.py --out stability --full      CosyVoice 1 from scratch, for a GPU
    python benchmarks/train_stability.py --out stability --tiny      two minutes: does it work here?

A short run of a small flow does not diverge at the rate of its recipe.  So the learning rate is raised by half decades
until every seed breaks, as Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities"
(2023) do: the largest rate that holds, over the rate of the recipe, is the recipe's margin.  Three recipes climb:

``question``: everything at CosyVoice's from-scratch recipe: Adam, learning rate 0.001, warm-up, then falling with the
square root of the step, gradients clipped at 5.  ``ours``: AdamW with groups, half the rate before the estimator, twice
the warm-up, clipping at 1, a larger batch.  ``decoder``: the question's, but only the estimator is trained, freshly
initialised, behind the frozen condition of the best run of ``ours``: a random one would ask whether speech can be
learnt from random features, another question.  A flow twice as wide climbs too, by the question's recipe.

Then one thing at a time is changed between the rate that holds and the one that breaks: one part alone at the breaking
rate (*hot*), which says more about the part that breaks than the order in which gradients jump, reported as well; and
one ingredient of ``ours`` alone at the breaking rate.

Speech is made by espeak-ng (``apt install espeak-ng``) unless ``--data`` names a folder of audio files.  Tokens are
k-means clusters of the mel, speaker vectors random but fixed.  ``report.md`` holds the findings, ``loss.png`` and
``gradients.png`` the curves, ``results.json`` the figures, ``runs`` every figure of every step.  Runs that are there
are not repeated, so the same command goes on where it was cut off.
"""

import argparse
import csv
import json
import logging
import math
import random
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe

import fastflow
from fastflow.config import PRESETS, build, preset
from fastflow.training import NonFiniteError, StabilityMonitor, freeze, parameter_groups
from fastflow.training.batches import FrameBatches
from fastflow.training.corpus import Sample, collate, lengths, read_folder
from fastflow.training.parts import named_part_parameters, parts

VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "de", "fr-fr", "es", "it", "pt-br", "nl", "sv", "pl")
WORDS = """
the a one this every quick quiet distant river mountain speaker window morning number garden evening letter crosses
follows remembers carries answers reaches opens paints above behind without toward near golden slowly often again seven
twelve hundred music water paper winter summer silver bright hollow
"""
WORSE = 1.5  # a run breaks when it ends at so many times the loss that it could have
JUMP = 3.0  # a gradient norm jumps when it is so many times the median of the steps before
HISTORY = 20  # steps of that median
WIDTHS = {  # of each class, what "twice as wide" doubles; heads keep their size
    "MaskedDiffWithXvec": ("input_size",),
    "CausalMaskedDiffWithXvec": ("input_size",),
    "ConformerEncoder": ("input_size", "output_size", "linear_units", "attention_heads"),
    "UpsampleConformerEncoder": ("input_size", "output_size", "linear_units", "attention_heads"),
    "ConditionalDecoder": ("channels", "num_heads"),
    "CausalConditionalDecoder": ("channels", "num_heads"),
    "DiT": ("dim", "heads"),
}


@dataclass(frozen=True)
class Config:
    """A size of the study.

    Attributes:
        warm_up: steps; the question's 2,500 come to an eighth of the 20,000 steps after which it diverged.
        frames: of a batch of the question, padding included; its two batches of 2,000 a step are one of 4,000 here.
        larger: batch of our recipe over that of the question.
        recompute: memory mode of our recipe; exact, so the small sizes, whose batch fits, do without.
        rates: the rungs of the ladder.
        wide: also climb with a flow of twice the width.
    """

    preset: str
    voices: int
    sentences: int
    steps: int
    warm_up: int
    frames: int
    larger: int
    recompute: str
    seeds: int
    rates: tuple[float, ...]
    wide: bool


TINY = Config("tiny", 2, 4, 30, 4, 200, 2, "none", 1, (1e-3, 1.0), False)
SMALL = Config("tiny", 6, 20, 160, 20, 300, 2, "none", 3, (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), True)
FULL = Config(
    "cosyvoice-fromscratch", 12, 400, 20_000, 2500, 4000, 4, "block", 2, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), False
)


@dataclass(frozen=True)
class Recipe:
    """How a run is trained.

    Attributes:
        lr: highest learning rate, that of the recipe as published or advised; a ladder replaces it.
        own: parts with a learning rate of their own.
        grouped: AdamW with decay on weights only and half the rate before the estimator, else Adam.
        clip: largest gradient norm.
        warm_up, batch, width: over those of the config.
        decoder_only: the condition is frozen.
    """

    lr: float = 1e-3
    own: tuple[tuple[str, float], ...] = ()
    grouped: bool = False
    clip: float = 5.0
    warm_up: int = 1
    batch: int = 1
    width: int = 1
    decoder_only: bool = False

    def optimizer(self, flow: Any) -> torch.optim.Optimizer:
        if self.grouped:
            return torch.optim.AdamW(parameter_groups(flow, self.lr, encoder_scale=0.5), betas=(0.9, 0.98))
        rates = dict(self.own)
        trained = {
            p: [w for w in named.values() if w.requires_grad] for p, named in named_part_parameters(flow).items()
        }
        return torch.optim.Adam([{"params": ws, "lr": rates.get(p, self.lr)} for p, ws in trained.items() if ws])


def recipes(config: Config) -> dict[str, Recipe]:
    """Those that climb; ``ours`` before ``decoder``, which starts from it."""
    ours = Recipe(3e-4, grouped=True, clip=1.0, warm_up=2, batch=config.larger)
    arms = {"question": Recipe(), "ours": ours, "decoder": Recipe(decoder_only=True)}
    return {**arms, "twice as wide": Recipe(width=2)} if config.wide else arms


def hot_parts(flow: Any, holds: float, breaks: float) -> dict[str, Recipe]:
    """The question's recipe with one part at the rate that breaks, or all but the estimator."""
    hot = {f"hot {part}": Recipe(holds, own=((part, breaks),)) for part in parts(flow)}
    return {**hot, "hot all but estimator": Recipe(breaks, own=(("estimator", holds),))}


def ingredients(config: Config, breaks: float) -> dict[str, Recipe]:
    """The question's recipe at the rate that breaks, with one ingredient of ours."""
    question, ours = Recipe(breaks), recipes(config)["ours"]
    changes: dict[str, dict[str, Any]] = {
        f"clipping at {ours.clip:g}": {"clip": ours.clip},
        "groups and AdamW": {"grouped": True},
        f"warm-up x {ours.warm_up}": {"warm_up": ours.warm_up},
        f"batch x {ours.batch}": {"batch": ours.batch},
    }
    return {name: replace(question, **change) for name, change in changes.items()}


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
        text = " ".join(words.choices(WORDS.split(), k=words.randint(2, 8)))
        options = ["-v", voice, "-s", str(words.randint(130, 190)), "-p", str(words.randint(30, 70)), "-w", str(path)]
        done = subprocess.run([program, *options, text], capture_output=True, text=True)
        if done.returncode:
            path.unlink(missing_ok=True)
            raise RuntimeError(f"espeak-ng fails for voice {voice}: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------------------ training
def widened(spec: Any, factor: int) -> Any:
    """A spec with every width of :data:`WIDTHS` times ``factor``."""
    if not isinstance(spec, dict):
        return spec
    wide = {name: widened(value, factor) for name, value in spec.items()}
    for name in WIDTHS.get(spec.get("class", ""), ()):
        wide[name] = [x * factor for x in wide[name]] if isinstance(wide[name], list) else wide[name] * factor
    return wide


@dataclass
class Study:
    """What all runs share."""

    config: Config
    samples: list[Sample]
    device: torch.device
    out: Path
    bf16: bool

    def fresh(self, recipe: Recipe, seed: int) -> Any:
        random.seed(seed)
        torch.manual_seed(seed)
        flow: Any = build(widened(preset(self.config.preset), recipe.width)).to(self.device)
        flow.recompute = self.config.recompute if recipe.batch > 1 else "none"
        return flow

    def folder(self, name: str, recipe: Recipe, seed: int) -> Path:
        return self.out / "runs" / name / f"{recipe.lr:g}" / str(seed)

    def run(self, name: str, recipe: Recipe, seed: int, condition: Path | None = None) -> tuple[Any, str]:
        """The figures of a run, and what ended it early or nothing; trained only if it is not there.

        Args:
            condition: weights whose condition is taken, and frozen.
        """
        folder = self.folder(name, recipe, seed)
        done = folder / "done.json"
        asked = json.loads(
            json.dumps(
                {"config": asdict(replace(self.config, rates=(), seeds=0, wide=False)), "recipe": asdict(recipe)}
            )
        )
        if not done.exists() or (found := json.loads(done.read_text())) | asked != found:
            shutil.rmtree(folder, ignore_errors=True)
            flow = self.fresh(recipe, seed)
            if condition is not None:
                estimator = flow.decoder.state_dict()
                flow.load_state_dict(torch.load(condition, map_location=self.device, weights_only=True))
                flow.decoder.load_state_dict(estimator)
                freeze(flow, *(part for part in parts(flow) if part != "estimator"))
            stopped = self.train(flow, recipe, seed, folder, f"{name}, {recipe.lr:g}, seed {seed}")
            if name == "ours":
                torch.save(flow.state_dict(), folder / "flow.pt")
            done.write_text(json.dumps({**asked, "stopped": stopped}))
        return read_figures(folder), json.loads(done.read_text())["stopped"]

    def train(self, flow: Any, recipe: Recipe, seed: int, folder: Path, title: str) -> str:
        from tqdm import tqdm

        optimizer = recipe.optimizer(flow)
        warm_up = recipe.warm_up * self.config.warm_up
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warm_up**0.5 * min((step + 1) ** -0.5, (step + 1) * warm_up**-1.5)
        )
        batches = FrameBatches(lengths(self.samples), recipe.batch * self.config.frames, seed=seed)
        random.seed(seed)
        torch.manual_seed(seed)
        every = max(1, self.config.steps // 50)
        with (
            StabilityMonitor(flow, optimizer, clip_norm=recipe.clip, sample_every=every, log_dir=folder) as monitor,
            tqdm(range(self.config.steps), desc=title, unit="step", dynamic_ncols=True) as bar,
        ):
            for _ in bar:
                batch = collate([self.samples[i] for i in next(batches)])
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss = flow({name: x.to(self.device) for name, x in batch.items()}, self.device)["loss"]
                loss.backward()
                try:
                    bar.set_postfix(loss=f"{monitor.step(loss).figures['loss']:.3f}", refresh=False)
                except NonFiniteError as error:
                    return str(error)
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
        return ""

    def mean_spectrum_loss(self) -> float:
        """Of an estimator that knows the mean of each mel channel and nothing else: their variance and the noise's."""
        return 1 + torch.cat([sample.mel for sample in self.samples]).var(0).mean().item()


def read_figures(folder: Path) -> dict[str, list[float]]:
    """The columns of ``figures.csv``; NaN for empty cells."""
    with open(folder / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "action"]
    return {name: [float(row[name] or "nan") for row in rows] for name in names}


# ------------------------------------------------------------------------------------------------ findings
@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        end: mean loss of the last tenth of the steps; infinite if it stopped early or is not finite.
        broke: ``end`` is above 1.5 times the lowest smoothed loss of the run, or 1.5 times the end of a calmer run.
        broke_at: the step from which on the smoothed loss stayed above 1.5 times that of the calmer run.
        jumps: of each part, the first step whose gradient norm was 3 times the median of the 20 before, if there is one
            up to ``broke_at``.
        signs: by column of the monitor: of ``gradient/<part>`` the median of the last tenth; of ``update/<part>``
            (update over weights) and ``logit/<part>`` the largest that was sampled.
        stopped: why the run ended early, if it did.
    """

    name: str
    lr: float
    seed: int
    end: float
    broke: bool
    broke_at: int | None
    jumps: dict[str, int]
    signs: dict[str, float]
    stopped: str


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the values, of fewer at the start."""
    width = max(1, len(values) // 20)
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def judge(
    name: str, lr: float, seed: int, figures: dict[str, list[float]], stopped: str, calmer: Sequence[float] = ()
) -> Outcome:
    """Whether a run broke, where, and what went before.

    Args:
        calmer: losses of a run that holds, of the same seed; none for the lowest rung.
    """
    losses = figures["loss"]
    tail = max(1, len(losses) // 10)
    end = statistics.fmean(losses[-tail:])
    end = end if math.isfinite(end) and not stopped else math.inf
    smoothed = smooth(losses)
    could = min((x for x in smoothed[tail:] if math.isfinite(x)), default=0.0)
    if calmer:
        could = min(could, statistics.fmean(calmer[-tail:]))
    broke = not end <= WORSE * could
    broke_at = None
    if broke:
        against = smooth(calmer) if calmer else [could] * len(losses)
        worse = [not mine <= WORSE * other for mine, other in zip(smoothed, against, strict=False)]
        broke_at = max((i + 1 for i, flag in enumerate(worse) if not flag), default=0)
    jumps, signs = {}, {}
    for column, values in figures.items():
        kind, _, part = column.partition("/")
        known = [x for x in values if not math.isnan(x)]
        if kind == "gradient" and part:
            signs[column] = statistics.median(known[-tail:] or [math.nan])
            jumps[part] = first_jump(values[: None if broke_at is None else broke_at + 1])
        elif kind in ("update", "logit") and known:
            signs[column] = max(known)
    jumped = {part: step for part, step in jumps.items() if step is not None}
    return Outcome(name, lr, seed, end, broke, broke_at, jumped, signs, stopped)


def first_jump(norms: Sequence[float]) -> int | None:
    """The first step above 3 times the median of up to 20 before it, at least 5; or that is not finite."""
    for step, norm in enumerate(norms):
        before = norms[max(0, step - HISTORY) : step]
        if not math.isfinite(norm) or (len(before) >= 5 and norm > JUMP * statistics.median(before)):
            return step
    return None


def rungs(outcomes: Iterable[Outcome], name: str) -> dict[float, list[Outcome]]:
    """The outcomes of a recipe by learning rate, ascending."""
    found: dict[float, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.lr):
        if outcome.name == name:
            found.setdefault(outcome.lr, []).append(outcome)
    return found


def margin(outcomes: Iterable[Outcome], name: str) -> tuple[float | None, float | None]:
    """The largest rate up to which no seed breaks, and the smallest at which all do; None where there is none."""
    holds, ladder = None, rungs(outcomes, name)
    for lr, rung in ladder.items():
        if any(outcome.broke for outcome in rung):
            break
        holds = lr
    return holds, next((lr for lr, rung in ladder.items() if all(outcome.broke for outcome in rung)), None)


def first_part(outcomes: Sequence[Outcome]) -> str:
    """Which part's gradient jumped first before the runs broke, in words."""
    firsts: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.jumps:
            first = min(outcome.jumps.values())
            firsts.update(part for part, step in outcome.jumps.items() if step == first)
    common = [part for part, count in firsts.items() if count == len(outcomes)]
    counts = ", ".join(f"{part} {count} of {len(outcomes)}" for part, count in firsts.most_common()) or "none jumped"
    return f"{common[0]} in every seed" if len(common) == 1 else f"no consistent first part ({counts})"


# ------------------------------------------------------------------------------------------------ the experiment
def experiment(study: Study) -> list[Outcome]:
    """All runs: the question's ladder, one change at a time at the rates that it holds and breaks at, other ladders."""
    question, *others = recipes(study.config).items()
    outcomes = climb(study, *question, ())
    holds, breaks = margin(outcomes, "question")
    if holds is not None and breaks is not None:
        changed = {**hot_parts(study.fresh(Recipe(), 0), holds, breaks), **ingredients(study.config, breaks)}
        for name, recipe in changed.items():
            for seed in range(study.config.seeds):
                calmer = read_figures(study.folder("question", Recipe(holds), seed))["loss"]
                outcomes.append(judge(name, recipe.lr, seed, *study.run(name, recipe, seed), calmer=calmer))
    for name, recipe in others:
        outcomes += climb(study, name, recipe, outcomes)
    return outcomes


def climb(study: Study, name: str, recipe: Recipe, before: Sequence[Outcome]) -> list[Outcome]:
    """Raise the learning rate until every seed breaks."""
    outcomes: list[Outcome] = []
    calmest: dict[int, tuple[float, Sequence[float]]] = {}  # of each seed the lowest end so far, and its losses
    for lr in study.config.rates:
        for seed in range(study.config.seeds):
            rung = replace(recipe, lr=lr)
            condition = best_condition(study, before, seed) if recipe.decoder_only else None
            figures, stopped = study.run(name, rung, seed, condition)
            end, losses = calmest.get(seed, (math.inf, ()))
            outcome = judge(name, lr, seed, figures, stopped, losses)
            outcomes.append(outcome)
            if outcome.end < end:
                calmest[seed] = outcome.end, figures["loss"]
        if all(outcome.broke for outcome in outcomes[-study.config.seeds :]):
            break
    return outcomes


def best_condition(study: Study, outcomes: Sequence[Outcome], seed: int) -> Path:
    """The weights of the run of ``ours`` that ended lowest."""
    best = min((o for o in outcomes if o.name == "ours" and o.seed == seed), key=lambda o: o.end)
    return study.folder("ours", Recipe(best.lr), seed) / "flow.pt"


# ------------------------------------------------------------------------------------------------ the report
def report(study: Study, outcomes: list[Outcome]) -> str:
    """The findings as markdown."""
    config, arms = study.config, recipes(study.config)
    rates = sorted({outcome.lr for name in arms for outcome in outcomes if outcome.name == name})
    lines = [
        "# What diverges, and what helps?",
        "",
        *conclusions(outcomes, arms),
        "",
        f"Preset {config.preset}, {config.steps} steps a run, {config.seeds} seeds, {len(study.samples)} utterances of "
        f"{sum(lengths(study.samples))} frames in all, on {study.device}. A run breaks when its last tenth of the "
        f"steps ends above {WORSE:g} times its lowest smoothed loss, or the end of the best calmer run of its seed. "
        f"A flow that knows the mean spectrum and nothing else has a loss of {study.mean_spectrum_loss():.1f}.",
        "",
        "## Loss at the end by learning rate",
        "",
        "Median of the seeds; in brackets how many broke.",
        "",
        "| recipe | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name in arms:
        ladder = rungs(outcomes, name)
        lines.append(f"| {name} | " + " | ".join(_cell(ladder.get(lr, [])) for lr in rates) + " |")
    holds, breaks = margin(outcomes, "question")
    if holds is not None and breaks is not None:
        lines += changes(outcomes, holds, breaks, ingredients(config, breaks))
    return "\n".join([*lines, ""])


def _cell(runs: Sequence[Outcome]) -> str:
    if not runs:
        return ""
    broken = sum(outcome.broke for outcome in runs)
    return f"{statistics.median(outcome.end for outcome in runs):.2f}" + (f" ({broken})" if broken else "")


def changes(outcomes: Sequence[Outcome], holds: float, breaks: float, helps: Iterable[str]) -> list[str]:
    calm, broken = rungs(outcomes, "question")[holds], rungs(outcomes, "question")[breaks]
    lines = [
        "",
        f"## One change, between the rates {holds:g} and {breaks:g}",
        "",
        "| | loss at the end | broke |",
        "|---|---|---|",
    ]
    cases = {f"question at {holds:g}": calm, f"question at {breaks:g}": broken}
    for name in dict.fromkeys(outcome.name for outcome in outcomes):
        if name.startswith("hot "):
            cases[f"{name.removeprefix('hot ')} at {breaks:g}, the rest at {holds:g}"] = _runs(outcomes, name)
    cases |= {f"all at {breaks:g}, {name}": _runs(outcomes, name) for name in helps}
    for name, runs in cases.items():
        end = statistics.median(outcome.end for outcome in runs)
        lines.append(f"| {name} | {end:.2f} | {sum(outcome.broke for outcome in runs)} of {len(runs)} |")
    lines += [
        "",
        "## Signs, by part",
        "",
        f"Medians of the seeds, question at {holds:g} and at {breaks:g}. A jump is a gradient norm {JUMP:g} times the "
        f"median of the {HISTORY} steps before, at or before the step at which the loss left the calmer run.",
        "",
        "| part | largest update / weights | gradient norm at the end | largest logit | first jump at step, by seed |",
        "|---|---|---|---|---|",
    ]
    for part in (column.removeprefix("gradient/") for column in calm[0].signs if column.startswith("gradient/")):
        cells = [_pair(calm, broken, f"{kind}/{part}") for kind in ("update", "gradient", "logit")]
        jumps = ", ".join(str(outcome.jumps.get(part, "none")) for outcome in broken)
        lines.append(f"| {part} | {' | '.join(cells)} | {jumps} |")
    left = ", ".join(str(outcome.broke_at) for outcome in broken)
    return [*lines, f"| *the loss left the calmer run* | | | | {left} |"]


def _runs(outcomes: Sequence[Outcome], name: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.name == name]


def _pair(calm: Sequence[Outcome], broken: Sequence[Outcome], column: str) -> str:
    sides = [[outcome.signs[column] for outcome in side if column in outcome.signs] for side in (calm, broken)]
    return " to ".join(f"{statistics.median(side):.2g}" for side in sides) if all(sides) else ""


def conclusions(outcomes: Sequence[Outcome], arms: dict[str, Recipe]) -> list[str]:
    """The findings, a sentence each."""
    lines = []
    for name, recipe in arms.items():
        holds, breaks = margin(outcomes, name)
        top = max(rungs(outcomes, name))
        if holds is None:
            line = f"breaks at the lowest rate tried, {min(rungs(outcomes, name)):g}"
        else:
            line = f"holds up to {holds:g}, {holds / recipe.lr:.3g} times its own rate of {recipe.lr:g}"
        every = f"every seed breaks at {breaks:g}" if breaks else f"at {top:g} some seed still holds"
        lines.append(f"* **{name}** {line}; {every}.")
    holds, breaks = margin(outcomes, "question")
    if holds is None or breaks is None:
        return lines
    hot = dict.fromkeys(outcome.name for outcome in outcomes if outcome.name.startswith("hot "))
    guilty = [name for name in hot if all(outcome.broke for outcome in _runs(outcomes, name))]
    named = ", ".join(name.removeprefix("hot ") for name in guilty) or "no single part"
    lines.append(f"* **What breaks**: {named}, alone at the breaking rate, breaks every seed.")
    lines.append(f"* **Whose gradient jumps first**: {first_part(rungs(outcomes, 'question')[breaks])}.")
    return lines


# ------------------------------------------------------------------------------------------------ pictures
def draw_loss(path: Path, outcomes: list[Outcome], arms: Iterable[str], level: float) -> None:
    """Loss at the end: left by learning rate, right with one thing changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(arms):
        ladder = rungs(outcomes, name)
        medians = [statistics.median(o.end for o in rung) for rung in ladder.values()]
        left.plot(list(ladder), medians, color=f"C{number}", label=name)
        for broke, marker in ((False, "o"), (True, "x")):
            chosen = [o for o in _runs(outcomes, name) if o.broke == broke]
            left.plot([o.lr for o in chosen], [o.end for o in chosen], marker, color=f"C{number}", markersize=5)
    left.set(xscale="log", yscale="log", xlabel="highest learning rate", ylabel="flow-matching loss at the end")
    left.set_title("median and seeds; a cross is a run that broke")
    changed = list(dict.fromkeys(o.name for o in outcomes if o.name not in arms))
    holds, breaks = margin(outcomes, "question")
    cases = []
    if holds is not None and breaks is not None:
        ladder = rungs(outcomes, "question")
        cases = [(f"question at {holds:g}", ladder[holds]), (f"question at {breaks:g}", ladder[breaks])]
        right.set_title(f"hot: at {breaks:g}, the rest at {holds:g}; others: all at {breaks:g}")
    cases += [(name, _runs(outcomes, name)) for name in changed]
    for row, (_, runs) in enumerate(cases):
        for o in runs:
            right.plot(o.end, row, "x" if o.broke else "o", color="C3" if o.broke else "C0")
    right.set_yticks(range(len(cases)), [name for name, _ in cases])
    right.invert_yaxis()
    right.set(xscale="log", xlabel="flow-matching loss at the end")
    left.axhline(level, color="grey", linestyle="--", label="knows the mean spectrum only")
    right.axvline(level, color="grey", linestyle="--")
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path)


def draw_gradients(path: Path, study: Study, outcomes: list[Outcome]) -> None:
    """Loss and gradient norm of each part by step, at the rate that holds and the one that breaks; nothing without."""
    from matplotlib.figure import Figure

    ladder = rungs(outcomes, "question")
    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    holds, breaks = margin(outcomes, "question")
    rates = [rate for rate in (holds, breaks) if rate is not None]
    axes = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for (above, below), rate in zip(axes.T, rates, strict=True):
        runs = [study.run("question", Recipe(rate), o.seed)[0] for o in ladder[rate]]
        for seed, figures in enumerate(runs):
            above.plot(smooth(figures["loss"]), color="black", alpha=0.7, label="one line a seed" if not seed else None)
        above.axhline(study.mean_spectrum_loss(), color="grey", linestyle="--", label="knows the mean spectrum only")
        for number, column in enumerate(column for column in runs[0] if column.startswith("gradient/")):
            for i, figures in enumerate(runs):
                label = column.removeprefix("gradient/") if i == 0 else None
                below.plot(figures[column], color=f"C{number}", linewidth=0.9, alpha=0.8, label=label)
        above.set(title=f"question at {rate:g}", yscale="log")
        below.set(xlabel="optimizer step", yscale="log")
        for outcome in ladder[rate]:
            if outcome.broke_at is not None:
                for axis in (above, below):
                    axis.axvline(outcome.broke_at, color="C3", linestyle=":", linewidth=1)
        for axis in (above, below):
            axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("loss (running mean)")
    axes[1][0].set_ylabel("gradient norm before clipping")
    axes[0][0].legend(frameon=False, fontsize=8)
    axes[1][0].legend(frameon=False, fontsize=8, ncols=2)
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
    parser.add_argument("--seeds", type=int, help="runs of each recipe at each rate")
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


def rounded(x: Any) -> Any:
    """Floats to four digits, those that are not finite as text, in all that JSON holds."""
    if isinstance(x, float):
        return float(f"{x:.4g}") if math.isfinite(x) else str(x)
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list | tuple) else x


def run(args: argparse.Namespace) -> list[Outcome]:
    config = args.config
    speech = args.data or args.out / "speech"
    if args.data is None:
        make_speech(speech, config.voices, config.sentences)
    logging.getLogger("fastflow.training.monitor").setLevel(logging.ERROR)  # spikes are what is provoked here
    study = Study(config, read_folder(speech, fastflow.from_preset(config.preset)), args.device, args.out, args.bf16)
    where, arms = describe(args.device), recipes(config)
    outcomes = experiment(study)
    draw_loss(args.out / "loss.png", outcomes, arms, study.mean_spectrum_loss())
    draw_gradients(args.out / "gradients.png", study, outcomes)
    text = report(study, outcomes)
    (args.out / "report.md").write_text(text)
    results = {"config": asdict(config), "recipes": {name: asdict(recipe) for name, recipe in arms.items()}}
    results |= {"outcomes": [asdict(outcome) for outcome in outcomes], "where": where}
    (args.out / "results.json").write_text(json.dumps(rounded(results)))
    print(text)
    return outcomes


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
