#include "steps.cuh"

namespace ewc {
namespace {

struct Sgd {
  using Call = SgdCall;
  template <typename M>
  using Step = SgdStep<M>;
  static constexpr bool kHasGradient = true, kWritesState = true, kStepsAlone = true, kRounds = false;
  static constexpr int kStates = 1, kUsualStates = 1;

  static EWC_HD int state_lists(const Call& call) { return call.options.momentum == 0.0 ? 0 : 1; }
  static EWC_DEVICE bool rounds(const Call&, Dtype) { return false; }

  template <typename Arguments, typename M>
  static EWC_DEVICE void prepare(const Arguments& arguments, int, Shared<Step<M>, M>& shared) {
    SgdOptions options = arguments.call.options;
    options.lr = read(arguments.call.lr, 0, options.lr);
    shared.step = sgd_step<M>(options, arguments.call.first);
    shared.pull.lr = static_cast<M>(options.lr);
  }

  template <Coupling coupling, int n, typename M>
  static EWC_DEVICE void update(const Call& call, const Step<M>& step, const Pull<M>& pull, Elements<n, M>& x,
                                M& weighted, M& squared) {
    if (call.options.momentum == 0.0) {
      update<coupling, Momentum::kNone>(step, pull, x, weighted, squared);
    } else if (call.options.nesterov) {
      update<coupling, Momentum::kNesterov>(step, pull, x, weighted, squared);
    } else {
      update<coupling, Momentum::kPlain>(step, pull, x, weighted, squared);
    }
  }

 private:
  template <Coupling coupling, Momentum kind, int n, typename M>
  static EWC_DEVICE void update(const Step<M>& step, const Pull<M>& pull, Elements<n, M>& x, M& weighted, M& squared) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      with_penalty<coupling>(x.parameter[j], step.sign * x.gradient[j], x.anchor[j], x.fisher[j], pull, weighted,
                             squared, [&](M gradient, M& parameter) {
                               step.decay != M(0) ? sgd_update<kind, true>(step, gradient, parameter, x.state[0][j])
                                                  : sgd_update<kind, false>(step, gradient, parameter, x.state[0][j]);
                               return step.metric;
                             });
    }
  }
};

}  // namespace

cudaError_t launch_sgd(const StepLaunch& launch, const SgdCall& call, cudaStream_t stream) {
  return launch_steps<Sgd>(launch, call, stream, [](auto&, int64_t, int) {});
}

}  // namespace ewc
