// The part of leangrid.kernels._cpu that serves quantized models: views of torch tensors come in, tiles or heads are
// shared out to threads. Included by module.cpp alone; kernels/packed.py has checked shapes and values; here is checked
// only what memory safety needs.
#pragma once

namespace leangrid {

extern const DecodeTable portable_decode;
#ifdef LEANGRID_X86
extern const DecodeTable avx2_decode, avx512_decode;
#endif

namespace {

using AnyIn = nb::ndarray<nb::c_contig, nb::device::cpu>;
using WordsArray = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MaybeAny = std::optional<AnyIn>;
using MaybeBytes = std::optional<nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>>;
using MaybeFloats = std::optional<nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>>;
using FloatLine = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatCube = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

const DecodeTable& decode_table(int isa) {
    table(isa);  // refuses what this processor lacks
#ifdef LEANGRID_X86
    if (isa == 2) return avx512_decode;
    if (isa == 1) return avx2_decode;
#endif
    return portable_decode;
}

int dtype_of(const AnyIn& array) {
    if (array.dtype() == nb::dtype<float>()) return kFloat32;
    require(array.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && array.dtype().bits == 16);
    return kBfloat16;
}

int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Pieces worth a thread: a thread costs some 20 microseconds to start, about 2^18 weights.
int64_t tile_grain(int64_t cols, int64_t tokens) { return std::max<int64_t>(1, (int64_t{1} << 18) / (kTileRows * cols * std::max<int64_t>(tokens, 1))); }

enum class Move { unpack, pack, tile, untile };

template <Move move>
void move_codes(int isa, int threads, WordsArray words, BytesOut bytes, int64_t rows, int64_t cols, int bits) {
    require(rows >= 0 && cols >= 1 && bits >= 1 && bits <= 8 && static_cast<int64_t>(words.shape(0)) == rows &&
            static_cast<int64_t>(words.shape(1)) == (cols * bits + 31) / 32);
    constexpr bool tiled = move == Move::tile || move == Move::untile;
    const int64_t lines = tiled ? tiles_of(rows) : rows, width = tiled ? tile_bytes(cols, bits) : cols;
    require(static_cast<int64_t>(bytes.shape(0)) == lines && static_cast<int64_t>(bytes.shape(1)) == width);
    const CodesArgs args{words.data(), bytes.data(), bytes.data(), rows, cols, bits};
    const DecodeTable& kernels = decode_table(isa);
    auto range = move == Move::unpack ? kernels.unpack : move == Move::pack ? kernels.pack : move == Move::tile ? kernels.tile : kernels.untile;
    share_rows(lines, tile_grain(cols, 1), threads, [&](int64_t begin, int64_t end) { return range(args, begin, end); });
}

// A weight matrix and the tensors that hold it.
struct HeldMatrix {
    Matrix weight;
    MaybeAny values;
    MaybeBytes tiles, zero_point;
    MaybeFloats bias;

    HeldMatrix(int64_t rows, int64_t cols, MaybeBytes tiles_, MaybeAny values_, MaybeBytes zero_point_, int bits, int64_t group_size,
               int rounding, MaybeFloats bias_)
        : values(std::move(values_)), tiles(std::move(tiles_)), zero_point(std::move(zero_point_)), bias(std::move(bias_)) {
        require(rows >= 1 && cols >= 1 && values && values->ndim() == 2 && static_cast<int64_t>(values->shape(0)) == rows);
        const int64_t width = values->shape(1);
        if (tiles) {
            require(bits >= 1 && bits <= 8 && static_cast<int64_t>(tiles->shape(0)) == tiles_of(rows) &&
                    static_cast<int64_t>(tiles->shape(1)) == tile_bytes(cols, bits));
        } else {
            require(width == cols && !zero_point);
        }
        if (zero_point)
            require(group_size >= 1 && cols % group_size == 0 && width == cols / group_size && zero_point->shape(0) == values->shape(0) &&
                    static_cast<int64_t>(zero_point->shape(1)) == width);
        else if (tiles)
            require(width == int64_t{1} << bits);
        require(!bias || static_cast<int64_t>(bias->shape(0)) == rows);
        weight = {rows, cols, tiles ? tiles->data() : nullptr, values->data(), dtype_of(*values), zero_point ? zero_point->data() : nullptr,
                  bits, group_size, rounding, bias ? bias->data() : nullptr};
    }
};

void product(int isa, int threads, const HeldMatrix& held, AnyIn x, FloatOut out) {
    const Matrix& weight = held.weight;
    require(x.ndim() == 2 && static_cast<int64_t>(x.shape(1)) == weight.cols && out.shape(0) == x.shape(0) &&
            static_cast<int64_t>(out.shape(1)) == weight.rows && weight.tiles != nullptr);
    const int64_t tokens = x.shape(0), cols = weight.cols, stride = (cols + 15) / 16 * 16;
    const float* wide = static_cast<const float*>(x.data());
    std::vector<float> padded;
    if (dtype_of(x) == kBfloat16 || stride != cols) {
        padded.assign(tokens * stride, 0.0f);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = 0; j < cols; ++j) {
                const uint32_t bits = dtype_of(x) == kBfloat16 ? uint32_t{static_cast<const uint16_t*>(x.data())[t * cols + j]} << 16 : 0;
                if (dtype_of(x) == kBfloat16) std::memcpy(&padded[t * stride + j], &bits, 4);
                else padded[t * stride + j] = wide[t * cols + j];
            }
        wide = padded.data();
    }
    const ProductArgs args{weight, wide, tokens, stride, out.data(), weight.rows};
    const DecodeTable& kernels = decode_table(isa);
    share_rows(tiles_of(weight.rows), tile_grain(cols, tokens), threads,
               [&](int64_t begin, int64_t end) { return kernels.product(args, begin, end); });
}

void dense(int isa, int threads, const HeldMatrix& held, AnyIn out, int64_t first_row) {
    const Matrix& weight = held.weight;
    require(out.ndim() == 2 && static_cast<int64_t>(out.shape(1)) == weight.cols && weight.tiles != nullptr && first_row >= 0 &&
            first_row % kTileRows == 0);
    const int64_t last = first_row + out.shape(0);
    require(last <= weight.rows && (last == weight.rows || last % kTileRows == 0));
    const DenseArgs args{weight, out.data(), dtype_of(out), first_row};
    const DecodeTable& kernels = decode_table(isa);
    const int64_t first = first_row / kTileRows;
    share_rows(tiles_of(last) - first, tile_grain(weight.cols, 1), threads,
               [&](int64_t begin, int64_t end) { return kernels.dense(args, first + begin, first + end); });
}

// Waits by spinning, then by yielding: stages last microseconds.
class Barrier {
    std::atomic<int> waiting{0}, phase{0};

public:
    void wait(int size) {
        const int before = phase.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            waiting.store(0, std::memory_order_relaxed);
            phase.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == before; ++spins)
            if (spins > 2000) std::this_thread::yield();
    }
};

// A decoder, its cache, and its scratch: one call is one token.
class Step {
    StepArgs args{};
    std::vector<Block> blocks;
    std::vector<nb::object> kept;
    std::vector<float> scratch;

    const Matrix& held(nb::object object, int64_t rows, int64_t cols) {
        kept.push_back(object);
        const Matrix& weight = nb::cast<const HeldMatrix&>(object).weight;
        require(weight.rows == rows && weight.cols == cols);
        return weight;
    }
    const float* line(nb::object object, int64_t size) {
        const auto array = nb::cast<FloatLine>(object);
        require(static_cast<int64_t>(array.shape(0)) == size);
        kept.push_back(object);
        return array.data();
    }
    float* cache(nb::object object) {
        const auto array = nb::cast<FloatCube>(object);
        require(static_cast<int64_t>(array.shape(0)) == args.kv_heads && static_cast<int64_t>(array.shape(1)) == args.capacity &&
                static_cast<int64_t>(array.shape(2)) == args.head_dim);
        kept.push_back(object);
        return array.data();
    }

public:
    Step(int64_t hidden, int64_t intermediate, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity, float epsilon,
         float scaling) {
        require(hidden >= 1 && intermediate >= 1 && kv_heads >= 1 && heads >= kv_heads && heads % kv_heads == 0 && head_dim >= 2 &&
                head_dim % 2 == 0 && capacity >= 1);
        args.hidden = hidden, args.intermediate = intermediate, args.heads = heads, args.kv_heads = kv_heads, args.head_dim = head_dim;
        args.capacity = capacity, args.epsilon = epsilon, args.scaling = scaling;
    }

    void add_block(nb::list linears, nb::list norms, nb::object keys, nb::object values) {
        require(nb::len(linears) == 7 && (nb::len(norms) == 2 || nb::len(norms) == 4));
        const int64_t mixed = args.heads * args.head_dim, kv = args.kv_heads * args.head_dim;
        Block block{};
        block.q = held(linears[0], mixed, args.hidden), block.k = held(linears[1], kv, args.hidden), block.v = held(linears[2], kv, args.hidden);
        block.o = held(linears[3], args.hidden, mixed), block.gate = held(linears[4], args.intermediate, args.hidden);
        block.up = held(linears[5], args.intermediate, args.hidden), block.down = held(linears[6], args.hidden, args.intermediate);
        block.norm_attention = line(norms[0], args.hidden), block.norm_mlp = line(norms[1], args.hidden);
        if (nb::len(norms) == 4) block.norm_q = line(norms[2], args.head_dim), block.norm_k = line(norms[3], args.head_dim);
        block.keys = cache(keys), block.values = cache(values);
        blocks.push_back(block);
    }

    void finish(nb::object norm, nb::object head, int64_t vocabulary) {
        args.norm = line(norm, args.hidden), args.head = held(head, vocabulary, args.hidden);
    }

    void run(int isa, int threads, FloatLine x, Array<const float, 1> cos, Array<const float, 1> sin, int64_t position, FloatLine logits) {
        const size_t size = args.head_dim;
        require(args.norm && static_cast<int64_t>(x.shape(0)) == args.hidden && cos.shape(0) == size && sin.shape(0) == size && position >= 0 &&
                position < args.capacity && static_cast<int64_t>(logits.shape(0)) == args.head.rows);
        const DecodeTable& kernels = decode_table(isa);
        threads = std::clamp<int>(threads, 1, 256);
        const auto room = [](int64_t n) { return (n + 31) / 16 * 16; };
        const int64_t parts[] = {room(args.hidden), room((args.heads + 2 * args.kv_heads) * args.head_dim), room(args.heads * args.head_dim),
                                 room(args.intermediate)};
        args.own_stride = room(args.hidden) + 3 * room(args.intermediate) + room(args.head_dim) + room(args.capacity);
        scratch.assign(parts[0] + parts[1] + parts[2] + parts[3] + threads * args.own_stride, 0.0f);
        args.blocks = blocks.data(), args.count = static_cast<int64_t>(blocks.size());
        args.x = scratch.data(), args.qkv = args.x + parts[0], args.mixed = args.qkv + parts[1], args.act = args.mixed + parts[2];
        args.own = args.act + parts[3];
        std::memcpy(args.x, x.data(), sizeof(float) * args.hidden);
        args.cos = cos.data(), args.sin = sin.data(), args.position = position, args.logits = logits.data();
        nb::gil_scoped_release release;
        std::atomic<int> team{0};
        Barrier barrier;
        auto work = [&](int thread) {
            int size;
            while ((size = team.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
            for (int64_t block = 0; block < args.count; ++block)
                for (int stage = 0; stage < kStages; ++stage) {
                    kernels.stage(args, block, stage, thread, size);
                    barrier.wait(size);
                }
            kernels.head(args, thread, size);
        };
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) {
            try {
                others.emplace_back(work, i);
            } catch (const std::system_error&) {  // the system has no more threads: those that started do all of it
                break;
            }
        }
        team.store(static_cast<int>(others.size()) + 1, std::memory_order_release);
        work(0);
        for (auto& thread : others) thread.join();
    }
};

void bind_decode(nb::module_& m) {
    m.def("unpack", &move_codes<Move::unpack>);
    m.def("pack", &move_codes<Move::pack>);
    m.def("tile", &move_codes<Move::tile>);
    m.def("untile", &move_codes<Move::untile>);
    m.def("tile_bytes", &tile_bytes);
    m.def("product", &product);
    m.def("dense", &dense);
    nb::class_<HeldMatrix>(m, "Matrix")
        .def(nb::init<int64_t, int64_t, MaybeBytes, MaybeAny, MaybeBytes, int, int64_t, int, MaybeFloats>(), nb::arg("rows"), nb::arg("cols"),
             nb::arg("tiles").none(), nb::arg("values").none(), nb::arg("zero_point").none(), nb::arg("bits"), nb::arg("group_size"),
             nb::arg("rounding"), nb::arg("bias").none());
    nb::class_<Step>(m, "Step")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float>())
        .def("add_block", &Step::add_block)
        .def("finish", &Step::finish)
        .def("run", &Step::run);
}

}  // namespace
}  // namespace leangrid
