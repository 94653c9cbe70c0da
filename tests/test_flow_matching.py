"""The loss and the solver: formulas against plain code, cache, noise, parameters."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastflow import CausalConditionalCFM, ConditionalCFM

PARAMS = {"t_scheduler": "cosine", "training_cfg_rate": 0.2, "inference_cfg_rate": 0.7, "sigma_min": 1e-6}


class Linear(nn.Module):
    """A velocity that depends on every input, and notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, x, mask, mu, t, spks, cond, streaming=False):  # type: ignore[no-untyped-def]
        self.calls.append((x, mask, mu, t, spks, cond))
        return 0.3 * x + mu - 0.5 * cond + spks[..., None] + t[:, None, None]


def solver(cls: type = CausalConditionalCFM, params: object = PARAMS) -> ConditionalCFM:
    return cls(240, params, estimator=Linear())


def condition(frames: int = 7, rows: int = 1) -> dict[str, Tensor]:
    return {
        "mu": torch.randn(rows, 80, frames),
        "mask": torch.ones(rows, 1, frames),
        "spks": torch.randn(rows, 80),
        "cond": torch.randn(rows, 80, frames),
    }


@pytest.mark.parametrize("kind", ["dict", "namespace", "DictConfig"])
def test_parameters_come_in_any_form(kind: str) -> None:
    if kind == "DictConfig":
        params: object = pytest.importorskip("omegaconf").DictConfig(PARAMS)
    else:
        params = PARAMS if kind == "dict" else SimpleNamespace(**PARAMS)
    cfm = solver(params=params)
    assert (cfm.t_scheduler, cfm.training_cfg_rate, cfm.inference_cfg_rate, cfm.sigma_min) == ("cosine", 0.2, 0.7, 1e-6)


def test_sigma_min_has_a_default_and_nothing_else_has() -> None:
    assert solver(params={k: v for k, v in PARAMS.items() if k != "sigma_min"}).sigma_min == 1e-4
    with pytest.raises(ValueError, match="cfm_params lacks t_scheduler, training_cfg_rate"):
        solver(params={"inference_cfg_rate": 0.7})


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_solver_is_guided_euler(schedule: str) -> None:
    cfm, c = solver(params={**PARAMS, "t_scheduler": schedule}).double(), condition()
    c = {key: x.double() for key, x in c.items()}
    got, none = cfm(n_timesteps=6, temperature=0.5, **c)
    assert none is None
    x = 0.5 * cfm.rand_noise[:, :, :7].double()
    grid = [k / 6 for k in range(7)]
    if schedule == "cosine":
        grid = [1 - math.cos(t * math.pi / 2) for t in grid]
    for t, after in itertools.pairwise(grid):
        guided = 0.3 * x + c["mu"] - 0.5 * c["cond"] + c["spks"][..., None] + t
        free = 0.3 * x + t
        x = x + (after - t) * (1.7 * guided - 0.7 * free)
    torch.testing.assert_close(got, x.float(), rtol=1e-5, atol=1e-5)


def test_unconditional_rows_see_zeros_and_conditional_rows_come_first() -> None:
    cfm, c = solver(), condition(rows=3)
    cfm(n_timesteps=2, **c)
    x, mask, mu, t, spks, cond = cfm.estimator.calls[0]
    assert t.shape == (6,)
    assert torch.equal(x[:3], x[3:])
    assert mask.all()
    for doubled, given in ((mu, c["mu"]), (spks, c["spks"]), (cond, c["cond"])):
        assert torch.equal(doubled[:3], given)
        assert not doubled[3:].any()


def test_every_row_of_a_batch_is_solved_as_alone() -> None:
    cfm, c = solver(), condition(rows=3)
    got, _ = cfm(n_timesteps=4, **c)
    for i in range(3):
        alone, _ = cfm(n_timesteps=4, **{key: x[i : i + 1] for key, x in c.items()})
        torch.testing.assert_close(got[i : i + 1], alone)


def test_speaker_and_condition_may_be_absent() -> None:
    c = condition() | {"spks": torch.zeros(1, 80), "cond": torch.zeros(1, 80, 7)}
    want, _ = solver()(n_timesteps=3, **c)
    got, _ = solver()(c["mu"], c["mask"], 3)
    assert torch.equal(got, want)


def test_noise_is_fixed_and_a_longer_input_keeps_its_front() -> None:
    cfm = solver()
    assert cfm.rand_noise.shape == (1, 80, 15000)
    assert "rand_noise" not in cfm.state_dict()
    torch.testing.assert_close(cfm.rand_noise[0, 0, :2], torch.tensor([-1.1258398, -1.1523602]))
    c = condition(9)
    cfm(n_timesteps=1, **c)
    cfm(n_timesteps=1, **{key: x[..., :4] if x.dim() == 3 else x for key, x in c.items()})
    long, short = (call[0] for call in cfm.estimator.calls)
    assert torch.equal(long[..., :4], short)


def test_too_many_frames_are_named() -> None:
    mu = torch.zeros(1, 80, 15001)
    with pytest.raises(ValueError, match="mu has 15001 frames, prompt included; at most 15000"):
        solver()(mu, torch.ones(1, 1, 15001), 10)


def test_cache_carries_noise_and_mu_of_prompt_and_end() -> None:
    cfm, c = solver(ConditionalCFM), condition(50)
    _, cache = cfm(n_timesteps=1, prompt_len=5, **c)
    noise = cfm.estimator.calls[0][0][:1]
    assert cache.shape == (1, 80, 5 + 34, 2)
    assert torch.equal(cache[..., 0], torch.cat([noise[..., :5], noise[..., -34:]], 2))
    assert torch.equal(cache[..., 1], torch.cat([c["mu"][..., :5], c["mu"][..., -34:]], 2))
    new = condition(60)
    before = new["mu"].clone()
    cfm(n_timesteps=1, temperature=0.1, prompt_len=5, cache=cache, **new)
    assert torch.equal(cfm.estimator.calls[1][0][:1, :, :39], cache[..., 0]), "the cache is not scaled by temperature"
    assert torch.equal(new["mu"][..., :39], cache[..., 1]), "mu is overwritten in place"
    assert torch.equal(new["mu"][..., 39:], before[..., 39:])


def test_cache_of_a_short_chunk_is_shorter() -> None:
    _, cache = solver(ConditionalCFM)(n_timesteps=1, prompt_len=3, **condition(10))
    assert cache.shape[2] == 3 + 10


def test_loss_is_the_masked_mean_square() -> None:
    cfm, c = solver(ConditionalCFM).double(), condition(9, rows=2)
    c = {key: x.double() for key, x in c.items()}
    c["mask"][1, :, 5:] = 0
    x1 = torch.randn(2, 80, 9).double()
    torch.manual_seed(3)
    loss, y = cfm.compute_loss(x1, **c)
    torch.manual_seed(3)
    t = torch.rand([2, 1, 1], dtype=torch.float64)
    z = torch.randn_like(x1)
    keep = (torch.rand(2) > 0.2).double()
    torch.testing.assert_close(y, (1 - (1 - 1e-6) * t) * z + t * x1)
    k = keep[:, None, None]
    velocity = 0.3 * y + k * c["mu"] - 0.5 * k * c["cond"] + (keep[:, None] * c["spks"])[..., None] + t
    error = (velocity - (x1 - (1 - 1e-6) * z)) * c["mask"]
    torch.testing.assert_close(loss, error.square().sum() / (14 * 80))


def test_rate_zero_draws_no_guidance_dropout() -> None:
    cfm, c = solver(ConditionalCFM, {**PARAMS, "training_cfg_rate": 0.0}), condition()
    torch.manual_seed(0)
    cfm.compute_loss(torch.randn(1, 80, 7), **c)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.randn(1, 80, 7), torch.rand(1, 1, 1), torch.randn(1, 80, 7)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(cfm.estimator.calls[0][2], c["mu"])


def test_a_missing_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="estimator is None"):
        CausalConditionalCFM(240, PARAMS)(n_timesteps=1, **condition())
