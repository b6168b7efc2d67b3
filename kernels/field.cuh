// The ends of the network's passes, row by row: engine/reference/field.py's normalisation and its pullback, and the cotangents
// between tape and network. The dense layers in between are in dense.cuh.
#pragma once

// The root mean square of z; not a number where the squares' sum overflows, since z / infinity would be a finite and
// wrong input.
EITHER real moment_of(const Team& team, const Solve& s, const real* z) {
    double squares = 0;
    for (int i = team.thread(); i < s.width; i += team.threads()) squares += z[i] * z[i];
    squares = team.sum(squares);
    real total = (real)squares, overflow = total - total;  // 0, or not a number
    return sqrt((real)(squares / s.width) + (real)MOMENT_EPSILON) + overflow;
}

// A new row takes its start from its ticket; then the trial point becomes the network's input.
EITHER void normalise(const Team& team, const Solve& s, int row) {
    if (s.phase[row] == IDLE) return;
    long long r = row, ticket = s.ticket[row];
    real* trial = s.trial + r * s.width;
    if (s.phase[row] == FRESH) {
        for (int i = team.thread(); i < s.width; i += team.threads())
            trial[i] = s.z[r * s.width + i] = s.start[ticket * s.width + i];
        if (team.first()) s.psi[row] = s.start_psi[ticket];
        team.sync();
    }
    if (s.state)
        for (int i = team.thread(); i < s.state_stride; i += team.threads())
            s.state[r * s.state_stride + i] = to_operand(i < s.width ? trial[i] : 0);
    if (s.in_w) return;
    real moment = s.normalised ? moment_of(team, s, trial) : 1, psi = s.psi[row];
    if (team.first()) s.moment[row] = moment;
    const real* embedding = s.embedded ? s.embedding + (long long)s.label[ticket] * s.embedded : 0;
    for (int i = team.thread(); i < s.input_stride; i += team.threads()) {
        int j = i - s.width;
        real x = j < 0 ? trial[i] / moment : j < s.embedded ? embedding[j] : 0;
        s.input[r * s.input_stride + i] = to_operand(x);
        if (s.layers || i >= s.w_dim) continue;
        real w = s.average[i] + psi * (x - s.average[i]);  // no layer is there to truncate its result
        s.trial_w[r * s.w_stride + i] = w;
        s.truncated[r * s.w_stride + i] = to_operand(w);
    }
}

// Element i of what a row's columns say to a slot: each has its own, or (if not `linear`) all share one, weighted.
// `direct` picks the columns that read the state, else those that read w.
EITHER real columns_at(const Solve& s, int row, int slot, int i, bool direct) {
    int ticket = s.ticket[row], first = s.linear ? slot : 0, last = s.column_count[ticket];
    if (s.linear && last > slot + 1) last = slot + 1;
    real total = 0;
    for (int j = first; j < last; j++) {
        const Column& column = s.column[s.ticket_columns[(long long)ticket * s.columns + j]];
        real weight = s.linear ? 1 : (real)s.weights[(long long)row * s.columns + j];
        if ((column.direct != 0) == direct) total += weight * column.slopes[(long long)row * column.row_stride + i];
    }
    return total;
}

// Element i of a slot's cotangent on w. near's is -2 k (w - anchor), in the last slot.
EITHER real on_w(const Solve& s, int row, int slot, int i) {
    long long ticket = s.ticket[row];
    real total = columns_at(s, row, slot, i, false);
    if (!s.has_near || slot != s.slots - 1) return total;
    real gap = s.trial_w[(long long)row * s.w_stride + i] - s.anchor_w[ticket * s.w_dim + i];
    return total - (real)(2 * s.near[ticket]) * gap;
}

// Cotangents on w, through truncation and the last layer's slopes, as operands of the backward pass. A power of two is
// taken out of each, so that half precision can hold them.
EITHER void cotangents(const Team& team, const Solve& s, int row, int slot) {
    if (s.phase[row] == IDLE || slot >= s.slots) return;
    long long r = row, place = r * s.slots + slot;
    double top = 0;
    for (int i = team.thread(); i < s.w_dim; i += team.threads()) top = fmax(top, fabs((double)on_w(s, row, slot, i)));
    top = team.max(top);
    int exponent = 0;
    if (PRECISION == FP16 && is_finite(top)) frexp(top, &exponent);
    if (team.first()) s.unit[place] = ldexp((real)1, exponent);
    real factor = ldexp(s.psi[row], -exponent);
    for (int i = team.thread(); i < s.w_stride; i += team.threads()) {
        real pulled = i < s.w_dim ? factor * on_w(s, row, slot, i) : 0;
        if (s.layers) s.cotangent[place * s.w_stride + i] = to_operand(pulled * slope(s.hidden[r * s.w_stride + i]));
        else s.pulled[place * s.w_stride + i] = pulled;
    }
}

// From the mapping's input to z. The normalisation contributes (g - x (x . g) / d) / s: it removes the radial part.
// Without it s is 1 and nothing is removed.
EITHER void pullback(const Team& team, const Solve& s, int row, int slot) {
    if (s.phase[row] == IDLE || slot >= s.slots) return;
    long long r = row, place = r * s.slots + slot;
    real* out = s.trial_jacobian + place * s.width;
    if (s.in_w) {
        for (int i = team.thread(); i < s.width; i += team.threads()) out[i] = columns_at(s, row, slot, i, true);
        return;
    }
    const real* trial = s.trial + r * s.width;
    const real* pulled = s.pulled + place * s.input_stride;
    real moment = s.moment[row], unit = s.unit[place];
    double along = 0;
    for (int i = team.thread(); i < s.width && s.normalised; i += team.threads())
        along += pulled[i] * (trial[i] / moment);
    real radial = (real)(team.sum(along) / s.width);
    for (int i = team.thread(); i < s.width; i += team.threads())
        out[i] = unit * (pulled[i] - radial * (trial[i] / moment)) / moment + columns_at(s, row, slot, i, true);
}
