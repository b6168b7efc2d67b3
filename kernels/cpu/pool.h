// Threads that run one function together, with barriers in between.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
inline void relax() { __builtin_ia32_pause(); }
#else
inline void relax() {}
#endif

// A wait spins this often, then gives its core away between looks: another thread may need it to go on.
constexpr int SPINS = 4000;
template <class Done> void spin(const Done& done) {
    for (int i = 0; !done(); i++) {
        if (i < SPINS) relax();
        else std::this_thread::yield();
    }
}

// One of the threads of a call. They take the same way through it, each with its own part of the work.
struct Team {
    int thread, threads;
    std::atomic<int>*arrived, *phase;

    void sync() const {
        if (threads == 1) return;
        int now = phase->load(std::memory_order_relaxed);
        if (arrived->fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived->store(0, std::memory_order_relaxed);
            phase->store(now + 1, std::memory_order_release);
        } else {
            spin([&] { return phase->load(std::memory_order_acquire) != now; });
        }
    }

    // This thread's share of count equal pieces of work.
    int64_t begin(int64_t count) const { return count * thread / threads; }
    int64_t end(int64_t count) const { return count * (thread + 1) / threads; }
};

class Pool {
   public:
    explicit Pool(int threads) : process(getpid()) {
        for (int i = 1; i < threads; i++) workers.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        if (getpid() != process) {  // a fork has copied this object, but not its threads
            for (auto& worker : workers) worker.detach();
            return;
        }
        {
            std::lock_guard<std::mutex> guard(sleep);
            stopping = true;
            calls.fetch_add(1, std::memory_order_release);
        }
        awake.notify_all();
        for (auto& worker : workers) worker.join();
    }

    // Run work on up to `most` threads; on the caller's alone while another call has them, or in a forked process.
    void run(int64_t most, const std::function<void(const Team&)>& work) {
        std::unique_lock<std::mutex> mine(busy, std::try_to_lock);
        size = (int)std::min(most, (int64_t)workers.size() + 1);
        if (size < 2 || !mine.owns_lock() || getpid() != process) return work(Team{0, 1, nullptr, nullptr});
        job = &work;
        left.store((int)workers.size(), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(sleep);
            calls.fetch_add(1, std::memory_order_release);
        }
        awake.notify_all();
        work(team(0));
        spin([&] { return left.load(std::memory_order_acquire) == 0; });
    }

   private:
    Team team(int thread) { return {thread, size, &arrived, &phase}; }

    void serve(int thread) {
        for (int seen = 0;;) {
            // The next evaluation mostly comes within a millisecond; a sleeping thread would take 50 us to wake up.
            for (int i = 0; i < 20 * SPINS && calls.load(std::memory_order_acquire) == seen; i++) relax();
            if (calls.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> guard(sleep);
                awake.wait(guard, [&] { return calls.load(std::memory_order_acquire) != seen; });
            }
            seen = calls.load(std::memory_order_acquire);
            if (stopping) return;
            if (thread < size) (*job)(team(thread));
            left.fetch_sub(1, std::memory_order_release);
        }
    }

    pid_t process;
    std::vector<std::thread> workers;
    std::mutex busy, sleep;
    std::condition_variable awake;
    std::atomic<int> calls{0}, left{0}, arrived{0}, phase{0};
    bool stopping = false;
    int size = 1;  // threads of this call
    const std::function<void(const Team&)>* job = nullptr;
};
