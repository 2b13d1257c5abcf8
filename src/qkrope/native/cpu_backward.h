// cpu_backward.h: the CPU kernel of the gradients, for every option in any combination. With n the
// normalised head, g the gradient of what the norm gives and w its weight, a head goes through
//
//   load x, [turn it,] statistic, n;  load dy, [turn it back,] g, sums of g and of g * n;
//   gx = g * w, averages of gx * n [and of gx];  dx, [turn it back,] store
//
// each step on the whole row (see cpu_sides.h). Where heads share a statistic, the averages are of
// all of them: they go through twice, the second time without the sums.
//
// The sums of a block of tokens are one row of partial sums. At most kChain heads are added up
// before their sum is added to that row, and rows are added in double: no chain of additions of
// floats grows long.
#ifndef QKROPE_CPU_BACKWARD_H
#define QKROPE_CPU_BACKWARD_H

#include "cpu_sides.h"

namespace qk {
namespace {

template <class V, int kType>
class Backward : Sides<V, kType> {
  using Base = Sides<V, kType>;
  using Base::kBatch, Base::kDy, Base::kScale, Base::kSides, Base::kSize, Base::kWidth, Base::kY;
  using Base::N, Base::params_, Base::sides_, Base::turn_, Base::turns_, Base::variant_;
  using typename Base::F;
  using typename Base::Row;
  using typename Base::Side;
  using typename Base::Statistic;
  using typename Base::Turn;
  static constexpr int kChain = 32;

  // Sums over the channels of a statistic: of gx * n and (a LayerNorm) of gx.
  struct Along {
    double product, plain;
  };

  // A head on its way: x, then n and dx; dy, then g and gx.
  struct Head {
    Row x, dy;
    Statistic whole, rest;
    Along along, rest_along;
  };

  // The gradient of a weight or bias: of some heads, then of a block of tokens.
  struct Sum {
    float* row;       // of the block; null: not wanted
    long long head;   // to the next head's; 0: one for all
    int most, chain;  // heads that may be in `some`, and are
    alignas(64) float some[kWidth];
  };

  const qk_grads& grads_;
  Turn back_;
  const qk_side_grads* of_[kSides];
  Sum weights_[kSides], biases_[kSides];
  alignas(64) float memory_[4 * kBatch][kWidth];
  Head heads_[kBatch];

 public:
  Backward(const qk_variant& v, const qk_params& p, const qk_grads& g)
      : Base(v, p, false), grads_(g), back_(v, p, true) {
    for (int i = 0; i < kBatch; i++) {
      heads_[i].x = {memory_[4 * i], memory_[4 * i + 1]};
      heads_[i].dy = {memory_[4 * i + 2], memory_[4 * i + 3]};
    }
    for (auto& row : memory_)
      for (int c = v.head_dim; c < v.head_dim + 4 * N; c++) row[c] = 0;
    of_[0] = &g.q, of_[1] = &g.k, of_[2] = &g.v;
    for (int i = 0; i < kSides; i++) {
      if (!sides_[i].args->heads) continue;
      end_weight(sides_[i]);
      begin_sum(weights_[i], of_[i]->dweight_head);
      begin_sum(biases_[i], of_[i]->dbias_head);
    }
  }

  // Blocks [begin, end) of the tokens.
  void run(long long begin, long long end) {
    for (long long block = begin; block < end; block++) {
      for (int i = 0; i < kSides; i++) {
        const qk_side_grads& g = *of_[i];
        clear(weights_[i], g.dweight, g.dweight_parts + block * g.dweight_count, g.dweight_count);
        clear(biases_[i], g.dbias, g.dbias_parts + block * g.dbias_count, g.dbias_count);
      }
      const long long tokens = params_.tokens, count = grads_.partials;
      this->each_token(
          tokens * block / count, tokens * (block + 1) / count, &grads_,
          [&](const long long* walk, const long long* next) { run_token(walk, next); });
      for (int i = 0; i < kSides; i++) {
        if (!sides_[i].args->heads) continue;
        flush(weights_[i], 0, sides_[i].spec->weight_dim);
        flush(biases_[i], 0, sides_[i].spec->weight_dim);
      }
    }
  }

 private:
  static void begin_sum(Sum& sum, long long head) {
    sum.head = head, sum.most = head ? 1 : kChain, sum.chain = 0;
    for (float& x : sum.some) x = 0;
  }

  static void clear(Sum& sum, const float* wanted, float* row, long long count) {
    sum.row = wanted ? row : nullptr;
    for (long long i = 0; wanted && i < count; i++) row[i] = 0;
  }

  // Channels that a weight does not cover have the weight 1.
  static void end_weight(Side& s) {
    for (int i = 0; i < 2 * N; i++) s.weight[s.spec->weight_dim + i] = 1;
  }

  // ---- a token ----

  void run_token(const long long* walk, const long long* next) {
    if (this->any_turns() && !params_.table_heads) {
      this->set_turn(back_, walk, 0);
      if (variant_.rope_first) this->set_turn(turn_, walk, 0);
    }
    for (int i = 0; i < kSides; i++)
      if (sides_[i].args->heads) run_side(i, walk, next[kDy + i] - walk[kDy + i]);
  }

  // dy_ahead: bytes to the next token's dy.
  void run_side(int side, const long long* walk, long long dy_ahead) {
    Side& s = sides_[side];
    const int heads = s.args->heads;
    if (is_plain(side)) return run_plain(side, walk, dy_ahead);
    if (!s.spec->row || !s.normalises) {
      for (int first = 0; first < heads; first += kBatch) {
        const int count = heads - first < kBatch ? heads - first : kBatch;
        for (int i = 0; i < count; i++) load_head(side, walk, dy_ahead, first + i, heads_[i]);
        for (int i = 0; i < count; i++) set_statistics(s, heads_[i]);
        for (int i = 0; i < count; i++) to_gx(side, walk, first + i, heads_[i], true);
        for (int i = 0; i < count; i++) {
          if (s.normalises) spans_to_dx(s, heads_[i]);
          store_head(side, walk, first + i, heads_[i]);
        }
      }
      return;
    }
    Row rows[kBatch];
    for (int i = 0; i < kBatch; i++) rows[i] = heads_[i].x;
    const Statistic all = this->statistic_of_all(s, walk + 3 * side, walk, rows);
    const int dim = variant_.head_dim;
    Along along{0, 0};
    for (int head = 0; head < heads; head++) {
      Head& h = heads_[head % kBatch];
      load_head(side, walk, dy_ahead, head, h);
      h.whole = all;
      to_gx(side, walk, head, h, true);
      along.product += h.along.product, along.plain += h.along.plain;
    }
    for (int head = 0; head < heads; head++) {
      Head& h = heads_[head % kBatch];
      load_head(side, walk, dy_ahead, head, h);
      to_gx(side, walk, head, h, false);
      to_dx(h, all, s.spec->norm, along, (double)heads * dim, 0, dim);
      h.x.step();
      store_head(side, walk, head, h);
    }
  }

  // ---- the common case, in fewer steps: an RMS norm of each head, then nothing but a weight ----

  bool is_plain(int side) const {
    const Side& s = sides_[side];
    return s.spec->norm == QK_NORM_RMS && !s.spec->row && s.spec->dim == variant_.head_dim &&
           !s.has_scale && !biases_[side].row && !variant_.rope_first;
  }

  void run_plain(int side, const long long* walk, long long dy_ahead) {
    Side& s = sides_[side];
    Sum& weights = weights_[side];
    const int heads = s.args->heads, dim = variant_.head_dim;
    for (int first = 0; first < heads; first += kBatch) {
      const int count = heads - first < kBatch ? heads - first : kBatch;
      for (int i = 0; i < count; i++) load_head(side, walk, dy_ahead, first + i, heads_[i]);
      for (int i = 0; i < count; i++) heads_[i].whole.by = plain_rstd(s, heads_[i].x);
      for (int i = 0; i < count; i++) {
        if (s.weight_varies) this->read_weight(s, first + i), end_weight(s);
        heads_[i].along.product = plain_gx(s, heads_[i], weights.row ? weights.some : nullptr);
        count_head(weights, first + i, dim);
      }
      for (int i = 0; i < count; i++) {
        const float *x = heads_[i].x.now, *gx = heads_[i].dy.now;
        const F by(heads_[i].whole.by), along((float)(heads_[i].along.product / dim)), zero(0.0f);
        char* y = static_cast<char*>(s.args->y) + walk[3 * side + kY];
        this->store_as(y + (first + i) * s.args->y_head * kSize, [&](int c) {
          return normalise_back(V::load(gx + c), mul(V::load(x + c), by), along, zero, by);
        });
      }
    }
  }

  // The sum over a head of what of(i, sum) adds to `sum` for N channels: at most four floats in a
  // chain, then doubles.
  template <class Of>
  double short_sums(Of of) const {
    const int dim = variant_.head_dim;
    typename V::D total{}, lo, hi;
    for (int i = 0; i < dim;) {
      F a(0.0f), b(0.0f);
      for (int j = 0; j < 4 && i < dim; j++, i += 2 * N) {
        a = of(i, a);
        if (i + N < dim) b = of(i + N, b);
      }
      V::widen(add(a, b), lo, hi);
      total += lo + hi;
    }
    return V::total(total);
  }

  float plain_rstd(const Side& s, const Row& x) const {
    const int dim = variant_.head_dim;
    const double squares = short_sums([&](int i, F sum) {
      const F v = V::load(x.now + i);
      return fma(v, v, sum);
    });
    // Squares that leave the range of float, and NaN, are summed again.
    if (!(squares >= 0x1p-80 && squares <= __FLT_MAX__))
      return this->statistic(s, QK_NORM_RMS, s.args->eps, x, 0, dim).by;
    return (float)(1 / __builtin_sqrt(squares / dim + s.args->eps));
  }

  // dy to gx, and the sum of gx * n.
  double plain_gx(const Side& s, const Head& h, float* weight_sum) const {
    const F by(h.whole.by);
    float *x = h.x.now, *dy = h.dy.now;
    return short_sums([&](int i, F sum) {
      const F n = mul(V::load(x + i), by), g = V::load(dy + i), gx = mul(g, V::load(s.weight + i));
      if (weight_sum) V::store(weight_sum + i, fma(g, n, V::load(weight_sum + i)));
      V::store(dy + i, gx);
      return fma(gx, n, sum);
    });
  }

  // ---- the steps of a head ----

  void load_head(int side, const long long* walk, long long dy_ahead, int head, Head& h) {
    const Side& s = sides_[side];
    const qk_side_grads& g = *of_[side];
    const int dim = variant_.head_dim;
    if (s.normalises) this->load(s, walk + 3 * side, walk, head, h.x);
    const char* dy = at(g.dy, walk[kDy + side] + head * g.dy_head * kSize);
    const bool turns = s.turns && !variant_.rope_first;
    if (turns && turns_ && back_.can_apply_to_memory()) {
      if (params_.table_heads) this->set_turn(back_, walk, head);
      this->fetch(dy + dy_ahead);
      back_.apply_to_memory(dy, h.dy.now);
    } else {
      this->widen(dy, dy_ahead, h.dy.now);
      if (turns) this->turn(back_, s, walk, head, h.dy);
    }
    // Sums of whole vectors see zeros at the end, which a part that begins between two of them left
    // something else in.
    V::store(h.x.now + dim, F(0.0f)), V::store(h.dy.now + dim, F(0.0f));
  }

  void set_statistics(const Side& s, Head& h) const {
    const qk_side_variant& spec = *s.spec;
    h.whole = h.rest = {0, 1, false};
    if (!s.normalises) return;
    h.whole = this->statistic(s, spec.norm, s.args->eps, h.x, 0, spec.dim);
    if (spec.rest != QK_NORM_NONE)
      h.rest = this->statistic(s, spec.rest, s.args->rest_eps, h.x, spec.dim, variant_.head_dim);
  }

  // x to n, dy to gx; on the way the averages' sums and, where it `adds`, those of g and g * n.
  void to_gx(int side, const long long* walk, int head, Head& h, bool adds) {
    Side& s = sides_[side];
    Sum &weights = weights_[side], &biases = biases_[side];
    const int dim = variant_.head_dim, own = s.spec->dim;
    if (s.weight_varies) this->read_weight(s, head), end_weight(s);
    if (s.scale_varies) this->read_scale(s, walk[3 * side + kScale], head);
    if (!s.normalises) {
      for (int i = 0; s.has_scale && i < dim; i += N)
        V::store(h.dy.now + i, mul(V::load(h.dy.now + i), V::load(s.scale + i)));
      return;
    }
    float* const weight_sum = adds && weights.row ? weights.some : nullptr;
    float* const bias_sum = adds && biases.row ? biases.some : nullptr;
    const bool rest = s.spec->rest != QK_NORM_NONE;
    h.along = span_to_gx(s, h, h.whole, 0, own, weight_sum, bias_sum);
    if (own < dim)
      h.rest_along = span_to_gx(s, h, h.rest, own, dim, rest ? weight_sum : nullptr,
                                rest ? bias_sum : nullptr);
    h.x.step();
    count_head(weights, head, s.spec->weight_dim, adds);
    count_head(biases, head, s.spec->weight_dim, adds);
  }

  // Channels [begin, end), in whole vectors where no others are behind them.
  Along span_to_gx(const Side& s, const Head& h, const Statistic& statistic, int begin, int end,
                   float* weight_sum, float* bias_sum) const {
    const int whole = end == variant_.head_dim ? end : begin + (end - begin) / N * N;
    const F minus(-statistic.mean), by(statistic.by);
    typename V::D a{}, b{}, c{}, d{};
    int i = begin;
    for (; i < whole; i += N) {
      F n = V::load(h.x.now + i), g = V::load(h.dy.now + i);
      n = mul(add(n, minus), by);
      if (s.has_scale) g = mul(g, V::load(s.scale + i));
      if (weight_sum) V::store(weight_sum + i, fma(g, n, V::load(weight_sum + i)));
      if (bias_sum) V::store(bias_sum + i, add(g, V::load(bias_sum + i)));
      g = mul(g, V::load(s.weight + i));
      V::store(h.x.next + i, n), V::store(h.dy.now + i, g);
      typename V::D lo, hi, n_lo, n_hi;
      V::widen(g, lo, hi), V::widen(n, n_lo, n_hi);
      a += lo * n_lo, b += hi * n_hi;
      c += lo, d += hi;
    }
    Along along{V::total(a + b), V::total(c + d)};
    for (; i < end; i++) {
      const float n = mul(add(h.x.now[i], -statistic.mean), statistic.by);
      float g = h.dy.now[i];
      if (s.has_scale) g = mul(g, s.scale[i]);
      if (weight_sum) weight_sum[i] = fma(g, n, weight_sum[i]);
      if (bias_sum) bias_sum[i] += g;
      g = mul(g, s.weight[i]);
      h.x.next[i] = n, h.dy.now[i] = g;
      along.product += (double)g * n, along.plain += g;
    }
    return along;
  }

  // One more head is in a sum of `count` channels.
  static void count_head(Sum& sum, int head, int count, bool adds = true) {
    if (sum.row && adds && ++sum.chain == sum.most) flush(sum, head, count);
  }

  // The sum of some heads to that of this block. What vectors leave behind its end does not matter.
  static void flush(Sum& sum, int head, int count) {
    float* to = sum.row + head * sum.head;
    for (int i = 0; sum.chain && i < count; i++) to[i] += sum.some[i], sum.some[i] = 0;
    sum.chain = 0;
  }

  void spans_to_dx(const Side& s, Head& h) const {
    const qk_side_variant& spec = *s.spec;
    const int dim = variant_.head_dim;
    // In this order: vectors of the first part reach into the second.
    to_dx(h, h.whole, spec.norm, h.along, spec.dim, 0, spec.dim);
    if (spec.dim < dim) to_dx(h, h.rest, spec.rest, h.rest_along, dim - spec.dim, spec.dim, dim);
    h.x.step();
  }

  static void to_dx(const Head& h, const Statistic& statistic, int norm, const Along& sums,
                    double count, int begin, int end) {
    const double share = norm != QK_NORM_L2 ? 1 / count : statistic.clamped ? 0 : 1;
    const F along((float)(sums.product * share)), by(statistic.by);
    const F mean((float)(norm == QK_NORM_LAYER ? sums.plain / count : 0));
    for (int i = begin; i < end; i += N) {
      const F gx = V::load(h.dy.now + i);
      V::store(h.x.next + i, norm == QK_NORM_NONE
                                 ? gx
                                 : normalise_back(gx, V::load(h.x.now + i), along, mean, by));
    }
  }

  void store_head(int side, const long long* walk, int head, Head& h) {
    const Side& s = sides_[side];
    Row& dx = s.normalises ? h.x : h.dy;
    if (s.turns && variant_.rope_first) this->turn(back_, s, walk, head, dx);
    this->store(dx.now, static_cast<char*>(s.args->y) + walk[3 * side + kY] +
                            head * s.args->y_head * kSize);
  }
};

}  // namespace
}  // namespace qk
#endif
