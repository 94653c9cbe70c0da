"""Watch a training run: which part misbehaves, and what to do about it."""

import copy
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.training.attention_logits import AttentionLogits
from fastflow.training.log import StepLog
from fastflow.training.parts import blocks, named_part_parameters, parts, unwrapped
from fastflow.training.spikes import SpikeDetector
from fastflow.training.timesteps import TimestepLoss

ON_SPIKE = ("record", "skip", "lower-lr", "roll-back")
ON_NONFINITE = ("skip", "raise")
LOWER = 0.5  # factor of the learning rate
BUCKETS = 5  # of the timestep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """A training step.

    Attributes:
        step: counted from 0.
        action: ``step``; or, with the reason logged, ``skip``, ``lower-lr``, ``roll-back``; ``record`` if a spike was
            only noted.
        figures: ``loss``, ``gradient`` (norm of all, before clipping), ``lr_scale``, and for each part
            ``gradient/<part>``, ``activation/<part>`` (largest absolute output), ``update/<part>`` (norm of the last
            sampled update over norm of the weights), for encoder and estimator ``logit/<part>`` (largest sampled
            attention logit), and ``loss/t<low>-<high>``; NaN where there is no figure.
    """

    step: int
    action: str
    figures: dict[str, float]


class NonFiniteError(ArithmeticError):
    """A loss, gradient or weight is NaN or infinite; the message names the part where it began."""


class StabilityMonitor:
    """Call :meth:`step` where ``optimizer.step()`` would stand::

        monitor = StabilityMonitor(flow, optimizer, clip_norm=5.0, on_spike="skip", log_dir="runs/1")
        for batch in batches:
            loss = flow(batch, device)["loss"]
            loss.backward()
            monitor.step(loss)
            optimizer.zero_grad()

    A spike is a loss or a gradient norm far above its recent median (see :class:`SpikeDetector`).  Then, by
    ``on_spike``: ``record`` it and step, ``skip`` the step, ``lower-lr``: take it and all later ones at half the
    learning rate (schedulers go on as they are), or ``roll-back``: put weights and optimizer back to where they were
    one to two times ``snapshot_every`` steps ago, and go on with other batches.  A step whose loss or gradient is not
    finite is skipped or raises, by ``on_nonfinite``; weights that are not finite always raise.

    Its cost: the gradient's norm, a maximum for each part, one read from the device a step, and on every
    ``sample_every``-th step a copy of the weights and two small products for each attention module.  Under
    torch.distributed all ranks see the same figures and decide alike.

    Args:
        flow: a flow, or one inside DistributedDataParallel.
        optimizer: of its parameters.
        clip_norm: scale gradients down to this norm of all of them together; None: don't.
        on_spike: ``record``, ``skip``, ``lower-lr`` or ``roll-back``.
        on_nonfinite: ``skip`` or ``raise``.
        window, threshold: of :class:`SpikeDetector`.
        sample_every: steps between measurements of updates and attention logits; 0: never.
        snapshot_every: steps between the snapshots, in CPU memory, that ``roll-back`` takes.
        log_dir: folder for ``figures.csv``; None: write nothing.
        tensorboard: also write TensorBoard events there.
        scaler: a ``torch.amp.GradScaler`` that scaled the loss; it is stepped and updated here.

    Raises:
        ValueError: a policy or number that does not exist, or nothing to train.
        TypeError: not a flow.
        ImportError: TensorBoard is asked for and missing.
    """

    def __init__(
        self,
        flow: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        on_spike: str = "record",
        on_nonfinite: str = "skip",
        window: int = 200,
        threshold: float = 6.0,
        sample_every: int = 50,
        snapshot_every: int = 200,
        log_dir: str | Path | None = None,
        tensorboard: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        _check_choice("on_spike", on_spike, ON_SPIKE)
        _check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0 or None, got {clip_norm}")
        if sample_every < 0 or snapshot_every < 1:
            raise ValueError(
                f"sample_every must be >= 0 and snapshot_every >= 1 steps, got {sample_every} and {snapshot_every}"
            )
        if tensorboard and log_dir is None:
            raise ValueError("tensorboard=True needs a log_dir")
        self.flow, self.optimizer, self.scaler = unwrapped(flow), optimizer, scaler
        self.clip_norm, self.on_spike, self.on_nonfinite = clip_norm, on_spike, on_nonfinite
        self.sample_every, self.snapshot_every = sample_every, snapshot_every
        self.steps, self.lr_scale = 0, 1.0
        self.actions: Counter[str] = Counter()
        self._loss_spikes, self._gradient_spikes = SpikeDetector(window, threshold), SpikeDetector(window, threshold)
        self._trained = {
            part: [p for p in named.values() if p.requires_grad]
            for part, named in named_part_parameters(flow).items()
            if any(p.requires_grad for p in named.values())
        }
        if not self._trained:
            raise ValueError("flow has no parameter that requires a gradient: unfreeze a part first")
        self._activations = _Activations(self.flow)
        self._timesteps = TimestepLoss(self.flow, BUCKETS)
        self._logits = AttentionLogits(self.flow)
        self._updates: Tensor | None = None
        self._snapshots: deque[dict[str, Any]] = deque(maxlen=2)
        self._log = None if log_dir is None else StepLog(log_dir, [*self._names(), "action"], tensorboard)
        self._sample()

    # -------------------------------------------------------------------------------------------- the step
    def step(self, loss: Tensor) -> StepRecord:
        """Judge the gradients that ``backward()`` has left, and step the optimizer unless a policy forbids it.

        Args:
            loss: of the step, a scalar, unscaled; with several batches accumulated, their mean.

        Raises:
            NonFiniteError: by ``on_nonfinite="raise"``, or when a weight is not finite.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        figures = self._read(loss)
        action = self._judge(figures)
        if action in ("step", "record", "lower-lr"):
            self._take(figures["gradient"])
        elif action == "roll-back":
            self._roll_back()
        if self.scaler is not None:
            self.scaler.update()
        record = StepRecord(self.steps, action, figures)
        self.actions[action] += 1
        if self._log is not None:
            self._log.write(self.steps, {**figures, "action": action})
        self.steps += 1
        self._timesteps.reset()
        self._activations.reset()
        self._sample()
        return record

    def _sample(self) -> None:
        """Decide whether the coming step is a sampled one; take a snapshot if it is time."""
        self._logits.active = bool(self.sample_every) and self.steps % self.sample_every == 0
        self._logits.largest.clear()
        if self.on_spike == "roll-back" and self.steps % self.snapshot_every == 0:
            self._snapshots.append(self._snapshot())

    def _judge(self, figures: dict[str, float]) -> str:
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient"])):
            return self._judge_nonfinite(figures)
        spikes = {
            "loss": self._loss_spikes(figures["loss"]),
            "gradient": self._gradient_spikes(figures["gradient"]),
        }
        if not any(spikes.values()):
            return "step"
        if self.on_spike == "lower-lr":
            self.lr_scale *= LOWER
        largest = max(self._trained, key=lambda part: figures[f"gradient/{part}"])
        what = " and ".join(f"{name} {figures[name]:.3g}" for name, spike in spikes.items() if spike)
        logger.warning("step %d: spike, %s; largest gradient in %s: %s", self.steps, what, largest, self.on_spike)
        return self.on_spike

    def _judge_nonfinite(self, figures: dict[str, float]) -> str:
        for part, named in named_part_parameters(self.flow).items():
            for name, weight in named.items():
                if not weight.detach().isfinite().all():
                    raise NonFiniteError(f"step {self.steps}: the weight {name} of part {part} is not finite")
        where = self._begin_of_nonfinite(figures)
        if self.on_nonfinite == "raise":
            raise NonFiniteError(f"step {self.steps}: {where}")
        logger.warning("step %d skipped: %s", self.steps, where)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # which skips, and remembers to lower its scale
        return "skip"

    def _begin_of_nonfinite(self, figures: dict[str, float]) -> str:
        """Forward comes first, from the embedding to the loss; backward goes the other way."""
        for part in parts(self.flow):
            if math.isinf(value := figures[f"activation/{part}"]) or (math.isnan(value) and part in self._activations):
                return f"the first output that is not finite is that of part {part}"
        if not math.isfinite(figures["loss"]):
            return f"the loss is {figures['loss']}, though the output of every part is finite"
        for part, block, parameters in reversed(list(blocks(self.flow))):
            grads = [p.grad for p in parameters if p.grad is not None]
            if not all(grad.isfinite().all() for grad in grads):
                return f"forward is finite; the first gradient that is not belongs to {block} of part {part}"
        return f"forward is finite and so is every gradient, but their norm is {figures['gradient']}"

    def _take(self, norm: float) -> None:
        parameters = [p for part in self._trained.values() for p in part]
        if self.clip_norm is not None and norm > self.clip_norm:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self.clip_norm / norm)
        before = [p.detach().clone() for p in parameters] if self._logits.active else None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self.lr_scale
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if before is not None:
            self._updates = self._update_ratios(before)

    # -------------------------------------------------------------------------------------------- figures
    def _names(self) -> list[str]:
        each = [f"{kind}/{part}" for kind in ("gradient", "update") for part in self._trained]
        activations = [f"activation/{part}" for part in parts(self.flow)]
        logits = [f"logit/{part}" for part in ("encoder", "estimator")]
        edges = [f"{i / BUCKETS:.1f}" for i in range(BUCKETS + 1)]
        buckets = [f"loss/t{low}-{high}" for low, high in pairwise(edges)]
        return ["loss", "gradient", "lr_scale", *each, *activations, *logits, *buckets]

    @torch.no_grad()
    def _read(self, loss: Tensor) -> dict[str, float]:
        """All figures of the step by one read from the device."""
        like = loss.detach().float()
        nothing = torch.full_like(like, math.nan)
        norms = [_norm([p.grad for p in params if p.grad is not None], like) for params in self._trained.values()]
        updates = nothing.expand(len(norms)) if self._updates is None else self._updates
        logits = [
            torch.stack(found).amax() if found else nothing
            for found in (self._logits_of("encoder."), self._logits_of("decoder."))
        ]
        sums = self._timesteps.sums
        sums = torch.zeros(2 * BUCKETS + 1, device=like.device) if sums is None else sums
        largest = [self._activations.largest.get(part, nothing) for part in parts(self.flow)]
        parted = [like[None], sums, torch.stack([*norms, *largest, *logits]), updates]
        values = _over_ranks(torch.cat(parted[:2]), torch.cat(parted[2:])).tolist()

        loss_value, sums_value, rest = values[0], values[1 : 2 * BUCKETS + 2], values[2 * BUCKETS + 2 :]
        count = len(norms)
        total = math.hypot(*rest[:count])
        ordered = [loss_value, total, self.lr_scale, *rest[:count], *rest[-count:], *rest[count:-count]]
        return dict(zip(self._names(), [*ordered, *self._timesteps.losses(sums_value, loss_value)], strict=True))

    def _logits_of(self, prefix: str) -> list[Tensor]:
        return [value.float() for name, value in self._logits.largest.items() if name.startswith(prefix)]

    @torch.no_grad()
    def _update_ratios(self, before: list[Tensor]) -> Tensor:
        """Norm of the update over norm of the weights before it, for each part."""
        olds, ratios = iter(before), []
        for parameters in self._trained.values():
            old = [next(olds) for _ in parameters]
            change = torch._foreach_sub([p.detach() for p in parameters], old)
            like = torch.zeros((), device=parameters[0].device)
            ratios.append(_norm(list(change), like) / _norm(old, like).clamp(min=1e-12))
        return torch.stack(ratios)

    # -------------------------------------------------------------------------------------------- state
    def _snapshot(self) -> dict[str, Any]:
        weights = {name: p.detach().to("cpu", copy=True) for name, p in self.flow.named_parameters()}
        return {"weights": weights, "optimizer": _to_cpu(copy.deepcopy(self.optimizer.state_dict()))}

    @torch.no_grad()
    def _roll_back(self) -> None:
        snapshot = self._snapshots[0]
        for name, parameter in self.flow.named_parameters():
            parameter.copy_(snapshot["weights"][name])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        self._snapshots = deque([snapshot], maxlen=2)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on judging alike; snapshots are taken anew."""
        return {
            "steps": self.steps,
            "lr_scale": self.lr_scale,
            "updates": None if self._updates is None else self._updates.tolist(),
            "loss_history": list(self._loss_spikes.history),
            "gradient_history": list(self._gradient_spikes.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; load weights and optimizer before."""
        self.steps, self.lr_scale = state["steps"], state["lr_scale"]
        device = next(self.flow.parameters()).device
        self._updates = None if state["updates"] is None else torch.tensor(state["updates"], device=device)
        for detector, name in ((self._loss_spikes, "loss_history"), (self._gradient_spikes, "gradient_history")):
            detector.history.clear()
            detector.history.extend(state[name])
        self._snapshots.clear()
        if self.on_spike == "roll-back":
            self._snapshots.append(self._snapshot())
        self._sample()

    def show(self, name: str, path: Path) -> None:
        """Show a picture file in TensorBoard, if that is written, at the step that was last taken."""
        if self._log is not None:
            self._log.image(self.steps - 1, name, path)

    def close(self) -> None:
        """Remove the hooks and close the files."""
        for hooks in (self._activations, self._timesteps, self._logits):
            hooks.remove()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> "StabilityMonitor":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


class _Activations:
    """The largest absolute output of each part since the last reset, as 0-dimensional tensors."""

    def __init__(self, flow: nn.Module) -> None:
        self.largest: dict[str, Tensor] = {}
        self._handles = [
            modules[-1].register_forward_hook(self._recorder(part))
            for part, modules in parts(flow).items()
            if part != "estimator"
        ]
        self._handles.append(flow.get_submodule("decoder.estimator").register_forward_hook(self._recorder("estimator")))

    def __contains__(self, part: str) -> bool:
        return part in self.largest

    def _recorder(self, part: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if module.training:
                x = (output[0] if isinstance(output, tuple) else output).detach()
                largest = x.abs().amax().float()
                known = self.largest.get(part)
                self.largest[part] = largest if known is None else torch.maximum(known, largest)

        return record

    def reset(self) -> None:
        self.largest.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _norm(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Euclidean norm of all of them together, as a 0-dimensional float32 tensor; of sharded tensors the whole norm."""
    if not tensors:
        return torch.zeros_like(like)
    norm: Any = nn.utils.get_total_norm(tensors)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()


def _over_ranks(means: Tensor, maxima: Tensor) -> Tensor:
    """Both, side by side; under torch.distributed the mean and the maximum over the ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(means)
        means = means / torch.distributed.get_world_size()
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
    return torch.cat([means, maxima])


def _to_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.to("cpu")
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    return [_to_cpu(value) for value in state] if isinstance(state, list) else state
