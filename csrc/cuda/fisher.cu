#include "fisher.h"

#include "multi_tensor.cuh"

namespace ewc {
namespace {

// 52 bytes a tensor.
constexpr int kFishersPerLaunch = kTensorsPerLaunch * 3 / 4;

struct FisherArguments {
  TensorTable<2, kFishersPerLaunch> table;  // data: Fisher, gradients; offset: from row to row of the gradients
  int64_t rows[kFishersPerLaunch];
  double weight;
  int64_t chunk;  // elements of the Fisher
};
static_assert(sizeof(FisherArguments) <= kParameterBytes, "too large for the kernel's parameters");

// How a kernel moves: kVector elements, so that the gradients take 16 bytes, of two rows, kUnroll times. A multiprocessor
// requests 48 KB of gradients at once, 64 KB in fp64, and where there is one row as much or more together with the Fisher
// (see kBytesInFlight). Where one type is fp64 and the other is not, it is less.
template <typename G, typename M>
struct FisherMoves {
  static constexpr bool kWide = sizeof(M) == 8;
  static constexpr int kVector = kWide ? 2 : 16 / static_cast<int>(sizeof(G));
  static constexpr int kUnroll = kWide ? 4 : 2;
  static constexpr int kBlocks = kWide ? kBlocksPerMultiprocessorWide : kBlocksPerMultiprocessor;
};

// At most kChunk elements. All rows are added up in registers, in order, whatever the alignment.
template <bool kAligned, int kVector, int kUnroll, typename G, typename M>
EWC_DEVICE void fisher_chunk(M* fisher, const G* grad, int64_t rows, int64_t stride, int n, M weight) {
  using Fisher = Stream<M, M, Cache::kKeep>;
  using Grad = Stream<G, M, Cache::kStream>;
  const Fisher f(fisher, 0, Dtype{});
  const int whole = n / kVector * kVector;
  constexpr int kStride = kThreads * kVector;
#pragma unroll 1
  for (int i = threadIdx.x * kVector; i < whole; i += kUnroll * kStride) {
    typename Fisher::template Raw<kVector> raw_f[kUnroll];
    M squares[kUnroll][kVector] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u == 0 || i + u * kStride < whole) f.template load<kAligned>(raw_f[u], i + u * kStride);
    }
#pragma unroll 1
    for (int64_t r = 0; r < rows; r += 2) {
      typename Grad::template Raw<kVector> raw_g[2][kUnroll];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k == 1 && r + 1 == rows) break;
        const Grad g(grad, (r + k) * stride, Dtype{});
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (u == 0 || i + u * kStride < whole) g.template load<kAligned>(raw_g[k][u], i + u * kStride);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k == 1 && r + 1 == rows) break;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (u == 0 || i + u * kStride < whole) {
            M g[kVector];
            Grad(grad, 0, Dtype{}).unpack(raw_g[k][u], g);
#pragma unroll
            for (int j = 0; j < kVector; ++j) squares[u][j] = add_square(squares[u][j], g[j]);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u == 0 || i + u * kStride < whole) {
        M value[kVector];
        f.unpack(raw_f[u], value);
#pragma unroll
        for (int j = 0; j < kVector; ++j) value[j] = add_weighted(value[j], weight, squares[u][j]);
        f.template store<kAligned>(value, i + u * kStride);
      }
    }
  }
  const int i = whole + threadIdx.x;  // what is left is fewer elements than threads
  if (i < n) {
    M squares = 0;
    for (int64_t r = 0; r < rows; ++r) squares = add_square(squares, load_as<M>(grad[r * stride + i]));
    fisher[i] = add_weighted(fisher[i], weight, squares);
  }
}

// Reads and writes the Fisher once and reads the gradients once: with one fp32 row 12 bytes per element. A block takes
// every so many-th chunk: nothing is summed over elements, so that nothing depends on who takes which.
template <typename G, typename M>
__global__ void __launch_bounds__(kThreads, FisherMoves<G, M>::kBlocks)
    fisher_kernel(const __grid_constant__ FisherArguments arguments) {
  using Move = FisherMoves<G, M>;
  const auto& table = arguments.table;
  const M weight = static_cast<M>(arguments.weight);
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const int64_t t = tensor_of_chunk(table.first, table.size, chunk);
    const int64_t start = (chunk - table.first[t]) * arguments.chunk, left = table.numel[t] - start;
    const int n = static_cast<int>(left < arguments.chunk ? left : arguments.chunk);
    const int64_t rows = arguments.rows[t], stride = table.offset[t];
    M* fisher = static_cast<M*>(table.data[0][t]) + start;
    const G* grad = static_cast<const G*>(table.data[1][t]) + start;
    const uint64_t addresses = reinterpret_cast<uintptr_t>(fisher) | reinterpret_cast<uintptr_t>(grad) |
                               static_cast<uint64_t>(stride) * sizeof(G);
    if (addresses % 16 == 0) {
      fisher_chunk<true, Move::kVector, Move::kUnroll>(fisher, grad, rows, stride, n, weight);
    } else {
      fisher_chunk<false, Move::kVector, 1>(fisher, grad, rows, stride, n, weight);
    }
  }
}

struct FisherKernel {
  void (*function)(FisherArguments);
  int blocks_per_multiprocessor;
};

template <typename M>
FisherKernel select_fisher_kernel(Dtype grad) {
  switch (grad) {
    case Dtype::kFloat64: return {fisher_kernel<double, M>, FisherMoves<double, M>::kBlocks};
    case Dtype::kBFloat16: return {fisher_kernel<bf16, M>, FisherMoves<bf16, M>::kBlocks};
    case Dtype::kFloat16: return {fisher_kernel<f16, M>, FisherMoves<f16, M>::kBlocks};
    default: return {fisher_kernel<float, M>, FisherMoves<float, M>::kBlocks};
  }
}

}  // namespace

cudaError_t launch_fisher(const FisherLaunch& launch, cudaStream_t stream) {
  const FisherKernel kernel = launch.fisher_dtype == Dtype::kFloat64 ? select_fisher_kernel<double>(launch.grad_dtype)
                                                                     : select_fisher_kernel<float>(launch.grad_dtype);
  const int64_t resident = static_cast<int64_t>(launch.multiprocessors) * kernel.blocks_per_multiprocessor;
  FisherArguments arguments;
  arguments.weight = launch.weight;
  arguments.chunk = launch.chunk;
  for (int64_t next = 0; next < launch.num_tensors;) {
    auto& table = arguments.table;
    table.chunks = 0;
    for (table.size = 0; table.size < kFishersPerLaunch && next < launch.num_tensors; ++table.size, ++next) {
      const FisherEntry& entry = launch.entries[next];
      table.data[0][table.size] = entry.fisher;
      table.data[1][table.size] = const_cast<void*>(entry.grad);
      table.offset[table.size] = entry.stride;
      table.numel[table.size] = entry.numel;
      table.first[table.size] = table.chunks;
      arguments.rows[table.size] = entry.rows;
      table.chunks += static_cast<uint32_t>(chunk_count(entry.numel, launch.chunk));
    }
    void* parameters[] = {&arguments};
    const cudaError_t error = cudaLaunchKernel(kernel.function, dim3(grid_size(table.chunks, resident)), dim3(kThreads),
                                               parameters, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace ewc
