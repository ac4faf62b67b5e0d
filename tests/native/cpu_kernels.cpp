// The CPU kernels' loops without torch: checked against the formula in fp64, or run a known number of times to be counted.
//
//   cpu_kernels check SEED   every kernel at sizes around each boundary, aligned and not; exit status 1 on a difference
//   cpu_kernels count CALLS  every kernel on CALLS full blocks
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/conv_squares_kernels.h"
#include "cpu/fisher_kernels.h"
#include "cpu/penalty_kernels.h"
#include "cpu/streaming.h"

namespace {

using ewc::bf16;
using ewc::f16;
using ewc::kBlock;
using ewc::Mode;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A storage type's value, decoded from its bits with none of the code under test; the unit roundoff and the smallest step.
template <typename T>
struct Format;
template <>
struct Format<double> {
  static double value(double x) { return x; }
  static constexpr double unit = 0x1p-53, step = 0x1p-1074;
  static double encode(double x) { return x; }
};
template <>
struct Format<float> {
  static double value(float x) { return x; }
  static constexpr double unit = 0x1p-24, step = 0x1p-149;
  static float encode(double x) { return static_cast<float>(x); }
};

// Sign, exponent and fraction of a 16-bit format.
template <int exponent_bits>
double decode(uint16_t bits) {
  constexpr int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double magnitude;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction == 0 ? kInfinity : std::nan("");
  } else {
    magnitude = std::ldexp(exponent == 0 ? fraction : fraction + (1 << fraction_bits),
                           std::max(exponent, 1) - bias - fraction_bits);
  }
  return std::copysign(magnitude, bits & 0x8000 ? -1.0 : 1.0);
}

template <typename T, int exponent_bits>
struct Format16 {
  static constexpr int fraction_bits = 15 - exponent_bits;
  static double value(T x) { return decode<exponent_bits>(x.bits); }
  static constexpr double unit = exponent_bits == 8 ? 0x1p-8 : 0x1p-11, step = exponent_bits == 8 ? 0x1p-133 : 0x1p-24;
  // Rounded towards zero, which is good enough for inputs; x must not overflow.
  static T encode(double x) {
    constexpr int lowest = 2 - (1 << (exponent_bits - 1));  // exponent of the smallest normal number
    const int exponent = std::max(x == 0 ? lowest : std::ilogb(x), lowest);
    const int significand = static_cast<int>(std::ldexp(std::abs(x), fraction_bits - exponent));
    const int magnitude = significand + ((exponent - lowest) << fraction_bits);  // the implicit bit raises the exponent
    return T{static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | magnitude)};
  }
};
template <>
struct Format<bf16> : Format16<bf16, 8> {};
template <>
struct Format<f16> : Format16<f16, 5> {};

int failures = 0;

void expect_near(const char* kernel, const char* what, int64_t n, int64_t i, double got, double wanted, double bound) {
  if (got == wanted || std::abs(got - wanted) <= bound) return;
  if (++failures <= 20) {
    std::printf("%s, %lld elements: %s %lld is %.17g, expected %.17g within %g\n", kernel, static_cast<long long>(n), what,
                static_cast<long long>(i), got, wanted, bound);
  }
}

using Random = std::mt19937_64;

// Normal numbers, a few orders of magnitude apart, in a buffer that starts at `offset` and has a guard behind it.
template <typename T>
struct Values {
  static constexpr int64_t kGuard = 64;
  std::vector<T> storage;
  T* data;
  int64_t n;

  Values(int64_t n_, int64_t offset, Random& random, bool positive = false)
      : storage(n_ + offset + kGuard), data(storage.data() + offset), n(n_) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> exponent(-6, 2);
    for (T& x : storage) {
      const double value = normal(random) * std::exp2(exponent(random));
      x = Format<T>::encode(positive ? std::abs(value) : value);
    }
  }
  double operator[](int64_t i) const { return Format<T>::value(data[i]); }
};

// Only [0, n) may have changed.
template <typename T>
void expect_untouched(const char* kernel, const Values<T>& now, const std::vector<T>& before) {
  const int64_t offset = now.data - now.storage.data();
  for (int64_t i = 0; i < static_cast<int64_t>(before.size()); ++i) {
    if (i >= offset && i < offset + now.n) continue;
    if (std::memcmp(&now.storage[i], &before[i], sizeof(T)) != 0) {
      expect_near(kernel, "element outside", now.n, i - offset, 1, 0, 0);
    }
  }
}

template <Mode mode, typename P, typename G, typename A, typename F>
void check_penalty(const char* kernel, int64_t n, int64_t offset, Random& random) {
  using M = typename ewc::MathOf<P>::type;
  const double unit = Format<M>::unit;
  const Values<P> p(n, offset, random);
  const Values<A> a(n, offset, random);
  const Values<F> f(n, offset, random, true);
  Values<G> g(n, offset, random);
  const Values<G> before = g;
  std::vector<double> g0(n);
  for (int64_t i = 0; i < n; ++i) g0[i] = g[i];
  const double delta = 0.25, factor = -1.5, start[2] = {3.0, 5.0};
  double sums[2] = {start[0], start[1]};
  ewc::penalty_block<mode, P, G, A, F>(p.data, mode == Mode::kValue ? nullptr : g.data, a.data, f.data, n, delta, factor,
                                       sums);
  double weighted = 0, squared = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = p[i] - a[i];
    weighted += f[i] * d * d;
    squared += d * d;
    if (mode == Mode::kValue) continue;
    const double added = factor * (f[i] + delta) * d, old = mode == Mode::kAccumulate ? g0[i] : 0;
    // Each of at most six operations rounds once, then the result is stored.
    const double arithmetic = 6 * unit * (std::abs(added) + std::abs(old));
    const double bound = arithmetic + Format<G>::unit * (std::abs(added + old) + arithmetic) + Format<G>::step;
    expect_near(kernel, "gradient", n, i, Format<G>::value(g.data[i]), added + old, bound);
  }
  // All terms are positive: each addition of the longest possible chain rounds at most the whole sum once.
  expect_near(kernel, "sum of F d^2", n, 0, sums[0], start[0] + weighted, (n + 6) * unit * weighted + 1e-15 * sums[0]);
  expect_near(kernel, "sum of d^2", n, 0, sums[1], start[1] + squared, (n + 6) * unit * squared + 1e-15 * sums[1]);
  if (mode == Mode::kValue) {
    expect_near(kernel, "bytes written", n, 0, std::memcmp(g.data, before.data, n * sizeof(G)), 0, 0);
  }
  expect_untouched(kernel, g, before.storage);
}

template <typename From, typename To, void (*convert)(const void*, void*, int64_t)>
void check_conversion(const char* kernel, int64_t n, int64_t offset, Random& random) {
  const Values<From> from(n, offset, random);
  Values<To> to(n, offset, random);
  const std::vector<To> before = to.storage;
  convert(from.data, to.data, n);
  for (int64_t i = 0; i < n; ++i) {
    const double bound = Format<To>::unit >= Format<From>::unit ? Format<To>::unit * std::abs(from[i]) + Format<To>::step : 0;
    expect_near(kernel, "element", n, i, to[i], from[i], bound);
  }
  expect_untouched(kernel, to, before);
}

template <typename S>
void check_scale(const char* kernel, int64_t n, int64_t offset, Random& random) {
  Values<S> data(n, offset, random);
  const Values<S> old = data;
  std::vector<double> before(n);
  for (int64_t i = 0; i < n; ++i) before[i] = data[i];
  const double factor = 0.75;
  ewc::scale_block<S>(data.data, n, factor);
  for (int64_t i = 0; i < n; ++i) {
    const double wanted = factor * before[i];
    expect_near(kernel, "element", n, i, data[i], wanted, 2 * Format<S>::unit * std::abs(wanted) + Format<S>::step);
  }
  expect_untouched(kernel, data, old.storage);
}

void check_stream(int64_t n, int64_t offset, Random& random) {
  const Values<float> from(n, 0, random);
  Values<float> to(n, offset, random);
  const std::vector<float> before = to.storage;
  ewc::stream_copy(to.data, from.data, n * sizeof(float));
  ewc::stream_fence();
  for (int64_t i = 0; i < n; ++i) expect_near("stream", "element", n, i, to[i], from[i], 0);
  expect_untouched("stream", to, before);
}

// Elements [start, n) of a Fisher, and rows with a gap between them.
template <typename G, typename M>
void check_fisher(const char* kernel, int64_t n, int64_t offset, Random& random) {
  for (int64_t rows : {1, 2, 3, 4, 5, 9}) {
    const int64_t stride = n + offset, start = n / 3;
    Values<M> fisher(n, offset, random, true);
    const Values<G> grads(rows * stride, offset, random);
    const Values<M> before = fisher;
    const double weight = -0.75;
    ewc::fisher_chunk<G, M>({fisher.data, grads.data, n, rows, stride}, start, n, weight);
    for (int64_t i = 0; i < n; ++i) {
      const double old = Format<M>::value(before.storage[offset + i]);
      double squares = 0;
      for (int64_t r = 0; r < rows && i >= start; ++r) squares += std::pow(grads[r * stride + i], 2);
      // Widening and squaring, the additions of at most 4 rows, the product; then each four rows round the sum. What is
      // expected in fp64 has been rounded as often.
      const double unit = (sizeof(M) == 8 ? 2 : 1) * Format<M>::unit;
      const double bound = unit * (8 * 0.75 * squares + (rows / 4 + 1) * (old + 0.75 * squares));
      expect_near(kernel, "element", n, i, fisher[i], old + weight * squares, i < start ? 0 : bound);
    }
    expect_untouched(kernel, fisher, before.storage);
  }
}

// One input channel and row of a convolution's kernel; rows of x and of results have gaps behind them.
void check_conv_row(int64_t out, int64_t wide, int64_t rows, int64_t columns, int64_t dilation, Random& random) {
  const int64_t x_row = columns + dilation * (wide - 1) + 3, plane = rows * columns, next = wide + 2;
  const Values<float> g(out * plane, 1, random), x(rows * x_row, 3, random);
  Values<float> squares(out * next, 1, random, true);
  const Values<float> before = squares;
  ewc::conv_row({g.data, x.data, plane, rows, columns, x_row, dilation, next, squares.data}, out, wide);
  for (int64_t i = 0; i < out * next; ++i) {
    const int64_t o = i / next, b = i % next;
    double sum = 0, size = 0;
    for (int64_t y = 0; y < rows && b < wide; ++y) {
      for (int64_t c = 0; c < columns; ++c) {
        const double term = g[o * plane + y * columns + c] * x[y * x_row + c + b * dilation];
        sum += term;
        size += std::abs(term);
      }
    }
    const double old = Format<float>::value(before.storage[1 + i]), unit = Format<float>::unit;
    const double off = (plane + 8) * unit * size;
    const double bound = b < wide ? 2 * std::abs(sum) * off + off * off + 3 * unit * (sum * sum + old) : 0;
    expect_near("conv_row", "element", columns, i, squares[i], old + sum * sum, bound);
  }
  expect_untouched("conv_row", squares, before.storage);
}

template <typename P, typename G, typename A, typename F>
void check_modes(const char* kernel, int64_t n, int64_t offset, Random& random) {
  check_penalty<Mode::kValue, P, G, A, F>(kernel, n, offset, random);
  check_penalty<Mode::kWrite, P, G, A, F>(kernel, n, offset, random);
  check_penalty<Mode::kAccumulate, P, G, A, F>(kernel, n, offset, random);
}

void check_fishers(int64_t n, int64_t offset, Random& random) {
  check_fisher<float, float>("Fisher, fp32", n, offset, random);
  check_fisher<bf16, float>("Fisher, bf16", n, offset, random);
  check_fisher<f16, float>("Fisher, fp16", n, offset, random);
  check_fisher<double, float>("Fisher, fp64 in fp32", n, offset, random);
  check_fisher<double, double>("Fisher, fp64", n, offset, random);
  check_fisher<f16, double>("Fisher, fp16 in fp64", n, offset, random);
}

void check_all(uint64_t seed) {
  Random random(seed);
  for (int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 2047, 2048}) {
    for (int64_t offset : {0, 1, 3}) {
      check_modes<float, float, float, float>("fp32", n, offset, random);
      check_modes<float, float, float, bf16>("fp32, bf16 Fisher", n, offset, random);
      check_modes<float, float, bf16, bf16>("fp32, bf16 anchor and Fisher", n, offset, random);
      check_modes<bf16, bf16, bf16, bf16>("bf16", n, offset, random);
      check_modes<f16, f16, float, float>("fp16, fp32 anchor and Fisher", n, offset, random);
      check_modes<double, double, double, double>("fp64", n, offset, random);
      check_conversion<f16, float, ewc::widen<f16, float>>("widen fp16", n, offset, random);
      check_conversion<bf16, double, ewc::widen<bf16, double>>("widen bf16 to fp64", n, offset, random);
      check_conversion<float, f16, ewc::narrow<f16, float>>("narrow to fp16", n, offset, random);
      check_conversion<float, bf16, ewc::narrow<bf16, float>>("narrow to bf16", n, offset, random);
      check_conversion<double, float, ewc::narrow<float, double>>("narrow fp64 to fp32", n, offset, random);
      check_scale<float>("scale fp32", n, offset, random);
      check_scale<bf16>("scale bf16", n, offset, random);
      check_scale<f16>("scale fp16", n, offset, random);
      check_stream(n, offset, random);
      check_fishers(n, offset, random);
    }
  }
  for (int64_t out : {1, 3, 4, 5, 9}) {
    for (int64_t wide : {1, 2, 3, 4, 7}) {
      for (int64_t columns : {8, 16, 24, 25, 31}) {  // whole vectors, or at least three
        for (int64_t dilation : {1, 2}) {
          check_conv_row(out, wide, 1, columns, dilation, random);
          check_conv_row(out, wide, 3, columns, dilation, random);
        }
      }
    }
  }
  check_fishers(2 * kBlock + 1, 0, random);  // several blocks
  check_fishers(5000, 3, random);
}

alignas(64) char buffers[4][kBlock * sizeof(double)];

template <typename G>
void count_fisher() {
  alignas(64) static float fisher[kBlock];
  alignas(64) static G grads[4 * kBlock];
  ewc::fisher_block<1>(fisher, grads, kBlock, kBlock, 1.0f);
  ewc::fisher_block<4>(fisher, grads, kBlock, kBlock, 1.0f);
}

template <typename P, typename G, typename A, typename F>
void count_modes(int64_t calls) {
  double sums[2] = {0, 0};
  for (int64_t i = 0; i < calls; ++i) {
    ewc::penalty_block<Mode::kValue, P, G, A, F>(buffers[0], nullptr, buffers[2], buffers[3], kBlock, 0, 1, sums);
    ewc::penalty_block<Mode::kWrite, P, G, A, F>(buffers[0], buffers[1], buffers[2], buffers[3], kBlock, 0, 1, sums);
    ewc::penalty_block<Mode::kAccumulate, P, G, A, F>(buffers[0], buffers[1], buffers[2], buffers[3], kBlock, 0, 1, sums);
  }
}

void count_all(int64_t calls) {
  count_modes<float, float, float, float>(calls);
  count_modes<float, float, float, bf16>(calls);
  count_modes<float, float, bf16, bf16>(calls);
  count_modes<bf16, bf16, bf16, bf16>(calls);
  count_modes<f16, f16, float, float>(calls);
  count_modes<double, double, double, double>(calls);
  for (int64_t i = 0; i < calls; ++i) {
    ewc::widen<f16, float>(buffers[0], buffers[1], kBlock);
    ewc::narrow<f16, float>(buffers[0], buffers[1], kBlock);
    ewc::widen<bf16, double>(buffers[0], buffers[1], kBlock);
    ewc::narrow<bf16, float>(buffers[0], buffers[1], kBlock);
    ewc::scale_block<float>(buffers[0], kBlock, 1);
    ewc::scale_block<bf16>(buffers[0], kBlock, 1);
    count_fisher<float>();
    count_fisher<bf16>();
    count_fisher<f16>();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "check") == 0) {
    check_all(std::strtoull(argv[2], nullptr, 10));
  } else if (argc == 3 && std::strcmp(argv[1], "count") == 0) {
    count_all(std::strtoll(argv[2], nullptr, 10));
  } else {
    std::fprintf(stderr, "usage: %s check SEED | count CALLS\n", argv[0]);
    return 2;
  }
  if (failures > 0) std::printf("%d differences\n", failures);
  return failures > 0;
}
