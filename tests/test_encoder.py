"""The token encoders: what upstream's quirks promise."""

import pytest
import torch

from fastflow import ConformerEncoder, PreLookaheadLayer, UpsampleConformerEncoder
from fastflow.encoder import relative_positions
from fastflow.testing.counters import SavedTensors

PUBLISHED = {
    "input_layer": "linear",
    "pos_enc_layer_type": "rel_pos_espnet",
    "macaron_style": False,
    "use_cnn_module": False,
}


def encoder(cls: type = ConformerEncoder, **options):
    torch.manual_seed(0)
    return cls(16, 32, 4, 64, 2, **{**PUBLISHED, **options}).eval()


def test_positions_run_from_far_left_to_far_right() -> None:
    table = relative_positions(4, 8, torch.zeros(1))[0]
    assert table.shape == (7, 8)
    torch.testing.assert_close(table[3], torch.tensor([0.0, 1.0] * 4))  # distance 0: sine 0, cosine 1
    torch.testing.assert_close(table[0, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(table[6, 0], torch.tensor(-3.0).sin())


def test_layer_norms_have_upstreams_eps() -> None:
    module = encoder()
    eps = {name: m.eps for name, m in module.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {name: e for name, e in eps.items() if e != 1e-12} == {"embed.out.1": 1e-5, "after_norm": 1e-5}


def test_only_the_position_projection_lacks_a_bias() -> None:
    linears = {name: m for name, m in encoder().named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name.rpartition(".")[2] for name, m in linears.items() if m.bias is None} == {"linear_pos"}


def test_padded_rows_are_computed_not_zeroed() -> None:
    h, masks = encoder()(torch.randn(2, 7, 16), torch.tensor([7, 4]))
    assert masks.tolist() == [[[True] * 7], [[True] * 4 + [False] * 3]]
    assert h[1, 4:].isfinite().all()
    assert h[1, 4:].abs().min() > 0


@pytest.mark.parametrize("cls", [ConformerEncoder, UpsampleConformerEncoder])
def test_padding_does_not_reach_valid_frames_through_attention(cls: type) -> None:
    module, x, lengths = encoder(cls), torch.randn(2, 9, 16), torch.tensor([9, 5])
    want, _ = module(x, lengths)
    x[1, 8:] += 100  # further away than the look-ahead of 3
    got, masks = module(x, lengths)
    torch.testing.assert_close(got[masks[:, 0]], want[masks[:, 0]])


def test_a_row_of_length_0_is_finite() -> None:
    h, masks = encoder()(torch.randn(2, 5, 16), torch.tensor([5, 0]))
    assert h.isfinite().all()
    assert not masks[1].any()


def test_upsampling_doubles_frames_and_masks() -> None:
    module = encoder(UpsampleConformerEncoder)
    h, masks = module(torch.randn(2, 6, 16), torch.tensor([6, 2]))
    assert h.shape == (2, 12, 32)
    assert masks.sum(-1).flatten().tolist() == [12, 4]
    assert len(module.up_encoders) == 4


def test_streaming_sees_its_own_chunk_and_the_past() -> None:
    module, x = encoder(UpsampleConformerEncoder, static_chunk_size=3), torch.randn(1, 12, 16)
    lengths = torch.tensor([12])
    want, _ = module(x, lengths, streaming=True)
    x[:, 9:] += 1  # the last chunk; the look-ahead of 3 reaches back to token 6
    got, _ = module(x, lengths, streaming=True)
    assert torch.equal(got[:, :12], want[:, :12])
    assert not torch.allclose(got[:, 18:], want[:, 18:])
    assert not torch.allclose(module(x, lengths)[0][:, :12], want[:, :12])


def test_context_stands_for_the_tokens_after() -> None:
    module, x = encoder(UpsampleConformerEncoder, static_chunk_size=3), torch.randn(1, 9, 16)
    whole, _ = module(x, torch.tensor([9]), streaming=True)
    part, _ = module(x[:, :6], torch.tensor([9]), context=x[:, 6:], streaming=True)
    torch.testing.assert_close(part, whole[:, :12])


def test_without_context_the_look_ahead_sees_zeros() -> None:
    torch.manual_seed(0)
    layer = PreLookaheadLayer(8, 16, 3).eval()
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer(x), layer(x, context=torch.zeros(1, 3, 8)))
    assert layer(x, context=torch.zeros(1, 0, 8)).shape == x.shape


def test_context_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match="context must hold 3 tokens, got 2"):
        PreLookaheadLayer(8, 16, 3).eval()(torch.zeros(1, 5, 8), context=torch.zeros(1, 2, 8))


def test_context_is_for_inference() -> None:
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        PreLookaheadLayer(8, 16, 3)(torch.zeros(1, 5, 8), context=torch.zeros(1, 3, 8))


def test_gradient_checkpointing_saves_less_and_changes_nothing() -> None:
    saved, results = {}, {}
    for keep_less in (False, True):
        module = encoder(gradient_checkpointing=keep_less, dropout_rate=0.1, attention_dropout_rate=0.1).train()
        x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
        with SavedTensors(module.parameters()) as tensors:
            h, _ = module(x, torch.tensor([9, 5]))
        saved[keep_less] = tensors.bytes
        results[keep_less] = torch.autograd.grad(h.square().sum(), list(module.parameters()))
    assert saved[True] < saved[False] / 3
    for got, want in zip(results[True], results[False], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "value"),
    [("input_layer", "conv2d"), ("pos_enc_layer_type", "rel_pos"), ("macaron_style", True), ("use_cnn_module", True)],
)
def test_other_architectures_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        ConformerEncoder(16, 32, 4, 64, 2, **{**PUBLISHED, name: value})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="output_size 30 is not a multiple of attention_heads 4"):
        ConformerEncoder(16, 30, 4, **PUBLISHED)
