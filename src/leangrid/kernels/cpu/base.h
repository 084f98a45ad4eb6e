// Scratch memory and the sorted row. Everything lives in an unnamed namespace and no std:: template is used: a symbol
// shared between the instruction-set builds could make the linker keep its AVX-512 copy for a processor that has none.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace leangrid {
namespace {

// The widest vector the build's instruction set has: wider GCC vectors would be taken apart into scalars.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kDoubles = kVectorBytes / 8, kFloats = kVectorBytes / 4;
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef double DoublesAt __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));  // unaligned load
typedef float Floats __attribute__((vector_size(kVectorBytes), may_alias));
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2), may_alias));  // as many as Doubles
typedef int32_t Ints __attribute__((vector_size(kVectorBytes), may_alias));

template <class T>
struct Buffer {  // 64-byte aligned, freed with the scope; data == nullptr when memory is short
    T* data;
    explicit Buffer(int64_t count) : data(nullptr) {
        void* block = nullptr;
        const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 127) / 64 * 64;
        if (posix_memalign(&block, 64, bytes) == 0) data = static_cast<T*>(block);
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data; }
};

template <class T>
inline T least(T a, T b) { return a < b ? a : b; }
template <class T>
inline T most(T a, T b) { return a > b ? a : b; }

// Stable radix sort of (key << 32 | index) by key; result in a. Passes whose digit is the same everywhere are skipped.
inline void radix_sort(uint64_t*& a, uint64_t*& spare, int64_t n) {
    const int width = n > 1024 ? 11 : 8, passes = n > 1024 ? 3 : 4, bins = 1 << width;
    uint32_t count[4][2048];
    memset(count, 0, sizeof(uint32_t) * 2048 * 3);
    if (passes == 4) memset(count[3], 0, sizeof(count[3]));
    for (int64_t i = 0; i < n; ++i)
        for (int p = 0; p < passes; ++p) ++count[p][(a[i] >> (32 + p * width)) & (bins - 1)];
    for (int p = 0; p < passes; ++p) {
        const int shift = 32 + p * width;
        if (n == 0 || count[p][(a[0] >> shift) & (bins - 1)] == static_cast<uint32_t>(n)) continue;
        uint32_t sum = 0;
        for (int d = 0; d < bins; ++d) {
            const uint32_t here = count[p][d];
            count[p][d] = sum;
            sum += here;
        }
        for (int64_t i = 0; i < n; ++i) spare[count[p][(a[i] >> shift) & (bins - 1)]++] = a[i];
        uint64_t* swap = a;
        a = spare;
        spare = swap;
    }
}

// a b + c in one rounding where the processor can: for screens with an error bound, never for results.
inline Floats mul_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline double least_lane(Doubles x) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_pd((__m512d)x);
#elif defined(__AVX__)
    const __m128d half = _mm_min_pd(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1));
    return _mm_cvtsd_f64(_mm_min_sd(half, _mm_unpackhi_pd(half, half)));
#else
    double out = x[0];
    for (int lane = 1; lane < kDoubles; ++lane) out = x[lane] < out ? x[lane] : out;
    return out;
#endif
}

inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// Number of elements of the ascending x[0..n) that are <= limit; no branch depends on the data.
inline int64_t rank_of(const double* x, int64_t n, double limit) {
    if (n == 0) return 0;
    int64_t base = 0;
    while (n > 1) {
        const int64_t half = n / 2;
        base += x[base + half - 1] <= limit ? half : 0;
        n -= half;
    }
    return base + (x[base] <= limit ? 1 : 0);
}

}  // namespace
}  // namespace leangrid
