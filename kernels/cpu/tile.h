// Products of a few rows with packed weights, written with the compiler's vectors: one source for every processor.
//
// Weights (K, N) are packed in panels of PANEL columns: (panels, K, PANEL), the last one filled up with zeros. A tile is
// ROWS rows of a panel; its sums stay in registers. Each sum adds its K terms one after the other, whatever the number
// of rows, so that a row's bits do not depend on its neighbours.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, VECTORS = 4;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, VECTORS = 2;  // 12 of 16
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 4;  // 16 of 32 on ARM
#endif
constexpr int PANEL = LANES * VECTORS;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef uint16_t half;  // bfloat16: the upper half of a float

inline Vector load(const float* x) {
    Vector v;
    memcpy(&v, x, sizeof v);
    return v;
}
inline void store(float* x, Vector v) { memcpy(x, &v, sizeof v); }
inline Vector fill(float x) { return x - Vector{}; }

#if defined(__AVX512BF16__)
#include <immintrin.h>
constexpr bool HAS_HALF = true;
// The sum of products of neighbours in k, two by two.
inline Vector multiply_add(Vector sum, const half* pair, const half* weights) {
    int32_t both;
    memcpy(&both, pair, sizeof both);
    __m512i w = _mm512_loadu_si512(weights);
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)w);
}
inline void store(half* x, Vector v) {
    __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    memcpy(x, &narrow, sizeof narrow);
}
#else
constexpr bool HAS_HALF = false;
inline Vector multiply_add(Vector sum, const half*, const half*) { return sum; }
inline void store(half*, Vector) {}
#endif
inline Vector multiply_add(Vector sum, const float* one, const float* weights) {
    return sum + fill(*one) * load(weights);  // contracted to one instruction where there is one
}

// Of how many neighbours in k a step of the sum takes the products; they lie beside each other in a panel.
template <class T> constexpr int DEPTH = sizeof(float) / sizeof(T);

// count rows of x times one panel: finish(row, column in the panel, sums of LANES columns).
template <int count, class T, class Finish>
void tile(const T* const* x, int64_t K, const T* panel, int first, const Finish& finish) {
    Vector sums[count][VECTORS] = {};
    for (int64_t k = 0; k < K; k += DEPTH<T>) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const T* weights = panel + k * PANEL + v * LANES * DEPTH<T>;
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) sums[r][v] = multiply_add(sums[r][v], x[r] + k, weights);
        }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++) finish(first + r, v * LANES, sums[r][v]);
}

// Rows begin to end of x times one panel.
template <class T, class Finish>
void tiles(int64_t begin, int64_t end, const T* const* x, int64_t K, const T* panel, const Finish& finish) {
    int64_t row = begin;
    for (; row + ROWS <= end; row += ROWS) tile<ROWS>(x + row, K, panel, row, finish);
    switch (end - row) {
        case 5: if constexpr (ROWS > 5) tile<5>(x + row, K, panel, row, finish); break;
        case 4: if constexpr (ROWS > 4) tile<4>(x + row, K, panel, row, finish); break;
        case 3: tile<3>(x + row, K, panel, row, finish); break;
        case 2: tile<2>(x + row, K, panel, row, finish); break;
        case 1: tile<1>(x + row, K, panel, row, finish); break;
    }
}
