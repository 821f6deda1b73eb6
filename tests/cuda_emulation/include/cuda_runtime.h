// Stands in for the CUDA toolkit's header, so that a .cu file compiles as plain C++ and its kernels run on the CPU, one
// block after the other, each thread a fiber: the proof of their logic, their bounds and their barriers on a machine
// without a GPU. It says nothing about speed, registers, caches, memory ordering between blocks or approximate
// functions. __CUDACC__ and __CUDA_ARCH__ stay undefined.
#pragma once

#include "emulation/intrinsics.h"
#include "emulation/runtime.h"
#include "emulation/warp.h"

// Internal linkage, because the compiler neither puts a template's shared variables into a section nor gives them
// redzones while another file might hold the same ones.
#define __global__ static
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("vcrd_shared")))
