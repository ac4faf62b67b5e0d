// The kernel of the optimizer steps, its dtypes and its launcher; one .cu per optimizer says what is done with an element.
#pragma once

#include <algorithm>

#include "results.cuh"
#include "steps.h"

namespace ewc {
namespace {

constexpr int kStateLists = 3;  // an optimizer's own

// 72 bytes a tensor, and at most 352 of everything else.
constexpr int kStepsPerLaunch = (kParameterBytes - 352) / 72;

template <typename Call>
struct StepArguments {
  StepLaunch launch;  // `entries` is the host's
  Call call;
  int64_t first_row;  // the launch's first tensor among all
  bool last;          // launch
  TensorTable<kMaxLists, kStepsPerLaunch> table;  // a list that is not there has the parameters' pointers
  const void* steps[kStepsPerLaunch];
  uint32_t ordinals[kStepsPerLaunch];
};

// An optimizer is described by
//
//   Call                    what its launcher is given
//   Step<M>                 what a tensor's step needs
//   kHasGradient, kStates   its lists, at most; kUsualStates: those that are read without rare options
//   kWritesState
//   kStepsAlone             whether parameters without a penalty are written
//   state_lists(call)       how many of kStates there are
//   prepare(...)            thread 0: Shared for a tensor
//   update<coupling>(...)   n elements' step

// What the threads of a block share while they work on a tensor.
template <typename Step, typename M>
struct Shared {
  Step step;
  Pull<M> pull;
  double number;             // of the step that `step` is made for
  uint32_t keys[kMaxLists];  // of stochastic rounding
};

// n elements in the type of the arithmetic.
template <int n, typename M>
struct Elements {
  M parameter[n], gradient[n], state[kStateLists][n], anchor[n], fisher[n];
};

// How a kernel for these storage types moves: kVector elements, so that the narrowest takes 16 bytes, kUnroll times. In a
// multiprocessor there are on the way, at most, in KB (see kBytesInFlight; tests/native/check_cuda.py asserts it):
//
//   parameter, gradient   state   anchor   Fisher   AdamW     SGD   proximal
//   fp32                  fp32    fp32     fp32        72      60         96
//   fp32                  fp32    fp32     bf16        66      72         56
//   bf16                  fp32    bf16     bf16        64      48         40
//   bf16                  fp32    bf16     fp32        72      56         48
//   bf16                  bf16    bf16     bf16        48      40         64
//
// Where that would be more than kMostBytes a turn, which do not fit into registers, kVector is half. 8 elements at a time
// take more than the 80 registers that 3 blocks leave.
constexpr int kMostBytes = 144;
template <typename Optimizer, typename M, typename P, typename G, typename S, typename A, typename F>
struct StepMoves {
  static constexpr int kNarrowest = static_cast<int>(std::min({sizeof(P), sizeof(G), sizeof(S), sizeof(A), sizeof(F)}));
  static constexpr int kOfElement = static_cast<int>(sizeof(P) + (Optimizer::kHasGradient ? sizeof(G) : 0) +
                                                     Optimizer::kUsualStates * sizeof(S) + sizeof(A) + sizeof(F));
  static constexpr int kVector = 16 / kNarrowest / (16 / kNarrowest * kOfElement > kMostBytes ? 2 : 1);
  static constexpr int kBytes = kVector * kOfElement;
  static constexpr int kUnroll = kBytesInFlight / kBytes > 1 ? kBytesInFlight / kBytes : 1;
  static constexpr int kBlocks = kVector > 4 ? kBlocksPerMultiprocessorWide : kBlocksPerMultiprocessor;
};
template <typename Optimizer, typename M>
struct StepMoves<Optimizer, M, Any, Any, Any, Any, Any> {
  static constexpr int kVector = Optimizer::kStates > 1 ? 2 : 16 / sizeof(M);  // more would spill
  static constexpr int kUnroll = 1;
  static constexpr int kBlocks = kBlocksPerMultiprocessorWide;
};

template <typename S>
constexpr bool kMayBeBf16 = std::is_same_v<S, bf16> || std::is_same_v<S, Any>;

// A chunk of a tensor in all lists. What is not there is not touched.
template <typename Optimizer, typename M, typename P, typename G, typename S, typename A, typename F>
struct StepChunk {
  using Step = typename Optimizer::template Step<M>;

  Stream<P, M, Cache::kKeep> p;
  Stream<G, M, Cache::kKeep> g;
  Stream<S, M, Cache::kStream> s[kStateLists];
  Stream<A, M, Cache::kStream> a;
  Stream<F, M, Cache::kStream> f;
  const typename Optimizer::Call& call;
  const Shared<Step, M>& shared;
  Coupling coupling;  // kNone where the penalty does not act
  int states;
  bool unscales;
  M unscale;
  bool rounds_p, rounds_s;  // stochastically
  uint64_t start;           // the chunk's first element in the tensor

  EWC_DEVICE bool reads(int state) const { return state < Optimizer::kStates && state < states; }

  EWC_DEVICE bool aligned() const {
    bool aligned = p.aligned();
    if (Optimizer::kHasGradient) aligned &= g.aligned();
#pragma unroll
    for (int k = 0; k < kStateLists; ++k) aligned &= !reads(k) || s[k].aligned();
    return aligned && (coupling == Coupling::kNone || (a.aligned() && f.aligned()));
  }

  // n elements from the i-th on; the gradients are divided by the GradScaler's scale first, in memory too.
  template <int n, typename StoreGradient>
  EWC_DEVICE void update(Elements<n, M>& x, int i, M& weighted, M& squared, StoreGradient store_gradient) const {
    if (Optimizer::kHasGradient && unscales) {
#pragma unroll
      for (int j = 0; j < n; ++j) x.gradient[j] = g.rounded(unscale * x.gradient[j]);
      store_gradient();
    }
    switch (coupling) {  // uniform
      case Coupling::kCoupled:
        Optimizer::template update<Coupling::kCoupled>(call, shared.step, shared.pull, x, weighted, squared);
        break;
      case Coupling::kProximal:
        Optimizer::template update<Coupling::kProximal>(call, shared.step, shared.pull, x, weighted, squared);
        break;
      case Coupling::kNone:
        Optimizer::template update<Coupling::kNone>(call, shared.step, shared.pull, x, weighted, squared);
        break;
    }
    if constexpr (Optimizer::kRounds && std::is_same_v<M, float>) {
      const uint32_t low = static_cast<uint32_t>(start) + static_cast<uint32_t>(i), high = high_part(start);
      // What the store then rounds is a bf16 already.
      const auto round = [&](M(&of)[n], int list) {
#pragma unroll
        for (int j = 0; j < n; ++j) of[j] = load_as<M>(store_stochastic(of[j], shared.keys[list], low + j, high));
      };
      if (kMayBeBf16<P> && rounds_p) round(x.parameter, 0);
#pragma unroll
      for (int k = 0; k < Optimizer::kStates; ++k) {
        if (kMayBeBf16<S> && rounds_s && reads(k)) round(x.state[k], 2 + k);
      }
    }
  }

  template <int kVector, int kUnroll>
  EWC_DEVICE void vectors(int whole, M& weighted, M& squared) const {
    constexpr int kStride = kThreads * kVector;
    const bool penalised = coupling != Coupling::kNone;
#pragma unroll 1
    for (int i = threadIdx.x * kVector; i < whole; i += kUnroll * kStride) {
      typename decltype(p)::template Raw<kVector> raw_p[kUnroll];
      typename decltype(g)::template Raw<kVector> raw_g[kUnroll];
      typename Stream<S, M, Cache::kStream>::template Raw<kVector> raw_s[kUnroll][kStateLists];
      typename decltype(a)::template Raw<kVector> raw_a[kUnroll];
      typename decltype(f)::template Raw<kVector> raw_f[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * kStride;
        if (u == 0 || at < whole) {
          p.template load<true>(raw_p[u], at);
          if (Optimizer::kHasGradient) g.template load<true>(raw_g[u], at);
#pragma unroll
          for (int k = 0; k < Optimizer::kStates; ++k) {
            if (reads(k)) s[k].template load<true>(raw_s[u][k], at);
          }
          if (penalised) {
            a.template load<true>(raw_a[u], at);
            f.template load<true>(raw_f[u], at);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * kStride;
        if (u == 0 || at < whole) {
          Elements<kVector, M> x{};
          p.unpack(raw_p[u], x.parameter);
          if (Optimizer::kHasGradient) g.unpack(raw_g[u], x.gradient);
#pragma unroll
          for (int k = 0; k < Optimizer::kStates; ++k) {
            if (reads(k)) s[k].unpack(raw_s[u][k], x.state[k]);
          }
          if (penalised) {
            a.unpack(raw_a[u], x.anchor);
            f.unpack(raw_f[u], x.fisher);
          }
          update(x, at, weighted, squared, [&] { g.template store<true>(x.gradient, at); });
          p.template store<true>(x.parameter, at);
#pragma unroll
          for (int k = 0; Optimizer::kWritesState && k < Optimizer::kStates; ++k) {
            if (reads(k)) s[k].template store<true>(x.state[k], at);
          }
        }
      }
    }
  }

  EWC_DEVICE void element(int i, M& weighted, M& squared) const {
    Elements<1, M> x{};
    x.parameter[0] = p.get(i);
    if (Optimizer::kHasGradient) x.gradient[0] = g.get(i);
#pragma unroll
    for (int k = 0; k < Optimizer::kStates; ++k) {
      if (reads(k)) x.state[k][0] = s[k].get(i);
    }
    if (coupling != Coupling::kNone) {
      x.anchor[0] = a.get(i);
      x.fisher[0] = f.get(i);
    }
    update(x, i, weighted, squared, [&] { g.put(x.gradient[0], i); });
    p.put(x.parameter[0], i);
#pragma unroll
    for (int k = 0; Optimizer::kWritesState && k < Optimizer::kStates; ++k) {
      if (reads(k)) s[k].put(x.state[k][0], i);
    }
  }

  // At most kChunk elements. Which ones a thread takes, and in what order, does not depend on the alignment, and so
  // neither do the sums.
  template <int kVector, int kUnroll>
  EWC_DEVICE void step(int n, M& weighted, M& squared) const {
    const int whole = n / kVector * kVector, left = whole + static_cast<int>(threadIdx.x);  // fewer than threads
    int i = static_cast<int>(threadIdx.x) * kVector;
    if (aligned()) {
      vectors<kVector, kUnroll>(whole, weighted, squared);
      i = whole;
    }
    if (i >= whole) i = left;
#pragma unroll 1
    while (i < n) {
      element(i, weighted, squared);
      if (i >= whole) break;
      ++i;
      if (i % kVector == 0) i += (kThreads - 1) * kVector;
      if (i >= whole) i = left;
    }
  }

  // The penalty alone.
  EWC_DEVICE void value(int n, M delta, M& weighted, M& squared) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const auto term = penalty_term(p.get(i), a.get(i), f.get(i), delta);
      weighted += term.weighted;
      squared += term.squared;
    }
  }
};

// Bytes per element in fp32, protected: AdamW reads 24 and writes 12, amsgrad 4 more of each; SGD with momentum reads 20
// and writes 8; proximal reads 16 and writes 4.
template <typename Optimizer, typename M, typename P, typename G, typename S, typename A, typename F>
__global__ void __launch_bounds__(kThreads, StepMoves<Optimizer, M, P, G, S, A, F>::kBlocks)
    step_kernel(const __grid_constant__ StepArguments<typename Optimizer::Call> arguments) {
  using Move = StepMoves<Optimizer, M, P, G, S, A, F>;
  constexpr int kFirstState = Optimizer::kHasGradient ? 2 : 1;
  const StepLaunch& launch = arguments.launch;
  const auto& table = arguments.table;
  const double ewc_lambda = read(launch.ewc_lambda, 0, 0.0);
  const bool goes = read(launch.found_inf, 0, 0.0) == 0.0;
  const M delta = static_cast<M>(read(launch.delta, 0, 0.0));
  const M unscale = static_cast<M>(1.0 / read(launch.grad_scale, 0, 1.0));

  __shared__ uint32_t next;
  __shared__ Shared<typename Optimizer::template Step<M>, M> shared;
  if (threadIdx.x == 0) shared.number = NAN;
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks; chunk = next) {
    const uint32_t taken = threadIdx.x == 0 ? next_chunk(counters_of(launch.counters)) : 0;
    const int t = static_cast<int>(tensor_of_chunk(table.first, table.size, chunk));
    const int64_t start = (chunk - table.first[t]) * launch.chunk, left = table.numel[t] - start;
    const int n = static_cast<int>(left < launch.chunk ? left : launch.chunk);
    const bool is_protected = table.offset[t] >= 0, acts = is_protected && ewc_lambda != 0.0;
    if (threadIdx.x == 0) {
      shared.pull.delta = delta;
      shared.pull.factor = static_cast<M>(ewc_lambda * read(launch.scale, arguments.first_row + t, 1.0));
      Optimizer::prepare(arguments, t, shared);
    }
    __syncthreads();

    const auto state = [&](int k) {
      return Stream<S, M, Cache::kStream>(table.data[kFirstState + k][t], start, launch.state_dtype);
    };
    const int64_t at = is_protected ? table.offset[t] + start : start;
    const StepChunk<Optimizer, M, P, G, S, A, F> work = {
        {table.data[0][t], start, launch.param_dtype},
        {table.data[1][t], start, launch.grad_dtype},
        {state(0), state(1), state(2)},
        {is_protected ? launch.anchor : table.data[0][t], at, launch.anchor_dtype},
        {is_protected ? launch.fisher : table.data[0][t], at, launch.fisher_dtype},
        arguments.call,
        shared,
        acts ? launch.coupling : Coupling::kNone,
        Optimizer::state_lists(arguments.call),
        launch.grad_scale.data != nullptr,
        unscale,
        Optimizer::rounds(arguments.call, launch.param_dtype),
        Optimizer::rounds(arguments.call, launch.state_dtype),
        static_cast<uint64_t>(start)};
    M weighted = 0, squared = 0;
    // Where the penalty does not act its value is read beside the step: 0 times what is read might be NaN.
    const bool steps = goes && (acts || Optimizer::kStepsAlone), reads = is_protected && !(goes && acts);
    if (reads && launch.coupling == Coupling::kCoupled) {
      work.value(n, delta, weighted, squared);
      __syncthreads();  // elements are other threads' from here on
    }
    if (steps) work.template step<Move::kVector, Move::kUnroll>(n, weighted, squared);
    if (reads && launch.coupling == Coupling::kProximal) {
      __syncthreads();
      work.value(n, delta, weighted, squared);
    }
    const double2 total = block_sum(make_double2(weighted, squared));
    if (threadIdx.x == 0) {
      launch.slots[chunk] = total;
      next = taken;  // all threads are past block_sum's barrier, and so have read the last one
    }
    __syncthreads();
  }
  if (is_last_block(counters_of(launch.counters))) finish<M>(arguments);
}

template <typename Call>
struct StepKernel {
  void (*function)(StepArguments<Call>);
  int blocks_per_multiprocessor;
};

template <typename Optimizer, typename M, typename P, typename G, typename S, typename A, typename F>
StepKernel<typename Optimizer::Call> step_kernel_of() {
  return {step_kernel<Optimizer, M, P, G, S, A, F>, StepMoves<Optimizer, M, P, G, S, A, F>::kBlocks};
}

// Usual combinations of dtypes have a kernel of their own; the others share one for each type of arithmetic. What is not
// there has any dtype.
template <typename Optimizer>
StepKernel<typename Optimizer::Call> select_step_kernel(const StepLaunch& launch, int states) {
  const Dtype p = launch.param_dtype;
  const auto is = [&](Dtype grad, Dtype state, Dtype anchor, Dtype fisher) {
    return p == grad && (!Optimizer::kHasGradient || launch.grad_dtype == grad) &&
           (states == 0 || launch.state_dtype == state) &&
           (launch.anchor == nullptr || (launch.anchor_dtype == anchor && launch.fisher_dtype == fisher));
  };
  constexpr Dtype kWide = Dtype::kFloat32, kNarrow = Dtype::kBFloat16;
  if (is(kWide, kWide, kWide, kWide)) return step_kernel_of<Optimizer, float, float, float, float, float, float>();
  if (is(kWide, kWide, kWide, kNarrow)) return step_kernel_of<Optimizer, float, float, float, float, float, bf16>();
  if (is(kNarrow, kNarrow, kNarrow, kNarrow)) return step_kernel_of<Optimizer, float, bf16, bf16, bf16, bf16, bf16>();
  if (is(kNarrow, kWide, kNarrow, kNarrow)) return step_kernel_of<Optimizer, float, bf16, bf16, float, bf16, bf16>();
  if (is(kNarrow, kWide, kNarrow, kWide)) return step_kernel_of<Optimizer, float, bf16, bf16, float, bf16, float>();
  return p == Dtype::kFloat64 ? step_kernel_of<Optimizer, double, Any, Any, Any, Any, Any>()
                              : step_kernel_of<Optimizer, float, Any, Any, Any, Any, Any>();
}

// `add_row(arguments, row, t)` puts what is the optimizer's own of tensor `row` into place t.
template <typename Optimizer, typename AddRow>
cudaError_t launch_steps(const StepLaunch& launch, const typename Optimizer::Call& call, cudaStream_t stream,
                         AddRow add_row) {
  using Arguments = StepArguments<typename Optimizer::Call>;
  static_assert(sizeof(Arguments) <= kParameterBytes, "too large for the kernel's parameters");
  const auto kernel = select_step_kernel<Optimizer>(launch, Optimizer::state_lists(call));
  const int64_t resident = static_cast<int64_t>(launch.multiprocessors) * kernel.blocks_per_multiprocessor;
  Arguments arguments{};
  arguments.launch = launch;
  arguments.call = call;
  int64_t next = 0;
  do {  // once at least: results are written without tensors too. Empty tensors have a row and no chunk.
    auto& table = arguments.table;
    arguments.first_row = next;
    table.chunks = 0;
    for (table.size = 0; table.size < kStepsPerLaunch && next < launch.num_tensors; ++table.size, ++next) {
      const StepEntry& entry = launch.entries[next];
      for (int l = 0; l < kMaxLists; ++l) {
        table.data[l][table.size] = entry.data[l] != nullptr ? entry.data[l] : entry.data[0];
      }
      table.offset[table.size] = entry.offset;
      table.numel[table.size] = entry.numel;
      table.first[table.size] = table.chunks;
      table.chunks += static_cast<uint32_t>(chunk_count(entry.numel, launch.chunk));
      add_row(arguments, next, table.size);
    }
    arguments.last = next == launch.num_tensors;
    void* parameters[] = {&arguments};
    const cudaError_t error = cudaLaunchKernel(kernel.function, dim3(grid_size(table.chunks, resident)), dim3(kThreads),
                                               parameters, 0, stream);
    if (error != cudaSuccess) return error;
  } while (next < launch.num_tensors);
  return cudaSuccess;
}

}  // namespace
}  // namespace ewc
