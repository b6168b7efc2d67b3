// What Python calls: library.py, rows.py and posterior.py. Every door checks what it is given, and no exception leaves it.
#include "checks.h"

// A Refusal; whatever was thrown, the work has left everything as it can be used again.
template <class Work> int64_t guarded(const Work& work) {
    try {
        work();
    } catch (const Refused& refused) {
        return refused.why;
    } catch (const std::exception&) {  // std::bad_alloc, or what a container or a mutex throws in its place
        return step::REFUSED_MEMORY;
    }
    return step::REFUSED_NONE;
}

// The same for what is opened, into `opened`.
template <class T, class Make> int64_t open_guarded(T** opened, const Make& make) {
    return guarded([&] {
        require(opened, step::REFUSED_MISSING);
        *opened = make();
    });
}

extern "C" {
int64_t lace_panel() { return PANEL; }
int64_t lace_has_half() { return HAS_HALF; }

// With fewer threads where the system gives no more.
int64_t lace_open_pool(int64_t threads, Pool** opened) {
    return open_guarded(opened, [&] {
        require(threads > 0 && threads <= MOST_THREADS, step::REFUSED_COUNT);
        return new Pool((int)threads);
    });
}
void lace_close_pool(Pool* pool) { delete pool; }

// Both must outlive the field.
int64_t lace_open_field(const Network* network, Pool* pool, Field** opened) {
    return open_guarded(opened, [&] {
        require(network && pool, step::REFUSED_MISSING);
        check_network(*network);
        return new Field(*network, *pool);
    });
}
void lace_close_field(Field* field) { delete field; }

// One call of a field at a time, or of its rows; several fields may share a pool.
int64_t lace_evaluate(Field* field, const Call* call, int64_t is_half) {
    return guarded([&] {
        require(field, step::REFUSED_MISSING);
        require(!is_half || HAS_HALF, step::REFUSED_PRECISION);
        check(*field, call);
        std::shared_ptr<Job> job;
        int64_t pieces = 0;
        auto take = [&](auto evaluation) { pieces = evaluation->pieces(), job = evaluation; };
        is_half ? take(std::make_shared<Evaluation<half>>(*field, *call))
                : take(std::make_shared<Evaluation<float>>(*field, *call));
        field->pool.run(pieces, job);
    });
}

// Field and table must outlive the rows.
int64_t lace_open_rows(Field* field, const ColumnTable* table, const step::Solve* like, Stepper** opened) {
    return open_guarded(opened, [&] {
        require(field, step::REFUSED_MISSING);
        check(*field, table, like);
        return new Stepper(*field, *table, *like);
    });
}
void lace_close_rows(Stepper* rows) { delete rows; }
int64_t lace_admit(Stepper* rows, const Slots* slots, int64_t slot, const TapeRecord* tape) {
    return guarded([&] {
        require(rows, step::REFUSED_MISSING);
        check(*rows, slots, slot, tape);
        rows->admit(*slots, slot, *tape);
    });
}
int64_t lace_advance(Stepper* rows, const int64_t* slots, int64_t count, int64_t rounds, int64_t is_half) {
    return guarded([&] {
        require(rows, step::REFUSED_MISSING);
        require(!is_half || HAS_HALF, step::REFUSED_PRECISION);
        check(*rows, slots, count);
        is_half ? rows->advance<half>(slots, count, rounds) : rows->advance<float>(slots, count, rounds);
    });
}

// Field and table must outlive the posterior.
int64_t lace_open_posterior(Field* field, const ColumnTable* table, const PosteriorSettings* settings,
                            Posterior** opened) {
    return open_guarded(opened, [&] {
        require(field, step::REFUSED_MISSING);
        check(table, settings);
        return new Posterior(*field, *table, *settings);
    });
}
void lace_close_posterior(Posterior* posterior) { delete posterior; }
int64_t lace_walk(Posterior* posterior, const Walks* walks, int64_t waves) {
    return guarded([&] {
        require(posterior, step::REFUSED_MISSING);
        check(*posterior, walks);
        posterior->walk(*walks, waves);
    });
}
}
