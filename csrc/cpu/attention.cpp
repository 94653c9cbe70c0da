// attention on the CPU, forward and backward.  Compiled once per instruction set, with FASTFLOW_CAPABILITY as its
// namespace, and with -ffp-contract=fast: the compiler fuses the multiply-adds of the products.
//
// A tile is kQueries x kKeys scores.  The forward pass goes through the keys of a block of queries with a running
// softmax (FlashAttention-2, Dao 2023); the backward pass goes through the queries of a block of keys, forms each tile
// of scores once, and adds it to every gradient.
//
// The relative position term of a tile is a product with a window of `position` in which the row of every next query
// begins one column further to the left.  Seen as a matrix whose rows are one element longer, the tile is sheared by
// the same amount: so the term is an ordinary product added to such a view, and its gradients are products with it.
#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dtypes.h"
#include "kernels.h"
#include "matmul.h"
#include "philox.h"
#include "transpose.h"

namespace fastflow::cpu::FASTFLOW_CAPABILITY {
namespace {

constexpr int64_t kQueries = 48, kKeys = 96;
constexpr int64_t kMaxRow = kMaxWidth + 64;  // with what a matrix has beyond the width

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t round_down(int64_t x, int64_t to) { return x / to * to; }

// ------------------------------------------------------------------------------------------------ memory
// Hands out aligned pieces of the workspace; without one it only counts.
template <typename Real>
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<Real*>(memory)) {
    if (memory_) memory_ += -reinterpret_cast<uintptr_t>(memory_) % kAlignment / sizeof(Real);
  }
  Real* take(int64_t count) {
    Real* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count, kAlignment / sizeof(Real));
    return piece;
  }
  int64_t total() const { return used_ + kAlignment / sizeof(Real); }

 private:
  static constexpr int64_t kAlignment = 64;
  Real* memory_;
  int64_t used_ = 0;
};

// Row-major, `width` columns and more up to the stride, which is an odd number of cache lines: a column then uses every
// set of a cache.
template <typename Real>
struct Matrix {
  Real* data;
  int64_t stride;

  Matrix(Arena<Real>& arena, int64_t rows, int64_t width) {
    constexpr int64_t line = 64 / sizeof(Real);
    stride = round_up(width, max_of(line, kColumns<Real>));
    if (stride / line % 2 == 0) stride += line;
    data = arena.take(rows * stride);
  }
  Real* row(int64_t i) const { return data + i * stride; }
  Panels<Real> panels(int64_t first_row) const { return {row(first_row), stride, kColumns<Real>}; }
};

// The transpose of a row-major matrix, in panels of kColumns of its rows.
template <typename Real>
struct Transposed {
  Real* data;
  int64_t width;

  Transposed(Arena<Real>& arena, int64_t rows, int64_t width)
      : data(arena.take(round_up(rows, kColumns<Real>) * width)), width(width) {}
  Panels<Real> panels(int64_t first_row) const {
    return {data + first_row * width, kColumns<Real>, width * kColumns<Real>};
  }
};

// The scores of one tile.  The relative term touches up to kRows + kColumns elements on either side of a row.
template <typename Real>
struct Tile {
  static constexpr int64_t kMargin = round_up(kRows + kColumns<Real>, kLanes<Real>);
  static constexpr int64_t kStride = kKeys + 2 * kMargin;
  Real* data;

  explicit Tile(Arena<Real>& arena) : data(arena.take(kQueries * kStride)) {}
  Real* row(int64_t r) const { return data + r * kStride + kMargin; }
};

template <typename T>
const T* frame_at(const Heads& x, int64_t b, int64_t h, int64_t frame) {
  const int64_t row = x.row_starts ? x.row_starts[b] * x.frame_stride : b * x.row_stride;
  return static_cast<const T*>(x.data) + row + h * x.head_stride + frame * x.frame_stride;
}

template <typename T>
void read_frame(const T* from, int64_t stride, int64_t width, Wide<T>* __restrict to) {
  if (stride == 1)
    for (int64_t d = 0; d < width; ++d) to[d] = widen(from[d]);
  else
    for (int64_t d = 0; d < width; ++d) to[d] = widen(from[d * stride]);
}

template <typename T>
void write_frame(const Wide<T>* from, Wide<T> factor, const Heads& x, int64_t b, int64_t h, int64_t frame,
                 int64_t width) {
  T* to = const_cast<T*>(frame_at<T>(x, b, h, frame));  // results have channel_stride 1
  for (int64_t d = 0; d < width; ++d) narrow(from[d] * factor, to[d]);
}

template <typename T>
void write_zeros(const Heads& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t width) {
  if (x.row_starts) last = min_of(last, x.row_starts[b + 1] - x.row_starts[b]);  // there the next row begins
  for (int64_t i = first; i < last; ++i) {
    T* to = const_cast<T*>(frame_at<T>(x, b, h, i));
    for (int64_t d = 0; d < width; ++d) to[d] = T{};
  }
}

// Rows of `to` <- frames [first, first + count).
template <typename T>
void read_rows(const AttentionArgs& args, const Heads& x, int64_t b, int64_t h, int64_t first, int64_t count,
               Matrix<Wide<T>> to) {
  for (int64_t i = 0; i < count; ++i) {
    read_frame(frame_at<T>(x, b, h, first + i), x.channel_stride, args.width, to.row(i));
    for (int64_t d = args.width; d < to.stride; ++d) to.row(i)[d] = 0;
  }
}

// The same, transposed; the rest of the last panel becomes zero.
template <typename T>
void read_transposed(const AttentionArgs& args, const Heads& x, int64_t b, int64_t h, int64_t first, int64_t count,
                     Transposed<Wide<T>> to) {
  constexpr int64_t columns = kColumns<Wide<T>>;
  for (int64_t begin = 0; begin < count; begin += columns) {
    const T* from = frame_at<T>(x, b, h, first + begin);
    Wide<T>* panel = to.data + begin * args.width;
    const int64_t used = min_of(columns, count - begin);
    if (x.channel_stride == 1) {
      const T* rows[columns] = {};
      for (int64_t c = 0; c < used; ++c) rows[c] = from + c * x.frame_stride;
      transpose_rows(rows, args.width, panel);
      continue;
    }
    for (int64_t d = 0; d < args.width; ++d) {
      for (int64_t c = 0; c < used; ++c)
        panel[d * columns + c] = widen(from[c * x.frame_stride + d * x.channel_stride]);
      for (int64_t c = used; c < columns; ++c) panel[d * columns + c] = 0;
    }
  }
}

// ------------------------------------------------------------------------------------------------ rotation
inline bool turns(const AttentionArgs& args, int64_t h) { return args.cos && h == 0; }

// Neighbouring channels of one frame, `step` elements apart, turn by the angles of the frame; back for direction -1.
template <typename Real>
void turn(const AttentionArgs& args, int64_t frame, Real direction, int64_t step, Real* x) {
  const int64_t pairs = args.width / 2;
  const Real* cos = static_cast<const Real*>(args.cos) + frame * pairs;
  const Real* sin = static_cast<const Real*>(args.sin) + frame * pairs;
  for (int64_t k = 0; k < pairs; ++k) {
    Real &even = x[2 * k * step], &odd = x[(2 * k + 1) * step];
    const Real s = direction * sin[k], turned = even * cos[k] - odd * s;
    odd = odd * cos[k] + even * s;
    even = turned;
  }
}

// The keys of a head as read_transposed reads them, turned.
template <typename T>
void read_transposed_keys(const AttentionArgs& args, int64_t b, int64_t h, int64_t first, int64_t count,
                          Transposed<Wide<T>> to) {
  constexpr int64_t columns = kColumns<Wide<T>>;
  read_transposed<T>(args, args.k, b, h, first, count, to);
  if (!turns(args, h)) return;
  for (int64_t j = 0; j < count; ++j)
    turn<Wide<T>>(args, first + j, 1, columns, to.data + j / columns * columns * args.width + j % columns);
}

template <typename Real>
void multiply_by(const Real* factors, int64_t count, Real* __restrict x) {
  for (int64_t c = 0; c < count; ++c) x[c] *= factors[c];
}

template <typename Real>
void add(const Real* x, int64_t count, Real* __restrict sum) {
  for (int64_t d = 0; d < count; ++d) sum[d] += x[d];
}

// ------------------------------------------------------------------------------------------------ scores
// Queries with what the two terms of the score add to them.
template <typename Real>
struct Queries {
  Matrix<Real> content;   // q, or q + bias_u
  Matrix<Real> relative;  // q + bias_v; the same memory as `content` without the relative term

  Queries(Arena<Real>& arena, const AttentionArgs& args, int64_t rows)
      : content(arena, rows, args.width), relative(args.relative ? Matrix<Real>(arena, rows, args.width) : content) {}
};

// The queries times the scale of the scores.  One that sees no key is read as zero: whatever it holds, even NaN,
// reaches no gradient.
template <typename T>
void read_queries(const AttentionArgs& args, int64_t b, int64_t h, int64_t first, int64_t count, Queries<Wide<T>> to) {
  using Real = Wide<T>;
  const int64_t length = length_of(args, b);
  const Real scale = static_cast<Real>(args.scale);
  Real bias_u[kMaxRow] = {}, bias_v[kMaxRow] = {};
  if (args.relative) {
    read_frame(frame_at<T>(args.bias_u, 0, h, 0), args.bias_u.channel_stride, args.width, bias_u);
    read_frame(frame_at<T>(args.bias_v, 0, h, 0), args.bias_v.channel_stride, args.width, bias_v);
  }
  for (int64_t i = 0; i < count; ++i) {
    Real *content = to.content.row(i), *relative = to.relative.row(i);
    const Range keys = visible_keys(args, length, first + i);
    const bool blind = keys.begin >= keys.end;
    if (!blind) {
      read_frame(frame_at<T>(args.q, b, h, first + i), args.q.channel_stride, args.width, content);
      if (turns(args, h)) turn<Real>(args, first + i, 1, 1, content);
    }
    for (int64_t d = blind ? 0 : args.width; d < to.content.stride; ++d) content[d] = 0;
    const Real factor = blind ? 0 : scale;
    for (int64_t d = 0; d < to.content.stride; d += kLanes<Real>) {
      const Vector<Real> q = load(content + d);
      store(content + d, (q + load(bias_u + d)) * factor);
      if (args.relative) store(relative + d, (q + load(bias_v + d)) * factor);
    }
  }
}

// Queries [query, query + rows) and keys [key, key + columns); `key` is the first of a panel.
struct Span {
  int64_t query, rows, key, columns;
};

// The part of a tile with keys [first, last) that a block of queries sees.
template <typename Real>
Span visible_span(const AttentionArgs& args, int64_t length, int64_t query, int64_t rows, int64_t first, int64_t last) {
  const int64_t begin = visible_keys(args, length, query).begin;
  const int64_t end = visible_keys(args, length, query + rows - 1).end;
  first = max_of(first, round_down(begin, kColumns<Real>));
  return {query, rows, first, min_of(last, end) - first};
}

// The position row of the first query and key of a span.
inline int64_t position_of(const AttentionArgs& args, const Span& span) {
  return args.keys - 1 - (args.key_offset + span.query) + span.key;
}

// The scores of a tile, also where they are hidden.  `keys` starts at the span's first key; `position` at row
// `first_position`.
template <typename Real>
void find_scores(const AttentionArgs& args, const Span& span, const Queries<Real>& queries, int64_t first_query,
                 Panels<Real> keys, const Transposed<Real>& position, int64_t first_position,
                 const Tile<Real>& scores) {
  multiply<Left::rows>(span.rows, ceil_div(span.columns, kColumns<Real>), args.width, queries.content.row(first_query),
                       queries.content.stride, keys, scores.row(0), Tile<Real>::kStride, false);
  if (!args.relative) return;
  const int64_t origin = position_of(args, span) - first_position;
  const Panels<Real> window = position.panels(0);
  const int64_t first_panel = (origin - span.rows + 1) / kColumns<Real>;
  const int64_t last_panel = ceil_div(origin + span.columns, kColumns<Real>);
  for (int64_t p = first_panel; p < last_panel; ++p)
    for (int64_t r = 0; r < span.rows; r += kRows) {
      const int64_t rows = min_of(kRows, span.rows - r), column = p * kColumns<Real>;
      if (column >= origin - r + span.columns || column + kColumns<Real> <= origin - r - rows + 1) continue;
      Real* sheared = scores.row(r) + column - origin + r;
      constexpr int64_t stride = Tile<Real>::kStride + 1;
      multiply_rows<Left::rows>(rows, queries.relative.row(first_query + r), queries.relative.stride, window.panel(p),
                                window.stride, args.width, Start<Real>{sheared, stride}, sheared, stride);
    }
}

// Whether a vector of columns lies in the range.
template <typename Real>
inline bool is_inside(const Range& range, int64_t column) {
  return range.begin <= column && column + kLanes<Real> <= range.end;
}

// x where a column lies in the range, else `other`.
template <typename Real>
inline Vector<Real> where_inside(const Range& range, int64_t column, Vector<Real> x, Real other) {
  const Integers<Real> columns = lane_numbers<Real>() + static_cast<Integer<Real>>(column);
  const auto begin = static_cast<Integer<Real>>(range.begin), end = static_cast<Integer<Real>>(range.end);
  return ((columns >= begin) & (columns < end)) ? x : broadcast(other);
}

// Keys of the span that its query r sees, counted from the span's first.
inline Range visible_columns(const AttentionArgs& args, int64_t length, const Span& span, int64_t r) {
  const Range keys = visible_keys(args, length, span.query + r);
  return {min_of(max_of(keys.begin - span.key, 0), span.columns), min_of(keys.end - span.key, span.columns)};
}

// ------------------------------------------------------------------------------------------------ forward
template <typename Real>
struct ForwardMemory {
  Tile<Real> scores;
  Queries<Real> queries;
  Matrix<Real> sums;  // outputs, not yet divided by the totals
  Real *largest, *rescale;
  Real* totals;  // of each row, a vector of sums of some of the keys each
  Transposed<Real> keys;
  Matrix<Real> values;
  Transposed<Real> position;

  ForwardMemory(Arena<Real>& arena, const AttentionArgs& args)
      : scores(arena),
        queries(arena, args, kQueries),
        sums(arena, kQueries, args.width),
        largest(arena.take(kQueries)),
        rescale(arena.take(kQueries)),
        totals(arena.take(kQueries * kLanes<Real>)),
        keys(arena, args.keys, args.width),
        values(arena, args.keys, args.width),
        position(arena, args.relative ? 2 * args.keys - 1 : 0, args.width) {}
};

// x -> exp(x - anchor); returns the given total plus all of these.  A loop with its total in a register, see matmul.h.
template <typename Real>
[[gnu::noinline]] Vector<Real> exponentiate(Real* row, int64_t columns, Real anchor, Vector<Real> total) {
  for (int64_t c = 0; c < columns; c += kLanes<Real>) {
    const Vector<Real> p = exponential<Real>(load(row + c) - anchor);
    store(row + c, p);
    total += p;
  }
  return total;
}

// The running softmax: scores become probabilities times a factor of their row, and what was summed before is rescaled
// to the same factor.
template <typename Real>
void update_softmax(const AttentionArgs& args, int64_t b, int64_t h, const Span& span, ForwardMemory<Real>& memory) {
  constexpr Real kNone = -std::numeric_limits<Real>::infinity();
  const int64_t length = length_of(args, b);
  for (int64_t r = 0; r < span.rows; ++r) {
    const Range range = visible_columns(args, length, span, r);
    Real* row = memory.scores.row(r);
    Vector<Real> largest = broadcast(memory.largest[r]);
    for (int64_t c = 0; c < span.columns; c += kLanes<Real>) {
      Vector<Real> x = load(row + c);
      if (!is_inside<Real>(range, c)) store(row + c, x = where_inside(range, c, x, kNone));
      largest = larger_of<Real>(x, largest);
    }
    const Real before = memory.largest[r], now = reduce<Real>(largest, larger_of<Real>);
    memory.largest[r] = now;
    memory.rescale[r] = before - (now > kNone ? now : 0);
  }
  for (int64_t r = 0; r < span.rows; r += kLanes<Real>)
    store(memory.rescale + r, exponential<Real>(load(memory.rescale + r)));
  for (int64_t r = 0; r < span.rows; ++r) {
    Real* row = memory.scores.row(r);
    const Real anchor = memory.largest[r] > kNone ? memory.largest[r] : 0;
    Real* totals = memory.totals + r * kLanes<Real>;
    store(totals, exponentiate(row, span.columns, anchor, load(totals) * memory.rescale[r]));
    if (args.drops) {
      Real factors[kKeys];
      dropout_factors<kKeys>(args.dropout, b * args.heads + h, span.query + r, span.key, span.columns, factors);
      multiply_by(factors, span.columns, row);
    }
    Real* sums = memory.sums.row(r);
    if (memory.rescale[r] != 1)
      for (int64_t d = 0; d < args.width; ++d) sums[d] *= memory.rescale[r];
  }
}

template <typename T>
void write_blind(const AttentionArgs& args, int64_t b, int64_t h, int64_t first, int64_t last) {
  Wide<T>* lse = static_cast<Wide<T>*>(args.lse) + (b * args.heads + h) * args.queries;
  write_zeros<T>(args.out, b, h, first, last, args.width);
  for (int64_t i = first; i < last; ++i) lse[i] = std::numeric_limits<Wide<T>>::infinity();
}

// Keys and position rows from these on are in memory.
struct Origin {
  int64_t key, position;
};

template <typename T>
void forward_block(const AttentionArgs& args, int64_t b, int64_t h, int64_t query, int64_t rows, const Origin& origin,
                   ForwardMemory<Wide<T>>& memory) {
  using Real = Wide<T>;
  const int64_t length = length_of(args, b);
  read_queries<T>(args, b, h, query, rows, memory.queries);
  for (int64_t r = 0; r < rows; ++r) {
    memory.largest[r] = -std::numeric_limits<Real>::infinity();
    store(memory.totals + r * kLanes<Real>, Vector<Real>{});
    for (int64_t d = 0; d < memory.sums.stride; ++d) memory.sums.row(r)[d] = 0;
  }
  const int64_t begin = visible_keys(args, length, query).begin, end = visible_keys(args, length, query + rows - 1).end;
  for (int64_t key = round_down(begin, kKeys); key < end; key += kKeys) {
    const Span span = visible_span<Real>(args, length, query, rows, key, key + kKeys);
    find_scores(args, span, memory.queries, 0, memory.keys.panels(span.key - origin.key), memory.position,
                origin.position, memory.scores);
    update_softmax(args, b, h, span, memory);
    multiply<Left::rows>(rows, ceil_div(args.width, kColumns<Real>), span.columns, memory.scores.row(0),
                         Tile<Real>::kStride, memory.values.panels(span.key - origin.key), memory.sums.row(0),
                         memory.sums.stride, true);
  }
  Real* lse = static_cast<Real*>(args.lse) + (b * args.heads + h) * args.queries + query;
  for (int64_t r = 0; r < rows; ++r) {
    const Vector<Real> totals = load(memory.totals + r * kLanes<Real>);
    const Real total = reduce<Real>(totals, [](Vector<Real> x, Vector<Real> y) { return x + y; });
    const bool blind = total == 0;
    write_frame<T>(memory.sums.row(r), blind ? Real(0) : 1 / total, args.out, b, h, query + r, args.width);
    lse[r] = blind ? std::numeric_limits<Real>::infinity() : memory.largest[r] + std::log(total);
  }
}

// Queries [first, last) of one row and head.
template <typename T>
void forward_task(const AttentionArgs& args, int64_t b, int64_t h, int64_t first, int64_t last,
                  ForwardMemory<Wide<T>>& memory) {
  using Real = Wide<T>;
  const int64_t length = length_of(args, b), active = min_of(last, active_queries(args, b));
  write_blind<T>(args, b, h, max_of(first, active), last);
  if (first >= active) return;
  const int64_t begin = round_down(visible_keys(args, length, first).begin, kColumns<Real>);
  const int64_t keys = max_of(0, visible_keys(args, length, active - 1).end - begin);
  const Origin origin = {begin, args.keys - args.key_offset - active + begin};
  read_transposed_keys<T>(args, b, h, begin, keys, memory.keys);
  read_rows<T>(args, args.v, b, h, begin, keys, memory.values);
  if (args.relative && keys)
    read_transposed<T>(args, args.position, 0, h, origin.position, keys + active - first - 1, memory.position);
  for (int64_t query = first; query < active; query += kQueries)
    forward_block<T>(args, b, h, query, min_of(kQueries, active - query), origin, memory);
}

// ------------------------------------------------------------------------------------------------ backward
template <typename Real>
struct BackwardMemory {
  Tile<Real> scores, probabilities;
  // All queries of a row.
  Queries<Real> queries, grad_queries;
  Matrix<Real> grad;
  Real *lse, *delta;
  // One block of keys.
  Transposed<Real> transposed_keys, transposed_values;
  Matrix<Real> keys, grad_keys, grad_values;
  // All of a head.
  Matrix<Real> position, grad_position;
  Transposed<Real> transposed_position;

  BackwardMemory(Arena<Real>& arena, const AttentionArgs& args)
      : scores(arena),
        probabilities(arena),
        queries(arena, args, args.queries),
        grad_queries(arena, args, args.queries),
        grad(arena, args.queries, args.width),
        lse(arena.take(args.queries)),
        delta(arena.take(args.queries)),
        transposed_keys(arena, kKeys, args.width),
        transposed_values(arena, kKeys, args.width),
        keys(arena, kKeys, args.width),
        grad_keys(arena, kKeys, args.width),
        grad_values(arena, kKeys, args.width),
        position(arena, args.relative ? 2 * args.keys - 1 : 0, args.width),
        grad_position(arena, args.relative ? 2 * args.keys - 1 : 0, args.width),
        transposed_position(arena, args.relative ? 2 * args.keys - 1 : 0, args.width) {}
};

template <typename Real>
void clear(const Matrix<Real>& x, int64_t rows) {
  for (int64_t n = 0; n < rows * x.stride; ++n) x.data[n] = 0;
}

// For one query: scores become their gradients, and the gradients of the probabilities become the probabilities.
template <typename Real>
[[gnu::noinline]] void differentiate_row(const Range& visible, int64_t columns, Real lse, Real delta, Real* scores,
                                         Real* probabilities) {
  for (int64_t c = 0; c < columns; c += kLanes<Real>) {
    Vector<Real> p = exponential<Real>(load(scores + c) - lse), grad = load(probabilities + c);
    if (!is_inside<Real>(visible, c)) {
      p = where_inside(visible, c, p, Real(0));
      grad = where_inside(visible, c, grad, delta);
    }
    store(probabilities + c, p);
    store(scores + c, p * (grad - delta));
  }
}

// The same for a tile with dropout, which acts on both; around the scores come zeros, for the sheared products.
template <typename Real>
void differentiate(const AttentionArgs& args, int64_t b, int64_t h, const Span& span, BackwardMemory<Real>& memory) {
  const int64_t length = length_of(args, b);
  for (int64_t r = 0; r < span.rows; ++r) {
    Real *scores = memory.scores.row(r), *probabilities = memory.probabilities.row(r);
    Real factors[kKeys];
    if (args.drops) {
      dropout_factors<kKeys>(args.dropout, b * args.heads + h, span.query + r, span.key, span.columns, factors);
      multiply_by(factors, span.columns, probabilities);
    }
    differentiate_row(visible_columns(args, length, span, r), span.columns, memory.lse[span.query + r],
                      memory.delta[span.query + r], scores, probabilities);
    if (args.drops) multiply_by(factors, span.columns, probabilities);
    if (args.relative)
      for (int64_t n = 0; n < kRows; ++n) scores[n - kRows] = scores[span.columns + n] = 0;
  }
}

// What the relative position term passes on to the queries and to `position`: products with the sheared view of the
// gradients of the scores, each over that part of the view only in which a block of kRows rows is not zero.
template <typename Real>
void add_relative_gradients(const AttentionArgs& args, const Span& span, BackwardMemory<Real>& memory) {
  constexpr int64_t kShear = Tile<Real>::kStride + 1;
  const int64_t origin = position_of(args, span);
  const Matrix<Real>&position = memory.position, &grad_position = memory.grad_position;
  const Matrix<Real>&queries = memory.queries.relative, &grad_queries = memory.grad_queries.relative;
  for (int64_t d = 0; d < args.width; d += kColumns<Real>) {
    for (int64_t r = 0; r < span.rows; r += kRows) {
      const int64_t rows = min_of(kRows, span.rows - r);
      Real* sums = grad_queries.row(span.query + r) + d;
      multiply_rows<Left::rows>(rows, memory.scores.row(r) - rows + 1, kShear, position.row(origin - r - rows + 1) + d,
                                position.stride, span.columns + rows - 1, Start<Real>{sums, grad_queries.stride}, sums,
                                grad_queries.stride);
    }
    for (int64_t m = origin - span.rows + 1; m < origin + span.columns; m += kRows) {
      const int64_t count = min_of(kRows, origin + span.columns - m);
      const int64_t first = max_of(0, origin - m - count + 1), last = min_of(span.rows, origin - m + span.columns);
      Real* sums = grad_position.row(m) + d;
      multiply_rows<Left::columns>(count, memory.scores.row(first) + m - origin + first, kShear,
                                   queries.row(span.query + first) + d, queries.stride, last - first,
                                   Start<Real>{sums, grad_position.stride}, sums, grad_position.stride);
    }
  }
}

// Adds one tile to every gradient; `offset` is the span's first key in the block of keys in memory.
template <typename Real>
void backward_tile(const AttentionArgs& args, int64_t b, int64_t h, const Span& span, int64_t offset,
                   BackwardMemory<Real>& memory) {
  constexpr int64_t kStride = Tile<Real>::kStride;
  const int64_t rows = span.rows, columns = span.columns, panels = ceil_div(args.width, kColumns<Real>);
  Real *scores = memory.scores.row(0), *probabilities = memory.probabilities.row(0);
  const Matrix<Real>&queries = memory.queries.content, &grad_queries = memory.grad_queries.content;
  const Matrix<Real>& grad = memory.grad;
  find_scores(args, span, memory.queries, span.query, memory.transposed_keys.panels(offset), memory.transposed_position,
              0, memory.scores);
  multiply<Left::rows>(rows, ceil_div(columns, kColumns<Real>), args.width, grad.row(span.query), grad.stride,
                       memory.transposed_values.panels(offset), probabilities, kStride, false);
  differentiate(args, b, h, span, memory);
  multiply<Left::columns>(columns, panels, rows, probabilities, kStride, grad.panels(span.query),
                          memory.grad_values.row(offset), memory.grad_values.stride, true);
  multiply<Left::columns>(columns, panels, rows, scores, kStride, queries.panels(span.query),
                          memory.grad_keys.row(offset), memory.grad_keys.stride, true);
  multiply<Left::rows>(rows, panels, columns, scores, kStride, memory.keys.panels(offset), grad_queries.row(span.query),
                       grad_queries.stride, true);
  if (args.relative) add_relative_gradients(args, span, memory);
}

// The queries of a row with all that the backward pass needs of them.  As in read_queries, what belongs to a query that
// sees no key is not read.
template <typename T>
void prepare_queries(const AttentionArgs& args, int64_t b, int64_t h, int64_t active, BackwardMemory<Wide<T>>& memory) {
  using Real = Wide<T>;
  const int64_t length = length_of(args, b);
  const Real* lse = static_cast<const Real*>(args.lse) + (b * args.heads + h) * args.queries;
  read_queries<T>(args, b, h, 0, active, memory.queries);
  clear(memory.grad_queries.content, active);
  if (args.relative) clear(memory.grad_queries.relative, active);
  clear(memory.grad, active);
  for (int64_t i = 0; i < active; ++i) {
    memory.lse[i] = memory.delta[i] = 0;
    const Range keys = visible_keys(args, length, i);
    if (keys.begin >= keys.end) continue;
    Real out[kMaxWidth];
    read_frame(frame_at<T>(args.out, b, h, i), args.out.channel_stride, args.width, out);
    read_frame(frame_at<T>(args.grad, b, h, i), args.grad.channel_stride, args.width, memory.grad.row(i));
    memory.lse[i] = lse[i];
    for (int64_t d = 0; d < args.width; ++d) memory.delta[i] += out[d] * memory.grad.row(i)[d];
  }
}

template <typename T>
void write_query_gradients(const AttentionArgs& args, int64_t b, int64_t h, int64_t active, Wide<T>* bias_u,
                           Wide<T>* bias_v, BackwardMemory<Wide<T>>& memory) {
  for (int64_t i = 0; i < active; ++i) {
    Wide<T>* content = memory.grad_queries.content.row(i);
    if (args.relative) {
      const Wide<T>* relative = memory.grad_queries.relative.row(i);
      add(content, args.width, bias_u);
      add(relative, args.width, bias_v);
      add(relative, args.width, content);
    }
    if (turns(args, h)) turn<Wide<T>>(args, i, -1, 1, content);
    write_frame<T>(content, static_cast<Wide<T>>(args.scale), args.grad_q, b, h, i, args.width);
  }
  write_zeros<T>(args.grad_q, b, h, active, args.queries, args.width);
}

// The gradients of one row and head; those of the relative position term are added to what memory, bias_u and bias_v
// hold.
template <typename T>
void backward_row(const AttentionArgs& args, int64_t b, int64_t h, Wide<T>* bias_u, Wide<T>* bias_v,
                  BackwardMemory<Wide<T>>& memory) {
  using Real = Wide<T>;
  const int64_t length = length_of(args, b), active = active_queries(args, b);
  const int64_t begin = active ? round_down(visible_keys(args, length, 0).begin, kKeys) : 0;
  const int64_t end = active ? max_of(begin, visible_keys(args, length, active - 1).end) : 0;
  prepare_queries<T>(args, b, h, active, memory);
  for (int64_t key = begin; key < end; key += kKeys) {
    const int64_t columns = min_of(kKeys, end - key);
    read_transposed_keys<T>(args, b, h, key, columns, memory.transposed_keys);
    read_transposed<T>(args, args.v, b, h, key, columns, memory.transposed_values);
    read_rows<T>(args, args.k, b, h, key, columns, memory.keys);
    if (turns(args, h))
      for (int64_t j = 0; j < columns; ++j) turn<Real>(args, key + j, 1, 1, memory.keys.row(j));
    clear(memory.grad_keys, columns);
    clear(memory.grad_values, columns);
    for (int64_t query = 0; query < active; query += kQueries) {
      const int64_t rows = min_of(kQueries, active - query);
      const Span span = visible_span<Real>(args, length, query, rows, key, key + columns);
      if (span.columns > 0) backward_tile(args, b, h, span, span.key - key, memory);
    }
    for (int64_t j = 0; j < columns; ++j) {
      if (turns(args, h)) turn<Real>(args, key + j, -1, 1, memory.grad_keys.row(j));
      write_frame<T>(memory.grad_keys.row(j), 1, args.grad_k, b, h, key + j, args.width);
      write_frame<T>(memory.grad_values.row(j), 1, args.grad_v, b, h, key + j, args.width);
    }
  }
  for (const Heads& x : {args.grad_k, args.grad_v}) {
    write_zeros<T>(x, b, h, 0, begin, args.width);
    write_zeros<T>(x, b, h, end, args.keys, args.width);
  }
  write_query_gradients<T>(args, b, h, active, bias_u, bias_v, memory);
}

template <typename T>
void backward_task(const AttentionArgs& args, int64_t group, int64_t h, BackwardMemory<Wide<T>>& memory) {
  using Real = Wide<T>;
  const int64_t width = args.width, positions = 2 * args.keys - 1;
  Real bias_u[kMaxWidth] = {}, bias_v[kMaxWidth] = {};
  if (args.relative) {
    read_rows<T>(args, args.position, 0, h, 0, positions, memory.position);
    read_transposed<T>(args, args.position, 0, h, 0, positions, memory.transposed_position);
    clear(memory.grad_position, positions);
  }
  for (int64_t b = group; b < args.batch; b += args.groups) backward_row<T>(args, b, h, bias_u, bias_v, memory);
  if (!args.relative) return;
  const int64_t index = group * args.heads + h;
  Real* sums = static_cast<Real*>(args.position_sums) + index * positions * width;
  for (int64_t m = 0; m < positions; ++m) std::copy_n(memory.grad_position.row(m), width, sums + m * width);
  Real* bias_sums = static_cast<Real*>(args.bias_sums);
  Real *u_sums = bias_sums + index * width, *v_sums = u_sums + args.groups * args.heads * width;
  for (int64_t d = 0; d < width; ++d) {
    u_sums[d] = bias_u[d] * static_cast<Real>(args.scale);
    v_sums[d] = bias_v[d] * static_cast<Real>(args.scale);
  }
}

template <template <typename> class Memory, typename Real>
int64_t elements_of(const AttentionArgs& args) {
  Arena<Real> arena(nullptr);
  const Memory<Real> memory(arena, args);
  return arena.total();
}

}  // namespace

int64_t attention_workspace(const AttentionArgs& args, Dtype dtype, bool backward) {
  int64_t elements = 0;
  with_dtype(dtype, [&](auto zero) {
    using Real = Wide<decltype(zero)>;
    elements = backward ? elements_of<BackwardMemory, Real>(args) : elements_of<ForwardMemory, Real>(args);
  });
  return elements;
}

void attention_forward(const AttentionArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Arena<Wide<T>> arena(workspace);
    ForwardMemory<Wide<T>> memory(arena, args);
    const int64_t chunk = round_up(ceil_div(args.queries, args.query_chunks), kQueries);
    for (int64_t task; (task = next++) < args.batch * args.heads * args.query_chunks;) {
      const int64_t head = task / args.query_chunks, first = task % args.query_chunks * chunk;
      forward_task<T>(args, head / args.heads, head % args.heads, min_of(first, args.queries),
                      min_of(first + chunk, args.queries), memory);
    }
  });
}

void attention_backward(const AttentionArgs& args, Dtype dtype, void* workspace, std::atomic<int64_t>& next) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Arena<Wide<T>> arena(workspace);
    BackwardMemory<Wide<T>> memory(arena, args);
    for (int64_t task; (task = next++) < args.groups * args.heads;)
      backward_task<T>(args, task / args.heads, task % args.heads, memory);
  });
}

void attention_sum(const void* sums, int64_t groups, int64_t count, Dtype dtype, void* result, int64_t begin,
                   int64_t end) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Wide<T>* from = static_cast<const Wide<T>*>(sums);
    for (int64_t n = begin; n < end; ++n) {
      Wide<T> sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += from[g * count + n];
      narrow(sum, static_cast<T*>(result)[n]);
    }
  });
}

}  // namespace fastflow::cpu::FASTFLOW_CAPABILITY
