"""The DiT estimator: what upstream's quirks promise."""

import pytest
import torch

from fastflow import DiT
from fastflow.dit import RotaryEmbedding
from fastflow.ops.attention import rotate_first_head


def dit(**options) -> DiT:
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "ff_mult": 2, "mel_dim": 80, "mu_dim": 80, "spk_dim": 80}
    return DiT(**{**sizes, "static_chunk_size": 4, **options}).eval()


def inputs(frames: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    rows = len(lengths)
    mask = (torch.arange(frames) < torch.tensor(lengths)[:, None]).float()[:, None]
    maps = {name: torch.randn(rows, 80, frames) for name in ("x", "mu", "cond")}
    return {**maps, "mask": mask, "t": torch.rand(rows), "spks": torch.randn(rows, 80)}


def test_rotation_touches_head_0_only_and_turns_neighbours() -> None:
    rotary = RotaryEmbedding(8)(5)
    x = torch.randn(2, 5, 3, 4, 8)  # q, k and v of 4 heads
    y = rotate_first_head(x, *rotary)
    assert torch.equal(y[:, :, 2], x[:, :, 2]), "v is not turned"
    assert torch.equal(y[:, :, :, 1:], x[:, :, :, 1:])
    assert torch.equal(y[:, 0], x[:, 0]), "position 0 is not turned"
    angle = torch.tensor(3.0)  # position 3, frequency 1: channels 0 and 1
    before, after = x[:, 3, :2, 0], y[:, 3, :2, 0]
    torch.testing.assert_close(after[..., 0], before[..., 0] * angle.cos() - before[..., 1] * angle.sin())
    torch.testing.assert_close(after[..., 1], before[..., 1] * angle.cos() + before[..., 0] * angle.sin())


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3])])
def test_one_time_holds_for_all_rows(t: torch.Tensor) -> None:
    module, given = dit(), inputs(9, [9, 9])
    torch.testing.assert_close(module(**{**given, "t": t}), module(**{**given, "t": t.expand(2)}))


def test_channels_enter_as_x_cond_mu_speaker() -> None:
    module, given = dit(), inputs(5, [5])
    want = module(**given)
    with torch.no_grad():
        module.input_embed.proj.weight[:, 80:160].zero_()  # cond
    cleared = {**given, "cond": torch.zeros_like(given["cond"])}
    restored = dit()
    torch.testing.assert_close(module(**given), restored(**cleared))
    assert not torch.allclose(module(**given), want)


def test_valid_frames_do_not_depend_on_padding() -> None:
    module, given = dit(), inputs(11, [11])
    wide = {k: torch.nn.functional.pad(x, (0, 6), value=2.0) if x.dim() == 3 else x for k, x in given.items()}
    wide["mask"] = torch.nn.functional.pad(given["mask"], (0, 6))
    y = module(**wide)
    torch.testing.assert_close(y[..., :11], module(**given), rtol=1e-4, atol=1e-5)
    assert y[..., 11:].any(), "the output is not masked"


def test_streaming_is_causal_by_chunks() -> None:
    module, given = dit(), inputs(12, [12])
    want = module(**given, streaming=True)
    given["x"][..., 8:] += 1
    torch.testing.assert_close(module(**given, streaming=True)[..., :8], want[..., :8])
    assert not torch.allclose(module(**given)[..., :8], want[..., :8])


def test_a_single_time_serves_all_rows() -> None:
    module, given = dit(), inputs(5, [5, 3])
    t = torch.tensor(0.3)
    torch.testing.assert_close(module(**{**given, "t": t}), module(**{**given, "t": t.expand(2)}))


def test_dropout_defaults_to_a_tenth() -> None:
    rates = {m.p for m in dit().modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.1}


def test_modulation_is_not_initialised_to_zero() -> None:
    module = dit()
    assert module.transformer_blocks[0].attn_norm.linear.weight.any()
    assert module.proj_out.weight.any()


def test_keys_are_upstreams() -> None:
    keys = dit(long_skip_connection=True).state_dict().keys()
    for key in (
        "time_embed.time_mlp.2.bias",
        "input_embed.conv_pos_embed.conv2.0.weight",
        "rotary_embed.inv_freq",
        "transformer_blocks.1.attn_norm.linear.weight",
        "transformer_blocks.1.attn.to_out.0.bias",
        "transformer_blocks.1.ff.ff.0.0.weight",
        "transformer_blocks.1.ff.ff.2.bias",
        "long_skip_connection.weight",
        "norm_out.linear.bias",
        "proj_out.weight",
    ):
        assert key in keys, key
    assert "long_skip_connection.bias" not in keys


def test_long_skip_connection_runs() -> None:
    assert dit(long_skip_connection=True)(**inputs(5, [5])).shape == (1, 80, 5)


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        DiT(32)


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_any_length_works(frames: int) -> None:
    assert dit()(**inputs(frames, [frames])).isfinite().all()


def test_a_row_of_length_0_is_finite() -> None:
    assert dit()(**inputs(6, [6, 0])).isfinite().all()
