"""accelerate(): the flow of CosyVoice's objects is replaced, and everything that belongs to its owner stays.

CosyVoice itself is not installed here.  The stand-ins below have the class names, attributes and parameter shapes of
its modules and no computation; what the new module computes is compared with one built from the specification.
"""

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastflow
from fastflow.accelerate import accelerate
from fastflow.config import build, preset

VERSIONS = ["tiny", "tiny2", "tiny3"]


# ------------------------------------------------------------------------------------------------ stand-ins
def part(kind: str, /, **attributes: Any) -> Any:
    """A module whose class is called ``kind``, with these attributes."""
    module = type(kind, (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def fake_layer(spec: dict) -> nn.Module:
    width, heads, units = spec["output_size"], spec["attention_heads"], spec["linear_units"]
    attention = part(
        "RelPositionMultiHeadedAttention",
        h=heads,
        d_k=width // heads,
        linear_pos=nn.Linear(width, width, bias=False),
        pos_bias_u=nn.Parameter(torch.empty(heads, width // heads)),
        pos_bias_v=nn.Parameter(torch.empty(heads, width // heads)),
        dropout=nn.Dropout(spec["attention_dropout_rate"]),
        linear_k=nn.Linear(width, width, bias=spec.get("key_bias", True)),
        **{f"linear_{name}": nn.Linear(width, width) for name in ("q", "v", "out")},
    )
    feed_forward = part(
        "PositionwiseFeedForward",
        w_1=nn.Linear(width, units),
        activation=nn.SiLU(),
        dropout=nn.Dropout(spec["dropout_rate"]),
        w_2=nn.Linear(units, width),
    )
    return part(
        "ConformerEncoderLayer",
        self_attn=attention,
        feed_forward=feed_forward,
        feed_forward_macaron=None,
        conv_module=None,
        norm_ff=nn.LayerNorm(width, eps=1e-12),
        norm_mha=nn.LayerNorm(width, eps=1e-12),
        dropout=nn.Dropout(spec["dropout_rate"]),
    )


def fake_embed(width_in: int, spec: dict) -> nn.Module:
    width = spec["output_size"]
    position = part("EspnetRelPositionalEncoding", dropout=nn.Dropout(spec["positional_dropout_rate"]))
    out = nn.Sequential(nn.Linear(width_in, width), nn.LayerNorm(width), nn.Dropout(spec["dropout_rate"]))
    return part("LinearNoSubsampling", out=out, pos_enc=position)


def fake_encoder(spec: dict) -> nn.Module:
    width = spec["output_size"]
    encoder = part(
        spec["class"],
        output_size=lambda: width,
        embed=fake_embed(spec["input_size"], spec),
        global_cmvn=None,
        normalize_before=True,
        after_norm=nn.LayerNorm(width),
        static_chunk_size=spec.get("static_chunk_size", 0),
        use_dynamic_chunk=False,
        use_dynamic_left_chunk=False,
        gradient_checkpointing=False,
        encoders=nn.ModuleList(fake_layer(spec) for _ in range(spec["num_blocks"])),
    )
    if spec["class"] == "UpsampleConformerEncoder":
        encoder.pre_lookahead_layer = fake_lookahead({"in_channels": width, "channels": width, "pre_lookahead_len": 3})
        encoder.up_layer = part("Upsample1D", conv=nn.Conv1d(width, width, 5))
        encoder.up_embed = fake_embed(width, spec)
        encoder.up_encoders = nn.ModuleList(fake_layer(spec) for _ in range(4))
    return encoder


def fake_lookahead(spec: dict) -> nn.Module:
    width, inner, ahead = spec["in_channels"], spec["channels"], spec["pre_lookahead_len"]
    convs = {"conv1": nn.Conv1d(width, inner, ahead + 1), "conv2": nn.Conv1d(inner, width, 3)}
    return part("PreLookaheadLayer", in_channels=width, channels=inner, pre_lookahead_len=ahead, **convs)


def fake_regulator(spec: dict) -> nn.Module:
    width, layers = spec["channels"], []
    for _ in spec["sampling_ratios"]:
        layers += [nn.Conv1d(width, width, 3, padding=1), nn.GroupNorm(spec.get("groups", 1), width), nn.Mish()]
    model = nn.Sequential(*layers, nn.Conv1d(width, width, 1))
    return part("InterpolateRegulator", sampling_ratios=spec["sampling_ratios"], model=model)


def fake_unet(spec: dict) -> nn.Module:
    causal = spec["class"].startswith("Causal")
    channels, heads, head_dim = spec["channels"], spec["num_heads"], spec["attention_head_dim"]
    time_width = 4 * channels[0]

    def block(dim: int, dim_out: int) -> nn.Module:
        norm = [nn.Identity(), nn.LayerNorm(dim_out)] if causal else [nn.GroupNorm(8, dim_out)]
        return part("Block1D", block=nn.Sequential(nn.Conv1d(dim, dim_out, 3), *norm))

    def transformer(dim: int) -> nn.Module:
        projections = {f"to_{name}": nn.Linear(dim, heads * head_dim, bias=False) for name in "qkv"}
        out = nn.ModuleList([nn.Linear(heads * head_dim, dim), nn.Dropout(spec["dropout"])])
        gelu = part("GELU", approximate="none", proj=nn.Linear(dim, 4 * dim))
        return part(
            "BasicTransformerBlock",
            norm1=nn.LayerNorm(dim),
            attn1=part("Attention", heads=heads, to_out=out, **projections),
            norm3=nn.LayerNorm(dim),
            ff=part("FeedForward", net=nn.ModuleList([gelu, nn.Dropout(spec["dropout"]), nn.Linear(4 * dim, dim)])),
        )

    def stage(dim: int, dim_out: int, *resample: nn.Module) -> nn.ModuleList:
        resnet = part(
            "ResnetBlock1D",
            mlp=nn.Sequential(nn.Mish(), nn.Linear(time_width, dim_out)),
            block1=block(dim, dim_out),
            block2=block(dim_out, dim_out),
            res_conv=nn.Conv1d(dim, dim_out, 1),
        )
        blocks = nn.ModuleList(transformer(dim_out) for _ in range(spec["n_blocks"]))
        return nn.ModuleList([resnet, blocks, *resample])

    down, up, last = nn.ModuleList(), nn.ModuleList(), len(channels) - 1
    for i, (dim, width) in enumerate(zip([spec["in_channels"], *channels], channels, strict=False)):
        conv = nn.Conv1d(width, width, 3)
        down.append(stage(dim, width, conv if i == last else part("Downsample1D", conv=conv)))
    for j, (dim, width) in enumerate(zip(channels[::-1], [*channels[::-1][1:], channels[0]], strict=True)):
        transposed = part("Upsample1D", conv=nn.ConvTranspose1d(width, width, 4))
        up.append(stage(2 * dim, width, nn.Conv1d(width, width, 3) if j == last else transposed))
    time_mlp = {"linear_1": nn.Linear(spec["in_channels"], time_width), "linear_2": nn.Linear(time_width, time_width)}
    names = ("in_channels", "out_channels", "static_chunk_size", "num_decoding_left_chunks")
    return part(
        spec["class"],
        **{name: spec[name] for name in names if name in spec},
        time_mlp=part("TimestepEmbedding", **time_mlp),
        down_blocks=down,
        mid_blocks=nn.ModuleList(stage(channels[-1], channels[-1]) for _ in range(spec["num_mid_blocks"])),
        up_blocks=up,
        final_block=block(channels[0], channels[0]),
        final_proj=nn.Conv1d(channels[0], spec["out_channels"], 1),
    )


def fake_dit(spec: dict) -> nn.Module:
    dim, inner = spec["dim"], spec["heads"] * spec["dim_head"]

    def conv() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(dim, dim, 31, groups=16), nn.Mish())

    def block() -> nn.Module:
        projections = {f"to_{name}": nn.Linear(dim, inner) for name in "qkv"}
        out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(spec["dropout"])])
        project = nn.Sequential(nn.Linear(dim, spec["ff_mult"] * dim), nn.GELU(approximate="tanh"))
        ff = nn.Sequential(project, nn.Dropout(spec["dropout"]), nn.Linear(spec["ff_mult"] * dim, dim))
        return part(
            "DiTBlock",
            attn_norm=part("AdaLayerNormZero", linear=nn.Linear(dim, 6 * dim)),
            attn=part("Attention", heads=spec["heads"], inner_dim=inner, to_out=out, **projections),
            ff=part("FeedForward", ff=ff),
        )

    time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
    rotary = part("RotaryEmbedding")
    rotary.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, spec["dim_head"], 2) / spec["dim_head"]))
    channels = 2 * spec["mel_dim"] + spec["mu_dim"] + spec["spk_dim"]
    return part(
        "DiT",
        dim=dim,
        depth=spec["depth"],
        out_channels=spec["out_channels"],
        static_chunk_size=spec["static_chunk_size"],
        num_decoding_left_chunks=spec["num_decoding_left_chunks"],
        time_embed=part("TimestepEmbedding", time_mlp=time_mlp),
        input_embed=part(
            "InputEmbedding",
            spk_dim=spec["spk_dim"],
            proj=nn.Linear(channels, dim),
            conv_pos_embed=part("CausalConvPositionEmbedding", conv1=conv(), conv2=conv()),
        ),
        rotary_embed=rotary,
        transformer_blocks=nn.ModuleList(block() for _ in range(spec["depth"])),
        long_skip_connection=nn.Linear(2 * dim, dim, bias=False) if spec.get("long_skip_connection") else None,
        norm_out=part("AdaLayerNormZero_Final", linear=nn.Linear(dim, 2 * dim)),
        proj_out=nn.Linear(dim, spec["mel_dim"]),
    )


FAKES = {"encoder": fake_encoder, "length_regulator": fake_regulator, "pre_lookahead_layer": fake_lookahead}


def fake_flow(spec: dict) -> Any:
    """CosyVoice's flow of this spec, as far as its attributes go."""
    decoder = spec["decoder"]
    cfm = part(
        decoder["class"],
        n_feats=decoder["in_channels"],
        n_spks=decoder["n_spks"],
        spk_emb_dim=decoder["spk_emb_dim"],
        estimator=(fake_dit if decoder["estimator"]["class"] == "DiT" else fake_unet)(decoder["estimator"]),
        **{name: value for name, value in decoder["cfm_params"].items() if name != "reg_loss_type"},
    )
    if decoder["class"] == "CausalConditionalCFM":
        cfm.rand_noise = torch.randn(1, 80, 500)
    names = ("input_size", "output_size", "vocab_size", "input_frame_rate", "token_mel_ratio", "pre_lookahead_len")
    flow = part(
        spec["class"],
        **{name: spec[name] for name in names if name in spec},
        output_type="mel",
        only_mask_loss=True,
        decoder_conf={},
        input_embedding=nn.Embedding(spec["vocab_size"], spec["input_size"]),
        spk_embed_affine_layer=nn.Linear(spec["spk_embed_dim"], spec["output_size"]),
        decoder=cfm,
        **{name: fake(spec[name]) for name, fake in FAKES.items() if name in spec},
    )
    if "encoder" in spec:
        flow.encoder_proj = nn.Linear(spec["encoder"]["output_size"], spec["output_size"])
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    return flow


def odd_spec(name: str) -> dict:
    """No argument at its default, so that one that is not read shows."""
    spec = preset(name)
    spec.update(vocab_size=30, spk_embed_dim=16, input_frame_rate=40)
    spec["decoder"]["cfm_params"].update(
        sigma_min=0.01, t_scheduler="linear", training_cfg_rate=0.3, inference_cfg_rate=0.5
    )
    rates = {"dropout_rate": 0.2, "positional_dropout_rate": 0.3, "attention_dropout_rate": 0.4}
    if "encoder" in spec:
        spec["encoder"].update(**rates, attention_heads=8, key_bias=False, static_chunk_size=3)
    estimator = spec["decoder"]["estimator"]
    if name == "tiny3":
        spec["pre_lookahead_len"] = spec["pre_lookahead_layer"]["pre_lookahead_len"] = 2
        estimator["long_skip_connection"] = True
        spec["token_mel_ratio"] = 3
    else:
        estimator.update(n_blocks=2, num_mid_blocks=1, num_heads=2)
    if name == "tiny":
        spec["length_regulator"]["groups"] = 2
    else:
        estimator["static_chunk_size"] = 6
    estimator["dropout"] = 0.25
    return spec


def batch_for(spec: dict) -> dict[str, torch.Tensor]:
    token_len = torch.tensor([12, 7])
    feat_len = spec.get("token_mel_ratio", 2) * token_len
    return {
        "speech_token": torch.randint(0, spec["vocab_size"], (2, 12)),
        "speech_token_len": token_len,
        "speech_feat": torch.randn(2, int(feat_len[0]), 80),
        "speech_feat_len": feat_len,
        "embedding": torch.randn(2, spec["spk_embed_dim"]),
    }


def step(flow: nn.Module, batch: dict, seed: int) -> torch.Tensor:
    random.seed(seed)
    torch.manual_seed(seed)
    loss = flow(batch, "cpu")["loss"]
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------------------------------------------ the swap
@pytest.mark.parametrize("name", VERSIONS)
def test_the_new_flow_has_the_same_parameters_and_buffers(name: str) -> None:
    old = fake_flow(preset(name))
    new = accelerate(old)
    assert isinstance(new, getattr(fastflow, type(old).__name__))
    before, after = old.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert len(list(new.parameters())) == len(list(old.parameters()))


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("seed", [1, 2])  # in CosyVoice 2 and 3, one is a streaming step and one is not
def test_it_computes_what_the_constructor_arguments_say(name: str, seed: int) -> None:
    """Loss and gradients, dropout included, are those of a flow built with the same arguments: all were read."""
    spec = odd_spec(name)
    new = accelerate(fake_flow(spec))
    want = build(spec)
    want.load_state_dict(new.state_dict())
    batch = batch_for(spec)
    assert torch.equal(step(new, batch, seed), step(want, batch, seed))
    expected = {key: p.grad for key, p in want.named_parameters()}
    assert all(torch.equal(p.grad, expected[key]) for key, p in new.named_parameters())


@pytest.mark.parametrize("name", VERSIONS)
def test_inference_settings_are_kept(name: str) -> None:
    spec = odd_spec(name)
    new = accelerate(fake_flow(spec).eval())
    want = build(spec).eval()
    want.load_state_dict(new.state_dict())
    call = {
        "token": torch.randint(0, 30, (1, 20)),
        "token_len": torch.tensor([20]),
        "prompt_token": torch.randint(0, 30, (1, 5)),
        "prompt_token_len": torch.tensor([5]),
        "prompt_feat": torch.randn(1, 10, 80),
        "prompt_feat_len": torch.tensor([10]),
        "embedding": torch.randn(1, 16),
    }
    if name == "tiny":
        call["flow_cache"] = torch.zeros(1, 80, 0, 2)
    else:
        call.update(streaming=True, finalize=False)
        want.decoder.rand_noise = new.decoder.rand_noise
    mels = []
    for flow in (new, want):
        torch.manual_seed(0)
        mels.append(flow.inference(**call)[0])
    assert torch.equal(*mels)
    for attribute in ("input_frame_rate", "token_mel_ratio", "pre_lookahead_len", "vocab_size"):
        assert getattr(new, attribute, None) == spec.get(attribute)


@pytest.mark.parametrize("name", ["tiny2", "tiny3"])
def test_the_fixed_noise_is_carried_over(name: str) -> None:
    old = fake_flow(preset(name))
    assert accelerate(old).decoder.rand_noise is old.decoder.rand_noise


def test_optimizer_hooks_and_gradients_carry_on() -> None:
    spec = preset("tiny")
    old = fake_flow(spec)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    seen: list[torch.Tensor] = []
    old.encoder_proj.weight.register_hook(seen.append)
    old.decoder.estimator.requires_grad_(False)
    old.input_embedding.weight.grad = grad = torch.zeros_like(old.input_embedding.weight)
    new = accelerate(old)
    assert not any(p.requires_grad for p in new.decoder.parameters())
    assert new.input_embedding.weight.grad is grad
    before = copy.deepcopy(new.state_dict())
    step(new, {**batch_for(spec), "embedding": torch.randn(2, 192)}, 3)
    optimizer.step()
    assert len(seen) == 1
    assert torch.equal(new.encoder_proj.weight, before["encoder_proj.weight"] - 0.1 * seen[0])
    assert torch.equal(new.decoder.estimator.final_proj.weight, before["decoder.estimator.final_proj.weight"])


def test_every_part_keeps_its_mode() -> None:
    old = fake_flow(preset("tiny2")).train()
    old.encoder.eval()
    old.decoder.estimator.mid_blocks.eval()
    new = accelerate(old)
    assert new.training
    assert new.decoder.estimator.down_blocks.training
    for frozen in (new.encoder, new.decoder.estimator.mid_blocks):
        assert not any(module.training for module in frozen.modules())
    for name, module in old.named_modules():
        if name in dict(new.named_modules()):
            assert new.get_submodule(name).training == module.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    new = accelerate(fake_flow(preset("tiny3")).to(dtype))
    assert {tensor.dtype for tensor in new.state_dict().values()} == {dtype}


def test_nothing_is_drawn_from_a_generator() -> None:
    old = fake_flow(preset("tiny2"))
    states = torch.get_rng_state(), random.getstate()
    accelerate(old)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# ------------------------------------------------------------------------------------------------ what may hold a flow
def test_models_and_their_owners_are_changed_in_place() -> None:
    model = SimpleNamespace(llm=nn.Linear(1, 1), flow=fake_flow(preset("tiny2")), hift=nn.Linear(1, 1))
    assert accelerate(model) is model
    assert isinstance(model.flow, fastflow.CausalMaskedDiffWithXvec)
    owner = SimpleNamespace(model=SimpleNamespace(flow=fake_flow(preset("tiny3"))), frontend=object())
    assert accelerate(owner) is owner
    assert isinstance(owner.model.flow, fastflow.CausalMaskedDiffWithDiT)


def test_a_second_time_changes_nothing() -> None:
    flow = accelerate(fake_flow(preset("tiny")))
    assert accelerate(flow) is flow
    model = SimpleNamespace(flow=flow)
    assert accelerate(model).flow is flow


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_flow_in_ddp_trains_on(tmp_path) -> None:
    spec = preset("tiny")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fake_flow(spec), find_unused_parameters=True)
        assert accelerate(wrapped) is wrapped
        assert isinstance(wrapped.module, fastflow.MaskedDiffWithXvec)
        alone = build(spec)
        alone.load_state_dict(wrapped.module.state_dict())
        batch = {**batch_for(spec), "embedding": torch.randn(2, 192)}
        assert torch.equal(step(wrapped, batch, 1), step(alone, batch, 1))
        for key, parameter in alone.named_parameters():
            assert torch.equal(wrapped.module.get_parameter(key).grad, parameter.grad)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ what is refused
def break_estimator(flow: Any) -> None:
    del flow.decoder.estimator
    flow.decoder.estimator = object()


def script_encoder(flow: Any) -> None:
    flow.encoder = torch.jit.script(nn.Linear(1, 1))


def rename(path: str, kind: str) -> Any:
    def change(flow: Any) -> None:
        module = flow.get_submodule(path)
        module.__class__ = type(kind, (type(module),), {})

    return change


def set_on(path: str, **values: Any) -> Any:
    def change(flow: Any) -> None:
        for name, value in values.items():
            setattr(flow.get_submodule(path), name, value)

    return change


BLOCK = "decoder.estimator.mid_blocks.0.1.0"
REFUSED = {
    "TensorRT": (break_estimator, r"flow\.decoder\.estimator must be a torch module; got object .*load_trt=False"),
    "no estimator": (
        set_on("decoder", estimator=None),
        r"flow\.decoder\.estimator must be a torch module; got NoneType",
    ),
    "TorchScript": (script_encoder, r"flow\.encoder is a TorchScript module.*load_jit=False"),
    "another encoder": (rename("encoder", "MyEncoder"), r"flow\.encoder must be one of .*; got MyEncoder"),
    "another layer": (
        set_on("encoder", embed=nn.Linear(1, 1)),
        r"flow\.encoder is named ConformerEncoder but not built",
    ),
    "input layer": (rename("encoder.embed", "LegacyLinear"), r"flow\.encoder .*: input_layer must be 'linear'"),
    "activation": (rename(f"{BLOCK}.ff.net.0", "GEGLU"), r"act_fn must be the same throughout; got .*GEGLU"),
    "tanh": (set_on(f"{BLOCK}.ff.net.0", approximate="tanh"), r"act_fn must be the same .*approximate=tanh"),
    "heads": (set_on(f"{BLOCK}.attn1", heads=2), r"flow\.decoder\.estimator: num_heads must be the same .* \[2, 4\]"),
    "uneven dropout": (set_on("encoder.encoders.1.dropout", p=0.5), r"flow\.encoder: dropout_rate .*\[0\.0, 0\.5\]"),
    "dynamic chunks": (set_on("encoder", use_dynamic_chunk=True), r"flow\.encoder: use_dynamic_chunk must be False"),
    "post-norm": (set_on("encoder", normalize_before=False), r"normalize_before must be True"),
    "cmvn": (set_on("encoder", global_cmvn=nn.Identity()), r"global_cmvn must be None"),
    "attention": (rename("encoder.encoders.0.self_attn", "Plain"), r"selfattention_layer_type must be 'rel_selfattn'"),
    "relu": (set_on("encoder.encoders.0.feed_forward", activation=nn.ReLU()), r"activation_type must be 'swish'"),
    "macaron": (set_on("encoder.encoders.0", feed_forward_macaron=nn.Identity()), r"macaron_style must be False"),
    "another key": (set_on("encoder", adapter=nn.Linear(3, 3)), r"2 unexpected: encoder\.adapter\.weight"),
    "another shape": (
        set_on("", encoder_proj=nn.Linear(7, 80)),
        r"misshapen: encoder_proj\.weight \(given \(80, 7\), expected \(80, 64\)\)",
    ),
    "online tokens": (set_on("", speech_token_extractor=object()), r"flow\.speech_token_extractor"),
    "own method": (set_on("decoder", compute_loss=print), r"flow\.decoder\.compute_loss was replaced on the object"),
    "forward hook": (
        lambda flow: flow.encoder.embed.register_forward_hook(print),
        r"flow\.encoder\.embed has forward_hooks: remove",
    ),
    "backward hook": (
        lambda flow: flow.register_full_backward_hook(print),
        r"^flow has backward_hooks: remove",
    ),
    "one dropout in eval": (
        lambda flow: flow.encoder.encoders[0].self_attn.dropout.eval(),
        r"flow\.encoder\.encoders\.0\.self_attn\.dropout and .* differ in training mode",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(case: str) -> None:
    change, message = REFUSED[case]
    model = SimpleNamespace(flow=fake_flow(preset("tiny")))
    change(model.flow)
    old, encoder_training = model.flow, model.flow.encoder.training
    parameters = dict(old.named_parameters())
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert model.flow is old
    assert dict(old.named_parameters()) == parameters
    assert old.encoder.training == encoder_training


@pytest.mark.parametrize("obj", [None, nn.Linear(1, 1), SimpleNamespace(model=nn.Linear(1, 1))])
def test_something_without_a_flow_is_refused(obj: object) -> None:
    with pytest.raises(ValueError, match=r"obj must be MaskedDiffWithXvec, .* or hold one as \.flow or \.model\.flow"):
        accelerate(obj)


def test_a_subclass_is_refused() -> None:
    old = fake_flow(preset("tiny"))
    rename("", "MyFlow")(old)
    with pytest.raises(ValueError, match="got MyFlow"):
        accelerate(old)
