// cpu_general.h: the CPU kernel of every option, in any combination. It is slower than cpu_kernel.h
// (which runs what needs none of them) and made to be checked by eye: a head becomes a row of
// floats in the order of its channels, and goes through
//
//   load, [turn,] statistic, normalise and scale, [turn,] store
//
// each step on the whole row. Sums are of doubles: no order of summation shows, no square leaves
// their range, and a row of all heads is as good as one head.
#ifndef QKROPE_CPU_GENERAL_H
#define QKROPE_CPU_GENERAL_H

#include "cpu_turns.h"

namespace qk {
namespace {

template <class V, int kType>
class General {
  using F = typename V::F;
  using Turn = Turns<V, kType>;
  using Round = typename Turn::Round;
  static constexpr int N = V::N, kWidth = Turn::kWidth, kSize = kType == QK_F32 ? 4 : 2;
  // Heads that go through together: their roots and divisions take long, and none waits for
  // another.
  static constexpr int kBatch = 4;
  enum { kQ, kK, kV, kSides };
  // Operands that move with the token: x, y and scale of each side, then the angles' sources.
  enum { kX, kY, kScale, kPos = 3 * kSides, kCos, kSin, kWalks };

  // Mean, and what the deviation is multiplied with or (an l2 norm in steps) divided by.
  struct Statistic {
    float mean, by;
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
  alignas(64) float memory_[2 * kBatch][kWidth];
  Row rows_[kBatch];

 public:
  General(const General&) = delete;
  // only_v: q and k are the other kernel's.
  General(const qk_variant& v, const qk_params& p, bool only_v)
      : variant_(v), params_(p), turn_(v, p) {
    for (int i = 0; i < kBatch; i++) rows_[i] = {memory_[2 * i], memory_[2 * i + 1]};
    for (auto& row : memory_)
      for (int c = v.head_dim; c < v.head_dim + 4 * N; c++) row[c] = 0;
    set_side(sides_[kQ], only_v ? kAbsent : p.q, v.q, v.q_weight_dtype, v.angle != QK_ANGLE_NONE);
    set_side(sides_[kK], only_v ? kAbsent : p.k, v.k, v.k_weight_dtype, v.angle != QK_ANGLE_NONE);
    set_side(sides_[kV], p.v, v.v, v.v_weight_dtype, false);
  }

  void run(long long begin, long long end) {
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
    if (p.pos) walks[kPos] = {p.pos_dim, p.pos_wide ? 8 : 4};
    if (p.cos) walks[kCos] = {p.cos_dim, table}, walks[kSin] = {p.sin_dim, table};
    Cursor<kWalks> cursor(p, walks, begin), next = cursor;
    for (long long token = begin; token < end; token++, cursor = next) {
      if (token + 1 < end) next.next();
      for (int i = 0; i < kSides; i++)
        sides_[i].ahead = next.at[3 * i + kX] - cursor.at[3 * i + kX];
      const long long index = token % p.last_size;
      turns_ = index >= p.rotate_from && index < p.rotate_to;
      const bool any = sides_[kQ].turns || sides_[kK].turns;
      if (any && turns_ && !p.table_heads) set_turn(cursor.at, 0);
      for (int i = 0; i < kSides; i++)
        if (sides_[i].args->heads) run_side(sides_[i], cursor.at + 3 * i, cursor.at);
    }
  }

 private:
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

  // ---- a token ----

  void set_turn(const long long* walk, int head) {
    const qk_params& p = params_;
    const long long size = size_of(p.table_dtype);
    turn_.set(at(p.pos, walk[kPos]), at(p.cos, walk[kCos] + head * p.cos_head * size),
              at(p.sin, walk[kSin] + head * p.sin_head * size));
  }

  void run_side(Side& s, const long long* own, const long long* walk) {
    const qk_side& a = *s.args;
    const qk_side_variant& spec = *s.spec;
    Statistic all{0, 1};
    if (spec.row && s.normalises) all = statistic_of_all(s, own, walk);
    for (int first = 0; first < a.heads; first += kBatch) {
      const int count = a.heads - first < kBatch ? a.heads - first : kBatch;
      Statistic whole[kBatch], rest[kBatch];
      for (int i = 0; i < count; i++) load(s, own, walk, first + i, rows_[i]);
      for (int i = 0; i < count; i++) {
        whole[i] = all, rest[i] = {0, 1};
        if (!s.normalises || spec.row) continue;
        whole[i] = statistic(s, spec.norm, a.eps, rows_[i], 0, spec.dim);
        if (spec.rest != QK_NORM_NONE)
          rest[i] = statistic(s, spec.rest, a.rest_eps, rows_[i], spec.dim, variant_.head_dim);
      }
      for (int i = 0; i < count; i++) {
        Row& row = rows_[i];
        const int head = first + i;
        if (s.weight_varies) read_weight(s, head);
        if (s.scale_varies) read_scale(s, own[kScale], head);
        if (s.normalises || s.has_scale) {
          // In this order: vectors of the first part reach into the second.
          normalise(s, whole[i], spec.norm, row, 0, spec.dim);
          if (spec.dim < variant_.head_dim)
            normalise(s, rest[i], spec.rest, row, spec.dim, variant_.head_dim);
          row.step();
        }
        if (s.turns && !variant_.rope_first) turn(s, walk, head, row);
        store(row.now, static_cast<char*>(a.y) + own[kY] + head * a.y_head * kSize);
      }
    }
  }

  // ---- the steps of a head ----

  void load(const Side& s, const long long* own, const long long* walk, int head, Row& row) {
    const char* x = at(s.args->x, own[kX] + head * s.args->x_head * kSize);
    const int dim = variant_.head_dim;
    float* to = row.now;
    int i = 0;
    for (int line = 0; line < dim * kSize; line += 64) __builtin_prefetch(x + s.ahead + line);
    for (; i + N <= dim; i += N) V::store(to + i, V::template widen<kType>(x + i * kSize));
    for (; i < dim; i++) to[i] = load_float(x + i * kSize, kType);
    if (s.turns && variant_.rope_first) turn(s, walk, head, row);
  }

  void turn(const Side& s, const long long* walk, int head, Row& row) {
    if (!turns_) {
      if (turn_.move(row.now, row.next)) row.step();
      return;
    }
    if (params_.table_heads) set_turn(walk, head);
    turn_.apply(row.now, row.next, s.spec->round_turn);
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
  Statistic statistic_of_all(const Side& s, const long long* own, const long long* walk) {
    const int norm = s.spec->norm, heads = s.args->heads, dim = variant_.head_dim;
    const double count = (double)heads * dim;
    double total = 0, squares = 0;
    float mean = 0;
    for (int head = 0; norm == QK_NORM_LAYER && head < heads; head++) {
      load(s, own, walk, head, rows_[head % kBatch]);
      total += sum<false>(rows_[head % kBatch].now, 0, 0, dim);
    }
    if (norm == QK_NORM_LAYER) mean = (float)(total / count);
    for (int head = 0; head < heads; head++) {
      load(s, own, walk, head, rows_[head % kBatch]);
      squares += sum<true>(rows_[head % kBatch].now, mean, 0, dim);
    }
    return finish(s, norm, s.args->eps, mean, squares, count);
  }

  static bool divides(const Side& s, int norm) {
    return norm == QK_NORM_L2 && s.spec->round_norm == QK_ROUND_C;
  }

  static Statistic finish(const Side& s, int norm, float eps, float mean, double squares,
                          double count) {
    double by;
    if (norm == QK_NORM_L2) {
      const double length = __builtin_sqrt(squares);
      by = length < eps ? eps : length;  // a NaN stays
      if (!divides(s, norm)) by = 1 / by;
    } else {
      by = 1 / __builtin_sqrt(squares / count + eps);
    }
    if (s.spec->round_norm != QK_ROUND_C) return {mean, (float)by};
    float rounded[N];
    V::store(rounded, Round::round(F((float)by)));
    return {mean, rounded[0]};
  }

  // Channels [begin, end), normalised and scaled.
  static void normalise(const Side& s, const Statistic& statistic, int norm, const Row& row,
                        int begin, int end) {
    const bool plain = norm != QK_NORM_NONE && s.spec->round_norm == QK_ROUND_ONCE &&
                       !s.args->bias && !s.has_scale;
    if (plain) return normalise_as<true>(s, statistic, norm, row, begin, end);
    normalise_as<false>(s, statistic, norm, row, begin, end);
  }

  template <bool kPlain>
  static void normalise_as(const Side& s, const Statistic& statistic, int norm, const Row& row,
                           int begin, int end) {
    const int rounding = s.spec->round_norm;
    const bool steps = rounding == QK_ROUND_A || rounding == QK_ROUND_C, bias = s.args->bias;
    const F mean(statistic.mean), minus(-statistic.mean), by(statistic.by);
    const float* from = row.now;
    float* to = row.next;
    for (int i = begin; i < end; i += N) {
      F x = V::load(from + i);
      const F weight = V::load(s.weight + i);
      if (kPlain || (norm != QK_NORM_NONE && !steps))
        x = mul(mul(add(x, minus), by), weight);
      else if (norm != QK_NORM_NONE)
        x = normalise_by_steps<Round>(x, mean, by, divides(s, norm), weight);
      if (!kPlain && norm != QK_NORM_NONE) {
        if (bias) x = add(x, V::load(s.bias + i));
        if (rounding != QK_ROUND_ONCE) x = Round::round(x);
      }
      if (!kPlain && s.has_scale) {
        x = mul(x, V::load(s.scale + i));
        if (rounding != QK_ROUND_ONCE) x = Round::round(x);
      }
      V::store(to + i, x);
    }
  }

  void store(const float* row, char* y) const {
    const int dim = variant_.head_dim;
    F e, o;
    int i = 0;
    for (; i + 2 * N <= dim; i += 2 * N) {
      V::template arrange<kType, false>(V::load(row + i), V::load(row + i + N), e, o);
      V::template store2<kType, false, false>(y + i * kSize, 0, e, o);
    }
    if (i == dim) return;
    V::template arrange<kType, false>(V::load(row + i), V::load(row + i + N), e, o);
    V::template store2<kType, false, true>(y + i * kSize, dim - i, e, o);
  }
};

}  // namespace
}  // namespace qk
#endif
