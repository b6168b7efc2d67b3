// One step of engine/solvers/gauss_newton.py for one row: judge the trial point, then choose the next one.
//
// All vectors of the linear flow F + A (x - z) lie in the span of the rows of J, near's part n of the gradient, and
// (for the error) the new gradient F'. So they are kept as coordinates (y, a, b), x = J^T y + a n + b F', in double:
//
//     F = (g, 1, 0),    S (y, a, b) = (1 + c lambda)^-1 (y - K G (y, a, b), a, b),    G = J (J^T, n, F')
//
// with K = c' C (I + c' G C)^-1, c' = c / (1 + c lambda). A step costs r x r algebra, and passes over the width only
// for G, the trial point and the norms. C is semi-definite, C = B B^T, so that K = c' B (I + c' B^T G B)^-1 B^T needs
// the Cholesky factors of a matrix whose eigenvalues are at least 1, whatever C and G are.
#pragma once

// The linear flow of a row with r columns. The first numbers outlast the evaluation in `plan`.
struct Linear {
    int r;
    double scale, shift;    // 1 / (1 + c lambda), lambda
    double* gram;           // (r, r + 2)
    double* curvature;      // (r, r)
    double* core;           // (r, r): K
    double* gradient;       // (r + 2): coordinates of F
    double* step;           // of trial - z
    double* doubt;          // of the rational function's error
    double *y, *spare, *p;  // work space: (r + 2), (r), (r)
    double* factors;        // work space: (3, r, r)
    const real* jacobian;   // (r, width)
    const real* rest;       // (width)
    const real* velocity;   // (width)
    real* room;             // of Combined
};

EITHER Linear linear_of(const Solve& s, int row, double* work) {
    long long wide = s.columns, base = (long long)row * s.width;
    int r = s.column_count[s.ticket[row]];
    Linear flow;
    flow.r = r;
    flow.scale = 1;
    flow.shift = s.has_near ? 2 * s.near_stretch * s.near[s.ticket[row]] : 0;
    flow.gram = s.plan + row * PLAN(s);
    flow.curvature = flow.gram + r * (r + 2);
    flow.core = flow.curvature + r * r;
    flow.gradient = flow.core + r * r;
    flow.step = flow.gradient + r + 2;
    flow.doubt = flow.step + r + 2;
    flow.y = work ? work : s.scratch + row * SCRATCH(s);
    flow.spare = flow.y + r + 2;
    flow.p = flow.spare + r;
    flow.factors = flow.p + r;
    flow.jacobian = s.jacobian + base * wide;
    flow.rest = s.rest + base;
    flow.velocity = s.velocity + base;
    flow.room = s.combined + base;
    return flow;
}

// A column of G: J x.
EITHER void project(const Team& team, const Solve& s, const Linear& flow, const real* x, int column) {
    for (int i = team.warp; i < flow.r; i += team.warps) {
        real total = dot(team, flow.jacobian + (long long)i * s.width, x, s.width);
        if (team.lane == 0) flow.gram[i * (flow.r + 2) + column] = total;
    }
}

// A vector given by its coordinates, element by element.
struct Spanned {
    const Linear& flow;
    const double* y;
    bool has_near;
    Combined columns;

    EITHER Spanned(const Team& team, const Solve& s, const Linear& flow, const double* y)
        : flow(flow), y(y), has_near(s.has_near), columns(team, flow.jacobian, y, flow.r, s.width, flow.room) {}

    EITHER real operator()(int i) const {
        real total = columns(i);
        if (has_near) total += (real)y[flow.r] * flow.rest[i];
        return total + (y[flow.r + 1] == 0 ? 0 : (real)y[flow.r + 1] * flow.velocity[i]);
    }
};

// C = B B^T, B lower triangular. A pivot that is nothing but rounding counts as zero, and so does its column.
EITHER void split(const Team& team, int r, const double* c, double* b) {
    for (int j = 0; j < r; j++) {
        double pivot = c[j * r + j];
        for (int k = 0; k < j; k++) pivot -= b[j * r + k] * b[j * r + k];
        double least = r * EPSILON * c[j * r + j];
        double root = is_finite(least) && pivot <= least ? 0 : sqrt(pivot);  // what is not a number stays one
        team.sync();
        for (int i = team.thread(); i < r; i += team.threads()) {
            double x = c[i * r + j];
            for (int k = 0; k < j; k++) x -= b[i * r + k] * b[j * r + k];
            b[i * r + j] = i < j || root == 0 ? 0 : i == j ? root : x / root;
        }
        team.sync();
    }
}

// K for a step with c = gamma h.
EITHER void factor(const Team& team, Linear& flow, double c) {
    int r = flow.r, wide = r + 2;
    flow.scale = 1 / (1 + c * flow.shift);
    c *= flow.scale;
    double *b = flow.factors, *m = b + r * r, *x = m + r * r;
    split(team, r, flow.curvature, b);
    for (int e = team.thread(); e < r * r; e += team.threads()) {  // x = G B
        int i = e / r, j = e % r;
        x[e] = 0;
        for (int k = j; k < r; k++) x[e] += flow.gram[i * wide + k] * b[k * r + j];
    }
    team.sync();
    for (int e = team.thread(); e < r * r; e += team.threads()) {  // m = I + c B^T G B
        int i = e / r, j = e % r;
        double total = 0;
        for (int k = i; k < r; k++) total += b[k * r + i] * x[k * r + j];
        m[e] = (i == j) + c * total;
    }
    team.sync();
    split(team, r, m, x);                                    // m = x x^T
    for (int j = team.thread(); j < r; j += team.threads())  // m = x^-1 B^T, a column each
        for (int i = 0; i < r; i++) {
            double total = b[j * r + i];
            for (int k = 0; k < i; k++) total -= x[i * r + k] * m[k * r + j];
            m[i * r + j] = total / x[i * r + i];
        }
    team.sync();
    for (int e = team.thread(); e < r * r; e += team.threads()) {
        int i = e / r, j = e % r;
        double total = 0;
        for (int k = 0; k < r; k++) total += m[k * r + i] * m[k * r + j];
        flow.core[e] = c * total;
    }
    team.sync();
}

// spare = matrix G x, for the curvature or the core.
EITHER void through(const Team& team, const Linear& flow, const double* matrix, const double* x) {
    for (int i = team.thread(); i < flow.r; i += team.threads()) {
        flow.p[i] = 0;
        for (int k = 0; k < flow.r + 2; k++) flow.p[i] += flow.gram[i * (flow.r + 2) + k] * x[k];
    }
    team.sync();
    for (int i = team.thread(); i < flow.r; i += team.threads()) {
        flow.spare[i] = 0;
        for (int k = 0; k < flow.r; k++) flow.spare[i] += matrix[i * flow.r + k] * flow.p[k];
    }
    team.sync();
}

// y becomes S y.
EITHER void solve(const Team& team, const Linear& flow) {
    through(team, flow, flow.core, flow.y);
    for (int i = team.thread(); i < flow.r + 2; i += team.threads())
        flow.y[i] = flow.scale * (flow.y[i] - (i < flow.r ? flow.spare[i] : 0));
    team.sync();
}

// The pending step of a row, and how far its clock goes with it: further where the budget forces it.
EITHER void choose(const Solve& s, Fate* fate) {
    double left = s.length - fate->clock;
    if (s.steps) {
        double part = (fate->counters[STEPS] + 1.0) / s.steps;
        fate->taken = fate->passes = s.length * pow(part, s.fixed_power) - fate->clock;
        return;
    }
    double growth = pow(s.budget_growth, clip(s.max_evaluations - fate->counters[EVALUATIONS], 1, 1000));
    double floor = left * (s.budget_growth - 1) / (growth - 1), wanted = fmin(fate->step, left);
    fate->taken = fmax(wanted, fmin(floor, fate->reach));
    fate->passes = fmax(wanted, floor);
}

// Accept or reject: the row's next step, counters and status.
EITHER bool decide(const Solve& s, Fate* fate, double error, bool finite, double logp) {
    bool forced = true, accepted = true;  // of fixed steps nothing is judged
    fate->counters[EVALUATIONS]++;
    if (s.steps == 0) {
        forced = fate->passes > fate->step || fate->counters[EVALUATIONS] >= s.max_evaluations;
        accepted = finite && (error <= 1 || (forced && logp >= fate->logp));
        double factor = finite ? s.safety * pow(fmax(error, 1e-10), -s.exponent) : 0;
        fate->step = fate->taken * clip(factor, s.shrink, accepted ? s.grow : 1);
        if (forced) fate->reach = accepted ? fate->reach * s.reach_grow : fate->taken * s.reach_shrink;
        fate->counters[FORCED] += forced;
    }
    fate->counters[STEPS] += accepted;
    fate->counters[REJECTED] += !accepted;
    if (accepted || forced) fate->clock += fate->passes;
    if (fate->clock >= s.length * (1 - 1e-12)) fate->status = STATUS_DONE;
    if (!finite && forced) fate->status = STATUS_NONFINITE;
    if (!accepted && !forced && fate->step < s.smallest_step) fate->status = STATUS_STEP_UNDERFLOW;
    return accepted;
}

// The next trial point, and the coordinates of its step and of the rational function's error.
EITHER void propose(const Team& team, const Solve& s, int row, Linear& flow, double h) {
    factor(team, flow, s.gamma * h);
    for (int i = team.thread(); i < flow.r + 2; i += team.threads()) {
        flow.y[i] = flow.gradient[i];
        flow.step[i] = flow.doubt[i] = 0;
    }
    team.sync();
    for (int power = 1; power <= 3; power++) {
        double part = power == 1 ? s.gamma : power == 2 ? 1 - s.gamma : 0;
        double error = power == 1 ? s.phi_error1 : power == 2 ? s.phi_error2 : s.phi_error3;
        solve(team, flow);
        for (int i = team.thread(); i < flow.r + 2; i += team.threads()) {
            flow.step[i] += h * part * flow.y[i];
            flow.doubt[i] += h * error * flow.y[i];
        }
        team.sync();
    }
    long long base = (long long)row * s.width;
    Spanned step(team, s, flow, flow.step);
    for (int i = team.thread(); i < s.width; i += team.threads()) s.trial[base + i] = s.z[base + i] + step(i);
}

// y = h/2 S^2 (F' - F - A d)
EITHER void defect(const Team& team, const Solve& s, Linear& flow, double h) {
    int r = flow.r;
    flow.scale = 1 / (1 + s.gamma * h * flow.shift);
    through(team, flow, flow.curvature, flow.step);
    for (int i = team.thread(); i < r + 2; i += team.threads())
        flow.y[i] = (i == r + 1) - flow.gradient[i] + (i < r ? flow.spare[i] : 0) + flow.shift * flow.step[i];
    team.sync();
    solve(team, flow);
    solve(team, flow);
    for (int i = team.thread(); i < r + 2; i += team.threads()) flow.y[i] *= 0.5 * h;
    team.sync();
}

// The point at the trial has been kept: its linear flow.
EITHER void linearise(const Team& team, const Solve& s, int row, const Linear& flow) {
    int r = flow.r;
    for (int j = 0; j < r; j++) project(team, s, flow, flow.jacobian + (long long)j * s.width, j);
    if (s.has_near) project(team, s, flow, flow.rest, r);
    const double* curvature = s.curvature + (long long)row * s.columns * s.columns;
    for (int e = team.thread(); e < r * r; e += team.threads()) flow.curvature[e] = curvature[e];
    for (int i = team.thread(); i < r + 2; i += team.threads()) {
        flow.gradient[i] = i < r ? s.weights[(long long)row * s.columns + i] : i == r;
        if (i < r && !s.has_near) flow.gram[i * (r + 2) + r] = 0;
        if (i < r) flow.gram[i * (r + 2) + r + 1] = 0;  // F' is not known yet
    }
    team.sync();
}

// The error of the pending step, in units of what the way from the row's start allows.
EITHER double error_of(const Team& team, const Solve& s, int row, Linear& flow, double h) {
    const real* start = s.start + (long long)s.ticket[row] * s.width;
    const real* trial = s.trial + (long long)row * s.width;
    project(team, s, flow, flow.velocity, flow.r + 1);
    team.sync();
    defect(team, s, flow, h);
    double first = root_mean_square(team, s.width, Spanned(team, s, flow, flow.y));
    double second = root_mean_square(team, s.width, Spanned(team, s, flow, flow.doubt));
    double way = root_mean_square(team, s.width, [&](int i) { return trial[i] - start[i]; });
    double error = is_finite(first) ? fmax(first, second) : first;  // fmax would drop what is not a number
    double scale = s.atol + s.rtol * way;                           // an infinite one would make any error zero
    return is_finite(scale) ? (is_finite(second) ? error : second) / scale : scale;
}

// The first evaluation of a row.
EITHER void begin(const Team& team, const Solve& s, int row, const Linear& flow, Fate* fate, double logp) {
    const real *z = s.z + (long long)row * s.width, *velocity = flow.velocity;
    fate->counters[EVALUATIONS] = 1;
    if (!s.steps) fate->step = first_step(team, s, 0, 1, z, [=](int i) { return velocity[i]; });
    if (asks_nothing(s, row)) {
        fate->status = STATUS_DONE;
        fate->counters[EVALUATIONS] = 0;
    }
    if (!starts_well(team, s, row, logp, velocity)) fate->status = STATUS_NONFINITE;
}

// The end of a row whose fixed steps are done: only where it is is asked for, and no slopes.
EITHER void arrive(const Team& team, const Solve& s, int row) {
    Fate fate = fate_of(s, row);
    fate.logp = log_p(team, s, row);
    decide(s, &fate, 0, is_finite(fate.logp), fate.logp);
    move(team, s, row);
    retire(team, s, row, fate);
}

// One row after the evaluation of its trial point. `fast`: room for 3 r^2 + 3 r + 2 numbers (r <= FAST_COLUMNS) or
// null.
EITHER void gauss_newton(const Team& team, const Solve& s, int row, double* fast) {
    if (s.phase[row] == IDLE) return;
    Fate fate = fate_of(s, row);
    Linear flow = linear_of(s, row, s.column_count[s.ticket[row]] <= FAST_COLUMNS ? fast : 0);
    double logp = gather(team, s, row);
    bool fresh = s.phase[row] == FRESH, accepted = true;
    team.sync();
    if (fresh) {
        begin(team, s, row, flow, &fate, logp);
    } else {
        double error = s.steps ? 0 : error_of(team, s, row, flow, fate.taken);
        bool finite = s.steps ? all_finite(team, flow.velocity, s.width) : is_finite(error);
        accepted = decide(s, &fate, error, finite && is_finite(logp), logp);
    }
    if (accepted) {
        // A row that zigzags across a kink slides along it with the mean of two Jacobians.
        bool late = !fresh && s.steps == 0 && 2 * fate.counters[EVALUATIONS] > s.max_evaluations;
        fate.logp = logp;
        keep(team, s, row, late ? 0.5 : 0);
        linearise(team, s, row, flow);
    }
    if (fate.status != STATUS_RUNNING) return retire(team, s, row, fate);
    choose(s, &fate);
    propose(team, s, row, flow, fate.taken);
    save(team, s, row, fate, RUNNING);
}
