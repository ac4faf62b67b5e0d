// What the CPU's passes over lists of tensors share: pointers, scalars, conversions between dtypes, results.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "penalty_kernels.h"

namespace ewc {

// sums += F d^2 and d^2 of at most kBlock elements, for any dtypes.
void penalty_sums(at::ScalarType param, at::ScalarType anchor, at::ScalarType fisher, const void* p, const void* a,
                  const void* f, int64_t n, double delta, double* sums);

namespace {

using ConvertFn = void (*)(const void*, void*, int64_t);
using ScaleFn = void (*)(void*, int64_t, double);

template <typename M>
ConvertFn widener(at::ScalarType from) {
  switch (from) {
    case at::kDouble: return widen<double, M>;
    case at::kBFloat16: return widen<bf16, M>;
    case at::kHalf: return widen<f16, M>;
    default: return widen<float, M>;
  }
}

template <typename M>
ConvertFn narrower(at::ScalarType to) {
  switch (to) {
    case at::kDouble: return narrow<double, M>;
    case at::kBFloat16: return narrow<bf16, M>;
    case at::kHalf: return narrow<f16, M>;
    default: return narrow<float, M>;
  }
}

inline ScaleFn scaler(at::ScalarType of) {
  switch (of) {
    case at::kDouble: return scale_block<double>;
    case at::kBFloat16: return scale_block<bf16>;
    case at::kHalf: return scale_block<f16>;
    default: return scale_block<float>;
  }
}

template <typename T>
T* advance(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + bytes;
}

inline double read(const at::Tensor& t, int64_t i = 0) {
  return t.scalar_type() == at::kDouble ? t.const_data_ptr<double>()[i]
                                        : static_cast<double>(t.const_data_ptr<float>()[i]);
}
inline double read(const std::optional<at::Tensor>& t, int64_t i, double otherwise) {
  return t.has_value() ? read(*t, i) : otherwise;
}

inline void write(const at::Tensor& t, double x) {
  if (t.scalar_type() == at::kDouble) {
    *t.mutable_data_ptr<double>() = x;
  } else {
    *t.mutable_data_ptr<float>() = static_cast<float>(x);
  }
}

// How a list of entries is cut for a pass, and a pair of sums for each chunk.
struct Chunks {
  template <typename Entry>
  explicit Chunks(const std::vector<Entry>& entries) : tensors(static_cast<int64_t>(entries.size())) {
    first.assign(tensors + 1, 0);
    int64_t total = 0;
    for (int64_t i = 0; i < tensors; ++i) {
      first[i + 1] = first[i] + chunk_count(entries[i].numel);
      total += entries[i].numel;
    }
    count = first[tensors];
    slots.assign(2 * count, 0.0);
    elements = total;
    // Fewer than kChunk elements are not worth waking a thread for.
    grain = total > 0 ? std::max<int64_t>(1, count * kChunk / total) : 1;
  }

  // Each tensor's sums, in the order of its chunks.
  void add_up(std::vector<double>& weighted, std::vector<double>& squared) const {
    weighted.assign(tensors, 0.0);
    squared.assign(tensors, 0.0);
    for (int64_t i = 0; i < tensors; ++i) {
      for (int64_t c = first[i]; c < first[i + 1]; ++c) {
        weighted[i] += slots[2 * c];
        squared[i] += slots[2 * c + 1];
      }
    }
  }

  int64_t tensors, count, elements, grain;
  std::vector<int64_t> first;  // chunk of each tensor
  std::vector<double> slots;
};

inline void fill_result(const Result& result, const std::vector<double>& weighted, const std::vector<double>& squared,
                 double ewc_lambda, double delta, const std::optional<at::Tensor>& scale,
                 const std::optional<at::Tensor>& constant) {
  const auto& [penalty, predicted, by_tensor] = result;
  const int64_t n = static_cast<int64_t>(weighted.size());
  double* parts = by_tensor.mutable_data_ptr<double>();
  double total = 0, forgetting = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double c = read(constant, i, 0.0);
    total += parts[i] = penalty_value(ewc_lambda, delta, read(scale, i, 1.0), weighted[i], c, squared[i]);
    forgetting += parts[n + i] = predicted_forgetting(weighted[i], c);
  }
  write(penalty, total);
  write(predicted, forgetting);
}

}  // namespace
}  // namespace ewc
