"""Flows under DistributedDataParallel and FSDP2, with two gloo processes on the CPU."""

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastflow
from fastflow.training import StabilityMonitor, parameter_groups

TINY = ["tiny", "tiny2", "tiny3"]
RANKS = 2

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="not run: torch was built without torch.distributed")


def make_flow(name: str) -> nn.Module:
    """Guidance dropout and streaming are left on: they must not need ``find_unused_parameters``."""
    torch.manual_seed(0)
    return fastflow.from_preset(name)


def make_batch(name: str, lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_len = torch.tensor(lengths)
    feat_len = (token_len * 1.7).int() if name == "tiny" else token_len * 2
    return {
        "speech_token": torch.randint(0, 4096, (len(lengths), max(lengths)), generator=generator),
        "speech_token_len": token_len,
        "speech_feat": torch.randn(len(lengths), int(feat_len.max()), 80, generator=generator),
        "speech_feat_len": feat_len,
        "embedding": torch.randn(len(lengths), 192, generator=generator),
    }


def loss_of(flow: nn.Module, batch: dict, seed: int) -> torch.Tensor:
    """The streaming choice comes first and is the same for all seeds here; the rest of the draws differs."""
    random.seed(seed)
    torch.manual_seed(seed)
    return flow(batch, "cpu")["loss"]


def frames(name: str, batch: dict) -> int:
    """The number of frames that the loss of a batch is the mean of."""
    return int(batch["speech_feat_len"].sum())


Launch = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes, started once: importing torch takes longer than the tests."""
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def launch(processes: ProcessPoolExecutor, tmp_path: Path) -> Launch:
    """Run ``work(rank, *args)`` in both; what they return, in the order of the ranks."""

    def run(work: Callable[..., dict], *args: str) -> list[dict]:
        # A rank waits for the other, so each process takes one of the two.
        futures = [processes.submit(_rank, rank, work, tmp_path, args) for rank in range(RANKS)]
        for future in futures:
            future.result(timeout=300)
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]

    return run


def _rank(rank: int, work: Callable[..., dict], folder: Path, args: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        torch.save(work(rank, *args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def gradients(flow: nn.Module) -> dict[str, torch.Tensor]:
    """Missing ones are left out."""
    return {name: p.grad for name, p in flow.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-4 of the largest gradient of each parameter, or of a thousandth of all: key biases have none but noise."""
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        bound = 1e-4 * max(grad.abs().max().item(), 1e-3 * largest)
        assert (found[name] - grad).abs().max().item() <= bound, name


# ------------------------------------------------------------------------------------------------ DDP
# Ranks have other numbers of rows, and rows of other lengths.
ROWS = [[12, 9, 5], [10]]


def ddp_weighted(rank: int, name: str) -> dict[str, torch.Tensor]:
    """DDP averages over the ranks; a rank's loss is a mean over its own frames: weight it by its share of them."""
    batch = make_batch(name, ROWS[rank], seed=rank)
    own = torch.tensor(float(frames(name, batch)))
    total = own.clone()
    dist.all_reduce(total)
    flow = DistributedDataParallel(make_flow(name))
    (loss_of(flow, batch, rank) * own / total * RANKS).backward()
    return gradients(flow.module)


@pytest.mark.parametrize("name", TINY)
def test_ddp_gradients_are_those_of_one_process_with_all_rows(name: str, launch: Launch) -> None:
    found = launch(ddp_weighted, name)
    flow, batches = make_flow(name), [make_batch(name, ROWS[rank], rank) for rank in range(RANKS)]
    total = sum(frames(name, batch) for batch in batches)
    for rank, batch in enumerate(batches):
        (loss_of(flow, batch, rank) * frames(name, batch) / total).backward()
    for rank in range(RANKS):
        assert_close(found[rank], gradients(flow))


def ddp_accumulated(rank: int, name: str) -> dict[str, torch.Tensor]:
    flow = DistributedDataParallel(make_flow(name))
    for micro in range(3):
        batch = make_batch(name, [8, 5], seed=10 * rank + micro)
        if micro < 2:
            with flow.no_sync():
                (loss_of(flow, batch, micro) / 3).backward()
        else:
            (loss_of(flow, batch, micro) / 3).backward()
    return gradients(flow.module)


@pytest.mark.parametrize("name", TINY)
def test_accumulation_with_no_sync_gives_the_mean_of_all_batches(name: str, launch: Launch) -> None:
    found = launch(ddp_accumulated, name)
    flow = make_flow(name)
    for rank in range(RANKS):
        for micro in range(3):
            (loss_of(flow, make_batch(name, [8, 5], 10 * rank + micro), micro) / 3 / RANKS).backward()
    for rank in range(RANKS):
        assert_close(found[rank], gradients(flow))


def ddp_dropping(rank: int, name: str) -> dict[str, torch.Tensor]:
    """Several steps; on the first every row of rank 0 loses its condition, on the second every row of both ranks."""
    flow = make_flow(name)
    wrapped = DistributedDataParallel(flow)  # an unused parameter would make the second forward pass raise
    optimizer = torch.optim.SGD(flow.parameters(), 1e-3)
    missing = 0
    for step, rate in enumerate([1.0 if rank == 0 else 0.0, 1.0, 0.2, 0.2]):
        flow.decoder.training_cfg_rate = rate
        optimizer.zero_grad(set_to_none=True)
        loss_of(wrapped, make_batch(name, [8, 5], step), 10 * rank + step).backward()
        missing += sum(p.grad is None for p in flow.parameters())
        optimizer.step()
    return {"missing": torch.tensor(missing), "weights": nn.utils.parameters_to_vector(flow.parameters()).detach()}


@pytest.mark.parametrize("name", TINY)
def test_no_parameter_is_ever_unused(name: str, launch: Launch) -> None:
    first, second = launch(ddp_dropping, name)
    assert first["missing"] == second["missing"] == 0
    assert torch.equal(first["weights"], second["weights"])


def ddp_streaming_apart(rank: int, name: str) -> dict[str, torch.Tensor]:
    """The ranks choose streaming differently, as they do in training: half of the batches each on its own."""
    flow = make_flow(name)
    wrapped = DistributedDataParallel(flow)
    seed = next(s for s in range(100) if (random.Random(s).random() < 0.5) == bool(rank))
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(wrapped, make_batch(name, [60], 0), seed).backward()
    return gradients(flow)


@pytest.mark.parametrize("name", ["tiny2", "tiny3"])
def test_ranks_may_differ_in_streaming(name: str, launch: Launch) -> None:
    first, second = launch(ddp_streaming_apart, name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def ddp_monitored(rank: int) -> dict[str, torch.Tensor]:
    """A batch that is not finite on one rank only: both must skip, else their weights part."""
    flow = make_flow("tiny3")
    wrapped = DistributedDataParallel(flow)
    optimizer = torch.optim.AdamW(parameter_groups(flow, 1e-3))
    monitor = StabilityMonitor(wrapped, optimizer, clip_norm=1.0)
    losses, skips = [], []
    for step in range(3):
        batch = make_batch("tiny3", [8, 5], 10 * rank + step)
        if step == 1 and rank == 1:
            batch["speech_feat"][0, 0, 0] = 3e38
        loss = loss_of(wrapped, batch, step)
        loss.backward()
        record = monitor.step(loss)
        skips.append(record.action == "skip")
        losses.append(record.figures["loss"])
        optimizer.zero_grad()
    vector = nn.utils.parameters_to_vector(flow.parameters()).detach()
    return {"losses": torch.tensor(losses), "skips": torch.tensor(skips), "weights": vector}


def test_all_ranks_of_a_monitored_run_decide_alike(launch: Launch) -> None:
    first, second = launch(ddp_monitored)
    assert first["skips"].tolist() == second["skips"].tolist() == [False, True, False]
    assert torch.equal(first["losses"][::2], second["losses"][::2])
    assert torch.equal(first["weights"], second["weights"])


# ------------------------------------------------------------------------------------------------ FSDP2
def fsdp(rank: int, name: str) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    flow = make_flow(name)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(flow, mesh=mesh)
    optimizer = torch.optim.AdamW(parameter_groups(flow, 1e-3))
    loss = loss_of(flow, make_batch(name, [8, 5], rank), rank)
    loss.backward()
    found = {key: p.grad.full_tensor() for key, p in flow.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    assert torch.isfinite(loss_of(flow, make_batch(name, [8, 5], rank), rank))
    return found


@pytest.mark.parametrize("name", TINY)
def test_fsdp2_shards_a_flow_and_gives_the_mean_gradient(name: str, launch: Launch) -> None:
    found = launch(fsdp, name)
    flow = make_flow(name)
    for rank in range(RANKS):
        (loss_of(flow, make_batch(name, [8, 5], rank), rank) / RANKS).backward()
    for rank in range(RANKS):
        assert_close(found[rank], gradients(flow))
