// The registered ops `upstep_ops::`, on torch's stable ABI. Schemas, checks and the current stream; nothing else.
// Callers allocate, so that the memory is theirs to plan; kernels/center_vector.py is the only one meant.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <algorithm>
#include <optional>

#include "center_vector.h"
#include "views.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using upstep::BackwardCall;
using upstep::ForwardCall;
using upstep::Gate;
using upstep::Real;

Real real_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "upstep_ops: u must be float32, float16 or bfloat16");
  return type == ScalarType::Float ? Real::kFloat : type == ScalarType::Half ? Real::kHalf : Real::kBFloat16;
}

// the pointer of a dense tensor of `count` cells beside `other`: what stands between a wrong call and wrong memory
void* cells(const Tensor& t, ScalarType type, int64_t count, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "upstep_ops: wrong dtype of ", name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count, "upstep_ops: ", name, " must be contiguous, of ", count,
                  " cells, got ", t.numel());
  STD_TORCH_CHECK(t.device() == other.device(), "upstep_ops: ", name, " is on another device");
  return t.data_ptr();
}

float* floats(const Tensor& t, int64_t count, const Tensor& other, const char* name) {
  return static_cast<float*>(cells(t, ScalarType::Float, count, other, name));
}

double* doubles(const Tensor& t, int64_t count, const Tensor& other, const char* name) {
  return static_cast<double*>(cells(t, ScalarType::Double, count, other, name));
}

int narrow_dim(int64_t d) {
  STD_TORCH_CHECK(d >= 1 && d <= 4096, "upstep_ops: d must be 1 to 4096, got ", d);
  return static_cast<int>(d);
}

int checked_views(int64_t num_views) {
  STD_TORCH_CHECK(num_views >= 1 && num_views <= upstep::kMaxViews, "upstep_ops: num_views must be 1 or 2");
  return static_cast<int>(num_views);
}

Gate gate_of(int64_t rule, bool open_when_low, double beta, double rate, int64_t max_skips, double center_beta,
             int64_t flag) {
  return {static_cast<int>(rule), open_when_low, beta, rate, max_skips, center_beta, reinterpret_cast<int64_t*>(flag)};
}

ForwardCall rows_of(const Tensor& u, int64_t num_views, const Tensor& z, const Tensor& inv_norm, const Tensor& sums) {
  STD_TORCH_CHECK(u.dim() == 2 && u.is_contiguous(), "upstep_ops: u must be [rows, d], contiguous");
  const int d = narrow_dim(u.size(1)), views = checked_views(num_views);
  const int64_t rows = u.size(0);
  STD_TORCH_CHECK(rows % views == 0, "upstep_ops: rows must be a multiple of num_views");
  ForwardCall call{};
  call.u = u.data_ptr(), call.real = real_of(u);
  call.num_images = rows / views, call.num_views = views, call.d = d;
  call.z = floats(z, rows * d, u, "z"), call.inv_norm = doubles(inv_norm, rows, u, "inv_norm");
  call.sums = doubles(sums, int64_t{views} * d + 2, u, "sums");
  return call;
}

void add_state(ForwardCall& call, const Tensor& state, const Gate& gate, const Tensor& center, const Tensor& next,
               const Tensor& other) {
  call.state = doubles(state, upstep::kHead + call.d, other, "state");
  call.center = floats(center, call.d, other, "center");
  call.next = doubles(next, upstep::kHead + call.d, other, "next_state");
  call.gate = gate;
}

BackwardCall backward_of(const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_sums, double scale,
                         const Tensor& z, const Tensor& inv_norm, const Tensor& grad_u) {
  const int64_t rows = z.size(0);
  const int d = narrow_dim(z.size(1));
  BackwardCall call{};
  call.scale = scale, call.rows = rows, call.rows_per_view = rows, call.d = d;
  if (grad_z) call.grad_z = floats(*grad_z, rows * d, z, "grad_z");
  if (grad_sums) {
    const int64_t views = grad_sums->size(0);
    STD_TORCH_CHECK(views >= 1 && rows % views == 0, "upstep_ops: rows must be a multiple of the rows of grad_sums");
    call.grad_sums = floats(*grad_sums, views * d, z, "grad_sums");
    call.rows_per_view = rows / views;
  }
  call.z = floats(z, rows * d, z, "z"), call.inv_norm = doubles(inv_norm, rows, z, "inv_norm");
  call.real = real_of(grad_u);
  call.grad_u = cells(grad_u, grad_u.scalar_type(), rows * d, z, "grad_u");
  return call;
}

// ---- CPU

void run_cpu(const ForwardCall& call, const Tensor& sums) {
  const int64_t size = upstep::cpu_workspace(call.num_images, call.num_views, call.d);
  const Tensor workspace = torch::stable::new_empty(sums, {size});
  upstep::forward_cpu(call, static_cast<double*>(workspace.data_ptr()));
}

void forward_cpu(const Tensor& u, const Tensor& state, int64_t num_views, int64_t rule, bool open_when_low,
                 double beta, double rate, int64_t max_skips, double center_beta, int64_t flag, const Tensor& z,
                 const Tensor& inv_norm, const Tensor& sums, const Tensor& center, const Tensor& next) {
  ForwardCall call = rows_of(u, num_views, z, inv_norm, sums);
  add_state(call, state, gate_of(rule, open_when_low, beta, rate, max_skips, center_beta, flag), center, next, u);
  run_cpu(call, sums);
}

void partial_cpu(const Tensor& u, int64_t num_views, const Tensor& z, const Tensor& inv_norm, const Tensor& sums) {
  run_cpu(rows_of(u, num_views, z, inv_norm, sums), sums);
}

ForwardCall finish_of(const Tensor& sums, const Tensor& state, int64_t num_views, const Gate& gate,
                      const Tensor& center, const Tensor& next) {
  ForwardCall call{};
  call.num_views = checked_views(num_views), call.d = narrow_dim(center.numel());
  call.sums = doubles(sums, int64_t{call.num_views} * call.d + 2, sums, "sums");
  add_state(call, state, gate, center, next, sums);
  return call;
}

void finish_cpu(const Tensor& sums, const Tensor& state, int64_t num_views, int64_t rule, bool open_when_low,
                double beta, double rate, int64_t max_skips, double center_beta, int64_t flag, const Tensor& center,
                const Tensor& next) {
  const Gate gate = gate_of(rule, open_when_low, beta, rate, max_skips, center_beta, flag);
  upstep::finish_cpu(finish_of(sums, state, num_views, gate, center, next));
}

void backward_cpu(const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_sums, double scale,
                  const Tensor& z, const Tensor& inv_norm, const Tensor& grad_u) {
  upstep::backward_cpu(backward_of(grad_z, grad_sums, scale, z, inv_norm, grad_u));
}

void views_cpu(const Tensor& pixels, const Tensor& places, const Tensor& boxes, const Tensor& factors,
               const Tensor& mean, const Tensor& std, int64_t height, int64_t width, bool cubic, int64_t half_y,
               int64_t half_x, int64_t patch, const Tensor& out) {
  const int64_t count = boxes.size(0), channels = mean.numel();
  STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Byte, "upstep_ops: pixels must be uint8");
  STD_TORCH_CHECK(boxes.dim() == 2 && places.dim() == 2, "upstep_ops: places and boxes must be tables");
  STD_TORCH_CHECK(std::min(height, width) >= 1 && std::max(height, width) <= 1 << 15 && channels <= 1 << 12,
                  "upstep_ops: views must be 1 to 32768 pixels a side, of at most 4096 channels");
  STD_TORCH_CHECK(patch >= 0 && (!patch || (height % patch == 0 && width % patch == 0)),
                  "upstep_ops: patch must divide the view");
  STD_TORCH_CHECK(half_y >= 0 && half_x >= 0 && half_y < height && half_x < width, "upstep_ops: the blur is too wide");
  upstep::ViewsCall call{};
  call.pixels = static_cast<const uint8_t*>(pixels.data_ptr());
  call.places = static_cast<const int64_t*>(cells(places, ScalarType::Long, places.size(0) * 4, pixels, "places"));
  call.boxes = static_cast<const int32_t*>(cells(boxes, ScalarType::Int, count * 6, pixels, "boxes"));
  call.factors = floats(factors, count * 7, pixels, "factors");
  call.mean = floats(mean, channels, pixels, "mean"), call.std = floats(std, channels, pixels, "std");
  call.count = count, call.channels = static_cast<int>(channels);
  call.height = static_cast<int>(height), call.width = static_cast<int>(width), call.cubic = cubic;
  call.half_y = static_cast<int>(half_y), call.half_x = static_cast<int>(half_x);
  call.patch = static_cast<int>(patch), call.real = real_of(out);
  call.out = cells(out, out.scalar_type(), count * channels * height * width, pixels, "out");
  upstep::views_cpu(call);
}

// ---- CUDA

#ifdef UPSTEP_FAST_CUDA

// by name, because torch builds without CUDA lack it and this library must load there too
void* current_stream(const Tensor& t) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto getter = reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(getter != nullptr, "upstep_ops: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(t.get_device_index(), &stream) == 0, "upstep_ops: torch gave no current CUDA stream");
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "upstep_ops: CUDA said: ", error ? error : ""); }

void run_cuda(const ForwardCall& call, const Tensor& u) {
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const Tensor workspace = torch::stable::new_empty(u, {upstep::cuda_workspace(call)}, ScalarType::Float);
  check(upstep::forward_cuda(call, static_cast<float*>(workspace.data_ptr()), current_stream(u)));
}

void forward_cuda(const Tensor& u, const Tensor& state, int64_t num_views, int64_t rule, bool open_when_low,
                  double beta, double rate, int64_t max_skips, double center_beta, int64_t flag, const Tensor& z,
                  const Tensor& inv_norm, const Tensor& sums, const Tensor& center, const Tensor& next) {
  ForwardCall call = rows_of(u, num_views, z, inv_norm, sums);
  add_state(call, state, gate_of(rule, open_when_low, beta, rate, max_skips, center_beta, flag), center, next, u);
  run_cuda(call, u);
}

void partial_cuda(const Tensor& u, int64_t num_views, const Tensor& z, const Tensor& inv_norm, const Tensor& sums) {
  run_cuda(rows_of(u, num_views, z, inv_norm, sums), u);
}

void finish_cuda(const Tensor& sums, const Tensor& state, int64_t num_views, int64_t rule, bool open_when_low,
                 double beta, double rate, int64_t max_skips, double center_beta, int64_t flag, const Tensor& center,
                 const Tensor& next) {
  const Gate gate = gate_of(rule, open_when_low, beta, rate, max_skips, center_beta, flag);
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  check(upstep::finish_cuda(finish_of(sums, state, num_views, gate, center, next), current_stream(sums)));
}

void backward_cuda(const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_sums, double scale,
                   const Tensor& z, const Tensor& inv_norm, const Tensor& grad_u) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  check(upstep::backward_cuda(backward_of(grad_z, grad_sums, scale, z, inv_norm, grad_u), current_stream(z)));
}

#endif

}  // namespace

#define UPSTEP_GATE "int rule, bool open_when_low, float beta, float rate, int max_skips, float center_beta, int flag"

STABLE_TORCH_LIBRARY(upstep_ops, m) {
  m.def("center_vector(Tensor u, Tensor state, int num_views, " UPSTEP_GATE ", Tensor(a!) z, Tensor(b!) inv_norm, "
        "Tensor(c!) sums, Tensor(d!) center, Tensor(e!) next_state) -> ()");
  m.def("center_vector_partial(Tensor u, int num_views, Tensor(a!) z, Tensor(b!) inv_norm, Tensor(c!) sums) -> ()");
  m.def("center_vector_finish(Tensor sums, Tensor state, int num_views, " UPSTEP_GATE ", Tensor(a!) center, "
        "Tensor(b!) next_state) -> ()");
  m.def("center_vector_backward(Tensor? grad_z, Tensor? grad_sums, float scale, Tensor z, Tensor inv_norm, "
        "Tensor(a!) grad_u) -> ()");
  m.def("views(Tensor pixels, Tensor places, Tensor boxes, Tensor factors, Tensor mean, Tensor std, int height, "
        "int width, bool cubic, int half_y, int half_x, int patch, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(upstep_ops, CPU, m) {
  m.impl("center_vector", TORCH_BOX(&forward_cpu));
  m.impl("center_vector_partial", TORCH_BOX(&partial_cpu));
  m.impl("center_vector_finish", TORCH_BOX(&finish_cpu));
  m.impl("center_vector_backward", TORCH_BOX(&backward_cpu));
  m.impl("views", TORCH_BOX(&views_cpu));
}

#ifdef UPSTEP_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(upstep_ops, CUDA, m) {
  m.impl("center_vector", TORCH_BOX(&forward_cuda));
  m.impl("center_vector_partial", TORCH_BOX(&partial_cuda));
  m.impl("center_vector_finish", TORCH_BOX(&finish_cuda));
  m.impl("center_vector_backward", TORCH_BOX(&backward_cuda));
}
#endif
