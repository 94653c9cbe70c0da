"""The length regulator: which frames go where, and on which backend."""

import pytest
import torch
import torch.nn.functional as F

import fastflow
from fastflow.length_regulator import mel_frames


def regulator() -> fastflow.InterpolateRegulator:
    torch.manual_seed(0)
    return fastflow.InterpolateRegulator(80, (1, 1, 1, 1)).eval()


def stretch(x: torch.Tensor, frames: int) -> torch.Tensor:
    return F.interpolate(x.transpose(1, 2), size=frames, mode="linear")


def test_keys_are_upstreams() -> None:
    shapes = {key: tuple(p.shape) for key, p in regulator().named_parameters()}
    assert {key for key in shapes if key.endswith("weight")} == {
        f"model.{i}.weight" for i in (0, 1, 3, 4, 6, 7, 9, 10, 12)
    }
    assert shapes["model.0.weight"] == (80, 80, 3)
    assert shapes["model.12.weight"] == (80, 80, 1)


@pytest.mark.parametrize("tokens", [1, 20, 40])
@pytest.mark.parametrize("prompt", [0, 9])
def test_up_to_40_tokens_are_stretched_whole(tokens: int, prompt: int, backend: str, modules_on) -> None:
    module, x1, x2 = regulator(), torch.randn(1, prompt, 80), torch.randn(1, tokens, 80)
    frames = 2 * tokens
    want = stretch(x2, frames)
    if prompt:
        want = torch.cat([stretch(x1, 15), want], 2)
    with modules_on(backend), torch.no_grad():
        got, total = module.inference(x1, x2, 15 if prompt else 0, frames, 50)
    assert total == want.shape[2]
    torch.testing.assert_close(got, module.model(want).transpose(1, 2))


@pytest.mark.parametrize(("rate", "edge"), [(50, 34), (25, 68)])
def test_over_40_tokens_both_ends_have_fixed_lengths(rate: int, edge: int, backend: str, modules_on) -> None:
    module, x1, x2 = regulator(), torch.randn(1, 4, 80), torch.randn(1, 41, 80)
    frames = mel_frames(41, rate)
    middle = stretch(x2[:, 20:-20], frames - 2 * edge)
    parts = [stretch(x1, 7), stretch(x2[:, :20], edge), middle, stretch(x2[:, -20:], edge)]
    with modules_on(backend), torch.no_grad():
        got, total = module.inference(x1, x2, 7, frames, rate)
    assert total == frames + 7
    torch.testing.assert_close(got, module.model(torch.cat(parts, 2)).transpose(1, 2))


def test_training_stretches_padded_rows_and_masks_the_result(backend: str, modules_on) -> None:
    module, x, ylens = regulator(), torch.randn(2, 9, 80), torch.tensor([16, 11])
    with modules_on(backend), torch.no_grad():
        got, lengths = module(x, ylens)
    want = module.model(stretch(x, 16)).transpose(1, 2)
    assert lengths is ylens
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1, :11], want[1, :11])
    assert not got[1, 11:].any()


def test_frames_known_beforehand_change_nothing() -> None:
    module, x, ylens = regulator(), torch.randn(2, 9, 80), torch.tensor([16, 11])
    assert torch.equal(module(x, ylens)[0], module(x, ylens, frames=16)[0])


def test_a_middle_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="segments must hold lengths >= 0"):
        regulator().inference(torch.zeros(1, 0, 80), torch.zeros(1, 41, 80), 0, 60, 50)
