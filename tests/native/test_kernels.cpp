// The CUDA kernels under the host emulation, against loops in fp64 that are written from the formula alone.
//
//   test_kernels SEED
//
// Two kinds of data. Exact: small integers, for which every fp32 operation of the kernels is exact, whatever its order,
// so that results must be equal and one element dropped, doubled or misplaced shows. Random: against error bounds.
//
// The bounds. u is the unit roundoff of the arithmetic: 2^-24, for fp64 parameters 2^-53.
//   Sums: F d^2 and d^2 take at most 4 operations, each with error u; a thread then adds at most kChunk / kThreads + 1
//   of these terms, none negative. From there on it is fp64: under 100 additions on the way to a tensor's sum.
//   Gradient: t = factor (F + delta) d has at most 7 roundings (factor, delta and d among them), g + t one more, then
//   the storage type rounds, subnormals absolutely; fp64 is stored as fp16 by way of fp32, which rounds once more.
//   Operands that are wider than the arithmetic are rounded to it first: an anchor in d with error u |anchor|.
//   The Fisher: a square has at most 3 roundings (a gradient wider than the arithmetic counts twice), each of the additions
//   of rows one, the weight, its product and the last sum one each.
//   Optimizer steps: some 40 roundings, of numbers of about 1.
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <functional>
#include <limits>
#include <set>
#include <string>

#include "adamw.cu"
#include "counters.h"
#include "fisher.cu"
#include "penalty_accumulate.cu"
#include "penalty_value.cu"
#include "penalty_write.cu"
#include "proximal.cu"
#include "scale.cu"
#include "sgd.cu"

namespace {

using ewc::Dtype;
using ewc::kChunk;
using ewc::kTensorsPerLaunch;
using ewc::kThreads;
using ewc::Mode;
using ewc::Scalar;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr Dtype kF64 = Dtype::kFloat64, kF32 = Dtype::kFloat32, kB16 = Dtype::kBFloat16, kF16 = Dtype::kFloat16;

std::string context;
int failures = 0;
int64_t checks = 0;

void check(bool holds, const char* format, ...) {
  ++checks;
  if (holds || ++failures > 20) return;
  std::fprintf(stderr, "FAILED %s: ", context.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}

bool same(double got, double expected) { return got == expected || (std::isnan(got) && std::isnan(expected)); }

bool close(double got, double expected, double bound) {
  return same(got, expected) || std::abs(got - expected) <= bound;
}

// ---- storage types, by arithmetic on doubles ----

struct Format {
  int bytes, digits, lowest;  // significand's bits; exponent of the smallest subnormal
  const char* name;
  double roundoff() const { return std::ldexp(1.0, -digits); }
};

Format format_of(Dtype dtype) {
  switch (dtype) {
    case kF64: return {8, 53, -1074, "fp64"};
    case kF32: return {4, 24, -149, "fp32"};
    case kB16: return {2, 8, -133, "bf16"};
    default: return {2, 11, -24, "fp16"};
  }
}

double rounded(Dtype dtype, double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const Format format = format_of(dtype);
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - format.digits, format.lowest);
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}

double decode(Dtype dtype, const void* from) {
  if (dtype == kF64) return *static_cast<const double*>(from);
  if (dtype == kF32) return *static_cast<const float*>(from);
  const unsigned bits = *static_cast<const uint16_t*>(from);
  const int fraction_bits = format_of(dtype).digits - 1;
  const int exponents = (1 << (15 - fraction_bits)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & exponents;
  const double fraction = bits & ((1u << fraction_bits) - 1);
  const double sign = bits & 0x8000u ? -1 : 1;
  if (exponent == exponents) return fraction != 0 ? kNaN : sign * std::numeric_limits<double>::infinity();
  const double significand = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
  return sign * std::ldexp(significand, std::max(exponent, 1) - 1 + format_of(dtype).lowest);
}

// x has to be a value of the type.
void encode(Dtype dtype, double x, void* to) {
  if (dtype == kF64) {
    *static_cast<double*>(to) = x;
  } else if (dtype == kF32) {
    *static_cast<float*>(to) = static_cast<float>(x);
  } else {
    const Format format = format_of(dtype);
    const int fraction_bits = format.digits - 1;
    unsigned bits = std::signbit(x) ? 0x8000u : 0;
    if (std::isnan(x)) {
      bits = 0x7fffu;
    } else if (x != 0) {
      int exponent;
      std::frexp(x, &exponent);
      const int unit = std::max(exponent - format.digits, format.lowest);
      const auto significand = static_cast<unsigned>(std::ldexp(std::abs(x), -unit));
      bits += (static_cast<unsigned>(unit - format.lowest) << fraction_bits) + significand;  // the implicit bit carries
    }
    *static_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
  }
}

// Elements that end where the allocation does, for AddressSanitizer, and start `shift` elements after a 64-byte
// boundary.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t numel, int64_t shift = 0) : dtype_(dtype), shift_(shift) {
    bytes_ = (numel + shift) * format_of(dtype).bytes;
    if (posix_memalign(&memory_, 64, std::max<int64_t>(bytes_, 1)) != 0) std::abort();
    std::memset(memory_, 0x5a, bytes_);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    std::swap(dtype_, other.dtype_);
    std::swap(shift_, other.shift_);
    return *this;
  }
  ~Buffer() { std::free(memory_); }

  void* at(int64_t i) const { return static_cast<char*>(memory_) + (i + shift_) * format_of(dtype_).bytes; }
  void* data() const { return at(0); }
  double get(int64_t i) const { return decode(dtype_, at(i)); }
  void set(int64_t i, double x) { encode(dtype_, x, at(i)); }
  std::string bytes() const { return {static_cast<const char*>(memory_), static_cast<size_t>(bytes_)}; }
  void restore(const std::string& bytes) { std::memcpy(memory_, bytes.data(), bytes.size()); }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
  Dtype dtype_ = kF32;
  int64_t shift_ = 0;
};

// ---- the penalty ----

struct Case {
  Mode mode = Mode::kAccumulate;
  Dtype p = kF32, g = kF32, a = kF32, f = kF32;
  std::vector<int64_t> sizes = {1000};
  bool exact = true;
  int64_t p_shift = 0, g_shift = 0, state_shift = 0;  // elements
  double ewc_lambda = 2, delta = 0.5;
  bool per_tensor = true;  // scale and constant
  bool fp64_scalars = true;
  double grad_scale = 0;  // 0: absent
  int found_inf = -1;     // -1: absent
  bool maximize = false;
  int64_t nan_tensor = -1, nan_element = 0;
  bool null_gradients = false;  // to show that they are not touched
  bool static_counters = false;
  int64_t chunk = kChunk;
};

struct Outputs {
  std::string penalty, predicted, by_tensor, gradients;
  bool operator==(const Outputs& o) const {
    return penalty == o.penalty && predicted == o.predicted && by_tensor == o.by_tensor && gradients == o.gradients;
  }
};

std::string describe(const Case& c) {
  const char* modes[] = {"value", "write", "accumulate"};
  std::string text = modes[static_cast<int>(c.mode)];
  for (const Dtype dtype : {c.p, c.g, c.a, c.f}) text += std::string(" ") + format_of(dtype).name;
  text += c.exact ? " exact" : " random";
  text += " tensors " + std::to_string(c.sizes.size()) + " sizes";
  for (size_t i = 0; i < c.sizes.size() && i < 8; ++i) text += " " + std::to_string(c.sizes[i]);
  text += " shifts " + std::to_string(c.p_shift) + std::to_string(c.g_shift) + std::to_string(c.state_shift);
  text += " chunk " + std::to_string(c.chunk) + " lambda " + std::to_string(c.ewc_lambda);
  text += " found_inf " + std::to_string(c.found_inf);
  return text;
}

using Launch = cudaError_t (*)(const ewc::PenaltyLaunch&, cudaStream_t);

// Runs the case under several orders and grids, which must agree to the bit, and checks the outputs.
Outputs run(const Case& c, uint64_t seed, int repeats = 2) {
  context = describe(c);
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(-1, 1)(random); };
  const auto integer = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };

  const auto n = static_cast<int64_t>(c.sizes.size());
  std::vector<int64_t> offsets;
  int64_t total = 0, chunks = 0;
  for (const int64_t size : c.sizes) {
    offsets.push_back(total);
    total += (size + 31) / 32 * 32 + 32 * integer(0, 1);
    chunks += (size + c.chunk - 1) / c.chunk;
  }
  Buffer anchor(c.a, total, c.state_shift), fisher(c.f, total, c.state_shift), flat(c.g, total, c.g_shift);
  for (int64_t i = 0; i < total; ++i) {  // what lies between tensors must not be read
    anchor.set(i, kNaN);
    fisher.set(i, kNaN);
    flat.set(i, 77);
  }
  std::vector<Buffer> params, grads;
  for (int64_t t = 0; t < n; ++t) {
    params.emplace_back(c.p, c.sizes[t], c.p_shift);
    grads.emplace_back(c.g, c.sizes[t], c.g_shift);
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double theta = c.exact ? integer(-3, 3) : uniform();
      const double old = c.exact ? theta + integer(-2, 2) : theta + 0.1 * uniform();
      const double information = c.exact ? integer(0, 3) : std::pow(uniform(), 2);
      const double task = c.exact ? integer(-8, 8) : uniform();
      params[t].set(i, rounded(c.p, theta));
      anchor.set(offsets[t] + i, rounded(c.a, old));
      fisher.set(offsets[t] + i, rounded(c.f, information));
      grads[t].set(i, rounded(c.g, task));
    }
  }
  if (c.nan_tensor >= 0) params[c.nan_tensor].set(c.nan_element, kNaN);

  const Dtype scalars = c.fp64_scalars ? kF64 : kF32, results = c.p == kF64 ? kF64 : kF32;
  const auto scalar_buffer = [&](double x) {
    Buffer buffer(scalars, 1);
    buffer.set(0, rounded(scalars, x));
    return buffer;
  };
  const Buffer ewc_lambda = scalar_buffer(c.ewc_lambda), delta = scalar_buffer(c.delta);
  const Buffer grad_scale = scalar_buffer(c.grad_scale), found_inf = scalar_buffer(c.found_inf);
  Buffer scale(scalars, n), constant(kF64, n);
  for (int64_t t = 0; t < n; ++t) {
    scale.set(t, c.exact ? std::ldexp(1.0, integer(-1, 1)) : rounded(scalars, 1.5 + uniform()));
    constant.set(t, c.exact ? integer(0, 9) : 1 + uniform());
  }
  Buffer penalty(results, 1), predicted(results, 1), by_tensor(kF64, 2 * n), slots(kF64, 2 * chunks);
  ewc::Counters own_counters{0, 0};

  std::vector<ewc::Entry> entries;
  for (int64_t t = 0; t < n; ++t) {
    void* gradient = c.mode == Mode::kValue || c.null_gradients ? nullptr
                     : c.mode == Mode::kWrite                   ? flat.at(offsets[t])
                                                                : grads[t].data();
    entries.push_back({params[t].data(), gradient, offsets[t], c.sizes[t]});
  }
  const bool fp64 = c.fp64_scalars;
  const auto when = [](bool present, const Buffer& buffer, bool is_fp64) {
    return present ? Scalar{buffer.data(), is_fp64} : Scalar{};
  };
  ewc::PenaltyLaunch launch{};
  launch.entries = entries.data();
  launch.num_tensors = n;
  launch.anchor = anchor.data();
  launch.fisher = fisher.data();
  launch.param_dtype = c.p;
  launch.grad_dtype = c.g;
  launch.anchor_dtype = c.a;
  launch.fisher_dtype = c.f;
  launch.ewc_lambda = {ewc_lambda.data(), fp64};
  launch.delta = {delta.data(), fp64};
  launch.scale = when(c.per_tensor, scale, fp64);
  launch.constant = when(c.per_tensor, constant, true);
  launch.grad_scale = when(c.grad_scale != 0, grad_scale, fp64);
  launch.found_inf = when(c.found_inf >= 0, found_inf, fp64);
  launch.maximize = c.maximize;
  launch.penalty = penalty.data();
  launch.predicted = predicted.data();
  launch.by_tensor = static_cast<double*>(by_tensor.data());
  launch.slots = static_cast<double2*>(slots.data());
  launch.chunk = c.chunk;
  launch.counters.index = integer(0, ewc::kStreamCounters + ewc::kCaptureCounters - 1);
  if (!c.static_counters) launch.counters.address = &own_counters;
  const Launch launcher = c.mode == Mode::kValue   ? ewc::launch_penalty<Mode::kValue>
                          : c.mode == Mode::kWrite ? ewc::launch_penalty<Mode::kWrite>
                                                   : ewc::launch_penalty<Mode::kAccumulate>;

  // Inputs as they were, for comparison afterwards.
  const std::string old_anchor = anchor.bytes(), old_fisher = fisher.bytes(), old_flat = flat.bytes();
  std::vector<std::string> old_params, old_grads;
  for (const Buffer& buffer : params) old_params.push_back(buffer.bytes());
  for (const Buffer& buffer : grads) old_grads.push_back(buffer.bytes());
  const auto gradients = [&] {
    std::string all = flat.bytes();
    for (const Buffer& buffer : grads) all += buffer.bytes();
    return all;
  };

  Outputs outputs;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    flat.restore(old_flat);
    for (int64_t t = 0; t < n; ++t) grads[t].restore(old_grads[t]);
    for (int64_t i = 0; i < 2 * n; ++i) by_tensor.set(i, kNaN);
    for (int64_t i = 0; i < 2 * chunks; ++i) slots.set(i, kNaN);
    penalty.set(0, -1);
    predicted.set(0, -1);
    launch.multiprocessors = std::vector<int>{5, 1, 2}[repeat % 3];
    emulation::device.random.seed(seed + repeat);
    emulation::device.launches = emulation::device.memsets = 0;
    check(launcher(launch, nullptr) == cudaSuccess, "the launch failed");
    const int64_t launches = std::max<int64_t>(1, (n + kTensorsPerLaunch - 1) / kTensorsPerLaunch);
    check(emulation::device.launches == launches, "%d launches", emulation::device.launches);
    check(emulation::device.memsets == 0, "%d memsets", emulation::device.memsets);
    const ewc::Counters left = c.static_counters ? ewc::static_counters[launch.counters.index] : own_counters;
    check(left.taken == 0 && left.finished == 0, "the counters are left at %u and %u", left.taken, left.finished);
    const Outputs now = {penalty.bytes(), predicted.bytes(), by_tensor.bytes(), gradients()};
    if (repeat == 0) outputs = now;
    check(now == outputs, "other bits in repeat %d", repeat);
  }
  check(anchor.bytes() == old_anchor && fisher.bytes() == old_fisher, "the state was written");
  for (int64_t t = 0; t < n; ++t) check(params[t].bytes() == old_params[t], "parameter %" PRId64 " was written", t);

  // The formula.
  const double u = c.p == kF64 ? std::ldexp(1.0, -53) : std::ldexp(1.0, -24);
  const double sum_bound = c.exact ? 0 : (4 + kChunk / kThreads + 1) * u + 100 * std::ldexp(1.0, -53);
  const double lambda = ewc_lambda.get(0), damping = delta.get(0);
  const bool wide_anchor = c.a == kF64 && c.p != kF64, wide_task = c.g == kF64 && c.p != kF64;
  const bool acts = lambda != 0 && c.found_inf != 1;
  const Format stored = format_of(c.g);
  double all = 0, forgetting = 0, all_bound = 0, forgetting_bound = 0;
  for (int64_t t = 0; t < n; ++t) {
    const double s = c.per_tensor ? scale.get(t) : 1, constant_t = c.per_tensor ? constant.get(t) : 0;
    const double factor = (c.maximize ? -1 : 1) * lambda * s * (c.grad_scale != 0 ? grad_scale.get(0) : 1);
    double weighted = 0, squared = 0, weighted_bound = 0, squared_bound = 0;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double old = anchor.get(offsets[t] + i), information = fisher.get(offsets[t] + i);
      const double d = params[t].get(i) - old, d_bound = wide_anchor && !c.exact ? u * std::abs(old) : 0;
      weighted += information * d * d;
      squared += d * d;
      weighted_bound += information * (2 * std::abs(d) + d_bound) * d_bound;
      squared_bound += (2 * std::abs(d) + d_bound) * d_bound;
      if (c.mode == Mode::kValue || c.null_gradients) continue;
      const char* old_task = old_grads[t].data() + (c.g_shift + i) * stored.bytes;
      const double task = c.mode == Mode::kWrite ? 0 : decode(c.g, old_task);
      const double term = acts ? factor * (information + damping) * d : 0, expected = task + term;
      const double got = c.mode == Mode::kWrite ? flat.get(offsets[t] + i) : grads[t].get(i);
      double bound = 0;
      if (acts && !c.exact) {
        const double by_fp32 = c.g == kF16 ? std::ldexp(1.0, -24) : 0;
        bound = 7 * u * std::abs(term) + std::abs(factor) * (information + damping) * d_bound +
                (wide_task ? u * std::abs(task) : 0) +
                (u + 1.01 * stored.roundoff() + by_fp32) * std::abs(expected) + std::ldexp(1.0, stored.lowest - 1);
      }
      check(close(got, expected, bound), "gradient [%" PRId64 "][%" PRId64 "] is %.17g, expected %.17g", t, i, got,
            expected);
    }
    const double value = lambda == 0 ? 0 : lambda / 2 * s * (weighted + constant_t + damping * squared);
    const double predicted_t = (weighted + constant_t) / 2;
    weighted_bound += sum_bound * (weighted + constant_t);
    squared_bound += sum_bound * squared;
    const double bound = std::abs(lambda / 2 * s) * (weighted_bound + std::abs(damping) * squared_bound);
    check(close(by_tensor.get(t), value, bound), "penalty of tensor %" PRId64 " is %.17g, expected %.17g", t,
          by_tensor.get(t), value);
    check(close(by_tensor.get(n + t), predicted_t, weighted_bound / 2),
          "forgetting of tensor %" PRId64 " is %.17g, expected %.17g", t, by_tensor.get(n + t), predicted_t);
    all += value;
    all_bound += bound;
    forgetting += predicted_t;
    forgetting_bound += weighted_bound / 2;
  }
  const double last_rounding = c.exact ? 0 : format_of(results).roundoff() + 100 * std::ldexp(1.0, -53);
  check(close(penalty.get(0), c.exact ? rounded(results, all) : all, all_bound + last_rounding * std::abs(all)),
        "the penalty is %.17g, expected %.17g", penalty.get(0), all);
  check(close(predicted.get(0), c.exact ? rounded(results, forgetting) : forgetting,
              forgetting_bound + last_rounding * forgetting),
        "the forgetting is %.17g, expected %.17g", predicted.get(0), forgetting);

  // Memory that is nobody's, and gradients where the op leaves them alone.
  if (c.mode != Mode::kWrite) check(flat.bytes() == old_flat, "a buffer that is no argument was written");
  if (c.mode == Mode::kWrite) {
    int64_t next = 0;
    for (int64_t t = 0; t <= n; ++t) {
      for (const int64_t end = t < n ? offsets[t] : total; next < end; ++next) {
        check(flat.get(next) == 77, "the gap at %" PRId64 " was written", next);
      }
      if (t < n) next += c.sizes[t];
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    const size_t before = c.g_shift * stored.bytes;
    const std::string now = grads[t].bytes();
    const bool untouched = c.mode != Mode::kAccumulate || !acts;
    check(untouched ? now == old_grads[t] : now.compare(0, before, old_grads[t], 0, before) == 0,
          "memory of gradient %" PRId64 " was written that should not be", t);
  }
  return outputs;
}

constexpr Mode kModes[] = {Mode::kValue, Mode::kWrite, Mode::kAccumulate};

// Sizes at which something ends: a vector of 2, 4 or 8, what a block takes in a turn, kBlock, a chunk.
std::vector<int64_t> boundaries(int64_t chunk = kChunk) {
  std::vector<int64_t> sizes = {0, 1, 3, 2 * chunk + 5};
  for (const int64_t edge : {int64_t{2}, int64_t{4}, int64_t{8}, int64_t{kThreads} * 4, ewc::kBlock,
                             int64_t{kThreads} * 16, chunk}) {
    for (const int64_t size : {edge - 1, edge, edge + 1}) sizes.push_back(size);
  }
  return sizes;
}

void test_boundaries(const std::function<uint64_t()>& seed) {
  for (const Mode mode : kModes) {
    for (const Dtype dtype : {kF32, kB16, kF64}) {
      Case c;
      c.mode = mode;
      c.p = c.g = c.a = c.f = dtype;
      c.sizes = boundaries();
      run(c, seed(), dtype == kF32 ? 3 : 1);  // 5, 1 and 2 multiprocessors
      c.chunk = ewc::kShortestChunk;
      c.sizes = boundaries(c.chunk);
      run(c, seed(), dtype == kF32 ? 3 : 1);
    }
  }
}

void test_dtypes(const std::function<uint64_t()>& seed) {
  std::vector<std::vector<Dtype>> combinations = {{kF64, kF64, kF64, kF64}};
  for (const Dtype p : {kF32, kB16, kF16}) {
    for (const Dtype a : {kF32, kB16}) {
      for (const Dtype f : {kF32, kB16}) combinations.push_back({p, p, a, f});
    }
  }
  const std::vector<std::vector<Dtype>> generic = {{kF32, kB16, kF32, kF32}, {kB16, kF32, kB16, kF64},
                                                   {kF16, kB16, kF64, kB16}, {kF64, kF16, kF32, kB16},
                                                   {kF64, kF64, kB16, kF64}, {kF16, kF64, kF32, kF32},
                                                   {kB16, kF16, kF32, kB16}, {kF64, kB16, kF64, kF32}};
  combinations.insert(combinations.end(), generic.begin(), generic.end());
  for (const auto& dtypes : combinations) {
    for (const Mode mode : kModes) {
      for (const bool exact : {true, false}) {
        Case c;
        c.mode = mode;
        c.p = dtypes[0];
        c.g = dtypes[1];
        c.a = dtypes[2];
        c.f = dtypes[3];
        if (mode == Mode::kValue) c.g = c.p;
        c.exact = exact;
        c.sizes = {5, 4099};
        c.delta = exact ? 0.5 : 0.03;
        run(c, seed(), 1);
        c.p_shift = 1;  // element by element
        if (exact) run(c, seed(), 1);
      }
    }
  }
}

void test_alignment(const std::function<uint64_t()>& seed) {
  for (const Mode mode : kModes) {
    for (const Dtype dtype : {kF32, kB16}) {
      Case c;
      c.mode = mode;
      c.p = c.g = dtype;
      c.exact = false;
      c.sizes = {1, 1023, 5000, kChunk + 9};
      const uint64_t of_case = seed();
      const Outputs aligned = run(c, of_case, 1);
      for (const int shifts : {1, 2, 3, 4, 7}) {
        c.p_shift = shifts & 1;
        c.g_shift = shifts >> 1 & 1;
        c.state_shift = shifts >> 2 & 1;
        const Outputs shifted = run(c, of_case, 1);
        check(shifted.by_tensor == aligned.by_tensor, "the sums depend on alignment");
      }
    }
  }
}

// More chunks than a warp requests at once: each lane adds several slots, in several turns.
void test_large_tensor(const std::function<uint64_t()>& seed) {
  Case c;
  c.mode = Mode::kValue;
  c.chunk = ewc::kShortestChunk;
  c.sizes = {7, (32 * ewc::kSlotsInFlight + 34) * c.chunk + 3, 1};
  run(c, seed(), 1);
}

void test_many_tensors(const std::function<uint64_t()>& seed) {
  const int64_t full = kTensorsPerLaunch;
  const std::pair<int64_t, Mode> lists[] = {
      {full - 1, Mode::kValue}, {full, Mode::kWrite}, {full + 1, Mode::kAccumulate}, {2 * full + 1, Mode::kWrite}};
  for (const auto& [n, mode] : lists) {
    Case c;
    c.mode = mode;
    c.sizes.clear();
    for (int64_t t = 0; t < n; ++t) c.sizes.push_back(t % 7 == 3 ? 0 : 1 + t % 11);
    c.sizes[n / 2] = kChunk + 1;
    c.sizes[n - 1] = 9;
    c.static_counters = n == full + 1;
    run(c, seed(), n == full + 1 ? 2 : 1);
  }
  Case c;
  c.sizes.assign(full, 2);
  c.sizes.resize(full + 3, 0);  // a last launch of empty tensors
  run(c, seed(), 1);
}

void test_empty_tensors(const std::function<uint64_t()>& seed) {
  const std::vector<std::vector<int64_t>> lists = {
      {}, {0}, {0, 0, 0}, {0, 0, 40}, {40, 0, 0, 50}, {40, 50, 0, 0}, {0, 40, 0, kChunk, 0}};
  for (const auto& sizes : lists) {
    for (const Mode mode : kModes) {
      Case c;
      c.mode = mode;
      c.sizes = sizes;
      run(c, seed());
    }
  }
}

void test_arguments(const std::function<uint64_t()>& seed) {
  for (const Mode mode : kModes) {
    Case c;
    c.mode = mode;
    c.sizes = {3000, 0, 17};
    c.static_counters = true;
    run(c, seed());
    c.per_tensor = false;
    c.fp64_scalars = false;
    run(c, seed());
    c.exact = false;
    c.delta = 0;
    c.ewc_lambda = 37.5;
    run(c, seed());
    c.per_tensor = true;
    run(c, seed());
    if (mode == Mode::kValue) continue;
    c.grad_scale = 1024;
    c.maximize = mode == Mode::kAccumulate;
    c.found_inf = 0;
    run(c, seed());
    c.exact = true;
    c.ewc_lambda = 2;
    c.delta = 0.5;
    c.grad_scale = 4;
    run(c, seed());
  }
}

// Lambda 0 or an overflow: accumulate leaves gradients alone, write clears them, even where the parameter is NaN.
void test_inactive(const std::function<uint64_t()>& seed) {
  for (const Mode mode : kModes) {
    for (const int found_inf : {0, 1}) {
      if (mode == Mode::kValue && found_inf == 1) continue;  // it has no such argument
      for (const Dtype g : {kF32, kB16}) {
        Case c;
        c.mode = mode;
        c.g = mode == Mode::kValue ? c.p : g;
        c.sizes = {20, kChunk + 2};
        c.ewc_lambda = found_inf == 1 ? 2 : 0;
        c.found_inf = mode == Mode::kValue ? -1 : found_inf;
        c.g_shift = g == kB16;
        run(c, seed());
        c.nan_tensor = 1;
        c.nan_element = 7;
        run(c, seed(), 1);
        c.null_gradients = mode == Mode::kAccumulate;
        c.sizes = {20, 3000};
        run(c, seed(), 1);
      }
    }
  }
}

void test_nan(const std::function<uint64_t()>& seed) {
  for (const Mode mode : kModes) {
    for (const Dtype p : {kF32, kF16}) {
      for (const int64_t tensor : {0, 1}) {
        Case c;
        c.mode = mode;
        c.p = c.g = p;
        c.sizes = {9, kChunk + 3};
        c.nan_tensor = tensor;
        for (const int64_t element : {int64_t{0}, c.sizes[tensor] / 2, c.sizes[tensor] - 1}) {
          c.nan_element = element;
          run(c, seed(), 1);
        }
      }
    }
  }
}

// ---- chunks and counters ----

void test_chunk_elements() {
  context = "chunk_elements";
  check(ewc::chunk_elements(0) == ewc::kShortestChunk, "nothing");
  int64_t last = 0;
  for (int64_t numel = 1; numel < int64_t{1} << 42; numel += numel / 7 + 1) {
    const int64_t chunk = ewc::chunk_elements(numel), chunks = ewc::chunk_count(numel, chunk);
    check(chunk >= ewc::kShortestChunk && chunk <= kChunk && (chunk & (chunk - 1)) == 0 && chunk >= last,
          "%" PRId64 " of %" PRId64, chunk, numel);
    check((chunks - 1) * chunk < numel && numel <= chunks * chunk, "%" PRId64 " chunks of %" PRId64, chunks, numel);
    check(chunks <= ewc::kChunksAimedAt || chunk == kChunk, "%" PRId64 " chunks of %" PRId64, chunks, numel);
    check(chunks > ewc::kChunksAimedAt / 2 || chunk == ewc::kShortestChunk, "too few chunks of %" PRId64, numel);
    last = chunk;
  }
  check(ewc::fisher_chunk_elements(1) == ewc::kBlock && ewc::fisher_chunk_elements(int64_t{1} << 42) == kChunk,
        "chunks of Fishers");
}

void test_counter_pool() {
  context = "counter pool";
  ewc::CounterPool pool;
  ewc::Counters scratch{5, 6};
  emulation::device.memsets = 0;
  const auto take = [&](int device, int64_t stream, bool capturing) {
    ewc::CountersOf counters{&scratch, -7};
    emulation::device.capturing = capturing;
    check(pool.take(device, stream, nullptr, &scratch, &counters) == cudaSuccess, "it failed");
    emulation::device.capturing = false;
    return counters;
  };
  std::set<int> given;
  for (int stream = 0; stream < ewc::kStreamCounters; ++stream) {
    const ewc::CountersOf counters = take(stream % 3, stream / 3, false);
    check(counters.address == nullptr && counters.index >= 0 && counters.index < ewc::kStreamCounters, "a stream's: %d",
          counters.index);
    check(given.insert(counters.index).second, "two streams have the counters %d", counters.index);
    const ewc::CountersOf again = take(stream % 3, stream / 3, false);
    check(again.address == nullptr && again.index == counters.index, "a stream's counters change");
  }
  for (int capture = 0; capture < ewc::kCaptureCounters; ++capture) {
    const ewc::CountersOf counters = take(0, capture % 2, true);
    check(counters.address == nullptr && counters.index >= 0 &&
              counters.index < ewc::kStreamCounters + ewc::kCaptureCounters,
          "a capture's: %d", counters.index);
    check(given.insert(counters.index).second, "counters %d are given out twice", counters.index);
  }
  check(emulation::device.memsets == 0 && scratch.taken == 5, "%d memsets", emulation::device.memsets);
  for (const bool capturing : {false, true}) {  // more than there are
    scratch = {5, 6};
    const ewc::CountersOf counters = take(7, 7, capturing);
    check(counters.address == &scratch && scratch.taken == 0 && scratch.finished == 0, "not the scratch, cleared");
    check(emulation::device.memsets == 1 + capturing, "%d memsets", emulation::device.memsets);
  }
  check(take(0, 0, false).address == nullptr, "a known stream has lost its counters");
}

// ---- scale_ ----

void test_scale(const std::function<uint64_t()>& seed) {
  for (const Dtype dtype : {kF64, kF32, kB16, kF16}) {
    for (const int64_t size : boundaries(ewc::kShortestChunk)) {
      for (const int64_t shift : {0, 1}) {
        for (const double factor : {-2.5, 1.0}) {
          context = std::string("scale ") + format_of(dtype).name + " size " + std::to_string(size) + " shift " +
                    std::to_string(shift) + " factor " + std::to_string(factor);
          std::mt19937_64 random(seed());
          Buffer buffer(dtype, size, shift), factor_buffer(shift == 0 ? kF64 : kF32, 1);
          factor_buffer.set(0, factor);
          std::vector<double> old;
          for (int64_t i = 0; i < size; ++i) {
            old.push_back(std::uniform_int_distribution<int>(-50, 50)(random));  // times 2.5: exact in bf16
            buffer.set(i, old.back());
          }
          const std::string before = buffer.bytes();
          emulation::device.random.seed(random());
          ewc::launch_scale(buffer.data(), size, dtype, {factor_buffer.data(), shift == 0}, 1 + size % 3, nullptr);
          for (int64_t i = 0; i < size; ++i) {
            check(buffer.get(i) == factor * old[i], "[%" PRId64 "] is %g, expected %g", i, buffer.get(i),
                  factor * old[i]);
          }
          const size_t head = shift * format_of(dtype).bytes;
          check(buffer.bytes().compare(0, head, before, 0, head) == 0, "memory before the buffer was written");
        }
      }
    }
  }
  context = "scale by 1";
  const float one = 1;
  check(ewc::launch_scale(nullptr, kChunk + 1, kF32, {&one, false}, 1, nullptr) == cudaSuccess, "it failed");
}

// ---- fisher_accumulate_ ----

struct FisherCase {
  Dtype f = kF32, g = kF32;
  std::vector<int64_t> sizes = {1000}, rows = {1};  // of tensor t: rows[t % rows.size()]
  bool exact = true;
  int64_t f_shift = 0, g_shift = 0, row_gap = 0;  // elements
  bool same_row = false;                          // stride 0
  double weight = 0.5;
  int64_t nan_tensor = -1, nan_element = 0;
  int64_t chunk = ewc::kBlock;
};

void run_fisher(const FisherCase& c, uint64_t seed, int repeats = 2) {
  context = std::string("fisher ") + format_of(c.f).name + " " + format_of(c.g).name + (c.exact ? " exact" : " random") +
            " tensors " + std::to_string(c.sizes.size()) + " first " + std::to_string(c.sizes[0]) + " rows " +
            std::to_string(c.rows[0]) + " shifts " + std::to_string(c.f_shift) + std::to_string(c.g_shift) + " gap " +
            std::to_string(c.row_gap) + (c.same_row ? " same row" : "");
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(-1, 1)(random); };
  const auto integer = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const auto n = static_cast<int64_t>(c.sizes.size());
  std::vector<Buffer> fishers, grads;
  std::vector<ewc::FisherEntry> entries;
  std::vector<std::string> old_fishers, old_grads;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t size = c.sizes[t], rows = c.rows[t % c.rows.size()], stride = c.same_row ? 0 : size + c.row_gap;
    const int64_t length = (rows - 1) * stride + size;
    fishers.emplace_back(c.f, size, c.f_shift);
    grads.emplace_back(c.g, length, c.g_shift);
    for (int64_t i = 0; i < length; ++i) {
      grads[t].set(i, stride > 0 && i % stride >= size ? kNaN : rounded(c.g, c.exact ? integer(-3, 3) : uniform()));
    }
    for (int64_t i = 0; i < size; ++i) fishers[t].set(i, rounded(c.f, c.exact ? integer(0, 8) : uniform() * uniform()));
    if (t == c.nan_tensor) grads[t].set((rows - 1) * stride + c.nan_element, kNaN);
    entries.push_back({fishers[t].data(), grads[t].data(), size, rows, stride});
    old_fishers.push_back(fishers[t].bytes());
    old_grads.push_back(grads[t].bytes());
  }
  ewc::FisherLaunch launch{entries.data(), n, c.f, c.g, c.weight, c.chunk, 0};
  std::vector<std::string> first(n);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t t = 0; t < n; ++t) fishers[t].restore(old_fishers[t]);
    launch.multiprocessors = std::vector<int>{5, 1, 2}[repeat % 3];
    emulation::device.random.seed(seed + repeat);
    emulation::device.launches = emulation::device.memsets = 0;
    check(ewc::launch_fisher(launch, nullptr) == cudaSuccess, "the launch failed");
    const int64_t launches = (n + ewc::kFishersPerLaunch - 1) / ewc::kFishersPerLaunch;
    check(emulation::device.launches == launches && emulation::device.memsets == 0, "%d launches, %d memsets",
          emulation::device.launches, emulation::device.memsets);
    for (int64_t t = 0; t < n; ++t) {
      if (repeat == 0) first[t] = fishers[t].bytes();
      check(fishers[t].bytes() == first[t], "other bits in repeat %d", repeat);
    }
  }

  const double u = (c.f == kF64 ? 2 : 1) * format_of(c.f).roundoff();  // what is expected in fp64 is rounded as often
  for (int64_t t = 0; t < n; ++t) {
    check(grads[t].bytes() == old_grads[t], "gradient %" PRId64 " was written", t);
    const size_t head = c.f_shift * format_of(c.f).bytes;
    check(fishers[t].bytes().compare(0, head, old_fishers[t], 0, head) == 0, "memory before the Fisher was written");
    const ewc::FisherEntry& entry = entries[t];
    for (int64_t i = 0; i < entry.numel; ++i) {
      double squares = 0;
      for (int64_t r = 0; r < entry.rows; ++r) squares += std::pow(grads[t].get(r * entry.stride + i), 2);
      const double before = decode(c.f, old_fishers[t].data() + head + i * format_of(c.f).bytes);
      const double expected = before + c.weight * squares, got = fishers[t].get(i);
      const double bound =
          c.exact ? 0 : (5 + entry.rows) * u * std::abs(c.weight) * squares + 1.01 * u * std::abs(expected);
      check(close(got, expected, bound), "[%" PRId64 "][%" PRId64 "] is %.17g, expected %.17g", t, i, got, expected);
    }
  }
}

void test_fisher(const std::function<uint64_t()>& seed) {
  for (const Dtype f : {kF32, kF64}) {
    for (const Dtype g : {kF64, kF32, kB16, kF16}) {
      for (const bool exact : {true, false}) {
        FisherCase c;
        c.f = f;
        c.g = g;
        c.exact = exact;
        c.weight = exact ? 0.5 : -0.37;
        c.rows = {1, 2, 3, 5, 8};
        c.sizes = {5, 4096, 16, 2064, 8};  // rows that start at 16 bytes
        run_fisher(c, seed());
        c.sizes = {4099, 7, 2049, 5001, 1};  // and that do not
        run_fisher(c, seed(), 1);
      }
    }
  }
  for (const Dtype g : {kF32, kB16}) {
    FisherCase c;
    c.g = g;
    for (const int64_t size : boundaries(ewc::kBlock)) {
      if (size > 0) c.sizes.push_back(size);
    }
    run_fisher(c, seed(), 3);  // 5, 1 and 2 multiprocessors
    c.rows = {3, 4};
    run_fisher(c, seed(), 1);
    c.chunk = kChunk;  // in several turns
    c.sizes = {kChunk - 1, kChunk + 9, 5};
    c.rows = {1, 3};
    run_fisher(c, seed(), 1);
    c.chunk = ewc::kBlock;
    c.sizes = {24, 2400};
    c.rows = {5, 2};
    for (const int64_t shifts : {1, 2, 3}) {
      c.f_shift = shifts & 1;
      c.g_shift = shifts >> 1;
      run_fisher(c, seed(), 1);
    }
    c.f_shift = c.g_shift = 0;
    for (const int64_t gap : {1, 8}) {
      c.row_gap = gap;
      run_fisher(c, seed(), 1);
    }
    c.same_row = true;
    run_fisher(c, seed(), 1);
    c.same_row = false;
    for (const int64_t element : {0, 1200, 2399}) {
      c.nan_tensor = 1;
      c.nan_element = element;
      run_fisher(c, seed(), 1);
    }
  }
  for (const int64_t n : {int64_t{1}, int64_t{ewc::kFishersPerLaunch}, int64_t{ewc::kFishersPerLaunch + 1},
                          int64_t{2 * ewc::kFishersPerLaunch + 1}}) {
    FisherCase c;
    c.sizes.clear();
    for (int64_t t = 0; t < n; ++t) c.sizes.push_back(1 + t % 11);
    c.sizes[n / 2] = 2 * ewc::kBlock + 1;
    c.rows = {1, 2, 7};
    run_fisher(c, seed(), 1);
  }
}

// ---- optimizer steps ----

enum class Op { kAdamW, kSgd, kProximal };

struct StepCase {
  Op op = Op::kAdamW;
  Dtype p = kF32, g = kF32, s = kF32, a = kF32, f = kF32;
  std::vector<int64_t> sizes = {1000, 3};
  ewc::Coupling coupling = ewc::Coupling::kCoupled;  // kNone: no anchor
  int64_t unprotected = 3;                           // every so many-th tensor
  int64_t p_shift = 0, g_shift = 0, s_shift = 0, state_shift = 0;  // elements
  double ewc_lambda = 2.5, delta = 0.3;
  bool per_tensor = true;  // scale and constant
  bool fp64_scalars = true;
  double grad_scale = 0;  // 0: absent
  int found_inf = -1;     // -1: absent
  bool maximize = false, amsgrad = false, first = false;
  ewc::Momentum momentum = ewc::Momentum::kPlain;
  ewc::Metric metric = ewc::Metric::kRoot;
  bool lr_tensor = false;
  int64_t seed = -1;
  bool nan_anchor = false;  // to show that where lambda is 0 it changes nothing
  bool static_counters = false;
  int64_t chunk = ewc::kShortestChunk;

  bool has_gradient() const { return op != Op::kProximal; }
  int states() const {
    if (op == Op::kAdamW) return amsgrad ? 3 : 2;
    return op == Op::kSgd ? momentum != ewc::Momentum::kNone : metric != ewc::Metric::kConstant;
  }
};

std::string describe(const StepCase& c) {
  const char* ops[] = {"adamw", "sgd", "proximal"};
  const char* couplings[] = {" none", " coupled", " proximal"};
  std::string text = std::string(ops[static_cast<int>(c.op)]) + couplings[static_cast<int>(c.coupling)];
  for (const Dtype dtype : {c.p, c.g, c.s, c.a, c.f}) text += std::string(" ") + format_of(dtype).name;
  text += " tensors " + std::to_string(c.sizes.size()) + " sizes";
  for (size_t i = 0; i < c.sizes.size() && i < 8; ++i) text += " " + std::to_string(c.sizes[i]);
  text += " shifts " + std::to_string(c.p_shift) + std::to_string(c.g_shift) + std::to_string(c.s_shift) +
          std::to_string(c.state_shift) + " lambda " + std::to_string(c.ewc_lambda) + " found_inf " +
          std::to_string(c.found_inf) + " amsgrad " + std::to_string(c.amsgrad) + " momentum " +
          std::to_string(static_cast<int>(c.momentum)) + " metric " + std::to_string(static_cast<int>(c.metric)) +
          " seed " + std::to_string(c.seed);
  return text;
}

// What a step leaves, as numbers and as bits.
struct StepOutputs {
  std::vector<std::vector<double>> params, states[3];
  std::string by_tensor;
};

// Runs the case under several orders and grids, which must agree to the bit, and checks the outputs against the formulas
// in fp64.
StepOutputs run_step(const StepCase& c, uint64_t seed, int repeats = 2) {
  context = describe(c);
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(-1, 1)(random); };
  const auto n = static_cast<int64_t>(c.sizes.size());
  const bool anchored = c.coupling != ewc::Coupling::kNone;
  const int states = c.states();
  std::vector<int64_t> offsets;
  int64_t total = 0, chunks = 0;
  for (int64_t t = 0; t < n; ++t) {
    const bool is_protected = anchored && t % c.unprotected != c.unprotected - 1;
    offsets.push_back(is_protected ? total : -1);
    if (is_protected) total += (c.sizes[t] + 31) / 32 * 32;
    chunks += (c.sizes[t] + c.chunk - 1) / c.chunk;
  }
  Buffer anchor(c.a, total, c.state_shift), fisher(c.f, total, c.state_shift);
  for (int64_t i = 0; i < total; ++i) {  // what lies between tensors must not be read
    anchor.set(i, kNaN);
    fisher.set(i, kNaN);
  }
  std::vector<Buffer> params, grads, own[3], steps;
  const Dtype scalars = c.fp64_scalars ? kF64 : kF32, results = c.p == kF64 ? kF64 : kF32;
  const Dtype coarsest = kB16;  // values that every dtype holds, so that dtypes can be compared
  for (int64_t t = 0; t < n; ++t) {
    params.emplace_back(c.p, c.sizes[t], c.p_shift);
    grads.emplace_back(c.g, c.sizes[t], c.g_shift);
    for (auto& list : own) list.emplace_back(c.s, c.sizes[t], c.s_shift);
    steps.emplace_back(scalars, 1);
    steps[t].set(0, static_cast<double>(1 + t / 2 % 4));
    const auto draw = [&](Dtype dtype, double x) { return rounded(dtype, rounded(coarsest, x)); };
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double theta = uniform();
      params[t].set(i, draw(c.p, theta));
      grads[t].set(i, draw(c.g, uniform()));
      own[0][t].set(i, draw(c.s, c.op == Op::kProximal ? std::abs(uniform()) : uniform()));
      own[1][t].set(i, draw(c.s, std::abs(uniform())));
      own[2][t].set(i, draw(c.s, std::abs(uniform())));
      const double old = theta + 0.5 * uniform(), information = std::max(0.0, uniform());
      if (offsets[t] < 0) continue;
      anchor.set(offsets[t] + i, c.nan_anchor ? kNaN : draw(c.a, old));
      fisher.set(offsets[t] + i, draw(c.f, information));
    }
  }
  const auto scalar_buffer = [&](double x) {
    Buffer buffer(scalars, 1);
    buffer.set(0, rounded(scalars, x));
    return buffer;
  };
  const Buffer ewc_lambda = scalar_buffer(c.ewc_lambda), delta = scalar_buffer(c.delta);
  const Buffer grad_scale = scalar_buffer(c.grad_scale), found_inf = scalar_buffer(c.found_inf);
  const Buffer lr_buffer = scalar_buffer(0.04);
  Buffer scale(scalars, n), constant(kF64, n), rates(kF64, 4 * n);
  for (int64_t t = 0; t < n; ++t) {
    scale.set(t, rounded(scalars, 1.5 + uniform()));
    constant.set(t, 1 + uniform());
    for (int k = 0; k < 4; ++k) rates.set(4 * t + k, 0.55 + 0.45 * uniform());
  }
  Buffer penalty(results, 1), predicted(results, 1), by_tensor(kF64, 2 * n), slots(kF64, 2 * chunks);
  ewc::Counters own_counters{0, 0};

  std::vector<ewc::StepEntry> entries(n);
  std::vector<const void*> step_pointers;
  std::vector<int64_t> ordinals;
  for (int64_t t = 0; t < n; ++t) {
    ewc::StepEntry& entry = entries[t];
    entry = {{params[t].data()}, offsets[t], c.sizes[t]};
    int list = 1;
    if (c.has_gradient()) entry.data[list++] = grads[t].data();
    for (int k = 0; k < states; ++k) entry.data[list++] = own[k][t].data();
    step_pointers.push_back(steps[t].data());
    ordinals.push_back(100 + 7 * t);
  }
  const auto when = [&](bool present, const Buffer& buffer, bool is_fp64) {
    return present ? Scalar{buffer.data(), is_fp64} : Scalar{};
  };
  const bool fp64 = c.fp64_scalars;
  ewc::StepLaunch launch{};
  launch.entries = entries.data();
  launch.num_tensors = n;
  launch.anchor = anchored ? anchor.data() : nullptr;
  launch.fisher = anchored ? fisher.data() : nullptr;
  launch.param_dtype = c.p;
  launch.grad_dtype = c.g;
  launch.state_dtype = c.s;
  launch.anchor_dtype = c.a;
  launch.fisher_dtype = c.f;
  launch.coupling = c.coupling;
  launch.ewc_lambda = when(anchored, ewc_lambda, fp64);
  launch.delta = when(anchored, delta, fp64);
  launch.scale = when(anchored && c.per_tensor, scale, fp64);
  launch.constant = when(anchored && c.per_tensor, constant, true);
  launch.grad_scale = when(c.grad_scale != 0, grad_scale, fp64);
  launch.found_inf = when(c.found_inf >= 0, found_inf, fp64);
  launch.penalty = penalty.data();
  launch.predicted = predicted.data();
  launch.by_tensor = static_cast<double*>(by_tensor.data());
  launch.slots = static_cast<double2*>(slots.data());
  launch.chunk = c.chunk;
  launch.counters.index = std::uniform_int_distribution<int>(0, ewc::kStreamCounters - 1)(random);
  if (!c.static_counters) launch.counters.address = &own_counters;
  const Scalar lr_scalar = when(c.lr_tensor, lr_buffer, fp64);
  const double lr = c.lr_tensor ? lr_buffer.get(0) : 0.03;
  const bool momentum = c.momentum != ewc::Momentum::kNone, nesterov = c.momentum == ewc::Momentum::kNesterov;
  const ewc::AdamWOptions adamw = {0.03, 0.8, 0.93, 1e-2, 0.2, c.maximize};
  const ewc::SgdOptions sgd = {0.03, momentum ? 0.7 : 0.0, nesterov ? 0.0 : 0.2, 0.2, nesterov, c.maximize};
  const auto start = [&] {
    switch (c.op) {
      case Op::kAdamW:
        return ewc::launch_adamw(
            launch, {adamw, lr_scalar, step_pointers.data(), ordinals.data(), c.seed, fp64, c.amsgrad}, nullptr);
      case Op::kSgd: return ewc::launch_sgd(launch, {sgd, lr_scalar, c.first}, nullptr);
      default: return ewc::launch_proximal(launch, {static_cast<const double*>(rates.data()), c.metric}, nullptr);
    }
  };

  const auto bytes_of = [](const std::vector<Buffer>& buffers) {
    std::vector<std::string> bytes;
    for (const Buffer& buffer : buffers) bytes.push_back(buffer.bytes());
    return bytes;
  };
  std::vector<Buffer>* const lists[] = {&params, &grads, &own[0], &own[1], &own[2]};
  const std::string old_anchor = anchor.bytes(), old_fisher = fisher.bytes();
  std::vector<std::string> old[5], now[5];
  for (int l = 0; l < 5; ++l) old[l] = bytes_of(*lists[l]);
  std::string results_now;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int l = 0; l < 5; ++l) {
      for (int64_t t = 0; t < n; ++t) (*lists[l])[t].restore(old[l][t]);
    }
    for (int64_t i = 0; i < 2 * n; ++i) by_tensor.set(i, kNaN);
    for (int64_t i = 0; i < 2 * chunks; ++i) slots.set(i, kNaN);
    penalty.set(0, -1);
    predicted.set(0, -1);
    launch.multiprocessors = std::vector<int>{5, 1, 2}[repeat % 3];
    emulation::device.random.seed(seed + repeat);
    emulation::device.launches = emulation::device.memsets = 0;
    check(start() == cudaSuccess, "the launch failed");
    const int64_t launches = std::max<int64_t>(1, (n + ewc::kStepsPerLaunch - 1) / ewc::kStepsPerLaunch);
    check(emulation::device.launches == launches && emulation::device.memsets == 0, "%d launches, %d memsets",
          emulation::device.launches, emulation::device.memsets);
    const ewc::Counters left = c.static_counters ? ewc::static_counters[launch.counters.index] : own_counters;
    check(left.taken == 0 && left.finished == 0, "the counters are left at %u and %u", left.taken, left.finished);
    bool equal = true;
    for (int l = 0; l < 5; ++l) {
      if (repeat == 0) now[l] = bytes_of(*lists[l]);
      equal &= now[l] == bytes_of(*lists[l]);
    }
    const std::string of_repeat = penalty.bytes() + predicted.bytes() + by_tensor.bytes();
    if (repeat == 0) results_now = of_repeat;
    check(equal && results_now == of_repeat, "other bits in repeat %d", repeat);
  }
  check(anchor.bytes() == old_anchor && fisher.bytes() == old_fisher, "the state was written");

  // The formulas.
  const double u = c.p == kF64 ? std::ldexp(1.0, -53) : std::ldexp(1.0, -24);
  const double lambda = anchored ? ewc_lambda.get(0) : 0, damping = anchored ? delta.get(0) : 0;
  const bool goes = c.found_inf != 1, is_coupled = c.coupling == ewc::Coupling::kCoupled;
  const auto was = [&](int l, int64_t t, int64_t i) {
    const Dtype dtype = l == 0 ? c.p : l == 1 ? c.g : c.s;
    const int64_t shift = l == 0 ? c.p_shift : l == 1 ? c.g_shift : c.s_shift;
    return decode(dtype, old[l][t].data() + (shift + i) * format_of(dtype).bytes);
  };
  double all = 0, forgetting = 0, all_bound = 0, forgetting_bound = 0;
  for (int64_t t = 0; t < n; ++t) {
    const bool is_protected = offsets[t] >= 0, acts = is_protected && lambda != 0;
    const bool writes = goes && (acts || c.op != Op::kProximal), unscales = writes && c.grad_scale != 0;
    const double s = anchored && c.per_tensor ? scale.get(t) : 1, step = steps[t].get(0);
    const double constant_t = anchored && c.per_tensor ? constant.get(t) : 0;
    const double of_lr = c.op == Op::kProximal ? rates.get(4 * t) : lr;
    double weighted = 0, squared = 0, weighted_bound = 0, squared_bound = 0;
    const auto expect = [&](const Buffer& buffer, Dtype dtype, const char* what, int64_t i, double expected) {
      // Stochastic rounding: to either neighbour.
      const Format stored = format_of(dtype);
      const double rounding = (c.seed >= 0 && dtype == kB16 ? 2.02 : 1.01) * stored.roundoff();
      const double bound = rounding * std::abs(expected) + 60 * u * (1 + std::abs(expected)) +
                           std::ldexp(1.0, stored.lowest);
      check(close(buffer.get(i), expected, bound), "%s [%" PRId64 "][%" PRId64 "] is %.17g, expected %.17g", what, t, i,
            buffer.get(i), expected);
    };
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double before = was(0, t, i);
      const double a = is_protected ? anchor.get(offsets[t] + i) : 0, f = is_protected ? fisher.get(offsets[t] + i) : 0;
      double theta = before, valued = before, gradient = was(1, t, i);
      if (unscales) gradient = rounded(c.g, gradient / grad_scale.get(0));
      if (c.has_gradient()) {
        check(same(grads[t].get(i), gradient), "gradient [%" PRId64 "][%" PRId64 "] is %.17g, expected %.17g", t, i,
              grads[t].get(i), gradient);
      }
      if (writes) {
        if (c.maximize) gradient = -gradient;
        if (acts && is_coupled) gradient += lambda * s * (f + damping) * (before - a);
        double metric = 0;
        if (c.op == Op::kAdamW) {
          const double m = 0.8 * was(2, t, i) + 0.2 * gradient, v = 0.93 * was(3, t, i) + 0.07 * gradient * gradient;
          const double largest = c.amsgrad ? std::max(was(4, t, i), v) : v;
          metric = std::sqrt(largest / (1 - std::pow(0.93, step))) + 1e-2;
          theta = theta * (1 - lr * 0.2) - lr * m / (1 - std::pow(0.8, step)) / metric;
          expect(own[0][t], c.s, "first moment", i, m);
          expect(own[1][t], c.s, "second moment", i, v);
          if (c.amsgrad) expect(own[2][t], c.s, "largest", i, largest);
        } else if (c.op == Op::kSgd) {
          gradient += 0.2 * theta;
          metric = momentum ? (1 - sgd.momentum) / (1 - sgd.dampening) : 1;
          if (momentum) {
            const double buffer = c.first ? gradient : 0.7 * was(2, t, i) + (1 - sgd.dampening) * gradient;
            gradient = nesterov ? gradient + 0.7 * buffer : buffer;
            expect(own[0][t], c.s, "momentum", i, buffer);
          }
          theta -= lr * gradient;
        } else {
          const double factor = rates.get(4 * t + 1), x = was(2, t, i);
          metric = c.metric == ewc::Metric::kConstant ? factor
                   : c.metric == ewc::Metric::kLinear ? factor * x
                                                      : factor * (std::sqrt(rates.get(4 * t + 2) * x) + rates.get(4 * t + 3));
        }
        if (acts && !is_coupled) {
          valued = theta;
          const double weight = of_lr * lambda * s * (f + damping);
          if (metric + weight > 0) theta = (metric * theta + weight * a) / (metric + weight);
        }
        expect(params[t], c.p, "parameter", i, theta);
      }
      if (!is_protected) continue;
      if (goes && !acts && !is_coupled) valued = params[t].get(i);  // as it is stored
      const double d = valued - a, d_bound = (acts && !is_coupled ? 60 : 2) * u * (1 + std::abs(valued) + std::abs(a));
      weighted += f * d * d;
      squared += d * d;
      weighted_bound += f * (2 * std::abs(d) + d_bound) * d_bound;
      squared_bound += (2 * std::abs(d) + d_bound) * d_bound;
    }
    const double sum_bound = (5 + kChunk / kThreads + 1) * u + 100 * std::ldexp(1.0, -53);
    const double value = lambda == 0 ? 0 : lambda / 2 * s * (weighted + constant_t + damping * squared);
    const double predicted_t = (weighted + constant_t) / 2;
    weighted_bound += sum_bound * (weighted + constant_t);
    squared_bound += sum_bound * squared;
    const double bound = lambda / 2 * s * (weighted_bound + damping * squared_bound);
    check(close(by_tensor.get(t), value, bound), "penalty of tensor %" PRId64 " is %.17g, expected %.17g", t,
          by_tensor.get(t), value);
    check(close(by_tensor.get(n + t), predicted_t, weighted_bound / 2),
          "forgetting of tensor %" PRId64 " is %.17g, expected %.17g", t, by_tensor.get(n + t), predicted_t);
    all += value;
    all_bound += bound;
    forgetting += predicted_t;
    forgetting_bound += weighted_bound / 2;

    for (int l = 0; l < 5; ++l) {
      const bool is_written = l == 0 ? writes : l == 1 ? unscales : writes && c.has_gradient() && l - 2 < states;
      const int64_t shift = l == 0 ? c.p_shift : l == 1 ? c.g_shift : c.s_shift;
      const size_t head = shift * format_of(l == 0 ? c.p : l == 1 ? c.g : c.s).bytes;
      check(is_written ? now[l][t].compare(0, head, old[l][t], 0, head) == 0 : now[l][t] == old[l][t],
            "list %d, tensor %" PRId64 ": memory was written that should not be", l, t);
    }
  }
  const double last_rounding = format_of(results).roundoff() + 100 * std::ldexp(1.0, -53);
  check(close(penalty.get(0), all, all_bound + last_rounding * all), "the penalty is %.17g, expected %.17g",
        penalty.get(0), all);
  check(close(predicted.get(0), forgetting, forgetting_bound + last_rounding * forgetting),
        "the forgetting is %.17g, expected %.17g", predicted.get(0), forgetting);

  StepOutputs outputs;
  outputs.by_tensor = by_tensor.bytes();
  const auto numbers = [&](const std::vector<Buffer>& buffers) {
    std::vector<std::vector<double>> found(n);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < c.sizes[t]; ++i) found[t].push_back(buffers[t].get(i));
    }
    return found;
  };
  outputs.params = numbers(params);
  for (int k = 0; k < states; ++k) outputs.states[k] = numbers(own[k]);
  return outputs;
}

constexpr ewc::Coupling kCouplings[] = {ewc::Coupling::kNone, ewc::Coupling::kCoupled, ewc::Coupling::kProximal};

// Every kind of step: with and without amsgrad, all kinds of momentum, all metrics, in every coupling.
std::vector<StepCase> step_kinds() {
  std::vector<StepCase> cases;
  for (const ewc::Coupling coupling : kCouplings) {
    StepCase c;
    c.coupling = coupling;
    for (const bool amsgrad : {false, true}) {
      c.amsgrad = amsgrad;
      cases.push_back(c);
    }
    c.op = Op::kSgd;
    for (const ewc::Momentum momentum : {ewc::Momentum::kNone, ewc::Momentum::kPlain, ewc::Momentum::kNesterov}) {
      c.momentum = momentum;
      c.first = false;
      cases.push_back(c);
      if (momentum == ewc::Momentum::kNone) continue;
      c.first = true;
      cases.push_back(c);
    }
  }
  StepCase c;
  c.op = Op::kProximal;
  c.coupling = ewc::Coupling::kProximal;
  for (const ewc::Metric metric : {ewc::Metric::kConstant, ewc::Metric::kLinear, ewc::Metric::kRoot}) {
    c.metric = metric;
    cases.push_back(c);
  }
  return cases;
}

void test_step_kinds(const std::function<uint64_t()>& seed) {
  for (StepCase c : step_kinds()) {
    c.sizes = {1027, 0, 300, 5};
    c.maximize = c.amsgrad || c.first;
    c.static_counters = c.amsgrad;
    run_step(c, seed());
    c.per_tensor = false;
    c.fp64_scalars = false;
    c.lr_tensor = true;
    c.grad_scale = c.op == Op::kProximal ? 0 : 1024;
    c.found_inf = 0;
    run_step(c, seed(), 1);
    for (const Dtype g : {kF32, kB16}) {  // with a kernel of its own, and without
      c.g = g;
      c.found_inf = 1;
      run_step(c, seed(), 1);
      c.found_inf = -1;
      c.ewc_lambda = 0;
      run_step(c, seed(), 1);
      c.nan_anchor = true;
      run_step(c, seed(), 1);
      c.nan_anchor = false;
      c.ewc_lambda = 2.5;
    }
  }
}

void test_step_dtypes(const std::function<uint64_t()>& seed) {
  const std::vector<std::vector<Dtype>> combinations = {
      {kF32, kF32, kF32, kF32, kF32}, {kF32, kF32, kF32, kF32, kB16}, {kB16, kB16, kF32, kB16, kB16},
      {kB16, kB16, kF32, kB16, kF32}, {kB16, kB16, kB16, kB16, kB16}, {kF64, kF64, kF64, kF64, kF64},
      {kF16, kF16, kF32, kF32, kB16}, {kF32, kB16, kB16, kF16, kF64}, {kF64, kF32, kF16, kB16, kF32}};
  for (const auto& dtypes : combinations) {
    for (StepCase c : step_kinds()) {
      c.p = dtypes[0];
      c.g = dtypes[1];
      c.s = dtypes[2];
      c.a = dtypes[3];
      c.f = dtypes[4];
      c.sizes = {2059, 21, 2};
      c.grad_scale = c.amsgrad ? 4 : 0;
      run_step(c, seed(), 1);
      if (c.coupling != ewc::Coupling::kProximal) continue;
      c.sizes = {300, 21, 2};
      c.p_shift = 1;  // element by element
      run_step(c, seed(), 1);
    }
  }
}

void test_step_sizes(const std::function<uint64_t()>& seed) {
  for (const Op op : {Op::kAdamW, Op::kSgd, Op::kProximal}) {
    for (const Dtype dtype : {kF32, kB16}) {
      StepCase c;
      c.op = op;
      c.coupling = op == Op::kSgd ? ewc::Coupling::kCoupled : ewc::Coupling::kProximal;
      c.p = c.g = c.s = c.a = c.f = dtype;
      c.unprotected = 5;
      c.sizes = boundaries(c.chunk);
      run_step(c, seed(), 3);  // 5, 1 and 2 multiprocessors
      c.chunk = kChunk;
      c.sizes = {kChunk + 1, 0, kChunk - 1};
      run_step(c, seed(), 1);
      for (const std::vector<int64_t>& sizes :
           std::vector<std::vector<int64_t>>{{}, {0}, {0, 0, 0}, {0, 0, 40}, {40, 50, 0, 0}}) {
        c.sizes = sizes;
        run_step(c, seed(), 1);
      }
    }
  }
}

void test_step_alignment(const std::function<uint64_t()>& seed) {
  for (StepCase c : step_kinds()) {
    for (const Dtype dtype : {kF32, kB16}) {
      c.p = c.g = c.a = dtype;
      c.s = kF32;
      c.f = kB16;
      c.sizes = {1, 1023, 2058};
      const uint64_t of_case = seed();
      c.p_shift = c.g_shift = c.s_shift = c.state_shift = 0;
      const StepOutputs aligned = run_step(c, of_case, 1);
      for (const int shifts : {1, 2, 4, 8, 15}) {
        c.p_shift = shifts & 1;
        c.g_shift = shifts >> 1 & 1;
        c.s_shift = shifts >> 2 & 1;
        c.state_shift = shifts >> 3 & 1;
        const StepOutputs shifted = run_step(c, of_case, 1);
        check(shifted.by_tensor == aligned.by_tensor && shifted.params == aligned.params,
              "the results depend on alignment");
      }
    }
  }
}

void test_many_steps(const std::function<uint64_t()>& seed) {
  check(sizeof(void*) != 8 || ewc::kParameterBytes < 32764 || ewc::kStepsPerLaunch == 450, "a launch holds %d tensors",
        ewc::kStepsPerLaunch);
  for (const Op op : {Op::kAdamW, Op::kSgd, Op::kProximal}) {
    for (const int64_t n : {int64_t{ewc::kStepsPerLaunch}, int64_t{2 * ewc::kStepsPerLaunch + 1}}) {
      StepCase c;
      c.op = op;
      c.coupling = op == Op::kProximal ? ewc::Coupling::kProximal : ewc::Coupling::kCoupled;
      c.sizes.clear();
      for (int64_t t = 0; t < n; ++t) c.sizes.push_back(t % 7 == 3 ? 0 : 1 + t % 11);
      c.sizes[n / 2] = c.chunk + 1;
      c.static_counters = true;
      run_step(c, seed(), 1);
    }
  }
}

// Bits: what the same arithmetic leaves in fp32, rounded on the host.
void test_stochastic_rounding(const std::function<uint64_t()>& seed) {
  for (const ewc::Coupling coupling : kCouplings) {
    for (const std::vector<Dtype>& dtypes : std::vector<std::vector<Dtype>>{
             {kB16, kB16, kB16}, {kB16, kB16, kF32}, {kB16, kF32, kB16}, {kF32, kF32, kB16}, {kF32, kF32, kF32}}) {
      for (const int64_t shift : {0, 1}) {
        StepCase c;
        c.coupling = coupling;
        c.amsgrad = coupling == ewc::Coupling::kCoupled;
        c.a = c.f = kB16;
        c.sizes = {5, 2 * c.chunk + 3, 0, 40};
        const uint64_t of_case = seed();
        const StepOutputs unrounded = run_step(c, of_case, 1);
        c.p = dtypes[0];
        c.g = dtypes[1];
        c.s = dtypes[2];
        c.p_shift = shift;
        c.seed = static_cast<int64_t>(of_case >> 32);
        const StepOutputs found = run_step(c, of_case, 1);
        const auto compare = [&](const auto& got, const auto& exact, Dtype dtype, uint32_t list) {
          for (size_t t = 0; dtype == kB16 && t < got.size(); ++t) {
            const uint32_t key = ewc::rounding_key(static_cast<uint32_t>(c.seed), static_cast<uint32_t>(1 + t / 2 % 4),
                                                   static_cast<uint32_t>(100 + 7 * t), list);
            for (size_t i = 0; i < got[t].size(); ++i) {
              const ewc::bf16 bits = ewc::store_stochastic(static_cast<float>(exact[t][i]), key,
                                                           static_cast<uint32_t>(i), ewc::high_part(i));
              const double expected = decode(kB16, &bits);
              check(got[t][i] == expected, "list %u [%zu][%zu] is %.17g, expected %.17g", list, t, i, got[t][i],
                    expected);
            }
          }
          if (dtype != kB16) check(got == exact, "list %u was rounded", list);
        };
        compare(found.params, unrounded.params, c.p, 0);
        for (int k = 0; k < c.states(); ++k) compare(found.states[k], unrounded.states[k], c.s, 2 + k);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s SEED\n", argv[0]);
    return 2;
  }
  std::mt19937_64 seeds(std::strtoull(argv[1], nullptr, 10));
  const std::function<uint64_t()> seed = [&] { return seeds(); };
  test_boundaries(seed);
  test_dtypes(seed);
  test_alignment(seed);
  test_large_tensor(seed);
  test_many_tensors(seed);
  test_empty_tensors(seed);
  test_arguments(seed);
  test_inactive(seed);
  test_nan(seed);
  test_scale(seed);
  test_fisher(seed);
  test_step_kinds(seed);
  test_step_dtypes(seed);
  test_step_sizes(seed);
  test_step_alignment(seed);
  test_many_steps(seed);
  test_stochastic_rounding(seed);
  test_chunk_elements();
  test_counter_pool();
  std::printf("seed %s, %d tensors a launch: %" PRId64 " checks, %d failed\n", argv[1], kTensorsPerLaunch, checks,
              failures);
  return failures == 0 ? 0 : 1;
}
