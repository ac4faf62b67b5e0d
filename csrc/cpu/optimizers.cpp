// The optimizer steps on the CPU: which loop for which dtypes, and who runs which chunk.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "common.h"
#include "optimizer_kernels.h"
#include "optimizer_ops.h"

namespace ewc {
namespace {

// One dtype of arithmetic: the loop, what it is given for each tensor, and whether tensors need no conversion.
template <typename Step, typename M>
struct Plan {
  StepFn<Step, M> block = nullptr;      // with the penalty
  StepFn<Step, M> unpenalised = nullptr;
  bool direct = false;
  std::vector<Step> steps;             // of each tensor; so are the others
  std::vector<double> lrs;
  std::vector<uint32_t> numbers;  // which step it is, for stochastic rounding
};

// A block's operands where they are, or widened into scratch that stays in the cache.
template <typename M>
struct Scratch {
  alignas(64) M lists[kMaxLists + 2][kBlock + 64 / sizeof(M)];  // apart, or all would fall into the same lines of L1
};

template <typename M, typename Step>
void run_steps(const StepCall& call, const Plan<Step, M>& plan) {
  const Quadratic& q = call.q;
  const auto& entries = call.table.entries;
  const double ewc_lambda = q.present() ? read(*q.ewc_lambda) : 0.0, delta = q.present() ? read(*q.delta) : 0.0;
  const bool steps = read(call.found_inf, 0, 0.0) == 0.0;
  const bool unscales = steps && call.grad_scale.has_value();
  const double unscale = unscales ? 1.0 / read(*call.grad_scale) : 1.0;
  Chunks chunks(entries);

  // Of each list: its dtype, and how it is converted.
  struct ListPlan {
    bool present = false, written = false, stochastic = false;
    int64_t size = 0;
    ConvertFn widen = nullptr, narrow = nullptr;
    ScaleFn scale = nullptr;
  };
  ListPlan lists[kMaxLists];
  for (size_t l = 0; l < call.lists.all.size(); ++l) {
    if (!call.has(l)) continue;
    const at::ScalarType dtype = call.dtype(l);
    lists[l] = {true,
                call.lists.all[l].written && l != 1,
                call.seed >= 0 && dtype == at::kBFloat16,
                static_cast<int64_t>(c10::elementSize(dtype)),
                widener<M>(dtype),
                narrower<M>(dtype),
                scaler(dtype)};
  }
  const at::ScalarType p_type = chunks.tensors > 0 ? call.dtype(0) : at::kFloat;
  const at::ScalarType a_type = q.present() ? q.anchor->scalar_type() : at::kFloat;
  const at::ScalarType f_type = q.present() ? q.fisher->scalar_type() : at::kFloat;
  const int64_t a_size = c10::elementSize(a_type), f_size = c10::elementSize(f_type);
  const void* anchor = q.present() ? q.anchor->const_data_ptr() : nullptr;
  const void* fisher = q.present() ? q.fisher->const_data_ptr() : nullptr;
  const ConvertFn widen_a = widener<M>(a_type), widen_f = widener<M>(f_type);

  at::parallel_for(0, chunks.count, chunks.grain, [&](int64_t begin, int64_t end) {
    Scratch<M> scratch;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t t = tensor_of_chunk(chunks.first.data(), chunks.tensors, c);
      const StepEntry& entry = entries[t];
      const bool is_protected = entry.offset >= 0, acts = is_protected && ewc_lambda != 0.0;
      const double factor = ewc_lambda * read(q.scale, t, 1.0);
      const Pull<M> pull{static_cast<M>(delta), static_cast<M>(factor), static_cast<M>(plan.lrs[t])};
      const int64_t start = (c - chunks.first[t]) * kChunk, stop = std::min(start + kChunk, entry.numel);
      for (int64_t i = start; i < stop; i += kBlock) {
        const int64_t size = std::min(kBlock, stop - i);
        void* at[kMaxLists];
        for (int l = 0; l < kMaxLists; ++l) at[l] = advance(entry.data[l], i * lists[l].size);
        const void* a = is_protected ? advance(anchor, (entry.offset + i) * a_size) : nullptr;
        const void* f = is_protected ? advance(fisher, (entry.offset + i) * f_size) : nullptr;
        double* sums = &chunks.slots[2 * c];
        const auto read_value = [&] { penalty_sums(p_type, a_type, f_type, at[0], a, f, size, delta, sums); };
        // Where the penalty does not act its value is read beside the step: 0 times what is read might be NaN.
        if (is_protected && (!steps || (!acts && call.coupling == Coupling::kCoupled))) read_value();
        if (!steps) continue;
        if (unscales) lists[1].scale(at[1], size, unscale);
        const auto block = acts ? plan.block : plan.unpenalised;
        double none[2] = {0, 0};
        if (block != nullptr) {
          if (plan.direct) {
            block(at, a, f, size, plan.steps[t], pull, acts ? sums : none);
          } else {
            void* wide[kMaxLists];
            for (int l = 0; l < kMaxLists; ++l) {
              wide[l] = lists[l].present ? scratch.lists[l] : nullptr;
              if (lists[l].present) lists[l].widen(at[l], wide[l], size);
            }
            if (acts) {
              widen_a(a, scratch.lists[kMaxLists], size);
              widen_f(f, scratch.lists[kMaxLists + 1], size);
            }
            block(wide, scratch.lists[kMaxLists], scratch.lists[kMaxLists + 1], size, plan.steps[t], pull,
                  acts ? sums : none);
            for (int l = 0; l < kMaxLists; ++l) {
              if (!lists[l].written) continue;
              if constexpr (std::is_same_v<M, float>) {
                if (lists[l].stochastic) {
                  const uint32_t key = rounding_key(static_cast<uint32_t>(call.seed), plan.numbers[t],
                                                    static_cast<uint32_t>(call.ordinals[t]), static_cast<uint32_t>(l));
                  narrow_stochastic(static_cast<const float*>(wide[l]), static_cast<bf16*>(at[l]), size, key,
                                    static_cast<uint64_t>(i));
                  continue;
                }
              }
              lists[l].narrow(wide[l], at[l], size);
            }
          }
        }
        if (is_protected && !acts && call.coupling == Coupling::kProximal) read_value();
      }
    }
  });

  std::vector<double> weighted, squared;
  chunks.add_up(weighted, squared);
  fill_result(call.result, weighted, squared, ewc_lambda, delta, q.scale, q.constant);
}

// Whether the loops without conversions fit: fp32 throughout, but for a bf16 Fisher.
bool is_fp32(const StepCall& call) {
  for (size_t l = 0; l < call.lists.all.size(); ++l) {
    if (call.has(l) && call.dtype(l) != at::kFloat) return false;
  }
  return !call.q.present() || call.q.anchor->scalar_type() == at::kFloat;
}

bool has_bf16_fisher(const StepCall& call) { return call.q.present() && call.q.fisher->scalar_type() == at::kBFloat16; }
bool has_fp32_fisher(const StepCall& call) { return !call.q.present() || call.q.fisher->scalar_type() == at::kFloat; }
bool is_fp64(const StepCall& call) { return call.has(0) && call.dtype(0) == at::kDouble; }

template <bool amsgrad, typename M, typename F>
StepFn<AdamWStep<M>, M> adamw_block_of(Coupling coupling) {
  return coupling == Coupling::kProximal ? adamw_block<Coupling::kProximal, amsgrad, M, F>
                                         : adamw_block<Coupling::kCoupled, amsgrad, M, F>;
}

template <typename M>
Plan<AdamWStep<M>, M> adamw_plan(const StepCall& call) {
  const bool amsgrad = call.has(4);
  Plan<AdamWStep<M>, M> plan;
  plan.block = amsgrad ? adamw_block_of<true, M, M>(call.coupling) : adamw_block_of<false, M, M>(call.coupling);
  plan.unpenalised = amsgrad ? adamw_block<Coupling::kNone, true, M, M> : adamw_block<Coupling::kNone, false, M, M>;
  if constexpr (std::is_same_v<M, float>) {
    plan.direct = is_fp32(call) && (has_fp32_fisher(call) || (has_bf16_fisher(call) && !amsgrad));
    if (plan.direct && has_bf16_fisher(call)) plan.block = adamw_block_of<false, float, bf16>(call.coupling);
  }
  return plan;
}

template <Coupling coupling, bool decays, typename M, typename F>
StepFn<SgdStep<M>, M> sgd_block_of(Momentum kind) {
  switch (kind) {
    case Momentum::kPlain: return sgd_block<coupling, Momentum::kPlain, decays, M, F>;
    case Momentum::kNesterov: return sgd_block<coupling, Momentum::kNesterov, decays, M, F>;
    default: return sgd_block<coupling, Momentum::kNone, decays, M, F>;
  }
}

template <Coupling coupling, typename M, typename F>
StepFn<SgdStep<M>, M> sgd_block_of(Momentum kind, bool decays) {
  return decays ? sgd_block_of<coupling, true, M, F>(kind) : sgd_block_of<coupling, false, M, F>(kind);
}

template <typename M, typename F>
StepFn<SgdStep<M>, M> sgd_block_of(Momentum kind, bool decays, Coupling coupling) {
  return coupling == Coupling::kProximal ? sgd_block_of<Coupling::kProximal, M, F>(kind, decays)
                                         : sgd_block_of<Coupling::kCoupled, M, F>(kind, decays);
}

template <typename M, typename F>
StepFn<MetricStep<M>, M> proximal_block_of(Metric kind) {
  switch (kind) {
    case Metric::kLinear: return proximal_block<Metric::kLinear, M, F>;
    case Metric::kRoot: return proximal_block<Metric::kRoot, M, F>;
    default: return proximal_block<Metric::kConstant, M, F>;
  }
}

struct Cpu {
  static double lr_of(const StepCall& call, double lr) { return call.lr.has_value() ? read(*call.lr) : lr; }

  static void adamw(const StepCall& call, at::TensorList steps, AdamWOptions options) {
    options.lr = lr_of(call, options.lr);
    is_fp64(call) ? adamw_as<double>(call, steps, options) : adamw_as<float>(call, steps, options);
  }

  static void sgd(const StepCall& call, SgdOptions options, bool first) {
    options.lr = lr_of(call, options.lr);
    is_fp64(call) ? sgd_as<double>(call, options, first) : sgd_as<float>(call, options, first);
  }

  static void proximal(const StepCall& call, const at::Tensor& rates, bool root) {
    is_fp64(call) ? proximal_as<double>(call, rates, root) : proximal_as<float>(call, rates, root);
  }

 private:
  template <typename M>
  static void adamw_as(const StepCall& call, at::TensorList steps, const AdamWOptions& options) {
    auto plan = adamw_plan<M>(call);
    plan.steps.reserve(steps.size());
    for (const at::Tensor& step : steps) {
      plan.steps.push_back(adamw_step<M>(options, read(step)));
      plan.numbers.push_back(static_cast<uint32_t>(read(step)));
    }
    plan.lrs.assign(steps.size(), options.lr);
    run_steps<M>(call, plan);
  }

  template <typename M>
  static void sgd_as(const StepCall& call, const SgdOptions& options, bool first) {
    const Momentum kind = options.momentum == 0.0 ? Momentum::kNone
                          : options.nesterov      ? Momentum::kNesterov
                                                  : Momentum::kPlain;
    Plan<SgdStep<M>, M> plan;
    const bool decays = options.weight_decay != 0.0;
    plan.block = sgd_block_of<M, M>(kind, decays, call.coupling);
    plan.unpenalised = sgd_block_of<Coupling::kNone, M, M>(kind, decays);
    if constexpr (std::is_same_v<M, float>) {
      plan.direct = is_fp32(call) && (has_fp32_fisher(call) || has_bf16_fisher(call));
      if (plan.direct && has_bf16_fisher(call)) {
        plan.block = sgd_block_of<float, bf16>(kind, decays, call.coupling);
      }
    }
    plan.steps.assign(call.table.entries.size(), sgd_step<M>(options, first));
    plan.lrs.assign(call.table.entries.size(), options.lr);
    run_steps<M>(call, plan);
  }

  // rates: learning rate, and factor, inner and eps of the metric.
  template <typename M>
  static void proximal_as(const StepCall& call, const at::Tensor& rates, bool root) {
    const Metric kind = !call.has(1) ? Metric::kConstant : root ? Metric::kRoot : Metric::kLinear;
    Plan<MetricStep<M>, M> plan;
    plan.block = proximal_block_of<M, M>(kind);
    if constexpr (std::is_same_v<M, float>) {
      plan.direct = is_fp32(call) && (has_fp32_fisher(call) || has_bf16_fisher(call));
      if (plan.direct && has_bf16_fisher(call)) plan.block = proximal_block_of<float, bf16>(kind);
    }
    const double* rate = rates.const_data_ptr<double>();
    for (size_t t = 0; t < call.table.entries.size(); ++t, rate += 4) {
      plan.steps.push_back({static_cast<M>(rate[1]), static_cast<M>(rate[2]), static_cast<M>(rate[3])});
      plan.lrs.push_back(rate[0]);
    }
    run_steps<M>(call, plan);
  }
};

}  // namespace
}  // namespace ewc

TORCH_LIBRARY_IMPL(ewc_fast, CPU, m) {
  m.impl("adamw_", ewc::StepOps<ewc::Cpu>::adamw_);
  m.impl("sgd_", ewc::StepOps<ewc::Cpu>::sgd_);
  m.impl("proximal_", ewc::StepOps<ewc::Cpu>::proximal_);
}
