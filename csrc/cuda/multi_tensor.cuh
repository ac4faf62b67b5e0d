// What kernels over lists of tensors share: the table of pointers, 16-byte access, reductions, the last block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "chunks.h"
#include "elementwise.h"
#include "penalty.h"

#define EWC_DEVICE __device__ __forceinline__

namespace ewc {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Blocks that a multiprocessor holds at once: kernels are compiled for it, grids sized to it. 3 leave a thread 80
// registers, 2 leave it 128, which fp64 arithmetic and types known only at run time need.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kBlocksPerMultiprocessorWide = 2;

// Bytes of operands that a thread requests before it waits, at most. By Little's law the memory of an H100 is busy with
// 3.35 TB/s * 0.7 us = 2.3 MB on the way, 18 KB in each multiprocessor; under load the latency is twice that, and so
// about 40 KB are wanted.
constexpr int kBytesInFlight = 128;

// Between them the threads of a block take kVector elements each in turn, so that this is what one sums in fp32.
static_assert(kChunk / kThreads < kBlock, "an fp32 sum would be longer than kBlock");

// ---- the table of pointers: a kernel parameter, so that a launch is one call and safe in a CUDA graph ----

#if defined(EWC_FAST_SMALL_TABLE) || CUDART_VERSION < 12010  // below sm_70 as well: the build defines it there
constexpr int kParameterBytes = 4096;
constexpr int kTensorsPerLaunch = 100;
#else
constexpr int kParameterBytes = 32764;
constexpr int kTensorsPerLaunch = 800;
#endif

template <int kPointers, int kCapacity>
struct TensorTable {
  void* data[kPointers][kCapacity];
  int64_t offset[kCapacity];
  int64_t numel[kCapacity];
  uint32_t first[kCapacity];  // chunk
  uint32_t chunks;
  int32_t size;
};

// ---- storage ----

// A storage type that is known only at run time: the branch on it is uniform.
struct Any {};

template <typename Fn>
EWC_DEVICE void with_type(Dtype dtype, Fn fn) {
  switch (dtype) {
    case Dtype::kFloat64: return fn(double{});
    case Dtype::kFloat32: return fn(float{});
    case Dtype::kBFloat16: return fn(bf16{});
    case Dtype::kFloat16: return fn(f16{});
  }
}

// Data of this pass alone is marked for eviction, so that parameters and gradients, which the optimizer reads next,
// stay in the L2 cache as far as they fit.
enum class Cache { kKeep, kStream };

// One operand of a chunk, n elements at a time: kAligned in 16-byte words (for Any: in up to 16 bytes), else element by
// element.
template <typename S, typename M, Cache cache>
class Stream {
 public:
  template <int n>
  struct Raw {
    S at[n];
  };

  EWC_DEVICE Stream(const void* tensor, int64_t start, Dtype)
      : data_(static_cast<S*>(const_cast<void*>(tensor)) + start) {}

  EWC_DEVICE bool aligned() const { return reinterpret_cast<uintptr_t>(data_) % 16 == 0; }

  template <bool kAligned, int n>
  EWC_DEVICE void load(Raw<n>& raw, int i) const {
    if (kAligned) {
      const Word<n>* from = reinterpret_cast<const Word<n>*>(data_ + i);
#pragma unroll
      for (int k = 0; k < kWords<n>; ++k) {
        const Word<n> word = cache == Cache::kStream ? __ldcs(from + k) : from[k];
        memcpy(reinterpret_cast<char*>(raw.at) + k * sizeof(word), &word, sizeof(word));
      }
    } else {  // other loads take the neighbours in the cache line: it has to stay
#pragma unroll
      for (int j = 0; j < n; ++j) raw.at[j] = data_[i + j];
    }
  }

  template <int n>
  EWC_DEVICE void unpack(const Raw<n>& raw, M (&to)[n]) const {
#pragma unroll
    for (int j = 0; j < n; ++j) to[j] = load_as<M>(raw.at[j]);
  }

  template <bool kAligned, int n>
  EWC_DEVICE void store(const M (&from)[n], int i) const {
    Raw<n> raw;
#pragma unroll
    for (int j = 0; j < n; ++j) raw.at[j] = Store<S>::from(from[j]);
    if (kAligned) {
      Word<n>* to = reinterpret_cast<Word<n>*>(data_ + i);
#pragma unroll
      for (int k = 0; k < kWords<n>; ++k) {
        Word<n> word;
        memcpy(&word, reinterpret_cast<const char*>(raw.at) + k * sizeof(word), sizeof(word));
        to[k] = word;
      }
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) data_[i + j] = raw.at[j];
    }
  }

  EWC_DEVICE M rounded(M x) const { return load_as<M>(Store<S>::from(x)); }
  EWC_DEVICE M get(int i) const { return load_as<M>(data_[i]); }
  EWC_DEVICE void put(M x, int i) const { data_[i] = Store<S>::from(x); }

 private:
  template <int n>
  using Word = std::conditional_t<n * sizeof(S) % 16 == 0, uint4,
                                  std::conditional_t<n * sizeof(S) == 8, uint2, unsigned>>;
  template <int n>
  static constexpr int kWords = static_cast<int>(n * sizeof(S) / sizeof(Word<n>));

  S* data_;
};

template <typename M, Cache cache>
class Stream<Any, M, cache> {
 public:
  template <int n>
  struct Raw {
    uint4 words[n * sizeof(double) / sizeof(uint4)];
  };

  EWC_DEVICE Stream(const void* tensor, int64_t start, Dtype dtype) : tensor_(tensor), start_(start), dtype_(dtype) {}

  EWC_DEVICE bool aligned() const {
    bool aligned = false;
    visit([&](auto stream) { aligned = stream.aligned(); });
    return aligned;
  }

  // Not converted before all operands are on their way.
  template <bool kAligned, int n>
  EWC_DEVICE void load(Raw<n>& raw, int i) const {
    visit([&](auto stream) {
      typename decltype(stream)::template Raw<n> typed;
      stream.template load<kAligned>(typed, i);
      memcpy(&raw, &typed, sizeof(typed));
    });
  }

  template <int n>
  EWC_DEVICE void unpack(const Raw<n>& raw, M (&to)[n]) const {
    visit([&](auto stream) {
      typename decltype(stream)::template Raw<n> typed;
      memcpy(&typed, &raw, sizeof(typed));
      stream.unpack(typed, to);
    });
  }

  template <bool kAligned, int n>
  EWC_DEVICE void store(const M (&from)[n], int i) const {
    visit([&](auto stream) { stream.template store<kAligned>(from, i); });
  }

  EWC_DEVICE M rounded(M x) const {
    visit([&](auto stream) { x = stream.rounded(x); });
    return x;
  }
  EWC_DEVICE M get(int i) const {
    M x{};
    visit([&](auto stream) { x = stream.get(i); });
    return x;
  }
  EWC_DEVICE void put(M x, int i) const {
    visit([&](auto stream) { stream.put(x, i); });
  }

 private:
  template <typename Fn>
  EWC_DEVICE void visit(Fn fn) const {
    with_type(dtype_, [&](auto storage) { fn(Stream<decltype(storage), M, cache>(tensor_, start_, dtype_)); });
  }

  const void* tensor_;
  int64_t start_;
  Dtype dtype_;
};

EWC_DEVICE double read(Scalar s, int64_t i, double otherwise) {
  if (s.data == nullptr) return otherwise;
  return s.fp64 ? static_cast<const double*>(s.data)[i] : static_cast<double>(static_cast<const float*>(s.data)[i]);
}

// ---- sums: fixed trees of fp64 ----

EWC_DEVICE double2 sum(double2 a, double2 b) { return make_double2(a.x + b.x, a.y + b.y); }

// The result is lane 0's. All lanes must come.
EWC_DEVICE double2 warp_sum(double2 mine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    mine = sum(mine, make_double2(__shfl_down_sync(kWholeWarp, mine.x, distance),
                                  __shfl_down_sync(kWholeWarp, mine.y, distance)));
  }
  return mine;
}

// The result is thread 0's. All threads must come, and meet at a barrier before the next sum.
EWC_DEVICE double2 block_sum(double2 mine) {
  __shared__ double2 of_warp[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  mine = warp_sum(mine);
  if (lane == 0) of_warp[warp] = mine;
  __syncthreads();
  if (warp == 0) mine = warp_sum(lane < kWarps ? of_warp[lane] : make_double2(0, 0));
  return mine;
}

// The chunk that a block works on next, for thread 0 to ask as soon as the one before is begun: then the answer is there
// in time. A block starts with the chunk of its own number and takes from then on what is next: multiprocessors are not
// equally fast (those of a smaller cluster have more of its bandwidth each), and chunks are not equally long.
EWC_DEVICE uint32_t next_chunk(Counters& counters) { return gridDim.x + atomicAdd(&counters.taken, 1u); }

// Whether this block is the launch's last to come here, with no chunk left; it then sees what thread 0 of every other one
// has written, if it reads past its L1 cache. The counters are 0 again.
EWC_DEVICE bool is_last_block(Counters& counters) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(&counters.finished, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
    if (last) counters.taken = 0;
  }
  __syncthreads();
  return last;
}

// Enough blocks to fill the device; one where there is no chunk.
inline unsigned grid_size(int64_t chunks, int64_t resident) {
  const int64_t blocks = chunks < resident ? chunks : resident;
  return static_cast<unsigned>(blocks > 1 ? blocks : 1);
}

}  // namespace ewc
