// The registered ops of a block's passes on a CPU (block_cpu.h), on torch's stable ABI: checks, and the choice of the
// vectors that this processor has. Callers allocate.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <optional>

#include "block_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using upstep::Real;

struct Passes {
  void (*norm)(const upstep::NormCall&, int64_t, int64_t);
  void (*norm_backward)(const upstep::NormBackwardCall&, int64_t, int64_t);
  void (*gelu)(const upstep::GeluCall&, int64_t, int64_t);
  void (*gelu_backward)(const upstep::GeluBackwardCall&, int64_t, int64_t);
  void (*attention)(const upstep::AttentionCall&, int64_t, int64_t);
  void (*attention_backward)(const upstep::AttentionCall&, int64_t, int64_t);
  void (*adapter)(const upstep::AdapterCall&, int64_t, int64_t);
};

#define UPSTEP_PASSES(capability)                                                                            \
  Passes {                                                                                                   \
    upstep::capability::norm, upstep::capability::norm_backward, upstep::capability::gelu,                   \
        upstep::capability::gelu_backward, upstep::capability::attention, upstep::capability::attention_backward, \
        upstep::capability::adapter                                                                          \
  }

// as wide as the processor has them, or as torch is told by ATEN_CPU_CAPABILITY (default, avx2, avx512)
Passes chosen() {
#ifdef UPSTEP_X86
  const char* said = std::getenv("ATEN_CPU_CAPABILITY");
  const bool is_avx2 = said != nullptr && std::strcmp(said, "avx2") == 0;
  const bool is_free = !is_avx2 && (said == nullptr || std::strcmp(said, "default") != 0);  // as torch reads it
  if (is_free && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#ifdef UPSTEP_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) return UPSTEP_PASSES(avx512_bf16);
#endif
    return UPSTEP_PASSES(avx512);
  }
  if ((is_free || is_avx2) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return UPSTEP_PASSES(avx2);
#endif
  return UPSTEP_PASSES(baseline);
}

const Passes& passes() {
  static const Passes found = chosen();
  return found;
}

Real real_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "upstep_ops: a block's passes take float32 or bfloat16");
  return type == ScalarType::Float ? Real::kFloat : Real::kBFloat16;
}

// the pointer of a dense tensor of `count` cells: what stands between a wrong call and wrong memory
void* cells(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "upstep_ops: wrong dtype of ", name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count, "upstep_ops: ", name, " must be contiguous, of ", count,
                  " cells, got ", t.numel());
  return t.data_ptr();
}

void* cells(const std::optional<Tensor>& t, ScalarType type, int64_t count, const char* name) {
  return t ? cells(*t, type, count, name) : nullptr;
}

float* floats(const Tensor& t, int64_t count, const char* name) {
  return static_cast<float*>(cells(t, ScalarType::Float, count, name));
}

template <class Call> void run(void (*pass)(const Call&, int64_t, int64_t), const Call& call, int64_t items, int64_t grain) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { pass(call, begin, end); });
}

constexpr int64_t kGrain = 16384;  // values that one thread takes at least

int64_t rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "upstep_ops: rows must have a width");
  return x.numel() / x.size(-1);
}

void norm(const Tensor& x, const std::optional<Tensor>& delta, double eps, const std::optional<Tensor>& total,
          const Tensor& x_hat, const Tensor& rstd) {
  const int64_t rows = rows_of(x), size = x.numel();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(delta.has_value() == total.has_value(), "upstep_ops: total goes with delta");
  upstep::NormCall call{};
  call.real = real_of(x), call.rows = rows, call.k = x.size(-1), call.eps = static_cast<float>(eps);
  call.x = cells(x, type, size, "x"), call.delta = cells(delta, type, size, "delta");
  call.total = cells(total, type, size, "total"), call.x_hat = cells(x_hat, type, size, "x_hat");
  call.rstd = floats(rstd, rows, "rstd");
  run(passes().norm, call, rows, 1 + kGrain / call.k);
}

void norm_backward(const Tensor& d, const Tensor& x_hat, const Tensor& rstd, const std::optional<Tensor>& skip,
                   const Tensor& dx) {
  const int64_t rows = rows_of(d), size = d.numel();
  const ScalarType type = d.scalar_type();
  upstep::NormBackwardCall call{};
  call.real = real_of(d), call.rows = rows, call.k = d.size(-1);
  call.d = cells(d, type, size, "d"), call.x_hat = cells(x_hat, type, size, "x_hat");
  call.skip = cells(skip, type, size, "skip"), call.rstd = floats(rstd, rows, "rstd");
  call.dx = cells(dx, type, size, "dx");
  run(passes().norm_backward, call, rows, 1 + kGrain / call.k);
}

void gelu(const Tensor& u, int64_t kind, const Tensor& g, const std::optional<Tensor>& derivative) {
  const ScalarType type = u.scalar_type();
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "upstep_ops: kind of GELU must be 0 to 2");
  upstep::GeluCall call{};
  call.real = real_of(u), call.size = u.numel(), call.kind = static_cast<int>(kind);
  call.u = cells(u, type, call.size, "u"), call.g = cells(g, type, call.size, "g");
  call.as_byte = derivative && derivative->scalar_type() == ScalarType::Byte;
  call.derivative = cells(derivative, call.as_byte ? ScalarType::Byte : type, call.size, "derivative");
  run(passes().gelu, call, call.size, kGrain);
}

void gelu_backward(const Tensor& dg, const Tensor& derivative, const Tensor& du) {
  upstep::GeluBackwardCall call{};
  call.real = real_of(dg), call.size = dg.numel();
  call.dg = cells(dg, dg.scalar_type(), call.size, "dg"), call.du = cells(du, dg.scalar_type(), call.size, "du");
  call.derivative = static_cast<const uint8_t*>(cells(derivative, ScalarType::Byte, call.size, "derivative"));
  run(passes().gelu_backward, call, call.size, kGrain);
}

upstep::AttentionCall attention_of(const Tensor& qkv, double scale, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "upstep_ops: qkv must be [B, T, 3, H, d]");
  upstep::AttentionCall call{};
  call.real = real_of(qkv), call.scale = static_cast<float>(scale);
  call.batch = qkv.size(0), call.tokens = qkv.size(1), call.heads = qkv.size(3), call.width = qkv.size(4);
  const int64_t size = qkv.numel(), type_size = size / 3;
  call.qkv = cells(qkv, qkv.scalar_type(), size, "qkv"), call.out = cells(out, qkv.scalar_type(), type_size, "out");
  call.lse = floats(lse, call.batch * call.heads * call.tokens, "lse");
  return call;
}

void attention(const Tensor& qkv, double scale, const Tensor& out, const Tensor& lse) {
  const upstep::AttentionCall call = attention_of(qkv, scale, out, lse);
  run(passes().attention, call, call.batch * call.heads, 1);
}

void attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, double scale,
                        const Tensor& dqkv) {
  upstep::AttentionCall call = attention_of(qkv, scale, out, lse);
  call.grad = cells(grad, qkv.scalar_type(), out.numel(), "grad");
  call.dqkv = cells(dqkv, qkv.scalar_type(), qkv.numel(), "dqkv");
  run(passes().attention_backward, call, call.batch * call.heads, 1);
}

// d_a [R, K] and d_shift [R] and d_b [P, n, r] of each chunk of rows, then all added in order into row 0 of `partial`
void adapter_gradients(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& shift, const Tensor& b,
                       const Tensor& first, const Tensor& partial) {
  STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2 && a.dim() == 2 && b.dim() == 3 && partial.dim() == 2,
                  "upstep_ops: wrong number of dimensions");
  const ScalarType type = dy.scalar_type();
  upstep::AdapterCall call{};
  call.real = real_of(dy), call.rows = dy.size(0), call.width = dy.size(1), call.k = x.size(1);
  call.parts = b.size(0), call.n = b.size(1), call.r = b.size(2), call.chunks = partial.size(0);
  STD_TORCH_CHECK(call.chunks >= 1, "upstep_ops: no chunk");
  const int64_t ranks = call.parts * call.r, size = ranks * (call.k + 1) + b.numel();
  call.dy = cells(dy, type, dy.numel(), "dy"), call.x = cells(x, type, call.rows * call.k, "x");
  call.a = cells(a, type, ranks * call.k, "a"), call.shift = cells(shift, type, ranks, "shift");
  call.b = cells(b, type, b.numel(), "b");
  call.first = static_cast<const int64_t*>(cells(first, ScalarType::Long, call.parts, "first"));
  for (int64_t part = 0; part < call.parts; ++part)
    STD_TORCH_CHECK(call.first[part] >= 0 && call.first[part] + call.n <= call.width, "upstep_ops: a part outside of dy");
  call.partial = floats(partial, call.chunks * size, "partial");
  run(passes().adapter, call, call.chunks, 1);
  for (int64_t chunk = 1; chunk < call.chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) call.partial[i] += call.partial[chunk * size + i];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(upstep_ops, m) {
  m.def("block_norm(Tensor x, Tensor? delta, float eps, Tensor(a!)? total, Tensor(b!) x_hat, "
        "Tensor(c!) rstd) -> ()");
  m.def("block_norm_backward(Tensor d, Tensor x_hat, Tensor rstd, Tensor? skip, Tensor(a!) dx) -> ()");
  m.def("block_gelu(Tensor u, int kind, Tensor(a!) g, Tensor(b!)? derivative) -> ()");
  m.def("block_gelu_backward(Tensor dg, Tensor derivative, Tensor(a!) du) -> ()");
  m.def("block_attention(Tensor qkv, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("block_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale, Tensor(a!) dqkv) -> ()");
  m.def("block_adapter_gradients(Tensor dy, Tensor x, Tensor a, Tensor shift, Tensor b, Tensor first, "
        "Tensor(a!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(upstep_ops, CPU, m) {
  m.impl("block_norm", TORCH_BOX(&norm));
  m.impl("block_norm_backward", TORCH_BOX(&norm_backward));
  m.impl("block_gelu", TORCH_BOX(&gelu));
  m.impl("block_gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("block_attention", TORCH_BOX(&attention));
  m.impl("block_attention_backward", TORCH_BOX(&attention_backward));
  m.impl("block_adapter_gradients", TORCH_BOX(&adapter_gradients));
}
