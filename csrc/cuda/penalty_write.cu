#include "penalty.cuh"

namespace ewc {
template cudaError_t launch_penalty<Mode::kWrite>(const PenaltyLaunch&, cudaStream_t);
}  // namespace ewc
