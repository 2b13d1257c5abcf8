// cpu_dispatch.cpp: which instruction set runs, and how the tokens are shared among threads.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

#include "cpu_api.h"
#include "cpu_levels.h"

namespace {

struct Level {
  const char* name;
  qk::run_function* run;
  qk::backward_function* backward;
  bool (*supported)();
};

bool has_scalar() { return true; }
#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Level kLevels[] = {
#ifdef __x86_64__
    {"avx512bf16", qk::run_avx512bf16, qk::backward_avx512bf16, has_avx512bf16},  // the best first
    {"avx512", qk::run_avx512, qk::backward_avx512, has_avx512},
    {"avx2", qk::run_avx2, qk::backward_avx2, has_avx2},
#endif
    {"scalar", qk::run_scalar, qk::backward_scalar, has_scalar},
};

// Below this many heads a second thread costs more than it brings.
const long long kParallelHeads = 1000;

#ifdef _OPENMP
// A forked child inherits libgomp's record of its pool but not the threads, so that a parallel
// region waits for ever: it computes alone, unless its parent had not started the pool.
int pool_started, pool_lost;  // by __atomic operations only

void after_fork() {
  if (__atomic_load_n(&pool_started, __ATOMIC_RELAXED))
    __atomic_store_n(&pool_lost, 1, __ATOMIC_RELAXED);
}

[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, after_fork);

// Always the whole pool, which is torch's: a smaller team would make libgomp end threads.
bool is_parallel(const qk_params& p) {
  if (p.tokens < 2 || p.tokens * (p.q.heads + p.k.heads + p.v.heads) < kParallelHeads ||
      omp_get_max_threads() <= 1 || __atomic_load_n(&pool_lost, __ATOMIC_RELAXED))
    return false;
  __atomic_store_n(&pool_started, 1, __ATOMIC_RELAXED);
  return true;
}
#endif

const Level* chosen;  // by __atomic operations only

const Level* find(const char* name) {
  for (const Level& level : kLevels)
    if (level.supported() && (!*name || !strcmp(name, level.name))) return &level;
  return nullptr;
}

const Level* current() {
  const Level* level = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  if (level || qk_cpu_select_isa(nullptr)) return level;
  return __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
}

}  // namespace

const char* qk_cpu_select_isa(const char* name) {
  static __thread char error[256];
  const char* from = "isa";
  if (!name || !*name) {
    name = getenv("QKROPE_ISA");
    from = "QKROPE_ISA";
    if (!name) name = "";
  }
  if (const Level* level = find(name)) {
    __atomic_store_n(&chosen, level, __ATOMIC_RELEASE);
    return nullptr;
  }
  int n = snprintf(error, sizeof error, "%s: expected one of", from);
  const char* between = " ";
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    n += snprintf(error + n, sizeof error - n, "%s%s", between, level.name);
    between = ", ";
  }
  snprintf(error + n, sizeof error - n, " (what this machine has), got '%.64s'", name);
  return error;
}

const char* qk_cpu_isa(void) {
  const Level* level = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  return level ? level->name : nullptr;
}

int qk_cpu_supported(const char* name) { return name && *name && find(name); }

int qk_cpu_run(const qk_variant* variant, const qk_params* params) {
  const qk_variant& v = *variant;
  const qk_params& p = *params;
  const Level* level = current();
  if (!level) return -1;
#ifdef _OPENMP
  if (is_parallel(p)) {
#pragma omp parallel
    {
      long long threads = omp_get_num_threads(), i = omp_get_thread_num();
      long long begin = p.tokens * i / threads, end = p.tokens * (i + 1) / threads;
      if (begin < end) level->run(v, p, begin, end);
    }
    return 0;
  }
#endif
  if (p.tokens > 0) level->run(v, p, 0, p.tokens);
  return 0;
}

namespace {

// The rows of partial sums of columns [begin, end) of a sum, in order and in double.
void add_rows(const float* parts, long long rows, long long count, long long begin, long long end,
              float* sum) {
  enum { kColumns = 32 };
  for (long long first = begin; first < end; first += kColumns) {
    const int columns = end - first < kColumns ? (int)(end - first) : kColumns;
    double total[kColumns] = {};
    for (long long row = 0; row < rows; row++)
      for (int c = 0; c < columns; c++) total[c] += parts[row * count + first + c];
    for (int c = 0; c < columns; c++) sum[first + c] = (float)total[c];
  }
}

// One of `threads` shares of the sums.
void add_share(const qk_grads& g, long long thread, long long threads) {
  const qk_side_grads* const sides[] = {&g.q, &g.k, &g.v};
  for (const qk_side_grads* s : sides) {
    const struct {
      float *sum, *parts;
      long long count;
    } sums[] = {{s->dweight, s->dweight_parts, s->dweight_count},
                {s->dbias, s->dbias_parts, s->dbias_count}};
    for (const auto& sum : sums)
      if (sum.sum)
        add_rows(sum.parts, g.partials, sum.count, sum.count * thread / threads,
                 sum.count * (thread + 1) / threads, sum.sum);
  }
}

}  // namespace

int qk_cpu_backward(const qk_variant* variant, const qk_params* params, const qk_grads* grads) {
  const qk_variant& v = *variant;
  const qk_params& p = *params;
  const qk_grads& g = *grads;
  const Level* level = current();
  if (!level) return -1;
#ifdef _OPENMP
  if (is_parallel(p) && g.partials > 1) {
#pragma omp parallel
    {
      const long long threads = omp_get_num_threads(), i = omp_get_thread_num();
      const long long begin = g.partials * i / threads, end = g.partials * (i + 1) / threads;
      if (begin < end) level->backward(v, p, g, begin, end);
#pragma omp barrier
      add_share(g, i, threads);
    }
    return 0;
  }
#endif
  level->backward(v, p, g, 0, g.partials);
  add_share(g, 0, 1);
  return 0;
}
