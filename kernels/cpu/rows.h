// Rows on their way along the flow: rounds of an evaluation for all of them and a step of the default solver for each.
//
// The step is kernels/gauss_newton.cuh, the same text that a GPU runs, here on a batch of one row, by one thread.
#pragma once
#include <deque>
#include <limits>

#include "field.h"

namespace step {  // names of their own: a Head is something else there
#define ALONE
#include "constants.cuh"
#include "../common.cuh"
#include "../layout.cuh"
#include "../control.cuh"
#include "../tape.cuh"
#include "../gauss_newton.cuh"
#include "../turnover.cuh"
}

extern "C" {
// What rows may read. stack: of each head, null while no row reads it; first: its place among all logits. head: of each
// column, in the order of heads; logits[plus] - logits[minus], both among all logits, minus = -1 for none.
struct Readable {
    int64_t heads;
    const Stack* const* stack;
    const int64_t* first;
    const int64_t* head;
    const step::Column* column;
};

// Arrays of engine.batch.Batch, a row for each slot; and what came of each: a Status, and counters (slots, 4).
struct Slots {
    float *z, *w, *logits, *psi, *origin, *anchor_z, *anchor_w;
    int64_t* label;
    double *near, *logp, *clock, *step, *error, *reach;
    int32_t *status, *counters;
};

// A tape: numbers of its columns among the readable ones; code (nodes, 4), see engine.layout.pack.
struct Says {
    int64_t columns, nodes, parameters;
    const int32_t *column, *code;
    const double* parameter;
};
}

// One row: a Solve with a capacity of one, whose arrays are the batch's or in `memory`.
struct Row {
    step::Solve s{};
    Memory memory;
    int ticket = 0, phase = step::IDLE, stage = 0;
    double taken = 0, passes = 0;
    int64_t label = 0;
    // Where slopes that are not pulled back come together with those that are; null if all are.
    float* jacobian = nullptr;

    // The j-th of its columns, among the readable ones.
    int column(int j) const { return s.ticket_columns[j]; }

    bool is_last() const { return s.steps && phase == step::RUNNING && s.counters[step::STEPS] == s.steps - 1; }
};

// A head and its readers in a round, with slopes or, for rows at the end of their fixed steps, without.
struct Reader {
    int64_t head, first_slope;
    std::vector<int64_t> rows, wanted;
    float* logits;
};

// Of one column of one row: its reader, its row there, and its place among the wanted columns.
struct Read {
    int64_t reader, local, k;
};

// What a round of n rows reads.
struct Reading {
    std::vector<Row*> rows;
    std::vector<Reader> readers;
    std::vector<int64_t> first;  // of each row, in `reads`
    std::vector<Read> reads;
    std::vector<float*> pulled;  // of each row, its part of the Jacobian
    float* w;
};

// An evaluation, and then for each row its step.
template <class T> struct Round : Evaluation<T> {
    Round(Field& field, const Call& call, const Readable& readable, std::shared_ptr<const Reading> reading)
        : Evaluation<T>(field, call), readable(readable), reading(std::move(reading)) {}

    const Readable& readable;
    const std::shared_ptr<const Reading> reading;  // a late thread asks how many rows there were

    void run() override {
        int level = 0;
        this->evaluate(level);
        int64_t count = reading->rows.size();
        this->each(level, 1, [&](int64_t) { return count; }, [&](int64_t, int64_t row) { advance(row); });
    }

    void advance(int64_t i) {
        Row& row = *reading->rows[i];
        step::Solve& s = row.s;
        std::fill_n(s.trial_logits, s.outputs, std::numeric_limits<float>::quiet_NaN());
        for (int j = 0; j < s.columns; j++) {
            const Read& read = reading->reads[reading->first[i] + j];
            const Reader& reader = reading->readers[read.reader];
            int64_t outputs = readable.stack[reader.head]->outputs;
            std::copy_n(reader.logits + read.local * outputs, outputs, s.trial_logits + readable.first[reader.head]);
        }
        const step::Team team;
        if (reading->w) s.trial_w = reading->w + i * s.w_dim;
        step::read_tape(team, s, 0);
        if (row.is_last()) return step::arrive(team, s, 0);
        s.trial_jacobian = jacobian_of(row, i);
        step::gauss_newton(team, s, 0, nullptr);
    }

    // The row's part of the Jacobian: of columns that read the state their slopes, of all others what was pulled back.
    float* jacobian_of(const Row& row, int64_t i) const {
        const step::Solve& s = row.s;
        float *pulled = reading->pulled[i], *all = row.jacobian ? row.jacobian : pulled;
        for (int j = 0; j < s.columns && row.jacobian; j++) {
            const Read& read = reading->reads[reading->first[i] + j];
            if (!readable.column[row.column(j)].direct) {
                std::copy_n(pulled, s.width, all + j * s.width), pulled += s.width;
                continue;
            }
            const Head<T>& head = this->heads[read.reader];
            std::copy_n(head.slopes[read.local * head.use.wanted + read.k], s.width, all + j * s.width);
        }
        if (!s.has_near) return all;
        // The field pulls back w - anchor. In W the distance counts once, as that of the state.
        float *last = all + s.columns * s.width, weight = s.in_w ? 0 : -2 * *s.near;
        const float* from = row.jacobian ? pulled : last;
        for (int64_t k = 0; k < s.width; k++) last[k] = weight ? weight * from[k] : 0;
        return all;
    }
};

class Stepper {
   public:
    Stepper(Field& field, const Readable& readable, const step::Solve& like)
        : field(field), readable(readable), like(like) {}

    // A row begins in a slot, whatever was there before.
    void admit(const Slots& slots, int64_t slot, const Says& says) {
        while ((int64_t)rows.size() <= slot) rows.emplace_back();
        Row& row = rows[slot];
        step::Solve& s = row.s;
        s = like;
        s.columns = says.columns, s.nodes = says.nodes, s.parameters = says.parameters;
        s.near = slots.near + slot;
        s.has_near = *s.near > 0;
        s.slots = s.columns + s.has_near;
        row.label = slots.label[slot];
        bind(row, slots, slot);
        take(row, says);
        step::admit(s, 0, 0);
        std::copy_n(s.start, s.width, s.trial);
    }

    // Up to so many rounds of these rows; less as soon as one has come to its end.
    template <class T> void advance(const int64_t* slots, int64_t count, int64_t rounds) {
        std::vector<Row*> running;
        for (int64_t i = 0; i < count; i++) running.push_back(&rows[slots[i]]);
        for (bool goes_on = true; goes_on && rounds--;) {
            round<T>(running);
            for (const Row* row : running) goes_on = goes_on && row->phase != step::IDLE;
        }
    }

   private:
    // What lies in the batch, or in the row itself.
    void bind(Row& row, const Slots& slots, int64_t slot) {
        step::Solve& s = row.s;
        s.z = s.result_z = slots.z + slot * s.width;
        s.w = s.result_w = slots.w + slot * s.w_dim;
        s.logits = s.result_logits = slots.logits + slot * s.outputs;
        s.logp = s.result_logp = slots.logp + slot;
        s.status = s.result_status = slots.status + slot;
        s.counters = s.result_counters = slots.counters + 4 * slot;
        s.psi = slots.psi + slot;
        s.start = slots.origin + slot * s.width;
        s.anchor = slots.anchor_z + slot * s.width, s.anchor_w = slots.anchor_w + slot * s.w_dim;
        s.clock = slots.clock + slot, s.step = slots.step + slot;
        s.error = slots.error + slot, s.reach = slots.reach + slot;
        s.ticket = &row.ticket, s.phase = &row.phase, s.stage = &row.stage;
        s.taken = &row.taken, s.passes = &row.passes;
        s.code_length = &s.nodes, s.column_count = &s.columns, s.column = readable.column;
    }

    void take(Row& row, const Says& says) {
        step::Solve& s = row.s;
        Memory& memory = row.memory;
        int64_t r = s.columns;
        memory.reset();
        s.ticket_columns = copied(memory, says.column, r);
        s.code = copied(memory, says.code, 4 * says.nodes);
        s.parameter = copied(memory, says.parameter, says.parameters);
        bool is_mixed = s.in_w;
        for (int64_t j = 0; j < r; j++) is_mixed = is_mixed || readable.column[row.column(j)].direct;
        s.plan = memory.take<double>(PLAN(s)), s.scratch = memory.take<double>(SCRATCH(s));
        s.trial_logp = memory.take<double>(1), s.weights = memory.take<double>(r);
        s.curvature = memory.take<double>(r * r);
        for (float** vector : {&s.trial, &s.velocity, &s.combined, &s.rest, &s.trial_rest})
            *vector = memory.take<float>(s.width);
        s.jacobian = memory.take<float>(r * s.width);
        s.trial_logits = memory.take<float>(s.outputs);
        row.jacobian = is_mixed ? memory.take<float>(s.slots * s.width) : nullptr;
    }

    template <class X> static X* copied(Memory& memory, const X* from, int64_t count) {
        X* own = memory.take<X>(count);
        std::copy_n(from, count, own);
        return own;
    }

    template <class T> void round(const std::vector<Row*>& running) {
        routing.reset();
        auto reading = std::make_shared<Reading>();
        reading->rows = running;
        find_readers(*reading);
        Call call = called(*reading);
        auto work = std::make_shared<Round<T>>(field, call, readable, reading);
        field.pool.run(work->pieces(), work);
    }

    // Who reads which head. Rows at the end of their steps want no slopes, and are readers of their own.
    void find_readers(Reading& reading) {
        int64_t columns = 0;
        std::vector<int64_t> reader_of(2 * readable.heads, -1);
        for (size_t i = 0; i < reading.rows.size(); i++) {
            const Row& row = *reading.rows[i];
            reading.first.push_back(columns);
            columns += row.s.columns;
            for (int j = 0; j < row.s.columns; j++) {
                int64_t column = row.column(j), head = readable.head[column];
                int64_t& number = reader_of[2 * head + row.is_last()];
                if (number < 0) {
                    number = reading.readers.size();
                    reading.readers.push_back({head, 0, {}, {}, nullptr});
                }
                Reader& reader = reading.readers[number];
                if (reader.rows.empty() || reader.rows.back() != (int64_t)i) reader.rows.push_back(i);
                auto found = std::find(reader.wanted.begin(), reader.wanted.end(), column);
                int64_t k = found - reader.wanted.begin();
                if (found == reader.wanted.end() && !row.is_last()) reader.wanted.push_back(column);
                reading.reads.push_back({number, (int64_t)reader.rows.size() - 1, k});
            }
        }
    }

    // The call that answers, in memory of this round.
    Call called(Reading& reading) {
        int64_t n = reading.rows.size(), width = like.width, slopes = 0;
        float *z = routing.take<float>(n * width), *psi = routing.take<float>(n);
        int64_t* label = routing.take<int64_t>(n);
        for (int64_t i = 0; i < n; i++) {
            const Row& row = *reading.rows[i];
            std::copy_n(row.s.trial, width, z + i * width);
            psi[i] = *row.s.psi, label[i] = row.label;
        }
        Use* uses = routing.take<Use>(reading.readers.size());
        for (size_t i = 0; i < reading.readers.size(); i++) {
            Reader& reader = reading.readers[i];
            const Stack* stack = readable.stack[reader.head];
            int64_t count = reader.rows.size(), wanted = reader.wanted.size();
            reader.logits = routing.take<float>(count * stack->outputs);
            reader.first_slope = slopes, slopes += count * wanted;
            uses[i] = {stack, count, wanted, reader.rows.data(), seeds(reader, stack->outputs), reader.logits, nullptr};
        }
        reading.w = like.in_w ? nullptr : routing.take<float>(n * like.w_dim);
        Call call{};
        call.rows = n, call.is_w = like.in_w, call.uses = reading.readers.size();
        call.z = z, call.psi = psi, call.label = label, call.use = uses, call.w = reading.w;
        find_pairs(reading, call, slopes);
        return call;
    }

    // The wanted columns as combinations of the head's logits: (wanted, outputs).
    const float* seeds(const Reader& reader, int64_t outputs) {
        int64_t first = readable.first[reader.head];
        float* seed = routing.take<float>(reader.wanted.size() * outputs);
        std::fill_n(seed, reader.wanted.size() * outputs, 0.0f);
        for (size_t k = 0; k < reader.wanted.size(); k++) {
            const step::Column& column = readable.column[reader.wanted[k]];
            seed[k * outputs + column.plus - first] = 1;
            if (column.minus >= 0) seed[k * outputs + column.minus - first] = -1;
        }
        return seed;
    }

    // The cotangents on w that are pulled back: a row's columns in their order, and near's behind them.
    void find_pairs(Reading& reading, Call& call, int64_t slopes) {
        int64_t n = call.rows, most = reading.reads.size() + n, near = 0;
        int64_t *pair_row = routing.take<int64_t>(most), *source = routing.take<int64_t>(most);
        int64_t* near_row = routing.take<int64_t>(n);
        float* anchors = routing.take<float>(n * like.w_dim);
        float* jacobian = routing.take<float>(most * like.width);
        for (int64_t i = 0; i < n; i++) {
            const Row& row = *reading.rows[i];
            reading.pulled.push_back(jacobian + call.pairs * like.width);
            if (like.in_w || row.is_last()) continue;
            for (int j = 0; j < row.s.columns; j++) {
                if (readable.column[row.column(j)].direct) continue;
                const Read& read = reading.reads[reading.first[i] + j];
                const Reader& reader = reading.readers[read.reader];
                pair_row[call.pairs] = i;
                source[call.pairs++] = reader.first_slope + read.local * (int64_t)reader.wanted.size() + read.k;
            }
            if (!row.s.has_near) continue;
            std::copy_n(row.s.anchor_w, like.w_dim, anchors + near * like.w_dim);
            near_row[near] = pair_row[call.pairs] = i;
            source[call.pairs++] = slopes + near++;
        }
        call.pair_row = pair_row, call.source = source, call.near_row = near_row;
        call.near_anchor = anchors, call.jacobian = jacobian;
    }

    Field& field;
    const Readable& readable;
    const step::Solve like;
    std::deque<Row> rows;  // which stay where they are
    Memory routing;        // of the round
};
