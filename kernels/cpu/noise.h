// Normal numbers as a function of (seed, stream): Philox words and the Box-Muller transform.
//
// engine/reference/noise.py is the twin. The words are the same; the normals are the same float or its neighbour, and
// where they are around 0, within 1e-14.
#pragma once
#include <algorithm>
#include <cmath>

#include "tile.h"

struct Words {
    uint32_t word[4];
};

inline Words philox(uint64_t seed, uint64_t stream, uint32_t block) {
    uint32_t a = block, b = 0, c = (uint32_t)stream, d = (uint32_t)(stream >> 32);
    uint32_t first = (uint32_t)seed, second = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t left = 0xCD9E8D57ull * c, right = 0xD2511F53ull * a;
        a = (uint32_t)(left >> 32) ^ b ^ first, b = (uint32_t)left;
        c = (uint32_t)(right >> 32) ^ d ^ second, d = (uint32_t)right;
        first += 0x9E3779B9u, second += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// In (0, 1).
inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

constexpr int WIDE = LANES / 2;
typedef double Doubles __attribute__((vector_size(8 * WIDE)));
typedef int64_t Longs __attribute__((vector_size(8 * WIDE)));

// log u for u in (0, 1), by 2 artanh of (m - 1) / (m + 1), where u = 2^e m and 1/2 <= m^2 < 2.
inline Doubles log_of(Doubles u) {
    constexpr int64_t LEAST = 0x3FE6A09E667F3BCD;  // sqrt(1/2)
    Longs bits, power;
    memcpy(&bits, &u, sizeof bits);
    power = (bits - LEAST) >> 52;
    bits -= power << 52;
    Doubles m;
    memcpy(&m, &bits, sizeof m);
    Doubles s = (m - 1) / (m + 1), square = s * s, series = square * (1.0 / 21) + 1.0 / 19;
    for (int odd = 17; odd > 0; odd -= 2) series = series * square + 1.0 / odd;
    return __builtin_convertvector(power, Doubles) * 0.69314718055994530942 + 2 * s * series;
}

// cos and sin of 2 pi word / 2^32: a whole number of quarters of the circle, which is exact, and series for the rest, at
// most an eighth.
inline void turn(Longs word, Doubles* cosine, Doubles* sine) {
    Longs quarters = (word + (1 << 29)) >> 30;
    Doubles x = __builtin_convertvector(word - (quarters << 30), Doubles) * (3.14159265358979323846 * 0x1p-31);
    Doubles square = x * x, one = square * 0 + 1, c = one, s = one;
    for (int n = 16; n > 0; n -= 2) {
        c = 1 - square * (1.0 / (n * (n - 1))) * c;
        s = 1 - square * (1.0 / (n * (n + 1))) * s;
    }
    s *= x;
    auto is_odd = (quarters & 1) != 0, is_left = ((quarters + 1) & 2) != 0, is_below = (quarters & 2) != 0;
    Doubles across = is_odd ? s : c, up = is_odd ? c : s;
    *cosine = is_left ? -across : across;
    *sine = is_below ? -up : up;
}

// n of them, the first of a stream.
inline void normals(uint64_t seed, uint64_t stream, int64_t n, float* out) {
    for (int64_t first = 0; first < n; first += 2 * WIDE) {
        int64_t word[2][WIDE];
        for (int i = 0; i < WIDE; i += 2) {
            Words words = philox(seed, stream, (uint32_t)(first / 4 + i / 2));
            word[0][i] = words.word[0], word[1][i] = words.word[1];
            word[0][i + 1] = words.word[2], word[1][i + 1] = words.word[3];
        }
        Longs radius, angle;
        memcpy(&radius, word[0], sizeof radius), memcpy(&angle, word[1], sizeof angle);
        Doubles cosine, sine, square = -2 * log_of((__builtin_convertvector(radius, Doubles) + 0.5) * 0x1p-32);
        turn(angle, &cosine, &sine);
        float pairs[2 * WIDE];
        for (int i = 0; i < WIDE; i++) {
            double length = std::sqrt(square[i]);
            pairs[2 * i] = (float)(length * cosine[i]), pairs[2 * i + 1] = (float)(length * sine[i]);
        }
        memcpy(out + first, pairs, std::min(n - first, (int64_t)(2 * WIDE)) * sizeof(float));
    }
}
