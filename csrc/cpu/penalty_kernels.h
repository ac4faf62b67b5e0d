// The CPU kernels' loops: plain C++ that the compiler vectorises. No torch headers.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "clones.h"
#include "elementwise.h"
#include "sweep.h"

namespace ewc {
namespace {

// At most kBlock elements. sums: F d^2 and d^2.
template <Mode mode, typename P, typename G, typename A, typename F>
EWC_CLONES void penalty_block(const void* p_, void* g_, const void* a_, const void* f_, int64_t n, double delta_,
                              double factor_, double* sums) {
  using M = typename MathOf<P>::type;
  const P* __restrict__ p = static_cast<const P*>(p_);
  const A* __restrict__ a = static_cast<const A*>(a_);
  const F* __restrict__ f = static_cast<const F*>(f_);
  G* __restrict__ g = static_cast<G*>(g_);
  const M delta = static_cast<M>(delta_), factor = static_cast<M>(factor_);
  LaneSums<M> lanes;
  const auto ask = [&](int64_t i) EWC_INLINE {
    ask_for(i, p, a, f);
    if constexpr (mode != Mode::kValue) ask_for(i, g);
  };
  sweep(n, ask, [&](int64_t i, int64_t lane) EWC_INLINE {
    const auto term = penalty_term(load_as<M>(p[i]), load_as<M>(a[i]), load_as<M>(f[i]), delta);
    lanes.weighted[lane] += term.weighted;
    lanes.squared[lane] += term.squared;
    if constexpr (mode == Mode::kWrite) g[i] = Store<G>::from(factor * term.gradient);
    if constexpr (mode == Mode::kAccumulate) g[i] = Store<G>::from(load_as<M>(g[i]) + factor * term.gradient);
  });
  lanes.add_to(sums);
}

// Combinations of dtypes without a loop of their own are widened block by block into scratch that stays in L1.
template <typename S, typename M>
EWC_CLONES void widen(const void* from_, void* to_, int64_t n) {
  const S* __restrict__ from = static_cast<const S*>(from_);
  M* __restrict__ to = static_cast<M*>(to_);
  sweep(n, [&](int64_t i) EWC_INLINE { ask_for(i, from); },
        [&](int64_t i, int64_t) EWC_INLINE { to[i] = load_as<M>(from[i]); });
}

template <typename S, typename M>
EWC_CLONES void narrow(const void* from_, void* to_, int64_t n) {
  const M* __restrict__ from = static_cast<const M*>(from_);
  S* __restrict__ to = static_cast<S*>(to_);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = Store<S>::from(from[i]);
}

template <typename S>
EWC_CLONES void scale_block(void* data_, int64_t n, double factor_) {
  using M = typename MathOf<S>::type;
  S* __restrict__ data = static_cast<S*>(data_);
  const M factor = static_cast<M>(factor_);
  sweep(n, [&](int64_t i) EWC_INLINE { ask_for(i, data); },
        [&](int64_t i, int64_t) EWC_INLINE { data[i] = Store<S>::from(factor * load_as<M>(data[i])); });
}

}  // namespace
}  // namespace ewc
