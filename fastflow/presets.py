"""The presets: flows of known sizes, written as specs (see :mod:`fastflow.config`)."""

import copy
from typing import Any

Spec = dict[str, Any]


def _flow(name: str, input_size: int, vocab_size: int, input_frame_rate: int, **parts: Any) -> Spec:
    sizes = {"input_size": input_size, "output_size": 80, "spk_embed_dim": 192, "vocab_size": vocab_size}
    return {"class": name, **sizes, "input_frame_rate": input_frame_rate, **parts}


def _encoder(name: str, width: int, heads: int, units: int, blocks: int, dropout: float, **more: Any) -> Spec:
    return {
        "class": name,
        "input_size": width,
        "output_size": width,
        "attention_heads": heads,
        "linear_units": units,
        "num_blocks": blocks,
        "dropout_rate": dropout,
        "positional_dropout_rate": dropout,
        "attention_dropout_rate": dropout,
        "normalize_before": True,
        "input_layer": "linear",
        "pos_enc_layer_type": "rel_pos_espnet",
        "selfattention_layer_type": "rel_selfattn",
        "use_cnn_module": False,
        "macaron_style": False,
        **more,
    }


def _decoder(name: str, estimator: Spec) -> Spec:
    cfm_params = {
        "sigma_min": 1e-6,
        "solver": "euler",
        "t_scheduler": "cosine",
        "training_cfg_rate": 0.2,
        "inference_cfg_rate": 0.7,
        "reg_loss_type": "l1",
    }
    sizes = {"in_channels": 240, "n_spks": 1, "spk_emb_dim": 80}
    return {"class": name, **sizes, "cfm_params": cfm_params, "estimator": estimator}


def _unet(name: str, channels: list[int], mid: int, heads: int, head_dim: int, n_blocks: int, **more: Any) -> Spec:
    return {
        "class": name,
        "in_channels": 320,
        "out_channels": 80,
        "channels": channels,
        "dropout": 0.0,
        "attention_head_dim": head_dim,
        "n_blocks": n_blocks,
        "num_mid_blocks": mid,
        "num_heads": heads,
        "act_fn": "gelu",
        **more,
    }


def _v1(encoder: dict[str, Any], unet: dict[str, Any]) -> Spec:
    return _flow(
        "MaskedDiffWithXvec",
        input_size=encoder["width"],
        vocab_size=4096,
        input_frame_rate=50,
        encoder=_encoder("ConformerEncoder", **encoder),
        length_regulator={"class": "InterpolateRegulator", "channels": 80, "sampling_ratios": [1, 1, 1, 1]},
        decoder=_decoder("ConditionalCFM", _unet("ConditionalDecoder", **unet)),
    )


def _v2(encoder: dict[str, Any], unet: dict[str, Any]) -> Spec:
    chunks: dict[str, Any] = {"static_chunk_size": 50, "num_decoding_left_chunks": -1}
    return _flow(
        "CausalMaskedDiffWithXvec",
        input_size=encoder["width"],
        vocab_size=6561,
        input_frame_rate=25,
        token_mel_ratio=2,
        pre_lookahead_len=3,
        encoder=_encoder("UpsampleConformerEncoder", **encoder, static_chunk_size=25),
        decoder=_decoder("CausalConditionalCFM", _unet("CausalConditionalDecoder", **unet, **chunks)),
    )


def _v3(lookahead: int, **dit: Any) -> Spec:
    sizes = {"mel_dim": 80, "mu_dim": 80, "spk_dim": 80, "out_channels": 80}
    chunks: dict[str, Any] = {"static_chunk_size": 50, "num_decoding_left_chunks": -1}
    layer = {"class": "PreLookaheadLayer", "in_channels": 80, "channels": lookahead, "pre_lookahead_len": 3}
    return _flow(
        "CausalMaskedDiffWithDiT",
        input_size=80,
        vocab_size=6561,
        input_frame_rate=25,
        token_mel_ratio=2,
        pre_lookahead_len=3,
        pre_lookahead_layer=layer,
        decoder=_decoder("CausalConditionalCFM", {"class": "DiT", **dit, **sizes, **chunks}),
    )


_ENCODER: dict[str, Any] = {"width": 512, "heads": 8, "units": 2048, "blocks": 6, "dropout": 0.1}
_UNET: dict[str, Any] = {"mid": 12, "heads": 8, "head_dim": 64, "n_blocks": 4}
# The tiny ones keep the structure and shrink the widths; no dropout, because they are there to learn one utterance.
_TINY_ENCODER: dict[str, Any] = {"width": 64, "heads": 4, "units": 256, "blocks": 2, "dropout": 0.0}
_TINY_UNET: dict[str, Any] = {"mid": 2, "heads": 4, "head_dim": 32, "n_blocks": 1}

PRESETS: dict[str, Spec] = {
    "cosyvoice": _v1(_ENCODER, {"channels": [256, 256], **_UNET}),
    "cosyvoice2": _v2(_ENCODER, {"channels": [256], **_UNET}),
    "cosyvoice3": _v3(1024, dim=1024, depth=22, heads=16, dim_head=64, ff_mult=2),
    "cosyvoice-fromscratch": _v1(
        {**_ENCODER, "heads": 4, "units": 1024, "blocks": 3}, {"channels": [256, 256], **_UNET, "mid": 8}
    ),
    "tiny": _v1(_TINY_ENCODER, {"channels": [64, 64], **_TINY_UNET}),
    "tiny2": _v2(_TINY_ENCODER, {"channels": [64], **_TINY_UNET}),
    "tiny3": _v3(128, dim=128, depth=4, heads=4, dim_head=32, ff_mult=2, dropout=0.0),
}


def preset(name: str) -> Spec:
    """The spec of a preset, a copy to read or to change and :func:`build`.

    Args:
        name: ``cosyvoice``, ``cosyvoice2``, ``cosyvoice3`` (the published sizes), ``cosyvoice-fromscratch`` (the
            smaller v1 recipe), or ``tiny``, ``tiny2``, ``tiny3`` (v1, v2, v3 for demonstrations and tests).

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}; got {name!r}")
    return copy.deepcopy(PRESETS[name])
