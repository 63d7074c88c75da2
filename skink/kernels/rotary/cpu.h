// Rotary position embedding with ready tables. Meaning: reference.py.
//
// Cost: the input is read once and written once; the tables are small beside it, since all heads share them.
#pragma once

#include "skink/kernels/cpp/parallel.h"

namespace skink::SKINK_ISA {

template <typename T>
inline void rotate_half_split(const T* x, const T* cosine, const T* sine, T* y, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const Vec first = load_some(x + i, left);
        const Vec second = load_some(x + half + i, left);
        const Vec cos1 = load_some(cosine + i, left), cos2 = load_some(cosine + half + i, left);
        const Vec sin1 = load_some(sine + i, left), sin2 = load_some(sine + half + i, left);
        store_some(y + i, first * cos1 - second * sin1, left);
        store_some(y + half + i, second * cos2 + first * sin2, left);
    }
}

template <int... I>
inline Vec alternating_signs(Lanes<I...>) {
    return Vec{(I % 2 == 0 ? -1.0f : 1.0f)...};
}

template <typename T>
inline void rotate_interleaved(const T* x, const T* cosine, const T* sine, T* y, int64_t rotated) {
    const Vec signs = alternating_signs(AllLanes{});
    for (int64_t i = 0; i < rotated; i += kLanes) {
        const int64_t left = rotated - i;
        const Vec v = load_some(x + i, left);
        const Vec turned = swap_pairs(v, AllLanes{}) * signs;
        store_some(y + i, v * load_some(cosine + i, left) + turned * load_some(sine + i, left), left);
    }
}

template <typename T>
inline void rotary_rows(const Rotary& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t token = row % p.tokens;
        const int64_t head = row / p.tokens % p.heads;
        const int64_t batch = row / p.tokens / p.heads;
        const T* x = static_cast<const T*>(p.input) + batch * p.input_batch + head * p.input_head +
                     token * p.input_token;
        const T* cosine = static_cast<const T*>(p.cosine) + batch * p.cosine_batch + token * p.cosine_token;
        const T* sine = static_cast<const T*>(p.sine) + batch * p.sine_batch + token * p.sine_token;
        T* y = static_cast<T*>(p.output) + row * p.width;
        if (p.interleaved)
            rotate_interleaved(x, cosine, sine, y, p.rotated);
        else
            rotate_half_split(x, cosine, sine, y, p.rotated);
        memcpy(y + p.rotated, x + p.rotated, (p.width - p.rotated) * sizeof(T));
    }
}

inline void rotary(const Rotary& p, const Pool& pool) {
    constexpr int64_t kElementsPerWorker = 16384;
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(pool, p.batch * p.heads * p.tokens, kElementsPerWorker / max(1, p.width) + 1,
                     [&](int64_t begin, int64_t end) { rotary_rows<T>(p, begin, end); });
    });
}

}  // namespace skink::SKINK_ISA
