"""Train a flow: a folder of audio files, or CosyVoice's parquet files, to a checkpoint.

    python benchmarks/train_flow.py --data my/wavs --preset tiny2 --out runs/mine
    torchrun --nproc-per-node 8 benchmarks/train_flow.py --data data.list --preset cosyvoice2 --out runs/full --bf16

It resumes by itself: run the same command again after a crash, or after ``kill -9``, and it goes on from the last
checkpoint as if nothing had happened (the same losses, bit for bit, on the same machine).  ``figures.csv`` holds the
figures of every step, the folder also TensorBoard events and pictures of mel; ``flow.pt`` at the end is the state dict.
"""

import argparse
import contextlib
import gc
import importlib
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastflow
from fastflow import demo
from fastflow.config import PRESETS
from fastflow.training import StabilityMonitor, freeze, gradient_flow, keep_freed_memory, parameter_groups
from fastflow.training.batches import FrameBatches
from fastflow.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fastflow.training.corpus import Sample, collate, lengths, read
from fastflow.training.rng import rng_state, set_rng_state


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of audio files, parquet file, or data.list")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, figures and pictures")
    parser.add_argument("--preset", choices=PRESETS, default="tiny2", help="fresh weights of this size (tiny2)")
    parser.add_argument("--init", type=Path, metavar="FLOW.PT", help="start from these weights instead")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (1000)")
    parser.add_argument("--max-frames", type=int, default=2000, help="frames of a batch, padding included (2000)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step (1)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the estimator (3e-4)")
    parser.add_argument("--encoder-scale", type=float, default=0.5, help="times that for all before it (0.5)")
    parser.add_argument("--warm-up", type=int, default=200, help="steps to reach the rate (200)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (1)")
    parser.add_argument("--freeze", nargs="+", default=[], metavar="PART", help="parts that are not trained")
    parser.add_argument("--on-spike", default="record", help="record, skip, lower-lr or roll-back (record)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    parser.add_argument("--picture-every", type=int, default=500, help="steps between pictures, 0: none (500)")
    parser.add_argument("--no-tensorboard", action="store_true", help="figures.csv only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="cpu, cuda, cuda:N (the GPU if there is one)")
    args = parser.parse_args(arguments)
    for name in ("steps", "max_frames", "accumulate", "warm_up", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


@dataclass
class Place:
    """Where this process stands among those that torchrun started."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @staticmethod
    def find(device: torch.device | None) -> "Place":
        has_gpu = torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Place(device or torch.device("cuda" if has_gpu else "cpu"))
        if device is None:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # DDP imports this; once the group exists, the default arguments in there would hold it for ever.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return Place(device, dist.get_rank(), dist.get_world_size())

    def total(self, count: int) -> float:
        """The sum over all processes."""
        value = torch.tensor(float(count), device=self.device)
        if self.world > 1:
            dist.all_reduce(value)
        return value.item()

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """Part from the other processes; nothing may hold the process group any more."""
        if self.world > 1:
            # What is left of the group at the interpreter's end has threads, and one that lets go of a tensor then
            # aborts the process. DDP is part of reference cycles and would be left.
            gc.collect()
            dist.destroy_process_group()


class Trainer:
    """The state of a run: all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, place: Place) -> None:
        self.args, self.place = args, place
        random.seed(args.seed)
        torch.manual_seed(args.seed)  # the same weights everywhere
        self.flow: Any = fastflow.from_preset(args.preset)
        if args.init:
            self.flow.load_state_dict(load_checkpoint(args.init))
        self.samples: list[Sample] = read(args.data, self.flow)
        self.flow.to(place.device)
        if args.freeze:
            freeze(self.flow, *args.freeze)
        groups = parameter_groups(self.flow, args.lr, encoder_scale=args.encoder_scale)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.batches = FrameBatches(
            lengths(self.samples), args.max_frames, seed=args.seed, rank=place.rank, world=place.world
        )
        first = place.rank == 0
        self.wrapped: nn.Module = nn.parallel.DistributedDataParallel(self.flow) if place.world > 1 else self.flow
        self.monitor = StabilityMonitor(
            self.wrapped,
            self.optimizer,
            clip_norm=args.clip,
            on_spike=args.on_spike,
            log_dir=args.out if first else None,
            tensorboard=first and not args.no_tensorboard,
        )
        random.seed(args.seed + place.rank)  # other draws everywhere
        torch.manual_seed(args.seed + place.rank)

    def rate(self, step: int) -> float:
        """Linear warm-up, then the inverse square root of the step."""
        return min((step + 1) / self.args.warm_up, (self.args.warm_up / (step + 1)) ** 0.5)

    def step(self) -> float:
        """One optimizer step; the mean loss of all its frames, on all processes."""
        batches = [collate([self.samples[i] for i in next(self.batches)]) for _ in range(self.args.accumulate)]
        frames = [int(batch["speech_feat_len"].sum()) for batch in batches]
        # A batch's loss is a mean over its own frames, and DDP takes the mean over the processes.
        weights = [self.place.world * count / self.place.total(sum(frames)) for count in frames]
        total = torch.zeros((), device=self.place.device)
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            last = number + 1 == len(batches)
            unsynced = contextlib.nullcontext() if last or self.place.world == 1 else self.wrapped.no_sync()  # type: ignore[operator]
            with unsynced:
                loss = self.loss(batch) * weight
                loss.backward()
            total += loss.detach()
        record = self.monitor.step(total)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return record.figures["loss"]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        device = self.place.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            return self.wrapped(_to(batch, device), device)["loss"]

    # -------------------------------------------------------------------------------------------- checkpoints
    def save(self) -> None:
        states = self.place.gather(rng_state(self.place.device))
        if self.place.rank == 0:
            parts = {name: getattr(self, name).state_dict() for name in self.stateful}
            save_checkpoint(self.args.out, self.monitor.steps, {**parts, "rng": states})

    stateful = ("flow", "optimizer", "schedule", "batches", "monitor")

    def resume(self) -> None:
        """Go on from the latest checkpoint, if there is one."""
        if found := checkpoints(self.args.out):
            state = load_checkpoint(found[-1])
            if len(state["rng"]) != self.place.world:
                raise ValueError(f"{found[-1]} is of {len(state['rng'])} processes, these are {self.place.world}")
            for name in self.stateful:
                getattr(self, name).load_state_dict(state[name])
            set_rng_state(state["rng"][self.place.rank], self.place.device)
            if self.place.rank == 0:
                print(f"resuming after {self.monitor.steps} steps from {found[-1]}")

    # -------------------------------------------------------------------------------------------- pictures
    def picture(self) -> None:
        """The first sample's mel, and what the flow makes of its tokens; the generators are left as they were."""
        sample = self.samples[0]
        utterance = demo.Utterance(
            sample.mel, sample.tokens, sample.speaker, self.flow.input_frame_rate, demo.MEL[type(self.flow).__name__]
        )
        if len(sample.tokens) <= int(demo.PROMPT * utterance.token_rate):
            return  # no longer than the prompt
        path = self.args.out / f"mel-{self.monitor.steps:08d}.png"
        draw(path, utterance, demo.synthesise(self.flow, utterance, self.place.device, self.args.seed))
        self.monitor.show("mel", path)


def draw(path: Path, utterance: demo.Utterance, mel: Tensor) -> None:
    """The true mel above the generated one, on one scale; the dashed line ends the prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for axis, (name, shown) in zip(axes, {"target": utterance.mel, "generated": mel}.items(), strict=True):
        demo.show(axis, shown, utterance)
        axis.axvline(demo.PROMPT, color="white", linestyle="--")
        axis.set_title(f"{name}, mean L1 behind the prompt {demo.l1(shown, utterance):.2f}")
    axes[1].set_xlabel("time (s)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def run(args: argparse.Namespace, place: Place) -> None:
    trainer = Trainer(args, place)
    trainer.resume()
    if place.rank == 0 and not trainer.monitor.steps:
        print(gradient_flow(trainer.flow, _to(collate(trainer.samples[:2]), place.device)).table())
    train(trainer)
    trainer.monitor.close()


def train(trainer: Trainer) -> None:
    from tqdm import tqdm

    args, first, done = trainer.args, trainer.place.rank == 0, trainer.monitor.steps
    with tqdm(
        total=args.steps, initial=done, desc="training", unit="step", dynamic_ncols=True, disable=not first
    ) as bar:
        while trainer.monitor.steps < args.steps:
            bar.set_postfix(loss=f"{trainer.step():.3f}", refresh=False)
            bar.update()
            step = trainer.monitor.steps
            if step % args.save_every == 0 or step == args.steps:
                trainer.save()
            if first and args.picture_every and (step % args.picture_every == 0 or step == args.steps):
                trainer.picture()
    if first:
        torch.save(trainer.flow.state_dict(), args.out / "flow.pt")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    keep_freed_memory()
    place = Place.find(args.device)
    try:
        run(args, place)
    except (ValueError, FileNotFoundError, ImportError, ArithmeticError) as error:
        print(f"train_flow: {error}", file=sys.stderr)
        return 1
    finally:
        place.leave()
    return 0


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
