"""Mel and tokens whose lengths do not belong together: refused by name, trimmed or resampled."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastflow
from fastflow import checks
from fastflow import flow as flow_module
from fastflow.lengths import check_tolerance, resample
from fastflow.testing.counters import Counts

CAUSAL = ["tiny2", "tiny3"]


def batch_of(token_len: list[int], feat_len: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, tokens, frames = len(token_len), max(token_len), max(feat_len)
    return {
        "speech_token": torch.randint(0, 100, (rows, tokens), generator=generator),
        "speech_token_len": torch.tensor(token_len),
        "speech_feat": torch.randn(rows, frames, 80, generator=generator),
        "speech_feat_len": torch.tensor(feat_len),
        "embedding": torch.randn(rows, 192, generator=generator),
    }


def make_flow(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    flow = fastflow.from_preset(name)
    for key, value in settings.items():
        setattr(flow, key, value)
    return flow


def loss(flow: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    random.seed(0)
    torch.manual_seed(0)
    return flow(batch, "cpu")["loss"]


@pytest.mark.parametrize("name", CAUSAL)
def test_an_error_names_both_lengths_and_the_way_out(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"speech_feat has 26 frames but 12 tokens need 2 each, 24.*on_length_mismatch"
    ):
        make_flow(name)(batch_of([12, 9], [26, 18]), "cpu")


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(("tokens", "frames"), [([12, 9], [27, 18]), ([12, 9], [20, 19]), ([12, 9], [17, 20])])
def test_trim_is_the_batch_cut_to_the_shorter_of_both(name: str, tokens: list[int], frames: list[int]) -> None:
    batch = batch_of(tokens, frames)
    kept = [min(n, m // 2) for n, m in zip(tokens, frames, strict=True)]
    cut = batch | {
        "speech_token": batch["speech_token"][:, : max(kept)],
        "speech_token_len": torch.tensor(kept),
        "speech_feat": batch["speech_feat"][:, : 2 * max(kept)],
        "speech_feat_len": 2 * torch.tensor(kept),
    }
    assert torch.equal(loss(make_flow(name, on_length_mismatch="trim"), batch), loss(make_flow(name), cut))


@pytest.mark.parametrize("name", CAUSAL)
def test_interpolate_is_the_mel_stretched_row_by_row(name: str) -> None:
    batch = batch_of([12, 9], [21, 19])
    mel = torch.zeros(2, 24, 80)
    for row, (frames, target) in enumerate(((21, 24), (19, 18))):
        given = batch["speech_feat"][row : row + 1, :frames].transpose(1, 2)
        mel[row, :target] = F.interpolate(given, size=target, mode="linear").transpose(1, 2)[0]
    stretched = batch | {"speech_feat": mel, "speech_feat_len": torch.tensor([24, 18])}
    got = loss(make_flow(name, on_length_mismatch="interpolate"), batch)
    torch.testing.assert_close(got, loss(make_flow(name), stretched))


@pytest.mark.parametrize("policy", ["trim", "interpolate"])
@pytest.mark.parametrize("name", ["tiny", *CAUSAL])
def test_matching_lengths_are_left_alone(name: str, policy: str) -> None:
    frames = [20, 15] if name == "tiny" else [24, 18]  # int(12 / 50 * 22050 / 256) = 20
    batch = batch_of([12, 9], frames)
    torch.testing.assert_close(loss(make_flow(name, on_length_mismatch=policy), batch), loss(make_flow(name), batch))


def test_trim_of_cosyvoice_1_cuts_what_the_other_does_not_cover() -> None:
    batch = batch_of([12, 9], [30, 8])  # 12 tokens imply 20 frames; 8 frames need ceil(8 / 86.13 * 50) = 5 tokens
    cut = batch | {
        "speech_token_len": torch.tensor([12, 5]),
        "speech_feat": batch["speech_feat"][:, :20],
        "speech_feat_len": torch.tensor([20, 8]),
    }
    assert torch.equal(loss(make_flow("tiny", on_length_mismatch="trim"), batch), loss(make_flow("tiny"), cut))


@pytest.mark.parametrize("policy", ["error", "trim", "interpolate"])
@pytest.mark.parametrize("name", ["tiny", *CAUSAL])
def test_beyond_the_tolerance_every_policy_names_the_row(name: str, policy: str) -> None:
    frames = [20, 9] if name == "tiny" else [24, 12]
    batch = batch_of([12, 9], frames)
    implied = 15 if name == "tiny" else 18
    with pytest.raises(
        ValueError, match=f"row 1 of speech_feat has {frames[1]} frames .* imply {implied}, .* length_tolerance 5 apart"
    ):
        make_flow(name, on_length_mismatch=policy, length_tolerance=5)(batch, "cpu")
    loss(make_flow(name, on_length_mismatch=policy, length_tolerance=6), batch)


def test_a_row_without_a_whole_token_is_named() -> None:
    with pytest.raises(ValueError, match="row 1 of speech_feat has 1 frames, less than one token's 2"):
        make_flow("tiny2", on_length_mismatch="trim")(batch_of([12, 9], [24, 1]), "cpu")


@pytest.mark.parametrize(("lengths", "targets"), [([1, 7, 9], [5, 9, 1]), ([9, 2, 4], [9, 3, 8])])
def test_resampling_is_that_of_torch_on_each_row_alone(lengths: list[int], targets: list[int]) -> None:
    mel = torch.randn(3, 9, 4, dtype=torch.float64)
    got = resample(mel, torch.tensor(lengths), torch.tensor(targets), 9)
    for row, (length, target) in enumerate(zip(lengths, targets, strict=True)):
        want = F.interpolate(mel[row : row + 1, :length].transpose(1, 2), size=target, mode="linear").transpose(1, 2)[0]
        torch.testing.assert_close(got[row, :target], want)
        assert not got[row, target:].any()


@pytest.mark.parametrize("policy", ["trim", "interpolate"])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_length_is_read_where_that_would_stall(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checks, flow_module, fastflow.lengths):
        monkeypatch.setattr(module, "readable", lambda x: False)
    flow = make_flow(name, on_length_mismatch=policy, length_tolerance=1, randomness="device")
    with Counts() as counts:
        loss(flow, batch_of([12, 9], [20, 17])).backward()
    assert counts.syncs.total() == 0


def test_no_tolerance_means_any_difference() -> None:
    check_tolerance(torch.tensor([1]), torch.tensor([1000]), None)


def test_another_policy_is_named() -> None:
    with pytest.raises(ValueError, match="on_length_mismatch must be one of error, trim, interpolate; got 'pad'"):
        make_flow("tiny2").on_length_mismatch = "pad"
