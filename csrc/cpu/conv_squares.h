// The squares of a convolution's per-sample weight gradients, summed over samples, without the windows of the input.
#pragma once

#include <ATen/core/Tensor.h>

namespace ewc {

// A convolution over two dimensions with stride 1. before: rows and columns of zeros before the input, and after it.
struct ConvolutionShape {
  int64_t before[2], after[2], dilation[2], groups;
};

// Whether add_conv_squares_ can: fp32 on the CPU, rows of outputs that fill vectors.
bool can_square_convolution(const at::Tensor& total, const at::Tensor& x, const at::Tensor& g,
                            const ConvolutionShape& shape);

// total (out, in / groups, height, width) += sum over samples of the squared gradient; x: inputs, g: output gradients.
void add_conv_squares_(const at::Tensor& total, const at::Tensor& x, const at::Tensor& g, const ConvolutionShape& shape);

}  // namespace ewc
