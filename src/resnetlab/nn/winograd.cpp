// 3x3 convolution of stride 1 and padding 1, and both of its gradients, by Winograd's algorithm F(4x4, 3x3) (Lavin and Gray
// 2015, arXiv 1509.09308) on float32 or bfloat16 maps in channels_last memory; weights, and what is computed, are float32. A
// tile of 4x4 outputs takes 36 products for each pair of channels, not 144, after transforms whose cost does not grow with the
// number of output channels.
//
// The points are 0, 1, -1, 2, -2 and infinity, for the convolution (4 outputs, 3 taps) and for the gradient of the weights (3
// outputs, 4 taps) alike, so both transform the input in the same way. Channels are a multiple of WIDTH.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "registers.h"

constexpr int POINTS = 36;
constexpr int ROWS = WIDTH == 16 ? 12 : 6;  // of a product, kept in registers: half of 32, or of 16
#define UNROLL _Pragma("GCC unroll 12")

namespace {

struct Free {
    void operator()(float *block) const { std::free(block); }
};
typedef std::unique_ptr<float[], Free> Buffer;
// Some numbers for each of so many threads; none at all if there is no memory for them.
std::vector<Buffer> allocate(int64_t count, int64_t threads = 1) {
    std::vector<Buffer> blocks;
    for (int64_t i = 0; i < threads; i++) {
        blocks.emplace_back(static_cast<float *>(std::aligned_alloc(64, (sizeof(float) * count + 64) / 64 * 64)));
        if (!blocks.back()) return {};
    }
    return blocks;
}

// The transforms of one row or column, a register of channels at a time, from numbers `s` apart to numbers `t` apart: of 6
// inputs (B^T d), of 3 and of 4 taps (G g), and of 6 products to 4 and to 3 outputs (A^T m).
struct Inputs {
    template <typename From, typename To> INLINE void apply(const From *d, int64_t s, To *o, int64_t t) {
        Floats d0 = load_all(d), d1 = load_all(d + s), d2 = load_all(d + 2 * s);
        Floats d3 = load_all(d + 3 * s), d4 = load_all(d + 4 * s), d5 = load_all(d + 5 * s);
        Floats a = d4 - 4.0f * d2, b = d3 - 4.0f * d1, c = d4 - d2, e = 2.0f * (d3 - d1);
        store_all(o, 4.0f * d0 - 5.0f * d2 + d4);
        store_all(o + t, a + b);
        store_all(o + 2 * t, a - b);
        store_all(o + 3 * t, c + e);
        store_all(o + 4 * t, c - e);
        store_all(o + 5 * t, 4.0f * d1 - 5.0f * d3 + d5);
    }
};
struct ThreeTaps {
    template <typename From, typename To> INLINE void apply(const From *g, int64_t s, To *o, int64_t t) {
        Floats g0 = load_all(g), g1 = load_all(g + s), g2 = load_all(g + 2 * s);
        Floats a = (g0 + g2) * (-1.0f / 6), b = g1 * (1.0f / 6);
        Floats c = g0 * (1.0f / 24) + g2 * (1.0f / 6), e = g1 * (1.0f / 12);
        store_all(o, g0 * 0.25f);
        store_all(o + t, a - b);
        store_all(o + 2 * t, a + b);
        store_all(o + 3 * t, c + e);
        store_all(o + 4 * t, c - e);
        store_all(o + 5 * t, g2);
    }
};
struct FourTaps {
    template <typename From, typename To> INLINE void apply(const From *g, int64_t s, To *o, int64_t t) {
        Floats g0 = load_all(g), g1 = load_all(g + s), g2 = load_all(g + 2 * s), g3 = load_all(g + 3 * s);
        Floats a = (g0 + g2) * (-1.0f / 6), b = (g1 + g3) * (1.0f / 6);
        Floats c = g0 * (1.0f / 24) + g2 * (1.0f / 6), e = g1 * (1.0f / 12) + g3 * (1.0f / 3);
        store_all(o, g0 * 0.25f);
        store_all(o + t, a - b);
        store_all(o + 2 * t, a + b);
        store_all(o + 3 * t, c + e);
        store_all(o + 4 * t, c - e);
        store_all(o + 5 * t, g3);
    }
};
struct FourOutputs {
    template <typename From, typename To> INLINE void apply(const From *m, int64_t s, To *o, int64_t t) {
        Floats m0 = load_all(m), m1 = load_all(m + s), m2 = load_all(m + 2 * s);
        Floats m3 = load_all(m + 3 * s), m4 = load_all(m + 4 * s), m5 = load_all(m + 5 * s);
        Floats a = m1 + m2, b = m1 - m2, c = m3 + m4, e = m3 - m4;
        store_all(o, m0 + a + c);
        store_all(o + t, b + 2.0f * e);
        store_all(o + 2 * t, a + 4.0f * c);
        store_all(o + 3 * t, b + 8.0f * e + m5);
    }
};
struct ThreeOutputs {
    template <typename From, typename To> INLINE void apply(const From *m, int64_t s, To *o, int64_t t) {
        Floats m0 = load_all(m), m1 = load_all(m + s), m2 = load_all(m + 2 * s);
        Floats m3 = load_all(m + 3 * s), m4 = load_all(m + 4 * s), m5 = load_all(m + 5 * s);
        Floats a = m1 + m2, b = m1 - m2, c = m3 + m4, e = m3 - m4;
        store_all(o, m0 + a + c);
        store_all(o + t, b + 2.0f * e);
        store_all(o + 2 * t, a + 4.0f * c + m5);
    }
};

// Where the numbers of a square stand, one register of channels each.
struct Square {
    int64_t row, column;
};

// The columns, then the rows of a square of FROM x FROM numbers, to one of TO x TO.
template <typename Transform, int FROM, int TO, typename In, typename Out>
INLINE void transform(const In *in, Square from, Out *out, Square to) {
    alignas(64) float half[TO * FROM * WIDTH];
    UNROLL for (int j = 0; j < FROM; j++) Transform::apply(in + j * from.column, from.row, half + j * WIDTH, FROM * WIDTH);
    UNROLL for (int i = 0; i < TO; i++) Transform::apply(half + i * FROM * WIDTH, WIDTH, out + i * to.row, to.column);
}

struct Map {  // (images, height, width, channels), in tiles of 4x4
    int64_t images, height, width, channels;
    int64_t across() const { return (width + 3) / 4; }
    int64_t of_image() const { return (height + 3) / 4 * across(); }
    Square square() const { return {width * channels, channels}; }
};

// Some of the tiles of a map, one after the other, and their numbers by point: [point][tile][channel].
struct Tiles {
    const Map &map;
    int64_t first, count;
    int64_t plane() const { return count * map.channels; }
    Square points() const { return {6 * plane(), plane()}; }

    // Calls f(offset in the points, image, top, left) for every tile.
    template <typename F> inline __attribute__((always_inline)) void each(F f) const {
        const int64_t across = map.across(), of_image = map.of_image();
        for (int64_t t = 0; t < count; t++) {
            const int64_t in_image = (first + t) % of_image;
            f(t * map.channels, (first + t) / of_image, in_image / across * 4, in_image % across * 4);
        }
    }
};

// The transform of SIDE x SIDE numbers of each tile, from `margin` before its corner on; those outside the map are 0.
template <typename Transform, int SIDE, typename T> void to_points(const Tiles &tiles, int margin, const T *x, float *points) {
    const Map &map = tiles.map;
    tiles.each([&](int64_t at, int64_t image, int64_t top, int64_t left) {
        top -= margin, left -= margin;
        const T *corner = x + ((image * map.height + top) * map.width + left) * map.channels;
        const bool inside = top >= 0 && left >= 0 && top + SIDE <= map.height && left + SIDE <= map.width;
        for (int64_t c = 0; c < map.channels; c += WIDTH) {
            if (inside) {
                transform<Transform, SIDE, 6>(corner + c, map.square(), points + at + c, tiles.points());
                continue;
            }
            alignas(64) float border[SIDE * SIDE * WIDTH];
            for (int64_t i = 0; i < SIDE; i++)
                for (int64_t j = 0; j < SIDE; j++) {
                    const bool there = top + i >= 0 && top + i < map.height && left + j >= 0 && left + j < map.width;
                    const int64_t from = (i * map.width + j) * map.channels + c;
                    store_all(border + (i * SIDE + j) * WIDTH, there ? load_all(corner + from) : Floats{});
                }
            transform<Transform, SIDE, 6>(border, {SIDE * WIDTH, WIDTH}, points + at + c, tiles.points());
        }
    });
}

template <typename T> void to_outputs(const Tiles &tiles, const float *points, T *y) {
    const Map &map = tiles.map;
    tiles.each([&](int64_t at, int64_t image, int64_t top, int64_t left) {
        const int64_t rows = std::min<int64_t>(4, map.height - top), columns = std::min<int64_t>(4, map.width - left);
        T *corner = y + ((image * map.height + top) * map.width + left) * map.channels;
        for (int64_t c = 0; c < map.channels; c += WIDTH) {
            if (rows == 4 && columns == 4) {
                transform<FourOutputs, 6, 4>(points + at + c, tiles.points(), corner + c, map.square());
                continue;
            }
            alignas(64) float border[16 * WIDTH];
            transform<FourOutputs, 6, 4>(points + at + c, tiles.points(), border, {4 * WIDTH, WIDTH});
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < columns; j++)
                    store_all(corner + (i * map.width + j) * map.channels + c, load_all(border + (i * 4 + j) * WIDTH));
        }
    });
}

// A matrix whose element (r, d) is at[r * row + d * depth].
struct Matrix {
    const float *at;
    int64_t row, depth;
};

// R rows and V registers of c (+)= a b, where b is (depth, columns) and c has rows of `columns` numbers.
template <int R, int V> INLINE void multiply(Matrix a, const float *b, int64_t columns, float *c, int64_t depth, bool add) {
    Floats sum[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) sum[r][v] = add ? load_all(c + r * columns + v * WIDTH) : Floats{};
    for (int64_t d = 0; d < depth; d++) {
        Floats w[V];
        UNROLL for (int v = 0; v < V; v++) w[v] = load_all(b + d * columns + v * WIDTH);
        UNROLL for (int r = 0; r < R; r++) {
            const float value = a.at[r * a.row + d * a.depth];
            UNROLL for (int v = 0; v < V; v++) sum[r][v] += value * w[v];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store_all(c + r * columns + v * WIDTH, sum[r][v]);
}

// All rows of V registers of columns.
template <int V>
INLINE void multiply_rows(Matrix a, const float *b, int64_t columns, float *c, int64_t rows, int64_t depth, bool add) {
    int64_t r = 0;
    const auto rest = [&] { return Matrix{a.at + r * a.row, a.row, a.depth}; };
    for (; r + ROWS <= rows; r += ROWS) multiply<ROWS, V>(rest(), b, columns, c + r * columns, depth, add);
    for (; r + 2 <= rows; r += 2) multiply<2, V>(rest(), b, columns, c + r * columns, depth, add);
    for (; r < rows; r++) multiply<1, V>(rest(), b, columns, c + r * columns, depth, add);
}

void multiply_all(Matrix a, const float *b, int64_t columns, float *c, int64_t rows, int64_t depth, bool add) {
    int64_t v = 0;
    for (; v + 2 * WIDTH <= columns; v += 2 * WIDTH) multiply_rows<2>(a, b + v, columns, c + v, rows, depth, add);
    for (; v < columns; v += WIDTH) multiply_rows<1>(a, b + v, columns, c + v, rows, depth, add);
}

// Fetches the numbers of so many tiles into the cache, from the row of one on, while others are multiplied.
enum { TO_READ, TO_WRITE };
template <int USE, typename T> INLINE void prefetch(const Map &map, int64_t tile, int64_t count, const T *x) {
    const int64_t image = tile / map.of_image(), top = tile % map.of_image() / map.across() * 4;
    const int64_t row = map.width * map.channels, all = map.images * map.height * row;
    const int64_t first = std::min(all, (image * map.height + top) * row);
    const int64_t last = std::min(all, first + (count + map.across()) * 16 * map.channels);
    for (int64_t i = first; i < last; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i, USE, 2);
}

// Tiles that go through all steps together: few enough for the cache, or so many that large weights are not read too often.
int64_t block_of(int64_t channels) { return channels > 128 ? 252 : 36; }

// Runs work(part, first, last) on equal parts of `items`, in so many threads, the calling one among them.
template <typename Work> void in_threads(int64_t threads, int64_t items, const Work &work) {
    std::vector<std::thread> others;
    for (int64_t part = 1; part < threads; part++) {
        const int64_t first = items * part / threads, last = items * (part + 1) / threads;
        try {
            others.emplace_back([&work, part, first, last] { work(part, first, last); });
        } catch (const std::system_error &) {  // no more threads for this process
            work(part, first, last);
        }
    }
    work(0, 0, items / threads);
    for (std::thread &other : others) other.join();
}

// Tiles that are carried at once: as many for every number of threads, where each has that many.
int64_t tiles_at_once(int64_t tiles, int64_t channels, int64_t threads) {
    return std::max<int64_t>(1, std::min(block_of(channels), (tiles + threads - 1) / threads));
}

// y (B, H, W, K), the convolution of x (B, H, W, C) with the weights w (3, 3, C, K); equal for any number of threads.
// Returns 0 if there is no memory for it.
template <typename T>
int forward(const T *x, const float *w, T *y, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
            int64_t threads) {
    const Map in{images, height, width, channels}, out{images, height, width, outputs};
    const int64_t pairs = channels * outputs, tiles = images * in.of_image();
    const int64_t block = tiles_at_once(tiles, std::max(channels, outputs), threads);
    const std::vector<Buffer> transformed = allocate(POINTS * pairs);
    const std::vector<Buffer> scratch = allocate(POINTS * block * (channels + outputs), threads);
    if (transformed.empty() || scratch.empty()) return 0;
    float *u = transformed[0].get();
    in_threads(threads, pairs / WIDTH, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t p = first * WIDTH; p < last * WIDTH; p += WIDTH)
            transform<ThreeTaps, 3, 6>(w + p, {3 * pairs, pairs}, u + p, {6 * pairs, pairs});
    });
    in_threads(threads, (tiles + block - 1) / block, [&](int64_t part, int64_t begin, int64_t end) {
        float *v = scratch[part].get(), *m = v + POINTS * block * channels;
        for (int64_t first = begin * block; first < std::min(end * block, tiles); first += block) {
            const int64_t count = std::min(block, tiles - first);
            to_points<Inputs, 6>(Tiles{in, first, count}, 1, x, v);
            prefetch<TO_READ>(in, first + count, block, x);
            prefetch<TO_WRITE>(out, first, count, y);
            for (int p = 0; p < POINTS; p++)
                multiply_all({v + p * count * channels, channels, 1}, u + p * pairs, outputs, m + p * count * outputs, count,
                             channels, false);
            to_outputs(Tiles{out, first, count}, m, y);
        }
    });
    return 1;
}

// The gradients where that of the output is g (B, H, W, K): dx (B, H, W, C) and dw, like the weights w (K, 3, 3, C) here; either
// may be left out. Block by block, so that both find g in the cache. For dw threads sum over tiles of their own, so their number
// decides its last bits. Returns 0 if there is no memory for it.
template <typename T>
int backward(const T *x, const T *g, const float *w, T *dx, float *dw, int64_t images, int64_t height, int64_t width,
             int64_t channels, int64_t outputs, int64_t threads) {
    const Map in{images, height, width, channels}, out{images, height, width, outputs};
    const int64_t pairs = channels * outputs, tiles = images * in.of_image(), registers = channels / WIDTH;
    const int64_t block = tiles_at_once(tiles, std::max(channels, outputs), threads);
    const std::vector<Buffer> turned = allocate(dx ? POINTS * pairs : 0), sums = allocate(dw ? POINTS * pairs : 0, threads);
    const std::vector<Buffer> scratch = allocate(POINTS * block * (channels + outputs), threads);
    if (turned.empty() || sums.empty() || scratch.empty()) return 0;
    const auto in_weights = [&](int64_t pair) { return pair / channels * 9 * channels + pair % channels; };
    if (dx)
        in_threads(threads, registers * outputs, [&](int64_t, int64_t first, int64_t last) {
            for (int64_t p = first * WIDTH; p < last * WIDTH; p += WIDTH)  // the taps from the last to the first: by 180 degrees
                transform<ThreeTaps, 3, 6>(w + in_weights(p) + 8 * channels, {-3 * channels, -channels}, turned[0].get() + p,
                                           {6 * pairs, pairs});
        });
    in_threads(threads, (tiles + block - 1) / block, [&](int64_t part, int64_t begin, int64_t end) {
        float *of_out = scratch[part].get(), *of_in = of_out + POINTS * block * outputs, *s = sums[part].get();
        if (dw) std::fill(s, s + POINTS * pairs, 0.0f);
        for (int64_t first = begin * block; first < std::min(end * block, tiles); first += block) {
            const int64_t count = std::min(block, tiles - first);
            if (dx) {
                to_points<Inputs, 6>(Tiles{out, first, count}, 1, g, of_out);
                prefetch<TO_WRITE>(in, first, count, dx);
                if (dw) prefetch<TO_READ>(in, first, count, x);
                for (int p = 0; p < POINTS; p++)
                    multiply_all({of_out + p * count * outputs, outputs, 1}, turned[0].get() + p * pairs, channels,
                                 of_in + p * count * channels, count, outputs, false);
                to_outputs(Tiles{in, first, count}, of_in, dx);
            }
            if (dw) {
                to_points<FourTaps, 4>(Tiles{out, first, count}, 0, g, of_out);
                to_points<Inputs, 6>(Tiles{in, first, count}, 1, x, of_in);
                prefetch<TO_READ>(out, first + count, block, g);
                for (int p = 0; p < POINTS; p++)
                    multiply_all({of_out + p * count * outputs, 1, outputs}, of_in + p * count * channels, channels,
                                 s + p * pairs, outputs, count, true);
            }
        }
    });
    if (dw)
        in_threads(threads, registers * outputs, [&](int64_t, int64_t first, int64_t last) {
            float *s = sums[0].get();
            for (int64_t part = 1; part < threads; part++)
                for (int p = 0; p < POINTS; p++)
                    for (int64_t i = p * pairs + first * WIDTH; i < p * pairs + last * WIDTH; i++) s[i] += sums[part].get()[i];
            for (int64_t p = first * WIDTH; p < last * WIDTH; p += WIDTH)
                transform<ThreeOutputs, 6, 3>(s + p, {6 * pairs, pairs}, dw + in_weights(p), {3 * channels, channels});
        });
    return 1;
}

}  // namespace

extern "C" int winograd_width() { return WIDTH; }

#define EXPORT(NAME, T)                                                                                                       \
    extern "C" int winograd_forward_##NAME(const T *x, const float *w, T *y, int64_t images, int64_t height, int64_t width,   \
                                           int64_t channels, int64_t outputs, int64_t threads) {                              \
        return forward<T>(x, w, y, images, height, width, channels, outputs, threads);                                        \
    }                                                                                                                         \
    extern "C" int winograd_backward_##NAME(const T *x, const T *g, const float *w, T *dx, float *dw, int64_t images,         \
                                            int64_t height, int64_t width, int64_t channels, int64_t outputs,                 \
                                            int64_t threads) {                                                                \
        return backward<T>(x, g, w, dx, dw, images, height, width, channels, outputs, threads);                               \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bf16)
