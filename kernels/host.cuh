// A block on the host: its threads are the host's, and what a warp does in one instruction they do with barriers. So
// the kernels' own text runs without a GPU, thread by thread, and a race detector can watch it.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

struct uint4 {
    unsigned x, y, z, w;
};

// Two barriers in turn: a race detector would take a thread that is slow to leave one barrier for a thread that has
// waited for all that the others did before the next.
struct Gate {
    pthread_barrier_t barrier[2];
    std::vector<int> turn;  // of each thread

    Gate(int threads) : turn(threads) {
        for (auto& one : barrier) pthread_barrier_init(&one, 0, threads);
    }
    ~Gate() {
        for (auto& one : barrier) pthread_barrier_destroy(&one);
    }
    void wait(int thread) { pthread_barrier_wait(&barrier[turn[thread]++ % 2]); }
};

// What the tensor core sees of a block's shared memory, for host_wgmma.cuh.
struct Proxy {
    std::once_flag once;
    std::vector<unsigned char> bytes;
};

// The threads of a block. `mail` and `registers` are where a warp's lanes exchange numbers.
struct Crew {
    int lanes, warps;
    Gate block;
    std::deque<Gate> warp;
    std::vector<double> mail;
    std::vector<unsigned> registers;
    Proxy proxy;

    Crew(int lanes, int warps)
        : lanes(lanes), warps(warps), block(lanes * warps), mail(lanes * warps), registers(6 * lanes * warps) {
        for (int w = 0; w < warps; w++) warp.emplace_back(lanes);
    }

    // Another lane's number: every lane of the warp must ask.
    double exchange(int w, int lane, int other, double x) {
        mail[w * lanes + lane] = x;
        warp[w].wait(lane);
        x = mail[w * lanes + other];
        warp[w].wait(lane);
        return x;
    }

    // mma.sync.m16n8k16 (half) or m16n8k8 (tf32), as the PTX ISA lays out its fragments: lane 4 g + t has of A the rows
    // g and g + 8, of B the column g, and of the sums the columns 2 t and 2 t + 1. `each` numbers of k are in a
    // register.
    template <class F>
    void multiply(int w, int lane, float* sums, const unsigned* a, const unsigned* b, int each, F number) {
        unsigned* all = &registers[6 * w * lanes];
        for (int i = 0; i < 4; i++) all[6 * lane + i] = a[i];
        for (int i = 0; i < 2; i++) all[6 * lane + 4 + i] = b[i];
        warp[w].wait(lane);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g, high = i / 2, column = 2 * t + i % 2;
            for (int half = 0; half < 2; half++)      // of k: the registers a0, a1 and b0, then a2, a3 and b1
                for (int quad = 0; quad < 4; quad++)  // the lanes that share the rest of k
                    for (int part = 0; part < each; part++) {
                        unsigned from_a = all[6 * (4 * row + quad) + 2 * half + high];
                        unsigned from_b = all[6 * (4 * column + quad) + 4 + half];
                        sums[i] += number(from_a, part) * number(from_b, part);
                    }
        }
        warp[w].wait(lane);
    }
};

// Run `work(lane, warp, crew)` on every thread of a block.
template <class W> void run_block(int lanes, int warps, W work) {
    Crew crew(lanes, warps);
    std::vector<std::thread> threads;
    for (int w = 0; w < warps; w++)
        for (int lane = 0; lane < lanes; lane++) threads.emplace_back([&, w, lane] { work(lane, w, &crew); });
    for (auto& thread : threads) thread.join();
}
