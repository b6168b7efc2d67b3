// Dense layers for few rows: input weight^T and its epilogue. Twin: the layers of engine/reference/field.py,
// `leaky(x @ W.T + b)` forwards and `(g * slope) @ W` backwards.
//
// A layer of a mapping network for 16 rows is bound by latency, not by arithmetic. So there is no staging in shared
// memory: every warp takes its own chunks of k, reads each number it needs once, 16 bytes a thread, straight into the
// registers that the tensor core wants, and only the warps' sums meet in shared memory. What makes the 16 bytes fit is
// that a dot product may be summed in any order of k: thread t of a quad calls its numbers the t-th of the fragment,
// wherever they lie, and does so for both operands.
#pragma once

// One entry of a layer's result, from its sum over k; `i` is the row of the input.
EITHER void finish(const Dense& p, int i, int column, real sum) {
    long long place = (long long)i * p.n + column;
    int row = i / p.each;
    if (p.bias) sum += p.bias[column];
    if (p.leaky) sum = sum > 0 ? sum : (real)SLOPE * sum;
    if (p.activation) sum *= slope(p.activation[(long long)row * p.n + column]);
    operand rounded = to_operand(sum);
    if (p.output) p.output[place] = rounded;
    for (int j = 0; p.seeds && j < p.columns; j++) {
        real seed = p.seeds[(long long)j * p.n + column];
        p.seeded[((long long)i * p.columns + j) * p.n + column] = to_operand(seed * slope(rounded));
    }
    if (p.average) {
        sum = p.average[column] + p.psi[row] * (sum - p.average[column]);
        p.truncated[place] = to_operand(sum);
    }
    if (p.exact) p.exact[place] = sum;
}

// A level entry by entry: what the tiles below are to give.
EITHER void dense(const Level& level) {
    for (int l = 0; l < level.count; l++) {
        const Dense& p = level.problems[l];
        for (int i = 0; i < level.rows * p.each; i++)
            for (int column = 0; column < p.n; column++) {
                const operand *x = p.input + (long long)i * p.k, *w = p.weight + (long long)column * p.k;
                real sum = 0;
                for (int k = 0; k < p.k; k++) sum += from_operand(x[k]) * from_operand(w[k]);
                finish(p, i, column, sum);
            }
    }
}

// The problem that a block has a tile of, or null; `tile` becomes the tile's number in it.
EITHER const Dense* problem_of(const Level& level, int columns, int* tile) {
    const Dense* found = level.problems;
    for (int left = level.count; left; left--, found++) {
        int tiles = (found->n + columns - 1) / columns;
        if (*tile < tiles) return found;
        *tile -= tiles;
    }
    return 0;
}

#if PRECISION == FP16
#define CHUNK 32  // numbers of k in the 16 bytes of each thread of a quad
#else
#define CHUNK 16
#endif

// What a thread keeps of a 16 x 8 tile: sums, and the weights of a chunk. In the end thread 4 g + t of a warp has the
// sums of rows g and g + 8, columns 2 t and 2 t + 1. Without tensor cores each thread of a quad sums over its own
// numbers for all 8 columns, and the quad adds up in the end.
#if PRECISION == FP32
#define OWN_COLUMNS 8
#define DEPTH 1  // chunks in flight; registers are the limit
#else
#define OWN_COLUMNS 1
#define DEPTH 2
#endif

struct Sums {
    float of[4 * OWN_COLUMNS];
};

struct Weights {
    uint4 column[OWN_COLUMNS];
};

EITHER float as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

EITHER uint4 load(const operand* at) {
    DEVICE_ONLY(return *(const uint4*)at;)
    HOST_ONLY(uint4 chunk; memcpy(&chunk, at, 16); return chunk;)
}

// One number of a register, for the host.
EITHER float number_in(unsigned bits, int part) {
    HOST_ONLY(if (PRECISION == FP16) {
        _Float16 half[2];
        memcpy(half, &bits, 4);
        return (float)half[part];
    })
    return part ? 0 : as_float(bits);
}

#if PRECISION != FP32
// sums += A B on the tensor core; the order of registers is that of mma.m16n8k16 and mma.m16n8k8.
EITHER void multiply(const Team& team, Sums& sums, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                     unsigned b1) {
#ifndef __CUDACC__
    unsigned a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    team.crew->multiply(team.warp, team.lane, sums.of, a, b, PRECISION == FP16 ? 2 : 1, number_in);
#else
#if PRECISION == FP16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
#endif
    asm(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
#endif

EITHER void accumulate(const Team& team, Sums& sums, uint4 top, uint4 bottom, const Weights& w) {
#if PRECISION == FP32
    const unsigned a[] = {top.x, top.y, top.z, top.w}, b[] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const unsigned c[] = {w.column[j].x, w.column[j].y, w.column[j].z, w.column[j].w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            sums.of[j] = fmaf(as_float(a[k]), as_float(c[k]), sums.of[j]);
            sums.of[8 + j] = fmaf(as_float(b[k]), as_float(c[k]), sums.of[8 + j]);
        }
    }
#else
    uint4 c = w.column[0];
    multiply(team, sums, top.x, bottom.x, top.y, bottom.y, c.x, c.y);
    multiply(team, sums, top.z, bottom.z, top.w, bottom.w, c.z, c.w);
#endif
}

// The four sums that belong to this thread: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
EITHER void own_sums(const Team& team, const Sums& sums, float* own) {
#if PRECISION == FP32
    int t = team.lane % 4;
    float half[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {  // of each row: columns 0 to 3 to the first two threads, 4 to 7 to the others
        float low = sums.of[i / 4 * 8 + i % 4], high = sums.of[i / 4 * 8 + i % 4 + 4];
        half[i] = (t & 2 ? high : low) + team.across(t & 2 ? low : high, 2);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = half[i / 2 * 4 + i % 2], high = half[i / 2 * 4 + i % 2 + 2];
        own[i] = (t & 1 ? high : low) + team.across(t & 1 ? low : high, 1);
    }
#else
    for (int i = 0; i < 4; i++) own[i] = sums.of[i];
#endif
}

// A block does (16 M MW) rows x (8 N NW) columns: MW x NW warps of M x N tiles each, KW times over with shares of k.
template <int M, int N, int MW, int NW, int KW> struct Tile {
    static constexpr int ROWS = 16 * M * MW, COLUMNS = 8 * N * NW, THREADS = 32 * MW * NW * KW;

    float shares[KW][ROWS][COLUMNS];

    EITHER void run(const Team& team, const Level& level, int tile, int tile_row) {
        const Dense* found = problem_of(level, COLUMNS, &tile);
        int first = tile_row * ROWS, rows = found ? level.rows * found->each : 0;
        if (first >= rows) return wait_for_inputs();
        const Dense p = *found;

        int g = team.lane / 4, t = team.lane % 4, share = team.warp / (MW * NW), chunks = p.k / CHUNK;
        int m = team.warp % MW * M * 16, n = team.warp / MW % NW * N * 8;
        const operand* weight = p.weight + (long long)(tile * COLUMNS + n) * p.k + t * (CHUNK / 4);
        const operand* input = p.input + t * (CHUNK / 4);
        auto at = [&](const operand* base, int row, int chunk) {
            return chunk < chunks ? load(base + (long long)row * p.k + chunk * CHUNK) : uint4{0, 0, 0, 0};
        };
        Weights w[DEPTH][N];
        auto fetch_weights = [&](int chunk) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int i = 0; i < OWN_COLUMNS; i++)
                        w[d][j].column[i] = at(weight, 8 * j + (OWN_COLUMNS == 8 ? i : g), chunk + d * KW);
        };
        fetch_weights(share);  // they do not depend on the kernel before
        wait_for_inputs();

        Sums sums[M][N] = {};
        for (int chunk = share; chunk < chunks;) {
            uint4 a[DEPTH][M][2];
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
#pragma unroll
                for (int i = 0; i < 2 * M; i++) {
                    int row = first + m + 8 * i + g;
                    a[d][i / 2][i % 2] = at(input, row < rows ? row : rows - 1, chunk + d * KW);
                }
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
#pragma unroll
                for (int i = 0; i < M; i++)
#pragma unroll
                    for (int j = 0; j < N; j++) accumulate(team, sums[i][j], a[d][i][0], a[d][i][1], w[d][j]);
            chunk += DEPTH * KW;
            fetch_weights(chunk);
        }
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                float own[4];
                own_sums(team, sums[i][j], own);
                for (int e = 0; e < 4; e++)
                    shares[share][m + 16 * i + g + 8 * (e / 2)][n + 8 * j + 2 * t + e % 2] = own[e];
            }
        team.sync();
        for (int e = team.thread(); e < ROWS * COLUMNS; e += team.threads()) {
            int row = e / COLUMNS, column = e % COLUMNS;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < KW; i++) sum += shares[i][row][column];
            if (first + row < rows) finish(p, first + row, tile * COLUMNS + column, sum);
        }
    }
};

typedef Tile<1, 1, 1, 1, 8> Tile16x8;
typedef Tile<2, 2, 1, 1, 4> Tile32x16;
typedef Tile<2, 2, 2, 2, 2> Tile64x32;
static_assert(Tile16x8::THREADS == BLOCK_dense_16x8, "");
static_assert(Tile32x16::THREADS == BLOCK_dense_32x16, "");
static_assert(Tile64x32::THREADS == BLOCK_dense_64x32, "");
