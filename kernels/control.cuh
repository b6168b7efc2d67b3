// What both solvers do with a row: engine/solvers/control.py, the evaluated point, and the end.
#pragma once

// A row's numbers, read by every thread and written back by one.
struct Fate {
    int status, stage, counters[4];
    double clock, step, taken, passes, error, reach, logp;
};

EITHER Fate fate_of(const Solve& s, int row) {
    const int* n = s.counters + 4 * row;
    return {s.status[row], s.stage[row], {n[0], n[1], n[2], n[3]},
            s.clock[row],  s.step[row],  s.taken[row],
            s.passes[row], s.error[row], s.reach[row],
            s.logp[row]};
}

EITHER void save(const Team& team, const Solve& s, int row, const Fate& fate, Phase phase) {
    team.sync();  // everybody has read
    if (!team.first()) return;
    s.status[row] = fate.status;
    s.stage[row] = fate.stage;
    for (int i = 0; i < 4; i++) s.counters[4 * row + i] = fate.counters[i];
    s.clock[row] = fate.clock;
    s.step[row] = fate.step;
    s.taken[row] = fate.taken;
    s.passes[row] = fate.passes;
    s.error[row] = fate.error;
    s.reach[row] = fate.reach;
    s.logp[row] = fate.logp;
    s.phase[row] = phase;
}

// Root mean square of a row's `width` elements, given as a function of their number.
template <class X> EITHER double root_mean_square(const Team& team, int width, X x) {
    auto square = [&](int i) {
        real element = x(i);
        return element * element;
    };
    if (team.alone) return sqrt(of_parts<double>(width, square) / width);
    double squares = 0;
    for (int i = team.thread(); i < width; i += team.threads()) squares += square(i);
    return sqrt(team.sum(squares) / width);
}

// The sum of `count` rows (count, width), each times its weight, element by element. A thread that is alone adds row
// after row in its `room` (width), which its vector units can; two of them may not share it.
struct Combined {
    const real* rows;
    const double* weight;
    int count, width;
    real* room;

    EITHER Combined(const Team& team, const real* rows, const double* weight, int count, int width, real* room)
        : rows(rows), weight(weight), count(count), width(width), room(team.alone ? room : 0) {
        if (!team.alone) return;
        for (int i = 0; i < width; i++) room[i] = 0;
        for (int j = 0; j < count; j++) {
            const real* row = rows + (long long)j * width;
            real own = (real)weight[j];
            for (int i = 0; i < width; i++) room[i] += own * row[i];
        }
    }

    EITHER real operator()(int i) const {
        if (Team::alone) return room[i];
        real total = 0;
        for (int j = 0; j < count; j++) total += (real)weight[j] * rows[(long long)j * width + i];
        return total;
    }
};

// The same of error / (atol + rtol max(|before|, |after|)).
template <class E, class B, class A>
EITHER double error_norm(const Team& team, int width, double rtol, double atol, E error, B before, A after) {
    return root_mean_square(team, width, [&](int i) {
        return error(i) / ((real)atol + (real)rtol * fmax(fabs(before(i)), fabs(after(i))));
    });
}

template <class V>
EITHER double first_step(const Team& team, const Solve& s, double rtol, double atol, const real* z, V velocity) {
    auto here = [&](int i) { return z[i]; };
    auto zero = [](int) { return (real)0; };
    double distance = error_norm(team, s.width, rtol, atol, here, here, zero);
    double speed = error_norm(team, s.width, rtol, atol, velocity, here, zero);
    return fmin(s.first_fraction * fmax(distance, 1.0) / fmax(speed, 1e-6), 0.3);
}

EITHER double clip(double x, double low, double high) { return fmin(fmax(x, low), high); }

// log p at the trial point, near included.
EITHER double log_p(const Team& team, const Solve& s, int row) {
    long long r = row, ticket = s.ticket[row];
    double near = s.has_near ? s.near[ticket] : 0, far = 0;
    if (!(near > 0)) return s.trial_logp[row];
    for (int i = team.thread(); i < s.width; i += team.threads()) {
        real gap = s.trial[r * s.width + i] - s.anchor[ticket * s.width + i];
        far += (double)gap * gap;
    }
    for (int i = team.thread(); i < s.w_dim && !s.in_w; i += team.threads()) {
        double gap = s.trial_w[r * s.w_stride + i] - s.anchor_w[ticket * s.w_dim + i];
        far += gap * gap;
    }
    return s.trial_logp[row] - near * team.sum(far);
}

// The gradient at the trial point from its parts, near included; returns log p.
EITHER double gather(const Team& team, const Solve& s, int row) {
    long long r = row, ticket = s.ticket[row];
    int parts = s.linear ? s.column_count[ticket] : 1;
    double near = s.has_near ? s.near[ticket] : 0, one = 1;
    const real* jacobian = s.trial_jacobian + r * s.slots * s.width;
    const double* weight = s.linear ? s.weights + r * s.columns : &one;
    Combined total(team, jacobian, weight, parts, s.width, s.velocity + r * s.width);
    for (int i = team.thread(); i < s.width; i += team.threads()) {
        real rest = 0;
        if (near > 0) {
            real gap = s.trial[r * s.width + i] - s.anchor[ticket * s.width + i];
            rest = (real)(-2 * near) * gap + (s.linear ? jacobian[(long long)(s.slots - 1) * s.width + i] : 0);
        }
        s.velocity[r * s.width + i] = total(i) + rest;
        if (s.linear) s.trial_rest[r * s.width + i] = rest;
    }
    return log_p(team, s, row);
}

EITHER bool all_finite(const Team& team, const real* x, int n) {
    int bad = 0;
    for (int i = team.thread(); i < n; i += team.threads()) bad += !is_finite(x[i]);
    return team.sum(bad) == 0;
}

EITHER const real* trial_w_of(const Solve& s, int row) {
    return s.in_w ? s.trial + (long long)row * s.width : s.trial_w + (long long)row * s.w_stride;
}

// Whether the first evaluation is finite; w too, which a condition on z alone does not read.
EITHER bool starts_well(const Team& team, const Solve& s, int row, double logp, const real* gradient) {
    bool is_whole = all_finite(team, trial_w_of(s, row), s.w_dim);
    return all_finite(team, gradient, s.width) && is_whole && is_finite(logp);
}

// A condition without columns and without near has arrived before it starts.
EITHER bool asks_nothing(const Solve& s, int row) {
    int ticket = s.ticket[row];
    return s.column_count[ticket] == 0 && !(s.has_near && s.near[ticket] > 0);
}

// The trial point becomes the row's point, without its derivatives.
EITHER void move(const Team& team, const Solve& s, int row) {
    long long r = row;
    const real* w = trial_w_of(s, row);
    for (int i = team.thread(); i < s.width; i += team.threads()) s.z[r * s.width + i] = s.trial[r * s.width + i];
    for (int i = team.thread(); i < s.w_dim; i += team.threads()) s.w[r * s.w_dim + i] = w[i];
    for (int i = team.thread(); i < s.outputs; i += team.threads())
        s.logits[r * s.outputs + i] = s.trial_logits[r * s.outputs + i];
    team.sync();
}

// The trial point becomes the row's point; `share` is the share of the old Jacobian that stays.
EITHER void keep(const Team& team, const Solve& s, int row, double share = 0) {
    long long r = row;
    move(team, s, row);
    for (int i = team.thread(); i < s.width; i += team.threads()) {
        if (s.linear) s.rest[r * s.width + i] = s.trial_rest[r * s.width + i];
        if (!s.linear) s.gradient[r * s.width + i] = s.velocity[r * s.width + i];
    }
    int count = s.linear ? s.column_count[s.ticket[row]] * s.width : 0;
    for (int i = team.thread(); i < count; i += team.threads()) {
        real* old = s.jacobian + r * s.columns * s.width + i;
        real now = s.trial_jacobian[r * s.slots * s.width + i];
        *old = share == 0 ? now : now + (real)share * (*old - now);
    }
    team.sync();
}

// A finished row writes its ticket's results; its place is free.
EITHER void retire(const Team& team, const Solve& s, int row, Fate fate) {
    long long r = row, ticket = s.ticket[row];
    bool finite = all_finite(team, s.w + r * s.w_dim, s.w_dim) && is_finite(fate.logp);
    if (fate.status == STATUS_DONE && !finite) fate.status = STATUS_NONFINITE;
    for (int i = team.thread(); i < s.width; i += team.threads())
        s.result_z[ticket * s.width + i] = s.z[r * s.width + i];
    for (int i = team.thread(); i < s.w_dim; i += team.threads())
        s.result_w[ticket * s.w_dim + i] = s.w[r * s.w_dim + i];
    for (int i = team.thread(); i < s.outputs; i += team.threads())
        s.result_logits[ticket * s.outputs + i] = s.logits[r * s.outputs + i];
    if (team.first()) {
        s.result_logp[ticket] = fate.logp;
        s.result_status[ticket] = fate.status;
        for (int i = 0; i < 4; i++) s.result_counters[4 * ticket + i] = fate.counters[i];
    }
    save(team, s, row, fate, IDLE);
}
