// Products of a few vectors with many rows of storage: what attention's scores and thin matrix products are made of.
#pragma once

#include "simd.h"

namespace skink::SKINK_ISA {

// Calls body(d, vector) for the vectors of a row; in float32 the same row lies in scratch memory in this order.
template <typename T, typename Body>
inline void for_each_vector(const T* p, int64_t width, const Body& body) {
    int64_t d = 0;
    for (; d + kStep<T> * kLanes <= width; d += kStep<T> * kLanes) {
        Vec x[kStep<T>];
        load_step(p + d, x);
        for (int s = 0; s < kStep<T>; ++s) body(d + s * kLanes, x[s]);
    }
    for (; d < width; d += kLanes) body(d, load_some(p + d, width - d));
}

// results[v * results_stride + j] = vector v . row j for `Vectors` vectors and `n` rows of `width` elements. The
// vectors are float32 in the order of for_each_vector, and padded with zeros to whole SIMD vectors. What lies `ahead`
// elements further is fetched meanwhile: the processor's own prefetching does not see far enough.
//
// kLanes sums run at once, one for each pair of a vector and a row; a last step turns them into a vector of results.
template <typename T, int Vectors>
inline void products(const float* vectors, int64_t vector_stride, const T* rows, int64_t row_stride, int64_t width,
                     int64_t n, int64_t ahead, float* results, int64_t results_stride) {
    constexpr int Rows = kLanes / Vectors;
    int64_t j = 0;
    while (j < n && n >= Rows) {
        j = min(j, n - Rows);  // the last step may repeat some rows of the step before
        Vec sums[kLanes] = {};
        int64_t d = 0;
        const T* row = rows + j * row_stride;
        for (; d + kStep<T> * kLanes <= width; d += kStep<T> * kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < Rows; ++i) {
                Vec x[kStep<T>];
                load_step(row + i * row_stride + d, x);
                if (d % (64 / sizeof(T)) == 0) __builtin_prefetch(row + i * row_stride + d + ahead, 0, 2);
#pragma GCC unroll 16
                for (int s = 0; s < kStep<T>; ++s)
#pragma GCC unroll 16
                    for (int v = 0; v < Vectors; ++v)
                        sums[v * Rows + i] += load(vectors + v * vector_stride + d + s * kLanes) * x[s];
            }
        }
        for (; d < width; d += kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < Rows; ++i) {
                const Vec x = load_some(row + i * row_stride + d, width - d);
#pragma GCC unroll 16
                for (int v = 0; v < Vectors; ++v) sums[v * Rows + i] += load(vectors + v * vector_stride + d) * x;
            }
        }
        float found[kLanes];
        store(found, sum_each(sums));
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v)
            memcpy(results + v * results_stride + j, found + v * Rows, Rows * sizeof(float));
        j += Rows;
    }
    for (; j < n; ++j) {
        Vec sums[Vectors] = {};
        for_each_vector(rows + j * row_stride, width, [&](int64_t d, Vec x) {
            for (int v = 0; v < Vectors; ++v) sums[v] += load(vectors + v * vector_stride + d) * x;
        });
        for (int v = 0; v < Vectors; ++v) results[v * results_stride + j] = sum(sums[v]);
    }
}

}  // namespace skink::SKINK_ISA
