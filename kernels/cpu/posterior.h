// Samples of the posterior: candidates and walks of many rows, forwards only.
//
// engine/reference/posterior.py is the twin and says what a row does. Here a wave evaluates what all rows try next,
// those that draw and those that walk. Where few rows are left, each tries several things at once: further candidates,
// and steps for the case that those before them are refused. What turns out to be in vain costs time and changes
// nothing.
#pragma once
#include "noise.h"
#include "rows.h"

extern "C" {
// engine.reference.posterior.Settings; confidence is 0 where there is a guidance. outputs: logits of all heads.
struct PosteriorSettings {
    double confidence, guidance;
    int64_t fresh, steps, patience, outputs;
};

// Rows, and what they wish: each the number of one of the tapes. A row is at x (z_dim), where w (w_dim), logits
// (outputs), and log P relaxed and crisp are found; before it begins, x is 0 and log P minus infinity. phase: a Walk.
// spent (rows, 5): whether a candidate was accepted; candidates; steps, those that moved the row, those from inside.
struct Walks {
    int64_t rows, tapes;
    const TapeRecord* tape;
    const int64_t *wish, *label;
    const uint64_t* seed;
    const float* psi;
    float *x, *w, *logits;
    double *relaxed, *crisp;
    int32_t* phase;
    int64_t* spent;
};
}

enum Spent { ACCEPTED, CANDIDATES, WALKED, MOVED, INSIDE, SPENT };

// What a row tries in a wave: candidates or steps from `number` on, at the points from `first` on.
struct Attempt {
    int64_t row, number, first, count;
};

// The points of a wave, and what is found there. attempt, columns: of each point, and (points, columns) of its tape its
// place among those that read the column's head, whose logits are `found`.
struct Points {
    int64_t count, columns, nodes, outputs;  // columns, nodes: most of a tape
    const Attempt** attempt;
    int64_t *place, *label;
    float *z, *w, *psi, *logits;
    double *relaxed, *crisp, *u;
    step::Value* value;
    const float* const* found;
};

inline bool is_finite(const float* x, int64_t count) {
    uint32_t is_lost = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        is_lost |= (bits & 0x7F800000) == 0x7F800000;
    }
    return !is_lost;
}

inline bool has_crisp(const TapeRecord& tape) {
    for (int64_t i = 0; i < tape.nodes; i++)
        if (tape.code[4 * i] == OP_INSIDE || tape.code[4 * i] == OP_OUTSIDE) return true;
    return false;
}

// Points by their noise, the field there, and log P.
struct Wave : Evaluation<float> {
    Wave(Field& field, const Call& call, const ColumnTable& table, const Walks& walks, const Points& points)
        : Evaluation<float>(field, call), table(table), walks(walks), points(points) {}

    const ColumnTable& table;
    const Walks walks;
    const Points points;

    void run() override {
        int level = 0;
        auto count = [&](int64_t) { return points.count; };
        each_row(level, 1, count, [&](int64_t, int64_t i) { begin(i); });
        evaluate(level);
        each_row(level, 1, count, [&](int64_t, int64_t i) { read(i); });
    }

    void begin(int64_t i) {
        const Attempt& attempt = *points.attempt[i];
        int64_t row = attempt.row, number = attempt.number + i - attempt.first, d = net.z_dim;
        const float* x = walks.x + row * d;
        float* z = points.z + i * d;
        points.psi[i] = walks.psi[row], points.label[i] = walks.label[row];
        if (walks.phase[row] == step::WALK_BROUGHT) {
            std::copy_n(x, d, z);
        } else if (walks.phase[row] == step::WALK_DRAWING) {
            normals(walks.seed[row], number, d, z);
        } else {
            normals(walks.seed[row], STEP_STREAM + number, d, z);
            propose(x, size(walks.seed[row], number), d, z);
        }
    }

    // The b that a step draws.
    static float size(uint64_t seed, int64_t number) {
        const double sizes[] = {STEP_SIZES};
        double chance = uniform(philox(seed, CHANCE_STREAM + STEP_STREAM + number, 0).word[1]);
        return (float)sizes[(int)(chance * (sizeof sizes / sizeof *sizes))];
    }

    // Preconditioned Crank-Nicolson from x, with the noise that is in z.
    static void propose(const float* x, float b, int64_t d, float* z) {
        float rest = std::sqrt(1 - b * b);
        for (int64_t k = 0; k < d; k++) z[k] = rest * x[k] + b * z[k];
    }

    void read(int64_t i) {
        const TapeRecord& tape = walks.tape[walks.wish[points.attempt[i]->row]];
        float* logits = points.logits + i * points.outputs;
        double* u = points.u + i * points.columns;
        std::fill_n(logits, points.outputs, std::numeric_limits<float>::quiet_NaN());
        for (int64_t j = 0; j < tape.columns; j++) {
            const step::Column& column = table.column[tape.column[j]];
            int64_t head = table.head[tape.column[j]], outputs = table.stack[head]->outputs;
            std::copy_n(points.found[head] + points.place[i * points.columns + j] * outputs, outputs,
                        logits + table.first[head]);
            u[j] = (double)logits[column.plus] - (column.minus < 0 ? 0.0 : (double)logits[column.minus]);
        }
        step::Tape own = {(const step::Node*)tape.code, tape.parameter, u, points.value + i * points.nodes,
                          (int)tape.nodes, (int)tape.columns, 0};
        double crisp = step::value_of(own), relaxed = crisp;
        if (has_crisp(tape)) own.is_relaxed = 1, relaxed = step::value_of(own);
        bool is_lost = crisp != crisp || !is_finite(points.w + i * net.w_dim, net.w_dim);  // it overflowed on its way
        points.crisp[i] = is_lost ? -HUGE_VAL : crisp;
        points.relaxed[i] = is_lost ? -HUGE_VAL : relaxed;
    }
};

class Posterior {
   public:
    Posterior(Field& field, const ColumnTable& table, const PosteriorSettings& settings)
        : settings(settings), field(field), table(table) {}

    const PosteriorSettings settings;
    Field& field;
    const ColumnTable& table;

    // Up to so many waves, less when all rows have come to their end or wait to be brought nearer.
    void walk(const Walks& given, int64_t waves) {
        walks = given;
        while (waves-- && plan()) {
            evaluate();
            for (const Attempt& attempt : attempts)
                for (int64_t i = 0; i < attempt.count && take(attempt.row, attempt.first + i); i++) {}
        }
    }

   private:
    bool is_guided() const { return settings.confidence == 0; }
    int64_t* spent(int64_t row) const { return walks.spent + SPENT * row; }
    int32_t& phase(int64_t row) const { return walks.phase[row]; }
    bool is_inside(int64_t row) const { return !is_guided() && walks.crisp[row] > std::log(settings.confidence); }

    // What the rows try next; whether there is anything.
    bool plan() {
        attempts.clear();
        for (int64_t row = 0; row < walks.rows; row++) {
            const int64_t* counts = spent(row);
            switch (phase(row)) {
            case step::WALK_DRAWING: attempts.push_back({row, counts[CANDIDATES], 0, 1}); break;
            case step::WALK_WALKING: attempts.push_back({row, counts[WALKED], 0, 1}); break;
            case step::WALK_BROUGHT: attempts.push_back({row, 0, 0, 1}); break;
            }
        }
        int64_t share = attempts.empty() ? 0 : FULL / attempts.size();
        points.count = 0;
        for (Attempt& attempt : attempts) {
            // Most wishes are common: a row that has just begun tries little.
            if (phase(attempt.row) == step::WALK_DRAWING)
                attempt.count = std::min({share, settings.fresh - attempt.number, 2 + 2 * attempt.number});
            else if (phase(attempt.row) == step::WALK_WALKING) attempt.count = std::min(share, MOST_STEPS);
            attempt.count = std::max(attempt.count, (int64_t)1);
            attempt.first = points.count;
            points.count += attempt.count;
        }
        return points.count;
    }

    void evaluate() {
        memory.reset();
        take_memory();
        find_uses();
        Call call{};
        call.rows = points.count, call.z = points.z, call.psi = points.psi, call.label = points.label;
        call.w = points.w, call.use = memory.take<Use>(table.heads);
        const float** found = memory.take<const float*>(table.heads);
        for (int64_t head = 0; head < table.heads; head++) {
            const std::vector<int64_t>& rows = readers[head];
            if (rows.empty()) continue;
            float* logits = memory.take<float>(rows.size() * table.stack[head]->outputs);
            const_cast<Use*>(call.use)[call.uses++] = {table.stack[head], (int64_t)rows.size(), 0, rows.data(), nullptr,
                                                       logits, nullptr};
            found[head] = logits;
        }
        points.found = found;
        auto work = std::make_shared<Wave>(field, call, table, walks, points);
        field.pool.run(work->pieces(), work);
    }

    void take_memory() {
        const Network& net = field.network;
        int64_t n = points.count;
        points.columns = points.nodes = 0, points.outputs = settings.outputs;
        for (int64_t i = 0; i < walks.tapes; i++) {
            points.columns = std::max(points.columns, walks.tape[i].columns);
            points.nodes = std::max(points.nodes, walks.tape[i].nodes);
        }
        points.attempt = memory.take<const Attempt*>(n);
        points.place = memory.take<int64_t>(n * points.columns), points.label = memory.take<int64_t>(n);
        points.z = memory.take<float>(n * net.z_dim), points.w = memory.take<float>(n * net.w_dim);
        points.psi = memory.take<float>(n), points.logits = memory.take<float>(n * points.outputs);
        points.relaxed = memory.take<double>(n), points.crisp = memory.take<double>(n);
        points.u = memory.take<double>(n * points.columns);
        points.value = memory.take<step::Value>(n * points.nodes);
        for (const Attempt& attempt : attempts) std::fill_n(points.attempt + attempt.first, attempt.count, &attempt);
    }

    // Who reads which head.
    void find_uses() {
        readers.resize(table.heads);
        for (std::vector<int64_t>& rows : readers) rows.clear();
        for (int64_t i = 0; i < points.count; i++) {
            const TapeRecord& tape = walks.tape[walks.wish[points.attempt[i]->row]];
            for (int64_t j = 0; j < tape.columns; j++) {
                std::vector<int64_t>& rows = readers[table.head[tape.column[j]]];
                if (rows.empty() || rows.back() != i) rows.push_back(i);
                points.place[i * points.columns + j] = (int64_t)rows.size() - 1;
            }
        }
    }

    // A row learns of a point that it has tried; whether its next point still counts.
    bool take(int64_t row, int64_t point) {
        switch (phase(row)) {
        case step::WALK_DRAWING: return draw(row, point);
        case step::WALK_WALKING: return move(row, point);
        default: return arrive(row, point), false;
        }
    }

    bool draw(int64_t row, int64_t point) {
        int64_t* counts = spent(row);
        int64_t number = counts[CANDIDATES]++;
        if (accepts(row, number, points.crisp[point])) {
            keep(row, point);
            counts[ACCEPTED] = 1;
            phase(row) = step::WALK_ENTERED;
            return false;
        }
        if (points.relaxed[point] > walks.relaxed[row]) keep(row, point);
        if (counts[CANDIDATES] < settings.fresh) return true;
        if (walks.relaxed[row] < FAR_FROM_SET) phase(row) = step::WALK_FAR;
        else go_on(row);
        return false;
    }

    bool accepts(int64_t row, int64_t number, double log_p) const {
        if (!is_guided()) return log_p > std::log(settings.confidence);
        return std::log(chance(row, number)) < settings.guidance * log_p;
    }

    double chance(int64_t row, uint64_t stream) const {
        return uniform(philox(walks.seed[row], CHANCE_STREAM + stream, 0).word[0]);
    }

    bool move(int64_t row, int64_t point) {
        int64_t* counts = spent(row);
        int64_t number = counts[WALKED]++;
        bool good;
        if (is_inside(row)) {
            counts[INSIDE]++;
            good = points.crisp[point] > std::log(settings.confidence);
        } else {
            double highest = is_guided() ? settings.guidance : HIGHEST_POWER;
            double power = highest * std::min((number + 1) / (double)RISE_STEPS, 1.0);
            good = std::log(chance(row, STEP_STREAM + number)) < power * (points.relaxed[point] - walks.relaxed[row]);
        }
        if (good) {
            keep(row, point);
            counts[MOVED]++;
        }
        go_on(row);
        return !good && phase(row) == step::WALK_WALKING;
    }

    // Where it was brought.
    void arrive(int64_t row, int64_t point) {
        keep(row, point);
        if (spent(row)[WALKED]) phase(row) = step::WALK_WALKING;
        else go_on(row);
    }

    // Another step, or what else comes behind the ones that were taken.
    void go_on(int64_t row) {
        const int64_t* counts = spent(row);
        int64_t walked = counts[WALKED];
        if (is_guided()) phase(row) = walked < RISE_STEPS + settings.steps ? step::WALK_WALKING : step::WALK_ENTERED;
        else if (is_inside(row)) phase(row) = counts[INSIDE] < settings.steps ? step::WALK_WALKING : step::WALK_ENTERED;
        else if (walked >= settings.patience) phase(row) = step::WALK_LEFT_OUT;
        else phase(row) = walked && walked % STUCK_STEPS == 0 ? step::WALK_FAR : step::WALK_WALKING;
    }

    void keep(int64_t row, int64_t point) {
        const Network& net = field.network;
        std::copy_n(points.z + point * net.z_dim, net.z_dim, walks.x + row * net.z_dim);
        std::copy_n(points.w + point * net.w_dim, net.w_dim, walks.w + row * net.w_dim);
        std::copy_n(points.logits + point * points.outputs, points.outputs, walks.logits + row * points.outputs);
        walks.relaxed[row] = points.relaxed[point], walks.crisp[row] = points.crisp[point];
    }

    // Points of a wave that is full: more at a time are hardly cheaper. Steps of a row at a time, of which one in three
    // moves it.
    static constexpr int64_t FULL = 12, MOST_STEPS = 4;

    Walks walks{};
    std::vector<Attempt> attempts;
    std::vector<std::vector<int64_t>> readers;  // by head
    Points points{};
    Memory memory;  // of the wave
};
