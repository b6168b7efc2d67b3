// The kernels that are the same for every precision of operands. layout.cuh says what the kernels share;
// engine/cuda/compile.py makes constants.cuh.
#include "constants.cuh"
#include "kernel.cuh"
#include "layout.cuh"
#include "field.cuh"
#include "control.cuh"
#include "gauss_newton.cuh"
#include "runge_kutta.cuh"
#include "turnover.cuh"
#include "pixels.cuh"

// Memory that a block shares.
struct Fast {
    double numbers[3 * FAST_COLUMNS * FAST_COLUMNS + 3 * FAST_COLUMNS + 2];
};

DEFINE(pullback, Solve, Nothing, wait_for_inputs(); pullback(team, *given, x, y))
DEFINE(gauss_newton, Solve, Fast, wait_for_inputs(); gauss_newton(team, *given, x, memory.numbers))
DEFINE(runge_kutta, Solve, Nothing, wait_for_inputs(); runge_kutta(team, *given, x))
DEFINE(turnover, Solve, Nothing, wait_for_inputs(); turnover(team, *given))

ON_HOST(pullback, Solve, FOR_SLOTS pullback(team, *given, x, y))
ON_HOST(gauss_newton, Solve, FOR_ROWS gauss_newton(team, *given, x, 0))
ON_HOST(runge_kutta, Solve, FOR_ROWS runge_kutta(team, *given, x))
ON_HOST(turnover, Solve, turnover(team, *given))
ON_HOST(turnover_while, Solve, turnover(team, *given))

#ifdef __CUDACC__

#define DEFINE_PIXELS(name, type)                                                               \
    KERNEL(name)(const type* images, unsigned char* pixels, int rows, int channels, int area) { \
        long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                         \
        wait_for_inputs();                                                                      \
        if (i < (long long)rows * area) to_pixel(images, pixels, i, channels, area);            \
    }
DEFINE_PIXELS(pixels_f32, float)
DEFINE_PIXELS(pixels_f16, Half)

#else

extern "C" void host_pixels_f32(const float* images, unsigned char* pixels, int rows, int channels, int area) {
    for (int i = 0; i < rows * area; i++) to_pixel(images, pixels, i, channels, area);
}

#endif
