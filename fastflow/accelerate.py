"""Swap the flow of CosyVoice's own objects for fastflow's, in place and with the same parameters."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastflow.config import FLOWS, Spec, WeightsToCome, build, check_state

_NAMES = tuple(flow.__name__ for flow in FLOWS)


def accelerate(obj: Any) -> Any:
    """Replace a CosyVoice flow by fastflow's class of the same name.

    The new module holds the *same* Parameter and buffer objects, so optimizers, parameter hooks, ``requires_grad`` and
    ``.grad`` carry on; device, dtype, the training mode of every part, and the fixed noise of the solver are kept too.
    Constructor arguments are read off the old module.  Nothing is drawn from a random generator.

    Args:
        obj: CosyVoice's ``MaskedDiffWithXvec``, ``CausalMaskedDiffWithXvec`` or ``CausalMaskedDiffWithDiT``; one of
            them in DistributedDataParallel or DataParallel; or an object that holds it as ``.flow`` (CosyVoiceModel,
            CosyVoice2Model, CosyVoice3Model) or as ``.model.flow`` (CosyVoice, CosyVoice2, CosyVoice3, AutoModel).

    Returns:
        The new module if ``obj`` is a bare flow, else ``obj``, whose flow has been replaced.  A flow that is fastflow's
        already is returned as it is.

    Raises:
        ValueError: ``obj`` holds no flow, or its flow cannot be represented; the message names the part, and ``obj`` is
            unchanged.  Refused are TorchScript encoders (``load_jit``) and TensorRT estimators (``load_trt``); and,
            since the fused path would not call them, hooks on modules and methods replaced on an object.
    """
    if isinstance(obj, FLOWS):
        return obj
    if type(obj).__name__ in _NAMES:
        return _successor(obj)
    holders = ("module",) if isinstance(obj, (DistributedDataParallel, DataParallel)) else ("flow", "model")
    for name in holders:
        inner = getattr(obj, name, None)
        if inner is not None:
            setattr(obj, name, accelerate(inner))
            return obj
    raise ValueError(f"obj must be {', '.join(_NAMES)} or hold one as .flow or .model.flow; got {type(obj).__name__}")


def _successor(old: nn.Module) -> nn.Module:
    spec = _read(old, "flow")
    with WeightsToCome():
        new = build(spec)
    check_state(new, old.state_dict(), "the flow of CosyVoice")
    _refuse_hooks(old)
    _take_modes(new, old)
    _take_tensors(new, old)
    return new


def _refuse_hooks(old: nn.Module) -> None:
    for name, module in old.named_modules(prefix="flow"):
        if hooks := [kind.strip("_") for kind, value in vars(module).items() if kind.endswith("_hooks") and value]:
            raise ValueError(f"{name} has {', '.join(hooks)}: remove them, and register them again after accelerate()")
        if replaced := [method for method in ("forward", "inference", "compute_loss") if method in vars(module)]:
            raise ValueError(f"{name}.{replaced[0]} was replaced on the object, and fastflow would not call it")


def _take_modes(new: nn.Module, old: nn.Module) -> None:
    """Training or eval, part by part; a part that exists here only follows the one around it."""
    twins = dict(old.named_modules())
    modes: dict[str, bool] = {}
    for name, module in new.named_modules():
        modes[name] = twins[name].training if name in twins else modes[name.rpartition(".")[0]]
        module.training = modes[name]
    for name, module in old.named_modules():
        if isinstance(module, nn.Dropout):
            around = name
            while around not in modes:
                around = around.rpartition(".")[0]
            if module.training != modes[around]:
                raise ValueError(
                    f"flow.{name} and flow.{around} around it differ in training mode, which cannot be kept"
                )


def _take_tensors(new: nn.Module, old: nn.Module) -> None:
    """The very Parameter and buffer objects; the state dicts are known to agree."""
    twins = dict(old.named_modules())
    for name, module in new.named_modules():
        for kind in ("_parameters", "_buffers"):
            table = getattr(module, kind)
            table.update({key: getattr(twins[name], kind)[key] for key in table})
    if isinstance(new.decoder, nn.Module) and hasattr(old.decoder, "rand_noise"):
        new.decoder.rand_noise = old.decoder.rand_noise


def _read(module: Any, where: str) -> Spec:
    """The spec of one of CosyVoice's modules, from its attributes and the shapes of its parameters."""
    name = type(module).__name__
    if isinstance(module, ScriptModule):
        raise ValueError(f"{where} is a TorchScript module, which hides its settings: use load_jit=False")
    if not isinstance(module, nn.Module):
        raise ValueError(f"{where} must be a torch module; got {name} (for a TensorRT engine: use load_trt=False)")
    if name not in _READERS:
        raise ValueError(f"{where} must be one of {', '.join(_READERS)}; got {name}")
    try:
        return {"class": name, **_READERS[name](module, where)}
    except (AttributeError, IndexError) as error:
        raise ValueError(f"{where} is named {name} but not built as CosyVoice's: {error}") from error


def _same(values: Iterable[Any], what: str) -> Any:
    """The value that all parts have in common."""
    distinct = set(values)
    if len(distinct) != 1:
        raise ValueError(f"{what} must be the same throughout; got {sorted(distinct)}")
    return distinct.pop()


def _flow(flow: Any, where: str) -> Spec:
    if hasattr(flow, "speech_token_extractor"):
        raise ValueError(f"{where}.speech_token_extractor: put speech_token into the batch and unset onnx_path instead")
    names = ("input_size", "output_size", "output_type", "vocab_size", "input_frame_rate", "only_mask_loss")
    return {
        **{name: getattr(flow, name) for name in names},
        "spk_embed_dim": flow.spk_embed_affine_layer.in_features,
        "decoder": _read(flow.decoder, f"{where}.decoder"),
    }


def _flow1(flow: Any, where: str) -> Spec:
    parts = {name: _read(getattr(flow, name), f"{where}.{name}") for name in ("encoder", "length_regulator")}
    return {**_flow(flow, where), **parts}


def _causal_flow(part: str) -> Callable[[Any, str], Spec]:
    def read(flow: Any, where: str) -> Spec:
        return {
            **_flow(flow, where),
            "token_mel_ratio": flow.token_mel_ratio,
            "pre_lookahead_len": flow.pre_lookahead_len,
            part: _read(getattr(flow, part), f"{where}.{part}"),
        }

    return read


# What CosyVoice's yaml files call the classes inside an encoder; others go by their own name and are refused in build.
_YAML_NAMES = {
    "LinearNoSubsampling": "linear",
    "EspnetRelPositionalEncoding": "rel_pos_espnet",
    "RelPositionMultiHeadedAttention": "rel_selfattn",
    "SiLU": "swish",
    "Swish": "swish",
}


def _yaml_name(module: nn.Module) -> str:
    return _YAML_NAMES.get(type(module).__name__, type(module).__name__)


def _encoder(encoder: Any, where: str) -> Spec:
    if type(encoder).__name__ == "ConformerEncoder" and encoder.use_dynamic_chunk:
        raise ValueError(f"{where}: use_dynamic_chunk must be False, as in the published configurations; got True")
    layer = encoder.encoders[0]
    rates: dict[str, set[float]] = {}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Dropout):
            kind = {"self_attn.dropout": "attention_", "pos_enc.dropout": "positional_"}
            rate = kind.get(".".join(name.split(".")[-2:]), "") + "dropout_rate"
            rates.setdefault(rate, set()).add(module.p)
    return {
        "input_size": encoder.embed.out[0].in_features,
        "output_size": encoder.output_size(),
        "attention_heads": layer.self_attn.h,
        "linear_units": layer.feed_forward.w_1.out_features,
        "num_blocks": len(encoder.encoders),
        **{rate: _same(values, f"{where}: {rate}") for rate, values in rates.items()},
        "input_layer": _yaml_name(encoder.embed),
        "pos_enc_layer_type": _yaml_name(encoder.embed.pos_enc),
        "selfattention_layer_type": _yaml_name(layer.self_attn),
        "activation_type": _yaml_name(layer.feed_forward.activation),
        "normalize_before": encoder.normalize_before,
        "static_chunk_size": encoder.static_chunk_size,
        "use_dynamic_chunk": encoder.use_dynamic_chunk,
        "use_dynamic_left_chunk": encoder.use_dynamic_left_chunk,
        "global_cmvn": encoder.global_cmvn,
        "macaron_style": layer.feed_forward_macaron is not None,
        "use_cnn_module": layer.conv_module is not None,
        "key_bias": layer.self_attn.linear_k.bias is not None,
        "gradient_checkpointing": encoder.gradient_checkpointing,
    }


def _lookahead(layer: Any, where: str) -> Spec:
    return {name: getattr(layer, name) for name in ("in_channels", "channels", "pre_lookahead_len")}


def _regulator(regulator: Any, where: str) -> Spec:
    groups = [norm.num_groups for norm in regulator.model if isinstance(norm, nn.GroupNorm)]
    return {
        "channels": regulator.model[0].in_channels,
        "sampling_ratios": regulator.sampling_ratios,
        "out_channels": regulator.model[-1].out_channels,
        "groups": _same(groups, f"{where}: groups") if groups else 1,
    }


def _cfm(cfm: Any, where: str) -> Spec:
    params = ("solver", "sigma_min", "t_scheduler", "training_cfg_rate", "inference_cfg_rate")
    return {
        "in_channels": cfm.n_feats,
        "n_spks": cfm.n_spks,
        "spk_emb_dim": cfm.spk_emb_dim,
        "cfm_params": {name: getattr(cfm, name) for name in params},
        "estimator": _read(cfm.estimator, f"{where}.estimator"),
    }


def _dropout(module: nn.Module, where: str) -> float:
    return _same((part.p for part in module.modules() if isinstance(part, nn.Dropout)), f"{where}: dropout")


def _activation(module: Any) -> str:
    """CosyVoice's name of an activation if it is the exact GELU, else the class's own, which build refuses."""
    name, approximate = type(module).__name__, getattr(module, "approximate", None)
    return "gelu" if (name, approximate) == ("GELU", "none") else f"{name} (approximate={approximate})"


def _unet(unet: Any, where: str) -> Spec:
    stages = [*unet.down_blocks, *unet.mid_blocks, *unet.up_blocks]
    blocks = [block for stage in stages for block in stage[1]]
    heads = _same((block.attn1.heads for block in blocks), f"{where}: num_heads")
    activation = _same((_activation(block.ff.net[0]) for block in blocks), f"{where}: act_fn")
    return {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "channels": [stage[0].res_conv.out_channels for stage in unet.down_blocks],
        "dropout": _dropout(unet, where),
        "attention_head_dim": blocks[0].attn1.to_q.out_features // heads,
        "n_blocks": _same((len(stage[1]) for stage in stages), f"{where}: n_blocks"),
        "num_mid_blocks": len(unet.mid_blocks),
        "num_heads": heads,
        "act_fn": activation,
    }


def _chunks(estimator: Any) -> Spec:
    return {name: getattr(estimator, name) for name in ("static_chunk_size", "num_decoding_left_chunks")}


def _causal_unet(unet: Any, where: str) -> Spec:
    return {**_unet(unet, where), **_chunks(unet)}


def _dit(dit: Any, where: str) -> Spec:
    attention, feed_forward = dit.transformer_blocks[0].attn, dit.transformer_blocks[0].ff
    heads = _same((block.attn.heads for block in dit.transformer_blocks), f"{where}: heads")
    mel_dim, spk_dim = dit.proj_out.out_features, dit.input_embed.spk_dim
    return {
        "dim": dit.dim,
        "depth": len(dit.transformer_blocks),
        "heads": heads,
        "dim_head": attention.to_q.out_features // heads,
        "dropout": _dropout(dit, where),
        "ff_mult": feed_forward.ff[0][0].out_features // dit.dim,
        "mel_dim": mel_dim,
        "mu_dim": dit.input_embed.proj.in_features - 2 * mel_dim - spk_dim,
        "long_skip_connection": dit.long_skip_connection is not None,
        "spk_dim": spk_dim,
        "out_channels": dit.out_channels,
        **_chunks(dit),
    }


_READERS: dict[str, Callable[[Any, str], Spec]] = {
    "MaskedDiffWithXvec": _flow1,
    "CausalMaskedDiffWithXvec": _causal_flow("encoder"),
    "CausalMaskedDiffWithDiT": _causal_flow("pre_lookahead_layer"),
    "ConformerEncoder": _encoder,
    "UpsampleConformerEncoder": _encoder,
    "PreLookaheadLayer": _lookahead,
    "InterpolateRegulator": _regulator,
    "ConditionalCFM": _cfm,
    "CausalConditionalCFM": _cfm,
    "ConditionalDecoder": _unet,
    "CausalConditionalDecoder": _causal_unet,
    "DiT": _dit,
}
