// A CUDA device on the CPU, enough to run the kernels of csrc/cuda unchanged: put this directory first on the include
// path and compile the .cu files as C++. Blocks run one after the other in random order; a block's threads are fibers,
// warps of a block run in random order, each as far as it can before the next one starts. So a forgotten barrier shows.
//
// A block that takes work from a queue takes all of it, since no other runs beside it.
//
// It aborts with a message where a device would hang or misbehave: misaligned words, a shuffle that lacks lanes, a
// barrier that threads wait at while others wait in a shuffle.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDART_VERSION 13000
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  explicit dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

constexpr unsigned kLanes = 32;

// Where a fiber stands. In a shuffle it waits for its warp, at a barrier for its block.
enum class State { kRunnable, kShuffle, kBarrier, kDone };

class Device {
 public:
  std::mt19937_64 random;
  int launches = 0, memsets = 0;  // counted
  bool capturing = false;         // what streams say

  template <typename Body>
  void run(unsigned blocks, unsigned threads, const Body& body) {
    require(blocks > 0 && threads > 0 && threads % kLanes == 0, "a grid needs blocks and whole warps");
    ++launches;
    gridDim = dim3(blocks);
    blockDim = dim3(threads);
    if (threads > capacity_) {
      owner_.reset(new Fiber[threads]);
      fibers_ = owner_.get();
      capacity_ = threads;
    }
    body_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
    argument_ = &body;
    for (const unsigned block : shuffled(blocks)) {
      blockIdx = dim3(block);
      run_block(threads);
    }
  }

  void barrier() { wait(State::kBarrier); }

  // Two mailboxes in turn: a lane that is ahead writes into the one that nobody reads any more.
  double shuffle_down(double value, unsigned distance) {
    const unsigned thread = threadIdx.x, lane = thread % kLanes;
    Fiber& fiber = fibers_[thread];
    const unsigned box = fiber.shuffles++ % 2;
    fiber.mail[box] = value;
    wait(State::kShuffle);
    return fibers_[lane + distance < kLanes ? thread + distance : thread].mail[box];
  }

 private:
  static constexpr size_t kStack = 64 * 1024;

  struct Fiber {
    Fiber() : stack(new char[kStack]) {
      getcontext(&context);
      context.uc_stack.ss_sp = stack.get();
      context.uc_stack.ss_size = kStack;
      context.uc_link = nullptr;
      makecontext(&context, enter, 0);
    }

    std::unique_ptr<char[]> stack;
    ucontext_t context;  // where it is entered; from then on it is left and resumed by jumps, which cost no system call
    sigjmp_buf left_at;
    bool entered = false;
    void* shadow = nullptr;  // AddressSanitizer's
    State state = State::kDone;
    double mail[2] = {};
    unsigned shuffles = 0;
  };

  // A fiber never ends: it takes one thread after the other, of one block after the other.
  static void enter();

  std::vector<unsigned> shuffled(unsigned n) {
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) fibers_[t].state = State::kRunnable;
    for (;;) {
      for (const unsigned warp : shuffled(threads / kLanes)) run_warp(warp * kLanes);
      bool all_done = true;
      for (unsigned t = 0; t < threads; ++t) {
        if (fibers_[t].state == State::kBarrier) {
          fibers_[t].state = State::kRunnable;
          all_done = false;
        }
      }
      if (all_done) return;
    }
  }

  void run_warp(unsigned first) {
    for (;;) {
      unsigned shuffling = 0;
      for (unsigned t = first; t < first + kLanes; ++t) {
        if (fibers_[t].state == State::kRunnable) resume(t);
        if (fibers_[t].state == State::kShuffle) ++shuffling;
      }
      if (shuffling == 0) return;  // at a barrier or done
      require(shuffling == kLanes, "a shuffle of the whole warp lacks lanes");
      for (unsigned t = first; t < first + kLanes; ++t) fibers_[t].state = State::kRunnable;
    }
  }

  void resume(unsigned thread) {
    Fiber& fiber = fibers_[thread];
    threadIdx = dim3(thread);
    if (sigsetjmp(left_at_, 0) == 0) {
      start_switch(&shadow_, fiber.stack.get(), kStack);
      if (fiber.entered) siglongjmp(fiber.left_at, 1);
      fiber.entered = true;
      setcontext(&fiber.context);
    }
    finish_switch(shadow_, nullptr, nullptr);
  }

  void wait(State state) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.state = state;
    if (sigsetjmp(fiber.left_at, 0) == 0) {
      start_switch(&fiber.shadow, scheduler_stack_, scheduler_size_);
      siglongjmp(left_at_, 1);
    }
    finish_switch(fiber.shadow, &scheduler_stack_, &scheduler_size_);
  }

#if defined(__SANITIZE_ADDRESS__)
  static void start_switch(void** shadow, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(shadow, stack, size);
  }
  static void finish_switch(void* shadow, const void** stack, size_t* size) {
    __sanitizer_finish_switch_fiber(shadow, stack, size);
  }
#else
  static void start_switch(void**, const void*, size_t) {}
  static void finish_switch(void*, const void**, size_t*) {}
#endif

  std::unique_ptr<Fiber[]> owner_;
  Fiber* fibers_ = nullptr;
  unsigned capacity_ = 0;
  sigjmp_buf left_at_;
  void* shadow_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
};

inline Device device;

inline void Device::enter() {
  finish_switch(nullptr, &device.scheduler_stack_, &device.scheduler_size_);
  for (;;) {
    device.body_(device.argument_);
    device.wait(State::kDone);
  }
}

template <typename T>
T load_word(const T* from) {
  require(reinterpret_cast<uintptr_t>(from) % alignof(T) == 0, "a misaligned word is loaded");
  T word;
  std::memcpy(&word, from, sizeof(T));
  return word;
}

template <typename... Args, size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<Args>>*>(args[I])...);
}

}  // namespace emulation

inline void __syncthreads() { emulation::device.barrier(); }
inline void __threadfence() {}

inline double __shfl_down_sync(unsigned mask, double value, unsigned distance) {
  emulation::require(mask == 0xffffffffu, "only whole warps shuffle here");
  return emulation::device.shuffle_down(value, distance);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}

template <typename T>
T __ldcs(const T* from) {
  return emulation::load_word(from);
}
template <typename T>
T __ldcg(const T* from) {
  return emulation::load_word(from);
}
template <typename... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  emulation::device.run(grid.x, block.x,
                        [&] { emulation::call(kernel, args, std::index_sequence_for<Args...>{}); });
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  ++emulation::device.memsets;
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::device.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
