// Types, and the team of threads that works on one row or tile. The same text is compiled for the device, where a team
// is a block; for the host's tests, where it is one thread, or several that stand for a block (host.cuh); and for solves
// on a CPU (kernels/cpu), where ALONE tells the compiler that it is one thread.
#pragma once

#ifdef __CUDACC__
#define EITHER __host__ __device__ inline
#define NOT_INLINED __host__ __device__ __noinline__
#define DEVICE_ONLY(...) __VA_ARGS__
#define HOST_ONLY(...)
#else
#ifdef ALONE
#include <cmath>
#include <cstring>
#else
#include "host.cuh"
#endif
#define EITHER inline
#define NOT_INLINED inline
#define DEVICE_ONLY(...)
#define HOST_ONLY(...) __VA_ARGS__
using namespace std;
#endif

#ifndef REAL
#define REAL float  // the host's tests also take double
#endif
typedef REAL real;

#ifndef PRECISION
#define PRECISION FP32
#endif

#if PRECISION == FP16
DEVICE_ONLY(typedef unsigned short operand;)  // the bits of a half: NVRTC knows the type only through a header
HOST_ONLY(typedef _Float16 operand;)
#else
typedef real operand;
#endif

// What the kernels before have written is complete after this, and the kernels behind may be brought in. Every block
// must come here, or a later kernel could be told that an earlier one has ended. Without the launch attribute for
// programmatic dependent launch it does nothing.
EITHER void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#ifdef __CUDACC__

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(BLOCK_##name, 1) name

__device__ inline float from_half(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// A block as a team.
#define TEAM                      \
    __shared__ double shared[32]; \
    Team team = {(int)threadIdx.x % 32, (int)threadIdx.x / 32, (int)blockDim.x / 32, shared}

#endif

EITHER operand to_operand(real x) {
#if PRECISION == FP16
    DEVICE_ONLY(operand h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h;)
    HOST_ONLY(return (operand)(float)x;)
#elif PRECISION == TF32
    // The hardware drops the low 13 bits; half of the last kept digit makes that a rounding.
    unsigned bits;
    float single = (float)x;
    memcpy(&bits, &single, 4);
    bits = (bits + 0x1000u) & 0xFFFFE000u;
    memcpy(&single, &bits, 4);
    return single;
#else
    return x;
#endif
}

EITHER real from_operand(operand x) {
#if PRECISION == FP16
    DEVICE_ONLY(return from_half(x);)
    HOST_ONLY(return (real)(float)x;)
#else
    return x;
#endif
}

EITHER real slope(operand activation) { return from_operand(activation) > 0 ? (real)1 : (real)SLOPE; }

EITHER bool is_finite(double x) { return x - x == 0; }

#ifdef ALONE

struct Team {
    static constexpr bool alone = true;
    static constexpr int lane = 0, warp = 0, warps = 1, lanes = 1;

    static constexpr int thread() { return 0; }
    static constexpr int threads() { return 1; }
    static constexpr bool first() { return true; }
    static void sync() {}
    template <class T> static T warp_sum(T x) { return x; }
    static double sum(double x) { return x; }
    static double max(double x) { return x; }
    static int rank(bool yes, int* total) {
        *total = yes;
        return 0;
    }
};

#else

// The threads that work together: `warps` warps of `lanes` threads. All of them must come to each call below.
struct Team {
    static constexpr bool alone = false;
    int lane, warp, warps;
    double* shared;  // one number a warp
    DEVICE_ONLY(static constexpr int lanes = 32;)
    HOST_ONLY(int lanes; Crew * crew;)  // without a crew: one thread

    EITHER int thread() const { return warp * lanes + lane; }
    EITHER int threads() const { return warps * lanes; }
    EITHER bool first() const { return thread() == 0; }

    EITHER void sync() const {
        DEVICE_ONLY(__syncthreads();)
        HOST_ONLY(if (crew) crew->block.wait(thread());)
    }

    // The number of the lane whose bits differ by `far`.
    template <class T> EITHER T across(T x, int far) const {
        DEVICE_ONLY(return __shfl_xor_sync(~0u, x, far);)
        HOST_ONLY(return (T)crew->exchange(warp, lane, lane ^ far, x);)
    }

    // Over the lanes of a warp, the same in all of them.
    template <class T> EITHER T warp_sum(T x) const {
        for (int far = lanes / 2; far; far /= 2) x += across(x, far);
        return x;
    }

    // Over all threads, the same in all of them. Its many places would bloat the kernels if it were inlined.
    NOT_INLINED double sum(double x) const {
        x = warp_sum(x);
        sync();
        if (lane == 0) shared[warp] = x;
        sync();
        double total = 0;
        for (int i = 0; i < warps; i++) total += shared[i];
        return total;
    }

    EITHER double max(double x) const {
        for (int far = lanes / 2; far; far /= 2) x = fmax(x, across(x, far));
        sync();
        if (lane == 0) shared[warp] = x;
        sync();
        double top = shared[0];
        for (int i = 1; i < warps; i++) top = fmax(top, shared[i]);
        return top;
    }

    // How many threads before this one say yes, and in `total` how many do at all.
    EITHER int rank(bool yes, int* total) const {
        int before = 0, all = yes;
        for (int far = 1; far < lanes; far *= 2) {  // of 2 far lanes, the upper half has all of the lower one before it
            int other = across(all, far);
            if (lane & far) before += other;
            all += other;
        }
        sync();
        if (lane == 0) shared[warp] = all;
        sync();
        *total = 0;
        for (int i = 0; i < warps; i++) {
            if (i < warp) before += (int)shared[i];
            *total += (int)shared[i];
        }
        return before;
    }
};

#endif

// What the threads of a warp, or of the team, sum up of n numbers each. A thread that is alone takes them in PARTS, side
// by side, which its vector units can; their order depends on nothing but n.
#define PARTS 32

template <class Sum, class X> EITHER Sum of_parts(int n, X x) {
    Sum part[PARTS] = {};
    int i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int j = 0; j < PARTS; j++) part[j] += x(i + j);
    for (int j = 0; i + j < n; j++) part[j] += x(i + j);
    for (int far = PARTS / 2; far; far /= 2)
        for (int j = 0; j < far; j++) part[j] += part[j + far];
    return part[0];
}

// x . y, the same in all lanes of a warp.
EITHER real dot(const Team& team, const real* x, const real* y, int n) {
    if (team.alone) return of_parts<real>(n, [=](int i) { return x[i] * y[i]; });
    real total = 0;
    for (int i = team.lane; i < n; i += team.lanes) total += x[i] * y[i];
    return team.warp_sum(total);
}
