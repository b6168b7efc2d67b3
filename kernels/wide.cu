// The kernel that needs instructions of sm_90a, which no other architecture has; for float16 and tf32.
#include "constants.cuh"
#include "kernel.cuh"
#include "layout.cuh"
#include "dense.cuh"
#if PRECISION != FP32
#include "wide.cuh"

DEFINE(dense_64x64, Level, Wide, memory.run(team, *given, x, y))
ON_HOST(dense_64x64, Level, dense(*given))
#endif
