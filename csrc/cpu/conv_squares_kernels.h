// The loop of add_conv_squares_. No torch headers.
#pragma once

#include <cstdint>

#include "clones.h"
#include "elementwise.h"

namespace ewc {
namespace {

constexpr int64_t kLanes = 8;  // columns of a row that are multiplied together; shorter rows of g are padded with zeros
constexpr int kOut = 4, kWide = 3;  // output channels and columns of the kernel whose sums stay in registers

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// What is left of a row is multiplied as its last kLanes columns, without those that have been: from `rest` on, bits that
// keep the last `rest` lanes.
constexpr int32_t kKept[2 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};

// One sample, input channel and row of the kernel. Planes of g lie apart by `plane`, of the result by `next`.
struct ConvRow {
  const float *g, *x;
  int64_t plane, rows, columns, x_row, dilation, next;
  float* squares;
};

template <int out, int wide>
inline EWC_INLINE void conv_tile(const ConvRow& t, int64_t o, int64_t first) {
  Lanes sums[out][wide];
  for (int a = 0; a < out; ++a) {
    for (int b = 0; b < wide; ++b) sums[a][b] = Lanes{};
  }
  const float* g = t.g + o * t.plane;
  const float* x = t.x + first * t.dilation;
  const auto add = [&](int64_t c, const Bits& kept) EWC_INLINE {
    Lanes gs[out];
    for (int a = 0; a < out; ++a) {
      gs[a] = reinterpret_cast<Lanes>(*reinterpret_cast<const Bits*>(g + a * t.plane + c) & kept);
    }
    for (int b = 0; b < wide; ++b) {
      const Lanes xs = *reinterpret_cast<const Lanes*>(x + c + b * t.dilation);
      for (int a = 0; a < out; ++a) sums[a][b] += gs[a] * xs;
    }
  };
  const int64_t rest = t.columns % kLanes;
  const Bits all = ~Bits{}, last = *reinterpret_cast<const Bits*>(kKept + rest);
  for (int64_t y = 0; y < t.rows; ++y, g += t.columns, x += t.x_row) {
    for (int64_t c = 0; c < t.columns - rest; c += kLanes) add(c, all);
    if (rest > 0) add(t.columns - kLanes, last);
  }
  for (int a = 0; a < out; ++a) {
    for (int b = 0; b < wide; ++b) {
      float sum = 0;
      for (int64_t i = 0; i < kLanes; ++i) sum += sums[a][b][i];
      float& total = t.squares[(o + a) * t.next + first + b];
      total = add_square(total, sum);
    }
  }
}

// `out` output channels, `wide` columns of the kernel.
EWC_CLONES void conv_row(const ConvRow& t, int64_t out, int64_t wide) {
  for (int64_t b = 0; b < wide; b += kWide) {
    const int64_t some = wide - b < kWide ? wide - b : kWide;
    int64_t o = 0;
    for (; o + kOut <= out; o += kOut) {
      some == 3 ? conv_tile<kOut, 3>(t, o, b) : some == 2 ? conv_tile<kOut, 2>(t, o, b) : conv_tile<kOut, 1>(t, o, b);
    }
    for (; o < out; ++o) {
      some == 3 ? conv_tile<1, 3>(t, o, b) : some == 2 ? conv_tile<1, 2>(t, o, b) : conv_tile<1, 1>(t, o, b);
    }
  }
}

}  // namespace
}  // namespace ewc
