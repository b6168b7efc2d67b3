// Matrices with padded rows, in memory that is kept from call to call.
#pragma once
#include <new>
#include <sys/mman.h>
#include <vector>

#include "tile.h"

inline int64_t padded(int64_t width) { return (width + PANEL - 1) / PANEL * PANEL; }

template <class T> struct Rows {
    T* data = nullptr;
    int64_t stride = 0;
    T* operator[](int64_t row) const { return data + row * stride; }
};

#ifdef __SANITIZE_ADDRESS__
constexpr bool IS_WATCHED = true;  // every piece is a block, of its own size: what lies behind it is not its neighbour
inline void* allocate(size_t size) { return operator new(size, std::align_val_t(64)); }
inline void release(void* data, size_t) { operator delete(data, std::align_val_t(64)); }
#else
constexpr bool IS_WATCHED = false;
// Pages of the system's own: what is kept for long in malloc's arenas leaves holes there when it grows.
inline void* allocate(size_t size) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    return data;
}
inline void release(void* data, size_t size) { munmap(data, size); }
#endif

struct Block {
    explicit Block(size_t size) : data((char*)allocate(size)), size(size) {}
    Block(Block&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
    ~Block() {
        if (data) release(data, size);
    }

    char* data;
    size_t size;
};

// Takes pieces one after the other; `reset` gives them all back. It never shrinks.
class Memory {
   public:
    void reset() {
        if (blocks.size() > 1) {  // next time all fits into one
            blocks.clear();
            if (!IS_WATCHED) add(total);
        }
        used = total = 0;
    }
    template <class T> T* take(int64_t count) {
        size_t bytes = count * sizeof(T);
        if (!IS_WATCHED) bytes = (bytes + 63) / 64 * 64;
        if (IS_WATCHED || blocks.empty() || used + bytes > blocks.back().size) add(bytes);
        char* here = blocks.back().data + used;
        used += bytes;
        total += bytes;
        return (T*)here;
    }
    template <class T> Rows<T> rows(int64_t count, int64_t width) {
        return {take<T>(count * padded(width)), padded(width)};
    }
    template <class T> const T** pointers(int64_t count, const Rows<T>& matrix) {
        const T** found = take<const T*>(count);
        for (int64_t i = 0; i < count; i++) found[i] = matrix[i];
        return found;
    }

   private:
    void add(size_t bytes) {
        blocks.emplace_back(IS_WATCHED || bytes > 65536 ? bytes : 65536);
        used = 0;
    }

    std::vector<Block> blocks;
    size_t used = 0, total = 0;
};
