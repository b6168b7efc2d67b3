// The kernels that read or write operands of a matrix product: compiled once for every precision. layout.cuh says what
// the kernels share; engine/cuda/compile.py makes constants.cuh.
#include "constants.cuh"
#include "kernel.cuh"
#include "layout.cuh"
#include "tape.cuh"
#include "field.cuh"
#include "dense.cuh"

DEFINE(normalise, Solve, Nothing, wait_for_inputs(); normalise(team, *given, x))
DEFINE(tape, Solve, Nothing, wait_for_inputs(); tape(team, *given, x))
DEFINE(cotangents, Solve, Nothing, wait_for_inputs(); cotangents(team, *given, x, y))
DEFINE(dense_16x8, Level, Tile16x8, memory.run(team, *given, x, y))
DEFINE(dense_32x16, Level, Tile32x16, memory.run(team, *given, x, y))
DEFINE(dense_64x32, Level, Tile64x32, memory.run(team, *given, x, y))

ON_HOST(normalise, Solve, FOR_ROWS normalise(team, *given, x))
ON_HOST(tape, Solve, FOR_ROWS tape(team, *given, x))
ON_HOST(cotangents, Solve, FOR_SLOTS cotangents(team, *given, x, y))
ON_HOST(dense_16x8, Level, dense(*given))
ON_HOST(dense_32x16, Level, dense(*given))
ON_HOST(dense_64x32, Level, dense(*given))
