#include "steps.cuh"

namespace ewc {
namespace {

struct AdamW {
  using Call = AdamWCall;
  template <typename M>
  using Step = AdamWStep<M>;
  static constexpr bool kHasGradient = true, kWritesState = true, kStepsAlone = true, kRounds = true;
  static constexpr int kStates = 3, kUsualStates = 2;

  static EWC_HD int state_lists(const Call& call) { return call.amsgrad ? 3 : 2; }
  static EWC_DEVICE bool rounds(const Call& call, Dtype dtype) { return call.seed >= 0 && dtype == Dtype::kBFloat16; }

  template <typename Arguments, typename M>
  static EWC_DEVICE void prepare(const Arguments& arguments, int t, Shared<Step<M>, M>& shared) {
    const Call& call = arguments.call;
    const double number = read({arguments.steps[t], call.fp64_steps}, 0, 0.0);
    if (number != shared.number) {  // two powers, in fp64: tensors mostly have the same
      AdamWOptions options = call.options;
      options.lr = read(call.lr, 0, options.lr);
      shared.step = adamw_step<M>(options, number);
      shared.pull.lr = static_cast<M>(options.lr);
      shared.number = number;
    }
    if (call.seed < 0) return;
#pragma unroll 1
    for (uint32_t list = 0; list < kMaxLists; ++list) {
      shared.keys[list] = rounding_key(static_cast<uint32_t>(call.seed), static_cast<uint32_t>(number),
                                       arguments.ordinals[t], list);
    }
  }

  // One formula with and without amsgrad: nothing is less than the largest of nothing.
  template <Coupling coupling, int n, typename M>
  static EWC_DEVICE void update(const Call& call, const Step<M>& step, const Pull<M>& pull, Elements<n, M>& x,
                                M& weighted, M& squared) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (!call.amsgrad) x.state[2][j] = M(-INFINITY);
      with_penalty<coupling>(x.parameter[j], step.sign * x.gradient[j], x.anchor[j], x.fisher[j], pull, weighted,
                             squared, [&](M gradient, M& parameter) {
                               return adamw_update<true>(step, gradient, parameter, x.state[0][j], x.state[1][j],
                                                         x.state[2][j]);
                             });
    }
  }
};

}  // namespace

cudaError_t launch_adamw(const StepLaunch& launch, const AdamWCall& call, cudaStream_t stream) {
  return launch_steps<AdamW>(launch, call, stream, [&](auto& arguments, int64_t row, int t) {
    arguments.steps[t] = call.steps[row];
    arguments.ordinals[t] = call.seed < 0 ? 0 : static_cast<uint32_t>(call.ordinals[row]);
  });
}

}  // namespace ewc
