// One evaluation of engine/solvers/runge_kutta.py for one row. A row is a machine of its own: `stage` says which stage
// of its step the trial point is, so that rows with different numbers of steps share every evaluation.
#pragma once

// Sum over the stages of weight_j slope_j. A weight of zero leaves its stage out, which may not be evaluated yet.
EITHER real combine(const Solve& s, const real* slopes, const double* weights, int i) {
    real total = 0;
    for (int j = 0; j < s.stages; j++)
        if (weights[j] != 0) total += (real)weights[j] * slopes[(long long)j * s.width + i];
    return total;
}

EITHER double node_of(const Solve& s, int stage) {
    double c = 0;
    for (int j = 0; j < stage; j++) c += s.tableau[stage * s.stages + j];
    return c;
}

// Accept or reject, as RungeKutta.decide.
EITHER bool settle(const Solve& s, Fate* fate, double error, bool finite) {
    bool accepted = finite && error <= 1;
    if (accepted) {
        fate->clock += fate->taken;
        fate->counters[STEPS]++;
    }
    fate->counters[REJECTED] += !accepted;
    if (s.steps == 0) {
        double now = fmax(error, 1e-10);
        double factor = finite ? s.safety * pow(now, -s.proportional) * pow(fate->error, s.integral) : 0;
        fate->step = fate->taken * clip(factor, s.shrink, accepted ? s.grow : 1);
        if (accepted) fate->error = now;
        if (!accepted && fate->step < s.smallest_step) fate->status = STATUS_STEP_UNDERFLOW;
    } else if (!finite) {
        fate->status = STATUS_NONFINITE;
    }
    if (fate->counters[EVALUATIONS] >= s.max_evaluations) fate->status = STATUS_STEP_LIMIT;
    if (accepted && fate->clock >= s.length * (1 - 1e-12)) fate->status = STATUS_DONE;
    return accepted;
}

// trial = z + h sum_j weight_j slope_j
EITHER void step_to(const Team& team, const Solve& s, int row, double h, const double* weights) {
    long long base = (long long)row * s.width;
    for (int i = team.thread(); i < s.width; i += team.threads())
        s.trial[base + i] = s.z[base + i] + (real)h * combine(s, s.slopes + base * s.stages, weights, i);
    team.sync();
}

// Where a step that has all its stages leads: the trial point and its judgement.
EITHER bool finish(const Team& team, const Solve& s, int row, Fate* fate) {
    long long base = (long long)row * s.width;
    const real *z = s.z + base, *trial = s.trial + base, *slopes = s.slopes + base * s.stages;
    const double *b = s.tableau + s.stages * s.stages, *e = b + s.stages;
    step_to(team, s, row, fate->taken, b);
    real h = (real)fate->taken;
    auto error = [=, &s](int i) { return h * combine(s, slopes, e, i); };
    auto before = [=](int i) { return z[i]; };
    auto after = [=](int i) { return trial[i]; };
    double norm = s.steps ? 0 : error_norm(team, s.width, s.rtol, s.atol, error, before, after);
    return settle(s, fate, norm, is_finite(norm) && all_finite(team, trial, s.width));
}

// The first slope of a step: it has been evaluated already, as the end of the step before or as the start.
EITHER void first_slope(const Team& team, const Solve& s, int row, const Fate& fate) {
    long long base = (long long)row * s.width;
    real rate = (real)(s.rate + s.rate_slope * fate.clock);
    for (int i = team.thread(); i < s.width; i += team.threads())
        s.slopes[base * s.stages + i] = s.gradient[base + i] * rate;
    team.sync();
}

EITHER void begin(const Team& team, const Solve& s, int row, Fate* fate) {
    const real *z = s.z + (long long)row * s.width, *gradient = s.gradient + (long long)row * s.width;
    real rate = (real)(s.rate + s.rate_slope * fate->clock);
    auto speed = [=](int i) { return gradient[i] * rate; };
    fate->step = s.steps ? s.length / s.steps : first_step(team, s, s.rtol, s.atol, z, speed);
    if (asks_nothing(s, row)) {
        fate->status = STATUS_DONE;
        fate->counters[EVALUATIONS] = 0;
    }
    if (!starts_well(team, s, row, fate->logp, gradient)) fate->status = STATUS_NONFINITE;
}

EITHER void runge_kutta(const Team& team, const Solve& s, int row) {
    int phase = s.phase[row];
    if (phase == IDLE) return;
    Fate fate = fate_of(s, row);
    double logp = gather(team, s, row);
    team.sync();
    if (phase != FINAL) fate.counters[EVALUATIONS]++;  // the last one only measures
    if (fate.stage == 0) {                             // the trial point is the row's own
        fate.logp = logp;
        keep(team, s, row);
        if (phase == FRESH) begin(team, s, row, &fate);
        if (fate.status != STATUS_RUNNING) return retire(team, s, row, fate);
        fate.taken = fmin(fate.step, s.length - fate.clock);
        first_slope(team, s, row, fate);
    } else {
        long long base = (long long)row * s.width;
        real rate = (real)(s.rate + s.rate_slope * (fate.clock + node_of(s, fate.stage) * fate.taken));
        real* slope = s.slopes + base * s.stages + (long long)fate.stage * s.width;
        for (int i = team.thread(); i < s.width; i += team.threads()) slope[i] = s.velocity[base + i] * rate;
        team.sync();
    }
    if (++fate.stage == s.stages) {
        bool accepted = finish(team, s, row, &fate);
        if (accepted && !s.fsal) {  // the end of the step is still to be evaluated
            fate.stage = 0;
            return save(team, s, row, fate, fate.status == STATUS_RUNNING ? RUNNING : FINAL);
        }
        if (accepted) {
            fate.logp = logp;
            keep(team, s, row);
        }
        if (fate.status != STATUS_RUNNING) return retire(team, s, row, fate);
        fate.taken = fmin(fate.step, s.length - fate.clock);
        first_slope(team, s, row, fate);
        fate.stage = 1;
    }
    step_to(team, s, row, fate.taken, s.tableau + fate.stage * s.stages);
    save(team, s, row, fate, RUNNING);
}
