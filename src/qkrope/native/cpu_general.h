// cpu_general.h: the CPU kernel of every option, in any combination. It is slower than cpu_kernel.h
// (which runs what needs none of them) and made to be checked by eye: a head goes through
//
//   load, [turn,] statistic, normalise and scale, [turn,] store
//
// each step on the whole row (see cpu_sides.h).
#ifndef QKROPE_CPU_GENERAL_H
#define QKROPE_CPU_GENERAL_H

#include "cpu_sides.h"

namespace qk {
namespace {

template <class V, int kType>
class General : Sides<V, kType> {
  using Base = Sides<V, kType>;
  using Base::kBatch, Base::kScale, Base::kSides, Base::kSize, Base::kWidth;
  using Base::kY, Base::N, Base::params_, Base::sides_, Base::turn_, Base::variant_;
  using typename Base::F;
  using typename Base::Round;
  using typename Base::Row;
  using typename Base::Side;
  using typename Base::Statistic;

  alignas(64) float memory_[2 * kBatch][kWidth];
  Row rows_[kBatch];

 public:
  // only_v: q and k are the other kernel's.
  General(const qk_variant& v, const qk_params& p, bool only_v) : Base(v, p, only_v) {
    for (int i = 0; i < kBatch; i++) rows_[i] = {memory_[2 * i], memory_[2 * i + 1]};
    for (auto& row : memory_)
      for (int c = v.head_dim; c < v.head_dim + 4 * N; c++) row[c] = 0;
  }

  void run(long long begin, long long end) {
    this->each_token(begin, end, nullptr, [&](const long long* walk, const long long*) {
      if (this->any_turns() && !params_.table_heads) this->set_turn(turn_, walk, 0);
      for (int i = 0; i < kSides; i++)
        if (sides_[i].args->heads) run_side(sides_[i], walk + 3 * i, walk);
    });
  }

 private:
  void run_side(Side& s, const long long* own, const long long* walk) {
    const qk_side& a = *s.args;
    const qk_side_variant& spec = *s.spec;
    Statistic all{0, 1, false};
    if (spec.row && s.normalises) all = this->statistic_of_all(s, own, walk, rows_);
    for (int first = 0; first < a.heads; first += kBatch) {
      const int count = a.heads - first < kBatch ? a.heads - first : kBatch;
      Statistic whole[kBatch], rest[kBatch];
      for (int i = 0; i < count; i++) this->load(s, own, walk, first + i, rows_[i]);
      for (int i = 0; i < count; i++) {
        whole[i] = all, rest[i] = {0, 1, false};
        if (!s.normalises || spec.row) continue;
        whole[i] = this->statistic(s, spec.norm, a.eps, rows_[i], 0, spec.dim);
        if (spec.rest != QK_NORM_NONE)
          rest[i] =
              this->statistic(s, spec.rest, a.rest_eps, rows_[i], spec.dim, variant_.head_dim);
      }
      for (int i = 0; i < count; i++) {
        Row& row = rows_[i];
        const int head = first + i;
        if (s.weight_varies) this->read_weight(s, head);
        if (s.scale_varies) this->read_scale(s, own[kScale], head);
        if (s.normalises || s.has_scale) {
          // In this order: vectors of the first part reach into the second.
          normalise(s, whole[i], spec.norm, row, 0, spec.dim);
          if (spec.dim < variant_.head_dim)
            normalise(s, rest[i], spec.rest, row, spec.dim, variant_.head_dim);
          row.step();
        }
        if (s.turns && !variant_.rope_first) this->turn(turn_, s, walk, head, row);
        this->store(row.now, static_cast<char*>(a.y) + own[kY] + head * a.y_head * kSize);
      }
    }
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
        x = normalise_by_steps<Round>(x, mean, by, Base::divides(s, norm), weight);
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
};

}  // namespace
}  // namespace qk
#endif
