// ewc_fast._C: what was built, and for which machine. Importing it is what loads the library, and so registers the ops
// of schema.cpp. The ops are reached through torch.ops; those that are called most also from here (direct.cpp).
//
// Plain pybind11: torch/extension.h would make this the slowest file of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/clones.h"
#include "direct.h"

#define EWC_STRING_(...) #__VA_ARGS__
#define EWC_STRING(...) EWC_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#elif defined(_MSC_VER)
constexpr const char* kCompiler = "MSVC " EWC_STRING(_MSC_VER);
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef EWC_FAST_CUDA  // the version of nvcc; the architectures come with it
constexpr const char* kCuda = EWC_STRING(EWC_FAST_CUDA);
constexpr const char* kCudaArchitectures = EWC_STRING(EWC_FAST_CUDA_ARCHITECTURES);
#else
constexpr const char* kCuda = nullptr;
constexpr const char* kCudaArchitectures = "";
#endif

#ifdef NDEBUG
constexpr bool kDebug = false;
#else
constexpr bool kDebug = true;
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

// Whether EWC_CLONES expands to anything: the loops then exist once per instruction set.
constexpr bool kCloned = sizeof(EWC_STRING(EWC_CLONES)) > 1;

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["openmp"] = kOpenMP;
  info["cuda"] = kCuda ? py::object(py::str(kCuda)) : py::none();
  info["cuda_arch_list"] = kCudaArchitectures;
  info["debug"] = kDebug;
  return info;
}

std::string cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (kCloned) {
#if __GNUC__ >= 12
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#else  // the names that the clones have under GCC 11
    if (__builtin_cpu_supports("avx512f")) return "x86-64-v4";
    if (__builtin_cpu_supports("avx2")) return "x86-64-v3";
#endif
  }
#endif
  return "default";
}

// The size of the OpenMP pool that this library's loops run in; not torch.get_num_threads() if there were two pools.
std::optional<int> openmp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return std::nullopt;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of ewc_fast's compiled extension; importing it registers torch.ops.ewc_fast.";
  m.def("build_info", &build_info,
        "Compiler, C++ standard, OpenMP, CUDA version and architectures (None and '' without CUDA), debug.");
  m.def("cpu_capability", &cpu_capability, "Instruction set in use: 'x86-64-v4', 'x86-64-v3' or 'default'.");
  m.def("openmp_threads", &openmp_threads, "Threads that an OpenMP loop of this library gets; None without OpenMP.");
  if (PyModule_AddFunctions(m.ptr(), ewc::direct_ops) != 0) throw py::error_already_set();
}
