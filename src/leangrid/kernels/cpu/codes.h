// Codes in three layouts: the stored bit stream (formats/bit_stream.py), one byte each, and the tiles that the products
// read.
//
// A tile is four rows. The columns of a row go in steps of 16, one step to 16 lanes; a chunk is 32-bit lanes, each with
// the codes of floor(32 / bits) steps, lowest bits first. Chunk by chunk the four rows lie side by side: one 64-byte
// load is 16 x floor(32 / bits) consecutive columns of one row, and shifting it right by `bits` brings up the next 16.
// The last steps fill narrower lanes, stored as planes of 2 and 1 bytes a lane. Rows and columns beyond the matrix have
// code 0.
#pragma once
#include "base.h"
#include "decode_table.h"

namespace leangrid {
namespace {

inline int64_t words_a_row(int64_t cols, int bits) { return (cols * bits + 31) / 32; }

// Eight codes are exactly `bits` bytes of the stream.
inline void unpack_row(const int32_t* words, int64_t cols, int bits, uint8_t* codes) {
    const uint8_t* stream = reinterpret_cast<const uint8_t*>(words);
    const uint64_t mask = (1u << bits) - 1;
    const int64_t bytes = 4 * words_a_row(cols, bits);
    for (int64_t unit = 0; unit * 8 < cols; ++unit) {
        uint64_t eight = 0;
        const int64_t at = unit * bits;
        if (at + 8 <= bytes) memcpy(&eight, stream + at, 8);
        else memcpy(&eight, stream + at, bytes - at);
        if (unit * 8 + 8 <= cols)
            for (int i = 0; i < 8; ++i) codes[unit * 8 + i] = static_cast<uint8_t>(eight >> (i * bits) & mask);
        else
            for (int64_t i = 0; unit * 8 + i < cols; ++i) codes[unit * 8 + i] = static_cast<uint8_t>(eight >> (i * bits) & mask);
    }
}

inline void pack_row(const uint8_t* codes, int64_t cols, int bits, int32_t* words) {
    uint8_t* stream = reinterpret_cast<uint8_t*>(words);
    memset(stream, 0, 4 * words_a_row(cols, bits));
    for (int64_t unit = 0; unit * 8 < cols; ++unit) {
        const int64_t count = least<int64_t>(8, cols - unit * 8);
        uint64_t eight = 0;
        for (int64_t i = 0; i < count; ++i) eight |= static_cast<uint64_t>(codes[unit * 8 + i]) << (i * bits);
        memcpy(stream + unit * bits, &eight, (count * bits + 7) / 8);
    }
}

bool unpack_range(const CodesArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t words = words_a_row(args.cols, args.bits);
    for (int64_t row = begin; row < end; ++row) unpack_row(args.words + row * words, args.cols, args.bits, args.codes + row * args.cols);
    return true;
}

bool pack_range(const CodesArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t words = words_a_row(args.cols, args.bits);
    for (int64_t row = begin; row < end; ++row) pack_row(args.codes + row * args.cols, args.cols, args.bits, args.words + row * words);
    return true;
}

// Calls lanes(row of the tile, first step, steps, address, bytes a lane) for every piece of one tile.
template <class Lanes>
inline void walk_pieces(uint8_t* tile, int64_t cols, int bits, Lanes lanes) {
    const int64_t steps = (cols + 15) / 16, per = 32 / bits;
    int64_t step = 0;
    for (; step + per <= steps; step += per)
        for (int64_t r = 0; r < kTileRows; ++r, tile += 64) lanes(r, step, per, tile, 4);
    const int64_t bytes = tail_bytes(steps - step, bits);
    for (int64_t r = 0; r < kTileRows && bytes; ++r, tile += 16 * bytes) lanes(r, step, steps - step, tile, bytes);
}

bool tile_range(const CodesArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t words = words_a_row(args.cols, args.bits), padded = (args.cols + 15) / 16 * 16;
    Buffer<uint8_t> codes(kTileRows * padded);
    if (!codes) return false;
    for (int64_t t = begin; t < end; ++t) {
        memset(codes, 0, kTileRows * padded);
        for (int64_t r = 0; r < kTileRows && t * kTileRows + r < args.rows; ++r)
            unpack_row(args.words + (t * kTileRows + r) * words, args.cols, args.bits, codes + r * padded);
        uint8_t* tile = args.tiles + t * tile_bytes(args.cols, args.bits);
        walk_pieces(tile, args.cols, args.bits, [&](int64_t r, int64_t step, int64_t count, uint8_t* out, int64_t bytes) {
            uint32_t lane[16] = {};
            for (int64_t k = 0; k < count; ++k)
                for (int i = 0; i < 16; ++i) lane[i] |= static_cast<uint32_t>(codes[r * padded + (step + k) * 16 + i]) << (k * args.bits);
            if (bytes == 4) {
                memcpy(out, lane, 64);
                return;
            }
            for (int i = 0; bytes >= 2 && i < 16; ++i) {
                const uint16_t low = static_cast<uint16_t>(lane[i]);
                memcpy(out + 2 * i, &low, 2);
            }
            for (int i = 0; bytes != 2 && i < 16; ++i) out[(bytes - 1) * 16 + i] = static_cast<uint8_t>(lane[i] >> (8 * (bytes - 1)));
        });
    }
    return true;
}

bool untile_range(const CodesArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t words = words_a_row(args.cols, args.bits), padded = (args.cols + 15) / 16 * 16;
    const uint32_t mask = (1u << args.bits) - 1;
    Buffer<uint8_t> codes(kTileRows * padded);
    if (!codes) return false;
    for (int64_t t = begin; t < end; ++t) {
        uint8_t* tile = args.tiles + t * tile_bytes(args.cols, args.bits);
        walk_pieces(tile, args.cols, args.bits, [&](int64_t r, int64_t step, int64_t count, const uint8_t* in, int64_t bytes) {
            uint32_t lane[16] = {};
            for (int i = 0; i < 16; ++i) {
                if (bytes == 4) memcpy(lane + i, in + 4 * i, 4);
                if (bytes == 2 || bytes == 3) lane[i] = in[2 * i] | in[2 * i + 1] << 8;
                if (bytes == 1 || bytes == 3) lane[i] |= static_cast<uint32_t>(in[(bytes - 1) * 16 + i]) << (8 * (bytes - 1));
            }
            for (int64_t k = 0; k < count; ++k)
                for (int i = 0; i < 16; ++i)
                    codes[r * padded + (step + k) * 16 + i] = static_cast<uint8_t>(lane[i] >> (k * args.bits) & mask);
        });
        for (int64_t r = 0; r < kTileRows && t * kTileRows + r < args.rows; ++r)
            pack_row(codes + r * padded, args.cols, args.bits, args.words + (t * kTileRows + r) * words);
    }
    return true;
}

}  // namespace
}  // namespace leangrid
