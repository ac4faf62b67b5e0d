// The formulas of ewc_fast, each written once, for host and device. No torch headers.
//
// Storage types are plain bit patterns, so that this file compiles with any C++17 compiler and with nvcc.
// Conversions are integer arithmetic: compilers vectorise it, which they often fail to do with conversion calls. Devices
// have instructions for them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define EWC_HD __host__ __device__ __forceinline__
#else
#define EWC_HD inline __attribute__((always_inline))
#endif

namespace ewc {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename To, typename From>
EWC_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- storage -> math ----

template <typename M>
EWC_HD M load_as(double x) {
  return static_cast<M>(x);
}
template <typename M>
EWC_HD M load_as(float x) {
  return static_cast<M>(x);
}
template <typename M>
EWC_HD M load_as(bf16 x) {
  return static_cast<M>(bit_cast<float>(static_cast<uint32_t>(x.bits) << 16));
}
template <typename M>
EWC_HD M load_as(f16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));  // one instruction; below are a dozen
  return static_cast<M>(value);
#else
  // The exponent is re-biased by adding 112 to it; a subnormal (exponent 0) gets one more and the implicit bit, which
  // was never there, is subtracted again in fp32, exactly; infinity and NaN (exponent 31) are re-biased twice.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const float normal = bit_cast<float>(magnitude + 0x38000000u + (exponent == 0x0f800000u ? 0x38000000u : 0u));
  const float subnormal = bit_cast<float>(magnitude + 0x38800000u) - bit_cast<float>(0x38800000u);
  const uint32_t bits = bit_cast<uint32_t>(exponent == 0 ? subnormal : normal);
  return static_cast<M>(bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16)));
#endif
}

// ---- math -> storage, rounded to nearest even ----

template <typename S>
struct Store;

template <>
struct Store<double> {
  template <typename M>
  static EWC_HD double from(M x) {
    return static_cast<double>(x);
  }
};
template <>
struct Store<float> {
  template <typename M>
  static EWC_HD float from(M x) {
    return static_cast<float>(x);
  }
};
template <>
struct Store<bf16> {
  template <typename M>
  static EWC_HD bf16 from(M x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bf16 value;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(static_cast<float>(x)));
    return value;
#else
    const float value = static_cast<float>(x);
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    // Rounding could carry a NaN into infinity. Selected at 32 bits: at 16 the vector code packs and unpacks once more.
    return bf16{static_cast<uint16_t>((value != value ? 0x7fc00000u : rounded) >> 16)};
#endif
  }
};
template <>
struct Store<f16> {
  template <typename M>
  static EWC_HD f16 from(M x) {
#if defined(__CUDA_ARCH__)
    f16 value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(static_cast<float>(x)));
    return value;
#else
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(x));
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal: re-bias the exponent, round the 13 dropped bits to nearest even; a carry may reach infinity, as it should.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the end of the fp32 significand.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;                                  // 65520 and above: infinity
    half = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x1ffu)) : half;  // NaN stays NaN
    return f16{static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
#endif
  }
};

// The type the arithmetic is done in: fp64 for fp64 parameters, fp32 for everything else.
template <typename Parameter>
struct MathOf {
  using type = float;
};
template <>
struct MathOf<double> {
  using type = double;
};

// ---- the penalty (Kirkpatrick et al. 2017, eq. 3) ----
//
//   penalty  = lambda/2 * scale * (sum F d^2 + C + delta * sum d^2),   d = theta - anchor
//   gradient = lambda   * scale * (F + delta) * d
//   forgetting predicted by the quadratic, in the Fisher's unit:  (sum F d^2 + C) / 2

// What a pass does with the gradient.
enum class Mode { kValue, kWrite, kAccumulate };

template <typename M>
struct PenaltyTerm {
  M weighted;  // F d^2
  M squared;   // d^2
  M gradient;  // (F + delta) d, without lambda
};

template <typename M>
EWC_HD PenaltyTerm<M> penalty_term(M parameter, M anchor, M fisher, M delta) {
  const M d = parameter - anchor;
  return {fisher * d * d, d * d, (fisher + delta) * d};
}

// What multiplies PenaltyTerm::gradient. `loss_scale` is a GradScaler's; a maximising optimizer subtracts the penalty.
EWC_HD double gradient_factor(double ewc_lambda, double scale, double loss_scale, bool maximize) {
  const double factor = ewc_lambda * scale * loss_scale;
  return maximize ? -factor : factor;
}

// One tensor's penalty from its sums. At lambda 0 nothing is penalised, whatever the sums are.
EWC_HD double penalty_value(double ewc_lambda, double delta, double scale, double weighted, double constant,
                            double squared) {
  const double isotropic = delta == 0.0 ? 0.0 : delta * squared;  // squared may have overflowed
  return ewc_lambda == 0.0 ? 0.0 : 0.5 * ewc_lambda * scale * (weighted + constant + isotropic);
}

EWC_HD double predicted_forgetting(double weighted, double constant) { return 0.5 * (weighted + constant); }

// ---- the Fisher (Kirkpatrick et al. 2017; Martens 2020, eq. 6) ----
//
//   F += weight * sum over samples of g^2

template <typename M>
EWC_HD M add_square(M sum, M gradient) {
  return sum + gradient * gradient;
}

template <typename M>
EWC_HD M add_weighted(M fisher, M weight, M squares) {
  return fisher + weight * squares;
}

}  // namespace ewc
