// What Python calls: library.py and rows.py.
#include "field.h"
#include "rows.h"

// 0, or 1 where memory was not enough: no exception leaves what is called again and again.
template <class Work> int64_t guarded(const Work& work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

extern "C" {
int64_t lace_panel() { return PANEL; }
int64_t lace_has_half() { return HAS_HALF; }

Pool* lace_open_pool(int64_t threads) { return new Pool(threads); }
void lace_close_pool(Pool* pool) { delete pool; }
// Both must outlive the field.
Field* lace_open_field(const Network* network, Pool* pool) { return new Field(*network, *pool); }
void lace_close_field(Field* field) { delete field; }

// One call of a field at a time, or of its rows; several fields may share a pool.
int64_t lace_evaluate(Field* field, const Call* call, int64_t is_half) {
    return guarded([&] {
        std::shared_ptr<Job> job;
        int64_t pieces = 0;
        auto open = [&](auto evaluation) { pieces = evaluation->pieces(), job = evaluation; };
        is_half ? open(std::make_shared<Evaluation<half>>(*field, *call))
                : open(std::make_shared<Evaluation<float>>(*field, *call));
        field->pool.run(pieces, job);
    });
}

// Field and readable must outlive the rows.
Stepper* lace_open_rows(Field* field, const Readable* readable, const step::Solve* like) {
    return new Stepper(*field, *readable, *like);
}
void lace_close_rows(Stepper* rows) { delete rows; }
int64_t lace_admit(Stepper* rows, const Slots* slots, int64_t slot, const Says* says) {
    return guarded([&] { rows->admit(*slots, slot, *says); });
}
int64_t lace_advance(Stepper* rows, const int64_t* slots, int64_t count, int64_t rounds, int64_t is_half) {
    return guarded([&] {
        is_half ? rows->advance<half>(slots, count, rounds) : rows->advance<float>(slots, count, rounds);
    });
}
}
