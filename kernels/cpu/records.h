// What Python tells the field: engine/native/library.py has the same records.
#pragma once
#include <cstdint>

extern "C" {

// y = leaky(x W^T + b). weight: W^T (into, out) in panels of float; back: W (out, into) in panels of T.
struct Layer {
    int64_t into, out;
    const float *weight, *bias;
    const void* back;
};

// Hidden layers; and a head's last, linear one (outputs, width of what goes in), as it is.
struct Stack {
    int64_t into, depth, outputs, reads_z;
    const Layer* layer;
    const float *last, *last_bias;
};

// mapping: may have no layer, then its input is w before truncation. normalised: 1 where z is divided by its root mean
// square. embedding: (labels, embedded). slope: of the leaky ReLU where it is negative; epsilon: added to the mean square.
struct Network {
    int64_t z_dim, w_dim, embedded, labels, normalised;
    const float *embedding, *average;
    Stack mapping;
    float slope, epsilon;
};

// A head and its readers: positions row (rows,), null for all rows; and seeds (wanted, outputs). Gives logits (rows,
// outputs) and, where that is not null, slopes (rows, wanted, into).
struct Use {
    const Stack* stack;
    int64_t rows, wanted;
    const int64_t* row;
    const float* seeds;
    float *logits, *slopes;
};

// Forwards for z (rows, z_dim), or for w in its place where is_w; then w (rows, w_dim) is given. And back: jacobian
// (pairs, z_dim), of pair p in row pair_row[p] the slope at place source[p] among the (rows, wanted) of all uses, one
// behind the other, and of w[near_row] - near_anchor (near, w_dim) behind them. With cotangent (pairs, w_dim) only back,
// for these, from where the call before was.
struct Call {
    int64_t rows, is_w, uses, pairs, near;
    const float *z, *psi;
    const int64_t* label;
    const Use* use;
    const int64_t *pair_row, *source, *near_row;
    const float *near_anchor, *cotangent;
    float *w, *jacobian;
};
}
