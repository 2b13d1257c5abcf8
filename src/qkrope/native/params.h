// params.h: what one call is. The CPU kernels and the CUDA kernel read this same struct; it knows
// no framework, and it is plain C so that C, C++ and NVRTC can all compile it without a header.
#ifndef QKROPE_PARAMS_H
#define QKROPE_PARAMS_H

#define QK_MAX_DIMS 6         // leading dimensions left after coalescing
#define QK_MAX_HEAD_DIM 1024  // twin of qkrope.spec.MAX_HEAD_DIM
#define QK_MAX_AXES 4         // of positions; twin of qkrope.rope.MAX_AXES

enum { QK_F32 = 0, QK_BF16 = 1, QK_F16 = 2, QK_F64 = 3 };
enum { QK_HALF = 0, QK_INTERLEAVED = 1, QK_BLOCK_HALF = 2 };
enum { QK_NORM_NONE = 0, QK_NORM_RMS = 1, QK_NORM_LAYER = 2, QK_NORM_L2 = 3 };
enum { QK_ANGLE_NONE = 0, QK_ANGLE_PHASE = 1, QK_ANGLE_TABLE = 2, QK_ANGLE_INV_FREQ = 3 };
// Where a chain of separate operations rounds to the type of q and k: the letters of Spec.rounding,
// of the norm and of the rotation. ONCE: nowhere but at the store.
enum { QK_ROUND_ONCE = 0, QK_ROUND_A = 1, QK_ROUND_B = 2, QK_ROUND_C = 3 };
enum { QK_TURN_ONCE = 0, QK_TURN_B = 1, QK_TURN_H = 2, QK_TURN_F = 3 };

// One frequency as a 64-bit fraction of a turn, value = hi * 2^32 + lo with lo signed: the low word
// is balanced so that one signed high multiply serves negative positions too.
typedef struct {
  int lo, hi;
} qk_frac;

// Pair j of a head: input channels a and b become output channels out_a and out_b, turned by
// position[axis] * frac[j]. A table holds entry j for both, or (table_full) entry table_a for out_a
// and table_b for out_b.
typedef struct {
  short a, b, out_a, out_b, table_a, table_b, axis;
} qk_pair;

// What the Spec says of one of q, k and v (v is never rotated).
typedef struct {
  int norm;        // QK_NORM_*
  int row;         // one statistic for all heads of a token, else one a head
  int dim;         // the leading channels that are normalised: head_dim, or fewer (then row is 0)
  int rest;        // QK_NORM_* of the channels from dim on, by a statistic of their own
  int weight_dim;  // channels that a weight or bias has: dim, or head_dim where rest is a norm
  int round_norm, round_turn;  // QK_ROUND_*, QK_TURN_*: both ONCE or neither
} qk_side_variant;

// The compile-time knobs: macros of the same names on CUDA (QK_VARIANT_*), this struct on the CPU.
typedef struct {
  int head_dim;
  int rotary_dim;  // 0: no rotation; even, <= head_dim
  int pairing;     // QK_HALF | QK_INTERLEAVED | QK_BLOCK_HALF
  qk_side_variant q, k, v;
  int rope_first;      // the rotated head is normalised
  int reverse;         // turn by -position: frac has that sign, a caller's table or inv_freq not
  int axes;            // of positions: 0, or pos_axis walks so many; qk_pair.axis says whose
  int general;         // something here beyond a norm of a head, "rms" or "none", and a rotation of
                       // its leading channels, rounded once
  int dtype;           // of q, k, v and the outputs
  int q_weight_dtype;  // of the weights that are given, else -1
  int k_weight_dtype;
  int v_weight_dtype;
  int angle;
} qk_variant;

// q, k or v. Strides are in elements; the last dimension of x, y, weight, bias has stride 1.
typedef struct {
  const void* x;       // [size[0], ..., size[ndim-1], heads, head_dim]
  void* y;             // same shape; may be x itself
  const void* weight;  // [weight_dim]; null: all ones, and then no weight_offset
  long long x_head, y_head;
  long long x_dim[QK_MAX_DIMS], y_dim[QK_MAX_DIMS];
  int heads;  // 0: this side is absent
  float eps, weight_offset;
  // From here on: only where qk_params.general is set.
  float rest_eps, rest_offset;       // of the channels from dim on
  long long weight_head, bias_head;  // to the next head's row; 0: one row for all heads
  const void* bias;                  // [weight_dim], added after the weight; null: none
  int bias_dtype;
  // Multiplies what the norm gives: scale, or where scale_of is not null its element at
  // [token, head, channel] (any of these strides may be 0).
  float scale;
  const void* scale_of;
  int scale_dtype;
  long long scale_head, scale_channel, scale_dim[QK_MAX_DIMS];
} qk_side;

typedef struct {
  qk_side q, k, v;
  int general;       // the variant's, or something that this call brings for q or k is general
  long long tokens;  // product of size[]
  long long size[QK_MAX_DIMS];
  int ndim;  // >= 1; size[0] is the outermost
  // QK_ANGLE_PHASE: angle = position * frac. QK_ANGLE_INV_FREQ: position * inv_freq (CUDA only: on
  // the CPU the caller's inv_freq has become frac, and the angle PHASE, before the kernel runs).
  int pos_wide;     // positions are int64 (else int32)
  const void* pos;  // also the row of a cos_sin_cache
  long long pos_dim[QK_MAX_DIMS];
  long long pos_axis;    // to the position on the next axis, where the variant has axes
  const qk_frac* frac;   // [rotary_dim / 2]
  const qk_pair* pairs;  // [rotary_dim / 2]
  // Tokens turn whose index along the last leading dimension as given, token % last_size, is in
  // [rotate_from, rotate_to); the others are normalised only.
  long long last_size, rotate_from, rotate_to;
  const void* inv_freq;
  long long inv_freq_step;
  int inv_freq_dtype;      // QK_F32 | QK_F64
  float attention_factor;  // multiplies the rotated channels; 1 with a table
  // QK_ANGLE_TABLE: entry i of a row is cos[row + i * cos_step].
  int table_dtype;
  int table_full;        // rows hold rotary_dim entries, one a channel, else one a pair
  long long table_rows;  // > 0: row = position * cos_row (a cache); 0: row = sum index * cos_dim
  const void* cos;
  const void* sin;
  long long cos_step, sin_step, cos_row, sin_row;
  long long cos_dim[QK_MAX_DIMS], sin_dim[QK_MAX_DIMS];
  int table_heads;  // a row of the table for each head, cos_head and sin_head apart
  long long cos_head, sin_head;
  int early_weights;  // CUDA: nothing on this stream can have written the weights
} qk_params;

// What the backward has of one of q, k and v beside its qk_side, whose y is where dx goes. A sum is
// contiguous: rows of weight_dim floats, one for all heads or (a head stride that is not 0) one
// each.
typedef struct {
  const void* dy;  // the gradient of the output: shape and dtype of x, last stride 1
  long long dy_head, dy_dim[QK_MAX_DIMS];
  float *dweight, *dbias;              // null: not wanted
  long long dweight_head, dbias_head;  // weight_dim or 0
  // Partial sums of the tokens of one block each: row r of dweight_parts is at r * dweight_count.
  float *dweight_parts, *dbias_parts;
  long long dweight_count, dbias_count;  // elements of a sum
} qk_side_grads;

typedef struct {
  qk_side_grads q, k, v;
  // Rows of partial sums: on a CPU one for each block of tokens; on CUDA how many there is room
  // for.
  long long partials;
} qk_grads;

// ---- CUDA: the same call laid out for a launch, what every warp reads first and together -------

// Strides are in bytes. The warps of a block are slots of one token, next to each other: those
// below q_slots serve q, the rest k. A group of lanes serves `passes` heads of one token.
typedef struct {
  const char* x;
  char* y;
  const void* weight;
  long long x_token, y_token, x_head, y_head;
  int heads, passes;
  float eps, weight_offset;
} qk_launch_side;

typedef struct {
  qk_launch_side side[2];
  const char* pos;
  long long pos_token;
  const qk_frac* frac;
  unsigned tokens;
  int q_slots, slots;
  float attention_factor;
  int pos_wide, early_weights;
  int ndim;  // 1: the token strides above are all there is
  // ndim > 1: strides of the leading dimensions, outermost first.
  unsigned size[QK_MAX_DIMS];
  long long x_dim[2][QK_MAX_DIMS], y_dim[2][QK_MAX_DIMS], pos_dim[QK_MAX_DIMS];
  // QK_ANGLE_INV_FREQ and QK_ANGLE_TABLE, as in qk_params.
  const void* inv_freq;
  long long inv_freq_step;
  int inv_freq_dtype, table_dtype, table_full;
  long long table_rows;
  const char *cos, *sin;
  long long cos_step, sin_step, cos_row, sin_row;
  long long cos_dim[QK_MAX_DIMS], sin_dim[QK_MAX_DIMS];
} qk_launch;

// What general.cu reads more: of q, k and v, and of the call. Strides are in elements, but for x
// and y.
typedef struct {
  const void *bias, *scale_of;  // null: none, and `scale` alone
  long long weight_head, bias_head, scale_head, scale_channel, scale_dim[QK_MAX_DIMS];
  int weight_dtype, bias_dtype, scale_dtype;
  float scale, rest_eps, rest_offset;
} qk_launch_extra;

typedef struct {
  qk_launch plain;
  qk_launch_side v;
  qk_launch_extra more[3];
  long long x_dim[3][QK_MAX_DIMS], y_dim[3][QK_MAX_DIMS];  // in bytes
  long long pos_axis;                                      // in bytes
  long long cos_head, sin_head;
  int table_heads;
  int ranged;  // not all tokens turn, as in qk_params
  unsigned last_size, rotate_from, rotate_to;
  int k_slots;  // slots below it, and not q's, serve k, the rest v
  // A norm of whole rows: as many warps of a block are on one token of a side, whose blocks begin
  // at first_block; k's follow q's and v's follow k's.
  int team_warps[3];
  unsigned teams[3];   // of a block
  float row_share[3];  // 1 / channels of a row
  long long first_block[3];
} qk_launch_general;

// How a warp covers heads on CUDA; the launcher, the kernel and variant.py must agree. A unit is
// four pairs; a lane holds 1, 2 or 4 of them, so that a warp covers at least one head.
#define QK_UNITS(head_dim) (((head_dim) + 7) / 8)
#define QK_LANE_UNITS(head_dim) (QK_UNITS(head_dim) <= 32 ? 1 : QK_UNITS(head_dim) <= 64 ? 2 : 4)
#define QK_LANES(head_dim) \
  ((QK_UNITS(head_dim) + QK_LANE_UNITS(head_dim) - 1) / QK_LANE_UNITS(head_dim))
#define QK_GROUPS(head_dim) (32 / QK_LANES(head_dim))
// Heads a group has in flight at once, and so the most it serves.
#define QK_PASSES(head_dim) (QK_LANE_UNITS(head_dim) <= 1 ? 4 : 2)
// The groups of a warp are side by side on tokens, or (fewer rows) on the heads of one token.
#define QK_ON_TOKENS(head_dim, rows) ((rows) == QK_PASSES(head_dim))
// Norms of whole rows: heads a group of lanes holds at once, and warps that a token has at most.
#define QK_TEAM_ROWS(head_dim) (4 / QK_LANE_UNITS(head_dim))
#define QK_TEAM_WARPS(head_dim) (QK_LANE_UNITS(head_dim) <= 2 ? 16 : 8)
// The same of the fast kernel of such norms, for elements of so many bytes.
#define QK_FAST_TEAM_ROWS(head_dim, size) (QK_LANE_UNITS(head_dim) * (size) <= 2 ? 4 : 2)
#define QK_FAST_TEAM_WARPS 20

#endif
