// What a pass keeps out of the caches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ewc {
namespace {

// Stores past the caches. An ordinary store first reads the line that it is about to overwrite; for a buffer that no
// cache can hold until it is read again, that read is for nothing, a quarter of what a writing pass moves.
#if defined(__SSE2__)  // which every x86-64 has
constexpr bool kCanStream = true;

inline void stream_copy(void* to_, const void* from_, int64_t bytes) {
  char* to = static_cast<char*>(to_);
  const char* from = static_cast<const char*>(from_);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % 16);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  std::memcpy(to + i, from + i, bytes - i);
}

// Such stores are ordered with no others: before another thread may read, its writer calls this.
inline void stream_fence() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
inline void stream_copy(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void stream_fence() {}
#endif

}  // namespace
}  // namespace ewc
