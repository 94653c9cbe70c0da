"""What the runs of ``train_stability.py`` come to: which broke, where and after which signs, in words and pictures."""

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Figures = dict[str, list[float]]  # column of the monitor: its value at every step

WORSE = 1.5  # a run breaks when it ends at so many times the loss that it could have
JUMP = 3.0  # a gradient norm jumps when it is so many times the median of the steps before
HISTORY = 20  # steps of that median


def read_figures(folder: Path) -> Figures:
    """The columns of ``figures.csv``, NaN for empty cells, and ``stream``, the largest input of the last block."""
    with open(folder / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "action"]
    figures = {name: [float(row[name] or "nan") for row in rows] for name in names}
    stream = folder / "stream.json"
    return {**figures, "stream": json.loads(stream.read_text())} if stream.exists() else figures


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        end: mean loss of the last tenth of the steps; infinite if it stopped early or is not finite.
        broke: ``end`` is above 1.5 times the lowest smoothed loss of the run, or 1.5 times the end of a calmer run.
        broke_at: the step from which on the smoothed loss stayed above 1.5 times that of the calmer run.
        jumps: of each part, the first step whose gradient norm was 3 times the median of the 20 before, if there is one
            up to ``broke_at``.
        silent_at: the step from which on the gradient of every part but the estimator is less than a billionth of what
            it was at first.
        signs: by column of the monitor: of ``gradient/<part>`` the median of the last tenth; of ``update/<part>``
            (update over weights) and ``logit/<part>`` the largest that was sampled, as of ``stream``.
        stopped: why the run ended early, if it did.
    """

    name: str
    lr: float
    seed: int
    end: float
    broke: bool
    broke_at: int | None
    jumps: dict[str, int]
    silent_at: int | None
    signs: dict[str, float]
    stopped: str


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the values, of fewer at the start."""
    width = max(1, len(values) // 20)
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def judge(name: str, lr: float, seed: int, figures: Figures, stopped: str, calmer: Sequence[float] = ()) -> Outcome:
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
        elif kind in ("update", "logit", "stream") and known:
            signs[column] = max(known)
    jumped = {part: step for part, step in jumps.items() if step is not None}
    return Outcome(name, lr, seed, end, broke, broke_at, jumped, silence(figures), signs, stopped)


def silence(figures: Figures) -> int | None:
    """The step from which on every part before the estimator gets no gradient; None if some does at the end."""
    before = [xs for name, xs in figures.items() if name.startswith("gradient/") and name != "gradient/estimator"]
    if not before:
        return None
    heard = [step for norms in before for step, norm in enumerate(norms) if not norm < 1e-9 * norms[0]]
    return None if max(heard) == len(before[0]) - 1 else max(heard) + 1


def first_jump(norms: Sequence[float]) -> int | None:
    """The first step above 3 times the median of up to 20 before it, at least 5; or that is not finite.

    Before the estimator a batch whose rows all lose their condition has no gradient, and does not count.
    """
    counted: list[float] = []
    for step, norm in enumerate(norms):
        before = counted[-HISTORY:]
        if not math.isfinite(norm) or (len(before) >= 5 and norm > JUMP * statistics.median(before)):
            return step
        counted += [norm] if norm else []
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


def cases(outcomes: Sequence[Outcome], own: Iterable[str]) -> dict[str, list[Outcome]]:
    """What is compared between the rates that hold and break: the recipes and each changed one; empty without them."""
    holds, breaks = margin(outcomes, "question")
    if holds is None or breaks is None:
        return {}
    ladder = rungs(outcomes, "question")
    shaky = min(lr for lr in ladder if lr > holds)
    changed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.name not in own:
            changed.setdefault(outcome.name, []).append(outcome)
    found = {f"question at {holds:g}": ladder[holds], f"question at {breaks:g}": ladder[breaks]}
    found |= {name: runs for name, runs in changed.items() if name.startswith("hot ")}
    found[f"question at {shaky:g}"] = ladder[shaky]
    found |= {f"{name}, at {shaky:g}": runs for name, runs in changed.items() if not name.startswith("hot ")}
    ours = rungs(outcomes, "ours").get(shaky)
    return {**found, f"ours at {shaky:g}": ours} if ours else found


def report(
    outcomes: Sequence[Outcome], own: dict[str, float], setting: str, level: float, starts: dict[str, float]
) -> str:
    """The findings as markdown.

    Args:
        own: the learning rate of each recipe that climbs.
        setting: what was run, a sentence.
        level: loss of a flow that knows the mean spectrum and nothing else.
        starts: of some presets, the root mean square of the U-Net's stream at its last block with fresh weights.
    """
    rates = sorted({outcome.lr for outcome in outcomes if outcome.name in own})
    lines = [
        "# What diverges, and what helps?",
        "",
        *conclusions(outcomes, own),
        "",
        f"{setting} A run breaks when its last tenth of the steps ends above {WORSE:g} times its lowest smoothed loss, "
        "or the end of the best calmer run of its seed. "
        f"A flow that knows the mean spectrum and nothing else has a loss of {level:.1f}.",
        "",
        "## Loss at the end by learning rate",
        "",
        "Median of the seeds; in brackets how many broke.",
        "",
        "| recipe | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name in own:
        ladder = rungs(outcomes, name)
        lines.append(f"| {name} | " + " | ".join(_cell(ladder.get(lr, [])) for lr in rates) + " |")
    compared = cases(outcomes, own)
    stream = ", ".join(f"{name} {value:.3g}" for name, value in starts.items())
    lines += _changes(compared) if compared else []
    return "\n".join([*lines, "", f"Fresh weights, root mean square of that stream: {stream}.", ""])


def _cell(runs: Sequence[Outcome]) -> str:
    if not runs:
        return ""
    broken = sum(outcome.broke for outcome in runs)
    return f"{statistics.median(outcome.end for outcome in runs):.2f}" + (
        f" ({broken} of {len(runs)})" if broken else ""
    )


def _changes(compared: dict[str, list[Outcome]]) -> list[str]:
    calm, broken = list(compared.values())[:2]
    holds, breaks = calm[0].lr, broken[0].lr
    lines = [
        "",
        f"## One change, between the rates {holds:g} and {breaks:g}",
        "",
        f"A *hot* part is at {breaks:g} and the rest at {holds:g}; the last rows are the question's recipe with one "
        "ingredient of ours.",
        "",
        "| | loss at the end, seed by seed | broke |",
        "|---|---|---|",
    ]
    for name, runs in compared.items():
        ends = ", ".join(f"{outcome.end:.2f}" for outcome in runs)
        lines.append(f"| {name} | {ends} | {sum(outcome.broke for outcome in runs)} of {len(runs)} |")
    lines += [
        "",
        "## Signs, by part",
        "",
        f"Medians of the seeds, all at {holds:g} and all at {breaks:g}. A jump is a gradient norm {JUMP:g} times the "
        f"median of the {HISTORY} steps before; where the run breaks, only until the loss leaves the calmer run.",
        "",
        "| part | largest update / weights | gradient norm at the end | largest logit | first jump, by seed |",
        "|---|---|---|---|---|",
    ]
    for part in (column.removeprefix("gradient/") for column in calm[0].signs if column.startswith("gradient/")):
        cells = [_pair(calm, broken, f"{kind}/{part}") for kind in ("update", "gradient", "logit")]
        jumps = [", ".join(str(outcome.jumps.get(part, "none")) for outcome in side) for side in (calm, broken)]
        lines.append(f"| {part} | {' | '.join(cells)} | {' to '.join(jumps)} |")
    left, silent = (", ".join(str(getattr(outcome, name)) for outcome in broken) for name in ("broke_at", "silent_at"))
    words = f"Seed by seed, the loss left the calmer run at step {left}, and no gradient reached the parts before the "
    words += f"estimator from step {silent} on."
    if stream := _pair(calm, broken, "stream"):
        words += f" The largest value in the U-Net's residual stream, at its last block: {stream}."
    return [*lines, "", words]


def _pair(calm: Sequence[Outcome], broken: Sequence[Outcome], column: str) -> str:
    sides = [[outcome.signs[column] for outcome in side if column in outcome.signs] for side in (calm, broken)]
    return " to ".join(f"{statistics.median(side):.2g}" for side in sides) if all(sides) else ""


def conclusions(outcomes: Sequence[Outcome], own: dict[str, float]) -> list[str]:
    """The findings, a sentence each."""
    lines = []
    for name, lr in own.items():
        holds, breaks = margin(outcomes, name)
        ladder = rungs(outcomes, name)
        if holds is None:
            line = f"breaks at the lowest rate tried, {min(ladder):g}"
        else:
            line = f"holds up to {holds:g}, {holds / lr:.3g} times its own rate of {lr:g}"
        every = f"every seed breaks at {breaks:g}" if breaks else f"at {max(ladder):g} some seed still holds"
        lines.append(f"* **{name}** {line}; {every}.")
    hot = {name: runs for name, runs in cases(outcomes, own).items() if name.startswith("hot ")}
    if hot:
        guilty = [name.removeprefix("hot ") for name, runs in hot.items() if all(outcome.broke for outcome in runs)]
        named = f"{', '.join(guilty)}, alone at the breaking rate, breaks every seed" if guilty else "no single part"
        lines.append(f"* **What breaks**: {named}.")
        calm, broken = list(cases(outcomes, own).values())[:2]
        lines.append(
            f"* **Whose gradient jumps first**: {first_part(broken)}; in the runs that hold {first_part(calm)}."
        )
    return lines


def draw_loss(path: Path, outcomes: Sequence[Outcome], own: Iterable[str], level: float) -> None:
    """Loss at the end: left by learning rate, right with one thing changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(own):
        ladder = rungs(outcomes, name)
        medians = [statistics.median(outcome.end for outcome in rung) for rung in ladder.values()]
        left.plot(list(ladder), medians, color=f"C{number}", label=name)
        for outcome in (outcome for rung in ladder.values() for outcome in rung):
            left.plot(outcome.lr, outcome.end, "x" if outcome.broke else "o", color=f"C{number}", markersize=5)
    left.axhline(level, color="grey", linestyle="--", label="knows the mean spectrum only")
    left.set(xscale="log", yscale="log", xlabel="highest learning rate", ylabel="flow-matching loss at the end")
    left.set_title("median and seeds; a cross is a run that broke")
    left.legend(frameon=False, fontsize=8)
    compared = cases(outcomes, own)
    for row, runs in enumerate(compared.values()):
        for outcome in runs:
            right.plot(outcome.end, row, "x" if outcome.broke else "o", color="C3" if outcome.broke else "C0")
    right.set_yticks(range(len(compared)), list(compared))
    right.invert_yaxis()
    right.axvline(level, color="grey", linestyle="--")
    right.set(xscale="log", xlabel="flow-matching loss at the end", title="one change between the two rates")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path)


def draw_gradients(path: Path, outcomes: Sequence[Outcome], curves: dict[float, list[Figures]], level: float) -> None:
    """Loss, gradient norms and the U-Net's residual stream by step; red: where the loss left the calmer run.

    Args:
        curves: of the question's recipe, by learning rate, seed by seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=100, layout="constrained")
    axes = figure.subplots(3, len(curves), sharex=True, sharey="row", squeeze=False)
    ladder = rungs(outcomes, "question")
    for column, (rate, runs) in zip(axes.T, curves.items(), strict=True):
        losses, gradients, streams = column
        for seed, figures in enumerate(runs):
            losses.plot(smooth(figures["loss"]), color="black", alpha=0.7, label=None if seed else "one line a seed")
            for number, name in enumerate(name for name in figures if name.startswith("gradient/")):
                label = None if seed else name.removeprefix("gradient/")
                norms = [norm or math.nan for norm in figures[name]]  # none when all rows lose their condition
                gradients.plot(norms, color=f"C{number}", linewidth=0.9, alpha=0.8, label=label)
            streams.plot(figures.get("stream", []), color="black", alpha=0.7)
        losses.axhline(level, color="grey", linestyle="--", label="knows the mean spectrum only")
        losses.set_title(f"question at {rate:g}")
        streams.set_xlabel("optimizer step")
        for axis in column:
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            for at in (outcome.broke_at for outcome in ladder[rate] if outcome.broke_at is not None):
                axis.axvline(at, color="C3", linestyle=":", linewidth=1)
    for axis, label in zip(
        axes[:, 0],
        ("loss (running mean)", "gradient norm before clipping", "largest in the U-Net's stream"),
        strict=True,
    ):
        axis.set_ylabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    axes[1][0].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path)
