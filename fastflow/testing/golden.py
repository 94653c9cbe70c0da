"""Run recorded upstream cases (``tests/golden``, or any folder of the same format) and compare every array.

``compute`` runs a case on fastflow and returns its results under the names of the recorded arrays; ``compare`` holds
them against the record: float32 outputs within max(4x upstream's own float32 deviation, 1e-5) of the largest value,
gradients max(10x, 1e-4); float64 within 1e-8 and 1e-7, or 2e-7 and 2e-6 where float32 is stored.
"""

import contextlib
import importlib.util
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fastflow
from fastflow import dit, encoder, flow, unet
from fastflow.length_regulator import mel_frames
from fastflow.ops.attention import length_mask, rel_shift, rotate_first_head, upstream_lengths, visible_keys
from fastflow.ops.feed_forward import feed_forward
from fastflow.ops.interpolate import interpolate
from fastflow.ops.norm import norm_ref

SOLVER = {"v1": fastflow.ConditionalCFM, "v2": fastflow.CausalConditionalCFM, "v3": fastflow.CausalConditionalCFM}
ESTIMATOR = {"v1": fastflow.ConditionalDecoder, "v2": fastflow.CausalConditionalDecoder, "v3": fastflow.DiT}
ENCODER = {"v1": fastflow.ConformerEncoder, "v2": fastflow.UpsampleConformerEncoder}
LOSS_DRAWS = (("rand", "t"), ("randn_like", "noise"), ("rand", "cfg_uniform"))
NOISE_CEILING = 1e-3  # a record whose own float32 deviation is larger proves nothing

Results = dict[str, Any]


class Comparison(NamedTuple):
    """One array: its name, the error, and the largest error allowed."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


class Case:
    """The arrays and the configuration of one recorded case."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        with np.load(path, allow_pickle=False) as data:
            self.arrays = {key: data[key] for key in data.files}
        self.config: dict[str, Any] = json.loads(str(self.arrays.pop("config")))
        self.name, self.dtype = path.stem, dtype
        self.version, self.kind = self.config["kind"].rpartition(".")[::2]
        if self.version[2:] == ".flow":
            self.version, self.kind = self.version[:2], f"flow.{self.kind}"
        if self.kind == "parts":
            self.kind = self.config["case"]
        self.weights = _weights(path.parent)

    def input(self, name: str, grad: bool = False) -> Tensor:
        x = torch.from_numpy(self.arrays[f"in.{name}"].copy())
        return x.to(self.dtype).requires_grad_(grad) if x.is_floating_point() else x

    def fill(self, module: nn.Module, prefix: str = "") -> Any:
        """Give a module its deterministic weights; it is in eval mode, or as the case says, and of the case's dtype."""
        state = module.state_dict()
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        made = self.weights.make_state(shapes, self.config["salt"], key_prefix=prefix)
        if "gnorm.keys" in self.arrays:
            # In upstream's order too: the state of an optimizer is indexed by position.
            assert self.arrays["gnorm.keys"].tolist() == list(made), "the parameters differ from the recorded ones"
        module.load_state_dict({**state, **{key: torch.from_numpy(value) for key, value in made.items()}})
        return module.to(self.dtype).train(self.config.get("train_mode", False))


def _weights(folder: Path) -> ModuleType:
    path = next(p / "weights.py" for p in (folder, folder.parent) if (p / "weights.py").is_file())
    spec = importlib.util.spec_from_file_location("golden_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ recorded randomness
@contextlib.contextmanager
def recorded_draws(case: Case, torch_draws: tuple = (), python_draws: tuple = ()) -> Iterator[None]:
    """Serve the recorded draws in place of torch's and Python's; any other number, order or size fails."""
    expected = [(function, case.input(name)) for function, name in torch_draws]
    python = list(python_draws)

    def draw(function: str) -> Callable[..., Tensor]:
        def served(shape: Any, *rest: int, **options: Any) -> Tensor:
            want, value = expected.pop(0)
            sizes = list(shape.shape) if isinstance(shape, Tensor) else np.atleast_1d(shape).tolist() + list(rest)
            assert (want, value.numel()) == (function, math.prod(sizes)), f"drew {function}{sizes} instead of {want}"
            return value.reshape(sizes)

        return served

    def draw_python(function: str) -> Callable[..., Any]:
        def served(*bounds: int) -> Any:
            want, value, *want_bounds = python.pop(0)
            assert (function, list(bounds)) == (want, want_bounds), f"drew {function}{bounds} instead of {want}"
            return value

        return served

    with contextlib.ExitStack() as stack:
        for name in ("rand", "randn_like"):
            stack.enter_context(mock.patch.object(torch, name, draw(name)))
        for name in ("random", "randint"):
            stack.enter_context(mock.patch.object(random, name, draw_python(name)))
        yield
    assert not expected, f"recorded draws were not used: {[name for name, _ in expected]}"
    assert not python, f"recorded draws were not used: {python}"


@contextlib.contextmanager
def recorded_dropout(case: Case) -> Iterator[None]:
    """Replace torch's dropout by the recorded masks, counted over the calls that drop anything."""
    calls = iter(range(10**6))

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        key = f"dropout:{next(calls)}"
        keep = case.weights.uniform(key, tuple(x.shape), case.config["salt"], np.float64) >= p
        return x * torch.from_numpy(keep).to(x) / (1.0 - p)

    with mock.patch.object(F, "dropout", dropout):
        yield
    assert next(calls) > 0, "no dropout was applied"


# ------------------------------------------------------------------------------------------------ running a case
def _gradients(case: Case, module: nn.Module, scalar: Tensor, inputs: dict[str, Tensor]) -> Results:
    scalar.backward()
    salt, keys = case.config["salt"], case.arrays["gnorm.keys"].tolist()
    parameters = dict(module.named_parameters())
    grads = {key: _numpy(parameters[key].grad).astype(np.float64) for key in keys}
    results: Results = {f"gin.{name}": x.grad for name, x in inputs.items()}
    results["gnorm.norm"] = np.array([np.linalg.norm(grads[key]) for key in keys])
    results["gnorm.dot"] = np.array([np.vdot(case.weights.probe(key, g.shape, salt), g) for key, g in grads.items()])
    results |= {f"gp.{key}": g for key, g in grads.items()}
    if "gsub.keys" in case.arrays:
        groups = case.arrays["gsub.keys"].tolist()
        squares = {name: sum(np.sum(g**2) for key, g in grads.items() if key.startswith(f"{name}.")) for name in groups}
        results["gsub.norm"] = np.sqrt([squares[name] for name in groups])
    return results


def _estimator(case: Case) -> Results:
    module = case.fill(ESTIMATOR[case.version](**case.config["args"]))
    ins = {name: case.input(name, grad=True) for name in ("x", "mu", "t", "spks", "cond")}
    y = module(mask=case.input("mask"), streaming=case.config["streaming"], **ins)
    return {"out.y": y, **_gradients(case, module, (y * case.input("cot")).sum(), ins)}


def _encoder(case: Case) -> Results:
    module = case.fill(ENCODER[case.version](**case.config["args"]))
    options = {"streaming": case.config["streaming"]} if case.version == "v2" else {}
    if case.config["context"]:
        h, valid = module(case.input("xs"), case.input("xs_lens_passed"), context=case.input("context"), **options)
        return {"out.h": h, "out.masks": valid}
    xs = case.input("xs", grad=True)
    h, valid = module(xs, case.input("xs_lens"), **options)
    gradients = _gradients(case, module, (h * case.input("cot")).sum(), {"xs": xs})
    return {"out.h": h, "out.masks": valid, **gradients}


def _prelookahead(case: Case) -> Results:
    module, xs = case.fill(fastflow.PreLookaheadLayer(**case.config["args"])), case.input("xs", grad=True)
    y = module(xs)
    gradients = _gradients(case, module, (y * case.input("cot")).sum(), {"xs": xs})
    return {"out.y": y, "out.y_context": module(xs, context=case.input("context")), **gradients}


def _length_regulator(case: Case) -> Results:
    module = case.fill(fastflow.InterpolateRegulator(**case.config["args"]))
    results: Results = {}
    for i, call in enumerate(case.config.get("calls", ())):
        lengths = call["mel_len1"], call["mel_len2"]
        y, frames = module.inference(case.input(f"x1_{i}"), case.input(f"x2_{i}"), *lengths, call["frame_rate"])
        assert frames == sum(lengths)
        results[f"out.y_{i}"] = y
    if "in.x" in case.arrays:
        x = case.input("x", grad=True)
        y, olens = module(x, case.input("ylens"))
        results |= {"out.y": y, "out.olens": olens}
        results |= _gradients(case, module, (y * case.input("cot")).sum(), {"x": x})
    return results


def _solver(case: Case, args: dict, params: dict) -> nn.Module:
    return SOLVER[case.version](240, SimpleNamespace(**params), 1, 80, ESTIMATOR[case.version](**args))


def _set_noise(case: Case, solver: Any) -> None:
    """The recorded noise is the front of the solver's own, but for the last bits of another CPU family."""
    if "in.noise" in case.arrays:
        noise = torch.from_numpy(case.arrays["in.noise"])
        front = solver.rand_noise[:, :, : noise.shape[2]]
        torch.testing.assert_close(front, noise, rtol=0, atol=1e-5)
        front.copy_(noise)


def _cfm(case: Case) -> Results:
    module, steps = case.fill(_solver(case, case.config["args"], case.config["cfm_params"])), []
    results: Results = {}
    v1, prompt = case.version == "v1", case.input("prompt_feat")

    def note(estimator: nn.Module, args: tuple, velocity: Tensor) -> None:
        x, _, _, t, *_ = args
        steps.append((t.double(), x[0].double().norm(), velocity.double().flatten(1).norm(dim=1)))

    module.estimator.register_forward_hook(note)
    _set_noise(case, module)
    cache = torch.zeros(1, 80, 0, 2, dtype=case.dtype)
    for suffix in ("_1", "_2") if v1 else ("",):
        mu = case.input("mu" + suffix)
        cond = F.pad(prompt, (0, mu.shape[2] - prompt.shape[2]))
        options = (
            {"prompt_len": case.config["prompt_len"], "cache": cache} if v1 else {"streaming": case.config["streaming"]}
        )
        steps.clear()
        with recorded_draws(case, (("randn_like", "noise" + suffix),) if v1 else ()):
            y, cache = module(
                mu, mu.new_ones(1, 1, mu.shape[2]), case.config["n_timesteps"], case.config["temperature"],
                spks=case.input("spks"), cond=cond, **options,
            )  # fmt: skip
        t, x, velocity = (torch.stack(values) for values in zip(*steps, strict=True))
        results |= {f"out.t_steps{suffix}": t, f"out.x_norm_steps{suffix}": x, f"out.dphi_norm_steps{suffix}": velocity}
        results |= {f"out.y{suffix}": y, f"out.cache{suffix}": cache, f"out.mu_after{suffix}": mu}
    return results


def _loss(case: Case) -> Results:
    module = case.fill(_solver(case, case.config["args"], case.config["cfm_params"]))
    ins = {name: case.input(name, grad=True) for name in ("x1", "mu", "spks", "cond")}
    with recorded_draws(case, LOSS_DRAWS):
        loss, y = module.compute_loss(mask=case.input("mask"), streaming=case.config["streaming"], **ins)
    gradients = _gradients(case, module, loss, {key: x for key, x in ins.items() if f"gin.{key}" in case.arrays})
    return {"out.loss": loss, "out.y": y, "in.cfg_keep": _keep(case), **gradients}


def _keep(case: Case) -> Tensor:
    return case.input("cfg_uniform") > 0.2


def _build_flow(case: Case) -> Any:
    args = case.config["args"]
    options = {key: args[key] for key in ("token_mel_ratio", "pre_lookahead_len") if key in args}
    if "encoder" in args:
        options["encoder"] = ENCODER[case.version](**args["encoder"])
    if "length_regulator" in args:
        options["length_regulator"] = fastflow.InterpolateRegulator(**args["length_regulator"])
    if "pre_lookahead_layer" in args:
        options["pre_lookahead_layer"] = fastflow.PreLookaheadLayer(**args["pre_lookahead_layer"])
    decoder = _solver(case, args["estimator"], args["cfm_params"])
    return case.fill(getattr(fastflow, case.config["module"])(decoder=decoder, **args["flow"], **options))


def _flow_inference(case: Case) -> Results:
    module, results = _build_flow(case), {}

    def call(token: str, **options: Any) -> tuple[Tensor, Any]:
        tensors = {"token": case.input(token)}
        tensors |= {name: case.input(name) for name in ("prompt_token", "prompt_feat")}
        lengths = {f"{name}_len": torch.tensor([x.shape[1]], dtype=torch.int32) for name, x in tensors.items()}
        return module.inference(**tensors, **lengths, embedding=case.input("embedding"), **options)

    if case.version == "v1":
        cache = torch.zeros(1, 80, 0, 2, dtype=case.dtype)
        for i in range(1, 1 + len(case.config["mel_len2"])):
            with recorded_draws(case, (("randn_like", f"noise_{i}"),)):
                results[f"out.feat_{i}"], cache = call(f"token_{i}", flow_cache=cache)
            results[f"out.cache_{i}"] = cache
        return results
    _set_noise(case, module.decoder)
    for i, combination in enumerate(case.config["combos"]):
        results[f"out.feat_{i}"], _ = call("token", **combination)
    return results


def _python_draws(case: Case) -> tuple:
    """random() results, each followed by its randint where a row gets a prefix; v2 and v3 first draw streaming."""
    bounds = zip(case.arrays["in.py_randint"].tolist(), case.arrays["in.py_randint_lo_hi"].tolist(), strict=True)
    draws: list[tuple] = []
    for i, u in enumerate(case.arrays["in.py_random"].tolist()):
        draws.append(("random", u))
        if u >= 0.5 and (case.version == "v1" or i > 0):
            value, (low, high) = next(bounds)
            draws.append(("randint", value, low, high))
    assert next(bounds, None) is None
    return tuple(draws)


def _flow_train(case: Case) -> Results:
    module = _build_flow(case)
    seen: dict[str, Any] = {}
    compute_loss = module.decoder.compute_loss

    def spy(x1: Tensor, mask: Tensor, mu: Tensor, spks: Tensor, *, cond: Tensor, streaming: bool = False) -> Any:
        seen.update(mask=mask, mu=mu, spks=spks, cond=cond, streaming=streaming)
        mu.retain_grad()
        spks.retain_grad()
        return compute_loss(x1, mask, mu, spks, cond=cond, streaming=streaming)

    names = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")
    batch = {name: case.input(name) for name in names}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module.decoder, "compute_loss", spy))
        stack.enter_context(recorded_draws(case, LOSS_DRAWS, _python_draws(case)))
        if module.training:
            stack.enter_context(recorded_dropout(case))
        loss = module(batch, torch.device("cpu"))["loss"]
    results = {"out.loss": loss, "in.cfg_keep": _keep(case), **_gradients(case, module, loss, {})}
    prefix = (seen["cond"].abs().sum(1) > 0).sum(1)
    results |= {f"out.{name}": seen[name] for name in ("mask", "mu", "spks", "streaming")}
    return results | {"out.cond_prefix": prefix, "gmid.mu": seen["mu"].grad, "gmid.spks": seen["spks"].grad}


# ------------------------------------------------------------------------------------------------ building blocks
def _parts_masks(case: Case) -> Results:
    lens, size = case.input("lens"), case.config["args"]["size"]
    full = torch.tensor([size])
    repaired = upstream_lengths(torch.tensor([size, 0]), size)
    results = {
        "pad_mask": ~length_mask(lens, size),
        "pad_mask_longer": ~length_mask(lens, size + 3),
        "full_and_pad": visible_keys(lens, size, size),
        "full_repeat_bias": (~visible_keys(lens, size, size)).double().expand(-1, size, -1) * -1e10,
        "row_all_false_full": visible_keys(repaired, size, size),
    }
    for chunk in case.config["args"]["chunks"]:
        results[f"chunk_mask_{chunk}"] = visible_keys(full, size, size, chunk)[0]
        results[f"chunk_and_pad_{chunk}"] = visible_keys(lens, size, size, chunk)
    # Upstream lets the empty row see every key here too; nothing reads it, so ours keeps its chunks.
    empty = visible_keys(repaired, size, size, 2)
    results["row_all_false_chunk"] = torch.cat([empty[:1], torch.ones_like(empty[1:])])
    return results


def _parts_interp(case: Case) -> Results:
    return {
        f"y_{i}_{o}": interpolate(case.input(f"x_{i}_{o}").transpose(1, 2), [(i, o)], channels_first=True)
        for i, o in case.config["args"]["pairs"]
    }


def _parts_time(case: Case) -> Results:
    return {f"sin_{width}": unet.time_features(case.input("t"), width) for width in case.config["args"]["dims"]}


def _parts_conformer(case: Case) -> Results:
    args, x, lens = case.config["args"], case.input("x"), case.input("lens")
    width, frames = args["d"], args["t"]
    attn = case.fill(encoder.RelPositionMultiHeadedAttention(args["heads"], width, 0.0, True), "attn.")
    ff = case.fill(encoder.PositionwiseFeedForward(width, args["units"], 0.0), "ff.")
    embed = case.fill(encoder.LinearEmbed(width, width, 0.0, 0.0), "embed.")
    parts = (
        encoder.RelPositionMultiHeadedAttention(args["heads"], width, 0.0, True),
        encoder.PositionwiseFeedForward(width, args["units"], 0.0),
    )
    layer = case.fill(encoder.ConformerEncoderLayer(*parts, width, 0.0), "layer.")
    up = case.fill(encoder.Upsample1D(width), "up.")
    position = encoder.relative_positions(frames, width, x)
    count = torch.arange(frames * (2 * frames - 1), dtype=case.dtype).view(1, 1, frames, -1)
    results = {
        "pos_x": x * math.sqrt(width),
        "pos_emb": position,
        "rel_shift_of_arange": rel_shift(count, frames, frames),
        "ff": feed_forward(
            x, ff.w_1.weight, ff.w_1.bias, ff.w_2.weight, ff.w_2.bias, activation="silu", residual=False
        ),
        "embed": embed(x)[0],
        "up": up(x).transpose(1, 2),
        "up_lens": 2 * lens,
    }
    for name, chunk in (("full", 0), ("chunk", args["chunk"])):
        results[f"attn_{name}"] = attn.linear_out(attn(x, None, lens, chunk, position, padded_queries=True))
        results[f"layer_{name}"] = layer(x, lens, chunk, position)
    return results


def _parts_unet(case: Case) -> Results:
    args, causal = case.config["args"], case.kind == "parts_unet_causal"
    width, (x, mask, h, y) = args["cout"], map(case.input, ("x", "mask", "h", "y"))
    block = case.fill(unet.Block1D(args["cin"], width, causal), "block.")
    resnet = case.fill(unet.ResnetBlock1D(args["cin"], width, args["time_dim"], causal), "resnet.")
    transformer = case.fill(unet.TransformerBlock(width, args["heads"], args["head_dim"], 0.0), "tf.")
    lengths = (mask[:, 0] > 0).sum(-1)
    results = {
        "block": block(x.transpose(1, 2), lengths).transpose(1, 2),
        "resnet": resnet(x.transpose(1, 2), lengths, resnet.mlp(case.input("temb"))).transpose(1, 2),
        "tf": transformer(h, lengths, args["chunk"]),
    }
    if causal:
        return results | {"conv": case.fill(unet.CausalConv1d(args["cin"], width, 3), "conv.")(x)}
    down = case.fill(unet.Resample(nn.Conv1d(width, width, 3, stride=2, padding=1)), "down.")
    up = case.fill(unet.Resample(nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)), "up.")
    keys = case.arrays["out.time_mlp"].shape[1]
    time_mlp = case.fill(unet.TimestepEmbedding(args["time_dim"], keys), "time_mlp.")
    return results | {"down": down(y), "up": up(y), "time_mlp": time_mlp(case.input("temb"))}


def _parts_dit(case: Case) -> Results:
    args = case.config["args"]
    dim, shape, frames = args["dim"], (args["dim"], args["heads"], args["dim_head"]), args["t"]
    x, cond, mu, spks, h, e, q = map(case.input, ("x", "cond", "mu", "spks", "h", "temb", "q"))
    lengths = (case.input("mask")[:, 0] > 0).sum(-1)
    rotary = dit.RotaryEmbedding(args["dim_head"]).to(case.dtype)(frames)
    attn = case.fill(dit.Attention(*shape, 0.0), "attn.")
    block = case.fill(dit.DiTBlock(*shape, args["ff_mult"], 0.0), "block.")
    table = case.fill(dit.AdaLayerNorm(dim, 6), "attn_norm.")(F.silu(e))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, -1)
    final_scale, final_shift = case.fill(dit.AdaLayerNorm(dim, 2), "norm_out.")(F.silu(e)).chunk(2, -1)
    qkv = torch.stack([q, q, q], 2).unflatten(-1, (-1, args["dim_head"]))
    angle = torch.arange(frames, dtype=case.dtype)[:, None] * dit.RotaryEmbedding(args["dim_head"]).inv_freq
    results = {
        "input_embed": case.fill(dit.InputEmbedding(320, dim), "input_embed.")(x, cond, mu, spks),
        "conv_pos": case.fill(dit.CausalConvPositionEmbedding(dim), "conv_pos_embed.")(h),
        "time_embed": case.fill(dit.TimestepEmbedding(dim), "time_embed.")(case.input("t")),
        "rope_freqs": angle.repeat_interleave(2, dim=1)[None],
        "rope_applied": rotate_first_head(qkv, *rotary)[:, :, 0].flatten(2),
        "ada_x": norm_ref(h, dit.modulated(shift, scale)),
        "ada_gate_msa": gate,
        "ada_shift_mlp": shift_mlp,
        "ada_scale_mlp": scale_mlp,
        "ada_gate_mlp": gate_mlp,
        "final_norm": norm_ref(h, dit.modulated(final_shift, final_scale)),
        "ff": case.fill(dit.FeedForward(dim, args["ff_mult"], 0.0), "ff.")(h, None, None) - h,
    }
    for name, chunk in (("full", 0), ("chunk", args["chunk"])):
        results[f"attn_{name}"] = attn(h, None, None, lengths, chunk, rotary) - h
        results[f"block_{name}"] = block(h, block.attn_norm(F.silu(e)), lengths, chunk, rotary)
    return results


def _time_grid(steps: int, dtype: torch.dtype) -> Results:
    """Times and steps of the solver, seen by an estimator whose velocity is 1: x then moves by dt."""
    used, moved = [], []

    class One(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, *rest: Any, streaming: bool) -> Tensor:
            used.append(t[0].double())
            moved.append(x[0, 0, 0].double())
            return torch.ones_like(x)

    params = SimpleNamespace(sigma_min=1e-6, t_scheduler="cosine", training_cfg_rate=0.2, inference_cfg_rate=0.0)
    solver = fastflow.CausalConditionalCFM(240, params, estimator=One())
    spans: list[Tensor] = []
    solve = solver.solve

    def spy(x: Tensor, t_span: Tensor, *rest: Any, **options: Any) -> Tensor:
        spans.append(t_span)
        return solve(torch.zeros_like(x, dtype=torch.float64), t_span, *rest, **options)

    with mock.patch.object(solver, "solve", spy):
        mu = torch.zeros(1, 80, 1, dtype=dtype)
        end, _ = solver(mu, torch.ones(1, 1, 1, dtype=dtype), steps, spks=mu[..., 0])
    bits = "f64" if dtype == torch.float64 else "f32"
    steps_taken = np.diff([*moved, float(end[0, 0, 0])])
    span = spans[0]
    return {
        f"t_span_{steps}_{bits}": span,
        f"t_used_{steps}_{bits}": torch.stack(used),
        f"dt_used_{steps}_{bits}": steps_taken,
    }


def _parts_grid(case: Case) -> Results:
    params = SimpleNamespace(sigma_min=1e-6, t_scheduler="cosine", training_cfg_rate=0.2, inference_cfg_rate=0.7)
    noise = fastflow.CausalConditionalCFM(240, params).rand_noise
    results: Results = {
        "prefix_max": np.array([flow.longest_prefix(frames) for frames in range(3001)]),
        "rand_noise_shape": torch.tensor(noise.shape),
        "rand_noise_corner": noise[0, :4, :32],
        "rand_noise_tail": noise[0, -4:, -32:],
        "rand_noise_crc32": torch.tensor(zlib.crc32(noise.numpy().tobytes())),
        "rand_noise_sum": noise.double().sum(),
        "rand_noise_sumsq": noise.double().square().sum(),
    }
    for rate in (50, 25):
        results[f"mel_len_{rate}"] = np.array([mel_frames(tokens, rate) for tokens in range(20001)])
        results[f"head_frames_{rate}"] = torch.tensor(mel_frames(20, rate))
    for steps in (10, 6):
        for dtype in (torch.float32, torch.float64):
            results |= _time_grid(steps, dtype)
    return results


RUNNERS: dict[str, Callable[[Case], Results]] = {
    "estimator": _estimator,
    "encoder": _encoder,
    "prelookahead": _prelookahead,
    "length_regulator": _length_regulator,
    "cfm": _cfm,
    "loss": _loss,
    "flow.inference": _flow_inference,
    "flow.train": _flow_train,
    "parts_masks": _parts_masks,
    "parts_interp": _parts_interp,
    "parts_time": _parts_time,
    "parts_conformer": _parts_conformer,
    "parts_unet": _parts_unet,
    "parts_unet_causal": _parts_unet,
    "parts_dit": _parts_dit,
    "parts_grid": _parts_grid,
}


def compute(case: Case) -> Results:
    """Run the case on fastflow; the results carry the names of the recorded arrays."""
    results = RUNNERS[case.kind](case)
    if case.config["kind"] == "parts":
        results = {f"out.{name}": value for name, value in results.items()}
    return results


# ------------------------------------------------------------------------------------------------ comparing
def _numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _limit(case: Case, noise: float, gradient: bool, stored32: bool) -> float:
    if case.dtype == torch.float64:
        return (2e-7 if stored32 else 1e-8) * (10 if gradient else 1)
    return max(10 * noise, 1e-4) if gradient else max(4 * noise, 1e-5)


def _what_matters(case: Case, name: str) -> np.ndarray | bool:
    """Padding that nothing reads: of the v2 encoder, DiT and its parts, parts of the U-Net; mu of v2 and v3."""
    if name == "out.y" and case.config["kind"] == "v3.estimator":
        return case.arrays["in.mask"] > 0
    if name == "out.h" and case.version == "v2":
        return case.arrays["out.masks"].transpose(0, 2, 1)
    if name == "out.tf" or (case.kind == "parts_dit" and name.startswith(("out.attn_", "out.block_"))):
        return case.arrays["in.mask"].transpose(0, 2, 1) > 0
    if name == "out.resnet":
        return case.arrays["in.mask"] > 0
    if name == "out.mu" and case.version != "v1":
        return case.arrays["out.mask"] > 0
    return True


def _compare_array(case: Case, name: str, got: np.ndarray, want: np.ndarray) -> Comparison:
    if got.shape != want.shape or (got.dtype.kind == "f" and not np.isfinite(got).all()):
        return Comparison(name, math.inf, 0.0)
    if want.dtype.kind != "f":
        return Comparison(name, float((got != want).sum()), 0.0)
    where = np.broadcast_to(_what_matters(case, name), want.shape)
    got, stored32, want = got[where].astype(np.float64), want.dtype == np.float32, want[where].astype(np.float64)
    scale = np.abs(want).max(initial=0.0)
    error = np.abs(got - want).max(initial=0.0)
    if scale == 0:  # zero by construction
        return Comparison(name, float(error), 1e-12)
    noise = float(case.arrays.get(f"f32err.{name}", 0.0)) / scale
    limit = _limit(case, noise, name.startswith(("gin.", "gmid.", "gsub.")), stored32)
    if case.dtype == torch.float64 and case.kind in ("cfm", "flow.inference"):
        limit = max(limit, 1e-6)  # the solver returns float32
    return Comparison(name, float(error / scale), limit)


def _compare_gradients(case: Case, results: Results) -> Iterator[Comparison]:
    """Norm and projection of every parameter's gradient, and some gradients whole, relative to the norm."""
    record = zip(*(case.arrays[f"gnorm.{part}"] for part in ("keys", "norm", "dot", "err32")), strict=True)
    top = case.arrays["gnorm.norm"].max()
    for i, (key, norm, dot, noise) in enumerate(record):
        # A gradient that is zero in exact arithmetic (the bias of keys, under a softmax) holds rounding only.
        zero = norm < 1e-10 * top
        scale = top if zero else norm
        for name, want in (("norm", norm), ("dot", dot)):
            limit = _limit(case, noise / scale, True, False)
            if zero:
                limit = max(10 * noise / top, 1e-13 if case.dtype == torch.float64 else 1e-7)
            yield Comparison(f"gnorm.{name}:{key}", float(abs(results[f"gnorm.{name}"][i] - want) / scale), limit)
            yield Comparison(f"gnorm.err32:{key}", noise / scale, NOISE_CEILING)
        if (name := f"gp.{key}") in case.arrays:
            limit = _limit(case, noise / scale, True, True)
            yield Comparison(name, float(np.linalg.norm(results[name] - case.arrays[name]) / scale), limit)


def compare(case: Case, results: Results) -> list[Comparison]:
    """Hold results against every recorded array.

    Raises:
        KeyError: the results lack a recorded array.
    """
    comparisons = [
        _compare_array(case, name, _numpy(results[name]), want)
        for name, want in case.arrays.items()
        if name.startswith(("out.", "gin.", "gmid.", "gsub.norm", "in.cfg_keep"))
    ]
    for name in case.arrays:
        if name.startswith("f32err."):
            scale = np.abs(case.arrays[name.removeprefix("f32err.")]).max(initial=0.0)
            comparisons.append(Comparison(name, float(case.arrays[name] / scale) if scale else 0.0, NOISE_CEILING))
    if "gnorm.keys" in case.arrays:
        comparisons += _compare_gradients(case, results)
    return comparisons
