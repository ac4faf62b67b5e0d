// The formulas of ewc_fast, each written once, for host and device. No torch headers.
//
// Storage types are plain bit patterns, so that this file compiles with any C++17 compiler and with nvcc.
// Conversions are integer arithmetic: compilers vectorise it, which they often fail to do with conversion calls. Devices
// have instructions for them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define EWC_HD __host__ __device__ __forceinline__
#define EWC_INLINE
#else
#define EWC_HD inline __attribute__((always_inline))
#define EWC_INLINE __attribute__((always_inline))
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

// ---- optimizer steps with a penalty ----
//
// coupled:   the penalty's gradient joins the task's before the step; its value is taken at the weights before the step
// proximal:  after the step   theta = (D theta + c anchor) / (D + c),   c = lr lambda scale (F + delta),
//            with the metric D that makes a constant gradient g the step lr g / D; its value is taken between the two

enum class Coupling { kNone, kCoupled, kProximal };

// lambda is not 0 where this is used: else what is read changes nothing, whatever it is.
template <typename M>
struct Pull {
  M delta;
  M factor;  // lambda scale
  M lr;
};

// Where there is neither metric nor weight the parameter stays. A weight of infinity would be NaN.
template <typename M>
EWC_HD M pulled(M parameter, M anchor, M metric, M weight) {
  const M finite = weight < M(1e38) ? weight : M(1e38), total = metric + finite;
  return total > M(0) ? parameter + finite / total * (anchor - parameter) : parameter;
}

// The penalty around an element's update, which is `update(gradient, parameter)` and returns the metric.
template <Coupling coupling, typename M, typename Update>
EWC_HD void with_penalty(M& parameter, M gradient, M anchor, M fisher, const Pull<M>& pull, M& weighted, M& squared,
                         Update update) {
  if constexpr (coupling == Coupling::kCoupled) {
    const auto term = penalty_term(parameter, anchor, fisher, pull.delta);
    weighted += term.weighted;
    squared += term.squared;
    gradient += pull.factor * term.gradient;
  }
  const M metric = update(gradient, parameter);
  if constexpr (coupling == Coupling::kProximal) {
    const auto term = penalty_term(parameter, anchor, fisher, pull.delta);
    weighted += term.weighted;
    squared += term.squared;
    parameter = pulled(parameter, anchor, metric, pull.lr * pull.factor * (fisher + pull.delta));
  }
}

template <typename M>
EWC_HD M square_root(M x) {
  return std::sqrt(x);
}

// ---- AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW ----

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// What a tensor's step needs; `step` counts this one.
template <typename M>
struct AdamWStep {
  M sign, kept, beta1_rest, beta2, beta2_rest, size, root, eps;
};
template <typename M>
EWC_HD AdamWStep<M> adamw_step(const AdamWOptions& o, double step) {
  const double correction1 = 1.0 - pow(o.beta1, step), correction2 = 1.0 - pow(o.beta2, step);
  return {static_cast<M>(o.maximize ? -1 : 1),  static_cast<M>(1.0 - o.lr * o.weight_decay),
          static_cast<M>(1.0 - o.beta1),        static_cast<M>(o.beta2),
          static_cast<M>(1.0 - o.beta2),        static_cast<M>(o.lr / correction1),
          static_cast<M>(1.0 / sqrt(correction2)), static_cast<M>(o.eps)};
}

// One element's decay, moments and update; returns the metric. `largest` is amsgrad's, or the second moment itself.
template <bool amsgrad, typename M>
EWC_HD M adamw_update(const AdamWStep<M>& s, M gradient, M& parameter, M& first, M& second, M& largest) {
  parameter *= s.kept;
  first += s.beta1_rest * (gradient - first);
  second = s.beta2 * second + s.beta2_rest * gradient * gradient;
  // Written so that NaN stays, as in torch.maximum.
  if constexpr (amsgrad) largest = largest >= second ? largest : second;
  const M metric = square_root(amsgrad ? largest : second) * s.root + s.eps;
  parameter -= s.size * (first / metric);
  return metric;
}

// ---- SGD, as torch.optim.SGD ----

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

enum class Momentum { kNone, kPlain, kNesterov };

template <typename M>
struct SgdStep {
  M sign, decay, carried, rest, momentum, lr, metric;
};
// first: there is no momentum yet, and the gradient becomes it undamped.
template <typename M>
EWC_HD SgdStep<M> sgd_step(const SgdOptions& o, bool first) {
  return {static_cast<M>(o.maximize ? -1 : 1),
          static_cast<M>(o.weight_decay),
          static_cast<M>(first ? 0.0 : o.momentum),
          static_cast<M>(first ? 1.0 : 1.0 - o.dampening),
          static_cast<M>(o.momentum),
          static_cast<M>(o.lr),
          static_cast<M>(o.momentum == 0.0 ? 1.0 : (1.0 - o.momentum) / (1.0 - o.dampening))};
}

// decays: whether there is a weight decay. 0 times an infinite weight would be NaN.
template <Momentum kind, bool decays, typename M>
EWC_HD void sgd_update(const SgdStep<M>& s, M gradient, M& parameter, M& buffer) {
  if constexpr (decays) gradient += s.decay * parameter;
  if constexpr (kind != Momentum::kNone) {
    buffer = s.carried * buffer + s.rest * gradient;
    gradient = kind == Momentum::kNesterov ? gradient + s.momentum * buffer : buffer;
  }
  parameter -= s.lr * gradient;
}

// ---- any optimizer's metric, from one tensor of its state or none ----
//
//   kConstant: factor      kLinear: factor * x      kRoot: factor * (sqrt(inner * x) + eps)

enum class Metric { kConstant, kLinear, kRoot };

template <typename M>
struct MetricStep {
  M factor, inner, eps;
};

template <Metric kind, typename M>
EWC_HD M metric_of(M factor, M inner, M eps, M x) {
  if constexpr (kind == Metric::kConstant) return factor;
  if constexpr (kind == Metric::kLinear) return factor * x;
  return factor * (square_root(inner * x) + eps);
}

// ---- stochastic rounding to bf16: up with the probability of the part that is dropped ----
//
// Numbers are keyed on (seed, step, tensor, list) and the element, never on who computes it.

EWC_HD uint32_t mix(uint32_t x) {  // https://nullprogram.com/blog/2018/07/31/
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

EWC_HD uint32_t rounding_key(uint32_t seed, uint32_t step, uint32_t tensor, uint32_t list) {
  return mix(mix(mix(mix(seed) + step) + tensor) + list);
}

// The element's number, folded: low bits change from element to element, `high_part` every 2^32.
EWC_HD uint32_t high_part(uint64_t element) { return static_cast<uint32_t>(element >> 32) * 0x9e3779b9u; }

EWC_HD bf16 store_stochastic(float x, uint32_t key, uint32_t element, uint32_t high) {
  const uint32_t random = mix(mix(element ^ high) + key);
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = bits + (random >> 16);
  // Infinity would be carried into NaN, and NaN perhaps into 0.
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fc00000u : bits;
  return bf16{static_cast<uint16_t>((magnitude >= 0x7f800000u ? special : rounded) >> 16)};
}

}  // namespace ewc
