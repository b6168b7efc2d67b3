// cp.async, the async proxy and wgmma on the host, each as late as PTX allows, and with poison where nothing certain
// is: a wait, a fence or a barrier that is missing, and a layout that is not the descriptor's, give wrong numbers.
#pragma once

#include <cstdint>

// One thread's view. `sums` are registers of its own; `memory` is the block's shared memory.
struct Async {
    struct Copy {
        unsigned char* to;
        const void* from;
    };
    struct Product {
        uint64_t a, b;
    };
    static constexpr int START = 1024;  // of the block's shared memory
    static constexpr int POISON = 0xFF;  // NaN as half and as float

    const Team& team;
    unsigned char* memory;
    std::vector<unsigned char>& seen;
    bool fenced = false;
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> pending_copies;
    std::vector<const unsigned char*> hidden;  // 16 bytes each that only the threads see yet
    std::vector<Product> products;
    std::deque<std::vector<Product>> pending_products;

    Async(const Team& team, void* memory, int bytes)
        : team(team), memory((unsigned char*)memory), seen(team.crew->proxy.bytes) {
        std::call_once(team.crew->proxy.once, [&] { seen.assign(bytes, POISON); });
    }

    unsigned address(const void* shared) const { return START + (unsigned)((const unsigned char*)shared - memory); }

    void copy(void* shared, const void* global) {
        copies.push_back({(unsigned char*)shared, global});
        memset(shared, POISON, 16);
        memset(&seen[(unsigned char*)shared - memory], POISON, 16);
    }
    void commit_copies() {
        pending_copies.push_back(copies);
        copies.clear();
    }
    template <int N> void wait_copies() {
        for (; pending_copies.size() > N; pending_copies.pop_front())
            for (const Copy& copy : pending_copies.front()) {
                memcpy(copy.to, copy.from, 16);
                hidden.push_back(copy.to);
            }
    }
    void show_copies() {
        for (const unsigned char* at : hidden) memcpy(&seen[at - memory], at, 16);
        hidden.clear();
    }

    void begin(float*) { fenced = true; }
    void multiply(float* sums, uint64_t a, uint64_t b) {
        if (!fenced) sums[0] = NAN;
        products.push_back({a, b});
    }
    void commit() {
        pending_products.push_back(products);
        products.clear();
        fenced = false;
    }
    template <int N> void wait(float* sums) {
        for (; pending_products.size() > N; pending_products.pop_front())
            for (const Product& product : pending_products.front()) add(sums, product);
    }

    // D of wgmma.m64n64: warp w has rows 16 w to 16 w + 15, lane 4 g + t of them rows g and g + 8, and of every 8
    // columns 2 t and 2 t + 1 (figure of 9.7.15.5.1.1).
    void add(float* sums, const Product& product) const {
        const int g = team.lane / 4, t = team.lane % 4, count = 32 / (int)sizeof(operand);
        for (int i = 0; i < 32; i++) {
            int row = 16 * team.warp + g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
            for (int k = 0; k < count; k++) sums[i] += element(product.a, row, k) * element(product.b, column, k);
        }
    }

    // Number k of a row, by the canonical layout that a descriptor means without swizzling, K-major:
    // ((8, m), (T, 2 k)) : ((1 T, SBO), (1, LBO)), T numbers in 16 bytes (9.7.15.5.1.2.1.3).
    float element(uint64_t descriptor, int row, int k) const {
        const uint64_t known = 0x3FFF | 0x3FFFull << 16 | 0x3FFFull << 32;
        const int start = (descriptor & 0x3FFF) << 4, along_k = (descriptor >> 16 & 0x3FFF) << 4;
        const int along_rows = (descriptor >> 32 & 0x3FFF) << 4, byte = k * (int)sizeof(operand);
        const int place = start + row % 8 * 16 + row / 8 * along_rows + byte / 16 * along_k + byte % 16 - START;
        if (descriptor & ~known || place < 0 || place + (int)sizeof(operand) > (int)seen.size()) return NAN;
        if (memcmp(&seen[place], memory + place, sizeof(operand))) return NAN;  // somebody has written there since
        operand x;
        memcpy(&x, &seen[place], sizeof x);
        return (float)x;
    }
};
