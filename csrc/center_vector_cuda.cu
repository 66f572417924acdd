// Chooses the instance of each kernel by dtype. Everything compiled by nvcc is here.
#include "center_vector.cuh"
#include "center_vector.h"

namespace upstep {
namespace {

Finish finish_of(const ForwardCall& c) { return {c.state, c.gate, c.center, c.next}; }

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int64_t partial_floats(const ForwardCall& c) {
  // unaligned rows take no more blocks than this
  return int64_t{forward_blocks(c.num_images, c.d, false)} * partial_stride(c.num_views, c.d);
}

template <class T> cudaError_t forward(const ForwardCall& c, float* workspace, cudaStream_t stream) {
  // with a state the ticket is one of its cells, 0 between launches; without one it lies behind the partial sums
  unsigned* ticket = reinterpret_cast<unsigned*>(workspace + partial_floats(c));
  if (c.state) ticket = reinterpret_cast<unsigned*>(const_cast<double*>(c.state) + kTicket);
  else if (cudaError_t error = cudaMemsetAsync(ticket, 0, sizeof(unsigned), stream)) return error;
  return launch_forward(Forward<T>{static_cast<const T*>(c.u), c.num_images, c.num_views, c.d, c.z, c.inv_norm,
                                   workspace, ticket, c.sums, finish_of(c)}, stream);
}

template <class T> cudaError_t backward(const BackwardCall& c, cudaStream_t stream) {
  return launch_backward(Backward<T>{c.grad_z, c.grad_sums, c.scale, c.rows, c.rows_per_view, c.d, c.z, c.inv_norm,
                                     static_cast<T*>(c.grad_u)}, stream);
}

}  // namespace

int64_t cuda_workspace(const ForwardCall& c) { return partial_floats(c) + 1; }

const char* forward_cuda(const ForwardCall& c, float* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (c.real == Real::kFloat) return message(forward<float>(c, workspace, on));
  if (c.real == Real::kHalf) return message(forward<__half>(c, workspace, on));
  return message(forward<__nv_bfloat16>(c, workspace, on));
}

const char* finish_cuda(const ForwardCall& c, void* stream) {
  return message(launch_finish(c.sums, c.num_views, c.d, finish_of(c), static_cast<cudaStream_t>(stream)));
}

const char* backward_cuda(const BackwardCall& c, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (c.real == Real::kFloat) return message(backward<float>(c, on));
  if (c.real == Real::kHalf) return message(backward<__half>(c, on));
  return message(backward<__nv_bfloat16>(c, on));
}

}  // namespace upstep
