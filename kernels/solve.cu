// The kernels of a solve. Each is a function of a row or of a tile from a header: on the device for a block, on the
// host for one thread in a loop (host_*) or for a block of threads (block_*). layout.cuh says what the kernels share;
// kernels/compile.py makes constants.cuh.
#include "constants.cuh"
#include "common.cuh"
#include "layout.cuh"
#include "tape.cuh"
#include "field.cuh"
#include "dense.cuh"
#include "control.cuh"
#include "gauss_newton.cuh"
#include "runge_kutta.cuh"
#include "turnover.cuh"
#include "pixels.cuh"

// Memory that a block shares.
struct Nothing {};
struct Fast {
    double numbers[3 * FAST_COLUMNS * FAST_COLUMNS + 3 * FAST_COLUMNS + 2];
};

#ifdef __CUDACC__

#define DEFINE(name, Given, Memory, body)         \
    KERNEL(name)(const Given* given) {            \
        __shared__ Memory memory;                 \
        const int x = blockIdx.x, y = blockIdx.y; \
        TEAM;                                     \
        body;                                     \
    }
#define DEFINE_PIXELS(name, type)                                                               \
    KERNEL(name)(const type* images, unsigned char* pixels, int rows, int channels, int area) { \
        long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                         \
        wait_for_inputs();                                                                      \
        if (i < (long long)rows * area) to_pixel(images, pixels, i, channels, area);            \
    }
DEFINE_PIXELS(pixels_f32, float)
DEFINE_PIXELS(pixels_f16, Half)

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

extern "C" {
static double shared[32];
static const Team team = {0, 0, 1, shared, 1, 0};
#define FOR_ROWS for (int x = 0; x < s->capacity; x++)
#define FOR_SLOTS FOR_ROWS for (int y = 0; y < s->slots; y++)
void host_normalise(const Solve* s) { FOR_ROWS normalise(team, *s, x); }
void host_tape(const Solve* s) { FOR_ROWS tape(team, *s, x); }
void host_cotangents(const Solve* s) { FOR_SLOTS cotangents(team, *s, x, y); }
void host_pullback(const Solve* s) { FOR_SLOTS pullback(team, *s, x, y); }
void host_gauss_newton(const Solve* s) { FOR_ROWS gauss_newton(team, *s, x, 0); }
void host_runge_kutta(const Solve* s) { FOR_ROWS runge_kutta(team, *s, x); }
void host_turnover(const Solve* s) { turnover(team, *s); }
void host_turnover_while(const Solve* s) { turnover(team, *s); }
void host_dense_16x8(const Level* level) { dense(*level); }
void host_dense_32x16(const Level* level) { dense(*level); }
void host_dense_64x32(const Level* level) { dense(*level); }
void host_pixels_f32(const float* images, unsigned char* pixels, int rows, int channels, int area) {
    for (int i = 0; i < rows * area; i++) to_pixel(images, pixels, i, channels, area);
}
}

#endif

DEFINE(normalise, Solve, Nothing, wait_for_inputs(); normalise(team, *given, x))
DEFINE(tape, Solve, Nothing, wait_for_inputs(); tape(team, *given, x))
DEFINE(cotangents, Solve, Nothing, wait_for_inputs(); cotangents(team, *given, x, y))
DEFINE(pullback, Solve, Nothing, wait_for_inputs(); pullback(team, *given, x, y))
DEFINE(gauss_newton, Solve, Fast, wait_for_inputs(); gauss_newton(team, *given, x, memory.numbers))
DEFINE(runge_kutta, Solve, Nothing, wait_for_inputs(); runge_kutta(team, *given, x))
DEFINE(turnover, Solve, Nothing, wait_for_inputs(); turnover(team, *given))
DEFINE(dense_16x8, Level, Tile16x8, memory.run(team, *given, x, y))
DEFINE(dense_32x16, Level, Tile32x16, memory.run(team, *given, x, y))
DEFINE(dense_64x32, Level, Tile64x32, memory.run(team, *given, x, y))
