"""The flow of CosyVoice 1, 2 and 3: speech tokens to mel, as upstream's classes of the same names.

``forward(batch, device)`` is the training step's loss, ``inference(...)`` synthesises one utterance.  Randomness
follows upstream's contract: Python's ``random`` for the streaming choice and the condition prefixes, torch's generator
for the time, the noise and the guidance dropout, in upstream's order.  With ``randomness = "device"`` the prefixes come
from torch's generator too, so that a step reads nothing back from the device even if the batch lives there.
"""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastflow.checks import check_device, check_floats, check_lengths, check_row, check_shape, check_tokens, readable
from fastflow.layers import Linear
from fastflow.length_regulator import MEL_RATE, implied_frames, mel_frames
from fastflow.lengths import POLICIES, Policy, check_tolerance, cleared, joined, resample
from fastflow.ops.attention import length_mask
from fastflow.ops.half import fitted
from fastflow.padding import Padded
from fastflow.recompute import Recomputing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastflow.flow_matching import SolverOptions

Batch = Mapping[str, Tensor | Sequence[Tensor]]
N_TIMESTEPS = 10
Randomness = Literal["upstream", "device"]
RANDOMNESS: tuple[str, ...] = get_args(Randomness)


def longest_prefix(frames: int) -> int:
    """The most frames of a row that its condition may reveal."""
    return int(0.3 * frames)


def _condition_prefixes(feat_len: Tensor) -> Tensor:
    """Frames revealed to each row: none with probability 1/2, else uniform in 0..30 % (upstream's draws in order)."""
    lengths = feat_len.tolist()
    return torch.tensor([0 if random.random() < 0.5 else random.randint(0, longest_prefix(n)) for n in lengths])


def _drawn_prefixes(feat_len: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same distribution from torch's generator, on the device of ``feat_len`` and without looking at it."""
    reveal, share = torch.rand(2, feat_len.shape[0], device=feat_len.device, generator=generator)
    longest = (0.3 * feat_len).long()
    return torch.where(reveal < 0.5, 0, torch.minimum((share * (longest + 1)).long(), longest))


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _cut(
    batch: Mapping[str, Tensor], token_len: Tensor, feat_len: Tensor, tokens: int, frames: int
) -> dict[str, Tensor]:
    """Tokens and mel cut to shorter lengths and widths."""
    return {
        "speech_token": batch["speech_token"][:, :tokens],
        "speech_token_len": token_len,
        "speech_feat": batch["speech_feat"][:, :frames],
        "speech_feat_len": feat_len,
    }


class _Flow(Recomputing, Padded):
    """What the three flows share: embeddings, checks of the arguments, condition, loss and solver calls.

    With ``padding = "exact"`` the loss of a batch is, for the same draws of each row, the mean of what the rows give
    alone, weighted with their frames, and so are the gradients; what lies in the padding is not looked at::

        loss = sum_b sum_t |e_bt|^2 / (80 sum_b n_b) = sum_b n_b loss_b / sum_b n_b

    with e_bt the error of the velocity at frame t of row b, and n_b the frames of the row.  Dropout, which only the
    encoders of the published sizes have, draws for the frames that are computed: packed rows draw others than padded
    ones, from the same distribution.

    Attributes:
        length_tolerance: mel frames that a row may differ from what its tokens imply; None: any number.
    """

    length_tolerance: int | None = None
    _randomness: Randomness = "upstream"
    _on_length_mismatch: Policy = "error"

    encoder: Any
    length_regulator: Any
    pre_lookahead_layer: Any
    decoder: Any
    token_mel_ratio: int
    pre_lookahead_len: int

    def __init__(
        self,
        input_size: int,
        output_size: int,
        spk_embed_dim: int,
        output_type: str,
        vocab_size: int,
        input_frame_rate: int,
        only_mask_loss: bool,
        decoder_conf: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size, self.vocab_size = input_size, output_size, vocab_size
        self.output_type, self.input_frame_rate = output_type, input_frame_rate
        self.only_mask_loss, self.decoder_conf = only_mask_loss, decoder_conf
        self.input_embedding = nn.Embedding(vocab_size, input_size)
        self.spk_embed_affine_layer = Linear(spk_embed_dim, output_size)

    @property
    def randomness(self) -> Randomness:
        """Where a training step draws its condition prefixes: ``"upstream"``, from Python's ``random`` as upstream does
        (which reads ``speech_feat_len``), or ``"device"``, from torch's generator."""
        return self._randomness

    @randomness.setter
    def randomness(self, value: Randomness) -> None:
        _choice("randomness", value, RANDOMNESS)
        self._randomness = value

    @property
    def on_length_mismatch(self) -> Policy:
        """What a training step does with mel and tokens of lengths that do not belong together.

        ``"error"`` raises, in CosyVoice 1 only beyond ``length_tolerance``, as its length regulator stretches.
        ``"trim"`` cuts each row to the shorter of the two.  ``"interpolate"`` stretches the mel of each row to what its
        tokens imply (CosyVoice 1 stretches the tokens, as it always does).  Both raise beyond ``length_tolerance``.
        """
        return self._on_length_mismatch

    @on_length_mismatch.setter
    def on_length_mismatch(self, value: Policy) -> None:
        _choice("on_length_mismatch", value, POLICIES)
        self._on_length_mismatch = value

    def _implied_frames(self, token_len: Tensor) -> Tensor:
        """Mel frames that a row of so many tokens stands for."""
        raise NotImplementedError

    def _match(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with lengths that belong together, by :attr:`on_length_mismatch`."""
        frames, implied = batch["speech_feat_len"], self._implied_frames(batch["speech_token_len"])
        check_tolerance(frames, implied, self.length_tolerance)
        return dict(batch) if self.on_length_mismatch == "error" else dict(batch) | self._matched(batch, implied)

    def _matched(self, batch: Mapping[str, Tensor], implied: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _speaker(self, embedding: Tensor) -> Tensor:
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1))

    def _embed(self, token: Tensor, token_len: Tensor) -> Tensor:
        """Token vectors ``[B, T, input_size]``, zero past each row's length."""
        vectors = self.input_embedding(token.clamp(0, self.vocab_size - 1))
        if token.device.type != "cpu":
            # Where values cannot be checked beforehand, an id too large gives NaN, not a fault that kills the device.
            vectors = vectors.masked_fill((token >= self.vocab_size)[..., None], float("nan"))
        return vectors * length_mask(token_len, token.shape[1])[..., None]

    def _check_common(self, token: Tensor, feat: Tensor, embedding: Tensor, feat_name: str) -> None:
        check_shape("embedding", embedding, (token.shape[0], self.spk_embed_affine_layer.in_features))
        for name, x in ((feat_name, feat), ("embedding", embedding)):
            check_floats(name, x, self.spk_embed_affine_layer.weight)

    def prepared(self, batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
        """The batch padded and checked, with matching lengths, where it came from."""
        padded = joined(batch, self.output_size)
        self._check_lengths(padded)
        if self.exact:
            padded = cleared(padded)
        self._check_values(padded, device)
        return self._match(padded)

    def _check_lengths(self, batch: Mapping[str, Tensor]) -> None:
        names = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")
        if missing := [name for name in names if name not in batch]:
            raise ValueError(f"batch lacks {', '.join(missing)}")
        token, token_len, feat, feat_len, _ = (batch[name] for name in names)
        check_shape("speech_token", token, (None, None))
        rows, tokens = token.shape
        check_lengths("speech_token_len", token_len, rows, tokens, "speech_token")
        check_shape("speech_feat", feat, (rows, None, self.output_size))
        check_lengths("speech_feat_len", feat_len, rows, feat.shape[1], "speech_feat", fill=self._feat_must_fill)
        if self.on_length_mismatch == "error":
            self._check_frames(tokens, feat.shape[1])
            if self.exact:
                self._check_rows(token_len, feat_len)

    def _check_values(self, batch: Mapping[str, Tensor], device: torch.device | str) -> None:
        token = batch["speech_token"]
        check_tokens("speech_token", token, self.vocab_size)
        self._check_common(token, batch["speech_feat"], batch["embedding"], "speech_feat")
        parameter = self.spk_embed_affine_layer.weight
        if torch.device(device).type != parameter.device.type:
            raise ValueError(f"device is {device} but the module is on {parameter.device}")

    _feat_must_fill = False  # the mask of CosyVoice 2 and 3 comes from the tokens alone

    def _check_frames(self, tokens: int, frames: int) -> None:
        """CosyVoice 2 and 3 have a fixed number of frames per token."""
        ratio = self.token_mel_ratio
        if frames != ratio * tokens:
            raise ValueError(
                f"speech_feat has {frames} frames but {tokens} tokens need {ratio} each, {ratio * tokens}: "
                "trim or pad the waveform to whole tokens before the mel, or set on_length_mismatch of the flow to "
                "'trim' or 'interpolate'"
            )

    def _check_rows(self, token_len: Tensor, feat_len: Tensor) -> None:
        """As :meth:`_check_frames` of each row alone."""
        if not (readable(token_len) and readable(feat_len)):
            return
        for row, (tokens, frames) in enumerate(zip(token_len.tolist(), feat_len.tolist(), strict=True)):
            try:
                self._check_frames(tokens, frames)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from None

    def draw_streaming(self) -> dict[str, Any]:
        """Which masks a training step of CosyVoice 2 and 3 is computed with, drawn from Python's ``random``."""
        return {}

    def draw_prefixes(self, feat_len: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Frames of each row's mel that its condition reveals, ``[B]``, by :attr:`randomness`."""
        return _drawn_prefixes(feat_len, generator) if self.randomness == "device" else _condition_prefixes(feat_len)

    def _encoded(
        self, token: Tensor, token_len: Tensor, feat: Tensor, feat_len: Tensor, **streaming: bool
    ) -> tuple[Tensor, Tensor]:
        """mu ``[B, T, 80]`` and its mask ``[B, T]`` bool; feat_len may be on the host."""
        raise NotImplementedError

    def prepared_loss(
        self,
        batch: Mapping[str, Tensor],
        device: torch.device | str,
        generator: torch.Generator | None,
        prefix: Tensor | None = None,
        **streaming: bool,
    ) -> Tensor:
        """The training loss of what :meth:`prepared` gives; ``prefix`` ``[B]`` as :meth:`draw_prefixes` draws it."""
        feat_len = batch["speech_feat_len"]
        token, token_len, feat, embedding = (
            batch[name].to(device, non_blocking=True)
            for name in ("speech_token", "speech_token_len", "speech_feat", "embedding")
        )
        spks = self._speaker(embedding)
        h, mask = self._encoded(token, token_len, feat, feat_len, **streaming)
        if prefix is None:
            if self.randomness == "device":
                feat_len = feat_len.to(device, non_blocking=True)
            prefix = self.draw_prefixes(feat_len, generator).to(device, non_blocking=True)
        cond = feat.masked_fill(~length_mask(prefix, feat.shape[1])[..., None], 0.0)
        loss, _ = self.decoder.compute_loss(
            feat.transpose(1, 2).contiguous(),
            mask[:, None].to(h),
            h.transpose(1, 2).contiguous(),
            spks,
            cond=cond.transpose(1, 2),
            **({} if generator is None else {"generator": generator}),
            **streaming,
        )
        return loss

    def _check_inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_token_len: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
    ) -> None:
        for name, x, length in (("token", token, token_len), ("prompt_token", prompt_token, prompt_token_len)):
            check_row(name, x, None)
            check_tokens(name, x, self.vocab_size)
            check_shape(f"{name}_len", length, (1,))
            if readable(length) and not 0 <= int(length) <= x.shape[1]:
                raise ValueError(f"{name}_len must lie in 0..{x.shape[1]}, the width of {name}; got {int(length)}")
        if not token.shape[1]:
            raise ValueError("token is empty: at least one token is needed")
        check_row("prompt_feat", prompt_feat, None, self.output_size)
        self._check_common(token, prompt_feat, embedding, "prompt_feat")
        tensors = {"token": token, "prompt_token": prompt_token, "prompt_feat": prompt_feat, "embedding": embedding}
        for name, x in tensors.items():
            check_device(name, x, self.spk_embed_affine_layer.weight.device)

    def _solver_inputs(self, h: Tensor, prompt_feat: Tensor, options: "SolverOptions") -> dict[str, Any]:
        """Arguments of the decoder from encoder frames ``[1, T, 80]``, the prompt's mel, and the caller's options."""
        schedule = options.get("schedule")
        named = schedule is None or isinstance(schedule, str)
        cond = F.pad(fitted(prompt_feat, h.dtype).to(h.dtype), (0, 0, 0, h.shape[1] - prompt_feat.shape[1]))
        return {
            "mu": h.transpose(1, 2).contiguous(),
            "mask": h.new_ones(1, 1, h.shape[1]),
            "cond": cond.transpose(1, 2),
            "n_timesteps": N_TIMESTEPS if named else None,
            **options,
        }


class MaskedDiffWithXvec(_Flow):
    """The flow of CosyVoice 1.

    Args:
        input_size: width of the token embedding.
        output_size: mel channels.
        spk_embed_dim: width of the speaker x-vector.
        vocab_size: speech tokens.
        input_frame_rate: tokens per second.
        encoder: a :class:`fastflow.ConformerEncoder`.
        length_regulator: an :class:`fastflow.InterpolateRegulator`.
        decoder: a :class:`fastflow.ConditionalCFM` with its estimator.
        output_type, only_mask_loss, decoder_conf: kept for upstream's signature, without effect.
    """

    _feat_must_fill = True

    def __init__(
        self,
        input_size: int = 512,
        output_size: int = 80,
        spk_embed_dim: int = 192,
        output_type: str = "mel",
        vocab_size: int = 4096,
        input_frame_rate: int = 50,
        only_mask_loss: bool = True,
        encoder: nn.Module | None = None,
        length_regulator: nn.Module | None = None,
        decoder: nn.Module | None = None,
        decoder_conf: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            spk_embed_dim,
            output_type,
            vocab_size,
            input_frame_rate,
            only_mask_loss,
            decoder_conf,
        )
        if encoder is None or length_regulator is None or decoder is None:
            raise ValueError("encoder, length_regulator and decoder must be given")
        self.encoder = encoder  # the order of the parts is upstream's: optimizer states are indexed by position
        self.encoder_proj = Linear(self.encoder.output_size(), output_size)
        self.decoder = decoder
        self.length_regulator = length_regulator

    def _check_frames(self, tokens: int, frames: int) -> None:
        """The length regulator stretches to any number of frames."""

    def _implied_frames(self, token_len: Tensor) -> Tensor:
        return implied_frames(token_len, self.input_frame_rate)

    def _matched(self, batch: Mapping[str, Tensor], implied: Tensor) -> dict[str, Tensor]:
        if self.on_length_mismatch == "interpolate":
            return {}
        token_len, feat_len = batch["speech_token_len"], batch["speech_feat_len"]
        if not (readable(token_len) and readable(feat_len)):
            raise ValueError(
                "on_length_mismatch 'trim' of CosyVoice 1 needs speech_token_len and speech_feat_len on the CPU, got "
                f"{token_len.device} and {feat_len.device}: its length regulator stretches to the longest row"
            )
        feat_len = torch.minimum(feat_len, implied.clamp(min=1).to(feat_len))
        needed = torch.ceil(feat_len.double() / MEL_RATE * self.input_frame_rate)
        token_len = torch.minimum(token_len, needed.to(token_len))
        return _cut(batch, token_len, feat_len, int(token_len.max()), int(feat_len.max()))

    def forward(
        self, batch: Batch, device: torch.device | str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The training loss.

        Args:
            batch: ``speech_token`` ``[B, Tt]`` int, ``speech_token_len`` ``[B]``, ``speech_feat`` ``[B, Tf, 80]``
                log-mel, ``speech_feat_len`` ``[B]`` frames, ``embedding`` ``[B, 192]`` x-vectors.  Tokens and mel may
                also be lists of rows, ``[T_i]`` and ``[F_i, 80]``; their lengths may then be left out.
            device: where to compute; the module's.
            generator: to draw the time, the noise, the guidance dropout and, with ``randomness = "device"``, the
                condition prefixes from; None: torch's own on the device.

        Returns:
            ``{"loss": scalar}``.

        Raises:
            ValueError, TypeError: a tensor that does not fit, by name.
        """
        return {"loss": self.prepared_loss(self.prepared(batch, device), device, generator)}

    def _encoded(
        self, token: Tensor, token_len: Tensor, feat: Tensor, feat_len: Tensor, **streaming: bool
    ) -> tuple[Tensor, Tensor]:
        frames, feat_len = feat.shape[1], feat_len.to(feat.device, non_blocking=True)
        h, _ = self.encoder(self._embed(token, token_len), token_len)
        h, _ = self.length_regulator(self.encoder_proj(h), feat_len, frames=frames, xlens=token_len)
        return h, length_mask(feat_len, frames)

    @torch.inference_mode()
    def inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_token_len: Tensor,
        prompt_feat: Tensor,
        prompt_feat_len: Tensor,
        embedding: Tensor,
        flow_cache: Tensor,
        **options: "Unpack[SolverOptions]",
    ) -> tuple[Tensor, Tensor]:
        """Synthesise the mel of one utterance, or of its next chunk.

        Args:
            token: ``[1, N]`` int speech tokens.
            token_len: ``[1]``.
            prompt_token: ``[1, P]`` tokens of the prompt; P may be 0.
            prompt_token_len: ``[1]``.
            prompt_feat: ``[1, M, 80]`` mel of the prompt.
            prompt_feat_len: unused, as upstream.
            embedding: ``[1, 192]`` x-vector.
            flow_cache: ``[1, 80, K, 2]`` from the chunk before; K = 0 at the start.
            options: of the solver, as :meth:`fastflow.ConditionalCFM.forward` takes them: ``n_timesteps`` (10),
                ``temperature`` (1.0), ``schedule``, ``sway_coefficient``, ``method``, ``cfg_rate``.

        Returns:
            The mel ``[1, 80, int(N / input_frame_rate * 22050 / 256)]`` float32 and the new cache.

        Raises:
            ValueError, TypeError: a tensor that does not fit, by name.
        """
        self._check_inference(token, token_len, prompt_token, prompt_token_len, prompt_feat, embedding)
        prompt_tokens, prompt_frames = prompt_token.shape[1], prompt_feat.shape[1]
        frames = mel_frames(token.shape[1], self.input_frame_rate)
        self._check_cache(flow_cache, prompt_frames + frames)
        spks = self._speaker(embedding)
        tokens, tokens_len = torch.cat([prompt_token, token], 1), prompt_token_len + token_len
        h, _ = self.encoder(self._embed(tokens, tokens_len), tokens_len)
        h = self.encoder_proj(h)
        h, _ = self.length_regulator.inference(
            h[:, :prompt_tokens], h[:, prompt_tokens:], prompt_frames, frames, self.input_frame_rate
        )
        mel, cache = self.decoder(
            **self._solver_inputs(h, prompt_feat, options), spks=spks, prompt_len=prompt_frames, cache=flow_cache
        )
        return mel[:, :, prompt_frames:], cache

    def _check_cache(self, flow_cache: Tensor, frames: int) -> None:
        check_row("flow_cache", flow_cache, self.output_size, None, 2)
        if flow_cache.shape[2] > frames:
            raise ValueError(f"flow_cache holds {flow_cache.shape[2]} frames but prompt and chunk have {frames}")


class _CausalFlow(_Flow):
    """What the flows of CosyVoice 2 and 3 share: a fixed number of frames per token, streaming by chunk masks."""

    def _encode(self, vectors: Tensor, lengths: Tensor, streaming: bool, context: Tensor | None) -> Tensor:
        """Token vectors ``[B, T, input_size]`` to mu ``[B, token_mel_ratio * T, 80]``."""
        raise NotImplementedError

    def _implied_frames(self, token_len: Tensor) -> Tensor:
        return self.token_mel_ratio * token_len

    def _matched(self, batch: Mapping[str, Tensor], implied: Tensor) -> dict[str, Tensor]:
        ratio, tokens = self.token_mel_ratio, batch["speech_token"].shape[1]
        token_len, feat, feat_len = (batch[name] for name in ("speech_token_len", "speech_feat", "speech_feat_len"))
        if self.on_length_mismatch == "interpolate":
            feat = resample(feat, feat_len, implied, ratio * tokens)
            return {"speech_feat": feat, "speech_feat_len": implied.to(feat_len)}
        kept = torch.minimum(token_len, (feat_len // ratio).to(token_len))
        if readable(kept) and int(kept.min()) < 1:
            row = int(kept.argmin())
            raise ValueError(f"row {row} of speech_feat has {int(feat_len[row])} frames, less than one token's {ratio}")
        longest = int(kept.max()) if readable(kept) else min(tokens, feat.shape[1] // ratio)
        return _cut(batch, kept, (ratio * kept).to(feat_len), longest, ratio * longest)

    def forward(
        self, batch: Batch, device: torch.device | str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The training loss; half of the batches are computed with streaming masks.

        Args:
            batch: ``speech_token`` ``[B, Tt]`` int, ``speech_token_len`` ``[B]``, ``speech_feat``
                ``[B, token_mel_ratio * Tt, 80]`` log-mel, ``speech_feat_len`` ``[B]`` frames, ``embedding``
                ``[B, 192]`` x-vectors.  Tokens and mel may also be lists of rows, ``[T_i]`` and
                ``[token_mel_ratio * T_i, 80]``; their lengths may then be left out.
            device: where to compute; the module's.
            generator: to draw the time, the noise, the guidance dropout and, with ``randomness = "device"``, the
                condition prefixes from; None: torch's own on the device.

        Returns:
            ``{"loss": scalar}``.

        Raises:
            ValueError, TypeError: a tensor that does not fit, by name.
        """
        ready = self.prepared(batch, device)
        return {"loss": self.prepared_loss(ready, device, generator, **self.draw_streaming())}

    def draw_streaming(self) -> dict[str, Any]:
        return {"streaming": random.random() < 0.5}

    def _encoded(
        self, token: Tensor, token_len: Tensor, feat: Tensor, feat_len: Tensor, **streaming: bool
    ) -> tuple[Tensor, Tensor]:
        h = self._encode(self._embed(token, token_len), token_len, streaming["streaming"], None)
        return h, length_mask(self.token_mel_ratio * token_len, h.shape[1])

    @torch.inference_mode()
    def inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_token_len: Tensor,
        prompt_feat: Tensor,
        prompt_feat_len: Tensor,
        embedding: Tensor,
        streaming: bool,
        finalize: bool,
        **options: "Unpack[SolverOptions]",
    ) -> tuple[Tensor, None]:
        """Synthesise the mel of one utterance, or of all its tokens so far.

        Args:
            token: ``[1, N]`` int speech tokens.
            token_len: ``[1]``.
            prompt_token: ``[1, P]`` tokens of the prompt; P may be 0.
            prompt_token_len: ``[1]``.
            prompt_feat: ``[1, M, 80]`` mel of the prompt.
            prompt_feat_len: unused, as upstream.
            embedding: ``[1, 192]`` x-vector.
            streaming: attention sees its own chunk and all before it.
            finalize: False keeps the last ``pre_lookahead_len`` tokens as look-ahead, without frames of their own.
            options: of the solver, as :meth:`fastflow.ConditionalCFM.forward` takes them: ``n_timesteps`` (10),
                ``temperature`` (1.0), ``schedule``, ``sway_coefficient``, ``method``, ``cfg_rate``.

        Returns:
            The mel ``[1, 80, frames - M]`` float32, where frames is ``token_mel_ratio`` times the tokens, and None.

        Raises:
            ValueError, TypeError: a tensor that does not fit, by name.
        """
        self._check_inference(token, token_len, prompt_token, prompt_token_len, prompt_feat, embedding)
        tokens, lengths = torch.cat([prompt_token, token], 1), prompt_token_len + token_len
        spoken = tokens.shape[1] - (0 if finalize else self.pre_lookahead_len)
        if spoken < 1:
            raise ValueError(f"finalize=False needs more than {self.pre_lookahead_len} tokens, got {tokens.shape[1]}")
        if prompt_feat.shape[1] >= (frames := self.token_mel_ratio * spoken):
            raise ValueError(f"prompt_feat has {prompt_feat.shape[1]} frames, but all tokens give only {frames}")
        spks = self._speaker(embedding)
        vectors = self._embed(tokens, lengths)
        context = None if finalize else vectors[:, spoken:]
        h = self._encode(vectors[:, :spoken], lengths, streaming, context)
        mel, _ = self.decoder(**self._solver_inputs(h, prompt_feat, options), spks=spks, streaming=streaming)
        return mel[:, :, prompt_feat.shape[1] :], None


class CausalMaskedDiffWithXvec(_CausalFlow):
    """The flow of CosyVoice 2.

    Args:
        token_mel_ratio: mel frames per token; the encoder's upsampling makes it 2.
        pre_lookahead_len: tokens of look-ahead.
        encoder: an :class:`fastflow.UpsampleConformerEncoder`.
        decoder: a :class:`fastflow.CausalConditionalCFM` with its estimator.
        The others as :class:`MaskedDiffWithXvec`.
    """

    def __init__(
        self,
        input_size: int = 512,
        output_size: int = 80,
        spk_embed_dim: int = 192,
        output_type: str = "mel",
        vocab_size: int = 4096,
        input_frame_rate: int = 50,
        only_mask_loss: bool = True,
        token_mel_ratio: int = 2,
        pre_lookahead_len: int = 3,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        decoder_conf: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            spk_embed_dim,
            output_type,
            vocab_size,
            input_frame_rate,
            only_mask_loss,
            decoder_conf,
        )
        if encoder is None or decoder is None:
            raise ValueError("encoder and decoder must be given")
        self.encoder = encoder
        self.encoder_proj = Linear(self.encoder.output_size(), output_size)
        self.decoder = decoder
        self.token_mel_ratio, self.pre_lookahead_len = token_mel_ratio, pre_lookahead_len

    def _encode(self, vectors: Tensor, lengths: Tensor, streaming: bool, context: Tensor | None) -> Tensor:
        h, _ = self.encoder(vectors, lengths, context=context, streaming=streaming)
        return self.encoder_proj(h)


class CausalMaskedDiffWithDiT(_CausalFlow):
    """The flow of CosyVoice 3: no encoder but a look-ahead layer at the mel's width.

    Args:
        token_mel_ratio: mel frames per token; each vector is repeated as often.
        pre_lookahead_len: tokens of look-ahead.
        pre_lookahead_layer: a :class:`fastflow.PreLookaheadLayer`.
        decoder: a :class:`fastflow.CausalConditionalCFM` with a :class:`fastflow.DiT`.
        The others as :class:`MaskedDiffWithXvec`.
    """

    def __init__(
        self,
        input_size: int = 512,
        output_size: int = 80,
        spk_embed_dim: int = 192,
        output_type: str = "mel",
        vocab_size: int = 4096,
        input_frame_rate: int = 50,
        only_mask_loss: bool = True,
        token_mel_ratio: int = 2,
        pre_lookahead_len: int = 3,
        pre_lookahead_layer: nn.Module | None = None,
        decoder: nn.Module | None = None,
        decoder_conf: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            spk_embed_dim,
            output_type,
            vocab_size,
            input_frame_rate,
            only_mask_loss,
            decoder_conf,
        )
        if pre_lookahead_layer is None or decoder is None:
            raise ValueError("pre_lookahead_layer and decoder must be given")
        self.pre_lookahead_layer = pre_lookahead_layer
        self.decoder = decoder
        self.token_mel_ratio, self.pre_lookahead_len = token_mel_ratio, pre_lookahead_len

    def _encode(self, vectors: Tensor, lengths: Tensor, streaming: bool, context: Tensor | None) -> Tensor:
        return self.pre_lookahead_layer(vectors, context).repeat_interleave(self.token_mel_ratio, dim=1)
