#include "tap.h"

#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace ewc {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Product.add_vectors_.
void add_vectors_(const at::Tensor& total, const at::Tensor& x, const at::Tensor& g_squared, const VectorsRule& rule) {
  for (int64_t start = 0; start < x.size(0); start += rule.vectors) {
    const int64_t end = std::min(start + rule.vectors, x.size(0));
    const at::Tensor x_squared = x.slice(0, start, end).to(g_squared.scalar_type()).square();
    const at::Tensor g_part = g_squared.slice(0, start, end);
    const at::Tensor left = (rule.left_is_g ? g_part : x_squared).t();
    const at::Tensor& right = rule.left_is_g ? x_squared : g_part;
    if (total.numel() < rule.small) {
      total.add_(at::mm(left, right));
    } else {
      total.addmm_(left, right);
    }
  }
}

struct TapVectors : torch::autograd::Function<TapVectors> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const at::Tensor&, const at::Tensor& x,
                            const Sums& sums, const VectorsRule& rule, const Several& several) {
    ctx->save_for_backward({sums.weight.defined() ? x : at::Tensor()});
    ctx->saved_data["weight"] = sums.weight;  // not saved as x is: the sums change before
    ctx->saved_data["bias"] = sums.bias;
    ctx->saved_data["squares"] = several.squares;
    ctx->saved_data["again"] = several.again;
    ctx->saved_data["left_is_g"] = rule.left_is_g;
    ctx->saved_data["small"] = rule.small;
    ctx->saved_data["vectors"] = rule.vectors;
    return y.detach();  // which the model may change
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor weight = ctx->saved_data["weight"].toTensor(), bias = ctx->saved_data["bias"].toTensor();
    const at::Tensor g = grads[0].to((weight.defined() ? weight : bias).scalar_type());
    const at::Tensor squares = ctx->saved_data["squares"].toTensor();
    if (squares.defined()) {
      squares.addcmul_(g, g);
      if (ctx->saved_data["again"].toTensor().item<bool>()) return gradients(grads[0]);
    }
    const at::Tensor g_squared = squares.defined() ? squares : g.square();
    if (weight.defined()) {
      const VectorsRule rule{ctx->saved_data["left_is_g"].toBool(), ctx->saved_data["small"].toInt(),
                             ctx->saved_data["vectors"].toInt()};
      add_vectors_(weight, ctx->get_saved_variables()[0], g_squared, rule);
    }
    if (bias.defined()) bias.add_(g_squared.sum(0));
    return gradients(grads[0]);
  }

  static variable_list gradients(const at::Tensor& g) {
    variable_list all(6);  // one for each argument of forward
    all[0] = g;
    return all;
  }
};

}  // namespace

at::Tensor tap_vectors(const at::Tensor& y, const at::Tensor& anchor, const at::Tensor& x, const Sums& sums,
                       const VectorsRule& rule, const Several& several) {
  // Kept in the precision in which autocast multiplied.
  const at::Tensor saved = at::isReducedFloatingType(y.scalar_type()) ? x.detach().to(y.scalar_type()) : x.detach();
  return TapVectors::apply(y, anchor, saved, sums, rule, several);
}

}  // namespace ewc
