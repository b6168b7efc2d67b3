// The field on a CPU: mapping and heads forwards, slopes of the wanted logits, and their way back to z, in one call.
//
// engine/reference/field.py is the twin and tells what each part computes. The threads of a pool go through an evaluation
// together, level by level. Products are split by panels of the weights, so that each is read once; all else by rows.
// What goes backwards is float, or half where T is.
#pragma once
#include <algorithm>
#include <cmath>

#include "memory.h"
#include "pool.h"
#include "records.h"
#include "tile.h"

struct Field {
    Field(const Network& network, Pool& pool) : network(network), pool(pool) {}

    const Network& network;
    Pool& pool;
    Memory kept, passing;  // what the way back needs; all else
    int64_t rows = 0;      // that the way back may start from: of the last call, if it came from z
    Rows<float> x;         // of the last call: z / s, with the label's embedding; 1 / s and psi of each row
    float *inverse = nullptr, *psi = nullptr;
    std::vector<Rows<float>> hidden;
};

// Of a vector that ends within a row of count numbers. Never reads or writes behind it.
inline Vector load_part(const float* x, int64_t count) {
    if (count >= LANES) return load(x);
    float part[LANES] = {};
    memcpy(part, x, std::max(count, (int64_t)0) * sizeof(float));
    return load(part);
}
inline void store_part(float* x, Vector v, int64_t count) { memcpy(x, &v, std::min(count, (int64_t)LANES) * sizeof(float)); }

inline float sum(Vector v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// A product of rows with so many columns, cut into pieces: a panel for up to CHUNK rows each.
constexpr int64_t CHUNK = 16 * ROWS;
struct Pieces {
    int64_t rows, width;

    int64_t chunks() const { return (rows + CHUNK - 1) / CHUNK; }
    int64_t count() const { return padded(width) / PANEL * chunks(); }
    int64_t panel(int64_t piece) const { return piece / chunks(); }
    int64_t begin(int64_t piece) const { return piece % chunks() * CHUNK; }
    int64_t end(int64_t piece) const { return std::min(begin(piece) + CHUNK, rows); }
};

// Rows that need little work each are one piece together.
constexpr int64_t BLOCK = 8;
inline int64_t blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }
template <class Work> void of_block(int64_t block, int64_t rows, const Work& work) {
    for (int64_t row = block * BLOCK; row < std::min((block + 1) * BLOCK, rows); row++) work(row);
}

// A panel of g W, for put(row, column, sums). Of an odd number of halves the last pair's second is zero.
template <class T, class Put>
void backwards(const Layer& layer, int64_t panel, int64_t begin, int64_t end, const T* const* g, const Put& put) {
    int64_t K = (layer.out + DEPTH<T> - 1) / DEPTH<T> * DEPTH<T>;
    tiles(begin, end, g, K, (const T*)layer.back + panel * K * PANEL,
          [&](int64_t row, int64_t lane, Vector total) { put(row, panel * PANEL + lane, total); });
}

// A use's memory: what each layer reads and gives, and the cotangents (rows * wanted, width) on their way back.
template <class T> struct Head {
    const Use use;
    const Stack& stack = *use.stack;
    int64_t slots = use.rows * use.wanted;
    std::vector<const float**> input{};
    std::vector<Rows<float>> hidden{};
    Rows<float> seed{}, slopes{};
    Rows<T> flow[2]{};
    const T** flows[2]{};

    int64_t width(int64_t layer) const { return layer ? stack.layer[layer - 1].out : stack.into; }
};

template <class T> struct Evaluation : Job {
    Evaluation(Field& field, const Call& call) : net(field.network), call(call) { plan(field); }

    const Network& net;
    const Call call;
    Rows<float> x, w;  // as in the field
    float *inverse, *psi;
    std::vector<Rows<float>> hidden;
    std::vector<const float**> input;
    std::vector<Head<T>> heads;
    int64_t deepest = 0;
    Rows<T> flow[2];
    const T** flows[2];
    Rows<float> end;

    // The derivative of the leaky ReLU, read off its result.
    Vector slope(Vector activation) const {
        Mask is_positive = activation > fill(0);
        return is_positive ? fill(1) : fill(net.slope);
    }

    // A panel of y = leaky(x W^T + b), and then(row, column, y).
    template <class Then>
    void forwards(const Layer& layer, int64_t panel, int64_t begin, int64_t end, const float* const* x,
                  const Rows<float>& y, const Then& then) const {
        const float* weight = layer.weight + panel * layer.into * PANEL;
        tiles(begin, end, x, layer.into, weight, [&](int64_t row, int64_t lane, Vector total) {
            int64_t column = panel * PANEL + lane;
            Vector v = total + load(layer.bias + column);
            v *= slope(v);
            store(y[row] + column, v);
            then(row, column, v);
        });
    }

    // Takes the memory, on the caller's thread.
    void plan(Field& field) {
        Memory& passing = field.passing;
        passing.reset();
        const Stack& mapping = net.mapping;
        if (!call.cotangent) {
            field.rows = 0;
            field.kept.reset();
            plan_mapping(field);
            for (int64_t i = 0; i < call.uses; i++) plan_head(call.use[i], passing);
        }
        x = field.x, inverse = field.inverse, psi = field.psi, hidden = field.hidden;
        int64_t widest = net.w_dim;
        for (int64_t i = 0; i < mapping.depth; i++) widest = std::max(widest, mapping.layer[i].into);
        for (int side = 0; side < 2 && call.pairs; side++) {
            flow[side] = passing.rows<T>(call.pairs, widest);
            flows[side] = passing.pointers(call.pairs, flow[side]);
        }
        end = passing.rows<float>(call.pairs, mapping.into);
        levels = std::vector<Level>(2 * (mapping.depth + deepest) + 7);
        if (!call.cotangent && !call.is_w) field.rows = call.rows;
    }

    void plan_mapping(Field& field) {
        Memory &kept = field.kept, &passing = field.passing;
        if (call.is_w) {
            w = {const_cast<float*>(call.z), net.w_dim};
            return;
        }
        const Stack& mapping = net.mapping;
        w = passing.rows<float>(call.rows, net.w_dim);
        field.x = kept.rows<float>(call.rows, mapping.into);
        field.inverse = kept.take<float>(call.rows), field.psi = kept.take<float>(call.rows);
        field.hidden.clear();
        input.push_back(passing.pointers(call.rows, field.x));
        for (int64_t i = 0; i < mapping.depth; i++) {
            field.hidden.push_back(kept.rows<float>(call.rows, mapping.layer[i].out));
            input.push_back(passing.pointers(call.rows, field.hidden[i]));
        }
    }

    void plan_head(const Use& use, Memory& memory) {
        Head<T> head{use};
        Rows<float> from = head.stack.reads_z ? Rows<float>{const_cast<float*>(call.z), net.z_dim} : w;
        const float** first = memory.take<const float*>(use.rows);
        for (int64_t i = 0; i < use.rows; i++) first[i] = from[use.row ? use.row[i] : i];
        head.input.push_back(first);
        int64_t widest = 0, depth = head.stack.depth;
        for (int64_t i = 0; i < depth; i++) {
            head.hidden.push_back(memory.rows<float>(use.rows, head.stack.layer[i].out));
            head.input.push_back(memory.pointers(use.rows, head.hidden[i]));
            widest = std::max(widest, head.stack.layer[i].out);
        }
        head.seed = memory.rows<float>(use.wanted, head.width(depth));
        head.slopes = memory.rows<float>(head.slots, head.stack.into);
        for (int side = 0; side < 2; side++) {
            head.flow[side] = memory.rows<T>(head.slots, widest);
            head.flows[side] = memory.pointers(head.slots, head.flow[side]);
        }
        deepest = std::max(deepest, depth);
        heads.push_back(std::move(head));
    }

    // Of the largest level: more threads than that would only wait for each other.
    int64_t pieces() const {
        int64_t most = Pieces{std::max(call.rows, call.pairs), net.w_dim}.count(), together = 0;
        for (const Head<T>& head : heads)
            together += Pieces{std::max(head.use.rows, head.slots), head.width(head.stack.depth)}.count();
        return std::max(most, together);
    }

    void run() override {
        int level = 0;
        evaluate(level);
    }

    void evaluate(int& level) {
        if (!call.cotangent) {
            if (!call.is_w) map(level);
            run_heads(level);
            find_slopes(level);
        }
        if (call.pairs) pull_back(level);
    }

    // work(row) for all rows of each of so many parts.
    template <class Count, class Work> void each_row(int& level, int64_t parts, const Count& rows, const Work& work) {
        each(level, parts, [&](int64_t i) { return blocks(rows(i)); },
             [&](int64_t i, int64_t block) { of_block(block, rows(i), [&](int64_t row) { work(i, row); }); });
    }

    void map(int& level) {
        const Stack& mapping = net.mapping;
        auto rows = [&](int64_t) { return call.rows; };
        each_row(level, 1, rows, [&](int64_t, int64_t row) {
            normalise(row);
            if (!mapping.depth) truncate_input(row);
        });
        for (int64_t i = 0; i < mapping.depth; i++) {
            bool is_last = i == mapping.depth - 1;
            Pieces all{call.rows, mapping.layer[i].out};
            each(level, 1, [&](int64_t) { return all.count(); }, [&](int64_t, int64_t piece) {
                forwards(mapping.layer[i], all.panel(piece), all.begin(piece), all.end(piece), input[i], hidden[i],
                         [&](int64_t row, int64_t column, Vector v) {
                             if (is_last) truncate(row, column, v);
                         });
            });
        }
    }

    void normalise(int64_t row) {
        const float* z = call.z + row * net.z_dim;
        float *x = this->x[row], s = net.normalised ? moment(z) : 1;
        for (int64_t i = 0; i < net.z_dim; i++) x[i] = z[i] / s;
        if (net.embedded) {
            const float* embedding = net.embedding + call.label[row] * net.embedded;
            std::copy(embedding, embedding + net.embedded, x + net.z_dim);
        }
        inverse[row] = 1 / s;
        psi[row] = call.psi[row];
    }

    // The root mean square of z; not a number where the squares' sum overflows, since z / infinity would be a finite and
    // wrong input. The twin sums in another order.
    float moment(const float* z) const {
        Vector squares{};
        for (int64_t i = 0; i < net.z_dim; i += LANES) {
            Vector v = load_part(z + i, net.z_dim - i);
            squares += v * v;
        }
        float total = sum(squares), overflow = total - total;  // 0, or not a number
        return std::sqrt(total / net.z_dim + net.epsilon) + overflow;
    }

    // Without layers the mapping's input is what is truncated.
    void truncate_input(int64_t row) {
        for (int64_t column = 0; column < net.w_dim; column += LANES)
            truncate(row, column, load_part(x[row] + column, net.w_dim - column));
    }

    void truncate(int64_t row, int64_t column, Vector v) {
        Vector average = load_part(net.average + column, net.w_dim - column);
        Vector result = average + fill(call.psi[row]) * (v - average);
        store(w[row] + column, result);
        if (column < net.w_dim) store_part(call.w + row * net.w_dim + column, result, net.w_dim - column);
    }

    void run_heads(int& level) {
        int64_t count = heads.size();
        for (int64_t depth = 0; depth < deepest; depth++) {
            auto all = [&](int64_t i) {
                return Pieces{heads[i].use.rows, depth < heads[i].stack.depth ? heads[i].width(depth + 1) : 0};
            };
            each(level, count, [&](int64_t i) { return all(i).count(); }, [&](int64_t i, int64_t piece) {
                Head<T>& head = heads[i];
                Pieces own = all(i);
                forwards(head.stack.layer[depth], own.panel(piece), own.begin(piece), own.end(piece), head.input[depth],
                         head.hidden[depth], [](int64_t, int64_t, Vector) {});
            });
        }
        // First the rows' logits, then the seeds' products with the last layer.
        each_row(level, 2 * count, [&](int64_t i) { return i < count ? heads[i].use.rows : heads[i - count].use.wanted; },
                 [&](int64_t i, int64_t row) { i < count ? find_logits(heads[i], row) : find_seed(heads[i - count], row); });
    }

    void find_logits(Head<T>& head, int64_t row) {
        const Stack& stack = head.stack;
        int64_t K = head.width(stack.depth);
        const float* from = head.input[stack.depth][row];
        for (int64_t j = 0; j < stack.outputs; j++) {
            Vector total{};
            const float* weight = stack.last + j * K;
            for (int64_t k = 0; k < K; k += LANES) total += load_part(from + k, K - k) * load_part(weight + k, K - k);
            head.use.logits[row * stack.outputs + j] = sum(total) + stack.last_bias[j];
        }
    }

    void find_seed(Head<T>& head, int64_t row) {
        const Stack& stack = head.stack;
        int64_t K = head.width(stack.depth);
        for (int64_t k = 0; k < head.seed.stride; k += LANES) {
            Vector total{};
            for (int64_t j = 0; j < stack.outputs; j++)
                total += fill(head.use.seeds[row * stack.outputs + j]) * load_part(stack.last + j * K + k, K - k);
            store(head.seed[row] + k, total);
        }
    }

    void find_slopes(int& level) {
        int64_t count = heads.size();
        auto slots = [&](int64_t i) { return heads[i].slots; };
        each_row(level, count, slots, [&](int64_t i, int64_t slot) { begin_back(heads[i], slot); });
        for (int64_t step = 0; step < deepest; step++) {
            auto layer = [&](int64_t i) { return heads[i].stack.depth - 1 - step; };
            auto all = [&](int64_t i) { return Pieces{heads[i].slots, layer(i) < 0 ? 0 : heads[i].width(layer(i))}; };
            each(level, count, [&](int64_t i) { return all(i).count(); }, [&](int64_t i, int64_t piece) {
                Head<T>& head = heads[i];
                Pieces own = all(i);
                int64_t below = layer(i) - 1, side = step % 2;
                backwards<T>(head.stack.layer[below + 1], own.panel(piece), own.begin(piece), own.end(piece),
                             head.flows[side], [&](int64_t slot, int64_t column, Vector total) {
                                 if (below < 0) return store(head.slopes[slot] + column, total);
                                 const float* active = head.hidden[below][slot / head.use.wanted];
                                 store(head.flow[1 - side][slot] + column, total * slope(load(active + column)));
                             });
            });
        }
        each_row(level, count, [&](int64_t i) { return heads[i].use.slopes ? heads[i].slots : 0; },
                 [&](int64_t i, int64_t slot) {
                     int64_t into = heads[i].stack.into;
                     std::copy_n(heads[i].slopes[slot], into, heads[i].use.slopes + slot * into);
                 });
    }

    // A cotangent starts at the last hidden layer's output, as its slopes times the seed.
    void begin_back(Head<T>& head, int64_t slot) {
        const float* seed = head.seed[slot % head.use.wanted];
        const float* active = head.stack.depth ? head.hidden.back()[slot / head.use.wanted] : nullptr;
        for (int64_t k = 0; k < head.seed.stride; k += LANES) {
            if (active) store(head.flow[0][slot] + k, load(seed + k) * slope(load(active + k)));
            else store(head.slopes[slot] + k, load(seed + k));
        }
    }

    void pull_back(int& level) {
        const Stack& mapping = net.mapping;
        auto pairs = [&](int64_t) { return call.pairs; };
        each_row(level, 1, pairs, [&](int64_t, int64_t p) { begin_pair(p); });
        for (int64_t i = mapping.depth - 1; i >= 0; i--) {
            int side = (mapping.depth - 1 - i) % 2;
            Pieces all{call.pairs, mapping.layer[i].into};
            each(level, 1, [&](int64_t) { return all.count(); }, [&](int64_t, int64_t piece) {
                backwards<T>(mapping.layer[i], all.panel(piece), all.begin(piece), all.end(piece), flows[side],
                             [&](int64_t p, int64_t column, Vector total) {
                                 if (i == 0) return store(end[p] + column, total);
                                 const float* active = hidden[i - 1][call.pair_row[p]];
                                 store(flow[1 - side][p] + column, total * slope(load(active + column)));
                             });
            });
        }
        each_row(level, 1, pairs, [&](int64_t, int64_t p) { denormalise(p); });
    }

    // The cotangent on w, through the truncation and the last slopes of the mapping.
    void begin_pair(int64_t p) {
        int64_t row = call.pair_row[p];
        const float *anchor = nullptr, *from = start(p, anchor);
        const float* active = hidden.empty() ? nullptr : hidden.back()[row];
        for (int64_t k = 0; k < padded(net.w_dim); k += LANES) {
            Vector v = load_part(from + k, net.w_dim - k);
            if (anchor) v -= load_part(anchor + k, net.w_dim - k);
            v *= fill(psi[row]);
            if (active) store(flow[0][p] + k, v * slope(load(active + k)));
            else store(end[p] + k, v);
        }
    }

    // Where the cotangent of a pair is; less the anchor, if it is one of near.
    const float* start(int64_t pair, const float*& anchor) const {
        if (call.cotangent) return call.cotangent + pair * net.w_dim;
        int64_t place = call.source[pair];
        for (const Head<T>& head : heads) {
            if (place < head.slots) return head.slopes[place];
            place -= head.slots;
        }
        anchor = call.near_anchor + place * net.w_dim;
        return w[call.near_row[place]];
    }

    // Through z / s: what is left has no part along z.
    void denormalise(int64_t pair) {
        int64_t row = call.pair_row[pair], d = net.z_dim;
        const float *g = end[pair], *x = this->x[row];
        if (!net.normalised) return (void)std::copy_n(g, d, call.jacobian + pair * d);
        Vector products{};
        for (int64_t i = 0; i < d; i += LANES) products += load_part(g + i, d - i) * load_part(x + i, d - i);
        Vector radial = fill(sum(products) / d), scale = fill(inverse[row]);
        for (int64_t i = 0; i < d; i += LANES)
            store_part(call.jacobian + pair * d + i, (load(g + i) - radial * load(x + i)) * scale, d - i);
    }
};
