// A linear layer some of whose outputs are combinations of the others, for a few tokens at once. Meaning: reference.py.
//
// As low_rank_linear: both products run in one call, each weight is read from memory once and serves every token. The
// first product's results are outputs as well, so they are stored twice: rounded, and in float32 for the second
// product. Where an order is given, outputs are gathered from the caches at the end.
//
// Cost: (in + others) * R elements of memory; as many multiply-adds for each token.
#pragma once

#include "skink/kernels/low_rank_linear/cpu.h"

namespace skink::SKINK_ISA {

inline LowRankPlan plan_pivoted(const PivotedLinear& p, const Pool& pool) {
    LowRankLinear products{};
    products.tokens = p.tokens;
    products.width = p.width;
    products.rank = p.rank;
    products.outputs = p.others;
    return plan_low_rank(products, pool);
}

inline size_t pivoted_linear_scratch(const PivotedLinear& p, const Pool& pool) {
    const int64_t unordered = p.order != nullptr ? p.tokens * (p.rank + p.others) : 0;
    return static_cast<size_t>(plan_pivoted(p, pool).total + unordered) * sizeof(float);
}

inline void pivoted_linear(const PivotedLinear& p, const Pool& pool, void* scratch) {
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int64_t kWorthAThread = 1 << 15;  // numbers to gather
        const LowRankPlan plan = plan_pivoted(p, pool);
        const int64_t width = p.rank + p.others;
        float* const input = static_cast<float*>(scratch);
        float* const inner = input + plan.inner;
        T* const output = static_cast<T*>(p.output);
        T* const both = p.order == nullptr ? output : reinterpret_cast<T*>(input + plan.total);
        const T* const kept_bias = static_cast<const T*>(p.kept_bias);
        const T* const rest_bias = static_cast<const T*>(p.rest_bias);
        // The zeros at the end of each row are read, and multiplied by zeros.
        memset(scratch, 0, static_cast<size_t>(plan.total) * sizeof(float));
        for (int64_t token = 0; token < p.tokens; ++token)
            order_row(static_cast<const T*>(p.input) + token * p.input_stride, p.width, input + token * plan.width);
        Parts first = parts_of<T>(p.rank, p.width), second = parts_of<T>(p.others, p.rank);
        const int64_t workers = min(plan.workers, max(first.count(), second.count()));
        run_workers(pool, static_cast<int>(workers), [&](int worker) {
            float* const results = input + plan.results + worker * p.tokens * kRowsAtOnce;
            multiply_parts(first, input, plan.width, p.tokens, static_cast<const T*>(p.kept), p.kept_stride, p.width,
                           results, [&](int64_t token, int64_t row, int64_t count, float* found) {
                               finish_rows(found, kept_bias == nullptr ? nullptr : kept_bias + row, count,
                                           both + token * width + row, found);
                               order_inner<T>(found, row, count, p.rank, inner + token * plan.rank);
                           });
            wait_for(first);
            multiply_parts(second, inner, plan.rank, p.tokens, static_cast<const T*>(p.rest), p.rest_stride, p.rank,
                           results, [&](int64_t token, int64_t row, int64_t count, float* found) {
                               finish_rows<T>(found, rest_bias == nullptr ? nullptr : rest_bias + row, count,
                                              both + token * width + p.rank + row, nullptr);
                           });
        });
        if (p.order == nullptr) return;
        parallel_for(pool, p.tokens * p.outputs, kWorthAThread, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end;) {
                const int64_t token = at / p.outputs, first = at % p.outputs;
                const int64_t count = min(end - at, p.outputs - first);
                for (int64_t i = 0; i < count; ++i) output[at + i] = both[token * width + p.order[first + i]];
                at += count;
            }
        });
    });
}

}  // namespace skink::SKINK_ISA
