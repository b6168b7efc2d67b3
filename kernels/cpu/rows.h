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
// The columns that tapes may read. stack: of each head, null while no row reads it; first: its place among all logits.
// head: of each column, in the order of heads; logits[plus] - logits[minus], both among all logits, minus = -1 for none.
struct ColumnTable {
    int64_t heads, columns;
    const Stack* const* stack;
    const int64_t* first;
    const int64_t* head;
    const step::Column* column;
};

// Arrays of engine.batch.Batch, a row for each of `count` slots; and what came of each: a Status, and counters (slots, 4).
struct Slots {
    int64_t count;
    float *z, *w, *logits, *psi, *origin, *anchor_z, *anchor_w;
    int64_t* label;
    double *near, *logp, *clock, *step, *error, *reach;
    int32_t *status, *counters;
};

// A tape: numbers of its columns in the ColumnTable; code (nodes, 4), see engine.layout.pack.
struct TapeRecord {
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

    // The number of its j-th column in the table.
    int column(int j) const { return s.ticket_columns[j]; }

    bool is_last() const { return s.steps && phase == step::RUNNING && s.counters[step::STEPS] == s.steps - 1; }
};

// A head and the rows that read it in a round; rows at the end of their fixed steps want no slopes, and are a use apart.
struct HeadUse {
    int64_t head, first_slope;
    std::vector<int64_t> rows, wanted;
    float* logits;
};

// Where a row finds one of its columns: the use, its row there, and the column's place among the wanted ones.
struct Place {
    int64_t use, local, k;
};

// Who reads what in a round of n rows: engine/routing.py is the twin.
struct Routing {
    std::vector<Row*> rows;
    std::vector<HeadUse> uses;
    std::vector<int64_t> first;  // of each row, in `places`
    std::vector<Place> places;
    std::vector<float*> pulled;  // of each row, its part of the Jacobian
    float* w;
};

// An evaluation, and then for each row its step.
template <class T> struct Round : Evaluation<T> {
    Round(Field& field, const Call& call, const ColumnTable& table, std::shared_ptr<const Routing> routing)
        : Evaluation<T>(field, call), table(table), routing(std::move(routing)) {}

    const ColumnTable& table;
    const std::shared_ptr<const Routing> routing;  // a late thread asks how many rows there were

    void run() override {
        int level = 0;
        this->evaluate(level);
        int64_t count = routing->rows.size();
        this->each(level, 1, [&](int64_t) { return count; }, [&](int64_t, int64_t row) { advance(row); });
    }

    void advance(int64_t i) {
        Row& row = *routing->rows[i];
        step::Solve& s = row.s;
        std::fill_n(s.trial_logits, s.outputs, std::numeric_limits<float>::quiet_NaN());
        for (int j = 0; j < s.columns; j++) {
            const Place& place = routing->places[routing->first[i] + j];
            const HeadUse& use = routing->uses[place.use];
            int64_t outputs = table.stack[use.head]->outputs;
            std::copy_n(use.logits + place.local * outputs, outputs, s.trial_logits + table.first[use.head]);
        }
        const step::Team team;
        if (routing->w) s.trial_w = routing->w + i * s.w_dim;
        step::read_tape(team, s, 0);
        if (row.is_last()) return step::arrive(team, s, 0);
        s.trial_jacobian = jacobian_of(row, i);
        step::gauss_newton(team, s, 0, nullptr);
    }

    // The row's part of the Jacobian: of columns that read the state their slopes, of all others what was pulled back.
    float* jacobian_of(const Row& row, int64_t i) const {
        const step::Solve& s = row.s;
        float *pulled = routing->pulled[i], *all = row.jacobian ? row.jacobian : pulled;
        for (int j = 0; j < s.columns && row.jacobian; j++) {
            const Place& place = routing->places[routing->first[i] + j];
            if (!table.column[row.column(j)].direct) {
                std::copy_n(pulled, s.width, all + j * s.width), pulled += s.width;
                continue;
            }
            const Head<T>& head = this->heads[place.use];
            std::copy_n(head.slopes[place.local * head.use.wanted + place.k], s.width, all + j * s.width);
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
    Stepper(Field& field, const ColumnTable& table, const step::Solve& like) : field(field), table(table), like(like) {}

    Field& field;
    const ColumnTable& table;
    const step::Solve like;

    // A row begins in a slot, whatever was there before.
    void admit(const Slots& slots, int64_t slot, const TapeRecord& tape) {
        while ((int64_t)rows.size() <= slot) rows.emplace_back();
        Row& row = rows[slot];
        step::Solve& s = row.s;
        s = like;
        s.columns = tape.columns, s.nodes = tape.nodes, s.parameters = tape.parameters;
        s.near = slots.near + slot;
        s.has_near = *s.near > 0;
        s.slots = s.columns + s.has_near;
        row.label = slots.label[slot];
        bind(row, slots, slot);
        take(row, tape);
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

    int64_t size() const { return rows.size(); }
    bool is_running(int64_t slot) const { return slot >= 0 && slot < size() && rows[slot].phase != step::IDLE; }

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
        s.code_length = &s.nodes, s.column_count = &s.columns, s.column = table.column;
    }

    void take(Row& row, const TapeRecord& tape) {
        step::Solve& s = row.s;
        Memory& memory = row.memory;
        int64_t r = s.columns;
        memory.reset();
        s.ticket_columns = copied(memory, tape.column, r);
        s.code = copied(memory, tape.code, 4 * tape.nodes);
        s.parameter = copied(memory, tape.parameter, tape.parameters);
        bool is_mixed = s.in_w;
        for (int64_t j = 0; j < r; j++) is_mixed = is_mixed || table.column[row.column(j)].direct;
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
        memory.reset();
        auto routing = std::make_shared<Routing>();
        routing->rows = running;
        find_uses(*routing);
        Call call = make_call(*routing);
        auto work = std::make_shared<Round<T>>(field, call, table, routing);
        field.pool.run(work->pieces(), work);
    }

    void find_uses(Routing& routing) {
        int64_t places = 0;
        std::vector<int64_t> use_of(2 * table.heads, -1);
        for (size_t i = 0; i < routing.rows.size(); i++) {
            const Row& row = *routing.rows[i];
            routing.first.push_back(places);
            places += row.s.columns;
            for (int j = 0; j < row.s.columns; j++) {
                int64_t column = row.column(j), head = table.head[column];
                int64_t& number = use_of[2 * head + row.is_last()];
                if (number < 0) {
                    number = routing.uses.size();
                    routing.uses.push_back({head, 0, {}, {}, nullptr});
                }
                HeadUse& use = routing.uses[number];
                if (use.rows.empty() || use.rows.back() != (int64_t)i) use.rows.push_back(i);
                auto found = std::find(use.wanted.begin(), use.wanted.end(), column);
                int64_t k = found - use.wanted.begin();
                if (found == use.wanted.end() && !row.is_last()) use.wanted.push_back(column);
                routing.places.push_back({number, (int64_t)use.rows.size() - 1, k});
            }
        }
    }

    // The evaluation that gives all this, in memory of this round.
    Call make_call(Routing& routing) {
        int64_t n = routing.rows.size(), width = like.width, slopes = 0;
        float *z = memory.take<float>(n * width), *psi = memory.take<float>(n);
        int64_t* label = memory.take<int64_t>(n);
        for (int64_t i = 0; i < n; i++) {
            const Row& row = *routing.rows[i];
            std::copy_n(row.s.trial, width, z + i * width);
            psi[i] = *row.s.psi, label[i] = row.label;
        }
        Use* uses = memory.take<Use>(routing.uses.size());
        for (size_t i = 0; i < routing.uses.size(); i++) {
            HeadUse& use = routing.uses[i];
            const Stack* stack = table.stack[use.head];
            int64_t count = use.rows.size(), wanted = use.wanted.size();
            use.logits = memory.take<float>(count * stack->outputs);
            use.first_slope = slopes, slopes += count * wanted;
            uses[i] = {stack, count, wanted, use.rows.data(), seeds(use, stack->outputs), use.logits, nullptr};
        }
        routing.w = like.in_w ? nullptr : memory.take<float>(n * like.w_dim);
        Call call{};
        call.rows = n, call.is_w = like.in_w, call.uses = routing.uses.size();
        call.z = z, call.psi = psi, call.label = label, call.use = uses, call.w = routing.w;
        find_pairs(routing, call, slopes);
        return call;
    }

    // The wanted columns as combinations of the head's logits: (wanted, outputs).
    const float* seeds(const HeadUse& use, int64_t outputs) {
        int64_t first = table.first[use.head];
        float* seed = memory.take<float>(use.wanted.size() * outputs);
        std::fill_n(seed, use.wanted.size() * outputs, 0.0f);
        for (size_t k = 0; k < use.wanted.size(); k++) {
            const step::Column& column = table.column[use.wanted[k]];
            seed[k * outputs + column.plus - first] = 1;
            if (column.minus >= 0) seed[k * outputs + column.minus - first] = -1;
        }
        return seed;
    }

    // The cotangents on w that are pulled back: a row's columns in their order, and near's behind them.
    void find_pairs(Routing& routing, Call& call, int64_t slopes) {
        int64_t n = call.rows, most = routing.places.size() + n, near = 0;
        int64_t *pair_row = memory.take<int64_t>(most), *source = memory.take<int64_t>(most);
        int64_t* near_row = memory.take<int64_t>(n);
        float* anchors = memory.take<float>(n * like.w_dim);
        float* jacobian = memory.take<float>(most * like.width);
        for (int64_t i = 0; i < n; i++) {
            const Row& row = *routing.rows[i];
            routing.pulled.push_back(jacobian + call.pairs * like.width);
            if (like.in_w || row.is_last()) continue;
            for (int j = 0; j < row.s.columns; j++) {
                if (table.column[row.column(j)].direct) continue;
                const Place& place = routing.places[routing.first[i] + j];
                const HeadUse& use = routing.uses[place.use];
                pair_row[call.pairs] = i;
                source[call.pairs++] = use.first_slope + place.local * (int64_t)use.wanted.size() + place.k;
            }
            if (!row.s.has_near) continue;
            std::copy_n(row.s.anchor_w, like.w_dim, anchors + near * like.w_dim);
            near_row[near] = pair_row[call.pairs] = i;
            source[call.pairs++] = slopes + near++;
        }
        call.pair_row = pair_row, call.source = source, call.near_row = near_row;
        call.near_anchor = anchors, call.near = near, call.jacobian = jacobian;
    }

    std::deque<Row> rows;  // which stay where they are
    Memory memory;         // of the round
};
