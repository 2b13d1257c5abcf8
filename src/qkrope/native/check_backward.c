// check_backward.c: the boundary's part for the gradients that a backward reads and writes.
#include <string.h>

#include "check.h"

// On a CPU as many as give every thread work, and few enough to be summed again in no time; a
// function of the tokens alone, so that no number of threads changes a bit.
enum { CPU_TOKENS = 8, CPU_PARTIALS = 128 };

long long qk_partials(const qk_plan* plan, long long tokens, int num_sms) {
  if (num_sms) return qk_cuda_partials(plan, tokens, num_sms);
  const long long blocks = (tokens + CPU_TOKENS - 1) / CPU_TOKENS;
  return blocks < CPU_PARTIALS ? blocks : CPU_PARTIALS;
}

static int is_contiguous(const qk_view* v) {
  long long dense = 1;
  for (int d = v->ndim - 1; d >= 0; dense *= v->size[d--])
    if (v->size[d] != 1 && v->stride[d] != dense) return 0;
  return 1;
}

static int float32_view(const operands* o, const char* name, const DLTensor* t, qk_view* v) {
  if (qk_on_device(o, name, t) || qk_view_of(name, t, v)) return -1;
  if (qk_dtype_of(t->dtype) != QK_F32)
    return qk_raise("TypeError", "%s: expected float32, got %s", name, qk_dtype_name(t->dtype));
  if (!is_contiguous(v))
    return qk_raise("ValueError", "%s: expected a contiguous tensor, got another", name);
  return 0;
}

// Where the gradient of a weight or bias is summed: contiguous float32 of its shape. `width`: of
// one row.
static int check_sum(const operands* o, const char* name, const char* of_name, const DLTensor* of,
                     const DLTensor* t, int width, float** data, long long* head,
                     long long* count) {
  qk_view v, like;
  char want[128], got[128];
  if (!t) return 0;
  if (!of)
    return qk_raise("ValueError", "%s: expected None, since %s is None, got a tensor", name,
                    of_name);
  if (float32_view(o, name, t, &v) || qk_view_of(of_name, of, &like)) return -1;
  if (v.ndim != like.ndim || memcmp(v.size, like.size, v.ndim * sizeof *v.size))
    return qk_raise("ValueError", "%s: expected shape %s of %s, got %s", name,
                    qk_shape_text(like.size, like.ndim, want, sizeof want), of_name,
                    qk_shape_text(v.size, v.ndim, got, sizeof got));
  *data = (float*)v.data;
  *count = qk_view_count(&v);
  *head = *count > width ? width : 0;
  return 0;
}

static int check_dy(const operands* o, const char* name, const DLTensor* t, const qk_view* x,
                    int dtype, qk_view* v) {
  char want[128], got[128];
  if (!t) return qk_raise("ValueError", "%s: expected a tensor beside %s, got None", name, x->name);
  if (qk_on_device(o, name, t) || qk_view_of(name, t, v)) return -1;
  if (qk_dtype_of(t->dtype) != dtype)
    return qk_raise("TypeError", "%s: expected the dtype of %s, got %s", name, x->name,
                    qk_dtype_name(t->dtype));
  if (v->ndim != x->ndim || memcmp(v->size, x->size, v->ndim * sizeof *v->size))
    return qk_raise("ValueError", "%s: expected shape %s of %s, got %s", name,
                    qk_shape_text(x->size, x->ndim, want, sizeof want), x->name,
                    qk_shape_text(v->size, v->ndim, got, sizeof got));
  if (v->stride[v->ndim - 1] != 1)
    return qk_raise("ValueError", "%s: expected stride 1 in the last dimension, got %lld", name,
                    v->stride[v->ndim - 1]);
  return 0;
}

int qk_check_gradient(const qk_call* c, const operands* o, int side, int dtype, qk_side_grads* to,
                      long long* stride) {
  static const char* names[][5] = {{"dq_out", "dq_weight", "q_weight", "dq_bias", "q_bias"},
                                   {"dk_out", "dk_weight", "k_weight", "dk_bias", "k_bias"},
                                   {"dv_out", "dv_weight", "v_weight"}};
  const DLTensor* given[][5] = {{c->q_dy, c->q_dweight, c->q_weight, c->q_dbias, c->q_bias},
                                {c->k_dy, c->k_dweight, c->k_weight, c->k_dbias, c->k_bias},
                                {c->v_dy, c->v_dweight, c->v_weight, 0, 0}};
  const qk_variant* plan = &c->plan->variant;
  const int widths[] = {plan->q.weight_dim, plan->k.weight_dim, plan->v.weight_dim};
  const qk_view* x = &o->in[side];
  const char** name = names[side];
  const DLTensor** t = given[side];
  qk_view dy;
  if (!(side == Q ? c->q_out : side == K ? c->k_out : c->v_out))
    return qk_raise("ValueError", "out[%d]: expected a tensor for the gradient of %s, got None",
                    side, x->name);
  if (check_dy(o, name[0], t[0], x, dtype, &dy) ||
      check_sum(o, name[1], name[2], t[2], t[1], widths[side], &to->dweight, &to->dweight_head,
                &to->dweight_count) ||
      check_sum(o, name[3], name[4], t[4], t[3], widths[side], &to->dbias, &to->dbias_head,
                &to->dbias_count))
    return -1;
  to->dy = dy.data;
  to->dy_head = dy.stride[x->ndim - 2];
  memcpy(stride, dy.stride, (x->ndim - 2) * sizeof *stride);
  return 0;
}

// The rows of partial sums, sum after sum. Sums, workspace and what the gradients go to are the
// op's own allocations, so that only what a caller gives is checked for shared memory.
int qk_check_workspace(const qk_call* c, const operands* o, qk_checked* out) {
  static const char* names[][2] = {{"dq_out", "q"}, {"dk_out", "k"}, {"dv_out", "v"}};
  const DLTensor* dy[] = {c->q_dy, c->k_dy, c->v_dy};
  qk_view v;
  long long columns = 0, needed = 0;
  const DLTensor* sums[][2] = {
      {c->q_dweight, c->q_dbias}, {c->k_dweight, c->k_dbias}, {c->v_dweight, 0}};
  for (int i = 0; i < SIDES; ++i) {
    if (dy[i] && !o->has[i])
      return qk_raise("ValueError", "%s: expected None, since %s is None, got a tensor",
                      names[i][0], names[i][1]);
    if (!o->has[i] && (sums[i][0] || sums[i][1]))
      return qk_raise("ValueError",
                      "d%s_weight, d%s_bias: expected None, since %s is None, got a "
                      "tensor",
                      names[i][1], names[i][1], names[i][1]);
  }
  for (int i = 0; i < out->num_parts; ++i) {
    const qk_side_grads* sides[] = {&out->grads[i].q, &out->grads[i].k, &out->grads[i].v};
    const long long rows = qk_partials(c->plan, out->part[i].tokens, 0);
    out->grads[i].partials = rows;
    for (int j = 0; j < SIDES; ++j) columns += sides[j]->dweight_count + sides[j]->dbias_count;
    if (rows > needed) needed = rows;
  }
  if (!columns) return 0;
  if (!c->workspace)
    return qk_raise("ValueError", "workspace: expected a tensor for the sums, got None");
  if (float32_view(o, "workspace", c->workspace, &v)) return -1;
  const long long partials = qk_view_count(&v) / columns;
  if (o->device_type == kDLCPU && partials < needed)
    return qk_raise("ValueError", "workspace: expected %lld elements, got %lld", needed * columns,
                    qk_view_count(&v));
  float* next = (float*)v.data;
  for (int i = 0; i < out->num_parts; ++i) {
    qk_grads* g = &out->grads[i];
    qk_side_grads* sides[] = {&g->q, &g->k, &g->v};
    if (o->device_type != kDLCPU) g->partials = partials;
    for (int j = 0; j < SIDES; ++j) {
      sides[j]->dweight_parts = next;
      next += partials * sides[j]->dweight_count;
      sides[j]->dbias_parts = next;
      next += partials * sides[j]->dbias_count;
    }
  }
  return 0;
}
