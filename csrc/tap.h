// The tap of ewc_fast/fisher/capture.py where a matrix product has one vector for each sample: the same in Python takes
// longer than its arithmetic where the layers are small.
#pragma once

#include <ATen/core/Tensor.h>

namespace ewc {

// How rules.py adds squares: parameters with fewer elements than `small` get a product's sum at once, and a product is
// of at most so many vectors.
struct VectorsRule {
  bool left_is_g;
  int64_t small;
  int64_t vectors;
};

// Sums of the squares; undefined where a parameter has none.
struct Sums {
  at::Tensor weight;
  at::Tensor bias;
};

// Of several backwards: the squares of g are summed, shaped like it, and taken when `again`, a bool on the CPU, is false.
// Both undefined where there is one backward.
struct Several {
  at::Tensor squares;
  at::Tensor again;
};

// y, whose backward adds the squares of the samples' gradients g x^T to the weight's sums, and of g to the bias's. It
// requires grad, also where y does not.
at::Tensor tap_vectors(const at::Tensor& y, const at::Tensor& x, const Sums& sums, const VectorsRule& rule,
                       const Several& several);

}  // namespace ewc
