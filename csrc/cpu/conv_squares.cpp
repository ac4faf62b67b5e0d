// add_conv_squares_ on the CPU: samples in blocks, inputs padded into scratch; who has which channels.
#include "conv_squares.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_squares_kernels.h"

namespace ewc {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // of samples, which are read once for each output channel or so

// Planes of one tensor, copied apart: rows of `columns` numbers, of which `width` are the tensor's, zeros elsewhere.
struct Planes {
  int64_t channels, height, width, rows, columns, top, left;
  int64_t plane() const { return rows * columns; }
  int64_t sample() const { return channels * plane(); }
  int64_t taken() const { return channels * height * width; }

  void copy(const float* from, float* to) const {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = 0; y < height; ++y) {
        std::memcpy(to + c * plane() + (y + top) * columns + left, from + (c * height + y) * width,
                    width * sizeof(float));
      }
    }
  }
};

int64_t whole_lanes(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

}  // namespace

bool can_square_convolution(const at::Tensor& total, const at::Tensor& x, const at::Tensor& g,
                            const ConvolutionShape& shape) {
  for (const at::Tensor* t : {&total, &x, &g}) {
    if (!t->is_cpu() || t->scalar_type() != at::kFloat || t->dim() != 4 || !t->has_storage()) return false;
  }
  for (int d = 0; d < 2; ++d) {
    if (shape.before[d] < 0 || shape.after[d] < 0 || shape.dilation[d] < 1) return false;
  }
  return total.is_contiguous() && total.size(3) > 1 && 8 * g.size(3) >= 5 * whole_lanes(g.size(3));
}

void add_conv_squares_(const at::Tensor& total, const at::Tensor& x, const at::Tensor& g, const ConvolutionShape& shape) {
  const int64_t samples = g.size(0), out = g.size(1), in = x.size(1), groups = shape.groups;
  const int64_t high = total.size(2), wide = total.size(3), in_group = in / groups, out_group = out / groups;
  TORCH_CHECK(x.size(0) == samples && total.size(0) == out && total.size(1) == in_group && in % groups == 0 &&
                  out % groups == 0,
              "add_conv_squares_: inputs, gradients and sums do not fit");
  for (int d = 0; d < 2; ++d) {
    const int64_t padded = x.size(2 + d) + shape.before[d] + shape.after[d];
    TORCH_CHECK(g.size(2 + d) == padded - shape.dilation[d] * (total.size(2 + d) - 1),
                "add_conv_squares_: a gradient of ", g.size(2 + d), " where the stride is 1");
  }
  if (samples == 0 || total.numel() == 0 || g.numel() == 0) return;
  // Rows of g are padded with zeros where much of their work would be with what is left of them.
  const int64_t width = g.size(3), padded = whole_lanes(width);
  const bool in_place = width == padded || width >= 3 * kLanes;
  Planes gs{out, g.size(2), width, g.size(2), in_place ? width : padded, 0, 0};
  Planes xs{in, x.size(2), x.size(3), x.size(2) + shape.before[0] + shape.after[0], 0, shape.before[0], shape.before[1]};
  // A row of g that ends in zeros meets what follows in x.
  xs.columns = std::max(x.size(3) + shape.before[1] + shape.after[1], gs.columns + shape.dilation[1] * (wide - 1));
  const int64_t block = std::clamp<int64_t>(kBlockBytes / 4 / (gs.sample() + xs.sample()), 1, samples);
  std::vector<float> x_scratch(block * xs.sample()), g_scratch(in_place ? 0 : block * gs.sample());
  float* to = total.mutable_data_ptr<float>();
  const int64_t tiles = (out_group + kOut - 1) / kOut, tasks = groups * tiles * in_group;
  for (int64_t start = 0; start < samples; start += block) {
    const int64_t some = std::min(block, samples - start);
    const at::Tensor x_some = x.narrow(0, start, some).contiguous(), g_some = g.narrow(0, start, some).contiguous();
    const float *x_from = x_some.const_data_ptr<float>(), *g_from = g_some.const_data_ptr<float>();
    at::parallel_for(0, some, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!in_place) gs.copy(g_from + i * gs.taken(), g_scratch.data() + i * gs.sample());
        xs.copy(x_from + i * xs.taken(), x_scratch.data() + i * xs.sample());
      }
    });
    const float* g_block = in_place ? g_from : g_scratch.data();
    // Each task has sums of its own, to which the samples are added in their order, whatever the threads.
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task % in_group, tile = task / in_group % tiles, group = task / in_group / tiles;
        const int64_t o = group * out_group + tile * kOut, many = std::min<int64_t>(kOut, out_group - tile * kOut);
        for (int64_t i = 0; i < some; ++i) {
          for (int64_t row = 0; row < high; ++row) {
            const float* x_row = x_scratch.data() + i * xs.sample() + (group * in_group + c) * xs.plane() +
                                 row * shape.dilation[0] * xs.columns;
            conv_row({g_block + i * gs.sample() + o * gs.plane(), x_row, gs.plane(), gs.rows, gs.columns, xs.columns,
                      shape.dilation[1], in_group * high * wide, to + (o * in_group + c) * high * wide + row * wide},
                     many, wide);
          }
        }
      }
    });
  }
  total.unsafeGetTensorImpl()->bump_version();
}

}  // namespace ewc
