// Vectors of float32 for the instruction set that this translation unit is compiled for, and loads and stores that
// convert from and to the storage types.
//
// Everything lives in a namespace named after the instruction set: the same header is compiled several times into one
// library, and the linker must never merge two of them. For the same reason no standard template is used in here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SKINK_ISA
#error "compile with -DSKINK_ISA=<name of the instruction set>"
#endif

namespace skink::SKINK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

inline Vec splat(float x) { return Vec{} + x; }
inline Vec select(VecI condition, Vec yes, Vec no) { return condition ? yes : no; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline VecH load_bits(const uint16_t* p) {
    VecH v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

// Zero-extends, and cuts off the upper halves. GCC 12 splits __builtin_convertvector in two where one instruction does.
#if defined(__AVX512F__)
inline VecU extend(VecH v) { return (VecU)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, (__m256i)v); }
inline VecH truncate(VecU v) { return (VecH)_mm512_maskz_cvtepi32_epi16((__mmask16)-1, (__m512i)v); }
#elif defined(__AVX2__)
inline VecU extend(VecH v) { return (VecU)_mm256_cvtepu16_epi32((__m128i)v); }
inline VecH truncate(VecU v) {
    const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff));
    return (VecH)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
#else
inline VecU extend(VecH v) { return __builtin_convertvector(v, VecU); }
inline VecH truncate(VecU v) { return __builtin_convertvector(v, VecH); }
#endif

// bfloat16 is the upper half of a float32.
inline Vec widen(VecH bits, BFloat16) { return bit_cast<Vec>(extend(bits) << 16); }

// The upper halves, rounded to nearest, ties to even; a NaN stays one.
inline VecU rounded(Vec v) {
    VecU bits = bit_cast<VecU>(v);
    VecU upper = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    VecU number = bit_cast<VecU>((VecI)(v == v));
    return (number & upper) | (~number & 0x7fc0);
}

inline VecH narrow(Vec v, BFloat16) { return truncate(rounded(v)); }

#if defined(__AVX512F__)
// The forms with a mask of ones compile to the same instructions; GCC 12 warns of the others.
inline Vec widen(VecH bits, Float16) { return (Vec)_mm512_maskz_cvtph_ps((__mmask16)-1, (__m256i)bits); }
inline VecH narrow(Vec v, Float16) {
    return (VecH)_mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__AVX2__)
inline Vec widen(VecH bits, Float16) { return (Vec)_mm256_cvtph_ps((__m128i)bits); }
inline VecH narrow(Vec v, Float16) { return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// Places the 15 bits below the sign as a float32 whose exponent is too small by 112, and multiplies it right: exact,
// for subnormal numbers too. Infinities and NaNs come out as at least 2^16 and get the largest exponent.
inline Vec widen(VecH half, Float16) {
    VecU bits = extend(half);
    Vec magnitude = bit_cast<Vec>((bits & 0x7fff) << 13) * 0x1p112f;
    VecU special = bit_cast<VecU>((VecI)(magnitude >= 65536.0f)) & 0x7f800000;
    return bit_cast<Vec>(bit_cast<VecU>(magnitude) | special | ((bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even. Below 2^-14 the sum with 0.5 rounds at the right bit by itself.
inline VecH narrow(Vec v, Float16) {
    VecU bits = bit_cast<VecU>(v);
    VecU sign = (bits >> 16) & 0x8000;
    VecU magnitude = bits & 0x7fffffff;
    VecU normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    VecU subnormal = bit_cast<VecU>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
    VecU special = magnitude > 0x7f800000 ? (VecU{} + 0x7e00) : (VecU{} + 0x7c00);
    VecU result = magnitude < 0x38800000 ? subnormal : normal;
    result = magnitude >= 0x47800000 ? special : result;
    return truncate(result | sign);
}
#endif

inline Vec load(const BFloat16* p) { return widen(load_bits(&p->bits), BFloat16{}); }
inline Vec load(const Float16* p) { return widen(load_bits(&p->bits), Float16{}); }

inline void store(BFloat16* p, Vec v) {
    VecH bits = narrow(v, BFloat16{});
    memcpy(p, &bits, sizeof(bits));
}
inline void store(Float16* p, Vec v) {
    VecH bits = narrow(v, Float16{});
    memcpy(p, &bits, sizeof(bits));
}

// kStep vectors at a time, in the order of lanes that costs least. For bfloat16 that is two: the even elements, then
// the odd ones, since each takes one instruction on the same 32-bit words. Products and sums of elements do not mind
// the order; store_step puts them back.
template <typename T>
constexpr int kStep = 1;
template <>
constexpr int kStep<BFloat16> = 2;

template <typename T>
inline void load_step(const T* p, Vec* v) {
    v[0] = load(p);
}
inline void load_step(const BFloat16* p, Vec* v) {
    VecU words;
    memcpy(&words, p, sizeof(words));
    v[0] = bit_cast<Vec>(words << 16);
    v[1] = bit_cast<Vec>(words & 0xffff0000);
}

template <typename T>
inline void store_step(T* p, const Vec* v) {
    store(p, v[0]);
}
inline void store_step(BFloat16* p, const Vec* v) {
    const VecU words = rounded(v[0]) | rounded(v[1]) << 16;
    memcpy(p, &words, sizeof(words));
}

// The first `count` < kLanes elements, zeros after them; nothing past them is touched.
#if defined(__AVX512F__)
inline Vec load_part(const float* p, int count) {
    return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
inline Vec load_part(const BFloat16* p, int count) {
    return widen((VecH)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), BFloat16{});
}
inline Vec load_part(const Float16* p, int count) {
    return widen((VecH)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), Float16{});
}
#else
template <typename T>
inline Vec load_part(const T* p, int count) {
    T part[kLanes] = {};
    memcpy(part, p, count * sizeof(T));
    return load(part);
}
#endif

template <typename T>
inline void store_part(T* p, Vec v, int count) {
    T part[kLanes];
    store(part, v);
    memcpy(p, part, count * sizeof(T));
}

template <typename T>
inline Vec load_some(const T* p, int64_t left) {
    return left >= kLanes ? load(p) : load_part(p, static_cast<int>(left));
}

template <typename T>
inline void store_some(T* p, Vec v, int64_t left) {
    if (left >= kLanes)
        store(p, v);
    else
        store_part(p, v, static_cast<int>(left));
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

// The largest lane. A NaN among the lanes may or may not come through; it does come through exp and sum.
inline float largest(Vec v) {
    float top = v[0];
    for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
    return top;
}

#if defined(__clang__)
#define SKINK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SKINK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
    using type = Lanes<I...>;
};
using AllLanes = typename MakeLanes<kLanes>::type;

template <int Segment, int Half, int... I>
inline Vec fold(Vec a, Vec b, Lanes<I...>) {
    // Two vectors of segments of sums become one of segments half as long, taken from a and b in turn.
    constexpr int half = Segment / 2;
    return SKINK_SHUFFLE(a, b, ((I / half) % 2 * kLanes + (I / half) / 2 * Segment + I % half + Half * half)...);
}

template <int Count>
inline Vec fold_all(Vec* v) {
    if constexpr (Count == 1) {
        return v[0];
    } else {
        // Count vectors hold segments of this many lanes, and each segment sums up to one result.
        constexpr int segment = Count;
        for (int i = 0; i < Count / 2; ++i)
            v[i] = fold<segment, 0>(v[i], v[i + Count / 2], AllLanes{}) +
                   fold<segment, 1>(v[i], v[i + Count / 2], AllLanes{});
        return fold_all<Count / 2>(v);
    }
}

// Lane i of the result is the sum of the lanes of v[i]; v has kLanes vectors and is overwritten.
inline Vec sum_each(Vec* v) { return fold_all<kLanes>(v); }

// The other of each pair of lanes.
template <int... I>
inline Vec swap_pairs(Vec v, Lanes<I...>) {
    return SKINK_SHUFFLE(v, v, (I ^ 1)...);
}

// e^x within 2 units in the last place for x <= 88; 0 below -87; a NaN stays one. Source: Cephes `expf` (argument
// reduction by ln 2 in two parts, polynomial of degree 5).
inline Vec exp(Vec x) {
    Vec clamped = select(x < -87.0f, splat(-87.0f), x);
    Vec n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Vec power = bit_cast<Vec>((__builtin_convertvector(n, VecI) + 127) << 23);
    return select(x < -87.0f, Vec{}, p * power);
}

// tanh within 2 units in the last place. Source: Cephes `tanhf` (odd polynomial below 0.625).
inline Vec tanh(Vec x) {
    Vec square = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    Vec small = p * square * x + x;
    Vec magnitude = select(x < 0.0f, -x, x);
    Vec far = 1.0f - 2.0f / (exp(select(magnitude > 10.0f, splat(20.0f), 2.0f * magnitude)) + 1.0f);
    return select(magnitude < 0.625f, small, select(x < 0.0f, -far, far));
}

}  // namespace skink::SKINK_ISA
