// The center vector's two passes as plain pointers: the interface of ops.cpp to CPU and CUDA. No torch here.
#pragma once

#include <cstdint>

#include "gate.h"

namespace upstep {

enum class Real { kFloat, kHalf, kBFloat16 };

struct ForwardCall {
  const void* u;  // [num_views * num_images, d] of `real`, contiguous; the views stacked
  Real real;
  int64_t num_images;
  int num_views, d;
  float* z;          // as u
  double* inv_norm;  // [num_views * num_images]
  double* sums;      // [num_views * d + 2]: sum of z by view, sum of |z_bar|^2, num_images
  const double* state;  // [head + d], or null: only the sums are wanted
  Gate gate;
  float* center;  // [d]
  double* next;   // [head + d]
};

struct BackwardCall {
  const float* grad_z;     // [rows, d] or null
  const float* grad_sums;  // [rows / rows_per_view, d] or null
  double scale;            // of grad_sums
  int64_t rows, rows_per_view;
  int d;
  const float* z;
  const double* inv_norm;
  void* grad_u;  // [rows, d] of `real`
  Real real;
};

int64_t cpu_workspace(int64_t num_images, int num_views, int d);  // doubles
void forward_cpu(const ForwardCall& call, double* workspace);
void finish_cpu(const ForwardCall& call);
void backward_cpu(const BackwardCall& call);

// these return an error message, or null; `stream` is a cudaStream_t
int64_t cuda_workspace(const ForwardCall& call);  // floats
const char* forward_cuda(const ForwardCall& call, float* workspace, void* stream);
const char* finish_cuda(const ForwardCall& call, void* stream);
const char* backward_cuda(const BackwardCall& call, void* stream);

}  // namespace upstep
