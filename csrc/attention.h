// attention: arguments and the mask rule.  The maths is in fastflow/ops/attention.py.
#pragma once

#include "dropout.h"

namespace fastflow {

constexpr int64_t kMaxWidth = 256;  // of a head

// [B, H, T, D], or without B for the position table; strides in elements.
struct Heads {
  void* data;
  int64_t row_stride, head_stride, frame_stride, channel_stride;
  // Null, or where the rows lie one after the other: the frame where each begins, and the one where the last ends.
  const int64_t* row_starts = nullptr;
};

struct AttentionArgs {
  int64_t batch, heads, queries, keys, width;
  Heads q, k, v, out;
  void* lse;  // [B, H, Tq], contiguous; +infinity where a query sees no key

  // The relative position term, if `relative`.  The biases have one "frame".
  bool relative;
  Heads position, bias_u, bias_v;

  // Null, or the cosines and sines by which a frame turns head 0 of q and k: [T, D / 2] each, in the type of lse.
  const void *cos, *sin;

  const void* lengths;  // [B], or null
  bool lengths_are_64_bit;
  int64_t lengths_stride;
  int64_t chunk_size, num_left_chunks, key_offset;
  bool padded_queries;
  double scale;

  bool drops;
  Dropout dropout;  // of the probabilities, if it drops any

  int64_t query_chunks;  // forward: tasks of each row and head

  // Backward: a task is a group of rows (b = group, group + groups, ...) and a head.
  int64_t groups;
  Heads grad, grad_q, grad_k, grad_v;
  // What each group adds to the gradients of the relative position term, in the type of lse and contiguous:
  // [groups, H, 2*Tk-1, D] and [2, groups, H, D].
  void *position_sums, *bias_sums;
};

// The row's own number, which may be more or less than there are keys.
FASTFLOW_HD static inline int64_t length_of(const AttentionArgs& args, int64_t b) {
  if (!args.lengths) return args.keys;
  const int64_t at = b * args.lengths_stride;
  return args.lengths_are_64_bit ? static_cast<const int64_t*>(args.lengths)[at]
                                 : static_cast<const int32_t*>(args.lengths)[at];
}

// Queries [0, active) of a row are computed; the others see no key.
FASTFLOW_HD static inline int64_t active_queries(const AttentionArgs& args, int64_t b) {
  if (!args.lengths) return args.queries;
  const int64_t length = length_of(args, b);
  if (length <= 0) return 0;
  return args.padded_queries ? args.queries : min_of(args.queries, max_of(0, length - args.key_offset));
}

struct Range {
  int64_t begin, end;
};

// The keys that query i sees; none if begin >= end.  Both ends grow with i.
FASTFLOW_HD static inline Range visible_keys(const AttentionArgs& args, int64_t length, int64_t i) {
  Range range = {0, min_of(max_of(length, 0), args.keys)};
  if (args.chunk_size > 0) {
    const int64_t chunk = (args.key_offset + i) / args.chunk_size;
    range.end = min_of(range.end, (chunk + 1) * args.chunk_size);
    if (args.num_left_chunks >= 0) range.begin = max_of(0, chunk - args.num_left_chunks) * args.chunk_size;
  }
  return range;
}

}  // namespace fastflow
