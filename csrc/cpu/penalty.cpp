// The penalty ops on the CPU: which loop for which dtypes, and who runs which chunk.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "common.h"
#include "penalty_kernels.h"
#include "penalty_ops.h"
#include "streaming.h"

namespace ewc {
namespace {

// Written gradients of so many bytes, with as much of each operand beside them, have left the caches by the time that
// they are read: they go past them. With less, level 1 as a whole is slower for it (by 25% at 4 MB).
constexpr int64_t kStreamFrom = 32 << 20;

using BlockFn = void (*)(const void*, void*, const void*, const void*, int64_t, double, double, double*);

// What to run for a combination of dtypes: `block` on the tensors themselves, or on scratch filled by the converters.
struct Plan {
  BlockFn block = nullptr;
  bool direct = true;
  ConvertFn widen_p = nullptr, widen_g = nullptr, widen_a = nullptr, widen_f = nullptr, narrow_g = nullptr;
};

template <Mode mode, typename P, typename G, typename A>
BlockFn with_fisher(at::ScalarType fisher) {
  if (fisher == at::kFloat) return penalty_block<mode, P, G, A, float>;
  if (fisher == at::kBFloat16) return penalty_block<mode, P, G, A, bf16>;
  return nullptr;
}

template <Mode mode, typename P, typename G = P>
BlockFn with_state(at::ScalarType anchor, at::ScalarType fisher) {
  if (anchor == at::kFloat) return with_fisher<mode, P, G, float>(fisher);
  if (anchor == at::kBFloat16) return with_fisher<mode, P, G, bf16>(fisher);
  return nullptr;
}

template <Mode mode, typename M>
Plan converting(at::ScalarType param, at::ScalarType grad, at::ScalarType anchor, at::ScalarType fisher) {
  return {penalty_block<mode, M, M, M, M>, false, widener<M>(param), widener<M>(grad), widener<M>(anchor),
          widener<M>(fisher), narrower<M>(grad)};
}

template <Mode mode>
Plan make_plan(at::ScalarType param, at::ScalarType grad, at::ScalarType anchor, at::ScalarType fisher) {
  Plan plan;
  if (param == grad) {
    switch (param) {
      case at::kFloat: plan.block = with_state<mode, float>(anchor, fisher); break;
      case at::kBFloat16: plan.block = with_state<mode, bf16>(anchor, fisher); break;
      case at::kHalf: plan.block = with_state<mode, f16>(anchor, fisher); break;
      default:
        if (anchor == at::kDouble && fisher == at::kDouble) {
          plan.block = penalty_block<mode, double, double, double, double>;
        }
    }
  }
  if constexpr (mode == Mode::kAccumulate) {  // low-precision parameters whose gradients are kept in fp32
    if (grad == at::kFloat && param == at::kBFloat16) plan.block = with_state<mode, bf16, float>(anchor, fisher);
    if (grad == at::kFloat && param == at::kHalf) plan.block = with_state<mode, f16, float>(anchor, fisher);
  }
  if (plan.block != nullptr) return plan;
  return param == at::kDouble ? converting<mode, double>(param, grad, anchor, fisher)
                              : converting<mode, float>(param, grad, anchor, fisher);
}

// stream: written gradients go past the caches.
template <Mode mode>
void run_block(const Plan& plan, const void* p, void* g, const void* a, const void* f, int64_t n, int64_t g_size,
               double delta, double factor, bool stream, double* sums) {
  alignas(64) double scratch[4][kBlock];  // holds every type
  void* out = stream ? static_cast<void*>(scratch[0]) : g;
  if (plan.direct) {
    plan.block(p, out, a, f, n, delta, factor, sums);
  } else {
    plan.widen_p(p, scratch[0], n);
    plan.widen_a(a, scratch[1], n);
    plan.widen_f(f, scratch[2], n);
    if constexpr (mode == Mode::kAccumulate) plan.widen_g(g, scratch[3], n);
    plan.block(scratch[0], scratch[3], scratch[1], scratch[2], n, delta, factor, sums);
    if constexpr (mode != Mode::kValue) plan.narrow_g(scratch[3], out, n);
  }
  if (stream) stream_copy(g, out, n * g_size);
}

struct Cpu {
  template <Mode mode>
  static void run(const PenaltyCall& call);
};

template <Mode mode>
void Cpu::run(const PenaltyCall& call) {
  const at::Tensor &anchor = call.anchor, &fisher = call.fisher;
  const at::ScalarType param = call.param, grad = call.grad;
  const double ewc_lambda = read(call.ewc_lambda), delta = read(call.delta);
  const bool acts = ewc_lambda != 0.0 && read(call.found_inf, 0, 0.0) == 0.0;
  const double loss_scale = read(call.grad_scale, 0, 1.0);
  const auto& entries = call.table.entries;
  Chunks chunks(entries);

  const Plan writing = make_plan<mode>(param, grad, anchor.scalar_type(), fisher.scalar_type());
  const Plan reading = make_plan<Mode::kValue>(param, param, anchor.scalar_type(), fisher.scalar_type());
  const int64_t p_size = c10::elementSize(param), g_size = c10::elementSize(grad);
  const int64_t a_size = anchor.element_size(), f_size = fisher.element_size();
  const void* anchor_data = anchor.const_data_ptr();
  const void* fisher_data = fisher.const_data_ptr();

  const bool stream = mode == Mode::kWrite && kCanStream && chunks.elements * g_size >= kStreamFrom;

  at::parallel_for(0, chunks.count, chunks.grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t t = tensor_of_chunk(chunks.first.data(), chunks.tensors, c);
      const Entry& entry = entries[t];
      const double factor = gradient_factor(ewc_lambda, read(call.scale, t, 1.0), loss_scale, call.maximize);
      const int64_t start = (c - chunks.first[t]) * kChunk, stop = std::min(start + kChunk, entry.numel);
      for (int64_t i = start; i < stop; i += kBlock) {
        const int64_t size = std::min(kBlock, stop - i), at = entry.offset + i;
        const void* p = advance(entry.param, i * p_size);
        const void* a = advance(anchor_data, at * a_size);
        const void* f = advance(fisher_data, at * f_size);
        void* g = advance(entry.grad, i * g_size);
        if (acts) {
          run_block<mode>(writing, p, g, a, f, size, g_size, delta, factor, stream,
                          &chunks.slots[2 * c]);
        } else {  // not with a factor of 0: 0 times infinity is NaN
          run_block<Mode::kValue>(reading, p, nullptr, a, f, size, g_size, delta, 0.0, false,
                                  &chunks.slots[2 * c]);
          if (mode == Mode::kWrite) std::memset(g, 0, size * g_size);
        }
      }
    }
    if (stream) stream_fence();
  });

  std::vector<double> weighted, squared;
  chunks.add_up(weighted, squared);
  fill_result(call.result, weighted, squared, ewc_lambda, delta, call.scale, call.constant);
}

void scale_(at::Tensor buffer, const at::Tensor& factor_) {
  check_scale(buffer, factor_);
  const double factor = read(factor_);
  bump_version(buffer);  // in any case, as on devices where only the kernel knows the factor
  if (factor == 1.0) return;
  const ScaleFn block = scaler(buffer.scalar_type());
  void* data = buffer.mutable_data_ptr();
  const int64_t size = buffer.element_size();
  at::parallel_for(0, buffer.numel(), kChunk, [&](int64_t begin, int64_t end) {
    block(advance(data, begin * size), end - begin, factor);
  });
}

}  // namespace

void penalty_sums(at::ScalarType param, at::ScalarType anchor, at::ScalarType fisher, const void* p, const void* a,
                  const void* f, int64_t n, double delta, double* sums) {
  const Plan plan = make_plan<Mode::kValue>(param, param, anchor, fisher);
  run_block<Mode::kValue>(plan, p, nullptr, a, f, n, 0, delta, 0.0, false, sums);
}

}  // namespace ewc

TORCH_LIBRARY_IMPL(ewc_fast, CPU, m) {
  m.impl("penalty", ewc::PenaltyOps<ewc::Cpu>::penalty);
  m.impl("penalty_grad", ewc::PenaltyOps<ewc::Cpu>::penalty_grad);
  m.impl("penalty_accumulate_", ewc::PenaltyOps<ewc::Cpu>::penalty_accumulate_);
  m.impl("scale_", ewc::scale_);
}
