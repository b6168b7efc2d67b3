// What the host tells the kernels: structs in device memory, filled by numpy. engine/layout.py reads this file for
// their layout, so that it is written down once. All arrays are in C order; a pointer that may be null says so.
//
// A row is one of `capacity` places in the batch; a ticket is one of the requests that wait for a place.
// Widths that feed a matrix product are padded to multiples of 32, and everything in the padding is zero.
#pragma once

// One dense layer, forwards or backwards: sums = input weight^T + bias.
struct Dense {
    const operand* input;       // (rows * each, k)
    const operand* weight;      // (n, k): as stored for the forward pass, transposed for the backward one
    const real* bias;           // (n) or null
    operand* output;            // (rows * each, n) or null
    real* exact;                // the same, not rounded to an operand; or null
    const operand* activation;  // backward: (rows, n), whose signs are the slopes that multiply the sums; or null
    const real* average;  // last layer of the mapping: (n), `exact` and `truncated` are what truncation gives; or null
    const real* psi;      // (rows), with `average`
    operand* truncated;   // (rows, n), with `average`
    const real* seeds;    // last hidden layer of a head: (columns, n), derivatives of its columns by it; or null
    operand* seeded;      // (rows * columns, n), with `seeds`: the cotangents that the backward pass starts from
    int n, k;             // padded
    int each;             // rows of the input per row: 1, or cotangents
    int leaky;            // 1: the output is leaky(sums)
    int columns;          // with `seeds`
};

// Layers that do not depend on each other, done by one launch.
struct Level {
    const Dense* problems;
    int count, rows;
};

// The last layer of a head, which is linear: logits[row, first + j] = input weight[j] + bias[j], j < count.
struct Head {
    const operand* input;  // (rows, stride)
    const real* weight;    // (count, k)
    const real* bias;      // (count)
    int k, stride, first, count;
};

// A combination of logits that some ticket reads: u = logits[plus] - logits[minus].
struct Column {
    const real* slopes;  // du/dinput of row i at slopes[i * row_stride]
    int row_stride;
    int plus, minus;  // minus = -1: a logit alone
    int direct;       // 1: the input is the state itself (a head on z, or a flow in W); 0: it is w
};

struct Solve {
    // Sizes
    int capacity, width, w_dim;                // rows, elements of the state, elements of w
    int input_stride, state_stride, w_stride;  // padded widths of `input`, `state`, and of all that is as wide as w
    // Room of the arrays, at least what the longest tape needs; slots are cotangents a row: one a column and near's,
    // which is the last one; or a single one if not `linear`.
    int columns, slots, nodes, parameters;
    int outputs, heads;  // logits of all heads; heads
    int embedded;        // width of the label's embedding, 0 without labels
    int linear;          // 1: the rows of the Jacobian; 0: the gradient alone
    int in_w;            // 1: the state is w
    int has_near;        // 1: some ticket has near > 0
    int layers;          // of the mapping; without one its input is truncated
    int normalised;      // 1: the mapping divides z by its root mean square
    // Settings of the solver; kernels/gauss_newton.cuh and kernels/runge_kutta.cuh say which twin they come from
    int max_evaluations, steps;  // steps = 0: adaptive
    double rtol, atol, length, safety, shrink, grow, smallest_step, first_fraction, budget_growth;
    double gamma, phi_error1, phi_error2, phi_error3, exponent, reach_shrink, reach_grow, near_stretch;
    double fixed_power;
    int stages, fsal;
    double proportional, integral;  // exponents of the error, over the method's order
    double rate, rate_slope;        // of the clock: d tau / d clock = rate + rate_slope * clock
    const double* tableau;          // (stages + 2, stages): a, b, error weights

    // The network
    const Head* head;       // (heads)
    const Column* column;   // those that some ticket reads
    const real* embedding;  // (labels, embedded) or null
    const operand* hidden;  // (capacity, w_stride): the mapping's last activation; null in W or without layers
    const real* average;    // (w_stride): the centre of truncation

    // Tickets
    const real* start;          // (tickets, width)
    const real* start_psi;      // (tickets)
    const int* label;           // (tickets)
    const double* near;         // (tickets)
    const real* anchor;         // (tickets, width): near's anchor of the state; or null without near
    const real* anchor_w;       // (tickets, w_dim); or null
    const int* code;            // (tickets, nodes, 4): engine.layout.pack
    const int* code_length;     // (tickets)
    const double* parameter;    // (tickets, parameters)
    const int* ticket_columns;  // (tickets, columns): places in `column`
    const int* column_count;    // (tickets)

    // Results, by ticket
    real* result_z;        // (tickets, width)
    real* result_w;        // (tickets, w_dim)
    real* result_logits;   // (tickets, outputs)
    double* result_logp;   // (tickets)
    int* result_status;    // (tickets): engine.batch.Status
    int* result_counters;  // (tickets, 4): steps, evaluations, rejected, forced

    // Rows: what one evaluation leaves for the next
    int* ticket;     // (capacity)
    int* phase;      // (capacity): IDLE, FRESH, RUNNING, FINAL
    int* status;     // (capacity)
    int* counters;   // (capacity, 4)
    int* stage;      // (capacity): of a Runge-Kutta step
    double* clock;   // (capacity)
    double* step;    // (capacity): the next step
    double* taken;   // (capacity): the pending one
    double* passes;  // (capacity): how far the clock goes with it
    double* error;   // (capacity): the last accepted error
    double* reach;   // (capacity): longest step that the budget may force
    real* psi;       // (capacity)
    real* z;         // (capacity, width)
    real* w;         // (capacity, w_dim), at z
    real* logits;    // (capacity, outputs), at z
    double* logp;    // (capacity), at z
    real* gradient;  // (capacity, width), at z; null if `linear`
    real* rest;      // (capacity, width): the part of the gradient that is near's, at z; null if not `linear`
    real* jacobian;  // (capacity, columns, width), at z; null if not `linear`
    double* plan;    // (capacity, 3 columns^2 + 5 columns + 6): the linear flow at z; null if not `linear`
    real* slopes;    // (capacity, stages, width) of a Runge-Kutta step; null if `linear`

    // The evaluation at the trial point
    real* trial;           // (capacity, width)
    real* moment;          // (capacity): sqrt(mean z^2 + 1e-8)
    operand* input;        // (capacity, input_stride): the mapping's input; null in W
    operand* state;        // (capacity, state_stride): the trial point for heads that read it, or null
    real* trial_w;         // (capacity, w_stride); the mapping's last `exact`; null in W
    operand* truncated;    // (capacity, w_stride): the same for the heads
    real* trial_logits;    // (capacity, outputs)
    double* trial_logp;    // (capacity), without near
    double* weights;       // (capacity, columns): d log p / du
    double* curvature;     // (capacity, columns^2): of -log p in u, as a square of the row's own columns
    double* scratch;       // (capacity, 3 columns^2 + 5 columns + 8 nodes + 2)
    operand* cotangent;    // (capacity, slots, w_stride); null in W
    real* unit;            // (capacity, slots): the power of two taken out of a cotangent
    real* pulled;          // (capacity, slots, input_stride): the backward pass's last `exact`; null in W
    real* trial_jacobian;  // (capacity, slots, width)
    real* velocity;        // (capacity, width): the gradient at the trial point
    real* combined;        // (capacity, width): scratch of a thread that is alone, else null
    real* trial_rest;      // (capacity, width): the part of it that is near's; null if not `linear`

    // The loop
    int* queue;                      // count, next ticket, running rows, iterations so far, most iterations, goes on
    unsigned long long conditional;  // handle of a WHILE node, for turnover_while
};

#define PLAN(s) ((s).columns * (3LL * (s).columns + 5) + 6)
#define SCRATCH(s) ((s).columns * (3LL * (s).columns + 5) + 8LL * (s).nodes + 2)
