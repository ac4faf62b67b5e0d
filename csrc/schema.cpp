// Every native op of ewc_fast, on one page. Kernels are registered per device in cpu/ and cuda/; the dispatcher chooses.
//
// Common arguments of the penalty's ops
//   params      parameters of one dtype on one device, read in place
//   anchor      flat buffer of theta*; fisher: flat buffer of the Fisher diagonal
//   offsets     each parameter's first element in the flat buffers
//   strides     the strides, parameter after parameter, in whose memory order the flat buffers are laid
//   ewc_lambda  0-dim fp32 or fp64, read on the device; so are delta (damping times the mean Fisher),
//               scale (one per tensor), constant (fp64, one per tensor: what merging tasks has added),
//               grad_scale (a GradScaler's; multiplies the gradient) and found_inf (non-zero: no gradient is written)
//
// Results: penalty and predicted forgetting (0-dim, fp64 for fp64 parameters, else fp32), and by_tensor (fp64, 2 x n):
// each tensor's penalty and each tensor's predicted forgetting, the parts that the two totals are the sums of.
#include <torch/library.h>

TORCH_LIBRARY(ewc_fast, m) {
  // Reads parameter, anchor, Fisher.
  m.def(
      "penalty(Tensor[] params, Tensor anchor, Tensor fisher, int[] offsets, int[] strides, Tensor ewc_lambda, "
      "Tensor delta, Tensor? scale=None, Tensor? constant=None) "
      "-> (Tensor penalty, Tensor predicted, Tensor by_tensor)");

  // The same, and the gradient written into a flat buffer laid like the anchor.
  m.def(
      "penalty_grad(Tensor[] params, Tensor(a!) grad, Tensor anchor, Tensor fisher, int[] offsets, int[] strides, "
      "Tensor ewc_lambda, Tensor delta, Tensor? scale=None, Tensor? constant=None, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> (Tensor penalty, Tensor predicted, Tensor by_tensor)");

  // The same, and the gradient added to (maximize: subtracted from) given gradients, which may have another dtype.
  m.def(
      "penalty_accumulate_(Tensor[] params, Tensor(a!)[] grads, Tensor anchor, Tensor fisher, int[] offsets, "
      "int[] strides, Tensor ewc_lambda, Tensor delta, Tensor? scale=None, Tensor? constant=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, bool maximize=False) "
      "-> (Tensor penalty, Tensor predicted, Tensor by_tensor)");

  // buffer *= factor (0-dim, read on the device); nothing is read or written where the factor is 1.
  m.def("scale_(Tensor(a!) buffer, Tensor factor) -> ()");

  // fisher[i] += weight * sum_b grads[i][b]^2, where grads[i] has fisher[i]'s shape or one more leading dimension b, the
  // samples of a block. fisher: fp32 or fp64, in which it is added; grads: any dtype, widened before it is squared.
  m.def("fisher_accumulate_(Tensor(a!)[] fisher, Tensor[] grads, float weight=1.0) -> ()");

  // Optimizer steps with the penalty in the same pass. Every parameter has a gradient; offset -1: it is not protected, and
  // without an anchor none is. strides: the memory order that each parameter's tensors share with the state. lr_tensor,
  // if given, replaces lr. grad_scale: the gradients are divided by it, in place; found_inf: non-zero: nothing is written.
  // proximal: see elementwise.h. Results as above.

  // As torch.optim.AdamW; steps: 0-dim, this step counted. seed >= 0: bf16 tensors are rounded stochastically, keyed on
  // (seed, step, ordinal, element).
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] max_exp_avg_sqs, Tensor[] steps, int[] strides, Tensor? anchor, Tensor? fisher, int[] offsets, "
      "Tensor? ewc_lambda, Tensor? delta, Tensor? scale, Tensor? constant, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? lr_tensor, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
      "bool proximal, int seed, int[] ordinals) -> (Tensor penalty, Tensor predicted, Tensor by_tensor)");

  // As torch.optim.SGD; first: the momentum begins with this gradient, and the buffers hold zeros.
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, int[] strides, Tensor? anchor, "
      "Tensor? fisher, int[] offsets, Tensor? ewc_lambda, Tensor? delta, Tensor? scale, Tensor? constant, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, bool first, bool proximal) "
      "-> (Tensor penalty, Tensor predicted, Tensor by_tensor)");

  // The proximal pull after a step of any optimizer. rates: fp64, (number of tensors, 4): learning rate, and factor, inner
  // and eps of the metric D = factor (sqrt(inner moment) + eps); not root: factor times moment; no moments: factor.
  m.def(
      "proximal_(Tensor(a!)[] params, Tensor[] moments, int[] strides, Tensor anchor, Tensor fisher, int[] offsets, "
      "Tensor ewc_lambda, Tensor delta, Tensor? scale, Tensor? constant, Tensor? found_inf, Tensor rates, bool root) "
      "-> (Tensor penalty, Tensor predicted, Tensor by_tensor)");
}
