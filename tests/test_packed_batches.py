"""``padding="exact"``: a row of a batch is what it is alone, and costs what it costs alone."""

import random
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastflow
from fastflow import checks, padding, recompute, use_backend
from fastflow import flow as flow_module
from fastflow.recompute import MODES
from fastflow.testing.counters import Counts, current_module

FLOWS = ["tiny", "tiny2", "tiny3"]
TOKENS = [13, 7, 1, 6]
FRAMES = {"tiny": [21, 12, 1, 9], "tiny2": [26, 14, 2, 12], "tiny3": [26, 14, 2, 12]}
PREFIXES = torch.tensor([5, 0, 0, 2])
ROWS = range(len(TOKENS))
BACKENDS = [("reference", torch.float64), ("cpu", torch.float64), ("cpu", torch.float32)]
# of the norm of a gradient, and of the largest norm for gradients that are zero but for rounding (the bias of keys)
TOLERANCE = {torch.float64: (1e-11, 1e-15), torch.float32: (2e-5, 1e-8)}


def build(name: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, mode: str = "exact") -> nn.Module:
    spec = fastflow.config.preset(name)
    if "encoder" in spec:
        rates = ("dropout_rate", "positional_dropout_rate", "attention_dropout_rate")
        spec["encoder"] |= dict.fromkeys(rates, dropout)
    spec["decoder"]["estimator"]["dropout"] = dropout
    torch.manual_seed(0)
    flow = fastflow.config.build(spec).to(dtype)
    flow.padding = mode
    return flow


def ragged(name: str, rows: Sequence[int] = ROWS, dtype: torch.dtype = torch.float32) -> dict:
    """A batch of rows without padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(1, 200, (n,), generator=generator) for n in TOKENS]
    mels = [torch.randn(n, 80, generator=generator).to(dtype) for n in FRAMES[name]]
    embedding = torch.randn(len(TOKENS), 192, generator=generator).to(dtype)
    return {
        "speech_token": [tokens[row] for row in rows],
        "speech_feat": [mels[row] for row in rows],
        "embedding": embedding[list(rows)],
    }


def padded(name: str, token: int = 0, mel: float = 0.0) -> dict[str, Tensor]:
    """The same rows padded with any values."""
    batch = ragged(name)
    for key, value in (("speech_token", token), ("speech_feat", mel)):
        rows = batch[key]
        batch[key] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        batch[f"{key}_len"] = torch.tensor([len(row) for row in rows])
    return batch


class Draws:
    """Draws that belong to a row, whatever batch it is in: time, noise, guidance dropout (row 1), condition prefix."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
        self.rows = list(ROWS)
        generator = torch.Generator().manual_seed(2)
        self._noise = torch.randn(len(TOKENS), 80, 40, generator=generator, dtype=torch.float64)
        self._time = torch.rand(len(TOKENS), generator=generator, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", self._rand)
        monkeypatch.setattr(torch, "randn_like", lambda x: self._noise[self.rows, :, : x.shape[2]].to(x))
        monkeypatch.setattr(flow_module, "_condition_prefixes", lambda lengths: PREFIXES[self.rows])
        monkeypatch.setattr(random, "random", lambda: 0.4 if streaming else 0.6)

    def _rand(self, size: list[int] | int, dtype: torch.dtype = torch.float32, **_: object) -> Tensor:
        if size == [len(self.rows), 1, 1]:
            return self._time[self.rows].view(size).to(dtype)
        assert size == len(self.rows)
        return torch.tensor([0.9, 0.1, 0.9, 0.9])[self.rows]


def loss_of(flow: nn.Module, batch: dict, seed: int = 0) -> Tensor:
    random.seed(seed)
    torch.manual_seed(seed)
    return flow(batch, "cpu")["loss"]


def step(flow: nn.Module, batch: dict, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient."""
    flow.zero_grad()
    loss = loss_of(flow, batch, seed)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in flow.named_parameters()}


def assert_equal(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(got[0], want[0])
    assert not [name for name, grad in want[1].items() if not torch.equal(got[1][name], grad)]


def assert_near(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    relative, absolute = TOLERANCE[got[0].dtype]
    torch.testing.assert_close(got[0], want[0], rtol=relative, atol=0)
    top = max(grad.norm() for grad in want[1].values())
    off = {name: (got[1][name] - grad).norm() / (relative * grad.norm() + absolute * top)
           for name, grad in want[1].items()}  # fmt: skip
    assert max(off.values()) <= 1, max(off.items(), key=lambda item: item[1])


# ------------------------------------------------------------------------------------------------ rows alone
@pytest.mark.parametrize("share", [0.0, 0.9], ids=["padded", "packed"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("name", FLOWS)
def test_loss_and_gradients_are_the_frame_weighted_sum_over_the_rows_alone(
    name: str, backend: str, dtype: torch.dtype, streaming: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding, "LARGEST_SHARE", share)
    flow, draws, frames = build(name, dtype), Draws(monkeypatch, streaming), FRAMES[name]
    with use_backend(backend):
        got = step(flow, ragged(name, dtype=dtype))
        flow.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for row in ROWS:
            draws.rows = [row]
            loss = frames[row] / sum(frames) * flow(ragged(name, [row], dtype), "cpu")["loss"]
            loss.backward()
            total += loss.detach()
    assert_near(got, (total, {key: p.grad for key, p in flow.named_parameters()}))


@pytest.mark.parametrize("name", ["tiny", "tiny2"])
def test_upstreams_padding_changes_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exact mode takes away: GroupNorm and resampling of CosyVoice 1, the look-ahead of CosyVoice 2."""
    Draws(monkeypatch, False)
    exact, upstream = (loss_of(build(name, mode=mode), ragged(name)) for mode in ("exact", "upstream"))
    assert (exact - upstream).abs() > 1e-5 * upstream


ESTIMATORS = {
    "v1, odd lengths through three levels": ("tiny", {"channels": [32, 32, 32]}),
    "v2, two levels": ("tiny2", {"channels": [32, 32]}),
    "v3": ("tiny3", {}),
    "v3, long skip": ("tiny3", {"long_skip_connection": True}),
}


@pytest.mark.parametrize("share", [0.0, 0.9], ids=["padded", "packed"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("case", ESTIMATORS)
def test_a_row_of_an_estimator_is_the_row_alone(
    case: str, streaming: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding, "LARGEST_SHARE", share)
    preset, changes = ESTIMATORS[case]
    spec = fastflow.config.preset(preset)
    spec["decoder"]["estimator"] |= changes
    estimator = fastflow.config.build(spec).decoder.estimator.double()
    estimator.padding, estimator.static_chunk_size = "exact", 4
    lengths = [17, 9, 1, 2, 5]
    x, mu, cond = (torch.randn(5, 80, 17, dtype=torch.float64) for _ in range(3))
    mask = (torch.arange(17) < torch.tensor(lengths)[:, None]).double()[:, None]
    t, spks = torch.rand(5, dtype=torch.float64), torch.randn(5, 80, dtype=torch.float64)
    got = estimator(x, mask, mu, t, spks, cond, streaming=streaming)
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone = (part[one, :, :n] for part in (x, mask, mu))
        want = estimator(*alone, t[one], spks[one], cond[one, :, :n], streaming=streaming)
        torch.testing.assert_close(got[one, :, :n], want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("share", [0.0, 0.9], ids=["padded", "packed"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_row_of_a_solved_batch_is_the_row_alone(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "LARGEST_SHARE", share)
    decoder = build(name, torch.float64).decoder.eval()
    z, mu = (torch.randn(2, 80, 15, dtype=torch.float64) for _ in range(2))
    mask = (torch.arange(15) < torch.tensor([15, 8])[:, None]).double()[:, None]
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    with torch.no_grad():
        got = decoder.solve(z, times, mu, mask)[1:, :, :8]
        want = decoder.solve(z[1:, :, :8], times, mu[1:, :, :8], mask[1:, :, :8])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # the solver returns float32


# ------------------------------------------------------------------------------------------------ padding
@pytest.mark.parametrize(("token", "mel"), [(10**9, 1e30), (-5, float("nan")), (3, float("inf"))])
@pytest.mark.parametrize("name", FLOWS)
def test_whatever_is_in_the_padding_changes_nothing(name: str, token: int, mel: float) -> None:
    flow = build(name)
    assert_equal(step(flow, padded(name, token, mel)), step(flow, padded(name)))


@pytest.mark.parametrize("mode", ["upstream", "exact"])
@pytest.mark.parametrize("name", FLOWS)
def test_ragged_rows_are_the_batch_padded_with_zeros(name: str, mode: str) -> None:
    flow, batch = build(name, mode=mode), padded(name)
    want = step(flow, batch)
    assert_equal(step(flow, ragged(name)), want)
    lengths = {key: x for key, x in batch.items() if key.endswith("_len")}
    assert_equal(step(flow, ragged(name) | lengths), want)
    assert_equal(step(flow, ragged(name) | {"speech_token": tuple(ragged(name)["speech_token"])}), want)


@pytest.mark.parametrize("name", FLOWS)
def test_upstreams_mode_is_the_default_and_comes_back(name: str) -> None:
    flow = build(name, mode="upstream")
    assert fastflow.from_preset(name).padding == "upstream"
    want = step(flow, padded(name))
    flow.padding = "exact"
    step(flow, padded(name))
    flow.padding = "upstream"
    assert_equal(step(flow, padded(name)), want)


@pytest.mark.parametrize("name", FLOWS)
def test_without_padding_the_modes_agree(name: str) -> None:
    flow, batch = build(name), ragged(name, [0])
    exact = step(flow, batch)
    flow.padding = "upstream"
    assert_near(step(flow, batch), exact)


# ------------------------------------------------------------------------------------------------ packing
def flops(flow: nn.Module, batch: dict) -> tuple[int, int]:
    """Of a forward pass: all, and those of the estimator's feed-forward layers.  Convolutions count padding."""
    with current_module(flow) as where, Counts(where) as counts, torch.no_grad():
        loss_of(flow, batch)
    return counts.flops.total(), sum(n for name, n in counts.flops.items() if name.endswith(".ff"))


@pytest.mark.parametrize("name", FLOWS)
def test_padding_costs_no_products_in_transformer_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, batch = build(name), ragged(name)
    total, feed_forward = flops(flow, batch)
    monkeypatch.setattr(padding, "LARGEST_SHARE", 0.0)
    padded_total, padded_feed_forward = flops(flow, batch)
    share = sum(FRAMES[name]) / (len(TOKENS) * max(FRAMES[name]))
    assert feed_forward / padded_feed_forward == pytest.approx(share, abs=0.03)  # of 0.5; half frames are rounded up
    assert total < 0.8 * padded_total


def test_a_packed_block_computes_the_frames_of_the_rows_alone() -> None:
    packing = padding.packing_of(torch.tensor([3, 1, 0, 5]), 5)
    x = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    packed = padding.pack(x, packing)
    assert torch.equal(packed[0], torch.cat([x[0, :3], x[1, :1], x[3]]))
    back = padding.unpack(packed, packing)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [1] * 5])[..., None]
    assert torch.equal(back, x * valid)
    assert torch.autograd.gradcheck(lambda x: padding.pack(x, packing), x)
    y = packed.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: padding.unpack(y, packing), y)
    assert torch.autograd.gradgradcheck(lambda y: padding.unpack(y, packing).square(), y)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 5, 5, 4], [0, 0]])
def test_little_padding_is_not_packed(lengths: list[int]) -> None:
    assert padding.packing_of(torch.tensor(lengths), 5) is None


@pytest.mark.parametrize("name", FLOWS)
def test_no_length_is_read_where_that_would_stall(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checks, flow_module, fastflow.lengths):
        monkeypatch.setattr(module, "readable", lambda x: False)  # as for tensors that are not on the CPU
    flow = build(name)
    flow.randomness = "device"
    with Counts() as counts:
        loss_of(flow, padded(name)).backward()
    assert counts.syncs.total() == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
@pytest.mark.parametrize("name", FLOWS)
def test_memory_modes_replay_packed_dropout_to_the_bit(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = build(name, dropout=0.1)
    flow.recompute = "none"
    monkeypatch.setattr(recompute, "LARGE", 0)
    want = step(flow, ragged(name), seed=3)
    flow.recompute = mode
    assert_equal(step(flow, ragged(name), seed=3), want)


@pytest.mark.parametrize("name", FLOWS)
def test_autocast_computes_packed_rows_as_padded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        packed, gradients = step(flow, ragged(name))
        monkeypatch.setattr(padding, "LARGEST_SHARE", 0.0)
        torch.testing.assert_close(packed, step(flow, ragged(name))[0], rtol=1e-2, atol=0)
    assert all(grad.isfinite().all() for grad in gradients.values())


@pytest.mark.parametrize("name", FLOWS)
def test_ddp_averages_packed_gradients(name: str, tmp_path) -> None:
    flow = build(name)
    want = step(flow, ragged(name))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss, gradients = step(DistributedDataParallel(flow), ragged(name))
    finally:
        dist.destroy_process_group()
    assert_equal((loss, {key.removeprefix("module."): grad for key, grad in gradients.items()}), want)


@pytest.mark.parametrize("name", ["tiny2", "tiny3"])
def test_torch_compile_traces_the_estimator_whole(name: str) -> None:
    """Padded, as lengths cannot be read then."""
    estimator = build(name).decoder.estimator.eval()
    x, mu, cond = (torch.randn(2, 80, 12) for _ in range(3))
    mask = (torch.arange(12) < torch.tensor([12, 5])[:, None]).float()[:, None]
    given = x, mask, mu, torch.rand(2), torch.randn(2, 80), cond
    want = estimator(*given) * mask
    got = torch.compile(estimator, backend="eager", fullgraph=True)(*given) * mask
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ settings, errors
@pytest.mark.parametrize("name", FLOWS)
def test_the_mode_reaches_every_part(name: str) -> None:
    flow = build(name)
    parts = [part for part in flow.modules() if isinstance(part, padding.Padded)]
    assert flow.decoder.estimator in parts
    assert {part.padding for part in parts} == {"exact"}


def test_another_mode_is_named() -> None:
    with pytest.raises(ValueError, match="padding must be one of upstream, exact; got 'none'"):
        build("tiny", mode="none")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"speech_token": []}, ValueError, "speech_token holds no rows"),
        ({"speech_token": [[1, 2]]}, TypeError, "speech_token must be a tensor, .* got list in row 0"),
        ({"speech_feat": [torch.ones(4)]}, ValueError, r"must hold tensors \[frames, 80\]; got \[4\] in row 0"),
        ({"speech_feat": [torch.ones(2, 80), torch.ones(2, 79)]}, ValueError, r"got \[2, 79\] in row 1"),
        ({"speech_token_len": torch.tensor([13, 7, 1, 5])}, ValueError, "speech_token_len is .* but the rows of"),
        ({"speech_feat": [torch.ones(4, 80)]}, ValueError, r"speech_feat must have shape \[4, >= 1, 80\]"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build("tiny")(ragged("tiny") | changes, "cpu")


@pytest.mark.parametrize("name", ["tiny2", "tiny3"])
def test_every_row_needs_its_own_frames(name: str) -> None:
    batch = padded(name)
    batch["speech_feat_len"][1] -= 1
    with pytest.raises(ValueError, match="row 1: speech_feat has 13 frames but 7 tokens need 2 each, 14"):
        build(name)(batch, "cpu")
    loss_of(build(name, mode="upstream"), batch)


def test_the_length_regulator_wants_the_tokens_of_each_row() -> None:
    regulator = build("tiny").length_regulator
    with pytest.raises(ValueError, match="padding 'exact' needs xlens"):
        regulator(torch.randn(2, 5, 80), torch.tensor([8, 6]))
