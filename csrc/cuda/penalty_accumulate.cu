#include "penalty.cuh"

namespace ewc {
template cudaError_t launch_penalty<Mode::kAccumulate>(const PenaltyLaunch&, cudaStream_t);
}  // namespace ewc
