"""The loss and the solver: formulas against plain code, cache, noise, parameters."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastflow import CausalConditionalCFM, ConditionalCFM, from_preset
from fastflow.config import build, preset
from fastflow.flow_matching import METHODS, time_grid

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


# ------------------------------------------------------------------------------------------------ older training times
def drawn_times(cfm: ConditionalCFM, rows: int = 1) -> Tensor:
    """The times at which one loss, drawn with seed 3, asks for the velocity."""
    torch.manual_seed(3)
    cfm.compute_loss(torch.randn(rows, 80, 7), **condition(rows=rows))
    return cfm.estimator.calls[-1][3]


@pytest.mark.parametrize("cls", [ConditionalCFM, CausalConditionalCFM])
def test_cosine_t_warps_the_times_and_draws_nothing_else(cls: type) -> None:
    new, old = solver(cls), cls(240, PARAMS, estimator=Linear(), cosine_t=True)
    u, t = drawn_times(new, 9), drawn_times(old, 9)
    assert torch.equal(t, 1 - torch.cos(u * 0.5 * torch.pi))
    assert not torch.equal(t, u)
    for name, at in (("mask", 1), ("mu", 2), ("spks", 4), ("cond", 5)):
        assert torch.equal(new.estimator.calls[0][at], old.estimator.calls[0][at]), name
    y, time = old.estimator.calls[0][0], t[:, None, None]
    torch.manual_seed(3)
    x1 = torch.randn(9, 80, 7)
    condition(rows=9)
    torch.rand(9, 1, 1)
    torch.testing.assert_close(y, (1 - (1 - 1e-6) * time) * torch.randn(9, 80, 7) + time * x1)


def test_cosine_t_puts_two_thirds_of_the_times_below_one_half() -> None:
    cfm = solver()
    assert not cfm.cosine_t, "upstream draws uniformly now, whatever t_scheduler says"
    assert (drawn_times(cfm, 3000) < 0.5).float().mean().item() == pytest.approx(1 / 2, abs=0.03)
    cfm.cosine_t = True
    assert (drawn_times(cfm, 3000) < 0.5).float().mean().item() == pytest.approx(2 / 3, abs=0.03)


def test_cosine_t_can_be_written_in_a_spec() -> None:
    spec = preset("tiny")
    spec["decoder"]["cosine_t"] = True
    assert build(spec).decoder.cosine_t


def test_a_missing_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="estimator is None"):
        CausalConditionalCFM(240, PARAMS)(n_timesteps=1, **condition())


# ------------------------------------------------------------------------------------------------ schedules
def test_schedules_are_their_formulas() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    cosine = 1 - (u * math.pi / 2).cos()
    double = {"dtype": torch.float64}
    torch.testing.assert_close(time_grid("linear", 8, **double), u)
    torch.testing.assert_close(time_grid("cosine", 8, **double), cosine)
    torch.testing.assert_close(time_grid("sway", 8, **double), cosine)
    torch.testing.assert_close(time_grid("sway", 8, sway_coefficient=0, **double), u)
    torch.testing.assert_close(time_grid("sway", 8, sway_coefficient=-0.5, **double), (u + cosine) / 2)


@pytest.mark.parametrize("coefficient", [-1.0, -0.3, 0.0, 1.0, 2 / (math.pi - 2)])
def test_sway_increases_from_zero_to_one(coefficient: float) -> None:
    times = time_grid("sway", 32, sway_coefficient=coefficient, dtype=torch.float64)
    assert times[0] == 0
    torch.testing.assert_close(times[-1].item(), 1.0)
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sway"])
@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_the_times_of_a_named_schedule_give_the_same_mel(schedule: str, as_list: bool) -> None:
    cfm, c = solver(), condition()
    want, _ = cfm(n_timesteps=6, schedule=schedule, sway_coefficient=-0.4, **c)
    times = time_grid(schedule, 6, sway_coefficient=-0.4)
    if as_list:
        times = [0.0, *times[1:-1].tolist(), 1.0]
    got, _ = cfm(n_timesteps=None, schedule=times, **c)
    torch.testing.assert_close(got, want)
    assert len(cfm.estimator.calls) == 12


def test_the_default_schedule_is_that_of_the_parameters() -> None:
    c = condition()
    for name in ("cosine", "linear"):
        cfm = solver(params={**PARAMS, "t_scheduler": name})
        assert torch.equal(cfm(n_timesteps=4, **c)[0], cfm(n_timesteps=4, schedule=name, **c)[0])


# ------------------------------------------------------------------------------------------------ methods
class Swing(nn.Module):
    """dx/dt = cos(3t) x, solved by x(t) = x(0) exp(sin(3t) / 3)."""

    calls = 0

    def forward(self, x, mask, mu, t, spks, cond, streaming=False):  # type: ignore[no-untyped-def]
        self.calls += 1
        return (3 * t).cos()[:, None, None] * x


def swing_error(method: str, steps: int, schedule: str) -> tuple[float, int]:
    """Largest relative error at t = 1, and evaluations."""
    cfm = CausalConditionalCFM(240, PARAMS, estimator=Swing())
    x = 1 + torch.rand(1, 80, 3, dtype=torch.float64)
    t_span = time_grid(schedule, steps, dtype=torch.float64)
    got = cfm.solve(x, t_span, torch.zeros_like(x), torch.ones_like(x[:, :1]), None, None, method=method)
    return (got / (x * math.exp(math.sin(3) / 3)) - 1).abs().max().item(), cfm.estimator.calls


@pytest.mark.parametrize("schedule", ["linear", "cosine"], ids=["equal steps", "unequal steps"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("ab2", 2)])
def test_order_of_convergence(method: str, order: int, schedule: str) -> None:
    coarse, fine = (swing_error(method, steps, schedule)[0] for steps in (20, 80))
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 10), ("midpoint", 20), ("ab2", 10)])
def test_evaluations(method: str, evaluations: int) -> None:
    assert swing_error(method, 10, "cosine")[1] == evaluations


def test_one_step_of_ab2_is_euler() -> None:
    c = condition()
    assert torch.equal(solver()(n_timesteps=1, method="ab2", **c)[0], solver()(n_timesteps=1, **c)[0])


def test_midpoint_is_heun_like_by_hand() -> None:
    """Guidance applies to both evaluations."""
    cfm, c = solver(), condition()
    got, _ = cfm(n_timesteps=1, schedule="linear", method="midpoint", **c)

    def velocity(x: Tensor, t: float) -> Tensor:
        guided = 0.3 * x + c["mu"] - 0.5 * c["cond"] + c["spks"][..., None] + t
        return 1.7 * guided - 0.7 * (0.3 * x + t)

    x = cfm.rand_noise[:, :, :7]
    torch.testing.assert_close(got, x + velocity(x + 0.5 * velocity(x, 0.0), 0.5))


def test_the_guidance_rate_of_a_call() -> None:
    c = condition()
    want, _ = solver(params={**PARAMS, "inference_cfg_rate": 0.2})(n_timesteps=3, **c)
    assert torch.equal(solver()(n_timesteps=3, cfg_rate=0.2, **c)[0], want)
    assert not torch.equal(solver()(n_timesteps=3, **c)[0], want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tiny", "tiny2", "tiny3"])
def test_what_is_computed_once_changes_nothing(name: str, method: str) -> None:
    """Against an estimator that is given times and conditions only, at every step."""

    class Plain(nn.Module):
        def __init__(self, estimator: nn.Module) -> None:
            super().__init__()
            self.inner = estimator

        def forward(self, x, mask, mu, t, spks, cond, streaming=False):  # type: ignore[no-untyped-def]
            return self.inner(x, mask, mu, t, spks, cond, streaming=streaming)

    cfm = from_preset(name).decoder.eval().double()
    c = {key: x.double() for key, x in condition(13, rows=2).items()}
    if name != "tiny":
        c["mask"][1, :, 9:] = 0
    times = time_grid("cosine", 3, dtype=torch.float64)
    z = torch.randn_like(c["mu"])
    with torch.no_grad():
        got = cfm.solve(z, times, c["mu"], c["mask"], c["spks"], c["cond"], method=method)
        cfm.estimator = Plain(cfm.estimator)
        want = cfm.solve(z, times, c["mu"], c["mask"], c["spks"], c["cond"], method=method)
    valid = c["mask"].expand_as(got).bool()
    torch.testing.assert_close(got[valid], want[valid], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "tiny2", "tiny3"])
def test_a_step_reads_no_number_on_the_host_and_runs_few_ops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflow import checks
    from fastflow.testing.counters import Counts

    monkeypatch.setattr(checks, "readable", lambda x: False)  # as for tensors that are not on the CPU
    cfm = from_preset(name).decoder.eval()
    ops = []
    for steps in (1, 3):
        with Counts() as counts:
            cfm(n_timesteps=steps, **condition(20))
        assert not counts.syncs
        ops.append(counts.ops)
    step = {key: (ops[1][key] - ops[0][key]) / 2 for key in ops[1]}
    assert step["fastflow::euler_step"] == 1
    # The channels of x join the others; no mask, length, rotary angle or time is computed again.
    assert step.get("aten::cat", 0) <= 1 + len(getattr(cfm.estimator, "up_blocks", ()))
    assert not {key for key in ("aten::arange", "aten::cos", "aten::sin", "aten::gt", "aten::sum") if step.get(key)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_timesteps": 0}, "n_timesteps must be a whole number >= 1, got 0"),
        ({"n_timesteps": 2.5}, "n_timesteps must be a whole number >= 1, got 2.5"),
        ({"n_timesteps": None}, "n_timesteps must be a whole number >= 1, got None"),
        ({"schedule": "cubic"}, "schedule must be one of cosine, linear, sway, .*'cubic'"),
        ({"schedule": [0.0, 1.0]}, "n_timesteps is 4 but the times of schedule make 1 steps"),
        ({"schedule": [0.0], "n_timesteps": None}, r"schedule must hold at least two times.*\[1\]"),
        ({"schedule": [0.1, 1.0], "n_timesteps": None}, r"schedule must increase from 0 to 1, got \[0.1, 1.0\]"),
        ({"schedule": [0.0, 0.9], "n_timesteps": None}, "schedule must increase from 0 to 1"),
        ({"schedule": [0, 0.5, 0.5, 1], "n_timesteps": None}, "schedule must increase from 0 to 1"),
        ({"schedule": [0, math.nan, 1], "n_timesteps": None}, "schedule must increase from 0 to 1"),
        ({"schedule": torch.zeros(2, 2), "n_timesteps": None}, r"schedule must hold .*one dimension.*\[2, 2\]"),
        ({"schedule": "sway", "sway_coefficient": -1.1}, r"sway_coefficient must lie in \[-1, 1.7519\], got -1.1"),
        ({"method": "heun"}, "method must be one of euler, midpoint, ab2; got 'heun'"),
        ({"cfg_rate": -0.1}, "cfg_rate must be a number >= 0, got -0.1"),
        ({"cfg_rate": math.nan}, "cfg_rate must be a number >= 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a number >= 0, got inf"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [ConditionalCFM, CausalConditionalCFM])
def test_bad_options_are_named(cls: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(cls)(**{"n_timesteps": 4, **condition(), **options})


@pytest.mark.parametrize("name", ["tiny", "tiny2", "tiny3"])
def test_inference_hands_its_options_to_the_solver(name: str) -> None:
    flow = from_preset(name).eval()
    flow.decoder.estimator = Linear()
    one = torch.tensor([1])
    arguments = {
        "token": torch.zeros(1, 9, dtype=torch.int64),
        "token_len": 9 * one,
        "prompt_token": torch.zeros(1, 2, dtype=torch.int64),
        "prompt_token_len": 2 * one,
        "prompt_feat": torch.zeros(1, 4, 80),
        "prompt_feat_len": 4 * one,
        "embedding": torch.randn(1, 192),
    }
    rest = {"flow_cache": torch.zeros(1, 80, 0, 2)} if name == "tiny" else {"streaming": False, "finalize": True}
    arguments.update(rest)
    calls = flow.decoder.estimator.calls
    for options, evaluations in (
        ({}, 10),
        ({"schedule": None}, 10),
        ({"n_timesteps": 3, "method": "midpoint"}, 6),
        ({"schedule": [0.0, 0.3, 1.0], "method": "ab2", "cfg_rate": 0.0, "temperature": 0.0}, 2),
    ):
        calls.clear()
        mel, _ = flow.inference(**arguments, **options)
        assert len(calls) == evaluations
    assert not calls[0][0].any(), "the temperature scales the noise"
    assert mel.isfinite().all()
    with pytest.raises(TypeError, match="steps"):
        flow.inference(**arguments, steps=4)
