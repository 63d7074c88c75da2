// A linear layer whose weight is a product of two thin ones, for a few tokens at once. Meaning: reference.py.
//
// Both products run in one call. Each weight is read from memory once and serves every token; the inner vectors, R
// numbers a token in float32, never leave the caches. The rows of a weight are handed out to the threads in small
// parts as they finish the ones before, since a thread that the system holds up would keep all others waiting. Threads
// are woken once: between the products they wait for the parts that others have taken, and for nothing else.
//
// Cost: (in + out) * R elements of memory; as many multiply-adds for each token.
#pragma once

#include <sched.h>

#include "skink/kernels/cpp/parallel.h"
#include "skink/kernels/cpp/products.h"

namespace skink::SKINK_ISA {

constexpr int64_t kRowsAtOnce = 128;     // of a weight, at most, by one thread
constexpr int64_t kBlockFloats = 4096;   // a third of the nearest cache
constexpr int64_t kAheadBytes = 512;     // measured: less and more are slower, most of all in bfloat16
constexpr int64_t kPartBytes = 1 << 14;  // of a weight: a microsecond of reading

// Where each part of the scratch memory begins (in floats), and how many threads the work is worth.
struct LowRankPlan {
    int64_t width, rank;    // rounded up to whole steps
    int64_t inner;          // [tokens, rank], in the order of for_each_vector
    int64_t results;        // [workers, tokens, kRowsAtOnce]
    int64_t total;
    int64_t workers;
};

inline LowRankPlan plan_low_rank(const LowRankLinear& p, const Pool& pool) {
    constexpr int64_t kWorkPerThread = 1 << 14;  // multiply-adds: for fewer, waking a thread does not pay
    constexpr int64_t kWhole = 32;
    LowRankPlan plan;
    plan.width = round_up(p.width, kWhole);
    plan.rank = round_up(p.rank, kWhole);
    plan.inner = p.tokens * plan.width;
    plan.results = plan.inner + p.tokens * plan.rank;
    plan.workers = max(1, min(pool.threads, p.tokens * p.rank * (p.width + p.outputs) / kWorkPerThread));
    plan.total = plan.results + plan.workers * p.tokens * kRowsAtOnce;
    return plan;
}

inline size_t low_rank_linear_scratch(const LowRankLinear& p, const Pool& pool) {
    return static_cast<size_t>(plan_low_rank(p, pool).total) * sizeof(float);
}

// A row in float32, in the order of for_each_vector.
template <typename T>
inline void order_row(const T* from, int64_t width, float* to) {
    for_each_vector(from, width, [&](int64_t d, Vec x) { store(to + d, x); });
}

// The same for `count` numbers from `first` on of a row of `width` that is float32 already and meets rows of T.
template <typename T>
inline void order_inner(const float* from, int64_t first, int64_t count, int64_t width, float* to) {
    if constexpr (kStep<T> == 1) {
        memcpy(to + first, from, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    constexpr int64_t step = kStep<T> * kLanes;
    const int64_t whole = width - width % step;
    for (int64_t d = first; d < first + count; ++d) {
        const int64_t i = d % step;
        to[d < whole ? d - i + i % kStep<T> * kLanes + i / kStep<T> : d] = from[d - first];
    }
}

// results[token * kRowsAtOnce + i] = vectors[token] . weight[i], for `count` rows of a weight and any number of tokens.
template <typename T>
inline void multiply_rows(const float* vectors, int64_t vector_stride, int64_t tokens, const T* weight,
                          int64_t weight_stride, int64_t count, int64_t width, float* results) {
    constexpr int64_t ahead = kAheadBytes / static_cast<int64_t>(sizeof(T));
    // One token's vector leaves the nearest cache to itself; those of several go by in blocks that stay there.
    const int64_t block = tokens == 1 ? max(1, width) : kBlockFloats / min(4, round_up(tokens, 2));
    for (int64_t at = 0; at < max(1, width); at += block) {
        const int64_t columns = min(block, width - at);
        for (int64_t token = 0; token < tokens;) {
            const float* x = vectors + token * vector_stride + at;
            float parts[4 * kRowsAtOnce];
            float* const found = at == 0 ? results + token * kRowsAtOnce : parts;
            const int64_t few = tokens - token >= 4 ? 4 : tokens - token >= 2 ? 2 : 1;
            const auto multiply = few == 4 ? products<T, 4> : few == 2 ? products<T, 2> : products<T, 1>;
            multiply(x, vector_stride, weight + at, weight_stride, columns, count, ahead, found, kRowsAtOnce);
            if (at > 0)
                for (int64_t v = 0; v < few; ++v)
                    for (int64_t i = 0; i < count; ++i)
                        results[(token + v) * kRowsAtOnce + i] += parts[v * kRowsAtOnce + i];
            token += few;
        }
    }
}

// The rows of a weight, in parts that threads take.
struct Parts {
    int64_t rows, part;
    int64_t next = 0;  // the first row that no thread has taken
    int64_t done = 0;  // rows

    int64_t count() const { return ceil_div(rows, part); }
};

template <typename T>
inline Parts parts_of(int64_t rows, int64_t width) {
    constexpr int64_t kWhole = 16;  // rows that are multiplied at once
    const int64_t enough = kPartBytes / static_cast<int64_t>(sizeof(T)) / max(1, width);
    return {rows, min(round_up(max(1, enough), kWhole), kRowsAtOnce)};
}

// Until every part is done. None is waited for that no running thread has taken, so threads that come late, or one
// after the other, keep nobody.
inline void wait_for(const Parts& parts) {
    constexpr int kPatience = 1 << 12;
    for (int turn = 0; __atomic_load_n(&parts.done, __ATOMIC_ACQUIRE) < parts.rows; ++turn) {
        if (turn >= kPatience) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

// Calls take(token, row, count, results) for the products of every token with the rows of one part of a weight
// [rows, width] after the other, as long as there are any that no thread has taken.
template <typename T, typename Take>
inline void multiply_parts(Parts& parts, const float* vectors, int64_t vector_stride, int64_t tokens, const T* weight,
                           int64_t weight_stride, int64_t width, float* results, const Take& take) {
    for (;;) {
        const int64_t row = __atomic_fetch_add(&parts.next, parts.part, __ATOMIC_RELAXED);
        if (row >= parts.rows) return;
        const int64_t count = min(parts.part, parts.rows - row);
        multiply_rows(vectors, vector_stride, tokens, weight + row * weight_stride, weight_stride, count, width,
                      results);
        for (int64_t token = 0; token < tokens; ++token) take(token, row, count, results + token * kRowsAtOnce);
        __atomic_fetch_add(&parts.done, count, __ATOMIC_RELEASE);
    }
}

// to[i] = found[i] + bias[i], rounded to T, for `count` results of one token; and in float32 into `exact`, where asked.
template <typename T>
inline void finish_rows(const float* found, const T* bias, int64_t count, T* to, float* exact) {
    for (int64_t i = 0; i < count; i += kLanes) {
        Vec y = load(found + i);
        if (bias != nullptr) y += load_some(bias + i, count - i);
        store_some(to + i, y, count - i);
        if (exact != nullptr) store_some(exact + i, y, count - i);
    }
}

inline void low_rank_linear(const LowRankLinear& p, const Pool& pool, void* scratch) {
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        const LowRankPlan plan = plan_low_rank(p, pool);
        float* const input = static_cast<float*>(scratch);
        float* const inner = input + plan.inner;
        const T* const bias = static_cast<const T*>(p.bias);
        T* const output = static_cast<T*>(p.output);
        // The zeros at the end of each row are read, and multiplied by zeros.
        memset(scratch, 0, static_cast<size_t>(plan.total) * sizeof(float));
        for (int64_t token = 0; token < p.tokens; ++token)
            order_row(static_cast<const T*>(p.input) + token * p.input_stride, p.width, input + token * plan.width);
        Parts first = parts_of<T>(p.rank, p.width), second = parts_of<T>(p.outputs, p.rank);
        const int64_t workers = min(plan.workers, max(first.count(), second.count()));
        run_workers(pool, static_cast<int>(workers), [&](int worker) {
            float* const results = input + plan.results + worker * p.tokens * kRowsAtOnce;
            multiply_parts(first, input, plan.width, p.tokens, static_cast<const T*>(p.down), p.down_stride, p.width,
                           results, [&](int64_t token, int64_t row, int64_t count, const float* found) {
                               order_inner<T>(found, row, count, p.rank, inner + token * plan.rank);
                           });
            wait_for(first);
            multiply_parts(second, inner, plan.rank, p.tokens, static_cast<const T*>(p.up), p.up_stride, p.rank,
                           results, [&](int64_t token, int64_t row, int64_t count, const float* found) {
                               finish_rows<T>(found, bias == nullptr ? nullptr : bias + row, count,
                                              output + token * p.outputs + row, nullptr);
                           });
        });
    });
}

}  // namespace skink::SKINK_ISA
