// Copies into shared memory and matrix products that run beside the threads that ask for them: cp.async, and wgmma of
// sm_90a (PTX ISA 9.1, sections 9.7.9.25 and 9.7.15). On the host host_wgmma.cuh does what they may do at worst.
//
// wgmma reads both operands from shared memory, through the async proxy: what other instructions have written there is
// for certain to be seen only after fence.proxy.async of the threads that wrote, and a barrier.
#pragma once

// The tiles of 64 rows that a product reads: 64 bytes of k from each row, in core matrices of 8 rows x 16 bytes, one
// after the other along k, then the next 8 rows. An instruction takes 32 bytes of k, two core matrices.
#define CORE 128                        // bytes of a core matrix
#define PIECES 4                        // core matrices along k
#define STEP (2 * CORE)                 // from one instruction's operands to the next one's
#define STRIP (64 / 8 * PIECES * CORE)  // bytes of a tile
// Where in a tile 16 bytes of a row lie.
#define PLACE(row, piece) (((row) / 8 * PIECES + (piece)) * CORE + (row) % 8 * 16)

// Where an operand lies: K-major, without swizzling (matrix descriptor, 9.7.15.5.1.2.2). Addresses are those of shared
// memory. The leading dimension's offset is from one core matrix to the next along k, the stride dimension's to the
// next 8 rows.
EITHER unsigned long long described(unsigned address) {
    const unsigned long long along_k = CORE, along_rows = PIECES * CORE;
    return (address & 0x3FFFF) >> 4 | along_k >> 4 << 16 | along_rows >> 4 << 32;
}

#ifndef __CUDACC__
#include "host_wgmma.cuh"
#else

#if PRECISION == FP16
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
#define NOT_TRANSPOSED ", 0, 0"
#else
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 "
#define NOT_TRANSPOSED  // only 16-bit operands could be
#endif
#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])

// A warpgroup, which is the whole block. All threads must come to each call.
struct Async {
    __device__ Async(const Team&, const void*, int) {}

    __device__ static unsigned address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

    // 16 bytes.
    __device__ static void copy(void* shared, const void* global) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(shared)), "l"(global) : "memory");
    }
    __device__ static void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // Until all but the last N groups of this thread's copies are there.
    template <int N> __device__ static void wait_copies() {
        asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    }
    // To the tensor core.
    __device__ static void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

    // The sums are in registers that a product may write at any time from here to its end.
    __device__ static void begin(float* sums) {
        hold(sums);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    }
    // sums += A B^T, 64 x 64, over 32 bytes of k.
    __device__ static void multiply(float* sums, unsigned long long a, unsigned long long b) {
        asm volatile(
            "{.reg .pred adds;\n"
            "setp.eq.u32 adds, 0, 0;\n" WGMMA
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds, 1, 1" NOT_TRANSPOSED ";}"
            : FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16), FOUR(20), FOUR(24), FOUR(28)
            : "l"(a), "l"(b)
            : "memory");
    }
    __device__ static void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
    // Until all but the last N groups of products are done.
    template <int N> __device__ static void wait(float* sums) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
        if (N == 0) hold(sums);
    }

    // For the compiler: nothing that it does with these registers may cross this place.
    __device__ static void hold(float* sums) {
#pragma unroll
        for (int i = 0; i < 32; i++) asm volatile("" : "+f"(sums[i])::"memory");
    }
};

#endif
