// Root-mean-square normalisation. Meaning: reference.py.
//
// Cost: each row is read from memory once (its second reading comes from the nearest cache) and written once, that is
// 2 * rows * width elements; the arithmetic hides behind that.
#pragma once

#include "skink/kernels/cpp/parallel.h"

namespace skink::SKINK_ISA {

template <typename T>
inline float mean_of_squares(const T* row, int64_t width) {
    // Four sums hide the latency of the addition.
    Vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes)
        for (int k = 0; k < 4; ++k) {
            const Vec x = load(row + i + k * kLanes);
            sums[k] += x * x;
        }
    for (; i < width; i += kLanes) {
        const Vec x = load_some(row + i, width - i);
        sums[0] += x * x;
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(width);
}

template <typename T, typename W>
inline void rms_norm_rows(const RmsNorm& p, int64_t begin, int64_t end) {
    const W* weight = static_cast<const W*>(p.weight);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
        T* y = static_cast<T*>(p.output) + row * p.width;
        const float factor = 1.0f / __builtin_sqrtf(mean_of_squares(x, p.width) + p.eps);
        int64_t i = 0;
        if (weight == nullptr) {
            for (; i < p.width; i += kLanes) store_some(y + i, load_some(x + i, p.width - i) * factor, p.width - i);
            continue;
        }
        for (; i + kLanes <= p.width; i += kLanes)
            store(y + i, load(x + i) * factor * (load(weight + i) + p.offset));
        if (i < p.width) {
            const int left = static_cast<int>(p.width - i);
            store_part(y + i, load_part(x + i, left) * factor * (load_part(weight + i, left) + p.offset), left);
        }
    }
}

inline void rms_norm(const RmsNorm& p, const Pool& pool) {
    constexpr int64_t kElementsPerWorker = 16384;  // below this, waking a thread costs more than it saves
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(pool, p.rows, kElementsPerWorker / max(1, p.width) + 1, [&](int64_t begin, int64_t end) {
            if (p.weight_dtype == Dtype::float32)
                rms_norm_rows<T, float>(p, begin, end);
            else
                rms_norm_rows<T, T>(p, begin, end);
        });
    });
}

}  // namespace skink::SKINK_ISA
