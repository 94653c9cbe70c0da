"""The U-Net estimators: what upstream's quirks promise."""

import pytest
import torch
from torch import nn

from fastflow import CausalConditionalDecoder, ConditionalDecoder, use_backend
from fastflow.unet import ResnetBlock1D, TransformerBlock, time_features

SIZES = {"attention_head_dim": 16, "num_heads": 2, "n_blocks": 1, "num_mid_blocks": 1, "act_fn": "gelu"}


def unet(cls: type = ConditionalDecoder, channels: tuple[int, ...] = (32, 32), **options) -> nn.Module:
    torch.manual_seed(0)
    return cls(320, 80, channels, 0.0, **SIZES, **options).eval()


def inputs(frames: int, lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    rows = len(lengths)
    mask = (torch.arange(frames) < torch.tensor(lengths)[:, None]).float()[:, None]
    maps = {name: torch.randn(rows, 80, frames) for name in ("x", "mu", "cond")}
    return {**maps, "mask": mask, "t": torch.rand(rows), "spks": torch.randn(rows, 80)}


def test_time_features_are_sines_then_cosines_of_a_thousand_t() -> None:
    features = time_features(torch.tensor([0.25]), 320)[0]
    torch.testing.assert_close(features[0], torch.tensor(250.0).sin())
    torch.testing.assert_close(features[160], torch.tensor(250.0).cos())
    torch.testing.assert_close(features[159], torch.tensor(0.025).sin())  # the last frequency is exactly 1/10000


@pytest.mark.parametrize("cls", [ConditionalDecoder, CausalConditionalDecoder])
@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17])
def test_any_length_works_and_padding_is_zero(cls: type, frames: int) -> None:
    y = unet(cls)(**inputs(frames, [frames, max(frames // 2, 1)]))
    assert y.shape == (2, 80, frames)
    assert y.isfinite().all()
    assert not y[1, :, max(frames // 2, 1) :].any()


@pytest.mark.parametrize("cls", [ConditionalDecoder, CausalConditionalDecoder])
@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3])])
def test_one_time_holds_for_all_rows(cls: type, t: torch.Tensor) -> None:
    module, given = unet(cls), inputs(9, [9, 7])
    torch.testing.assert_close(module(**{**given, "t": t}), module(**{**given, "t": t.expand(2)}))


def test_group_norm_sees_padding_as_upstreams_does() -> None:
    module, given = unet(), inputs(20, [20])
    wide = {k: torch.nn.functional.pad(x, (0, 7)) if x.dim() == 3 else x for k, x in given.items()}
    assert (module(**wide)[..., :20] - module(**given)).abs().max() > 1e-2


def test_the_causal_form_does_not_see_padding() -> None:
    module, given = unet(CausalConditionalDecoder, (32,)), inputs(20, [20])
    wide = {k: torch.nn.functional.pad(x, (0, 7), value=3.0) if x.dim() == 3 else x for k, x in given.items()}
    wide["mask"] = torch.nn.functional.pad(given["mask"], (0, 7))
    torch.testing.assert_close(module(**wide)[..., :20], module(**given), rtol=1e-4, atol=1e-5)


def test_one_level_streams_causally_by_chunks() -> None:
    module = unet(CausalConditionalDecoder, (32,), static_chunk_size=4)
    given = inputs(12, [12])
    want = module(**given, streaming=True)
    given["x"][..., 8:] += 1
    assert torch.equal(module(**given, streaming=True)[..., :8], want[..., :8])
    assert not torch.equal(module(**given)[..., :8], want[..., :8])


def test_version_1_ignores_streaming() -> None:
    module, given = unet(), inputs(9, [9])
    assert torch.equal(module(**given, streaming=True), module(**given))


@pytest.mark.parametrize("cls", [ConditionalDecoder, CausalConditionalDecoder])
def test_autocast_adds_to_a_float32_stream(cls: type, backend: str, device: torch.device) -> None:
    """As upstream's norms make it on a GPU: beside the hundreds that it grows to bfloat16 would lose what is added."""
    module, given = unet(cls).to(device), {name: x.to(device) for name, x in inputs(9, [9, 7]).items()}
    dtypes = []
    for part in module.modules():
        if isinstance(part, (ResnetBlock1D, TransformerBlock)):
            part.register_forward_hook(lambda part, args, out: dtypes.append(out.dtype))
    with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
        module(**given)
    assert dtypes == [torch.float32] * 10


def test_left_chunk_limits_are_ignored() -> None:
    given = inputs(12, [12])
    options = {"static_chunk_size": 4, "channels": (32,)}
    few, all_left = (unet(CausalConditionalDecoder, num_decoding_left_chunks=n, **options) for n in (1, -1))
    assert torch.equal(few(**given, streaming=True), all_left(**given, streaming=True))


@pytest.mark.parametrize(("cls", "norm"), [(ConditionalDecoder, "1"), (CausalConditionalDecoder, "2")])
def test_keys_are_upstreams(cls: type, norm: str) -> None:
    keys = unet(cls).state_dict().keys()
    for key in (
        f"down_blocks.0.0.block1.block.{norm}.weight",
        "down_blocks.0.1.0.attn1.to_out.0.bias",
        "down_blocks.0.1.0.ff.net.0.proj.weight",
        "down_blocks.0.1.0.ff.net.2.bias",
        "down_blocks.0.2.conv.weight",
        "down_blocks.1.2.weight",
        "mid_blocks.0.0.res_conv.weight",
        "up_blocks.0.2.conv.weight",
        "up_blocks.1.2.bias",
        f"final_block.block.{norm}.bias",
    ):
        assert key in keys, key
    assert not any("attn1.to_q.bias" in key for key in keys)


def test_initialisation_is_kaiming_but_for_transposed_convolutions() -> None:
    module = unet(channels=(64, 64))
    conv = module.down_blocks[0][0].block1.block[0]
    assert not conv.bias.any()
    torch.testing.assert_close(conv.weight.std(), torch.tensor((2 / (320 * 3)) ** 0.5), rtol=0.05, atol=0)
    assert module.up_blocks[0][2].conv.bias.any()
    assert module.final_proj.weight.std() > 0.1, "the output is not small at the start"


def test_other_activations_are_named() -> None:
    with pytest.raises(ValueError, match="act_fn must be 'gelu'"):
        ConditionalDecoder(320, 80)


def test_a_row_of_length_0_is_finite() -> None:
    for cls in (ConditionalDecoder, CausalConditionalDecoder):
        assert unet(cls)(**inputs(6, [6, 0])).isfinite().all()
