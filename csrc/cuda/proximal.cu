#include "steps.cuh"

namespace ewc {
namespace {

struct Proximal {
  using Call = ProximalCall;
  template <typename M>
  using Step = MetricStep<M>;
  static constexpr bool kHasGradient = false, kWritesState = false, kStepsAlone = false, kRounds = false;
  static constexpr int kStates = 1, kUsualStates = 1;

  static EWC_HD int state_lists(const Call& call) { return call.metric == Metric::kConstant ? 0 : 1; }
  static EWC_DEVICE bool rounds(const Call&, Dtype) { return false; }

  template <typename Arguments, typename M>
  static EWC_DEVICE void prepare(const Arguments& arguments, int t, Shared<Step<M>, M>& shared) {
    const double* rates = arguments.call.rates + 4 * (arguments.first_row + t);
    shared.pull.lr = static_cast<M>(rates[0]);
    shared.step = {static_cast<M>(rates[1]), static_cast<M>(rates[2]), static_cast<M>(rates[3])};
  }

  template <Coupling coupling, int n, typename M>
  static EWC_DEVICE void update(const Call& call, const Step<M>& step, const Pull<M>& pull, Elements<n, M>& x,
                                M& weighted, M& squared) {
    if constexpr (coupling == Coupling::kProximal) {  // the only one there is
      switch (call.metric) {
        case Metric::kConstant: return update<Metric::kConstant>(step, pull, x, weighted, squared);
        case Metric::kLinear: return update<Metric::kLinear>(step, pull, x, weighted, squared);
        case Metric::kRoot: return update<Metric::kRoot>(step, pull, x, weighted, squared);
      }
    }
  }

 private:
  template <Metric kind, int n, typename M>
  static EWC_DEVICE void update(const Step<M>& step, const Pull<M>& pull, Elements<n, M>& x, M& weighted, M& squared) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      with_penalty<Coupling::kProximal>(
          x.parameter[j], M(0), x.anchor[j], x.fisher[j], pull, weighted, squared,
          [&](M, M&) { return metric_of<kind>(step.factor, step.inner, step.eps, x.state[0][j]); });
    }
  }
};

}  // namespace

cudaError_t launch_proximal(const StepLaunch& launch, const ProximalCall& call, cudaStream_t stream) {
  return launch_steps<Proximal>(launch, call, stream, [](auto&, int64_t, int) {});
}

}  // namespace ewc
