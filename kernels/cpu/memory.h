// Matrices with padded rows, in memory that is kept from call to call.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "tile.h"

inline int64_t padded(int64_t width) { return (width + PANEL - 1) / PANEL * PANEL; }

template <class T> struct Rows {
    T* data = nullptr;
    int64_t stride = 0;
    T* operator[](int64_t row) const { return data + row * stride; }
};

// Takes pieces one after the other; `reset` gives them all back. It never shrinks.
class Memory {
   public:
    void reset() {
        if (blocks.size() > 1) {  // next time all fits into one
            blocks.clear();
            add(total);
        }
        used = total = 0;
    }
    template <class T> T* take(int64_t count) {
        size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (blocks.empty() || used + bytes > size) add(bytes);
        char* here = blocks.back().get() + used;
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
        size = bytes < 65536 ? 65536 : bytes;
        char* block = (char*)std::aligned_alloc(64, size);
        if (!block) throw std::bad_alloc();
        blocks.emplace_back(block, &std::free);
        used = 0;
    }

    std::vector<std::unique_ptr<char, decltype(&std::free)>> blocks;
    size_t size = 0, used = 0, total = 0;
};
