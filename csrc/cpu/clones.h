// One build that is fast on every x86-64 machine: the compiler emits a function once per instruction set, the dynamic
// linker picks one at load. Elsewhere (other compilers, other processors, musl) the macro is empty and the plain loop
// is built; it is right everywhere.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && defined(__OPTIMIZE__)
#if __GNUC__ >= 12
#define EWC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // GCC 11 knows no levels here
#define EWC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define EWC_CLONES
#endif
