// cpu_turns.h: the rotation of the general kernel: which channel turns with which, and by what
// angle. Everything is in the order of a head's output channels.
#ifndef QKROPE_CPU_TURNS_H
#define QKROPE_CPU_TURNS_H

#include "cpu_tokens.h"
#include "math.h"

namespace qk {
namespace {

template <class V, int kType>
class Turns {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int N = V::N;

 public:
  static constexpr int kWidth = QK_MAX_HEAD_DIM + 4 * N;  // channels, and room for whole vectors

  struct Round {
    static F round(F x) { return V::template round<kType>(x); }
  };

  // back: the transpose, which takes gradients of what a rotation writes to those of what it reads.
  Turns(const qk_variant& v, const qk_params& p, bool back)
      : variant_(v), params_(p), half_(v.rotary_dim / 2), blocks_((v.head_dim + N - 1) / N) {
    for (int j = 0; j < half_ && v.angle == QK_ANGLE_PHASE; j++) {
      __builtin_memcpy(lo_ + j, &p.frac[j].lo, 4);
      __builtin_memcpy(hi_ + j, &p.frac[j].hi, 4);
    }
    for (int c = 0; c < blocks_ * N; c++)
      own_[c] = partner_[c] = c, cos_at_[c] = sin_at_[c] = 0, turning_[c] = 0, sign_[c] = 1;
    for (int j = 0; j < half_; j++) {
      const qk_pair& pair = p.pairs[j];
      // A cache has a row for the position on each axis.
      const int at = p.table_rows > 0 ? pair.axis * kRow + j : j;
      const float sign = v.reverse && v.angle == QK_ANGLE_TABLE ? -1.0f : 1.0f;
      const int at_a = p.table_full ? pair.table_a : at, at_b = p.table_full ? pair.table_b : at;
      if (back) {
        set_channel(pair.a, pair.out_a, pair.out_b, at_a, at_b, sign);
        set_channel(pair.b, pair.out_b, pair.out_a, at_b, at_a, -sign);
      } else {
        set_channel(pair.out_a, pair.a, pair.b, at_a, at_a, -sign);
        set_channel(pair.out_b, pair.b, pair.a, at_b, at_b, sign);
      }
      moves_ = moves_ || pair.out_a != pair.a || pair.out_b != pair.b;
    }
    whole_ = v.head_dim % N == 0;
    for (int b = 0; b < blocks_; b++) {
      ways_[b] = way_of(b * N);
      whole_ = whole_ && ways_[b].how != kGathers;
    }
  }

  // The angles of a token, or of one head of it: where its position (on the first axis) is, and its
  // rows of the tables.
  void set(const char* position, const char* cos, const char* sin) {
    int on_axis[QK_MAX_AXES] = {};
    const int axes = variant_.axes ? variant_.axes : 1;
    for (int a = 0; a < axes && params_.pos; a++) {
      const long long step = a * params_.pos_axis * (params_.pos_wide ? 8 : 4);
      __builtin_memcpy(on_axis + a, at(position, step), 4);
    }
    if (variant_.angle == QK_ANGLE_TABLE) {
      read_table(cos, params_.cos_row, params_.cos_step, on_axis, cos_entry_);
      read_table(sin, params_.sin_row, params_.sin_step, on_axis, sin_entry_);
    } else {
      turn_by_phase(on_axis);
    }
    for (int b = 0, c = 0; b < blocks_; b++, c += N) {
      if (ways_[b].how == kStays) continue;
      const F x = V::gather(cos_entry_, cos_at_ + c);
      const F y = mul(V::gather(sin_entry_, sin_at_ + c), V::load(sign_ + c));
      V::store(cos_[0] + c, x), V::store(cos_[1] + c, Round::round(x));
      V::store(sin_[0] + c, y), V::store(sin_[1] + c, Round::round(y));
    }
  }

  // A head whose token does not turn: its pairs still go where pairs go. False: they stay.
  bool move(const float* from, float* to) const {
    for (int b = 0, c = 0; b < blocks_ && moves_; b++, c += N)
      V::store(to + c, V::gather(from, own_ + c));
    return moves_;
  }

  // A head turned by the angles that are set, rounded as the QK_TURN_* says.
  void apply(const float* from, float* to, int rounding) const {
    const auto load = [&](int c) { return V::load(from + c); };
    if (rounding == QK_TURN_ONCE) return apply_as<false>(load, from, to, rounding);
    apply_as<true>(load, from, to, rounding);
  }

  // The same of a head in memory, where whole vectors are all that is read of it.
  bool can_apply_to_memory() const { return whole_; }
  void apply_to_memory(const char* from, float* to) const {
    const auto load = [&](int c) {
      return V::template widen<kType>(from + c * (kType == QK_F32 ? 4 : 2));
    };
    apply_as<false>(load, nullptr, to, QK_TURN_ONCE);
  }

 private:
  // How a block of N output channels finds what it reads: it stays as it is; its partners are one
  // distance away; neighbours swap; or each channel has its own place, and some do not turn.
  enum How { kStays, kShifts, kSwaps, kGathers };
  struct Way {
    How how;
    int distance;
  };
  static constexpr int kRow = QK_MAX_HEAD_DIM / 2 + 2 * N;

  const qk_variant& variant_;
  const qk_params& params_;
  const int half_, blocks_;
  bool moves_ = false;  // pairs are written elsewhere than read
  bool whole_;          // no block gathers or has channels behind the head
  Way ways_[kWidth / N];
  alignas(64) int own_[kWidth], partner_[kWidth], cos_at_[kWidth], sin_at_[kWidth];
  alignas(64) float turning_[kWidth], sign_[kWidth];        // turning_: bit 30 of an integer
  alignas(64) float lo_[kRow], hi_[kRow], position_[kRow];  // the bits of integers
  alignas(64) float cos_entry_[QK_MAX_AXES * kRow], sin_entry_[QK_MAX_AXES * kRow];
  alignas(64) float cos_[2][kWidth], sin_[2][kWidth];  // as they are, and rounded; sin signed

  void set_channel(int out, int own, int partner, int cos, int sin, float sign) {
    const int turns = 0x40000000;
    own_[out] = own, partner_[out] = partner, sign_[out] = sign;
    cos_at_[out] = cos, sin_at_[out] = sin;
    __builtin_memcpy(turning_ + out, &turns, 4);
  }

  Way way_of(int begin) const {
    const int end = begin + N < variant_.head_dim ? begin + N : variant_.head_dim;
    const int distance = partner_[begin] - begin;
    bool stays = true, shifts = true, swaps = true;
    for (int c = begin; c < end; c++) {
      const bool turns = turning_[c] != 0, home = own_[c] == c;
      stays = stays && !turns;
      shifts = shifts && turns && home && partner_[c] - c == distance;
      swaps = swaps && turns && home && partner_[c] == (c ^ 1);
    }
    return {stays ? kStays : shifts ? kShifts : swaps ? kSwaps : kGathers, distance};
  }

  void read_table(const char* from, long long row, long long step, const int* on_axis, float* to) {
    const qk_params& p = params_;
    const long long size = size_of(p.table_dtype);
    const int count = p.table_full ? 2 * half_ : half_;
    if (p.table_rows <= 0) return read_floats<V>(from, p.table_dtype, step, count, to);
    for (int a = 0; a < (variant_.axes ? variant_.axes : 1); a++)
      read_floats<V>(at(from, on_axis[a] * row * size), p.table_dtype, step, count, to + a * kRow);
  }

  void turn_by_phase(const int* on_axis) {
    for (int j = 0; j < half_ && variant_.axes; j++)
      __builtin_memcpy(position_ + j, on_axis + params_.pairs[j].axis, 4);
    const F factor(params_.attention_factor);
    for (int j = 0; j < half_; j += N) {
      F s, c;
      const I position = variant_.axes ? V::load_bits(position_ + j) : I(on_axis[0]);
      sincos_phase(phase(position, V::load_bits(lo_ + j), V::load_bits(hi_ + j)), s, c);
      V::store(cos_entry_ + j, mul(c, factor)), V::store(sin_entry_ + j, mul(s, factor));
    }
  }

  // load(c): channels [c, c + N) of what is at `from`.
  template <bool kSteps, class Load>
  void apply_as(Load load, const float* from, float* to, int rounding) const {
    const bool rounded = rounding == QK_TURN_B || rounding == QK_TURN_H;
    const float *cos = cos_[rounded], *sin = sin_[rounded];
    for (int b = 0, c = 0; b < blocks_; b++, c += N) {
      const Way way = ways_[b];
      F x, other;
      if (way.how == kGathers) {
        x = V::gather(from, own_ + c), other = V::gather(from, partner_ + c);
      } else {
        x = load(c);
        other = way.how == kShifts ? load(c + way.distance) : V::swap(x);
      }
      if (way.how != kStays) {
        const F cs = V::load(cos + c), sn = V::load(sin + c);
        F y = kSteps ? turn_by_steps<Round>(x, other, cs, sn, rounding == QK_TURN_B)
                     : fma(x, cs, mul(other, sn));
        x = way.how == kGathers ? choose_by_bit30(V::load_bits(turning_ + c), y, x) : y;
      }
      V::store(to + c, x);
    }
  }
};

}  // namespace
}  // namespace qk
#endif
