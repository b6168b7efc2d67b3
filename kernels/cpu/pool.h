// Threads that do a job together: its pieces, level by level, whoever comes first.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
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

// Work in levels, each of which needs the results of the one before. Every thread calls `run` and so goes through all
// levels; it takes pieces that nobody has taken yet, and goes on when all are done. So nobody waits for a thread that
// the system does not let run, unless that happens within a piece; and a late one finds nothing to do. It may still be
// on its way when the caller has the results, and therefore reads nothing but the job's own memory between pieces.
class Job {
   public:
    virtual ~Job() = default;
    virtual void run() = 0;

   protected:
    struct alignas(64) Level {
        std::atomic<int64_t> next{0}, done{0};
    };
    std::vector<Level> levels;  // as many as `run` calls `each`, or more

    // work(part, piece) for all count(part) pieces of so many parts. `level` counts the calls of this thread.
    template <class Count, class Work> void each(int& level, int64_t parts, const Count& count, const Work& work) {
        Level& here = levels[level++];
        int64_t total = 0;
        for (int64_t part = 0; part < parts; part++) total += count(part);
        for (int64_t i; (i = here.next.fetch_add(1, std::memory_order_relaxed)) < total;) {
            int64_t part = 0;
            for (; i >= count(part); part++) i -= count(part);
            work(part, i);
            here.done.fetch_add(1, std::memory_order_release);
        }
        spin([&] { return here.done.load(std::memory_order_acquire) >= total; });
    }
};

class Pool {
   public:
    explicit Pool(int threads) : process(getpid()) {
        try {
            for (int i = 1; i < threads; i++) workers.emplace_back([this, i] { serve(i); });
        } catch (const std::exception&) {  // the system gives no more: those that are there do the work
        }
    }
    ~Pool() {
        if (getpid() != process) {  // a fork has copied this object, but not its threads
            for (auto& worker : workers) worker.detach();
            return;
        }
        call(nullptr, STOP);
        for (auto& worker : workers) worker.join();
    }

    // Run the job on up to `most` threads; on the caller's alone while another call has them, or in a forked process.
    void run(int64_t most, const std::shared_ptr<Job>& work) {
        std::unique_lock<std::mutex> mine(busy, std::try_to_lock);
        int64_t wanted = std::min(most - 1, (int64_t)workers.size());
        if (wanted < 1 || !mine.owns_lock() || getpid() != process) {
            work->run();
            return;
        }
        call(work, wanted);
        work->run();
        std::lock_guard<std::mutex> guard(sleep);
        job.reset();
    }

   private:
    static constexpr int64_t STOP = -1;

    void call(const std::shared_ptr<Job>& work, int64_t wanted) {
        {
            std::lock_guard<std::mutex> guard(sleep);
            job = work;
            helpers = wanted;
            calls.fetch_add(1, std::memory_order_release);
        }
        awake.notify_all();
    }

    void serve(int thread) {
        for (int seen = 0;;) {
            // The next evaluation often comes within 0.2 ms, and a sleeping thread takes 50 us to wake up. To wait longer
            // would take the core from those who draw pictures meanwhile.
            for (int i = 0; i < 2 * SPINS && calls.load(std::memory_order_acquire) == seen; i++) relax();
            std::shared_ptr<Job> work;
            {
                std::unique_lock<std::mutex> guard(sleep);
                awake.wait(guard, [&] { return calls.load(std::memory_order_acquire) != seen; });
                seen = calls.load(std::memory_order_acquire);
                if (helpers == STOP) return;
                if (thread <= helpers) work = job;
            }
            if (work) work->run();
        }
    }

    pid_t process;
    std::vector<std::thread> workers;
    std::mutex busy, sleep;  // who has the threads; what they are told
    std::condition_variable awake;
    std::atomic<int> calls{0};
    // Of the current call, under `sleep`: what is to be done, and how many of the workers help.
    std::shared_ptr<Job> job;
    int64_t helpers = 0;
};
