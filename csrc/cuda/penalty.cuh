// The penalty's kernel, its dtypes and its launcher; one .cu per mode instantiates it, so that they compile side by side.
#pragma once

#include <algorithm>

#include "results.cuh"

namespace ewc {
namespace {

struct PenaltyArguments {
  PenaltyLaunch launch;  // `entries` is the host's
  int64_t first_row;     // the launch's first tensor among all
  bool last;             // launch
  TensorTable<2, kTensorsPerLaunch> table;  // data: parameters, gradients
};
static_assert(sizeof(PenaltyArguments) <= kParameterBytes, "too large for the kernel's parameters");

// How a kernel for these storage types moves: kVector elements, so that the narrowest takes 16 bytes, kUnroll times. In a
// multiprocessor there are on the way, at most, in KB (see kBytesInFlight; tests/native/check_cuda.py asserts it):
//
//   parameter, gradient   anchor, Fisher   value   write   accumulate
//   fp32                  fp32                72      72           96
//   fp32                  fp32 and bf16       60      60           84
//   fp32                  bf16                96      96           72
//   bf16, fp16            fp32                60      60           72
//   bf16, fp16            fp32 and bf16       96      96           60
//   bf16, fp16            bf16                72      72           96
//   fp64 (2 blocks)       fp64                48      48           64
template <Mode mode, typename M, typename P, typename G, typename A, typename F>
struct Moves {
  static constexpr int kNarrowest = static_cast<int>(std::min({sizeof(P), sizeof(G), sizeof(A), sizeof(F)}));
  static constexpr int kVector = 16 / kNarrowest;
  static constexpr int kBytes =
      kVector * static_cast<int>(sizeof(P) + sizeof(A) + sizeof(F) + (mode == Mode::kAccumulate ? sizeof(G) : 0));
  static constexpr int kUnroll = kBytesInFlight / kBytes > 1 ? kBytesInFlight / kBytes : 1;
  static constexpr int kBlocks = sizeof(M) == 8 ? kBlocksPerMultiprocessorWide : kBlocksPerMultiprocessor;
};
template <Mode mode, typename M>
struct Moves<mode, M, Any, Any, Any, Any> {
  static constexpr int kVector = 16 / sizeof(M);
  static constexpr int kUnroll = 1;
  static constexpr int kBlocks = kBlocksPerMultiprocessorWide;
};

// At most kChunk elements. acts: whether the gradient is touched (kAccumulate) or more than zeros (kWrite). A thread takes
// kVector elements at a time, kPiece of them at once; which ones, and in what order, does not depend on the alignment,
// and so neither do the sums.
template <Mode mode, int kVector, int kPiece, int kUnroll, bool kAligned, typename M, typename P, typename G,
          typename A, typename F>
EWC_DEVICE void penalty_chunk(const P& p, const G& g, const A& a, const F& f, int n, M delta, M factor, bool acts,
                              M& weighted, M& squared) {
  const bool reads = mode == Mode::kAccumulate && acts;
  const bool writes = mode == Mode::kWrite || reads;
  const auto element = [&](M parameter, M anchor, M fisher, M& gradient) {
    const auto term = penalty_term(parameter, anchor, fisher, delta);
    weighted += term.weighted;
    squared += term.squared;
    if (mode == Mode::kWrite) gradient = acts ? factor * term.gradient : M(0);
    if (mode == Mode::kAccumulate) gradient += factor * term.gradient;
  };

  const int whole = n / kVector * kVector;
  constexpr int kStride = kThreads * kVector;
#pragma unroll 1
  for (int i = threadIdx.x * kVector; i < whole; i += kUnroll * kStride) {
#pragma unroll 1
    for (int piece = 0; piece < kVector; piece += kPiece) {
      typename P::template Raw<kPiece> raw_p[kUnroll];
      typename G::template Raw<kPiece> raw_g[kUnroll];
      typename A::template Raw<kPiece> raw_a[kUnroll];
      typename F::template Raw<kPiece> raw_f[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * kStride + piece;
        if (u == 0 || i + u * kStride < whole) {
          p.template load<kAligned>(raw_p[u], at);
          a.template load<kAligned>(raw_a[u], at);
          f.template load<kAligned>(raw_f[u], at);
          if (reads) g.template load<kAligned>(raw_g[u], at);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * kStride + piece;
        if (u == 0 || i + u * kStride < whole) {
          M parameter[kPiece], anchor[kPiece], fisher[kPiece], gradient[kPiece] = {};
          p.unpack(raw_p[u], parameter);
          a.unpack(raw_a[u], anchor);
          f.unpack(raw_f[u], fisher);
          if (reads) g.unpack(raw_g[u], gradient);
#pragma unroll
          for (int j = 0; j < kPiece; ++j) element(parameter[j], anchor[j], fisher[j], gradient[j]);
          if (writes) g.template store<kAligned>(gradient, at);
        }
      }
    }
  }
  const int i = whole + threadIdx.x;  // what is left is fewer elements than threads
  if (i < n) {
    M gradient = reads ? g.get(i) : M(0);
    element(p.get(i), a.get(i), f.get(i), gradient);
    if (writes) g.put(gradient, i);
  }
}

// Bytes per element, fp32: kValue reads 12; kWrite reads 12 and writes 4; kAccumulate reads 16 and writes 4. With bf16
// throughout it is half, with fp64 double.
template <Mode mode, typename M, typename P, typename G, typename A, typename F>
__global__ void __launch_bounds__(kThreads, Moves<mode, M, P, G, A, F>::kBlocks)
    penalty_kernel(const __grid_constant__ PenaltyArguments arguments) {
  using Move = Moves<mode, M, P, G, A, F>;
  constexpr int kVector = Move::kVector, kUnroll = Move::kUnroll;
  constexpr int kPiece = kVector < 4 ? kVector : 4;  // misaligned: more loads of one element would spill
  const PenaltyLaunch& launch = arguments.launch;
  const auto& table = arguments.table;

  const double ewc_lambda = read(launch.ewc_lambda, 0, 0.0), loss_scale = read(launch.grad_scale, 0, 1.0);
  const M delta = static_cast<M>(read(launch.delta, 0, 0.0));
  const bool acts = ewc_lambda != 0.0 && read(launch.found_inf, 0, 0.0) == 0.0;

  __shared__ uint32_t next;
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks; chunk = next) {
    const uint32_t taken = threadIdx.x == 0 ? next_chunk(counters_of(launch.counters)) : 0;
    const int64_t t = tensor_of_chunk(table.first, table.size, chunk);
    const int64_t start = (chunk - table.first[t]) * launch.chunk, left = table.numel[t] - start;
    const int n = static_cast<int>(left < launch.chunk ? left : launch.chunk);
    const int64_t at = table.offset[t] + start;
    const double scale = read(launch.scale, arguments.first_row + t, 1.0);
    const M factor = static_cast<M>(gradient_factor(ewc_lambda, scale, loss_scale, launch.maximize));

    const Stream<P, M, Cache::kKeep> p(table.data[0][t], start, launch.param_dtype);
    const Stream<G, M, Cache::kKeep> g(table.data[mode == Mode::kValue ? 0 : 1][t], start, launch.grad_dtype);
    const Stream<A, M, Cache::kStream> a(launch.anchor, at, launch.anchor_dtype);
    const Stream<F, M, Cache::kStream> f(launch.fisher, at, launch.fisher_dtype);
    M weighted = 0, squared = 0;
    const bool aligned = p.aligned() && g.aligned() && a.aligned() && f.aligned();
    if (aligned) {
      penalty_chunk<mode, kVector, kVector, kUnroll, true>(p, g, a, f, n, delta, factor, acts, weighted, squared);
    } else {
      penalty_chunk<mode, kVector, kPiece, 1, false>(p, g, a, f, n, delta, factor, acts, weighted, squared);
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

struct PenaltyKernel {
  void (*function)(PenaltyArguments) = nullptr;
  int blocks_per_multiprocessor = 0;
};

template <Mode mode, typename M, typename P, typename G, typename A, typename F>
PenaltyKernel kernel_of() {
  return {penalty_kernel<mode, M, P, G, A, F>, Moves<mode, M, P, G, A, F>::kBlocks};
}

template <Mode mode, typename T, typename A>
PenaltyKernel with_fisher(Dtype fisher) {
  if (fisher == Dtype::kFloat32) return kernel_of<mode, float, T, T, A, float>();
  if (fisher == Dtype::kBFloat16) return kernel_of<mode, float, T, T, A, bf16>();
  return {};
}

template <Mode mode, typename T>
PenaltyKernel with_state(Dtype anchor, Dtype fisher) {
  if (anchor == Dtype::kFloat32) return with_fisher<mode, T, float>(fisher);
  if (anchor == Dtype::kBFloat16) return with_fisher<mode, T, bf16>(fisher);
  return {};
}

// Usual combinations of dtypes have a kernel of their own; the others share one for each type of arithmetic.
template <Mode mode>
PenaltyKernel select_kernel(Dtype param, Dtype grad, Dtype anchor, Dtype fisher) {
  PenaltyKernel kernel;
  if (param == grad) {
    switch (param) {
      case Dtype::kFloat32: kernel = with_state<mode, float>(anchor, fisher); break;
      case Dtype::kBFloat16: kernel = with_state<mode, bf16>(anchor, fisher); break;
      case Dtype::kFloat16: kernel = with_state<mode, f16>(anchor, fisher); break;
      case Dtype::kFloat64:
        if (anchor == param && fisher == param) kernel = kernel_of<mode, double, double, double, double, double>();
        break;
    }
  }
  if (kernel.function != nullptr) return kernel;
  return param == Dtype::kFloat64 ? kernel_of<mode, double, Any, Any, Any, Any>()
                                  : kernel_of<mode, float, Any, Any, Any, Any>();
}

}  // namespace

template <Mode mode>
cudaError_t launch_penalty(const PenaltyLaunch& launch, cudaStream_t stream) {
  const PenaltyKernel kernel =
      select_kernel<mode>(launch.param_dtype, launch.grad_dtype, launch.anchor_dtype, launch.fisher_dtype);
  const int64_t resident = static_cast<int64_t>(launch.multiprocessors) * kernel.blocks_per_multiprocessor;
  PenaltyArguments arguments;
  arguments.launch = launch;
  int64_t next = 0;
  do {  // once at least: results are written without tensors too. Empty tensors have a row and no chunk.
    auto& table = arguments.table;
    arguments.first_row = next;
    table.chunks = 0;
    for (table.size = 0; table.size < kTensorsPerLaunch && next < launch.num_tensors; ++table.size, ++next) {
      const Entry& entry = launch.entries[next];
      table.data[0][table.size] = const_cast<void*>(entry.param);
      table.data[1][table.size] = entry.grad;
      table.offset[table.size] = entry.offset;
      table.numel[table.size] = entry.numel;
      table.first[table.size] = table.chunks;
      table.chunks += static_cast<uint32_t>(chunk_count(entry.numel, launch.chunk));
    }
    arguments.last = next == launch.num_tensors;
    void* parameters[] = {&arguments};
    const cudaError_t error = cudaLaunchKernel(kernel.function, dim3(grid_size(table.chunks, resident)), dim3(kThreads),
                                               parameters, 0, stream);
    if (error != cudaSuccess) return error;
  } while (next < launch.num_tensors);
  return cudaSuccess;
}

}  // namespace ewc
