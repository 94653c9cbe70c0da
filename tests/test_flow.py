"""The three flows as a whole: sizes, randomness, gradient, bad input, backends."""

import copy
import random
import threading

import pytest
import torch

import fastflow
from fastflow import checks
from fastflow.flow import _drawn_prefixes
from fastflow.testing.counters import Counts

TINY = ["tiny", "tiny2", "tiny3"]
CAUSAL = ["tiny2", "tiny3"]


def make_batch(name: str, rows: int = 2, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Rows of falling length; the numbers of frames follow the version's rule."""
    token_len = torch.tensor([tokens - 3 * i for i in range(rows)])
    feat_len = token_len * 2 if name in CAUSAL else (token_len * 1.7).int()
    return {
        "speech_token": torch.randint(0, 4096, (rows, tokens)),
        "speech_token_len": token_len,
        "speech_feat": torch.randn(rows, int(feat_len[0]), 80),
        "speech_feat_len": feat_len,
        "embedding": torch.randn(rows, 192),
    }


def make_call(name: str, tokens: int = 50, prompt: int = 8) -> dict:
    """Keyword arguments of ``inference``."""
    call = {
        "token": torch.randint(0, 4096, (1, tokens), dtype=torch.int32),
        "token_len": torch.tensor([tokens], dtype=torch.int32),
        "prompt_token": torch.randint(0, 4096, (1, prompt), dtype=torch.int32),
        "prompt_token_len": torch.tensor([prompt], dtype=torch.int32),
        "prompt_feat": torch.randn(1, 2 * prompt, 80),
        "prompt_feat_len": torch.tensor([2 * prompt], dtype=torch.int32),
        "embedding": torch.randn(1, 192),
    }
    if name in CAUSAL:
        return {**call, "streaming": False, "finalize": True}
    return {**call, "flow_cache": torch.zeros(1, 80, 0, 2)}


def make_flow(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return fastflow.from_preset(name)


def loss_of(flow: torch.nn.Module, batch: dict, seed: int = 0) -> torch.Tensor:
    random.seed(seed)
    torch.manual_seed(seed)
    return flow(batch, "cpu")["loss"]


# ------------------------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize(
    ("name", "entries", "parameters"),
    [
        ("cosyvoice", 1185, 104_874_752),
        ("cosyvoice2", 1121, 112_549_360),
        ("cosyvoice3", 330, 332_257_088),
        ("cosyvoice-fromscratch", None, 71_769_344),
    ],
)
def test_published_sizes(name: str, entries: int | None, parameters: int) -> None:
    with torch.device("meta"):
        flow = fastflow.from_preset(name)
    assert sum(p.numel() for p in flow.parameters()) == parameters
    assert entries is None or len(flow.state_dict()) == entries
    buffers = [key for key in flow.state_dict() if key not in dict(flow.named_parameters())]
    assert buffers == (["decoder.estimator.rotary_embed.inv_freq"] if name == "cosyvoice3" else [])


# ------------------------------------------------------------------------------------------------ randomness
@pytest.mark.parametrize("name", TINY)
def test_construction_leaves_the_global_generators_alone(name: str) -> None:
    random.seed(1)
    torch.manual_seed(1)
    make_flow(name)
    assert random.random() == random.Random(1).random()
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    fastflow.CausalConditionalCFM(240, fastflow.config.PRESETS["tiny2"]["decoder"]["cfm_params"])
    assert torch.rand(1) == want


@pytest.mark.parametrize("name", TINY)
def test_same_seeds_same_loss(name: str) -> None:
    flow, batch = make_flow(name), make_batch(name)
    assert loss_of(flow, batch) == loss_of(flow, batch)
    assert loss_of(flow, batch) != loss_of(flow, batch, seed=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_streaming_is_decided_by_the_first_python_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, batch, seen = make_flow(name), make_batch(name), []
    compute_loss = flow.decoder.compute_loss
    monkeypatch.setattr(
        flow.decoder, "compute_loss", lambda *args, **kw: seen.append(kw["streaming"]) or compute_loss(*args, **kw)
    )
    for seed in range(8):
        random.seed(seed)
        flow(batch, "cpu")
    assert seen == [random.Random(seed).random() < 0.5 for seed in range(8)]
    assert len(set(seen)) == 2


@pytest.mark.parametrize("recompute", ["auto", "none", "selective", "block"])
@pytest.mark.parametrize("name", TINY)
def test_a_step_with_device_randomness_never_waits_for_the_device(name, recompute, monkeypatch) -> None:
    monkeypatch.setattr(checks, "readable", lambda x: False)  # as for tensors that are not on the CPU
    flow, batch = make_flow(name), make_batch(name)
    flow.randomness, flow.recompute = "device", recompute
    with Counts() as counts:
        flow(batch, "cpu")["loss"].backward()
    assert counts.syncs.total() == 0


@pytest.mark.parametrize("name", TINY)
def test_upstreams_randomness_reads_the_lengths_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "readable", lambda x: False)
    flow, batch = make_flow(name), make_batch(name)
    with Counts() as counts:
        flow(batch, "cpu")["loss"].backward()
    assert counts.syncs == {"Tensor.tolist": 1}


def test_device_randomness_reveals_what_upstreams_does() -> None:
    """None to half of the rows, else uniform in 0..30 %, both ends included."""
    lengths = torch.full((40_000,), 40)
    drawn = _drawn_prefixes(lengths, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn) / len(lengths)
    assert len(counts) == 13
    want = torch.full((13,), 0.5 / 13)
    want[0] += 0.5
    torch.testing.assert_close(counts, want, atol=0.005, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_a_generator_decides_all_that_device_randomness_draws(name: str) -> None:
    flow, batch = make_flow(name).eval(), make_batch(name)
    flow.randomness = "device"

    def loss(seed: int, of_torch: int) -> torch.Tensor:
        random.seed(0)  # the streaming choice
        torch.manual_seed(of_torch)
        return flow(batch, "cpu", generator=torch.Generator().manual_seed(seed))["loss"]

    assert loss(1, 1) == loss(1, 2)
    assert loss(1, 1) != loss(2, 1)


def test_another_randomness_is_named() -> None:
    with pytest.raises(ValueError, match="randomness must be one of upstream, device; got 'gpu'"):
        make_flow("tiny").randomness = "gpu"


# ------------------------------------------------------------------------------------------------ gradient
@pytest.mark.parametrize("name", TINY)
def test_one_loss_reaches_every_parameter(name: str) -> None:
    flow = make_flow(name)
    loss_of(flow, make_batch(name)).backward()
    for key, parameter in flow.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", TINY)
def test_a_dropped_row_trains_the_estimator_only(name: str) -> None:
    flow = make_flow(name)
    flow.decoder.training_cfg_rate = 1.0  # keeps no row
    loss_of(flow, make_batch(name)).backward()
    for key, parameter in flow.named_parameters():
        if key.startswith("decoder."):
            continue
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), f"{key} has gradient although every row was dropped"
    assert any(p.grad.any() for p in flow.decoder.parameters())


@pytest.mark.parametrize("name", TINY)
def test_padding_tokens_give_no_gradient_to_the_table(name: str) -> None:
    flow, batch = make_flow(name), make_batch(name)
    batch["speech_token"] = torch.randint(1, 4096, batch["speech_token"].shape)
    batch["speech_token"][1, int(batch["speech_token_len"][1]) :] = 0
    flow.decoder.training_cfg_rate = 0.0
    loss_of(flow, batch).backward()
    table = flow.input_embedding.weight.grad
    assert not table[0].any()
    assert table[batch["speech_token"][0, 0]].any()


@pytest.mark.parametrize("name", TINY)
def test_batch_of_one_trains(name: str) -> None:
    assert loss_of(make_flow(name), make_batch(name, rows=1)).isfinite()


@pytest.mark.parametrize("name", CAUSAL)
def test_garbage_in_padding_changes_nothing(name: str) -> None:
    flow, batch = make_flow(name).eval(), make_batch(name)
    want = loss_of(flow, batch)
    tokens, frames = int(batch["speech_token_len"][1]), int(batch["speech_feat_len"][1])
    batch["speech_token"][1, tokens:] = 7
    torch.testing.assert_close(loss_of(flow, batch), want, rtol=0, atol=0)
    assert frames < batch["speech_feat"].shape[1]


# ------------------------------------------------------------------------------------------------ inference
@pytest.mark.parametrize("name", TINY)
def test_inference_returns_the_frames_after_the_prompt(name: str) -> None:
    flow = make_flow(name).eval()
    mel, cache = flow.inference(**make_call(name))
    frames = 100 if name in CAUSAL else int(50 / 50 * 22050 / 256)
    assert mel.shape == (1, 80, frames)
    assert mel.dtype == torch.float32
    assert (cache is None) == (name in CAUSAL)
    if cache is not None:
        assert cache.shape == (1, 80, 16 + 34, 2)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_inference_repeats_itself(name: str) -> None:
    flow, call = make_flow(name).eval(), make_call(name)
    assert torch.equal(flow.inference(**call)[0], flow.inference(**call)[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_a_growing_prefix_keeps_its_frames(name: str) -> None:
    """Streaming is causal at the grain of a chunk: 25 tokens, 50 frames."""
    flow, call = make_flow(name).eval(), make_call(name, tokens=70, prompt=0)
    options = {"streaming": True, "finalize": False}
    whole, _ = flow.inference(**{**call, **options})
    first, _ = flow.inference(**{**call, **options, "token": call["token"][:, :53], "token_len": torch.tensor([53])})
    torch.testing.assert_close(first[:, :, :100], whole[:, :, :100], rtol=1e-4, atol=1e-4)
    assert (first - flow.inference(**call)[0][:, :, :100]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CAUSAL)
def test_finalize_false_keeps_the_last_tokens_as_look_ahead(name: str) -> None:
    flow, call = make_flow(name).eval(), make_call(name)
    mel, _ = flow.inference(**{**call, "finalize": False})
    assert mel.shape[2] == 2 * (50 - 3)


@pytest.mark.parametrize("name", TINY)
def test_negative_tokens_mean_zero(name: str) -> None:
    flow, call = make_flow(name).eval(), make_call(name)
    mels = []
    for token in (-1, 0):
        call["token"][0, 3] = token
        torch.manual_seed(0)
        mels.append(flow.inference(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()})[0])
    assert torch.equal(*mels)


@pytest.mark.parametrize("name", TINY)
def test_threads_do_not_disturb_each_other(name: str) -> None:
    flow = make_flow(name).eval()
    calls = [make_call(name, tokens=20 + 5 * i) for i in range(3)]
    if name not in CAUSAL:  # the noise is drawn: compare the deterministic part
        run = lambda call: flow.encoder(flow.input_embedding(call["token"]), call["token_len"])[0]  # noqa: E731
    else:
        run = lambda call: flow.inference(**call)[0]  # noqa: E731
    with torch.inference_mode():
        want = [run(call) for call in calls]
        got: list = [None] * len(calls)

        def work(i: int) -> None:
            with torch.inference_mode():
                got[i] = run(calls[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_autocast_trains(name: str) -> None:
    flow, batch = make_flow(name), make_batch(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(flow, batch)
    loss.backward()
    torch.testing.assert_close(loss.float(), loss_of(flow, batch), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", TINY)
def test_a_copied_flow_is_the_same(name: str) -> None:
    flow, batch = make_flow(name), make_batch(name)
    assert loss_of(copy.deepcopy(flow), batch) == loss_of(flow, batch)


# ------------------------------------------------------------------------------------------------ backends
@pytest.mark.parametrize("name", TINY)
def test_every_backend_gives_the_same_flow(name: str, backend: str, device: torch.device, modules_on) -> None:
    flow, batch = make_flow(name), make_batch(name)
    want = loss_of(flow, batch)
    want.backward()
    gradients = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    if device.type != "cpu":
        pytest.skip("the draws of another device differ")
    with modules_on(backend):
        got = loss_of(flow, batch)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    top = max(gradient.norm() for gradient in gradients)  # some gradients are zero but for rounding
    for (key, p), gradient in zip(flow.named_parameters(), gradients, strict=True):
        assert (p.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * top, key


def test_a_backend_that_cannot_run_raises_from_the_flow() -> None:
    with fastflow.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        loss_of(make_flow("tiny"), make_batch("tiny"))


# ------------------------------------------------------------------------------------------------ bad input
def _set(key: str, value):
    return lambda given: given.__setitem__(key, value)


BAD_BATCHES = {
    "no embedding": (lambda b: b.pop("embedding"), ValueError, "batch lacks embedding"),
    "id too large": (
        lambda b: b["speech_token"].__setitem__((0, 0), 10**6),
        ValueError,
        "speech_token holds id 1000000",
    ),
    "float tokens": (
        lambda b: _set("speech_token", b["speech_token"].float())(b),
        TypeError,
        "speech_token must be int",
    ),
    "flat tokens": (
        lambda b: _set("speech_token", b["speech_token"][0])(b),
        ValueError,
        "speech_token must have shape",
    ),
    "empty batch": (lambda b: b.update({k: v[:0] for k, v in b.items()}), ValueError, "speech_token must have shape"),
    "not a tensor": (_set("speech_token", [[1, 2]]), TypeError, "speech_token must be a tensor, got list"),
    "length 0": (
        lambda b: b["speech_token_len"].__setitem__(1, 0),
        ValueError,
        r"speech_token_len must lie in 1\.\.12",
    ),
    "length too large": (
        lambda b: b["speech_token_len"].__setitem__(0, 13),
        ValueError,
        r"speech_token_len must lie in 1\.\.12",
    ),
    "nothing fills the width": (
        lambda b: b["speech_token_len"].__setitem__(0, 11),
        ValueError,
        "the largest of speech_token_len must be 12",
    ),
    "feat length 0": (lambda b: b["speech_feat_len"].__setitem__(1, 0), ValueError, "speech_feat_len must lie in"),
    "float lengths": (
        lambda b: _set("speech_feat_len", b["speech_feat_len"].float())(b),
        TypeError,
        "speech_feat_len must be an integer",
    ),
    "mel channels": (
        lambda b: _set("speech_feat", b["speech_feat"][..., :79])(b),
        ValueError,
        r"speech_feat must have shape \[2, >= 1, 80\]",
    ),
    "NaN": (lambda b: b["speech_feat"].__setitem__((0, 0, 0), float("nan")), ValueError, "speech_feat holds NaN"),
    "infinite x-vector": (
        lambda b: b["embedding"].__setitem__((0, 0), float("inf")),
        ValueError,
        "embedding holds NaN or infinity",
    ),
    "double mel": (
        lambda b: _set("speech_feat", b["speech_feat"].double())(b),
        TypeError,
        "speech_feat is torch.float64 but the module is torch.float32",
    ),
    "x-vector width": (
        lambda b: _set("embedding", b["embedding"][:, :191])(b),
        ValueError,
        r"embedding must have shape \[2, 192\], got \[2, 191\]",
    ),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_named(name: str, case: str) -> None:
    spoil, error, message = BAD_BATCHES[case]
    batch = make_batch(name)
    spoil(batch)
    with pytest.raises(error, match=message):
        make_flow(name)(batch, "cpu")


@pytest.mark.parametrize("name", CAUSAL)
def test_frames_must_match_tokens(name: str) -> None:
    batch = make_batch(name)
    batch["speech_feat"] = batch["speech_feat"][:, :-1]
    batch["speech_feat_len"] = batch["speech_feat_len"].clamp(max=23)
    with pytest.raises(ValueError, match="speech_feat has 23 frames but 12 tokens need 2 each, 24"):
        make_flow(name)(batch, "cpu")


@pytest.mark.parametrize("name", TINY)
def test_another_device_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="device is meta but the module is on cpu"):
        make_flow(name)(make_batch(name), "meta")


BAD_CALLS = {
    "batch of two": (
        _set("token", torch.zeros(2, 9, dtype=torch.int32)),
        ValueError,
        r"token must have shape \[1, >= 0\]",
    ),
    "no token": (
        lambda c: c.update(token=c["token"][:, :0], token_len=torch.tensor([0])),
        ValueError,
        "token is empty",
    ),
    "id too large": (lambda c: c["token"].__setitem__((0, 0), 9999), ValueError, "token holds id 9999"),
    "prompt id too large": (
        lambda c: c["prompt_token"].__setitem__((0, 0), 9999),
        ValueError,
        "prompt_token holds id 9999",
    ),
    "length too large": (_set("token_len", torch.tensor([51])), ValueError, r"token_len must lie in 0\.\.50"),
    "negative length": (
        _set("prompt_token_len", torch.tensor([-1])),
        ValueError,
        r"prompt_token_len must lie in 0\.\.8",
    ),
    "mel channels": (
        _set("prompt_feat", torch.zeros(1, 16, 79)),
        ValueError,
        r"prompt_feat must have shape \[1, >= 0, 80\]",
    ),
    "NaN prompt": (_set("prompt_feat", torch.full((1, 16, 80), float("nan"))), ValueError, "prompt_feat holds NaN"),
    "half prompt": (_set("prompt_feat", torch.zeros(1, 16, 80).half()), TypeError, "prompt_feat is torch.float16"),
    "x-vector rows": (_set("embedding", torch.zeros(2, 192)), ValueError, r"embedding must have shape \[1, 192\]"),
    "other device": (_set("prompt_feat", torch.zeros(1, 16, 80, device="meta")), ValueError, "prompt_feat is on meta"),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named(name: str, case: str) -> None:
    spoil, error, message = BAD_CALLS[case]
    call = make_call(name)
    spoil(call)
    with pytest.raises(error, match=message):
        make_flow(name).eval().inference(**call)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prompt_longer_than_all_tokens_is_named(name: str) -> None:
    call = make_call(name) | {"prompt_feat": torch.zeros(1, 116, 80)}
    with pytest.raises(ValueError, match="prompt_feat has 116 frames, but all tokens give only 116"):
        make_flow(name).eval().inference(**call)


@pytest.mark.parametrize("name", CAUSAL)
def test_look_ahead_needs_more_tokens_than_it_takes(name: str) -> None:
    call = make_call(name, tokens=3, prompt=0) | {"finalize": False}
    with pytest.raises(ValueError, match="finalize=False needs more than 3 tokens, got 3"):
        make_flow(name).eval().inference(**call)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(1, 80, 0), r"flow_cache must have shape \[1, 80, >= 0, 2\]"),
        (torch.zeros(1, 80, 500, 2), "flow_cache holds 500 frames but prompt and chunk have"),
    ],
)
def test_bad_caches_are_named(cache: torch.Tensor, message: str) -> None:
    call = make_call("tiny") | {"flow_cache": cache}
    with pytest.raises(ValueError, match=message):
        make_flow("tiny").eval().inference(**call)
