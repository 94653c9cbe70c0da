"""Attention whose masks are numbers: key lengths per row and a chunk size, never a mask argument.

Query i of row b sees key j if ``j < lengths[b]`` and, with a chunk size c > 0, ``j < (i // c + 1) * c``: all chunks to
the left and its own.  A row of length 0 sees every key, so that its output is finite; nothing valid depends on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def length_mask(lengths: Tensor, frames: int) -> Tensor:
    """``[B, frames]`` bool: whether a frame lies inside its row."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def visible_keys(lengths: Tensor, frames: int, chunk_size: int = 0) -> Tensor:
    """The rule above as a bool tensor ``[B, 1, frames]``, or ``[B, frames, frames]`` with a chunk size."""
    keys = length_mask(lengths, frames)[:, None, :]
    if chunk_size > 0:
        frame = torch.arange(frames, device=lengths.device)
        keys = keys & (frame < (frame[:, None] // chunk_size + 1) * chunk_size)
    return keys | (lengths <= 0)[:, None, None]


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, chunk_size: int = 0) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q, k, v: ``[B, H, T, D]``; scores are scaled by ``1 / sqrt(D)``.
        lengths: ``[B]`` integers, valid keys of each row.
        chunk_size: frames of a chunk; 0 lets every query see every valid key.

    Returns:
        ``[B, H, T, D]``; the output of queries past a row's length is finite and meaningless.
    """
    visible = visible_keys(lengths, k.shape[2], chunk_size)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def rel_shift(scores: Tensor) -> Tensor:
    """``[B, H, T, 2T-1]`` scores by relative position -> ``[B, H, T, T]``: entry (i, j) is column ``T-1-i+j``.

    One zero column in front makes every row one element longer than the rows of the result, so reading the buffer
    with rows of length 2T-1 moves each row one column further than the one before (Transformer-XL, appendix B).
    """
    batch, heads, frames, _ = scores.shape
    padded = F.pad(scores, (1, 0)).view(batch, heads, 2 * frames, frames)
    return padded[:, :, 1:].reshape(batch, heads, frames, 2 * frames - 1)[..., :frames]


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    lengths: Tensor,
    chunk_size: int = 0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention with the relative position term of Transformer-XL, as the conformer uses it.

    ``score[i, j] = ((q_i + bias_u) . k_j + (q_i + bias_v) . position[T-1-i+j]) / sqrt(D)``

    Args:
        q, k, v: ``[B, H, T, D]``.
        position: ``[H, 2T-1, D]``, projected encodings of the distances T-1 down to -(T-1).
        bias_u, bias_v: ``[H, D]``.
        lengths, chunk_size: as in :func:`attention`.
        dropout_p: dropout of the probabilities.

    Returns:
        ``[B, H, T, D]``.
    """
    content = (q + bias_u[:, None]) @ k.transpose(2, 3)
    relative = rel_shift((q + bias_v[:, None]) @ position.transpose(1, 2))
    hidden = ~visible_keys(lengths, k.shape[2], chunk_size)[:, None]
    scores = ((content + relative) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout_p) @ v if dropout_p else scores.softmax(-1) @ v
