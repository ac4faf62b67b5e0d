// The ops that Python may call without torch.ops.
#pragma once

#include <Python.h>

namespace ewc {

extern PyMethodDef direct_ops[];  // ends with an empty one, as Python wants it

}  // namespace ewc
