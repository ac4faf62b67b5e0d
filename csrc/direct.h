// The op that Python may call without torch.ops.
#pragma once

#include <Python.h>

namespace ewc {

extern PyMethodDef direct_penalty_accumulate;

}  // namespace ewc
