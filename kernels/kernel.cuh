// How a function of a row or of a tile becomes a kernel: on the device for a block, on the host for one thread in a
// loop (host_*) or for a block of threads (block_*).
#pragma once
#include "common.cuh"

struct Nothing {};  // memory of a block that shares none

#ifdef __CUDACC__

#define DEFINE(name, Given, Memory, body)         \
    KERNEL(name)(const Given* given) {            \
        __shared__ Memory memory;                 \
        const int x = blockIdx.x, y = blockIdx.y; \
        TEAM;                                     \
        body;                                     \
    }
#define ON_HOST(name, Given, body)

#else

#define DEFINE(name, Given, Memory, body)                                                  \
    extern "C" void block_##name(const Given* given, int x, int y, int lanes, int warps) { \
        static Memory memory;                                                              \
        static double shared[32];                                                          \
        run_block(lanes, warps, [&](int lane, int warp, Crew* crew) {                      \
            Team team = {lane, warp, warps, shared, lanes, crew};                          \
            (void)memory;                                                                  \
            body;                                                                          \
        });                                                                                \
    }
#define ON_HOST(name, Given, body)                          \
    extern "C" void host_##name(const Given* given) {       \
        static double shared[32];                           \
        static const Team team = {0, 0, 1, shared, 1, 0};   \
        (void)team;                                         \
        body;                                               \
    }
#define FOR_ROWS for (int x = 0; x < given->capacity; x++)
#define FOR_SLOTS FOR_ROWS for (int y = 0; y < given->slots; y++)

#endif
