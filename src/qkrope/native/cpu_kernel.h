// cpu_kernel.h: the CPU kernel of what most models do, written once over V, the vectors of one
// instruction set; the others' is in cpu_general.h. No norm or "rms" of each head, one weight for
// all heads, then a rotation of the leading channels, "half" or "interleaved", where the pairs may
// turn by positions on several axes.
//
// A token is handled in three steps: the angles of its pairs; per side, the weights folded with
// them into the four factors of a rotation; then, head by head, the sum of squares and the
// rotation. All of it is float, rounded once at the store.
//
// Channels are taken 2N at a time (N = V::N) as two vectors (e, o), in whatever order is cheapest
// to load: V::load decides, and V::arrange puts channel-ordered floats into that same order.
// Interleaved pairing has its pairs in (e[j], o[j]); half pairing has them in (e[j], e'[j]) and
// (o[j], o'[j]), e' and o' from the other half. Either way the tables are lists of "pair vectors",
// N pairs each.
#ifndef QKROPE_CPU_KERNEL_H
#define QKROPE_CPU_KERNEL_H

#include "cpu_tokens.h"
#include "math.h"
#include "params.h"

// Each translation unit is compiled for an instruction set of its own: nothing here may be merged
// with another unit's copy, hence the unnamed namespace.
namespace qk {
namespace {

// How 2N-channel blocks cover a part of a head: whole ones, then one of `tail` channels.
struct Blocks {
  int full, tail;
  int count() const { return full + (tail != 0); }
};

template <class V, int kType, int kPairing>
class Kernel {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int N = V::N, kBlock = 2 * N;
  static constexpr bool kInterleaved = kPairing == QK_INTERLEAVED;
  static constexpr int kSize = kType == QK_F32 ? 4 : 2, kBytes = kBlock * kSize;
  static constexpr int kVectors = kInterleaved ? 1 : 2;  // pair vectors a block
  static constexpr int kPairs = QK_MAX_HEAD_DIM / 2 + kBlock;
  static constexpr int kChannels = QK_MAX_HEAD_DIM + kBlock;
  static constexpr int kBatch = 4;  // heads whose statistics are finished together
  enum { kQx, kQy, kKx, kKy, kPos, kCos, kSin, kWalks };
  using Tokens = Cursor<kWalks>;

  struct Side {
    const qk_side* args;
    long long x_head, y_head;  // bytes
    bool normalise;
    float low;                             // sums below this are taken again with more range
    alignas(64) float weight[2 * kPairs];  // [pair vector][wa, wb][N]
    alignas(64) float fold[4 * kPairs];    // [pair vector][wa ca, wb sa, wb cb, wa sb][N]
    alignas(64) float rest[kChannels];     // weights of the channels that do not rotate
  };

  const qk_variant& variant_;
  const qk_params& params_;
  const int rotary_, half_;  // rotated channels; half pairing: the distance within a pair
  const bool axes_;
  const Blocks squares_, pairs_, rest_;
  const int pair_vectors_;
  Side sides_[2];
  alignas(64) float angle_[4 * kPairs];  // [pair vector][ca, sa, cb, sb][N], from a caller's table
  alignas(64) float frac_[2 * kPairs];   // [pair vector][lo, hi][N], the bits of integers
  alignas(64) float axis_[2 * kPairs];   // [pair vector][position, -][N], where there are axes
  alignas(64) float row_[kChannels + kBlock];  // scratch, in the order of channels

 public:
  Kernel(const qk_variant& v, const qk_params& p)
      : variant_(v),
        params_(p),
        rotary_(v.angle == QK_ANGLE_NONE ? 0 : v.rotary_dim),
        half_(rotary_ / 2),
        axes_(v.axes && v.angle == QK_ANGLE_PHASE),
        squares_(blocks(v.head_dim)),
        pairs_(blocks(kInterleaved ? rotary_ : half_)),
        rest_(blocks(v.head_dim - rotary_)),
        pair_vectors_(pairs_.count() * kVectors) {
    set_side(sides_[0], p.q, v.q.norm, v.q_weight_dtype);
    set_side(sides_[1], p.k, v.k.norm, v.k_weight_dtype);
    if (v.angle == QK_ANGLE_PHASE) set_frac();
  }

  void run(long long begin, long long end) {
    const qk_params& p = params_;
    const long long bytes = p.pos_wide ? 8 : 4, table = size_of(p.table_dtype);
    const Walk walks[] = {
        {p.q.heads ? p.q.x_dim : nullptr, kSize}, {p.q.heads ? p.q.y_dim : nullptr, kSize},
        {p.k.heads ? p.k.x_dim : nullptr, kSize}, {p.k.heads ? p.k.y_dim : nullptr, kSize},
        {p.pos ? p.pos_dim : nullptr, bytes},     {p.cos ? p.cos_dim : nullptr, table},
        {p.sin ? p.sin_dim : nullptr, table}};
    Tokens cursor(p, walks, begin), ahead = cursor;
    for (long long token = begin; token < end; token++, cursor = ahead) {
      if (token + 1 < end) ahead.next();
      int position = 0;
      if (p.pos) __builtin_memcpy(&position, at(p.pos, cursor.at[kPos]), 4);
      if (axes_) read_axes(at(p.pos, cursor.at[kPos]));
      if (variant_.angle == QK_ANGLE_TABLE) read_angles(cursor, position);
      if (variant_.angle != QK_ANGLE_NONE) fold(position);
      run_side(sides_[0], cursor.at + kQx, ahead.at[kQx]);
      run_side(sides_[1], cursor.at + kKx, ahead.at[kKx]);
    }
  }

 private:
  static Blocks blocks(int channels) { return {channels / kBlock, channels % kBlock}; }

  // ---- once a call ----

  void set_side(Side& s, const qk_side& args, int norm, int weight_type) {
    s.args = &args;
    if (!args.heads) return;
    s.x_head = args.x_head * kSize;
    s.y_head = args.y_head * kSize;
    s.normalise = norm != QK_NORM_NONE;
    // A level may lose squares below 2^-126. That is nothing beside 2^-90 more under the root.
    s.low = args.eps >= 0x1p-90f ? 0.0f : 0x1p-80f;
    const int dim = variant_.head_dim;
    if (args.weight) {
      read_floats<V>(args.weight, weight_type, 1, dim, row_);
      for (int i = 0; i < dim; i += N)
        V::store(row_ + i, effective_weight(V::load(row_ + i), F(args.weight_offset)));
    } else {
      for (int i = 0; i < dim + kBlock; i += N) V::store(row_ + i, F(1.0f));
    }
    arrange(row_ + rotary_, dim - rotary_, s.rest, kBlock, N);
    for (int i = 0; i < rotary_; i += N)
      V::store(row_ + i, mul(V::load(row_ + i), F(params_.attention_factor)));
    arrange_pairs(row_, row_ + half_, s.weight, 2, 1);
  }

  void set_frac() {
    for (int word = 0; word < 2; word++) {
      for (int i = 0; i < half_; i++) {
        int bits = word ? params_.frac[i].hi : params_.frac[i].lo;
        __builtin_memcpy(row_ + i, &bits, 4);
      }
      clear_after(half_);
      if (kInterleaved) duplicate();
      arrange_pairs(row_, row_, frac_ + word * N, 2, 0);
    }
  }

  // ---- rows of weights and tables ----

  void clear_after(int count) {
    for (int i = 0; i < kBlock; i++) row_[count + i] = 0;
  }

  // One entry a pair -> one a channel, interleaved.
  void duplicate() {
    for (int i = rotary_ - 1; i >= 0; i--) __builtin_memcpy(row_ + i, row_ + i / 2, 4);
    clear_after(rotary_);
  }

  // Entries in the order of channels -> vectors; the e and o of block b go to out + b * step and
  // `odd` after it.
  static void arrange(const float* from, int count, float* out, int step, int odd) {
    for (int b = 0; b * kBlock < count; b++) {
      F e, o;
      const float* p = from + b * kBlock;
      V::template arrange<kType, kInterleaved>(V::load(p), V::load(p + N), e, o);
      V::store(out + b * step, e);
      V::store(out + b * step + odd, o);
    }
  }

  // The same for both channels of every pair: those of `b` land b_field fields after those of `a`.
  // Interleaved, `a` holds them all.
  void arrange_pairs(const float* a, const float* b, float* out, int fields, int b_field) {
    if (kInterleaved) return arrange(a, rotary_, out, fields * N, b_field * N);
    arrange(a, half_, out, 2 * fields * N, fields * N);
    if (b_field) arrange(b, half_, out + b_field * N, 2 * fields * N, fields * N);
  }

  // ---- once a token ----

  void read_angles(const Tokens& cursor, int position) {
    const qk_params& p = params_;
    const long long size = size_of(p.table_dtype), row = p.table_rows > 0 ? position : 0;
    for (int i = 0; i < 2; i++) {
      const char* from = i ? at(p.sin, cursor.at[kSin] + row * p.sin_row * size)
                           : at(p.cos, cursor.at[kCos] + row * p.cos_row * size);
      const int count = p.table_full ? rotary_ : half_;
      read_floats<V>(from, p.table_dtype, i ? p.sin_step : p.cos_step, count, row_);
      if (kInterleaved && !p.table_full) duplicate();
      arrange_pairs(row_, p.table_full ? row_ + half_ : row_, angle_ + i * N, 4, 2);
    }
  }

  // The position of each pair, on its own axis.
  void read_axes(const char* position) {
    const long long step = params_.pos_axis * (params_.pos_wide ? 8 : 4);
    for (int i = 0; i < half_; i++)
      __builtin_memcpy(row_ + i, at(position, params_.pairs[i].axis * step), 4);
    clear_after(half_);
    if (kInterleaved) duplicate();
    arrange_pairs(row_, row_, axis_, 2, 0);
  }

  void fold(int position) {
    for (int v = 0; v < pair_vectors_; v++) {
      F ca, sa, cb, sb;
      if (variant_.angle == QK_ANGLE_PHASE) {
        const float* f = frac_ + v * 2 * N;
        const I p = axes_ ? V::load_bits(axis_ + v * 2 * N) : I(position);
        sincos_phase(phase(p, V::load_bits(f), V::load_bits(f + N)), sa, ca);
        cb = ca, sb = sa;
      } else {
        const float* f = angle_ + v * 4 * N;
        ca = V::load(f), sa = V::load(f + N), cb = V::load(f + 2 * N), sb = V::load(f + 3 * N);
      }
      for (Side& s : sides_) {
        if (!s.args->heads) continue;
        F wa = V::load(s.weight + v * 2 * N), wb = V::load(s.weight + v * 2 * N + N);
        float* to = s.fold + v * 4 * N;
        V::store(to, mul(wa, ca));
        V::store(to + N, mul(wb, sa));
        V::store(to + 2 * N, mul(wb, cb));
        V::store(to + 3 * N, mul(wa, sb));
      }
    }
  }

  // ---- heads ----

  // xy: where this token's x and y are; ahead: the next one's x, fetched meanwhile.
  void run_side(const Side& s, const long long* xy, long long ahead) const {
    if (!s.args->heads) return;
    // Heads of the common widths without any loop, their factors in registers from first to last.
    constexpr int kBlocks = V::kFactors / 4 / kVectors;
    F factors[V::kFactors + 1];
    if (kBlocks > 0 && pairs_.full == kBlocks && !pairs_.tail && !rest_.count()) {
      for (int i = 0; i < V::kFactors; i++) factors[i] = V::load(s.fold + i * N);
      run_heads<kBlocks>(s, factors, xy, ahead - xy[0]);
    } else {
      run_heads<0>(s, s.fold, xy, ahead - xy[0]);
    }
  }

  template <int kBlocks, class Factors>
  void run_heads(const Side& s, const Factors* factors, const long long* xy,
                 long long ahead) const {
    const int heads = s.args->heads, bytes = variant_.head_dim * kSize;
    const long long x_head = s.x_head, y_head = s.y_head;
    const char* x = at(s.args->x, xy[0]);
    char* y = static_cast<char*>(s.args->y) + xy[1];
    // The statistics of a batch are begun before the batch in front of it is written: their roots
    // and divisions take long, and nothing there waits for them.
    float rstd[2][kBatch] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
    if (s.normalise) statistics(s, x, heads, rstd[0]);
    for (int head = 0, now = 0; head < heads; head += kBatch, now ^= 1) {
      if (s.normalise && head + kBatch < heads)
        statistics(s, x + kBatch * x_head, heads - head - kBatch, rstd[now ^ 1]);
      for (int i = 0; i < kBatch && head + i < heads; i++, x += x_head, y += y_head) {
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(x + ahead + line);
        write_head<kBlocks>(s, x, y, F(rstd[now][i]), factors);
      }
    }
  }

  // Of the next batch, or of the `left` heads that are left.
  void statistics(const Side& s, const char* x, int left, float* rstd) const {
    F sums[kBatch] = {sum_of_squares(x), sum_of_squares(x + (left > 1 ? 1 : 0) * s.x_head),
                      sum_of_squares(x + (left > 2 ? 2 : 0) * s.x_head),
                      sum_of_squares(x + (left > 3 ? 3 : 0) * s.x_head)};
    const int dim = variant_.head_dim;
    const float eps = s.args->eps;
    int doubtful = V::rstd(sums, (float)dim, eps, s.low, rstd);
    for (int i = 0; __builtin_expect(doubtful, 0) && i < kBatch && i < left; i++)
      if (doubtful >> i & 1) rstd[i] = wide_rstd(x + i * s.x_head, dim, eps);
  }

  // Four sums a lane, so that none grows long; what goes to which depends on head_dim only.
  F sum_of_squares(const char* x) const {
    F a(0.0f), b(0.0f), c(0.0f), d(0.0f);
    const Blocks blocks = squares_;
    int i = 0;
    for (; i + 2 <= blocks.full; i += 2, x += 2 * kBytes) {
      V::template square<kType, false>(x, 0, a, b);
      V::template square<kType, false>(x + kBytes, 0, c, d);
    }
    if (i < blocks.full) V::template square<kType, false>(x, 0, a, b), x += kBytes;
    if (blocks.tail) V::template square<kType, true>(x, blocks.tail, c, d);
    return V::template kOneSum<kType> ? add(a, c) : add(add(a, b), add(c, d));
  }

  // For rows whose squares leave the range of float.
  static __attribute__((noinline)) float wide_rstd(const char* x, int dim, float eps) {
    double sum[4] = {};
    for (int i = 0; i < dim; i++) {
      double v = load_float(x + i * kSize, kType);
      sum[i % 4] += v * v;
    }
    return V::wide_rstd(((sum[0] + sum[2]) + (sum[1] + sum[3])) / dim + eps);
  }

  template <int kBlocks, class Factors>
  void write_head(const Side& s, const char* x, char* y, F rstd, const Factors* factors) const {
    constexpr int kStep = kVectors * (sizeof(Factors) == sizeof(float) ? 4 * N : 4);
    Block block;
    if (kBlocks) {
      const long long other = kBlocks * kBytes;
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; b++) {
        load_pairs<false>(x + b * kBytes, 0, other, block);
        turn_pairs<false>(block, y + b * kBytes, 0, other, rstd, factors + b * kStep);
      }
      return;
    }
    const Blocks pairs = pairs_, rest = rest_;
    const long long other = half_ * kSize;
    // The last part is loaded first: a masked load behind a store it seems to overlap would wait.
    Block part{};
    if (pairs.tail) load_pairs<true>(x + pairs.full * kBytes, pairs.tail, other, part);
    for (int b = 0; b < pairs.full; b++, x += kBytes, y += kBytes, factors += kStep) {
      load_pairs<false>(x, 0, other, block);
      turn_pairs<false>(block, y, 0, other, rstd, factors);
    }
    if (pairs.tail) turn_pairs<true>(part, y, pairs.tail, other, rstd, factors);
    x += rotary_ * kSize - pairs.full * kBytes;
    y += rotary_ * kSize - pairs.full * kBytes;
    const float* weight = s.rest;
    for (int b = 0; b < rest.full; b++, x += kBytes, y += kBytes, weight += kBlock)
      write_rest<false>(x, y, 0, rstd, weight);
    if (rest.tail) write_rest<true>(x, y, rest.tail, rstd, weight);
  }

  static F factor(const float* f, int i) { return V::load(f + i * N); }
  static F factor(const F* f, int i) { return f[i]; }

  template <class Factors>
  static void turn(F& a, F& b, F rstd, const Factors* f, int i) {
    F ya, yb;
    rotate(mul(a, rstd), mul(b, rstd), factor(f, i), factor(f, i + 1), factor(f, i + 2),
           factor(f, i + 3), ya, yb);
    a = ya, b = yb;
  }

  // A block of pairs, `other` bytes apart in half pairing; kPart: its first n channels only.
  struct Block {
    F e, o, e2, o2;
  };
  template <bool kPart>
  static void load_pairs(const char* x, int n, long long other, Block& b) {
    V::template load2<kType, kInterleaved, kPart>(x, n, b.e, b.o);
    if (!kInterleaved) V::template load2<kType, kInterleaved, kPart>(x + other, n, b.e2, b.o2);
  }
  template <bool kPart, class Factors>
  static void turn_pairs(Block& b, char* y, int n, long long other, F rstd, const Factors* f) {
    turn(b.e, kInterleaved ? b.o : b.e2, rstd, f, 0);
    if (!kInterleaved) {
      turn(b.o, b.o2, rstd, f, 4);
      V::template store2<kType, kInterleaved, kPart>(y + other, n, b.e2, b.o2);
    }
    V::template store2<kType, kInterleaved, kPart>(y, n, b.e, b.o);
  }

  template <bool kPart>
  static void write_rest(const char* x, char* y, int n, F rstd, const float* weight) {
    F e, o;
    V::template load2<kType, kInterleaved, kPart>(x, n, e, o);
    e = mul(mul(e, rstd), V::load(weight));
    o = mul(mul(o, rstd), V::load(weight + N));
    V::template store2<kType, kInterleaved, kPart>(y, n, e, o);
  }
};

}  // namespace
}  // namespace qk
#endif
