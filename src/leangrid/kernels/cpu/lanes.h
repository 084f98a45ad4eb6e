// Sixteen floats and sixteen 32-bit words as one to four vectors of the build's width, and the few operations that
// GCC's vector extensions lack: fused multiply-add, look-up in a table of 16, conversions. The same code then serves
// every instruction set.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "base.h"
#include "decode_table.h"

#define LEANGRID_INLINE inline __attribute__((always_inline))

namespace leangrid {
namespace {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint32_t WordsAt __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef float FloatsAt __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint16_t ShortsAt __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint8_t BytesAt __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));

constexpr int kParts = 16 / kFloats;
struct Lanes { Floats part[kParts]; };
struct Codes { Words part[kParts]; };

LEANGRID_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

LEANGRID_INLINE Floats spread(float x) { return Floats{} + x; }
LEANGRID_INLINE Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }
LEANGRID_INLINE Floats floats_of(Words x) { return reinterpret_cast<Floats>(x); }
LEANGRID_INLINE Floats load(const float* x) { return *reinterpret_cast<const FloatsAt*>(x); }
LEANGRID_INLINE void store(float* out, Floats x) { *reinterpret_cast<FloatsAt*>(out) = x; }
#if defined(__AVX512F__)  // GCC 12 takes the generic conversion apart into halves
LEANGRID_INLINE Words widen(const uint16_t* x) {
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
}
LEANGRID_INLINE Words widen(const uint8_t* x) {
    return reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
#else
LEANGRID_INLINE Words widen(const uint16_t* x) { return __builtin_convertvector(*reinterpret_cast<const ShortsAt*>(x), Words); }
LEANGRID_INLINE Words widen(const uint8_t* x) { return __builtin_convertvector(*reinterpret_cast<const BytesAt*>(x), Words); }
#endif
LEANGRID_INLINE Floats load(const uint16_t* x) { return floats_of(widen(x) << 16); }
LEANGRID_INLINE float bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
LEANGRID_INLINE float scalar(const void* values, int dtype, int64_t i) {
    return dtype == kFloat32 ? static_cast<const float*>(values)[i] : bfloat16(static_cast<const uint16_t*>(values)[i]);
}

// Sum of all elements; halves are added to halves, so the order does not depend on who calls.
LEANGRID_INLINE float sum(Floats x) {
    float each[kFloats];
    store(each, x);
    for (int half = kFloats / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) each[i] += each[i + half];
    return each[0];
}

// out[r] = sum of x[r]: four at once, in the order of `sum`'s halves down to four elements.
LEANGRID_INLINE void four_sums(const Floats* x, float* out) {
#if defined(__AVX2__)
    __m128 quarter[4];
    for (int r = 0; r < 4; ++r) {
#if defined(__AVX512F__)
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x[r]), _mm512_extractf32x8_ps(x[r], 1));
#else
        const __m256 half = x[r];
#endif
        quarter[r] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(quarter[0], quarter[1]), _mm_hadd_ps(quarter[2], quarter[3])));
#else
    for (int r = 0; r < 4; ++r) out[r] = sum(x[r]);
#endif
}

// table[codes & 15], where kBits <= 3 promises that the table repeats every 8 entries.
template <int kBits>
LEANGRID_INLINE Lanes look_up(const Lanes& table, const Codes& codes) {
    Lanes out;
#if defined(__AVX512F__)
    out.part[0] = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes.part[0]), table.part[0]);
#elif defined(__AVX2__)
    for (int p = 0; p < kParts; ++p) {
        const __m256i code = reinterpret_cast<__m256i>(codes.part[p]);
        const __m256 low = _mm256_permutevar8x32_ps(table.part[0], code);
        if (kBits >= 1 && kBits <= 3) {
            out.part[p] = low;
        } else {
            const __m256 high = _mm256_permutevar8x32_ps(table.part[1], code);
            out.part[p] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        }
    }
#else
    const float* entry = reinterpret_cast<const float*>(&table);
    for (int p = 0; p < kParts; ++p)
        for (int i = 0; i < kFloats; ++i) out.part[p][i] = entry[codes.part[p][i] & 15];
#endif
    return out;
}

// base[codes], any size of table.
LEANGRID_INLINE Lanes gather(const float* base, const Codes& codes) {
    Lanes out;
#if defined(__AVX512F__)
    out.part[0] = _mm512_i32gather_ps(reinterpret_cast<__m512i>(codes.part[0]), base, 4);
#elif defined(__AVX2__)
    for (int p = 0; p < kParts; ++p) out.part[p] = _mm256_i32gather_ps(base, reinterpret_cast<__m256i>(codes.part[p]), 4);
#else
    for (int p = 0; p < kParts; ++p)
        for (int i = 0; i < kFloats; ++i) out.part[p][i] = base[codes.part[p][i]];
#endif
    return out;
}

// To nearest even in the given format, as a float. Finite in, except that float16 overflows to infinity.
LEANGRID_INLINE Floats rounded(Floats x, int dtype) {
    const Words bits = bits_of(x);
    if (dtype == kBfloat16) return floats_of((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
    if (dtype == kFloat16) {
        const Words sign = bits & 0x80000000u, size = bits ^ sign;
        const Words normal = (size + 0xfff + (size >> 13 & 1)) & 0xffffe000u;
        // below 2^-14 float16 has steps of 2^-24, as float32 has at 0.5
        const Words small = bits_of((floats_of(size) + 0.5f) - 0.5f);
        const Words tiny = reinterpret_cast<Words>(size < 0x38800000u), huge = reinterpret_cast<Words>(normal >= 0x47800000u);
        const Words inside = (small & tiny) | (normal & ~tiny);
        return floats_of(sign | (inside & ~huge) | (0x7f800000u & huge));
    }
    return x;
}

// e^x to a few units in the last place; x below -87 gives about 1e-38, which counts as 0 here.
LEANGRID_INLINE Floats exponential(Floats x) {
    const Floats low = spread(-87.0f), high = spread(88.0f);
    x = x < low ? low : x > high ? high : x;
    const Floats magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats n = (x * 1.44269504f + magic) - magic;
    const Floats r = fused(n, spread(2.12194440e-4f), fused(n, spread(-0.693359375f), x));
    Floats y = spread(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float term : terms) y = fused(y, r, spread(term));
    return floats_of(bits_of(y) + (reinterpret_cast<Words>(__builtin_convertvector(n, Ints)) << 23));
}

}  // namespace
}  // namespace leangrid
