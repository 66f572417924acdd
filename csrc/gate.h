// The gate: its state, its rule, and the word a host can wait on. Shared by the CPU and the CUDA ops; no torch here.
// kernels/gate.py documents the state's cells and is the reference of `decide`.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define UPSTEP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define UPSTEP_HOST_DEVICE inline
#endif

namespace upstep {

// cells of the state, float64; the running center [d] follows them
enum Cell { kStep, kOpen, kFinite, kMagnitude, kUnbiasedSquare, kReference, kSpread, kDebt, kOpened, kSkips,
            kView1, kView2, kTicket, kHead };

enum Rule { kNone, kPrev, kEma, kQuantile, kViews };

constexpr int kMaxViews = 2;
constexpr double kQuantileStep = 0.5;  // of the spread, a step
constexpr double kCatchUp = 0.05;      // the same for each step that was open too often so far
constexpr double kSpreadBeta = 0.9;

struct Gate {
  int rule;
  bool open_when_low;
  double beta;         // memory of the "ema" reference
  double rate;         // fraction of open steps the "quantile" rule aims at
  int64_t max_skips;   // in a row; the step after them is open
  double center_beta;  // memory of the running center
  int64_t* flag;       // host memory the device can write, or null
};

// what one step measured: |s|, its unbiased square, and |s_v| of each view (the second one 0 if there is one view)
struct Magnitudes {
  double m, unbiased_square, view1, view2;
};

// sequence number << 2 | statistic was finite << 1 | open: one 8-byte store, so a reader never sees half of it
UPSTEP_HOST_DEVICE int64_t flag_word(int64_t sequence, bool is_finite, bool is_open) {
  return sequence << 2 | int64_t{is_finite} << 1 | int64_t{is_open};
}

UPSTEP_HOST_DEVICE bool passes(const Gate& gate, const double* state, const Magnitudes& now) {
  const bool by_views = gate.rule == kViews;
  const double reference = by_views ? now.view2 : state[kReference];
  const double m = by_views ? now.view1 : now.m;
  // a reference that is NaN: nothing but non-finite statistics so far
  if (gate.rule == kNone || reference != reference) return true;
  return gate.open_when_low ? m <= reference : m >= reference;
}

// Writes the head of `next` from the head of `state`; returns the word for the flag. The running center is the caller's.
UPSTEP_HOST_DEVICE int64_t decide(const Gate& gate, const double* state, const Magnitudes& now, double* next) {
  for (int i = 0; i < kHead; ++i) next[i] = state[i];
  const bool is_finite = std::isfinite(now.m) && std::isfinite(now.view1) && std::isfinite(now.view2);
  const bool is_first = state[kStep] == 0, is_due = state[kSkips] >= static_cast<double>(gate.max_skips);
  const bool is_forced = is_first || is_due;
  const bool is_open = is_finite && (is_forced || passes(gate, state, now));
  next[kStep] = state[kStep] + 1;
  next[kOpen] = is_open;
  next[kFinite] = is_finite;
  next[kMagnitude] = now.m;
  next[kUnbiasedSquare] = now.unbiased_square;
  next[kView1] = now.view1;
  next[kView2] = now.view2;
  next[kOpened] = state[kOpened] + is_open;
  next[kSkips] = is_open ? 0 : state[kSkips] + 1;
  next[kTicket] = 0;
  if (is_finite) {
    const double reference = state[kReference];
    if (reference != reference || gate.rule == kPrev) {
      next[kReference] = now.m;
    } else if (gate.rule == kEma) {
      next[kReference] = gate.beta * reference + (1 - gate.beta) * now.m;
    } else if (gate.rule == kQuantile) {
      double spread = state[kSpread], debt = state[kDebt];
      if (state[kFinite] != 0) {
        const double moved = fabs(now.m - state[kMagnitude]);
        spread = spread == 0 ? moved : kSpreadBeta * spread + (1 - kSpreadBeta) * moved;
      }
      if (!is_forced) debt = fmin(fmax(debt + is_open - gate.rate, -1 / kCatchUp), 1 / kCatchUp);
      const double below = gate.open_when_low ? gate.rate : 1 - gate.rate;
      const double owed = kCatchUp * (gate.open_when_low ? debt : -debt);
      next[kReference] = reference + spread * (kQuantileStep * (below - (now.m < reference)) - owed);
      next[kSpread] = spread;
      next[kDebt] = debt;
    }
  }
  return flag_word(static_cast<int64_t>(next[kStep]), is_finite, is_open);
}

// One cell of the running center; a statistic that is not finite leaves it alone, the first finite one is taken whole.
UPSTEP_HOST_DEVICE double moved_center(const Gate& gate, const double* state, const double* next, double running,
                                       double s) {
  if (next[kFinite] == 0) return running;
  if (state[kReference] != state[kReference]) return s;
  return gate.center_beta * running + (1 - gate.center_beta) * s;
}

// 1 / |u| from |u|^2: a zero row has no direction (z = 0, no gradient), an infinite one none either (NaN)
UPSTEP_HOST_DEVICE double inverse_norm(double square) {
  return square == 0 ? 0 : std::isfinite(square) ? 1 / sqrt(square) : NAN;
}

// B |s|^2 - mean |z_bar|^2 over B - 1 (METHODS 1.2); NaN for one image
UPSTEP_HOST_DEVICE double unbiased_square(double m, double mean_square, double num_images) {
  return num_images > 1 ? (num_images * m * m - mean_square) / (num_images - 1) : NAN;
}

}  // namespace upstep
