// cpu_sides.h: what the kernels of every option share, forward and backward: q, k and v with their
// weights, biases and scales, the tokens they walk, and the statistic of a head.
//
// A head becomes a row of floats in the order of its channels. Sums are of doubles: no order of
// summation shows, no square leaves their range, and a row of all heads is as good as one head.
#ifndef QKROPE_CPU_SIDES_H
#define QKROPE_CPU_SIDES_H

#include "cpu_turns.h"

namespace qk {
namespace {

template <class V, int kType>
class Sides {
 protected:
  using F = typename V::F;
  using Turn = Turns<V, kType>;
  using Round = typename Turn::Round;
  static constexpr int N = V::N, kWidth = Turn::kWidth, kSize = kType == QK_F32 ? 4 : 2;
  // Heads that go through together: their roots and divisions take long, and none waits for
  // another.
  static constexpr int kBatch = 4;
  enum { kQ, kK, kV, kSides };
  // Operands that move with the token: x, y and scale of each side, then the angles' sources, then
  // the gradients of the outputs.
  enum { kX, kY, kScale, kPos = 3 * kSides, kCos, kSin, kDy, kWalks = kDy + kSides };

  // Mean, and what the deviation is multiplied with or (an l2 norm in steps) divided by.
  struct Statistic {
    float mean, by;
    bool clamped;  // an l2 norm that is eps instead
  };

  // A head on its way, and where its next step puts it.
  struct Row {
    float *now, *next;
    void step() {
      float* last = now;
      now = next, next = last;
    }
  };

  struct Side {
    const qk_side* args;
    const qk_side_variant* spec;
    int weight_type;
    bool turns, has_scale, normalises;
    bool weight_varies, scale_varies;  // from head to head
    long long ahead;                   // bytes to the next token's x, fetched meanwhile
    alignas(64) float weight[kWidth], bias[kWidth], scale[kWidth];
  };

  static constexpr qk_side kAbsent{};

  const qk_variant& variant_;
  const qk_params& params_;
  Side sides_[kSides];
  Turn turn_;
  bool turns_ = false;  // this token

  // only_v: q and k are the other kernel's.
  Sides(const qk_variant& v, const qk_params& p, bool only_v)
      : variant_(v), params_(p), turn_(v, p, false) {
    set_side(sides_[kQ], only_v ? kAbsent : p.q, v.q, v.q_weight_dtype, v.angle != QK_ANGLE_NONE);
    set_side(sides_[kK], only_v ? kAbsent : p.k, v.k, v.k_weight_dtype, v.angle != QK_ANGLE_NONE);
    set_side(sides_[kV], p.v, v.v, v.v_weight_dtype, false);
  }
  Sides(const Sides&) = delete;

  // Calls step(walk, next) for each token: where its operands are, and those of the one behind it.
  // sides_[].ahead and turns_ are then the token's.
  template <class Step>
  void each_token(long long begin, long long end, const qk_grads* grads, Step step) {
    const qk_params& p = params_;
    const long long table = size_of(p.table_dtype);
    Walk walks[kWalks] = {};
    for (int i = 0; i < kSides; i++) {
      const qk_side& s = *sides_[i].args;
      if (!s.heads) continue;
      walks[3 * i + kX] = {s.x_dim, kSize};
      walks[3 * i + kY] = {s.y_dim, kSize};
      if (s.scale_of) walks[3 * i + kScale] = {s.scale_dim, size_of(s.scale_dtype)};
    }
    if (grads) {
      const qk_side_grads* dy[] = {&grads->q, &grads->k, &grads->v};
      for (int i = 0; i < kSides; i++)
        if (dy[i]->dy) walks[kDy + i] = {dy[i]->dy_dim, kSize};
    }
    if (p.pos) walks[kPos] = {p.pos_dim, p.pos_wide ? 8 : 4};
    if (p.cos) walks[kCos] = {p.cos_dim, table}, walks[kSin] = {p.sin_dim, table};
    Cursor<kWalks> cursor(p, walks, begin), next = cursor;
    for (long long token = begin; token < end; token++, cursor = next) {
      if (token + 1 < end) next.next();
      for (int i = 0; i < kSides; i++)
        sides_[i].ahead = next.at[3 * i + kX] - cursor.at[3 * i + kX];
      const long long index = token % p.last_size;
      turns_ = index >= p.rotate_from && index < p.rotate_to;
      step(cursor.at, next.at);
    }
  }

  bool any_turns() const { return turns_ && (sides_[kQ].turns || sides_[kK].turns); }

  // ---- once a call ----

  void set_side(Side& s, const qk_side& args, const qk_side_variant& spec, int type, bool turns) {
    s.args = &args, s.spec = &spec;
    s.weight_type = type, s.turns = turns && args.heads;
    if (!args.heads) return;
    s.normalises = spec.norm != QK_NORM_NONE;
    s.has_scale = args.scale_of || args.scale != 1.0f;
    s.weight_varies = args.weight_head || args.bias_head;
    s.scale_varies = args.scale_of && args.scale_head;
    for (int d = 0; args.scale_of && d < params_.ndim; d++) s.scale_varies |= !!args.scale_dim[d];
    for (int i = 0; i < kWidth; i++) s.weight[i] = 1, s.bias[i] = 0, s.scale[i] = args.scale;
    if (!s.weight_varies) read_weight(s, 0);
    if (args.scale_of && !s.scale_varies) read_scale(s, 0, 0);
  }

  // Weight and bias of a head, in steps rounded as the chain rounds them.
  void read_weight(Side& s, int head) {
    const qk_side& a = *s.args;
    const int dim = s.spec->dim, count = s.spec->weight_dim;
    const bool steps = s.spec->round_norm == QK_ROUND_A || s.spec->round_norm == QK_ROUND_C;
    if (a.weight) {
      const long long bytes = head * a.weight_head * size_of(s.weight_type);
      read_floats<V>(at(a.weight, bytes), s.weight_type, 1, count, s.weight);
      for (int i = 0; i < count; i++) s.weight[i] += i < dim ? a.weight_offset : a.rest_offset;
    }
    if (a.bias) {
      const long long bytes = head * a.bias_head * size_of(a.bias_dtype);
      read_floats<V>(at(a.bias, bytes), a.bias_dtype, 1, count, s.bias);
    }
    for (int i = 0; steps && i < count; i += N) {
      V::store(s.weight + i, Round::round(V::load(s.weight + i)));
      V::store(s.bias + i, Round::round(V::load(s.bias + i)));
    }
  }

  void read_scale(Side& s, long long offset, int head) {
    const qk_side& a = *s.args;
    const char* from = at(a.scale_of, offset + head * a.scale_head * size_of(a.scale_dtype));
    if (a.scale_channel)
      return read_floats<V>(from, a.scale_dtype, a.scale_channel, variant_.head_dim, s.scale);
    read_floats<V>(from, a.scale_dtype, 1, 1, s.scale);
    const F one(s.scale[0]);
    for (int i = 0; i < variant_.head_dim; i += N) V::store(s.scale + i, one);
  }

  // ---- once a token, or a head of a table with a row for each ----

  void set_turn(Turn& turn, const long long* walk, int head) {
    const qk_params& p = params_;
    const long long size = size_of(p.table_dtype);
    turn.set(at(p.pos, walk[kPos]), at(p.cos, walk[kCos] + head * p.cos_head * size),
             at(p.sin, walk[kSin] + head * p.sin_head * size));
  }

  // ---- a head ----

  void fetch(const char* x) const {
    for (int line = 0; line < variant_.head_dim * kSize; line += 64) __builtin_prefetch(x + line);
  }

  // Its elements as floats; `ahead` bytes from them are those of the next token.
  void widen(const char* x, long long ahead, float* to) const {
    const int dim = variant_.head_dim;
    int i = 0;
    fetch(x + ahead);
    for (; i + N <= dim; i += N) V::store(to + i, V::template widen<kType>(x + i * kSize));
    for (; i < dim; i++) to[i] = load_float(x + i * kSize, kType);
  }

  void load(const Side& s, const long long* own, const long long* walk, int head, Row& row) {
    widen(at(s.args->x, own[kX] + head * s.args->x_head * kSize), s.ahead, row.now);
    if (s.turns && variant_.rope_first) turn(turn_, s, walk, head, row);
  }

  void turn(Turn& by, const Side& s, const long long* walk, int head, Row& row) {
    if (!turns_) {
      if (by.move(row.now, row.next)) row.step();
      return;
    }
    if (params_.table_heads) set_turn(by, walk, head);
    by.apply(row.now, row.next, s.spec->round_turn);
    row.step();
  }

  // Sum of the deviations from `mean` of channels [begin, end), or of their squares.
  template <bool kSquares>
  static double sum(const float* row, float mean, int begin, int end) {
    typename V::D a{}, b{};
    const F minus(-mean);
    int i = begin;
    for (; i + N <= end; i += N) {
      typename V::D lo, hi;
      V::widen(add(V::load(row + i), minus), lo, hi);
      if (kSquares) lo *= lo, hi *= hi;
      a += lo, b += hi;
    }
    double total = V::total(a + b);
    for (; i < end; i++) {
      const double x = row[i] - mean;
      total += kSquares ? x * x : x;
    }
    return total;
  }

  static Statistic statistic(const Side& s, int norm, float eps, const Row& row, int begin,
                             int end) {
    float mean = 0;
    if (norm == QK_NORM_LAYER) mean = (float)(sum<false>(row.now, 0, begin, end) / (end - begin));
    return finish(s, norm, eps, mean, sum<true>(row.now, mean, begin, end), end - begin);
  }

  // Of all heads of a token as one row, read twice where the mean is needed first.
  Statistic statistic_of_all(const Side& s, const long long* own, const long long* walk,
                             Row* rows) {
    const int norm = s.spec->norm, heads = s.args->heads, dim = variant_.head_dim;
    const double count = (double)heads * dim;
    double total = 0, squares = 0;
    float mean = 0;
    for (int head = 0; norm == QK_NORM_LAYER && head < heads; head++) {
      load(s, own, walk, head, rows[head % kBatch]);
      total += sum<false>(rows[head % kBatch].now, 0, 0, dim);
    }
    if (norm == QK_NORM_LAYER) mean = (float)(total / count);
    for (int head = 0; head < heads; head++) {
      load(s, own, walk, head, rows[head % kBatch]);
      squares += sum<true>(rows[head % kBatch].now, mean, 0, dim);
    }
    return finish(s, norm, s.args->eps, mean, squares, count);
  }

  static bool divides(const Side& s, int norm) {
    return norm == QK_NORM_L2 && s.spec->round_norm == QK_ROUND_C;
  }

  static Statistic finish(const Side& s, int norm, float eps, float mean, double squares,
                          double count) {
    double by;
    bool clamped = false;
    if (norm == QK_NORM_L2) {
      const double length = __builtin_sqrt(squares);
      clamped = length < eps;  // a NaN stays
      by = clamped ? eps : length;
      if (!divides(s, norm)) by = 1 / by;
    } else {
      by = 1 / __builtin_sqrt(squares / count + eps);
    }
    if (s.spec->round_norm != QK_ROUND_C) return {mean, (float)by, clamped};
    float rounded[N];
    V::store(rounded, Round::round(F((float)by)));
    return {mean, rounded[0], clamped};
  }

  void store(const float* row, char* y) const {
    store_as(y, [&](int i) { return V::load(row + i); });
  }

  // of(i): the N channels from i on.
  template <class Source>
  void store_as(char* y, Source of) const {
    const int dim = variant_.head_dim;
    F e, o;
    int i = 0;
    for (; i + 2 * N <= dim; i += 2 * N) {
      V::template arrange<kType, false>(of(i), of(i + N), e, o);
      V::template store2<kType, false, false>(y + i * kSize, 0, e, o);
    }
    if (i == dim) return;
    V::template arrange<kType, false>(of(i), of(i + N), e, o);
    V::template store2<kType, false, true>(y + i * kSize, dim - i, e, o);
  }
};

}  // namespace
}  // namespace qk
#endif
