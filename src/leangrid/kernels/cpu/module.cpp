// leangrid.kernels._cpu: views of torch tensors in, an instruction set chosen by the caller, rows shared out to
// threads. kernels/checks.py has checked shapes and values; here only the dtypes, the layout and what memory safety
// needs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#ifdef LEANGRID_BFLOAT16
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __linux__
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "decode_table.h"
#include "table.h"
#include "tiles.h"

namespace nb = nanobind;

namespace leangrid {

extern const KernelTable portable_table;
#ifdef LEANGRID_X86
extern const KernelTable avx2_table, avx512_table;
#endif

namespace {

template <class T, int D>
using Array = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;
using FloatIn = Array<const float, 2>;
using BytesIn = Array<const uint8_t, 2>;
using FloatOut = Array<float, 2>;
using BytesOut = Array<uint8_t, 2>;

int best_isa() {
#ifdef LEANGRID_X86
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
    if (wide) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

const KernelTable& table(int isa) {
    if (isa < 0 || isa > best_isa()) throw nb::value_error("this processor does not have that instruction set");
#ifdef LEANGRID_X86
    if (isa == 2) return avx512_table;
    if (isa == 1) return avx2_table;
#endif
    return portable_table;
}

// What of tiles.cpp this process may use; asks the operating system for the matrix tiles once. (Here and not there:
// that file's compiler flags are not for every processor.)
Units bfloat16_units() {
#ifdef LEANGRID_BFLOAT16
    static const Units granted = [] {
        if (best_isa() != 2) return Units::none;
        uint32_t a = 7, b = 0, c = 0, d = 0;  // leaf 7 of cpuid: EDX bit 22 bfloat16 tiles, bit 24 tiles
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        if ((d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return Units::tiles;
        return __builtin_cpu_supports("avx512bf16") ? Units::dots : Units::none;
    }();
    return granted;
#else
    return Units::none;
#endif
}

constexpr const char* kNoUnits = "this processor does not multiply bfloat16";

void require(bool fits) {
    if (!fits) throw nb::value_error("array shapes do not fit together");
}

// torch's own team of threads, where torch brought GNU OpenMP: its workers spin for a while after each of torch's
// products, and threads of ours beside them would share their cores. Null where there is none.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Team torch_team() {
#ifdef __linux__
    static const Team team = [] {
        void* loaded = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
        return loaded ? reinterpret_cast<Team>(dlsym(loaded, "GOMP_parallel")) : nullptr;
    }();
    return team;
#else
    return nullptr;
#endif
}

// Calls loop() on at most `threads` threads at once, on no more of our own than there are pieces of work. A team keeps
// its size: it ends the workers that a smaller one does without, and torch's next product would have to start them
// again.
template <class Loop>
void on_threads(int64_t pieces, int64_t threads, Loop& loop) {
    if (const Team team = std::min(pieces, threads) > 1 ? torch_team() : nullptr) {
        team([](void* mine) { (*static_cast<Loop*>(mine))(); }, &loop, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(pieces, threads); ++i) {
        try {
            others.emplace_back(std::ref(loop));
        } catch (const std::system_error&) {  // the system has no more threads: those we have do the work
            break;
        }
    }
    loop();
    for (auto& thread : others) thread.join();
}

// Calls work(begin, end) on pieces of `grain` rows. Rows are independent, so who computes which piece changes nothing.
// The caller must not hold Python's lock.
template <class Work>
void share_released(int64_t rows, int64_t grain, int threads, Work work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> good{true};
    auto loop = [&] {
        for (int64_t begin = next.fetch_add(grain); begin < rows && good; begin = next.fetch_add(grain))
            if (!work(begin, std::min(rows, begin + grain))) good = false;
    };
    on_threads((rows + grain - 1) / grain, threads, loop);
    if (!good) throw std::bad_alloc();
}

template <class Work>
void share_rows(int64_t rows, int64_t grain, int threads, Work work) {
    nb::gil_scoped_release release;
    share_released(rows, grain, threads, work);
}

void kmeans(int isa, int threads, FloatIn weight, Array<const double, 1> importance, bool per_row, int iterations, FloatOut out,
            Array<double, 1> objective) {
    const int64_t rows = weight.shape(0), n = weight.shape(1);
    require(n > 0 && importance.shape(0) == static_cast<size_t>(per_row ? rows * n : n) && out.shape(0) == weight.shape(0) &&
            objective.shape(0) == weight.shape(0) && out.shape(1) >= 1 && out.shape(1) <= 256 && iterations >= 0);
    const KmeansArgs args{weight.data(), importance.data(), n, per_row, static_cast<int>(out.shape(1)), iterations, out.data(),
                          objective.data()};
    const KernelTable& kernels = table(isa);
    share_rows(rows, 8, threads, [&](int64_t begin, int64_t end) { return kernels.kmeans(args, begin, end); });
}

void affine_search(int isa, int threads, FloatIn weight, Array<const double, 1> importance, bool per_row, int bits, int steps,
                   int shrink_steps, bool symmetric, int dtype, double smallest, double largest, FloatOut scale, BytesOut zero_point,
                   Array<double, 2> objective) {
    const int64_t rows = weight.shape(0), cols = weight.shape(1), groups = scale.shape(1);
    require(groups > 0 && cols > 0 && cols % groups == 0 && importance.shape(0) == static_cast<size_t>(per_row ? rows * cols : cols) &&
            scale.shape(0) == weight.shape(0) && zero_point.shape(0) == weight.shape(0) && objective.shape(0) == weight.shape(0) &&
            zero_point.shape(1) == scale.shape(1) && objective.shape(1) == scale.shape(1) && bits >= 1 && bits <= 8 && steps >= 1 &&
            shrink_steps >= 1);
    const AffineArgs args{weight.data(), importance.data(), cols / groups, per_row ? std::max<int64_t>(rows * groups, 1) : groups,
                          1 << bits, steps, shrink_steps, symmetric, dtype, smallest, largest, scale.data(), zero_point.data(),
                          objective.data()};
    const KernelTable& kernels = table(isa);
    const int64_t grain = std::max<int64_t>(4, 4096 / args.n);
    share_rows(rows * groups, grain, threads, [&](int64_t begin, int64_t end) { return kernels.affine(args, begin, end); });
}

void run_block(bool descend, int isa, int threads, FloatIn weight, FloatIn square, const GridArgs& grid, BytesOut codes, FloatOut error) {
    require(square.shape(0) == square.shape(1) && square.shape(0) == weight.shape(1) && codes.shape(0) == weight.shape(0) &&
            error.shape(0) == weight.shape(0) && codes.shape(1) == weight.shape(1) && error.shape(1) == weight.shape(1));
    const SweepArgs args{weight.data(), square.data(), static_cast<int64_t>(weight.shape(1)), grid, codes.data(), error.data()};
    const KernelTable& kernels = table(isa);
    share_rows(weight.shape(0), 64, threads, [&](int64_t begin, int64_t end) {
        return descend ? kernels.descend(args, begin, end) : kernels.sweep(args, begin, end);
    });
}

template <bool descend>
void block_levels(int isa, int threads, FloatIn weight, FloatIn square, FloatIn levels, BytesOut codes, FloatOut error) {
    require(levels.shape(0) == weight.shape(0) && levels.shape(1) >= 1 && levels.shape(1) <= 256);
    const GridArgs grid{levels.data(), static_cast<int>(levels.shape(1)), nullptr, nullptr, nullptr, nullptr, 0};
    run_block(descend, isa, threads, weight, square, grid, codes, error);
}

template <bool descend>
void block_affine(int isa, int threads, FloatIn weight, FloatIn square, FloatIn scale, BytesIn zero_point, Array<const int32_t, 1> group,
                  int bits, BytesOut codes, FloatOut error) {
    require(scale.shape(0) == weight.shape(0) && zero_point.shape(0) == weight.shape(0) && zero_point.shape(1) == scale.shape(1) &&
            group.shape(0) == weight.shape(1) && bits >= 1 && bits <= 8);
    const GridArgs grid{nullptr, 1 << bits, scale.data(), zero_point.data(), nullptr, group.data(), static_cast<int64_t>(scale.shape(1))};
    run_block(descend, isa, threads, weight, square, grid, codes, error);
}

template <bool descend>
void block_offset(int isa, int threads, FloatIn weight, FloatIn square, FloatIn scale, FloatIn offset, Array<const int32_t, 1> group,
                  int bits, BytesOut codes, FloatOut error) {
    require(scale.shape(0) == weight.shape(0) && offset.shape(0) == weight.shape(0) && offset.shape(1) == scale.shape(1) &&
            group.shape(0) == weight.shape(1) && bits >= 1 && bits <= 8);
    const GridArgs grid{nullptr, 1 << bits, scale.data(), nullptr, offset.data(), group.data(), static_cast<int64_t>(scale.shape(1))};
    run_block(descend, isa, threads, weight, square, grid, codes, error);
}

void level_gram(int isa, int threads, FloatIn hessian, BytesIn codes, Array<double, 3> out) {
    const int64_t rows = codes.shape(0);
    require(hessian.shape(0) == hessian.shape(1) && hessian.shape(0) == codes.shape(1) && out.shape(0) == codes.shape(0) &&
            out.shape(1) == out.shape(2) && out.shape(1) >= 1 && out.shape(1) <= 256);
    const GramArgs args{hessian.data(), codes.data(), static_cast<int64_t>(codes.shape(1)), static_cast<int>(out.shape(1)), out.data()};
    const KernelTable& kernels = table(isa);
    // A range packs H once for itself: few long ranges, but bounded ones (their float64 bins are scratch).
    const int64_t grain = std::clamp<int64_t>((rows + threads - 1) / std::max(threads, 1), 1, 1024);
    share_rows(rows, grain, threads, [&](int64_t begin, int64_t end) { return kernels.gram(args, begin, end); });
}

void run_exact(int isa, int threads, const ExactArgs& args, int64_t rows) {
    const KernelTable& kernels = table(isa);
    // A range keeps one matrix of its own: its pages are fresh, so a range has more than one row where there are
    // enough.
    const int64_t grain = std::clamp<int64_t>(rows / (4 * std::max(threads, 1)), 1, 16);
    share_rows(rows, grain, threads, [&](int64_t begin, int64_t end) { return kernels.exact(args, begin, end); });
}

void require_exact(const FloatIn& weight, const Array<const double, 2>& inverse, const BytesOut& codes, const Array<double, 1>& loss) {
    require(inverse.shape(0) == inverse.shape(1) && inverse.shape(0) == weight.shape(1) && codes.shape(0) == weight.shape(0) &&
            codes.shape(1) == weight.shape(1) && loss.shape(0) == weight.shape(0));
}

void exact_levels(int isa, int threads, FloatIn weight, Array<const double, 2> inverse, FloatIn levels, BytesOut codes,
                  Array<double, 1> loss) {
    require_exact(weight, inverse, codes, loss);
    require(levels.shape(0) == weight.shape(0) && levels.shape(1) >= 1 && levels.shape(1) <= 256);
    const ExactArgs args{weight.data(), inverse.data(), static_cast<int64_t>(weight.shape(1)), levels.data(),
                         static_cast<int>(levels.shape(1)), nullptr, nullptr, nullptr, 0, codes.data(), loss.data()};
    run_exact(isa, threads, args, weight.shape(0));
}

void exact_affine(int isa, int threads, FloatIn weight, Array<const double, 2> inverse, FloatIn scale, Array<const double, 2> zero,
                  Array<const int32_t, 1> group, int bits, BytesOut codes, Array<double, 1> loss) {
    require_exact(weight, inverse, codes, loss);
    require(scale.shape(0) == weight.shape(0) && zero.shape(0) == weight.shape(0) && zero.shape(1) == scale.shape(1) &&
            group.shape(0) == weight.shape(1) && bits >= 1 && bits <= 8);
    const ExactArgs args{weight.data(), inverse.data(), static_cast<int64_t>(weight.shape(1)), nullptr, 1 << bits, scale.data(),
                         zero.data(), group.data(), static_cast<int64_t>(scale.shape(1)), codes.data(), loss.data()};
    run_exact(isa, threads, args, weight.shape(0));
}

int largest_bits(Array<const uint16_t, 1> x) {
    if (bfloat16_units() == Units::none) throw nb::value_error(kNoUnits);
    nb::gil_scoped_release release;
    return largest_magnitude(x.data(), x.shape(0));
}

// matrix += x^T x (squares on and right of the diagonal only) and, where there is a cross, cross += original^T x.
void outer_sums(int threads, Array<const uint16_t, 2> x, std::optional<Array<const uint16_t, 2>> original, FloatOut matrix,
                std::optional<FloatOut> cross) {
    const int64_t tokens = x.shape(0), cols = x.shape(1);
    require(matrix.shape(0) == x.shape(1) && matrix.shape(1) == x.shape(1) && cross.has_value() == original.has_value());
    if (cross) require(cross->shape(0) == x.shape(1) && cross->shape(1) == x.shape(1));
    if (original) require(original->shape(0) == x.shape(0) && original->shape(1) == x.shape(1));
    const Units units = bfloat16_units();
    if (units == Units::none) throw nb::value_error(kNoUnits);
    // Packed tiles of one stretch of tokens. Kept between calls: fresh pages cost as much as the products.
    static std::mutex one_at_a_time;
    static std::unique_ptr<char, void (*)(void*)> scratch(nullptr, std::free);
    static int64_t scratch_bytes = 0;
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    constexpr int64_t kTokens = 1024;
    const int64_t bytes = packed_bytes(std::min(tokens, kTokens), cols), squares = (cols + 31) / 32;
    if (scratch_bytes < 3 * bytes) {
        scratch.reset(static_cast<char*>(std::aligned_alloc(64, 3 * bytes)));
        scratch_bytes = scratch ? 3 * bytes : 0;
        if (!scratch) throw std::bad_alloc();
    }
    char *left = scratch.get(), *right = left + bytes, *other = right + bytes;
    for (int64_t first = 0; first < tokens; first += kTokens) {
        const int64_t count = std::min(kTokens, tokens - first);
        const uint16_t *now = x.data() + first * cols, *before = original ? original->data() + first * cols : nullptr;
        share_released((count + kTileTokens - 1) / kTileTokens, 4, threads, [&](int64_t begin, int64_t end) {
            pack_tiles(now, count, cols, begin, end, left, right);
            if (before) pack_tiles(before, count, cols, begin, end, other, nullptr);
            return true;
        });
        const OuterArgs own{left, right, count, cols, true, matrix.data()};
        const OuterArgs mixed{other, right, count, cols, false, cross ? cross->data() : nullptr};
        share_released(squares, 4, threads, [&](int64_t begin, int64_t end) {
            add_outer(own, begin, end, units);
            if (before) add_outer(mixed, begin, end, units);
            return true;
        });
    }
}

}  // namespace
}  // namespace leangrid

#include "bindings_decode.h"

namespace leangrid {

NB_MODULE(_cpu, m) {
    m.doc() = "Row kernels of leangrid; call them through leangrid.kernels, which checks their input.";
    m.def("best_isa", &best_isa, "0 portable, 1 AVX2 and FMA, 2 AVX-512 (F, BW, DQ, VL)");
    m.def("kmeans", &kmeans);
    m.def("affine_search", &affine_search);
    m.def("sweep_levels", &block_levels<false>);
    m.def("descend_levels", &block_levels<true>);
    m.def("sweep_affine", &block_affine<false>);
    m.def("descend_affine", &block_affine<true>);
    m.def("sweep_offset", &block_offset<false>);
    m.def("descend_offset", &block_offset<true>);
    m.def("level_gram", &level_gram);
    m.def("exact_levels", &exact_levels);
    m.def("exact_affine", &exact_affine);
    m.def("multiplies_bfloat16", [] { return bfloat16_units() != Units::none; }, "matrix tiles (AMX) or vectors (AVX512_BF16)");
    m.def("largest_bits", &largest_bits);
    m.def("outer_sums", &outer_sums, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none());
    bind_decode(m);
}

}  // namespace leangrid
