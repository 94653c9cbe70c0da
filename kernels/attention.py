"""Triton kernels of fastflow.ops.attention, which states the formula and the rule of the masks.

A program holds a tile of queries and runs over the tiles of keys that any of them sees (or the reverse, for the
gradients of keys and values), so that hidden tiles and padded rows cost nothing.  Scores are float32 in units of
log(2), and so is the saved logarithm of their sum: where one key takes all, its probability comes back as exactly 1.
Products run in the dtype of q.  Nothing is atomic: every element has one writer, in a fixed order.

The relative term needs, for BLOCK queries from t0 and BLOCK keys from j0, the 2 * BLOCK - 1 rows of ``position`` from
``base = Tk - 1 - (t0 + BLOCK - 1) + j0``.  They are taken as two windows of BLOCK rows, "low" from base and "high" from
base + BLOCK, and ``_shear`` turns the two products into the tile's scores.  The next tile of keys finds its low window
where this one had its high window, so with the queries fixed each tile costs one product.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated
from fastflow.ops.dropout import threshold_as_int32

# The interpreter multiplies bfloat16 as if its bits were integers; in float32 the products are those of tensor cores.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))

# These change from call to call: a new value must not compile a new kernel.
SIZES = ["queries", "keys", "chunk_size", "left_chunks", "key_offset", "threshold"]

# Tiles by kernel and bytes of an element, then by the largest head dimension they are for: BLOCK_M and BLOCK_N, which
# the relative term wants equal, or BLOCK; num_warps, num_stages.  They were chosen to need no stack, not by a
# measurement of time: at head dimension 64 on sm_80, sm_90 and sm_100, at others on sm_90 without dropout.  Where the
# tiles leave no registers for dropout, it has its own.
CONFIGS: dict[tuple[str, int], dict[int, tuple[Any, int, int]]] = {
    ("forward", 2): {64: ((64, 64), 4, 2), 128: ((64, 64), 8, 2), 256: ((64, 32), 8, 2)},
    ("forward", 4): {64: ((32, 32), 4, 1), 128: ((16, 16), 8, 1), 256: ((16, 16), 8, 1)},
    ("relative_forward", 2): {64: ((32, 32), 4, 2), 128: ((32, 32), 4, 1), 256: ((16, 16), 4, 1)},
    ("relative_forward_dropout", 2): {64: ((32, 32), 4, 1), 128: ((32, 32), 4, 1), 256: ((16, 16), 4, 1)},
    ("relative_forward", 4): {64: ((32, 32), 8, 1), 128: ((32, 32), 8, 1), 256: ((16, 16), 8, 2)},
    ("backward_q", 2): {64: (64, 4, 2), 128: (32, 4, 1), 256: (32, 4, 1)},
    ("backward_q", 4): {32: (16, 8, 1), 64: (32, 8, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
    ("relative_backward_q", 2): {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    ("relative_backward_q", 4): {64: (32, 8, 1), 128: (16, 8, 1), 256: (16, 8, 2)},
    ("backward_kv", 2): {64: (64, 4, 2), 128: (32, 4, 1), 256: (16, 4, 1)},
    ("backward_kv", 4): {64: (32, 8, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
    ("backward_kv_dropout", 2): {64: (32, 4, 2), 128: (32, 4, 1), 256: (16, 4, 1)},
    ("relative_backward_kv", 2): {64: (32, 4, 1), 128: (32, 8, 1), 256: (16, 8, 1)},
    ("relative_backward_kv", 4): {32: (16, 8, 1), 64: (32, 8, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
    ("backward_position", 2): {16: (16, 4, 1), 64: (32, 4, 1), 128: (32, 8, 1), 256: (16, 8, 1)},
    ("backward_position", 4): {64: (32, 8, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
}

# Rows of the batch are dealt to this many programs per head and diagonal for the gradient of the positions; the
# partial sums take 2 * SPLITS times the memory of ``position`` in float32.
SPLITS = 4


# ------------------------------------------------------------------------------------------------ pieces
@triton.jit
def _apart(x):
    """x as a value of its own, at this place: the compiler neither computes it anew in the layout of every product
    that takes it nor moves the work that makes it, either of which fills the registers."""
    if INTERPRETED:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _add_product(x, a, b):
    """x + a b.  In float32, where a product holds whole rows in registers, one is finished before the next begins."""
    if INTERPRETED:
        return x + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return _apart(tl.dot(a, b, x, input_precision="ieee"))
    else:
        return tl.dot(a, b, x)


@triton.jit
def _add_scores(x, a, b):
    """x + a b^T, where a has further products to come.  float32 stores a in shared memory anew: else it would read
    the rows of a before the barrier that the rows of b wait for, and hold all of them in registers."""
    if a.dtype == tl.float32:
        a = _apart(a)
    return _add_product(x, a, tl.trans(b))


@triton.jit
def _load(base, rows, inside, stride_t, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [T, D] matrix; those that are not inside, which may hold anything, become 0."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride_t + d.to(tl.int64)[None, :] * stride_d
    return tl.load(pointers, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _window(base, m, keys, stride_m, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows m of the positions of a head; there are none beyond the first and the last."""
    return _load(base, m, (m >= 0) & (m < 2 * keys - 1), stride_m, stride_d, HEAD_DIM, BLOCK_D)


@triton.jit
def _store(ptr, x, row, h, heads, frames, t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write frames t of a row and a head of a [B, T, H, D] tensor."""
    d = tl.arange(0, BLOCK_D)
    offset = ((row.to(tl.int64) * frames + t) * heads + h)[:, None] * HEAD_DIM + d[None, :]
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=(t < frames)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _add_bias(q, bias_ptr, h, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + h * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return _apart(saturated(q.to(tl.float32) + bias[None, :], q.dtype).to(q.dtype))


@triton.jit
def _length(lengths_ptr, row, keys):
    if lengths_ptr is None:
        return keys
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), keys).to(tl.int32)


@triton.jit
def _keys_of(i, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES: tl.constexpr):
    """First and last + 1 of the keys that query i sees."""
    t = i + key_offset
    chunk = t // chunk_size
    seeing = i < queries
    if not PADDED_QUERIES:
        seeing = seeing & (t < length)
    first = tl.maximum((chunk - left_chunks) * chunk_size, 0)
    return first, tl.where(seeing, tl.minimum((chunk + 1) * chunk_size, length), 0)


@triton.jit
def _queries_of(j, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES: tl.constexpr):
    """First and last + 1 of the queries that see key j."""
    chunk = j // chunk_size
    stop = tl.minimum((chunk + left_chunks + 1) * chunk_size - key_offset, queries)
    if not PADDED_QUERIES:
        stop = tl.minimum(stop, length - key_offset)
    return tl.maximum(chunk * chunk_size - key_offset, 0), tl.where(j < length, stop, 0)


@triton.jit
def _range(first, stop, BLOCK: tl.constexpr):
    """Begin, a multiple of BLOCK, and end of the union of the ranges first..stop."""
    end = tl.max(stop, 0)
    return tl.min(tl.where(first < stop, first, end), 0) // BLOCK * BLOCK, end


@triton.jit
def _rows(BLOCK: tl.constexpr):
    """Rows of a tile [BLOCK, 1], anew in each turn of a loop: what is computed from them and the columns would fill
    the registers if the compiler took it out of the loop."""
    i = tl.arange(0, BLOCK)[:, None]
    if INTERPRETED:
        return i
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _merge(low, high, BLOCK: tl.constexpr):
    """The columns of either window that the tile needs: query i begins at column BLOCK - 1 - i of the low one."""
    return tl.where(_rows(BLOCK) + tl.arange(0, BLOCK)[None, :] >= BLOCK - 1, low, high)


@triton.jit
def _shear(low, high, BLOCK: tl.constexpr):
    """Products with the low and high windows -> [BLOCK, BLOCK] scores: (i, j) is column BLOCK - 1 - i + j of both."""
    column = tl.arange(0, BLOCK)[None, :] - _rows(BLOCK) - 1
    return tl.gather(_merge(low, high, BLOCK), column & (BLOCK - 1), 1)


@triton.jit
def _unshear(x, BLOCK: tl.constexpr):
    """The reverse: scores -> columns of the two windows, to be divided by ``_merge``."""
    column = tl.arange(0, BLOCK)[None, :] + _rows(BLOCK) + 1
    return tl.gather(x, column & (BLOCK - 1), 1)


@triton.jit
def _kept(seed_ptr, row_and_head, i, j0, threshold, BLOCK_N: tl.constexpr):
    """Which probabilities of queries i and BLOCK_N keys from j0 are kept, as ``dropout_mask`` has it."""
    counter = j0 // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.philox(tl.load(seed_ptr), counter[None, :], i[:, None], row_and_head, 0, n_rounds=7)
    least = threshold.to(tl.uint32, bitcast=True)
    return tl.interleave(tl.interleave(a >= least, c >= least), tl.interleave(b >= least, d >= least))


@triton.jit
def _probabilities_and_ds(scores, grad_p, visible, lse, delta, seed_ptr, row_and_head, i, j0, threshold, keep_scale):
    """Of a tile: the probabilities after dropout, and the gradient of the scores."""
    p = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
    dropped = p
    if seed_ptr is not None:
        kept = _kept(seed_ptr, row_and_head, i, j0, threshold, scores.shape[1])
        dropped = tl.where(kept, p * keep_scale, 0.0)
        grad_p = tl.where(kept, grad_p * keep_scale, 0.0)
    return dropped, p * (grad_p - delta[:, None])


# ------------------------------------------------------------------------------------------------ kernels
@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    bias_u_ptr,
    bias_v_ptr,
    lengths_ptr,
    seed_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_ph,
    stride_pm,
    stride_pd,
    heads,
    queries,
    keys,
    chunk_size,
    left_chunks,
    key_offset,
    scale,
    threshold,
    keep_scale,
    PADDED_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    row_and_head = tl.program_id(0) // tiles
    row = (row_and_head // heads).to(tl.int64)
    h = (row_and_head % heads).to(tl.int64)
    i0 = tl.program_id(0) % tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    length = _length(lengths_ptr, row, keys)
    first, stop = _keys_of(i, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES)
    begin, end = _range(first, stop, BLOCK_N)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    q_base = q_ptr + row * stride_qb + h * stride_qh
    k_base = k_ptr + row * stride_kb + h * stride_kh
    v_base = v_ptr + row * stride_vb + h * stride_vh
    q = _load(q_base, i, first < stop, stride_qt, stride_qd, HEAD_DIM, BLOCK_D)
    if position_ptr is not None:
        p_base = position_ptr + h * stride_ph
        q_v = _add_bias(q, bias_v_ptr, h, HEAD_DIM, BLOCK_D)
        q = _add_bias(q, bias_u_ptr, h, HEAD_DIM, BLOCK_D)
        m = keys - key_offset - i0 - BLOCK_M + begin + tl.arange(0, BLOCK_N)
        p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
        low = _add_scores(zeros, q_v, p)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        scores = zeros
        if position_ptr is not None:
            m = keys - key_offset - i0 - BLOCK_M + BLOCK_N + j
            p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            high = _add_scores(zeros, q_v, p)
            scores = _shear(low, high, BLOCK_N)
            low = high
        k = _load(k_base, j, j < end, stride_kt, stride_kd, HEAD_DIM, BLOCK_D)
        scores = _add_scores(scores, q, k)
        visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
        scores = tl.where(visible, scores * (scale * LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        probabilities = tl.exp2(scores - finite_top[:, None])
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(probabilities, 1)
        if seed_ptr is not None:
            probabilities = tl.where(
                _kept(seed_ptr, row_and_head, i, j0, threshold, BLOCK_N), probabilities * keep_scale, 0.0
            )
        v = _load(v_base, j, j < end, stride_vt, stride_vd, HEAD_DIM, BLOCK_D)
        out = _add_product(out * shrink[:, None], probabilities.to(v.dtype), v)
        top = new_top

    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    out = saturated(out, out_ptr.dtype.element_ty)
    _store(out_ptr, out, row, h, heads, queries, i, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + row_and_head.to(tl.int64) * queries + i, top + tl.log2(total), mask=i < queries)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_q_kernel(
    grad_q_ptr,
    delta_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    bias_u_ptr,
    bias_v_ptr,
    lengths_ptr,
    seed_ptr,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_gd,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_od,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_ph,
    stride_pm,
    stride_pd,
    heads,
    queries,
    keys,
    chunk_size,
    left_chunks,
    key_offset,
    scale,
    threshold,
    keep_scale,
    PADDED_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of q; also writes delta, the sum of output times gradient of each query, which the others read."""
    tiles = tl.cdiv(queries, BLOCK)
    row_and_head = tl.program_id(0) // tiles
    row = (row_and_head // heads).to(tl.int64)
    h = (row_and_head % heads).to(tl.int64)
    i0 = tl.program_id(0) % tiles * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    length = _length(lengths_ptr, row, keys)
    first, stop = _keys_of(i, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES)
    begin, end = _range(first, stop, BLOCK)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)

    k_base = k_ptr + row * stride_kb + h * stride_kh
    v_base = v_ptr + row * stride_vb + h * stride_vh
    grad_base = grad_ptr + row * stride_gb + h * stride_gh
    grad = _load(grad_base, i, first < stop, stride_gt, stride_gd, HEAD_DIM, BLOCK_D)
    out = _load(out_ptr + row * stride_ob + h * stride_oh, i, first < stop, stride_ot, stride_od, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    of_query = row_and_head.to(tl.int64) * queries + i
    tl.store(delta_ptr + of_query, delta, mask=i < queries)
    lse = tl.load(lse_ptr + of_query, mask=first < stop, other=0.0)

    q = _load(q_ptr + row * stride_qb + h * stride_qh, i, first < stop, stride_qt, stride_qd, HEAD_DIM, BLOCK_D)
    if position_ptr is not None:
        p_base = position_ptr + h * stride_ph
        q_v = _add_bias(q, bias_v_ptr, h, HEAD_DIM, BLOCK_D)
        q = _add_bias(q, bias_u_ptr, h, HEAD_DIM, BLOCK_D)
        base = keys - key_offset - i0 - BLOCK + tl.arange(0, BLOCK)
        m = base + begin
        p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
        low = _add_scores(zeros, q_v, p)
        ds_before = tl.zeros([BLOCK, BLOCK], q.dtype)

    grad_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for j0 in range(begin, end, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        scores = zeros
        if position_ptr is not None:
            m = base + j0 + BLOCK
            p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            high = _add_scores(zeros, q_v, p)
            scores = _shear(low, high, BLOCK)
            low = high
        k = _load(k_base, j, j < end, stride_kt, stride_kd, HEAD_DIM, BLOCK_D)
        v = _load(v_base, j, j < end, stride_vt, stride_vd, HEAD_DIM, BLOCK_D)
        scores = _add_scores(scores, q, k)
        visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
        _, ds = _probabilities_and_ds(
            scores * (scale * LOG2_E), _add_scores(zeros, grad, v), visible, lse, delta,
            seed_ptr, row_and_head, i, j0, threshold, keep_scale,
        )  # fmt: skip
        grad_q = _add_product(grad_q, ds.to(k.dtype), k)
        if position_ptr is not None:
            m = base + j0
            p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            ds = _unshear(ds.to(p.dtype), BLOCK)
            grad_q = _add_product(grad_q, _merge(ds, ds_before, BLOCK), p)
            ds_before = ds

    if position_ptr is not None:  # the high window of the last tile
        m = base + begin + tl.cdiv(end - begin, BLOCK) * BLOCK
        p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
        grad_q = _add_product(grad_q, _merge(tl.zeros_like(ds_before), ds_before, BLOCK), p)
    _store(grad_q_ptr, grad_q * scale, row, h, heads, queries, i, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_kv_kernel(
    grad_k_ptr,
    grad_v_ptr,
    grad_u_ptr,
    delta_ptr,
    grad_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    bias_u_ptr,
    bias_v_ptr,
    lengths_ptr,
    seed_ptr,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_gd,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_ph,
    stride_pm,
    stride_pd,
    heads,
    queries,
    keys,
    chunk_size,
    left_chunks,
    key_offset,
    scale,
    threshold,
    keep_scale,
    PADDED_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of k and v; the share of these keys in the gradient of bias_u goes to grad_u [B, H, tiles, D]."""
    tiles = tl.cdiv(keys, BLOCK)
    row_and_head = tl.program_id(0) // tiles
    row = (row_and_head // heads).to(tl.int64)
    h = (row_and_head % heads).to(tl.int64)
    j0 = tl.program_id(0) % tiles * BLOCK
    j = j0 + tl.arange(0, BLOCK)
    length = _length(lengths_ptr, row, keys)
    start, until = _queries_of(j, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES)
    begin, end = _range(start, until, BLOCK)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)

    q_base = q_ptr + row * stride_qb + h * stride_qh
    grad_base = grad_ptr + row * stride_gb + h * stride_gh
    k = _load(k_ptr + row * stride_kb + h * stride_kh, j, start < until, stride_kt, stride_kd, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr + row * stride_vb + h * stride_vh, j, start < until, stride_vt, stride_vd, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    ds_sum = tl.zeros([BLOCK], tl.float32)
    for i0 in range(begin, end, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        first, stop = _keys_of(i, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES)
        q = _load(q_base, i, first < stop, stride_qt, stride_qd, HEAD_DIM, BLOCK_D)
        of_query = row_and_head.to(tl.int64) * queries + i
        lse = tl.load(lse_ptr + of_query, mask=first < stop, other=0.0)
        delta = tl.load(delta_ptr + of_query, mask=first < stop, other=0.0)
        if position_ptr is not None:
            p_base = position_ptr + h * stride_ph
            q_v = _add_bias(q, bias_v_ptr, h, HEAD_DIM, BLOCK_D)
            q = _add_bias(q, bias_u_ptr, h, HEAD_DIM, BLOCK_D)
            m = keys - key_offset - i0 - BLOCK + j
            p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            low = _add_scores(zeros, q_v, p)
            p = _window(p_base, m + BLOCK, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            scores = _shear(low, _add_scores(zeros, q_v, p), BLOCK)
            scores = _add_product(scores, q, tl.trans(k))
        else:
            scores = _add_product(zeros, q, tl.trans(k))
        grad = _load(grad_base, i, first < stop, stride_gt, stride_gd, HEAD_DIM, BLOCK_D)
        visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
        probabilities, ds = _probabilities_and_ds(
            scores * (scale * LOG2_E), _add_product(zeros, grad, tl.trans(v)), visible, lse, delta,
            seed_ptr, row_and_head, i, j0, threshold, keep_scale,
        )  # fmt: skip
        grad_v = _add_product(grad_v, tl.trans(probabilities.to(grad.dtype)), grad)
        grad_k = _add_product(grad_k, tl.trans(ds.to(q.dtype)), q)
        if position_ptr is not None:
            ds_sum += tl.sum(ds, 0)

    _store(grad_k_ptr, grad_k * scale, row, h, heads, keys, j, HEAD_DIM, BLOCK_D)
    _store(grad_v_ptr, grad_v, row, h, heads, keys, j, HEAD_DIM, BLOCK_D)
    if position_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        grad_u = tl.sum(ds_sum[:, None] * k.to(tl.float32), 0) * scale
        tl.store(grad_u_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + d, grad_u, mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=[*SIZES, "batch", "splits"])
def attention_backward_position_kernel(
    grad_position_ptr,
    grad_bias_v_ptr,
    delta_ptr,
    grad_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    bias_u_ptr,
    bias_v_ptr,
    lengths_ptr,
    seed_ptr,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_gd,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_ph,
    stride_pm,
    stride_pd,
    batch,
    splits,
    heads,
    queries,
    keys,
    chunk_size,
    left_chunks,
    key_offset,
    scale,
    threshold,
    keep_scale,
    PADDED_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of position and bias_v.

    The tiles on one diagonal, those with the same difference of first key and first query, use the same two windows.
    A program runs down a diagonal, for every ``splits``-th row.  It writes the sums of the windows to grad_position
    [2, splits, H, 2 * Tk - 1, D] (low, high) and its share in the other gradient to grad_bias_v [splits, H, tiles, D].
    """
    tiles_q = tl.cdiv(queries, BLOCK)
    tiles_k = tl.cdiv(keys, BLOCK)
    diagonals = tiles_q + tiles_k - 1
    split_and_head = tl.program_id(0) // diagonals
    split = split_and_head // heads
    h = (split_and_head % heads).to(tl.int64)
    diagonal = tl.program_id(0) % diagonals - tiles_q + 1

    # a query sees nothing beyond its own chunk to the right, and beyond left_chunks more to the left
    ahead = diagonal * BLOCK - key_offset  # of the first key before the first query
    in_reach = (ahead - BLOCK < chunk_size - 1) & (-ahead - BLOCK < (left_chunks + 1) * chunk_size - 1)

    p_base = position_ptr + h * stride_ph
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    grad_low = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_high = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    sum_low = tl.zeros([BLOCK], tl.float32)
    sum_high = tl.zeros([BLOCK], tl.float32)
    for n in range(tl.cdiv(batch - split, splits)):
        row = (split + n * splits).to(tl.int64)
        row_and_head = (row * heads + h).to(tl.int32)
        length = _length(lengths_ptr, row, keys)
        end = tl.minimum(queries, length - diagonal * BLOCK)
        if not PADDED_QUERIES:
            end = tl.minimum(end, length - key_offset)
        end = tl.where(in_reach, end, 0)
        for i0 in range(tl.maximum(-diagonal, 0) * BLOCK, end, BLOCK):
            j0 = i0 + diagonal * BLOCK
            i = i0 + tl.arange(0, BLOCK)
            j = j0 + tl.arange(0, BLOCK)
            first, stop = _keys_of(i, length, queries, chunk_size, left_chunks, key_offset, PADDED_QUERIES)
            q_base = q_ptr + row * stride_qb + h * stride_qh
            k_base = k_ptr + row * stride_kb + h * stride_kh
            v_base = v_ptr + row * stride_vb + h * stride_vh
            grad_base = grad_ptr + row * stride_gb + h * stride_gh
            _, seen = _range(first, stop, BLOCK)
            q = _load(q_base, i, first < stop, stride_qt, stride_qd, HEAD_DIM, BLOCK_D)
            of_query = row_and_head.to(tl.int64) * queries + i
            lse = tl.load(lse_ptr + of_query, mask=first < stop, other=0.0)
            delta = tl.load(delta_ptr + of_query, mask=first < stop, other=0.0)
            q_v = _add_bias(q, bias_v_ptr, h, HEAD_DIM, BLOCK_D)
            q = _add_bias(q, bias_u_ptr, h, HEAD_DIM, BLOCK_D)
            m = keys - key_offset - i0 - BLOCK + j  # always the same; the windows are read anew to save registers
            p = _window(p_base, m, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            low = _add_scores(zeros, q_v, p)
            p = _window(p_base, m + BLOCK, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D)
            scores = _shear(low, _add_scores(zeros, q_v, p), BLOCK)
            k = _load(k_base, j, j < seen, stride_kt, stride_kd, HEAD_DIM, BLOCK_D)
            scores = _add_product(scores, q, tl.trans(k))
            grad = _load(grad_base, i, first < stop, stride_gt, stride_gd, HEAD_DIM, BLOCK_D)
            v = _load(v_base, j, j < seen, stride_vt, stride_vd, HEAD_DIM, BLOCK_D)
            visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
            _, ds = _probabilities_and_ds(
                scores * (scale * LOG2_E), _add_product(zeros, grad, tl.trans(v)), visible, lse, delta,
                seed_ptr, row_and_head, i, j0, threshold, keep_scale,
            )  # fmt: skip
            ds = _unshear(ds.to(q.dtype), BLOCK)
            nothing = tl.zeros_like(ds)
            ds_low = _merge(ds, nothing, BLOCK)
            ds_high = _merge(nothing, ds, BLOCK)
            grad_low = _add_product(grad_low, tl.trans(ds_low), q_v)
            grad_high = _add_product(grad_high, tl.trans(ds_high), q_v)
            sum_low += tl.sum(ds_low.to(tl.float32), 0)
            sum_high += tl.sum(ds_high.to(tl.float32), 0)

    rows = 2 * keys - 1
    d = tl.arange(0, BLOCK_D)
    low = keys - BLOCK + ahead + tl.arange(0, BLOCK)
    high = low + BLOCK
    low_ptr = grad_position_ptr + split_and_head.to(tl.int64) * rows * HEAD_DIM
    high_ptr = low_ptr + splits.to(tl.int64) * heads * rows * HEAD_DIM
    in_low = ((low >= 0) & (low < rows))[:, None] & (d < HEAD_DIM)[None, :]
    in_high = ((high >= 0) & (high < rows))[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(low_ptr + low.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], grad_low * scale, mask=in_low)
    tl.store(high_ptr + high.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], grad_high * scale, mask=in_high)
    p_low = _window(p_base, low, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D).to(tl.float32)
    p_high = _window(p_base, high, keys, stride_pm, stride_pd, HEAD_DIM, BLOCK_D).to(tl.float32)
    share = tl.sum(sum_low[:, None] * p_low, 0) + tl.sum(sum_high[:, None] * p_high, 0)
    tl.store(grad_bias_v_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + d, share * scale, mask=d < HEAD_DIM)


# ------------------------------------------------------------------------------------------------ launchers
def _config(kernel: str, q: Tensor, seed: Tensor | None) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    by_width = CONFIGS[kernel, q.element_size()]
    if seed is not None:
        by_width = CONFIGS.get((f"{kernel}_dropout", q.element_size()), by_width)
    block, num_warps, num_stages = by_width[min(width for width in by_width if width >= block_d)]
    blocks = {"BLOCK_M": block[0], "BLOCK_N": block[1]} if isinstance(block, tuple) else {"BLOCK": block}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return {"HEAD_DIM": q.shape[3], "BLOCK_D": block_d, **blocks, **options}


def _like_heads(x: Tensor) -> Tensor:
    """Memory for a result like x: [B, T, H, D], seen as [B, H, T, D]."""
    batch, heads, frames, width = x.shape
    return x.new_empty((batch, frames, heads, width)).transpose(1, 2)


def _numbers(
    q: Tensor, k: Tensor, chunk_size: int, num_left_chunks: int, key_offset: int, scale: float, dropout_p: float
) -> tuple[Any, ...]:
    """The numbers all kernels take: without chunks there is one that holds all, and "all to the left" is counted."""
    queries, keys = q.shape[2], k.shape[2]
    frames = max(key_offset + queries, keys, 1)
    chunk_size = min(chunk_size or frames, frames)
    last = (frames - 1) // chunk_size
    left_chunks = min(num_left_chunks, last) if num_left_chunks >= 0 else last
    threshold = threshold_as_int32(dropout_p)
    return queries, keys, chunk_size, left_chunks, key_offset, scale, threshold, 1 / (1 - dropout_p)


def _positions(rel: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Pointers and strides of position, bias_u and bias_v, which may be missing."""
    if not rel:
        return (None, None, None), (0, 0, 0)
    position, bias_u, bias_v = rel
    return (position, bias_u.contiguous(), bias_v.contiguous()), position.stride()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rel: tuple[Tensor, ...], lengths: Tensor | None, rule: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    chunk_size, num_left_chunks, key_offset, padded_queries, scale, dropout_p, seed = rule
    out = _like_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        config = _config("relative_forward" if rel else "forward", q, seed)
        tensors, strides = _positions(rel)
        grid = (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], config["BLOCK_M"]),)
        with torch.cuda.device_of(q):
            attention_forward_kernel[grid](
                out, lse, q, k, v, *tensors, None if lengths is None else lengths.contiguous(), seed,
                *q.stride(), *k.stride(), *v.stride(), *strides, q.shape[1],
                *_numbers(q, k, chunk_size, num_left_chunks, key_offset, scale, dropout_p),
                PADDED_QUERIES=padded_queries, **config,
            )  # fmt: skip
    return out, lse


def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: tuple[Tensor, ...],
    lengths: Tensor | None,
    rule: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    chunk_size, num_left_chunks, key_offset, padded_queries, scale, dropout_p, seed = rule
    batch, heads, queries, width = q.shape
    relative = "relative_" if rel else ""
    of_q = _config(f"{relative}backward_q", q, seed)
    of_kv = _config(f"{relative}backward_kv", q, seed)
    tiles_q, tiles_k = triton.cdiv(queries, of_q["BLOCK"]), triton.cdiv(k.shape[2], of_kv["BLOCK"])
    lse = lse.contiguous()
    delta = q.new_empty(lse.shape, dtype=torch.float32)
    grad_q, grad_k, grad_v = _like_heads(q), _like_heads(k), _like_heads(v)
    pointers, strides = _positions(rel)
    inputs = (lse, q, k, v, *pointers, None if lengths is None else lengths.contiguous(), seed)
    strides = (*q.stride(), *k.stride(), *v.stride(), *strides)
    sizes = (heads, *_numbers(q, k, chunk_size, num_left_chunks, key_offset, scale, dropout_p))
    grad_u = q.new_empty((batch, heads, tiles_k, width) if rel else 0, dtype=torch.float32)
    with torch.cuda.device_of(q):
        if grad_q.numel():
            attention_backward_q_kernel[(batch * heads * tiles_q,)](
                grad_q, delta, grad, out, *inputs, *grad.stride(), *out.stride(), *strides, *sizes,
                PADDED_QUERIES=padded_queries, **of_q,
            )  # fmt: skip
        if grad_k.numel():
            attention_backward_kv_kernel[(batch * heads * tiles_k,)](
                grad_k, grad_v, grad_u, delta, grad, *inputs, *grad.stride(), *strides, *sizes,
                PADDED_QUERIES=padded_queries, **of_kv,
            )  # fmt: skip
        if not rel:
            return grad_q, grad_k, grad_v
        splits = min(batch, SPLITS)
        of_position = _config("backward_position", q, seed)
        diagonals = triton.cdiv(queries, of_position["BLOCK"]) + triton.cdiv(k.shape[2], of_position["BLOCK"]) - 1
        grad_position = q.new_zeros((2, splits, *rel[0].shape), dtype=torch.float32)
        grad_bias_v = q.new_empty((splits, heads, diagonals, width), dtype=torch.float32)
        if grad_q.numel():
            attention_backward_position_kernel[(splits * heads * diagonals,)](
                grad_position, grad_bias_v, delta, grad, *inputs, *grad.stride(), *strides, batch, splits, *sizes,
                PADDED_QUERIES=padded_queries, **of_position,
            )  # fmt: skip
    sums = grad_position.sum((0, 1)), grad_u.sum((0, 2)), grad_bias_v.sum((0, 2))
    return grad_q, grad_k, grad_v, *(x.to(q.dtype) for x in sums)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *rule: Any) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results are those of the op ``fastflow::attention``."""
    return _forward(q, k, v, (), lengths, rule)


def attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *rule: Any
) -> tuple[Tensor, ...]:
    """Launch the backward kernels: the gradients of q, k and v."""
    return _backward(grad, out, lse, q, k, v, (), lengths, rule)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    lengths: Tensor | None,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel with the relative position term."""
    return _forward(q, k, v, (position, bias_u, bias_v), lengths, rule)


def relative_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    lengths: Tensor | None,
    *rule: Any,
) -> tuple[Tensor, ...]:
    """Launch the backward kernels: the gradients of q, k, v, position, bias_u and bias_v."""
    return _backward(grad, out, lse, q, k, v, (position, bias_u, bias_v), lengths, rule)
