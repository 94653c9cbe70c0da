"""CUDA graphs of the solver: what surrounds the capture, on any machine; the capture itself on a GPU.

Without a GPU a "graph" is a closure over its input and output buffers that solves again when it is replayed.
"""

import copy
import os
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastflow import ConditionalCFM, from_preset, graphs
from fastflow.graphs import Graph, GraphCache, bucket, weights_key

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: CUDA graphs: this machine has no GPU")
NAMES = ("tiny", "tiny2", "tiny3")
OPTIONS = {"streaming": False, "method": "euler", "cfg_rate": 0.7}


class Captures:
    """Stands in for the capture; counts, and leaves NaN where only a replay writes."""

    def __init__(self) -> None:
        self.count, self.pools = 0, []

    def __call__(self, solve, inputs: dict[str, Tensor], pool: int | None) -> Graph:
        self.pools.append(pool)
        self.count += 1
        output = torch.full_like(solve(**inputs), float("nan"))
        return Graph(inputs, output, lambda: output.copy_(solve(**inputs)), self.pools[-1] or self.count)


def decoder(name: str) -> ConditionalCFM:
    return from_preset(name).decoder.eval().requires_grad_(False)


def inputs(frames: int, seed: int = 0, rows: int = 1, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 80, frames)
    given = {name: torch.randn(shape, generator=generator) for name in ("x", "mu", "cond")}
    given["spks"] = torch.randn(rows, 80, generator=generator)
    given |= {"mask": torch.ones(rows, 1, frames), "t_span": torch.tensor([0.0, 0.2, 1.0])}
    return {name: x.to(device) for name, x in given.items()}


def run(cache: GraphCache, cfm: ConditionalCFM, given: dict[str, Tensor], **options: object) -> Tensor:
    return graphs.run(cache, cfm.estimator, cfm.solve, given, {**OPTIONS, **options})


# ------------------------------------------------------------------------------------------------ buckets
def test_buckets_hold_their_lengths_and_waste_little() -> None:
    lengths = [bucket(frames) for frames in range(1, 15001)]
    for frames, length in enumerate(lengths, start=1):
        assert frames <= length < frames + max(graphs.SMALLEST, frames / 8 + 1)
        assert bucket(length) == length
    assert lengths == sorted(lengths)
    assert len(set(lengths)) <= 60


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_call_gives_the_numbers_of_a_solve_without_graphs(name: str, streaming: bool) -> None:
    """First call, capture, replay; a long input leaves its tail in the buffers of a shorter one."""
    cfm, captures = decoder(name), Captures()
    cache = GraphCache(captures)
    for seed, frames in enumerate((61, 63, 40, 62)):  # one bucket
        given = inputs(frames, seed)
        got = run(cache, cfm, given, streaming=streaming)
        want = cfm.solve(**given, **{**OPTIONS, "streaming": streaming})
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert captures.count == (0 if name == "tiny" else 1)


def test_rows_of_different_lengths_share_a_graph() -> None:
    cfm, cache = decoder("tiny3"), GraphCache(Captures())
    for seed in range(3):
        given = inputs(50, seed, rows=2)
        given["mask"][1, :, 31:] = 0
        got, want = run(cache, cfm, given), cfm.solve(**given, **OPTIONS)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1, :, :31], want[1, :, :31], rtol=1e-5, atol=1e-5)


def test_cosyvoice_1_has_a_graph_for_each_length_and_the_same_bits() -> None:
    """GroupNorm counts padding, so there is none."""
    cfm, captures = decoder("tiny"), Captures()
    cache = GraphCache(captures)
    for seed, frames in enumerate((61, 40, 61, 40, 61)):
        given = inputs(frames, seed)
        assert torch.equal(run(cache, cfm, given), cfm.solve(**given, **OPTIONS))
    assert captures.count == 2


def test_speaker_and_condition_may_be_absent() -> None:
    cfm, cache = decoder("tiny3"), GraphCache(Captures())
    given = inputs(20) | {"spks": None, "cond": None}
    for _ in range(2):
        torch.testing.assert_close(run(cache, cfm, given), cfm.solve(**given, **OPTIONS), rtol=1e-5, atol=1e-5)


def test_a_result_outlives_the_next_replay() -> None:
    cfm, cache = decoder("tiny3"), GraphCache(Captures())
    results = [run(cache, cfm, inputs(20, seed)) for seed in range(4)]
    for seed, result in enumerate(results):
        torch.testing.assert_close(result, cfm.solve(**inputs(20, seed), **OPTIONS), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the cache
def test_the_second_call_captures_and_others_replay() -> None:
    captures = Captures()
    cache = GraphCache(captures)
    counts = []
    for _ in range(4):
        cache.run("key", None, lambda x: x + 1, {"x": torch.zeros(1, 1, 4)})
        counts.append(captures.count)
    assert counts == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [{"method": "ab2"}, {"cfg_rate": 0.3}, {"streaming": True}, "dtype", "steps", "rows", "backend", "autocast"],
    ids=str,
)
def test_what_a_graph_depends_on_asks_for_another(change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    cfm, captures = decoder("tiny3"), Captures()
    cache = GraphCache(captures)
    given, options = inputs(20), {}
    for _ in range(3):
        run(cache, cfm, given)
    if isinstance(change, dict):
        options = change
    elif change == "dtype":
        given["mu"] = given["mu"].double()
    elif change == "steps":
        given["t_span"] = torch.tensor([0.0, 0.2, 0.5, 1.0])
    elif change == "rows":
        given = inputs(20, rows=2)
    elif change == "backend":
        monkeypatch.setattr(graphs, "current_backend", lambda: "reference")
    elif change == "autocast":
        monkeypatch.setattr(graphs, "_autocast_key", lambda: (True, torch.float16))
    for _ in range(2):
        run(cache, cfm, given, **options)
    assert captures.count == 2


def test_other_times_of_as_many_steps_use_the_same_graph() -> None:
    cfm, captures = decoder("tiny3"), Captures()
    cache = GraphCache(captures)
    for middle in (0.2, 0.4, 0.6):
        given = inputs(20) | {"t_span": torch.tensor([0.0, middle, 1.0])}
        torch.testing.assert_close(run(cache, cfm, given), cfm.solve(**given, **OPTIONS), rtol=1e-5, atol=1e-5)
    assert captures.count == 1


def test_the_graph_not_used_for_longest_is_dropped() -> None:
    captures = Captures()
    cache = GraphCache(captures, capacity=2)

    def call(key: str) -> None:
        cache.run(key, None, lambda x: x + 1, {"x": torch.zeros(1, 1, 4)})

    for key in "aabbacc":  # b is the one not used for longest when c is captured
        call(key)
    assert (len(cache), captures.count) == (2, 3)
    call("a")
    call("c")
    assert captures.count == 3
    call("b")
    assert captures.count == 4


def test_graphs_share_the_memory_of_those_that_live() -> None:
    """A pool whose graphs have all been dropped must not be used again: PyTorch may have freed it."""
    captures = Captures()
    cache = GraphCache(captures)
    for weights in ("old", "new"):
        for key in "aabbcc":
            cache.run(key, weights, lambda x: x + 1, {"x": torch.zeros(1, 1, 4)})
    assert captures.pools == [None, 1, 1, None, 4, 4]


def test_what_is_remembered_is_bounded() -> None:
    cache = GraphCache(Captures())
    for key in range(3 * graphs.REMEMBERED):
        cache.run(key, None, lambda x: x, {"x": torch.zeros(1, 1, 4)})
    assert len(cache._seen) == graphs.REMEMBERED


def test_a_capture_that_fails_warns_once_and_the_solve_runs_without() -> None:
    def fail(solve, inputs, pool):  # type: ignore[no-untyped-def]
        raise RuntimeError("operation not permitted when stream is capturing")

    cache = GraphCache(fail)

    def call() -> Tensor:
        return cache.run("key", None, lambda x: x + 1, {"x": torch.zeros(1, 1, 4)})

    call()
    with pytest.warns(RuntimeWarning, match="no CUDA graph of the solver.*not permitted"):
        assert call().eq(1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call().eq(1).all()


def test_threads_get_their_own_results() -> None:
    cfm, cache = decoder("tiny3"), GraphCache(Captures())
    given = [inputs(20, seed) for seed in range(6)]
    want = [cfm.solve(**each, **OPTIONS) for each in given]
    failures: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not torch.allclose(run(cache, cfm, given[seed]), want[seed], rtol=1e-5, atol=1e-5):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------------------------------------------ weights
def test_updates_in_place_keep_the_key() -> None:
    cfm = decoder("tiny3").requires_grad_()
    key = weights_key(cfm.estimator)
    optimizer = torch.optim.Adam(cfm.parameters(), lr=1e-3)
    torch.stack([p.sum() for p in cfm.parameters()]).sum().backward()
    optimizer.step()
    cfm.load_state_dict({name: x + 1 for name, x in cfm.state_dict().items()})
    assert weights_key(cfm.estimator) == key


@pytest.mark.parametrize("change", ["double", "half", "data", "parameter", "buffer", "assign"])
def test_weights_that_lie_elsewhere_change_the_key(change: str) -> None:
    cfm = decoder("tiny3")
    key, estimator = weights_key(cfm.estimator), cfm.estimator
    if change in ("double", "half"):
        getattr(cfm, change)()
    elif change == "data":
        estimator.proj_out.weight.data = estimator.proj_out.weight.data.clone()
    elif change == "parameter":
        estimator.proj_out.weight = torch.nn.Parameter(estimator.proj_out.weight.detach().clone())
    elif change == "buffer":
        estimator.rotary_embed.inv_freq = estimator.rotary_embed.inv_freq.clone()
    else:
        cfm.load_state_dict({name: x.clone() for name, x in cfm.state_dict().items()}, assign=True)
    assert weights_key(estimator) != key


def test_the_key_covers_every_parameter_and_buffer() -> None:
    for name in NAMES:
        estimator = decoder(name).estimator
        tensors = [*estimator.parameters(), *estimator.buffers()]
        assert sorted(weights_key(estimator)) == sorted((x.data_ptr(), x.dtype) for x in tensors)


def test_moved_weights_drop_the_graphs_and_give_the_new_numbers() -> None:
    cfm, captures = decoder("tiny3"), Captures()
    cache = GraphCache(captures)
    given = inputs(20)
    for _ in range(3):
        run(cache, cfm, given)
    cfm.estimator.proj_out.bias.data = cfm.estimator.proj_out.bias.data + 1
    for count in (0, 1, 1):
        torch.testing.assert_close(run(cache, cfm, given), cfm.solve(**given, **OPTIONS), rtol=1e-5, atol=1e-5)
        assert len(cache) == count


# ------------------------------------------------------------------------------------------------ when
def test_graphs_are_for_inference_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu, estimator = SimpleNamespace(is_cuda=True), decoder("tiny3").estimator
    assert graphs.wanted(estimator, on_gpu)
    assert not graphs.wanted(estimator, torch.zeros(1))
    assert not graphs.wanted(torch.nn.Identity().eval(), on_gpu), "an estimator that is not fastflow's"
    assert not graphs.wanted(estimator.train(), on_gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not graphs.wanted(estimator.eval(), on_gpu)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_attribute_switches_them_off(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cfm, captures = decoder("tiny3"), Captures()
    monkeypatch.setattr(graphs, "wanted", lambda estimator, x: True)
    monkeypatch.setitem(graphs._caches, cfm, GraphCache(captures))
    cfm.cuda_graphs = allowed
    given = {key: x for key, x in inputs(20).items() if key not in ("x", "t_span")}
    results = [cfm(n_timesteps=2, **given)[0] for _ in range(3)]
    assert captures.count == int(allowed)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True)])
def test_the_environment_switches_them_off(value: str, enabled: bool) -> None:
    code = "from fastflow import ConditionalCFM; print(ConditionalCFM.cuda_graphs)"
    env = {**os.environ, "FASTFLOW_CUDA_GRAPHS": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(enabled)


def test_a_decoder_with_graphs_can_be_copied_and_is_forgotten() -> None:
    cfm = decoder("tiny3")
    cache = graphs.cache_of(cfm)
    assert graphs.cache_of(cfm) is cache
    copied = copy.deepcopy(cfm)
    assert graphs.cache_of(copied) is not cache
    before = len(graphs._caches)
    del cfm
    assert len(graphs._caches) == before - 1


# ------------------------------------------------------------------------------------------------ on a GPU
@needs_gpu
@pytest.mark.parametrize("method", ["euler", "midpoint", "ab2"])
@pytest.mark.parametrize("name", NAMES)
def test_captured_graphs_give_the_same_numbers(name: str, method: str) -> None:
    cfm = decoder(name).cuda()
    cache = GraphCache()
    for seed in range(4):
        given = inputs(61, seed, device="cuda")
        with torch.inference_mode():
            got = run(cache, cfm, given, method=method)
            want = cfm.solve(**given, **{**OPTIONS, "method": method})
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(cache) == 1


@needs_gpu
def test_a_replay_sees_updated_weights_and_never_waits() -> None:
    cfm = decoder("tiny3").cuda()
    given = {key: x for key, x in inputs(61, device="cuda").items() if key not in ("x", "t_span")}
    for _ in range(2):
        cfm(n_timesteps=4, **given)
    assert len(graphs.cache_of(cfm)) == 1
    with torch.no_grad():
        for parameter in cfm.parameters():
            parameter.mul_(1.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, _ = cfm(n_timesteps=4, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cfm.cuda_graphs = False
    torch.testing.assert_close(got, cfm(n_timesteps=4, **given)[0], rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_graphs_under_autocast(dtype: torch.dtype) -> None:
    cfm = decoder("tiny3").cuda()
    given = {key: x for key, x in inputs(61, device="cuda").items() if key not in ("x", "t_span")}
    given["spks"] = given["spks"].to(dtype)
    results = []
    for _ in range(4):
        with torch.autocast("cuda", dtype):
            results.append(cfm(n_timesteps=4, **given)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-2, atol=2e-2)


@needs_gpu
def test_streams_do_not_overtake_each_other() -> None:
    cfm, cache = decoder("tiny3").cuda(), GraphCache()
    given = [inputs(61, seed, device="cuda") for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in given]
    with torch.inference_mode():
        want = [cfm.solve(**each, **OPTIONS) for each in given]
        torch.cuda.synchronize()
        for _ in range(5):
            got = []
            for stream, each in zip(streams, given, strict=True):
                with torch.cuda.stream(stream):
                    got.append(run(cache, cfm, each))
            torch.cuda.synchronize()
            for result, right in zip(got, want, strict=True):
                torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-4)
