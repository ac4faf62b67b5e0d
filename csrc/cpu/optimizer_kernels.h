// The optimizer steps' loops: plain C++ that the compiler vectorises. No torch headers.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "clones.h"
#include "elementwise.h"
#include "sweep.h"

namespace ewc {
namespace {

// At most kBlock elements of parameter, gradient and the optimizer's own tensors. sums: F d^2 and d^2. lambda is not 0.
template <typename Step, typename M>
using StepFn = void (*)(void* const* data, const void* a, const void* f, int64_t n, const Step& step,
                        const Pull<M>& pull, double* sums);

template <Coupling coupling, bool amsgrad, typename M, typename F>
EWC_CLONES void adamw_block(void* const* data, const void* a_, const void* f_, int64_t n, const AdamWStep<M>& step,
                            const Pull<M>& pull_, double* sums) {
  M* __restrict__ p = static_cast<M*>(data[0]);
  const M* __restrict__ g = static_cast<const M*>(data[1]);
  M* __restrict__ m = static_cast<M*>(data[2]);
  M* __restrict__ v = static_cast<M*>(data[3]);
  M* __restrict__ x = static_cast<M*>(data[4]);
  const M* __restrict__ a = static_cast<const M*>(a_);
  const F* __restrict__ f = static_cast<const F*>(f_);
  const AdamWStep<M> s = step;
  const Pull<M> pull = pull_;
  LaneSums<M> lanes;
  const auto ask = [&](int64_t i) EWC_INLINE {
    ask_for(i, p, g, m, v);
    if constexpr (amsgrad) ask_for(i, x);
    if constexpr (coupling != Coupling::kNone) ask_for(i, a, f);
  };
  sweep(n, ask, [&](int64_t i, int64_t lane) EWC_INLINE {
    M parameter = p[i], first = m[i], second = v[i], largest = amsgrad ? x[i] : M(0);
    M anchor = 0, fisher = 0;
    if constexpr (coupling != Coupling::kNone) {
      anchor = a[i];
      fisher = load_as<M>(f[i]);
    }
    with_penalty<coupling>(parameter, s.sign * g[i], anchor, fisher, pull, lanes.weighted[lane], lanes.squared[lane],
                           [&](M gradient, M& at) EWC_INLINE {
                             return adamw_update<amsgrad>(s, gradient, at, first, second, largest);
                           });
    p[i] = parameter;
    m[i] = first;
    v[i] = second;
    if constexpr (amsgrad) x[i] = largest;
  });
  lanes.add_to(sums);
}

template <Coupling coupling, Momentum kind, bool decays, typename M, typename F>
EWC_CLONES void sgd_block(void* const* data, const void* a_, const void* f_, int64_t n, const SgdStep<M>& step,
                          const Pull<M>& pull_, double* sums) {
  M* __restrict__ p = static_cast<M*>(data[0]);
  const M* __restrict__ g = static_cast<const M*>(data[1]);
  M* __restrict__ b = static_cast<M*>(data[2]);
  const M* __restrict__ a = static_cast<const M*>(a_);
  const F* __restrict__ f = static_cast<const F*>(f_);
  const SgdStep<M> s = step;
  const Pull<M> pull = pull_;
  LaneSums<M> lanes;
  const auto ask = [&](int64_t i) EWC_INLINE {
    ask_for(i, p, g);
    if constexpr (kind != Momentum::kNone) ask_for(i, b);
    if constexpr (coupling != Coupling::kNone) ask_for(i, a, f);
  };
  sweep(n, ask, [&](int64_t i, int64_t lane) EWC_INLINE {
    M parameter = p[i], buffer = kind == Momentum::kNone ? M(0) : b[i];
    M anchor = 0, fisher = 0;
    if constexpr (coupling != Coupling::kNone) {
      anchor = a[i];
      fisher = load_as<M>(f[i]);
    }
    with_penalty<coupling>(parameter, s.sign * g[i], anchor, fisher, pull, lanes.weighted[lane], lanes.squared[lane],
                           [&](M gradient, M& at) EWC_INLINE {
                             sgd_update<kind, decays>(s, gradient, at, buffer);
                             return s.metric;
                           });
    p[i] = parameter;
    if constexpr (kind != Momentum::kNone) b[i] = buffer;
  });
  lanes.add_to(sums);
}

template <Metric kind, typename M, typename F>
EWC_CLONES void proximal_block(void* const* data, const void* a_, const void* f_, int64_t n, const MetricStep<M>& step,
                               const Pull<M>& pull_, double* sums) {
  M* __restrict__ p = static_cast<M*>(data[0]);
  const M* __restrict__ x = static_cast<const M*>(data[1]);
  const M* __restrict__ a = static_cast<const M*>(a_);
  const F* __restrict__ f = static_cast<const F*>(f_);
  const MetricStep<M> s = step;
  const Pull<M> pull = pull_;
  LaneSums<M> lanes;
  const auto ask = [&](int64_t i) EWC_INLINE {
    ask_for(i, p, a, f);
    if constexpr (kind != Metric::kConstant) ask_for(i, x);
  };
  sweep(n, ask, [&](int64_t i, int64_t lane) EWC_INLINE {
    M parameter = p[i];
    const M metric = metric_of<kind>(s.factor, s.inner, s.eps, kind == Metric::kConstant ? M(0) : x[i]);
    with_penalty<Coupling::kProximal>(parameter, M(0), a[i], load_as<M>(f[i]), pull, lanes.weighted[lane], lanes.squared[lane],
                                      [&](M, M&) EWC_INLINE { return metric; });
    p[i] = parameter;
  });
  lanes.add_to(sums);
}

// Results of a block, rounded stochastically. A block never crosses a multiple of 2^32.
EWC_CLONES void narrow_stochastic(const float* __restrict__ from, bf16* __restrict__ to, int64_t n, uint32_t key,
                                  uint64_t first) {
  const uint32_t low = static_cast<uint32_t>(first), high = high_part(first);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = store_stochastic(from[i], key, low + static_cast<uint32_t>(i), high);
}

}  // namespace
}  // namespace ewc
