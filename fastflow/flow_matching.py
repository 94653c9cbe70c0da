"""Conditional flow matching: the training loss and the Euler solver around an estimator."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

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


def euler_grid(t_span: Tensor) -> tuple[Tensor, Tensor]:
    """Times and step sizes ``[n]`` of Euler's steps along ``t_span`` ``[n + 1]``.

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


class ConditionalCFM(Recomputing):
    """The flow-matching wrapper of CosyVoice 1.  It owns no parameters but the estimator's.

    Args:
        in_channels, n_spks, spk_emb_dim: kept for upstream's signature, without effect.
        cfm_params: ``t_scheduler``, ``training_cfg_rate``, ``inference_cfg_rate`` and ``sigma_min`` as a dict, a
            namespace or an omegaconf DictConfig.
        estimator: called with (x, mask, mu, t, spks, cond, streaming=...).
    """

    def __init__(
        self,
        in_channels: int,
        cfm_params: Any,
        n_spks: int = 1,
        spk_emb_dim: int = 64,
        estimator: nn.Module | None = None,
    ) -> None:
        super().__init__()
        params = _params(cfm_params)
        self.t_scheduler = params["t_scheduler"]
        self.training_cfg_rate = params["training_cfg_rate"]
        self.inference_cfg_rate = params["inference_cfg_rate"]
        self.sigma_min = params["sigma_min"]
        self.estimator = estimator

    @torch.inference_mode()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        prompt_len: int = 0,
        cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Solve from noise to mel.

        Args:
            mu: ``[B, 80, T]`` encoder output.  **Overwritten** in the first K frames by those of the cache.
            mask: ``[B, 1, T]``.
            n_timesteps: Euler steps.
            temperature: scale of the noise.
            spks: ``[B, 80]``.
            cond: ``[B, 80, T]``.
            prompt_len: frames of the prompt, which the new cache keeps together with the last 34.
            cache: ``[1, 80, K, 2]``, noise and mu of the previous chunk's prompt and end.

        Returns:
            The mel ``[B, 80, T]`` float32 and the new cache.
        """
        z = torch.randn_like(mu) * temperature
        if cache is not None and (known := cache.shape[2]):
            z[:, :, :known] = cache[..., 0]
            mu[:, :, :known] = cache[..., 1]
        new_cache = torch.stack(
            [torch.cat([y[:, :, :prompt_len], y[:, :, -CACHED_FRAMES:]], 2) for y in (z, mu)], dim=-1
        )
        return self._solve(z, mu, mask, n_timesteps, spks, cond, streaming=False), new_cache

    def _solve(
        self,
        z: Tensor,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        spks: Tensor | None,
        cond: Tensor | None,
        streaming: bool,
    ) -> Tensor:
        t_span = torch.linspace(0, 1, n_timesteps + 1, device=mu.device, dtype=mu.dtype)
        if self.t_scheduler == "cosine":
            t_span = 1 - torch.cos(t_span * 0.5 * torch.pi)
        return self.solve_euler(z, t_span, mu, mask, spks, cond, streaming=streaming)

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
        """Euler steps along ``t_span`` ``[n + 1]`` with classifier-free guidance.

        Every step calls the estimator once, the conditional rows before the unconditional ones, whose mu, spks and
        cond are zero.  The buffers have the dtype of ``spks``, which is half under autocast.
        """
        spks = mu.new_zeros(mu.shape[:2]) if spks is None else spks
        cond = torch.zeros_like(mu) if cond is None else cond
        batch = x.shape[0]

        def guided(y: Tensor) -> Tensor:
            y = y.to(spks.dtype)
            return torch.cat([y, torch.zeros_like(y)])

        mask2, mu2, spks2, cond2 = mask.to(spks.dtype).repeat(2, 1, 1), guided(mu), guided(spks), guided(cond)
        rate = self.inference_cfg_rate
        times, steps = euler_grid(t_span)
        # What depends on the time alone is computed for all steps at once.
        time_table: Any = getattr(self.estimator, "time_table", None)
        table = None if time_table is None else time_table(times.to(spks.dtype))
        for n, (t, dt) in enumerate(zip(times.unbind(), steps.unbind(), strict=True)):
            x2 = x.to(spks.dtype).repeat(2, 1, 1)
            known = {} if table is None else {"time": [part[n].expand(2 * batch, -1) for part in table]}
            t2 = t.to(spks.dtype).expand(2 * batch)
            velocity = self._velocity(x2, mask2, mu2, t2, spks2, cond2, streaming, **known)
            conditional, unconditional = velocity.split(batch)
            x = x + dt * ((1.0 + rate) * conditional - rate * unconditional)
        return x.float()

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

        Draws t, then the noise, then the guidance dropout from torch's generator, as upstream does; so t is uniform
        (upstream warped it by a cosine until January 2026).

        Args:
            x1: ``[B, 80, T]`` target mel.
            mask: ``[B, 1, T]``.
            mu: ``[B, 80, T]`` encoder output.
            spks: ``[B, 80]``.
            cond: ``[B, 80, T]`` known frames.
            streaming: as the estimator's.
            generator: to draw from; None: torch's own on the device.

        Returns:
            The loss, and the noisy mel y ``[B, 80, T]``.
        """
        batch = mu.shape[0]
        t = torch.rand([batch, 1, 1], device=mu.device, dtype=mu.dtype, generator=generator)
        if generator is None:
            z = torch.randn_like(x1)
        else:
            z = torch.randn(x1.shape, device=x1.device, dtype=x1.dtype, generator=generator)
        y = (1 - (1 - self.sigma_min) * t) * z + t * x1
        u = x1 - (1 - self.sigma_min) * z
        if self.training_cfg_rate > 0:
            keep = torch.rand(batch, device=x1.device, generator=generator) > self.training_cfg_rate
            mu = mu * keep.view(-1, 1, 1)
            spks = None if spks is None else spks * keep.view(-1, 1)
            cond = None if cond is None else cond * keep.view(-1, 1, 1)
        prediction = self._velocity(y, mask, mu, t.flatten(), spks, cond, streaming)
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
    ) -> None:
        super().__init__(in_channels, cfm_params, n_spks, spk_emb_dim, estimator)
        self.rand_noise = torch.randn([1, 80, NOISE_FRAMES], generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def forward(  # type: ignore[override]
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
    ) -> tuple[Tensor, None]:
        """Solve from the fixed noise to mel.

        Args:
            mu: ``[B, 80, T]`` encoder output.
            mask: ``[B, 1, T]``.
            n_timesteps: Euler steps.
            temperature: scale of the noise.
            spks: ``[B, 80]``.
            cond: ``[B, 80, T]``.
            streaming: as the estimator's.

        Returns:
            The mel ``[B, 80, T]`` float32, and None for upstream's second value.

        Raises:
            ValueError: more frames than ``rand_noise`` has.
        """
        frames = mu.shape[2]
        if frames > self.rand_noise.shape[2]:
            raise ValueError(f"mu has {frames} frames, prompt included; at most {self.rand_noise.shape[2]} are allowed")
        z = self.rand_noise[:, :, :frames].to(mu) * temperature
        z = z.expand(mu.shape[0], -1, -1)
        return self._solve(z, mu, mask, n_timesteps, spks, cond, streaming), None
