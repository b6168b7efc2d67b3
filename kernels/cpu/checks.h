// What Python gives is checked at the door, before a number of it becomes an address. The length of an array cannot be
// seen from here: library.py and rows.py give arrays of the sizes that go with them.
#pragma once
#include "posterior.h"

struct Refused {
    step::Refusal why;
};

inline void require(bool holds, step::Refusal why) {
    if (!holds) throw Refused{why};
}
template <class T> void require_array(const T* array, int64_t count) {
    require(array || !count, step::REFUSED_MISSING);
}

// The bytes of so many rows, each so wide, fit into 64 bits.
constexpr int64_t MOST = int64_t(1) << 40, WIDEST = int64_t(1) << 20;

inline void check_count(int64_t count) { require(count >= 0 && count <= MOST, step::REFUSED_COUNT); }
inline void check_width(int64_t width) { require(width > 0 && width <= WIDEST, step::REFUSED_WIDTH); }
inline void check_below(int64_t number, int64_t end, step::Refusal why) { require(number >= 0 && number < end, why); }
template <class T> void check_positions(const T* positions, int64_t count, int64_t end) {
    check_count(count);
    require_array(positions, count);
    for (int64_t i = 0; i < count; i++) check_below(positions[i], end, step::REFUSED_POSITION);
}

inline void check_layers(const Stack& stack) {
    check_width(stack.into);
    require(stack.depth >= 0 && stack.depth <= WIDEST, step::REFUSED_COUNT);
    require_array(stack.layer, stack.depth);
    for (int64_t i = 0, into = stack.into; i < stack.depth; into = stack.layer[i++].out) {
        const Layer& layer = stack.layer[i];
        check_width(layer.out);
        require(layer.into == into, step::REFUSED_WIDTH);
        require(layer.weight && layer.bias && layer.back, step::REFUSED_MISSING);
    }
}

inline int64_t width_of(const Stack& stack) { return stack.depth ? stack.layer[stack.depth - 1].out : stack.into; }

inline void check_network(const Network& network) {
    check_width(network.z_dim), check_width(network.w_dim);
    require(network.embedded >= 0 && network.labels >= 0, step::REFUSED_COUNT);
    require(network.average, step::REFUSED_MISSING);
    require_array(network.embedding, network.embedded);
    check_layers(network.mapping);
    require(network.mapping.into == network.z_dim + network.embedded, step::REFUSED_WIDTH);
    require(width_of(network.mapping) == network.w_dim, step::REFUSED_WIDTH);
}

inline void check_head(const Network& network, const Stack* stack, bool in_w) {
    require(stack, step::REFUSED_MISSING);
    check_layers(*stack);
    check_width(stack->outputs);
    require(stack->last && stack->last_bias, step::REFUSED_MISSING);
    require(!(stack->reads_z && in_w), step::REFUSED_WIDTH);
    require(stack->into == (stack->reads_z ? network.z_dim : network.w_dim), step::REFUSED_WIDTH);
}

inline void check_label(const Network& network, int64_t label) {
    if (network.embedded) check_below(label, network.labels, step::REFUSED_LABEL);
}

inline void check_use(const Network& network, const Call& call, const Use& use) {
    check_head(network, use.stack, call.is_w);
    check_count(use.rows), check_count(use.wanted);
    require(!use.wanted || use.rows <= MOST / use.wanted, step::REFUSED_COUNT);
    if (use.row) check_positions(use.row, use.rows, call.rows);
    else require(use.rows == call.rows, step::REFUSED_COUNT);
    require_array(use.logits, use.rows);
    require_array(use.seeds, use.wanted);
}

inline void check_latents(const Network& network, const Call& call) {
    require_array(call.z, call.rows);
    if (call.is_w) return;
    require_array(call.psi, call.rows), require_array(call.w, call.rows);
    if (!network.embedded) return;
    require_array(call.label, call.rows);
    for (int64_t i = 0; i < call.rows; i++) check_label(network, call.label[i]);
}

// Of an evaluation: as Call says. A way back alone starts from the rows of the evaluation before.
inline void check(const Field& field, const Call* given) {
    require(given, step::REFUSED_MISSING);
    const Call& call = *given;
    for (int64_t count : {call.rows, call.uses, call.pairs, call.near}) check_count(count);
    require_array(call.jacobian, call.pairs);
    if (call.cotangent) {
        require(field.rows || !call.pairs, step::REFUSED_ORDER);
        return check_positions(call.pair_row, call.pairs, field.rows);
    }
    check_latents(field.network, call);
    require(call.uses <= WIDEST, step::REFUSED_COUNT);
    require_array(call.use, call.uses);
    int64_t sources = call.near;
    for (int64_t i = 0; i < call.uses; i++) {
        const Use& use = call.use[i];
        check_use(field.network, call, use);
        require(!(use.stack->reads_z && call.pairs), step::REFUSED_WIDTH);  // what is pulled back is a cotangent on w
        sources += use.rows * use.wanted;
    }
    require(!(call.is_w && call.pairs), step::REFUSED_ORDER);
    check_positions(call.pair_row, call.pairs, call.rows);
    check_positions(call.source, call.pairs, sources);
    check_positions(call.near_row, call.near, call.rows);
    require_array(call.near_anchor, call.near);
}

// outputs: logits of all heads.
inline void check(const ColumnTable& table, int64_t outputs) {
    require(outputs >= 0 && outputs <= WIDEST, step::REFUSED_COUNT);
    check_count(table.heads);
    require_array(table.stack, table.heads);
    check_positions(table.head, table.columns, table.heads);
    check_positions(table.first, table.heads, outputs + 1);
    require_array(table.column, table.columns);
}

inline void check(const Field& field, const ColumnTable* table, const step::Solve* like) {
    require(table && like, step::REFUSED_MISSING);
    const Network& network = field.network;
    require(like->capacity == 1, step::REFUSED_COUNT);
    require(like->w_dim == network.w_dim && like->w_stride == network.w_dim, step::REFUSED_WIDTH);
    require(like->width == (like->in_w ? network.w_dim : network.z_dim), step::REFUSED_WIDTH);
    check(*table, like->outputs);
}

// A column reads logits of its own head, which all rows have room for.
inline void check_column(const Network& network, const ColumnTable& table, int64_t outputs, bool in_w, int32_t number) {
    check_below(number, table.columns, step::REFUSED_POSITION);
    const step::Column& column = table.column[number];
    int64_t head = table.head[number], first = table.first[head];
    const Stack* stack = table.stack[head];
    check_head(network, stack, in_w);
    require(first + stack->outputs <= outputs, step::REFUSED_WIDTH);
    require((column.direct != 0) == (in_w || stack->reads_z), step::REFUSED_WIDTH);
    check_below(column.plus - first, stack->outputs, step::REFUSED_POSITION);
    if (column.minus >= 0) check_below(column.minus - first, stack->outputs, step::REFUSED_POSITION);
}

// How many parameters a node reads, from its position on.
inline int64_t parameters_of(const step::Node& node) {
    switch (node.opcode) {
    case OP_CLASS:
    case OP_NOT_CLASS:
    case OP_DIFFERENCE:
    case OP_WEIGHT: return 1;
    case OP_KEEP: return 1 + (int64_t)node.count;
    case OP_TEMPERED:
    case OP_VALUE:
    case OP_NOT_VALUE:
    case OP_SIDE: return 2;
    case OP_INSIDE:
    case OP_OUTSIDE: return 3;
    default: return 0;
    }
}

// Leaves push, joins take two and push one: in the end one is there. `node.first` of a join must be its left operand.
inline void check_program(const TapeRecord& tape) {
    std::vector<int64_t> stack;
    auto pop = [&] {
        require(!stack.empty(), step::REFUSED_PROGRAM);
        int64_t top = stack.back();
        stack.pop_back();
        return top;
    };
    for (int64_t i = 0; i < tape.nodes; i++) {
        step::Node node;
        memcpy(&node, tape.code + 4 * i, sizeof node);
        check_below(node.opcode, OP_NOT + 1, step::REFUSED_PROGRAM);
        int64_t needs = parameters_of(node);
        require(node.position >= 0 && node.position + needs <= tape.parameters, step::REFUSED_PROGRAM);
        if (step::is_leaf(node)) {
            require(node.first >= 0 && node.count > 0, step::REFUSED_PROGRAM);
            require((int64_t)node.first + node.count <= tape.columns, step::REFUSED_PROGRAM);
            bool is_class = node.opcode == OP_CLASS || node.opcode == OP_NOT_CLASS || node.opcode == OP_TEMPERED;
            double chosen = is_class ? tape.parameter[node.position] : 0;
            require(chosen >= 0 && chosen < node.count, step::REFUSED_PROGRAM);
        } else if (step::is_join(node)) {
            pop();
            require(pop() == node.first, step::REFUSED_PROGRAM);
        } else {
            pop();
        }
        stack.push_back(i);
    }
    require(stack.size() == (tape.nodes > 0), step::REFUSED_PROGRAM);
}

inline void check_tape(const Network& network, const ColumnTable& table, int64_t outputs, bool in_w,
                       const TapeRecord& tape) {
    for (int64_t count : {tape.columns, tape.nodes, tape.parameters})
        require(count >= 0 && count <= WIDEST, step::REFUSED_COUNT);
    require_array(tape.column, tape.columns), require_array(tape.code, tape.nodes);
    require_array(tape.parameter, tape.parameters);
    for (int64_t j = 0; j < tape.columns; j++) check_column(network, table, outputs, in_w, tape.column[j]);
    check_program(tape);
}

inline void check(const Stepper& stepper, const Slots* slots, int64_t slot, const TapeRecord* tape) {
    require(slots && tape, step::REFUSED_MISSING);
    check_below(slot, slots->count, step::REFUSED_POSITION);
    for (const void* array : std::initializer_list<const void*>{
             slots->z, slots->w, slots->psi, slots->origin, slots->anchor_z, slots->anchor_w, slots->label, slots->near,
             slots->logp, slots->clock, slots->step, slots->error, slots->reach, slots->status, slots->counters})
        require(array, step::REFUSED_MISSING);
    require_array(slots->logits, stepper.like.outputs);
    if (!stepper.like.in_w) check_label(stepper.field.network, slots->label[slot]);
    check_tape(stepper.field.network, stepper.table, stepper.like.outputs, stepper.like.in_w, *tape);
}

// Rows that run, each of them once: two threads may not take the same.
inline void check(const Stepper& stepper, const int64_t* slots, int64_t count) {
    require(count >= 0 && count <= stepper.size(), step::REFUSED_COUNT);
    require_array(slots, count);
    std::vector<bool> is_taken(stepper.size());
    for (int64_t i = 0; i < count; i++) {
        require(stepper.is_running(slots[i]), step::REFUSED_ORDER);
        require(!is_taken[slots[i]], step::REFUSED_POSITION);
        is_taken[slots[i]] = true;
    }
}

inline void check(const ColumnTable* table, const PosteriorSettings* settings) {
    require(table && settings, step::REFUSED_MISSING);
    bool is_guided = settings->guidance > 0 && settings->guidance < HUGE_VAL && settings->confidence == 0;
    bool is_sure = settings->confidence > 0 && settings->confidence < 1;
    require((is_guided || is_sure) && settings->fresh > 0, step::REFUSED_COUNT);
    for (int64_t count : {settings->fresh, settings->steps, settings->patience}) check_count(count);
    check(*table, settings->outputs);
}

inline void check(const Posterior& posterior, const Walks* given) {
    require(given, step::REFUSED_MISSING);
    const Walks& walks = *given;
    const Network& network = posterior.field.network;
    require(walks.rows >= 0 && walks.rows <= WIDEST, step::REFUSED_COUNT);
    require(walks.tapes >= 0 && walks.tapes <= walks.rows, step::REFUSED_COUNT);
    for (const void* array : std::initializer_list<const void*>{
             walks.tape, walks.label, walks.seed, walks.psi, walks.x, walks.w, walks.relaxed, walks.crisp, walks.phase,
             walks.spent})
        require_array(array, walks.rows);
    require_array(walks.logits, walks.rows * posterior.settings.outputs);
    check_positions(walks.wish, walks.rows, walks.tapes);
    for (int64_t i = 0; i < walks.tapes; i++)
        check_tape(network, posterior.table, posterior.settings.outputs, false, walks.tape[i]);
    for (int64_t row = 0; row < walks.rows; row++) {
        check_label(network, walks.label[row]);
        check_below(walks.phase[row], step::WALK_LEFT_OUT + 1, step::REFUSED_ORDER);
        const int64_t* spent = walks.spent + SPENT * row;
        bool is_drawing = walks.phase[row] == step::WALK_DRAWING;
        check_below(spent[CANDIDATES], posterior.settings.fresh + !is_drawing, step::REFUSED_ORDER);
        for (int64_t count : {spent[WALKED], spent[MOVED], spent[INSIDE]}) check_count(count);
    }
}
