// What a condition says about a row's logits: engine/reference/tape.py on one row. That twin builds gradients and curvatures
// from the leaves up; here the values go up and the factors of every leaf come down, which needs no matrix a node:
//
//     g = sum over leaves of `gradient` * dv_leaf/du,    C = sum over leaves of `curvature` * that of -v_leaf
//
// where the factors are products of the shares on the way. LACE's OR under an odd number of its NOTs adds a matrix of
// rank 1 to C.
#pragma once

struct Node {
    int opcode, first, count, position;  // engine.layout.pack; for joins `first` is the left operand's node
};

struct Value {
    double v;
    double a, b, c, d;  // leaf: what its derivatives need; join: the shares a and b; weight, NOT: the factor a
    double gradient, curvature, opposite;  // factors of dv/du, of the curvatures of -v, and of those of +v
};

struct Tape {
    const Node* code;
    const double* parameter;
    const double* u;
    Value* value;
    int nodes, columns;
    int is_relaxed;  // of crisp statements: how far they are from true, in place of true or false
};

EITHER bool is_leaf(Node node) { return node.opcode < LEAVES; }
EITHER bool is_join(Node node) { return node.opcode >= LEAVES && node.opcode < LEAVES + JOINS; }
EITHER bool reads(Node node, int column) {
    return is_leaf(node) && column >= node.first && column < node.first + node.count;
}

EITHER double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// log Phi(x), its derivative and minus its second derivative; engine.reference.tape.log_ndtr.
EITHER void log_ndtr(double x, double* value, double* lam, double* bend) {
    const double coefficients[] = {SCALED_ERFC};
    double z = fabs(x) * sqrt(0.5), t = (z - ERFC_CENTRE) / (z + ERFC_CENTRE), scaled = 0;
    for (int i = sizeof(coefficients) / sizeof(double) - 1; i >= 0; i--) scaled = scaled * t + coefficients[i];
    scaled /= 1 + 2 * z;  // exp(z^2) erfc(z)
    double square = z * z, bell = exp(-square);
    *value = x < 0 ? log(0.5 * scaled) - square : log1p(-0.5 * scaled * bell);
    *lam = sqrt(2 / PI) * (x < 0 ? 1 / scaled : bell / (2 - scaled * bell));
    double far = 1 / fmax(-x, FAR_TAIL);
    far *= far;
    *bend = x < -FAR_TAIL ? 1 - far + 6 * far * far : *lam * (x + *lam);
}

// Log-odds of class y against the others, whose softmax is exp(u - top) * share.
EITHER double log_odds(const double* u, int count, int y, double* top, double* share) {
    double total = 0;
    *top = -1e308;
    for (int j = 0; j < count; j++)
        if (j != y) *top = fmax(*top, u[j]);
    for (int j = 0; j < count; j++)
        if (j != y) total += exp(u[j] - *top);
    *share = 1 / total;
    return u[y] - *top - log(total);
}

// Of a crisp statement that is so far from true; engine.reference.probability. Nobody asks for its derivatives.
EITHER void crisp_value(const Tape& tape, double distance, double scale, Value* out) {
    double x = distance * scale;
    out->v = distance > 0 ? LOG_FALSE : 0.0;
    if (tape.is_relaxed) out->v = fmax(-0.5 * x * x, (double)LOG_FALSE);
    out->a = out->b = 0;
}

EITHER void leaf_value(const Tape& tape, Node node, Value* out) {
    const double* p = tape.parameter + node.position;
    const double* u = tape.u + node.first;
    switch (node.opcode) {
    case OP_CLASS:
    case OP_TEMPERED: {  // a = 1 - softmax[y], d = softmax[y]
        double odds = log_odds(u, node.count, (int)p[0], &out->b, &out->c), v = -softplus(-odds);
        out->a = exp(v - odds);
        out->d = exp(v);
        out->v = node.opcode == OP_TEMPERED ? v + p[1] * u[(int)p[0]] : v;
        break;
    }
    case OP_NOT_CLASS: {  // a = softmax[y]
        double odds = log_odds(u, node.count, (int)p[0], &out->b, &out->c);
        out->v = -softplus(odds);
        out->a = exp(out->v + odds);
        break;
    }
    case OP_DIFFERENCE: {  // from here a = dv/du, b = -d2v/du2
        double x = p[0] * u[0], v = -softplus(-x), missing = exp(v - x);
        out->v = v;
        out->a = p[0] * missing;
        out->b = missing * exp(v);
        break;
    }
    case OP_VALUE: {
        double x = (u[0] - p[0]) * p[1];
        out->v = -0.5 * x * x;
        out->a = -x * p[1];
        out->b = p[1] * p[1];
        break;
    }
    case OP_NOT_VALUE: {
        double x = (u[0] - p[0]) * p[1], inner = fmin(-0.5 * x * x, HIGHEST_VALUE), slope = x * p[1];
        out->v = inner > -0.5 ? log(-expm1(inner)) : log1p(-exp(inner));
        double odds = exp(inner - out->v);
        out->a = odds * slope;
        out->b = odds * (1 + odds) * slope * slope;
        break;
    }
    case OP_SIDE:
        log_ndtr((u[0] - p[0]) * p[1], &out->v, &out->a, &out->b);
        out->a *= p[1];
        out->b *= p[1] * p[1];
        break;
    case OP_INSIDE: crisp_value(tape, fmax(fmax(p[0] - u[0], u[0] - p[1]), 0.0), p[2], out); break;
    case OP_OUTSIDE: crisp_value(tape, fmax(fmin(u[0] - p[0], p[1] - u[0]), 0.0), p[2], out); break;
    case OP_KEEP:
        out->v = 0;
        for (int j = 0; j < node.count; j++) out->v -= p[0] * (u[j] - p[1 + j]) * (u[j] - p[1 + j]);
        break;
    }
    // The limit at infinity may be finite, but an infinite logit has overflowed on its way.
    for (int j = 0; j < node.count; j++)
        if (!is_finite(u[j])) out->v = u[j] - u[j];
}

// Of a class leaf: how its gradient leans on class j, in units of `a`: 1 for y, minus their softmax for the others.
EITHER double lean(const Tape& tape, Node node, const Value& value, int j) {
    return j == (int)tape.parameter[node.position] ? 1 : -exp(tape.u[node.first + j] - value.b) * value.c;
}

// dv/du[column] of a leaf that reads the column.
EITHER double leaf_gradient(const Tape& tape, Node node, const Value& value, int column) {
    const double* p = tape.parameter + node.position;
    int j = column - node.first;
    switch (node.opcode) {
    case OP_CLASS: return value.a * lean(tape, node, value, j);
    case OP_TEMPERED: return value.a * lean(tape, node, value, j) + (j == (int)p[0] ? p[1] : 0);
    case OP_NOT_CLASS: return -value.a * lean(tape, node, value, j);
    case OP_KEEP: return -2 * p[0] * (tape.u[column] - p[1 + j]);
    default: return value.a;
    }
}

// An entry of the curvature of -v of a leaf that reads both columns.
EITHER double leaf_curvature(const Tape& tape, Node node, const Value& value, int row, int column) {
    const double* p = tape.parameter + node.position;
    int i = row - node.first, j = column - node.first, y = (int)p[0];
    switch (node.opcode) {
    case OP_CLASS:
    case OP_TEMPERED: {
        double at_i = i == y ? value.d : -value.a * lean(tape, node, value, i);
        double at_j = j == y ? value.d : -value.a * lean(tape, node, value, j);
        return (i == j ? at_i : 0) - at_i * at_j;
    }
    case OP_NOT_CLASS: return value.a * lean(tape, node, value, i) * lean(tape, node, value, j);
    case OP_KEEP: return i == j ? 2 * p[0] : 0;
    default: return value.b;
    }
}

EITHER void join_value(Node node, const Value& a, const Value& b, Value* out) {
    if (node.opcode == OP_AND) {
        out->v = a.v + b.v;
        out->a = out->b = 1;
    } else if (node.opcode == OP_OR) {
        double high = fmax(a.v, b.v), excess = log1p(-expm1(high) * exp(fmin(a.v, b.v) - high)), v = high + excess;
        out->v = a.v != a.v ? a.v : b.v != b.v ? b.v : v > 0 ? 0 : v;  // fmax and fmin would drop what is not a number
        out->a = exp((a.v - high) - excess) * -expm1(b.v);
        out->b = exp((b.v - high) - excess) * -expm1(a.v);
    } else {
        double bonus = log(OR_LEFT_WEIGHT), gap = (a.v - b.v) + bonus;
        out->v = fmax(a.v + bonus, b.v) + log1p(exp(-fabs(gap)));
        out->a = exp(-softplus(-gap));
        out->b = exp(-softplus(gap));
    }
}

EITHER void share_out(const Value& from, double share, double opposite, Value* to) {
    to->gradient = share * from.gradient;
    to->curvature = share * from.curvature;
    to->opposite = share * opposite;
}

// From a node to its operands: the factors of the root's gradient and curvatures.
EITHER void hand_down(const Tape& tape, int i) {
    Node node = tape.code[i];
    Value& from = tape.value[i];
    Value* last = tape.value + i - 1;
    if (is_leaf(node)) return;
    if (node.opcode == OP_NOT) {  // v = -a v', and the two curvatures change places
        last->gradient = -from.a * from.gradient;
        last->curvature = from.a * from.opposite;
        last->opposite = from.a * from.curvature;
    } else if (node.opcode == OP_WEIGHT) {
        share_out(from, from.a, from.opposite, last);
    } else {
        double opposite = node.opcode == OP_OR ? 0 : from.opposite;  // that of an OR is left out
        share_out(from, from.b, opposite, last);
        share_out(from, from.a, opposite, tape.value + node.first);
        from.c = from.opposite * from.a * from.b;  // for `spread`
    }
}

EITHER void node_value(const Tape& tape, int i) {
    Node node = tape.code[i];
    Value* out = tape.value + i;
    if (is_join(node)) {
        join_value(node, tape.value[node.first], out[-1], out);
    } else if (!is_leaf(node)) {
        double v = out[-1].v;
        out->a = node.opcode == OP_WEIGHT ? tape.parameter[node.position] : NOT_STRENGTH / fmax(fabs(v), NOT_STRENGTH);
        out->v = node.opcode == OP_WEIGHT ? out->a * v : -out->a * v;
    }
}

// The root's value, and nothing else.
EITHER double value_of(const Tape& tape) {
    for (int i = 0; i < tape.nodes; i++) {
        if (is_leaf(tape.code[i])) leaf_value(tape, tape.code[i], tape.value + i);
        else node_value(tape, i);
    }
    return tape.nodes ? tape.value[tape.nodes - 1].v : 0;
}

EITHER double gradient_at(const Tape& tape, int first, int last, int column) {
    double total = 0;
    for (int i = first; i <= last; i++)
        if (reads(tape.code[i], column))
            total += tape.value[i].gradient * leaf_gradient(tape, tape.code[i], tape.value[i], column);
    return total;
}

// The first node of the subtree under a node.
EITHER int leftmost(const Tape& tape, int i) {
    while (!is_leaf(tape.code[i])) i = is_join(tape.code[i]) ? tape.code[i].first : i - 1;
    return i;
}

// LACE's OR adds a b (g_a - g_b)(g_a - g_b)^T to the curvature of its +v; c is the factor of the square in the root's.
// The difference is a gradient again, of the subtree with the factors 1 and -1 under its top.
EITHER void spread(const Team& team, const Tape& tape, int i, double* between, double* curvature) {
    if (tape.code[i].opcode != OP_LACE_OR || !(tape.value[i].c > 0)) return;
    int first = leftmost(tape, i);
    if (team.first()) {
        tape.value[tape.code[i].first].gradient = 1;
        tape.value[i - 1].gradient = -1;
        for (int j = i - 1; j >= first; j--) hand_down(tape, j);
    }
    team.sync();
    for (int j = team.thread(); j < tape.columns; j += team.threads()) between[j] = gradient_at(tape, first, i - 1, j);
    team.sync();
    for (int j = team.thread(); j < tape.columns * tape.columns; j += team.threads())
        curvature[j] += tape.value[i].c * between[j / tape.columns] * between[j % tape.columns];
    team.sync();
}

// The root's gradient and curvature, element by element: each thread looks for the leaves that have a part in its own.
EITHER void sum_leaves(const Team& team, const Tape& tape, double* gradient, double* curvature) {
    for (int j = team.thread(); j < tape.columns; j += team.threads())
        gradient[j] = gradient_at(tape, 0, tape.nodes - 1, j);
    for (int j = team.thread(); j < tape.columns * tape.columns; j += team.threads()) {
        int row = j / tape.columns, column = j % tape.columns;
        double total = 0;
        for (int i = 0; i < tape.nodes; i++)
            if (reads(tape.code[i], row) && reads(tape.code[i], column))
                total += tape.value[i].curvature * leaf_curvature(tape, tape.code[i], tape.value[i], row, column);
        curvature[j] = total;
    }
}

// The same by one thread, leaf by leaf, in the same order: a tape of many columns is mostly pairs that no leaf reads.
EITHER void add_leaves(const Tape& tape, double* gradient, double* curvature) {
    for (int j = 0; j < tape.columns; j++) gradient[j] = 0;
    for (int j = 0; j < tape.columns * tape.columns; j++) curvature[j] = 0;
    for (int i = 0; i < tape.nodes; i++) {
        Node node = tape.code[i];
        const Value& value = tape.value[i];
        if (!is_leaf(node)) continue;
        for (int row = node.first; row < node.first + node.count; row++) {
            gradient[row] += value.gradient * leaf_gradient(tape, node, value, row);
            for (int column = node.first; column < node.first + node.count; column++)
                curvature[row * tape.columns + column] += value.curvature * leaf_curvature(tape, node, value, row, column);
        }
    }
}

// u -> value (returned), gradient (columns), curvature (columns, columns); `between` (columns) is scratch. Within the
// kernel it would need more registers than the compiler likes to give.
NOT_INLINED double interpret(const Team& team, const Tape& tape, double* gradient, double* curvature, double* between) {
    for (int i = team.thread(); i < tape.nodes; i += team.threads())
        if (is_leaf(tape.code[i])) leaf_value(tape, tape.code[i], tape.value + i);
    team.sync();
    int root = tape.nodes - 1;
    if (team.first() && root >= 0) {
        for (int i = 0; i <= root; i++) node_value(tape, i);
        tape.value[root].gradient = tape.value[root].curvature = 1;
        tape.value[root].opposite = 0;
        for (int i = root; i >= 0; i--) hand_down(tape, i);
    }
    team.sync();
    if (team.alone) add_leaves(tape, gradient, curvature);
    else sum_leaves(team, tape, gradient, curvature);
    double value = root < 0 ? 0 : tape.value[root].v;
    team.sync();
    for (int i = 0; i <= root; i++) spread(team, tape, i, between, curvature);
    return value;
}

// The last layer of every head, in full precision: logits[output].
EITHER void head_logits(const Team& team, const Solve& s, int row, real* logits) {
    for (int h = 0; h < s.heads; h++) {
        const Head& head = s.head[h];
        const operand* input = head.input + (long long)row * head.stride;
        for (int j = team.warp; j < head.count; j += team.warps) {
            real total = 0;
            const real* weight = head.weight + (long long)j * head.k;
            for (int k = team.lane; k < head.k; k += team.lanes) total += from_operand(input[k]) * weight[k];
            total = team.warp_sum(total) + head.bias[j];
            if (team.lane == 0) logits[head.first + j] = total;
        }
    }
    team.sync();
}

// What a row's tape says about its logits.
EITHER void read_tape(const Team& team, const Solve& s, int row) {
    int ticket = s.ticket[row], columns = s.column_count[ticket];
    long long r = row, wide = s.columns;
    const real* logits = s.trial_logits + r * s.outputs;
    double* u = s.scratch + r * SCRATCH(s);
    const int* places = s.ticket_columns + (long long)ticket * s.columns;
    for (int j = team.thread(); j < columns; j += team.threads()) {
        const Column& column = s.column[places[j]];
        u[j] = (double)logits[column.plus] - (column.minus < 0 ? 0.0 : (double)logits[column.minus]);
    }
    team.sync();
    const Node* code = (const Node*)s.code + (long long)ticket * s.nodes;
    const double* parameter = s.parameter + (long long)ticket * s.parameters;
    Tape own = {code, parameter, u, (Value*)(u + 2 * s.columns), s.code_length[ticket], columns, 0};
    double v = interpret(team, own, s.weights + r * wide, s.curvature + r * wide * wide, u + s.columns);
    if (team.first()) s.trial_logp[row] = v;
}

EITHER void tape(const Team& team, const Solve& s, int row) {
    if (s.phase[row] == IDLE) return;
    head_logits(team, s, row, s.trial_logits + (long long)row * s.outputs);
    read_tape(team, s, row);
}
