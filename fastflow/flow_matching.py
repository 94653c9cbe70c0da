"""Conditional flow matching: the training loss and the ODE solver around an estimator."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastflow import graphs, replay
from fastflow.checks import readable
from fastflow.ops.euler_step import euler_step
from fastflow.ops.half import fitted, saturated, widened
from fastflow.recompute import Recomputing

CACHED_FRAMES = 34  # the mel overlap of CosyVoice 1's stream: 20 tokens at 50 Hz
NOISE_FRAMES = 15000  # 300 s at 50 frames/s


def _params(cfm_params: Any) -> dict[str, Any]:
    """The fields that are used, from a mapping, a DictConfig or any object with attributes."""
    names = ("t_scheduler", "training_cfg_rate", "inference_cfg_rate", "sigma_min")
    if isinstance(cfm_params, Mapping):
        given = {name: cfm_params[name] for name in names if name in cfm_params}
    else:
        given = {name: getattr(cfm_params, name) for name in names if hasattr(cfm_params, name)}
    given.setdefault("sigma_min", 1e-4)
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"cfm_params lacks {', '.join(missing)}")
    return given


SCHEDULES = ("cosine", "linear", "sway")
SWAY = (-1.0, 2 / (math.pi - 2))  # the coefficients for which the times increase

Schedule = str | Sequence[float] | Tensor
Velocity = Callable[[Tensor, int], Tensor]  # of two of x below each other ``[2 * B, T, 80]``, at the n-th time


class SolverOptions(TypedDict, total=False):
    """What ``flow.inference`` hands to the solver; :meth:`ConditionalCFM.forward` says what each means."""

    n_timesteps: int | None
    temperature: float
    schedule: Schedule | None
    sway_coefficient: float
    method: str
    cfg_rate: float | None


def _is_number(x: object, smallest: float, largest: float = math.inf) -> bool:
    """Whether ``x`` is a finite number in this range."""
    return isinstance(x, Real) and math.isfinite(x) and smallest <= float(x) <= largest


def _explicit_times(schedule: Sequence[float] | Tensor, n_timesteps: int | None) -> Tensor:
    if not isinstance(schedule, Tensor):
        schedule = torch.tensor(schedule, dtype=torch.float64)
    if schedule.dim() != 1 or not schedule.is_floating_point() or len(schedule) < 2:
        given = f"{schedule.dtype} {list(schedule.shape)}"
        raise ValueError(f"schedule must hold at least two times in one dimension, got {given}")
    if n_timesteps is not None and n_timesteps != len(schedule) - 1:
        raise ValueError(f"n_timesteps is {n_timesteps} but the times of schedule make {len(schedule) - 1} steps")
    if readable(schedule):
        times = schedule.tolist()
        # Written so that NaN fails.
        if not (times[0] == 0 and times[-1] == 1 and all(a < b for a, b in itertools.pairwise(times))):
            raise ValueError(f"schedule must increase from 0 to 1, got {times}")
    return schedule


def time_grid(
    schedule: Schedule,
    n_timesteps: int | None,
    *,
    sway_coefficient: float = -1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The times from 0 to 1 between which the solver steps.

    Args:
        schedule: ``"linear"``: ``u = 0, 1/n, ..., 1``; ``"cosine"``: ``1 - cos(u * pi / 2)``, upstream's; ``"sway"``:
            ``u + s * (cos(u * pi / 2) - 1 + u)``, the sway sampling of F5-TTS (arXiv 2410.06885), which for s = -1
            is the cosine schedule and for s = 0 the linear one; or the times themselves, n + 1 of them.
        n_timesteps: n; None where ``schedule`` holds the times.
        sway_coefficient: s, in [-1, 1.75]: below 0 the steps are short where t is small.

    Returns:
        ``[n + 1]``.

    Raises:
        ValueError: an unknown schedule, n below 1, times that do not increase from 0 to 1 (not looked at on a GPU), or
            a coefficient for which they would not.
    """
    if not isinstance(schedule, str):
        return _explicit_times(schedule, n_timesteps).to(device, dtype, non_blocking=True)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, or times from 0 to 1; got {schedule!r}")
    if not isinstance(n_timesteps, Integral) or n_timesteps < 1:
        raise ValueError(f"n_timesteps must be a whole number >= 1, got {n_timesteps!r}")
    if not _is_number(sway_coefficient, *SWAY):
        raise ValueError(f"sway_coefficient must lie in [{SWAY[0]:.0f}, {SWAY[1]:.4f}], got {sway_coefficient!r}")
    u = torch.linspace(0, 1, n_timesteps + 1, device=device, dtype=dtype)
    if schedule == "cosine":
        return 1 - torch.cos(u * 0.5 * torch.pi)
    if schedule == "sway":
        return u + sway_coefficient * (torch.cos(u * 0.5 * torch.pi) - 1 + u)
    return u


def euler_grid(t_span: Tensor) -> tuple[Tensor, Tensor]:
    """Times and step sizes ``[n]`` of the steps along ``t_span`` ``[n + 1]``.

    As upstream, a step ends where the sum of the steps says, not at its entry of ``t_span``: they differ by rounding.
    """
    t, dt = t_span[0], t_span[1] - t_span[0]
    times, steps = [], []
    for end in t_span[2:].unbind():
        times.append(t)
        steps.append(dt)
        t = t + dt
        dt = end - t
    return torch.stack([*times, t]), torch.stack([*steps, dt])


def _euler(x: Tensor, twice: Tensor, steps: Tensor, rate: float, velocity: Velocity) -> Tensor:
    for n, dt in enumerate(steps.unbind()):
        x, twice = euler_step(x, velocity(twice, n), dt, rate)
    return x


def _midpoint(x: Tensor, twice: Tensor, steps: Tensor, rate: float, velocity: Velocity) -> Tensor:
    """The slope in the middle of a step, where half an Euler step leads, for the whole step."""
    for n, (dt, half) in enumerate(zip(steps.unbind(), (steps / 2).unbind(), strict=True)):
        _, middle = euler_step(x, velocity(twice, 2 * n), half, rate)
        x, twice = euler_step(x, velocity(middle, 2 * n + 1), dt, rate)
    return x


def _adams_bashforth(x: Tensor, twice: Tensor, steps: Tensor, rate: float, velocity: Velocity) -> Tensor:
    """``x + dt * ((1 + r / 2) * v - r / 2 * v_before)``, r the ratio of this step to the one before; first Euler."""
    extra = F.pad(steps[1:] * steps[1:] / steps[:-1] / 2, (1, 0))
    before: Tensor | None = None
    for n, (forward, back) in enumerate(zip((steps + extra).unbind(), (-extra).unbind(), strict=True)):
        slope = velocity(twice, n)
        if before is not None:
            x, _ = euler_step(x, before, back, rate)
        x, twice = euler_step(x, slope, forward, rate)
        before = slope
    return x


METHODS = {"euler": _euler, "midpoint": _midpoint, "ab2": _adams_bashforth}


class ConditionalCFM(Recomputing):
    """The flow-matching wrapper of CosyVoice 1.  It owns no parameters but the estimator's.

    Args:
        in_channels, n_spks, spk_emb_dim: kept for upstream's signature, without effect.
        cfm_params: ``t_scheduler``, ``training_cfg_rate``, ``inference_cfg_rate`` and ``sigma_min`` as a dict, a
            namespace or an omegaconf DictConfig.
        estimator: called with (x, mask, mu, t, spks, cond, streaming=...).
        cosine_t: draw the times of training as upstream did until 2026-01-19, ``t = 1 - cos(u * pi / 2)`` with u
            uniform, which puts two thirds of them below 1/2; the models released before then come from that time.
            By default t is uniform as upstream's is now, whatever ``t_scheduler``.  Also an attribute:
            ``flow.decoder.cosine_t = True``.

    Set ``cuda_graphs`` to False, or the environment variable FASTFLOW_CUDA_GRAPHS to 0 before the start, and inference
    on a GPU makes no CUDA graphs (:mod:`fastflow.graphs`).  Set ``replays`` to False, and on a CPU every evaluation of
    the estimator goes through its modules, not only the first of a solve (:mod:`fastflow.replay`).
    """

    cuda_graphs = graphs.ENABLED
    replays = True

    def __init__(
        self,
        in_channels: int,
        cfm_params: Any,
        n_spks: int = 1,
        spk_emb_dim: int = 64,
        estimator: nn.Module | None = None,
        *,
        cosine_t: bool = False,
    ) -> None:
        super().__init__()
        params = _params(cfm_params)
        self.t_scheduler = params["t_scheduler"]
        self.training_cfg_rate = params["training_cfg_rate"]
        self.inference_cfg_rate = params["inference_cfg_rate"]
        self.sigma_min = params["sigma_min"]
        self.cosine_t = cosine_t
        self.estimator = estimator

    @torch.inference_mode()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int | None,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        prompt_len: int = 0,
        cache: Tensor | None = None,
        *,
        schedule: Schedule | None = None,
        sway_coefficient: float = -1.0,
        method: str = "euler",
        cfg_rate: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Solve from noise to mel.

        Args:
            mu: ``[B, 80, T]`` encoder output.  **Overwritten** in the first K frames by those of the cache.
            mask: ``[B, 1, T]``.
            n_timesteps: steps from t = 0 to t = 1; None where ``schedule`` holds the times.  A step evaluates the
                estimator once, and with ``method="midpoint"`` twice.
            temperature: scale of the noise.
            spks: ``[B, 80]``.
            cond: ``[B, 80, T]``.
            prompt_len: frames of the prompt, which the new cache keeps together with the last 34.
            cache: ``[1, 80, K, 2]``, noise and mu of the previous chunk's prompt and end.
            schedule: the times, as :func:`time_grid` takes them; None takes ``t_scheduler``.
            sway_coefficient: of the schedule ``"sway"``.
            method: ``"euler"``, upstream's; ``"midpoint"``; or ``"ab2"``, Adams-Bashforth of second order, which reuses
                the slope of the step before, with a first step by Euler.
            cfg_rate: of the guidance; None takes ``inference_cfg_rate``.

        Returns:
            The mel ``[B, 80, T]`` float32 and the new cache.

        Raises:
            ValueError: an option that does not fit, by name.
        """
        t_span = self._times(mu, n_timesteps, temperature, schedule, sway_coefficient)
        z = torch.randn_like(mu) * temperature
        if cache is not None and (known := cache.shape[2]):
            z[:, :, :known] = cache[..., 0]
            mu[:, :, :known] = cache[..., 1]
        new_cache = torch.stack(
            [torch.cat([y[:, :, :prompt_len], y[:, :, -CACHED_FRAMES:]], 2) for y in (z, mu)], dim=-1
        )
        return self._infer(z, t_span, mu, mask, spks, cond, False, method, cfg_rate), new_cache

    def _times(
        self,
        mu: Tensor,
        n_timesteps: int | None,
        temperature: float,
        schedule: Schedule | None,
        sway_coefficient: float,
    ) -> Tensor:
        """The time grid of a call; the dtype is that of mu, as upstream's."""
        if not _is_number(temperature, 0.0):
            raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
        if schedule is None:
            schedule = "cosine" if self.t_scheduler == "cosine" else "linear"
        return time_grid(schedule, n_timesteps, sway_coefficient=sway_coefficient, device=mu.device, dtype=mu.dtype)

    def _infer(
        self,
        x: Tensor,
        t_span: Tensor,
        mu: Tensor,
        mask: Tensor,
        spks: Tensor | None,
        cond: Tensor | None,
        streaming: bool,
        method: str,
        cfg_rate: float | None,
    ) -> Tensor:
        """:meth:`solve`, by a CUDA graph where that may be."""
        inputs = {"x": x, "t_span": t_span, "mu": mu, "mask": mask, "spks": spks, "cond": cond}
        rate = self.inference_cfg_rate if cfg_rate is None else cfg_rate
        options = {"streaming": streaming, "method": method, "cfg_rate": rate}
        if self.cuda_graphs and graphs.wanted(self.estimator, x):
            return graphs.run(graphs.cache_of(self), self.estimator, self.solve, inputs, options)
        return self.solve(**inputs, **options)  # type: ignore[arg-type]

    def solve_euler(
        self,
        x: Tensor,
        t_span: Tensor,
        mu: Tensor,
        mask: Tensor,
        spks: Tensor | None,
        cond: Tensor | None,
        streaming: bool = False,
    ) -> Tensor:
        """:meth:`solve` under upstream's name and with upstream's arguments."""
        return self.solve(x, t_span, mu, mask, spks, cond, streaming)

    def solve(
        self,
        x: Tensor,
        t_span: Tensor,
        mu: Tensor,
        mask: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
        *,
        method: str = "euler",
        cfg_rate: float | None = None,
    ) -> Tensor:
        """Step along ``t_span`` ``[n + 1]`` with classifier-free guidance.

        An evaluation calls the estimator once, the conditional rows before the unconditional ones, whose mu, spks and
        cond are zero.  The buffers have the dtype of ``spks``, which is half under autocast.

        Args:
            x: ``[B, 80, T]`` noise.
            The others as :meth:`forward`.

        Returns:
            ``[B, 80, T]`` float32.

        Raises:
            ValueError: an unknown method, or a ``cfg_rate`` that is no number >= 0.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        rate = self.inference_cfg_rate if cfg_rate is None else cfg_rate
        if not _is_number(rate, 0.0):
            raise ValueError(f"cfg_rate must be a number >= 0, got {rate!r}")
        spks = mu.new_zeros(mu.shape[:2]) if spks is None else spks
        cond = torch.zeros_like(mu) if cond is None else cond
        times, steps = euler_grid(t_span)
        if method == "midpoint":
            times = torch.stack([times, times + steps / 2], 1).flatten()
        velocity = self._guided_velocity(times, mask, mu, spks, cond, streaming)
        x = x.transpose(1, 2).contiguous()  # as the estimators compute
        x = METHODS[method](x, x.to(spks.dtype).repeat(2, 1, 1), steps, rate, velocity)
        return x.transpose(1, 2).float().contiguous()

    def _guided_velocity(
        self, times: Tensor, mask: Tensor, mu: Tensor, spks: Tensor, cond: Tensor, streaming: bool
    ) -> Velocity:
        """The estimator at each of ``times`` ``[n]``, after everything that does not depend on x is computed once."""
        rows, dtype = 2 * mu.shape[0], spks.dtype

        def guided(y: Tensor) -> Tensor:
            y = fitted(y, dtype).to(dtype)
            return torch.cat([y, torch.zeros_like(y)])

        mask2, mu2, spks2, cond2 = mask.to(dtype).repeat(2, 1, 1), guided(mu), guided(spks), guided(cond)
        times = times.to(dtype)
        estimator: Any = self.estimator
        tables: list[tuple[Tensor, ...]] = [()] * len(times)
        known: dict[str, Any] = {}
        if hasattr(estimator, "time_table"):
            parts = [part[:, None].expand(-1, rows, -1).unbind() for part in estimator.time_table(times)]
            tables = list(zip(*parts, strict=True))
        if hasattr(estimator, "invariants"):
            known["fixed"] = estimator.invariants(mask2, mu2, spks2, cond2)
        times2 = times[:, None].expand(-1, rows).unbind()

        def evaluate(x2: Tensor, t: Tensor, *table: Tensor) -> Tensor:
            time = {"time": table} if table else {}
            return self._velocity(x2, mask2, mu2, t, spks2, cond2, streaming, **time, **known)

        if self.replays and replay.may_replay(self, mu):
            evaluate = replay.replayed(evaluate)

        def velocity(twice: Tensor, n: int) -> Tensor:
            return evaluate(twice.to(dtype).transpose(1, 2), times2[n], *tables[n]).transpose(1, 2)

        return velocity

    def _velocity(self, x, mask, mu, t, spks, cond, streaming, **known):  # type: ignore[no-untyped-def]
        if self.estimator is None:
            raise ValueError("estimator is None: give one to the constructor")
        return self.estimator(x, mask, mu, t, spks, cond, streaming=streaming, **known)

    def compute_loss(
        self,
        x1: Tensor,
        mask: Tensor,
        mu: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The flow-matching loss: mean square of predicted minus true velocity over valid frames and channels.

        Draws t, then the noise, then the guidance dropout from torch's generator, as upstream does; t is uniform, or
        with ``cosine_t`` warped by a cosine.

        Args:
            x1: ``[B, 80, T]`` target mel.
            mask: ``[B, 1, T]``.
            mu: ``[B, 80, T]`` encoder output.
            spks: ``[B, 80]``.
            cond: ``[B, 80, T]`` known frames.
            streaming: as the estimator's.
            generator: to draw from; None: torch's own on the device.

        Returns:
            The loss, float32 also of float16, and the noisy mel y ``[B, 80, T]``.
        """
        batch = mu.shape[0]
        t = torch.rand([batch, 1, 1], device=mu.device, dtype=mu.dtype, generator=generator)
        if self.cosine_t:
            t = 1 - torch.cos(t * 0.5 * torch.pi)
        if generator is None:
            z = torch.randn_like(x1)
        else:
            z = torch.randn(x1.shape, device=x1.device, dtype=x1.dtype, generator=generator)
        y = saturated((1 - (1 - self.sigma_min) * t) * z + t * x1)
        u = saturated(x1 - (1 - self.sigma_min) * z)
        if self.training_cfg_rate > 0:
            keep = torch.rand(batch, device=x1.device, generator=generator) > self.training_cfg_rate
            mu = mu * keep.view(-1, 1, 1)
            spks = None if spks is None else spks * keep.view(-1, 1)
            cond = None if cond is None else cond * keep.view(-1, 1, 1)
        prediction = self._velocity(y, mask, mu, t.flatten(), spks, cond, streaming)
        mask = widened(mask)  # and so prediction and u, whose squares float16 does not hold
        loss = F.mse_loss(prediction * mask, u * mask, reduction="sum") / (torch.sum(mask) * u.shape[1])
        return loss, y


class CausalConditionalCFM(ConditionalCFM):
    """The flow-matching wrapper of CosyVoice 2 and 3: fixed noise, so a longer input continues a shorter one.

    ``rand_noise`` ``[1, 80, 15000]`` is a plain attribute, on the CPU and not in the state dict.  It equals upstream's,
    which is drawn after seeding everything with 0, but no global generator is touched here.
    """

    def __init__(
        self,
        in_channels: int,
        cfm_params: Any,
        n_spks: int = 1,
        spk_emb_dim: int = 64,
        estimator: nn.Module | None = None,
        *,
        cosine_t: bool = False,
    ) -> None:
        super().__init__(in_channels, cfm_params, n_spks, spk_emb_dim, estimator, cosine_t=cosine_t)
        self.rand_noise = torch.randn([1, 80, NOISE_FRAMES], generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def forward(  # type: ignore[override]
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int | None,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
        *,
        schedule: Schedule | None = None,
        sway_coefficient: float = -1.0,
        method: str = "euler",
        cfg_rate: float | None = None,
    ) -> tuple[Tensor, None]:
        """Solve from the fixed noise to mel.

        Args:
            mu: ``[B, 80, T]`` encoder output.
            streaming: as the estimator's.
            The others as :meth:`ConditionalCFM.forward`.

        Returns:
            The mel ``[B, 80, T]`` float32, and None for upstream's second value.

        Raises:
            ValueError: more frames than ``rand_noise`` has, or an option that does not fit, by name.
        """
        frames = mu.shape[2]
        if frames > self.rand_noise.shape[2]:
            raise ValueError(f"mu has {frames} frames, prompt included; at most {self.rand_noise.shape[2]} are allowed")
        t_span = self._times(mu, n_timesteps, temperature, schedule, sway_coefficient)
        # The copy to a GPU is only queued: the host does not wait for it.
        z = self.rand_noise[:, :, :frames].contiguous().to(mu.device, mu.dtype, non_blocking=True) * temperature
        z = z.expand(mu.shape[0], -1, -1)
        return self._infer(z, t_span, mu, mask, spks, cond, streaming, method, cfg_rate), None
