// See tiles.h. Compiled with instructions that few processors have; nothing here runs unless bfloat16_units() says so.
#include "tiles.h"

#include <string.h>

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace leangrid {
namespace {

// Steps of 32 tokens a pass: 32 KB a strip for the tiles, so that kWide strips stay in the second-level cache. The
// vectors' own additions do not round to nearest on every processor (2e-6 too little over 1024 tokens on a Zen 4): 256
// tokens, and the rest adds outside of them.
constexpr int64_t kStretchOfTiles = 32, kStretchOfDots = 8;
constexpr int64_t kWide = 32;     // strips of 16 columns on the right

int64_t steps_of(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }
int64_t strips_of(int64_t cols) { return (cols + 2 * kTileCols - 1) / (2 * kTileCols) * 2; }

struct Palette {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// The tile registers' shape for the length of a scope. Whatever shape the thread had before comes back: other libraries
// in this process use tiles too and may remember what they had set.
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(&before_);
        Palette mine;
        for (int i = 0; i < 8; ++i) {
            mine.bytes[i] = 64;
            mine.rows[i] = 16;
        }
        _tile_loadconfig(&mine);
    }
    ~Tiles() {
        if (before_.palette)
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }

  private:
    alignas(64) Palette before_;
};

// 16 x 16 values of 32 bits, rows become columns.
inline void turn(const __m512i* row, char* target) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // b[4 q + c] holds, in its 128-bit lane l, column 4 l + c of rows 4 q .. 4 q + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), high = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), high2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        _mm512_store_si512(target + 64 * c, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_store_si512(target + 64 * (8 + c), _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_store_si512(target + 64 * (4 + c), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_store_si512(target + 64 * (12 + c), _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// One 32 x 32 square: strips i, i + 1 of the left by j, j + 1 of the right over `count` steps; with the matrix tiles
// ...
inline void square_of_tiles(const char* left, const char* right, int64_t strip, int64_t count, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < count * kTileBytes; k += kTileBytes) {
        _tile_loadd(4, left + k, 64);
        _tile_loadd(6, right + k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + strip + k, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + strip + k, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// ... and with vectors: sixteen sums of 16 columns, 8 rows by 2 strips, stay in registers.
inline void square_of_dots(const char* left, const char* right, int64_t strip, int64_t count, float* sums) {
    constexpr int kRows = 8;
    for (int r = 0; r < 32; r += kRows) {
        const char* rows = left + r / kTileCols * strip + r % kTileCols * 64;
        __m512 low[kRows], high[kRows];
        for (int i = 0; i < kRows; ++i) low[i] = high[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < count * kTileBytes; k += kTileBytes)
            for (int pair = 0; pair < 16; ++pair) {
                const __m512bh a = (__m512bh)_mm512_load_si512(right + k + 64 * pair);
                const __m512bh b = (__m512bh)_mm512_load_si512(right + strip + k + 64 * pair);
                for (int i = 0; i < kRows; ++i) {
                    int32_t tokens;
                    memcpy(&tokens, rows + k + 64 * i + 4 * pair, sizeof tokens);
                    const __m512bh x = (__m512bh)_mm512_set1_epi32(tokens);
                    low[i] = _mm512_dpbf16_ps(low[i], x, a);
                    high[i] = _mm512_dpbf16_ps(high[i], x, b);
                }
            }
        for (int i = 0; i < kRows; ++i) {
            _mm512_store_ps(sums + 32 * (r + i), low[i]);
            _mm512_store_ps(sums + 32 * (r + i) + 16, high[i]);
        }
    }
}

inline void add_square(const float* sums, float* out, int64_t cols, int64_t tall, int64_t wide) {
    for (int64_t r = 0; r < tall; ++r)
        for (int64_t c = 0; c < wide; ++c) out[r * cols + c] += sums[r * 32 + c];
}

}  // namespace

int64_t packed_bytes(int64_t tokens, int64_t cols) noexcept { return steps_of(tokens) * strips_of(cols) * kTileBytes; }

void pack_tiles(const uint16_t* x, int64_t tokens, int64_t cols, int64_t begin, int64_t end, char* left, char* right) noexcept {
    const int64_t strips = strips_of(cols), strip_bytes = steps_of(tokens) * kTileBytes;
    // token pairs interleave: (a0 a1 ...) and (b0 b1 ...) become a0 b0 a1 b1 ...
    const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
    for (int64_t step = begin; step < end; ++step)
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t column = s * kTileCols, wide = cols - column;
            const __mmask16 mask = wide >= kTileCols ? 0xffff : wide > 0 ? (1u << wide) - 1 : 0;
            __m512i pairs[16];
            for (int r = 0; r < 16; ++r) {
                const int64_t token = step * kTileTokens + 2 * r;
                const uint16_t* from = x + token * cols + column;
                const __m256i even = token < tokens ? _mm256_maskz_loadu_epi16(mask, from) : _mm256_setzero_si256();
                const __m256i odd = token + 1 < tokens ? _mm256_maskz_loadu_epi16(mask, from + cols) : _mm256_setzero_si256();
                pairs[r] = _mm512_permutexvar_epi16(mix, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
            }
            const int64_t at = s * strip_bytes + step * kTileBytes;
            if (right)
                for (int r = 0; r < 16; ++r) _mm512_store_si512(right + at + 64 * r, pairs[r]);
            if (left) turn(pairs, left + at);
        }
}

int largest_magnitude(const uint16_t* x, int64_t count) noexcept {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most[4] = {};
    int64_t i = 0;
    for (; i + 128 <= count; i += 128)
        for (int l = 0; l < 4; ++l)
            most[l] = _mm512_max_epi16(most[l], _mm512_and_si512(_mm512_loadu_si512(x + i + 32 * l), magnitude));
    for (; i < count; i += 32) {
        const __mmask32 mask = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
        most[0] = _mm512_max_epi16(most[0], _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i), magnitude));
    }
    alignas(64) int16_t lanes[32];
    _mm512_store_si512(lanes, _mm512_max_epi16(_mm512_max_epi16(most[0], most[1]), _mm512_max_epi16(most[2], most[3])));
    int largest = 0;
    for (const int16_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
}

template <class Square>
static void add_squares(const OuterArgs& args, int64_t begin, int64_t end, int64_t stretch, Square square) noexcept {
    alignas(64) float sums[32 * 32];
    const int64_t steps = steps_of(args.tokens), strip = steps * kTileBytes, strips = strips_of(args.cols);
    for (int64_t first = 0; first < steps; first += stretch) {
        const int64_t count = steps - first < stretch ? steps - first : stretch;
        for (int64_t block = args.upper ? 2 * begin : 0; block < strips; block += kWide) {
            const int64_t stop = block + kWide < strips ? block + kWide : strips;
            for (int64_t i = 2 * begin; i < 2 * end; i += 2)
                for (int64_t j = args.upper && i > block ? i : block; j < stop; j += 2) {
                    const int64_t offset = first * kTileBytes;
                    square(args.left + i * strip + offset, args.right + j * strip + offset, strip, count, sums);
                    const int64_t row = i * kTileCols, column = j * kTileCols;
                    const int64_t tall = args.cols - row < 32 ? args.cols - row : 32, wide = args.cols - column < 32 ? args.cols - column : 32;
                    add_square(sums, args.out + row * args.cols + column, args.cols, tall, wide);
                }
        }
    }
}

void add_outer(const OuterArgs& args, int64_t begin, int64_t end, Units units) noexcept {
    if (units == Units::tiles) {
        Tiles shape;
        add_squares(args, begin, end, kStretchOfTiles, square_of_tiles);
    } else
        add_squares(args, begin, end, kStretchOfDots, square_of_dots);
}

}  // namespace leangrid

#else  // a compiler or a processor family without bfloat16 units

namespace leangrid {

int64_t packed_bytes(int64_t, int64_t) noexcept { return 0; }
void pack_tiles(const uint16_t*, int64_t, int64_t, int64_t, int64_t, char*, char*) noexcept {}
int largest_magnitude(const uint16_t*, int64_t) noexcept { return 0; }
void add_outer(const OuterArgs&, int64_t, int64_t, Units) noexcept {}

}  // namespace leangrid

#endif
