// Dense layers for many rows, where arithmetic counts: the same layers as dense.cuh by wgmma. A block is a warpgroup
// with a tile of 64 x 64; its operands come through shared memory, where each number serves 64 others.
#pragma once
#include "wgmma.cuh"

struct Wide {
    static constexpr int ROWS = 64, COLUMNS = 64, THREADS = 128;
    // Copies run AHEAD chunks of k before their products, into the stage of the products before the last, which are
    // done; the last ones may still read theirs.
    static constexpr int STAGES = 5, AHEAD = STAGES - 2;
    static constexpr int LONG = 16 / (int)sizeof(operand);  // numbers in 16 bytes
    static constexpr int LENGTH = PIECES * LONG;            // numbers of k in a chunk

    struct Stage {
        unsigned char input[STRIP], weight[STRIP];
    };
    union alignas(CORE) {
        Stage stages[STAGES];
        float sums[ROWS][COLUMNS + 8];  // the gap keeps the quads of a warp on different banks
    };

    EITHER void run(const Team& team, const Level& level, int tile, int tile_row) {
        const Dense* found = problem_of(level, COLUMNS, &tile);
        const int first = tile_row * ROWS, column = tile * COLUMNS, rows = found ? level.rows * found->each : 0;
        if (first >= rows) return wait_for_inputs();
        const Dense p = *found;
        const int chunks = p.k / LENGTH, piece = team.lane / 8;
        Async async(team, this, sizeof *this);

        // 64 rows from `from` on, of which only those below `end` exist: the others repeat the last one.
        auto copy = [&](unsigned char* strip, const operand* matrix, int from, int end, int chunk) {
            for (int i = 0; i < 2; i++) {
                int row = 8 * (team.warp + 4 * i) + team.lane % 8, there = from + row < end ? from + row : end - 1;
                async.copy(strip + PLACE(row, piece), matrix + (long long)there * p.k + chunk * LENGTH + piece * LONG);
            }
        };
        auto copy_weight = [&](int chunk) {
            if (chunk < chunks) copy(stages[chunk % STAGES].weight, p.weight, column, p.n, chunk);
        };
        auto copy_input = [&](int chunk) {
            if (chunk < chunks) copy(stages[chunk % STAGES].input, p.input, first, rows, chunk);
            async.commit_copies();  // also an empty group, so that their number tells the chunk
        };
        for (int chunk = 0; chunk < AHEAD; chunk++) copy_weight(chunk);  // they do not depend on the kernel before
        wait_for_inputs();
        for (int chunk = 0; chunk < AHEAD; chunk++) copy_input(chunk);

        float own[32] = {};
        for (int chunk = 0; chunk < chunks; chunk++) {
            async.wait_copies<AHEAD - 1>();
            async.show_copies();
            async.wait<1>(own);
            // Now this chunk is there from all threads, and the products of the one before the last are done in all.
            team.sync();
            copy_weight(chunk + AHEAD);
            copy_input(chunk + AHEAD);
            const Stage& stage = stages[chunk % STAGES];
            const unsigned input = async.address(stage.input), weight = async.address(stage.weight);
            async.begin(own);
            for (int step = 0; step < PIECES / 2; step++)
                async.multiply(own, described(input + step * STEP), described(weight + step * STEP));
            async.commit();
        }
        async.wait<0>(own);
        team.sync();  // nobody reads the stages any more

        // Register i of lane 4 g + t of warp w: row 16 w + g, and g + 8 for the second half of each four.
        const int g = team.lane / 4, t = team.lane % 4;
#pragma unroll
        for (int i = 0; i < 32; i++) sums[16 * team.warp + g + i / 2 % 2 * 8][i / 4 * 8 + 2 * t + i % 2] = own[i];
        team.sync();
        for (int e = team.thread(); e < ROWS * COLUMNS; e += team.threads()) {
            int row = first + e / COLUMNS, c = column + e % COLUMNS;
            if (row < rows && c < p.n) finish(p, row, c, sums[e / COLUMNS][e % COLUMNS]);
        }
    }
};
static_assert(Wide::THREADS == BLOCK_dense_64x64, "");
static_assert(sizeof(Wide) <= 48 * 1024 - 256, "more would have to be asked for");
