// The passes of a block between its products, on a CPU, as plain pointers: the interface of block_ops.cpp to
// rows_cpu.cpp, attention_cpu.cpp and adapter_cpu.cpp, which are compiled once per capability. No torch here.
#pragma once

#include <cstdint>

#include "center_vector.h"

namespace upstep {

// total = x + delta; x_hat = (total - mean) rstd. Rows of k values.
struct NormCall {
  Real real;
  int64_t rows, k;
  float eps;
  const void *x, *delta;  // delta may be null; total is then x and not written
  void *total, *x_hat;
  float* rstd;
};

// dx = rstd (d - mean d - x_hat mean(d x_hat)) + skip; dx may be d
struct NormBackwardCall {
  Real real;
  int64_t rows, k;
  const void *d, *x_hat, *skip;  // skip may be null
  const float* rstd;
  void* dx;
};

// g = u P(u) and dg/du; kind of P: 0 erf, 1 tanh, 2 quick. kernels/gelu.py has the formulas.
struct GeluCall {
  Real real;
  int64_t size;
  int kind;
  const void* u;
  void* g;
  void* derivative;  // null, or of the type of u (may be u), or bytes
  bool as_byte;
};

// du = dg derivative, from bytes
struct GeluBackwardCall {
  Real real;
  int64_t size;
  const void* dg;
  const uint8_t* derivative;
  void* du;
};

// softmax attention over packed qkv [B, T, 3, H, d]; out and grad [B, T, H, d], lse [B, H, T]
struct AttentionCall {
  Real real;
  int64_t batch, tokens, heads, width;
  float scale;
  void *qkv, *out;
  float* lse;
  void *grad, *dqkv;  // of backward
};

// gradients of an adapter of P parts, [n, r] each; partial: [chunks, d_a | d_shift | d_b], R = P r
struct AdapterCall {
  Real real;
  int64_t rows, width, k, parts, n, r, chunks;
  const void *dy, *x, *a, *shift, *b;  // [rows, width], [rows, k], [R, k], [R], [P, n, r]
  const int64_t* first;                // first column of dy of each part
  float* partial;
};

// for the items [begin, end): rows, values, chunks, pairs of an image and a head
#define UPSTEP_PASSES(capability)                                      \
  namespace capability {                                               \
  void norm(const NormCall&, int64_t begin, int64_t end);              \
  void norm_backward(const NormBackwardCall&, int64_t, int64_t);       \
  void gelu(const GeluCall&, int64_t begin, int64_t end);              \
  void gelu_backward(const GeluBackwardCall&, int64_t, int64_t);       \
  void attention(const AttentionCall&, int64_t begin, int64_t end);    \
  void adapter(const AdapterCall&, int64_t begin, int64_t end);        \
  void attention_backward(const AttentionCall&, int64_t, int64_t);     \
  }
UPSTEP_PASSES(baseline)
UPSTEP_PASSES(avx2)
UPSTEP_PASSES(avx512)
UPSTEP_PASSES(avx512_bf16)
#undef UPSTEP_PASSES

}  // namespace upstep
