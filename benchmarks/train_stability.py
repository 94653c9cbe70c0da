"""Why does training a flow diverge?  How far each recipe is from breaking, which part breaks, and what helps.

    python benchmarks/train_stability.py --out stability             under an hour on two cores
    python benchmarks/train_stability.py --out stability --full      CosyVoice 1 from scratch, for a GPU
    python benchmarks/train_stability.py --out stability --tiny      two minutes: does it work here?

A short run of a small flow does not diverge at the rate of its recipe.  So the learning rate is raised step by step
until every seed breaks, as Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities"
(2023) do: the largest rate that holds, over the rate of the recipe, is the recipe's margin.  Three recipes climb:

``question``: everything at CosyVoice's from-scratch recipe: Adam, learning rate 0.001, warm-up, then falling with the
square root of the step, gradients clipped at 5.  ``ours``: AdamW with groups, half the rate before the estimator, twice
the warm-up, clipping at 1, a larger batch.  ``decoder``: the question's, but only the estimator is trained, freshly
initialised, behind the frozen condition of the best run of ``ours``: a random one would ask whether speech can be
learnt from random features, another question.

Then one thing at a time is changed.  One part alone gets the rate that breaks every seed, the rest the one that holds
(*hot*), which says more about the part that breaks than the order in which gradients jump, reported as well.  And one
ingredient of ``ours`` is added at the lowest rate at which a seed of the question's breaks.

Speech is made by espeak-ng (``apt install espeak-ng``) unless ``--data`` names a folder of audio files.  Tokens are
k-means clusters of the mel, speaker vectors random but fixed.  ``report.md`` holds the findings, ``loss.png`` and
``gradients.png`` the curves, ``results.json`` the figures, ``runs`` every figure of every step.  Runs that are there
are not repeated, so the same command goes on where it was cut off.
"""

import argparse
import json
import logging
import math
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe
from stability_report import Figures, Outcome, draw_gradients, draw_loss, judge, margin, read_figures, report, rungs

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
STREAMS = ("tiny", "cosyvoice-fromscratch", "cosyvoice")  # whose stream at the start is compared
# The convolutions that a U-Net applies to its residual stream itself, with no norm between them.
STREAM = re.compile(r"decoder\.estimator\.(.*\.res_conv|(down|up)_blocks\.\d+\.2(\.conv)?)\.")


@dataclass(frozen=True)
class Config:
    """A size of the study.

    Attributes:
        warm_up: steps; the question's 2,500 come to an eighth of the 20,000 steps after which it diverged.
        frames: of a batch of the question, padding included; its two batches of 2,000 a step are one of 4,000 here.
        larger: batch of our recipe over that of the question.
        recompute: memory mode of our recipe; exact, so the small sizes, whose batch fits, do without.
        rates: the rungs of the ladder.
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


TINY = Config("tiny", 2, 4, 30, 4, 200, 2, "none", 1, (1e-3, 1.0))
SMALL = Config("tiny", 6, 20, 160, 20, 300, 2, "none", 3, (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0))
FULL = Config("cosyvoice-fromscratch", 12, 400, 20_000, 2500, 4000, 4, "block", 2, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2))


@dataclass(frozen=True)
class Recipe:
    """How a run is trained.

    Attributes:
        lr: highest learning rate, that of the recipe as published or advised; a ladder replaces it.
        own: learning rates of their own, of parts or of the ``stream`` convolutions of the estimator.
        grouped: AdamW with decay on weights only and half the rate before the estimator, else Adam.
        clip: largest gradient norm.
        warm_up, batch: over those of the config.
        decoder_only: the condition is frozen.
    """

    lr: float = 1e-3
    own: tuple[tuple[str, float], ...] = ()
    grouped: bool = False
    clip: float = 5.0
    warm_up: int = 1
    batch: int = 1
    decoder_only: bool = False

    def optimizer(self, flow: Any) -> torch.optim.Optimizer:
        if self.grouped:
            return torch.optim.AdamW(parameter_groups(flow, self.lr, encoder_scale=0.5), betas=(0.9, 0.98))
        rates, groups = dict(self.own), defaultdict(list)
        for part, named in named_part_parameters(flow).items():
            for name, parameter in named.items():
                own = "stream" if STREAM.match(name) and "stream" in rates else part
                if parameter.requires_grad:
                    groups[rates.get(own, self.lr)].append(parameter)
        return torch.optim.Adam([{"params": parameters, "lr": rate} for rate, parameters in groups.items()])


def recipes(config: Config) -> dict[str, Recipe]:
    """Those that climb; ``ours`` before ``decoder``, which starts from it."""
    ours = Recipe(3e-4, grouped=True, clip=1.0, warm_up=2, batch=config.larger)
    return {"question": Recipe(), "ours": ours, "decoder": Recipe(decoder_only=True)}


def hot_parts(flow: Any, holds: float, breaks: float) -> dict[str, Recipe]:
    """The question's recipe with one part at the rate that breaks, and what it takes to find which half of the flow."""
    hot = {f"hot {part}": Recipe(holds, own=((part, breaks),)) for part in parts(flow)}
    hot["hot all but estimator"] = Recipe(breaks, own=(("estimator", holds),))
    if any(STREAM.match(name) for name, _ in flow.named_parameters()):
        hot["hot estimator's stream"] = Recipe(holds, own=(("stream", breaks),))
        hot["hot estimator but its stream"] = Recipe(holds, own=(("estimator", breaks), ("stream", holds)))
    return hot


def ingredients(config: Config, shaky: float) -> dict[str, Recipe]:
    """The question's recipe at the lowest rate at which a seed of it breaks, with one ingredient of ours."""
    question, ours = Recipe(shaky), recipes(config)["ours"]
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
@dataclass
class Study:
    """What all runs share; with ``only_report`` none is trained."""

    config: Config
    samples: list[Sample]
    device: torch.device
    out: Path
    bf16: bool
    only_report: bool = False

    def fresh(self, recipe: Recipe, seed: int) -> Any:
        random.seed(seed)
        torch.manual_seed(seed)
        flow: Any = fastflow.from_preset(self.config.preset).to(self.device)
        flow.recompute = self.config.recompute if recipe.batch > 1 else "none"
        return flow

    def folder(self, name: str, recipe: Recipe, seed: int) -> Path:
        return self.out / "runs" / name / f"{recipe.lr:g}" / str(seed)

    def run(self, name: str, recipe: Recipe, seed: int, condition: Path | None = None) -> tuple[Figures, str] | None:
        """The figures of a run, and what ended it early or nothing; trained, or in a report left out, if not there.

        Args:
            condition: weights whose condition is taken, and frozen.
        """
        folder = self.folder(name, recipe, seed)
        done = folder / "done.json"
        asked = json.loads(
            json.dumps({"config": asdict(replace(self.config, rates=(), seeds=0)), "recipe": asdict(recipe)})
        )
        if not done.exists() or (found := json.loads(done.read_text())) | asked != found:
            if self.only_report:
                return None
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
        every, stopped, stream = max(1, self.config.steps // 50), "", []
        last = getattr(flow.decoder.estimator, "final_block", None)
        if last is not None:
            last.register_forward_pre_hook(lambda module, given: stream.append(given[0].detach().abs().amax()))
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
                    stopped = str(error)
                    break
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
        (folder / "stream.json").write_text(json.dumps([float(x) for x in stream]))
        return stopped

    def mean_spectrum_loss(self) -> float:
        """Of an estimator that knows the mean of each mel channel and nothing else: their variance and the noise's."""
        return 1 + torch.cat([sample.mel for sample in self.samples]).var(0).mean().item()


# ------------------------------------------------------------------------------------------------ the experiment
def experiment(study: Study) -> list[Outcome]:
    """The question's ladder, the hunt for the part that breaks, the other ladders, and what helps."""
    arms = recipes(study.config)
    outcomes = climb(study, "question", arms.pop("question"), ())
    holds, breaks = margin(outcomes, "question")
    if holds is not None and breaks is not None:
        outcomes += compare(study, hot_parts(study.fresh(Recipe(), 0), holds, breaks), holds)
    for name, recipe in arms.items():
        outcomes += climb(study, name, recipe, outcomes)
    if holds is not None and breaks is not None:
        shaky = min(lr for lr in rungs(outcomes, "question") if lr > holds)
        outcomes += compare(study, ingredients(study.config, shaky), holds)
    return outcomes


def compare(study: Study, changed: dict[str, Recipe], holds: float) -> list[Outcome]:
    """Runs of changed recipes, judged by the question's at the rate that holds."""
    outcomes = []
    for name, recipe in changed.items():
        for seed in range(study.config.seeds):
            calmer = read_figures(study.folder("question", Recipe(holds), seed))["loss"]
            if done := study.run(name, recipe, seed):
                outcomes.append(judge(name, recipe.lr, seed, *done, calmer=calmer))
    return outcomes


def climb(study: Study, name: str, recipe: Recipe, before: Sequence[Outcome]) -> list[Outcome]:
    """Raise the learning rate until every seed breaks."""
    outcomes: list[Outcome] = []
    calmest: dict[int, tuple[float, Sequence[float]]] = {}  # of each seed the lowest end so far, and its losses
    for lr in study.config.rates:
        rung = []
        for seed in range(study.config.seeds):
            condition = best_condition(study, before, seed) if recipe.decoder_only else None
            if done := study.run(name, replace(recipe, lr=lr), seed, condition):
                end, losses = calmest.get(seed, (math.inf, ()))
                rung.append(judge(name, lr, seed, *done, calmer=losses))
                if rung[-1].end < end:
                    calmest[seed] = rung[-1].end, done[0]["loss"]
        outcomes += rung
        if all(outcome.broke for outcome in rung):
            break
    return outcomes


def stream_at_start(name: str) -> float:
    """Root mean square that fresh weights bring to the U-Net's last block, of 100 frames of normal noise."""
    torch.manual_seed(0)
    estimator: Any = build(preset(name)["decoder"]["estimator"])
    seen = []
    estimator.final_block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x, mu, spks = torch.randn(1, 80, 100), torch.randn(1, 80, 100), torch.randn(1, 80)
    with torch.no_grad():
        estimator(x, torch.ones(1, 1, 100), mu, torch.rand(1), spks, torch.zeros_like(x))
    return seen[0].square().mean().sqrt().item()


def best_condition(study: Study, outcomes: Sequence[Outcome], seed: int) -> Path | None:
    """The weights of the run of ``ours`` that ended lowest; None if a report has none."""
    runs = [outcome for outcome in outcomes if outcome.name == "ours" and outcome.seed == seed]
    best = min(runs, key=lambda outcome: outcome.end, default=None)
    return None if best is None else study.folder("ours", Recipe(best.lr), seed) / "flow.pt"


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
    parser.add_argument("--report", action="store_true", help="train nothing: report the runs that are there")
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
    samples = read_folder(speech, fastflow.from_preset(config.preset))
    study = Study(config, samples, args.device, args.out, args.bf16, args.report)
    where, arms, level, outcomes = describe(args.device), recipes(config), study.mean_spectrum_loss(), experiment(study)
    own = {name: arms[name].lr for name in dict.fromkeys(o.name for o in outcomes) if name in arms}
    draw_loss(args.out / "loss.png", outcomes, own, level)
    seeds, ladder = range(config.seeds), rungs(outcomes, "question")
    rates = [rate for rate in margin(outcomes, "question") if rate is not None] or [min(ladder)]
    curves = {rate: [read_figures(study.folder("question", Recipe(rate), seed)) for seed in seeds] for rate in rates}
    draw_gradients(args.out / "gradients.png", outcomes, curves, level)
    setting = f"Preset {config.preset} on {args.device}, {config.steps} steps a run, {config.seeds} seeds, "
    setting += f"{len(study.samples)} utterances of {sum(lengths(study.samples))} frames in all."
    starts = {name: stream_at_start(name) for name in STREAMS}
    text = report(outcomes, own, setting, level, starts)
    (args.out / "report.md").write_text(text)
    results: dict[str, Any] = {"config": asdict(config), "where": where}
    results["recipes"] = {name: asdict(recipe) for name, recipe in arms.items()}
    results["stream_at_start"] = starts
    results["outcomes"] = [asdict(outcome) for outcome in outcomes]
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
