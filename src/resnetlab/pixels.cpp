// Photographs on processors with AVX-512 for bytes (VBMI): antialiased resize of bytes as Pillow and torch do it, normalisation.
//
// Each output pixel is a weighted mean of input pixels, first along rows, then along columns, rounded to a byte each time. Pillow's
// weights have 22 bits after the point, torch's as many as fit 16 bits. Pixels are RGB, 3 bytes one after the other.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#pragma GCC optimize("fp-contract=off")  // a product and a sum are rounded one after the other, as torch and Pillow round them

namespace {

enum Method { TORCH_BILINEAR, PILLOW_BILINEAR, PILLOW_BICUBIC };

double weigh(Method method, double x) {
    x = std::abs(x);
    if (method != PILLOW_BICUBIC) return x < 1 ? 1 - x : 0;
    const double a = -0.5;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

constexpr int LOW_BITS = 11;  // of Pillow's weights; the rest fits 16 bits too

// The weights of input pixels first[i] ... first[i] + taps - 1 for the output pixels begin + i, in units of 2^-precision; as
// 16-bit numbers, which are multiplied two at once: weight = high * 2^LOW_BITS + low for Pillow, high for torch.
struct Filter {
    std::vector<int64_t> first;
    std::vector<int16_t> high, low;  // (count, taps)
    int taps, precision = 0;
    bool is_split;

    Filter(Method method, int64_t inputs, int64_t outputs, int64_t begin, int64_t count) : first(count) {
        const double scale = double(inputs) / outputs, stretch = std::max(scale, 1.0), inverse = 1 / stretch;
        const double support = (method == PILLOW_BICUBIC ? 2 : 1) * stretch;
        taps = (2 * int(std::ceil(support)) + 2) / 2 * 2;
        std::vector<double> exact(count * taps);
        double largest = 0;
        for (int64_t i = 0; i < count; i++) {
            const double centre = scale * (begin + i + 0.5);
            first[i] = std::max(int64_t(centre - support + 0.5), int64_t(0));
            const int64_t used = std::min({int64_t(centre + support + 0.5) - first[i], inputs - first[i], int64_t(taps)});
            double *w = &exact[i * taps], total = 0;
            for (int64_t j = 0; j < used; j++) total += w[j] = weigh(method, (j + first[i] - centre + 0.5) * inverse);
            for (int64_t j = 0; j < used; j++) largest = std::max(largest, w[j] /= total);
        }
        is_split = method != TORCH_BILINEAR;
        while (precision < 22 && (is_split || int(0.5 + largest * (1 << (precision + 1))) < 1 << 15)) precision++;
        high.resize(exact.size());
        low.resize(exact.size());
        for (size_t i = 0; i < exact.size(); i++) {
            const int weight = int((exact[i] < 0 ? -0.5 : 0.5) + exact[i] * (1 << precision));
            high[i] = is_split ? weight >> LOW_BITS : weight;
            low[i] = is_split ? weight & ((1 << LOW_BITS) - 1) : 0;
        }
    }
};

// Sums of products in 32 bits, rounded to bytes.
template <bool SPLIT> struct Sums {
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();

    void add(__m512i pairs, __m512i by_high, __m512i by_low) {
        high = _mm512_add_epi32(high, _mm512_madd_epi16(pairs, by_high));
        if (SPLIT) low = _mm512_add_epi32(low, _mm512_madd_epi16(pairs, by_low));
    }
    __m512i round(int precision) const {  // 0 or more
        const __m512i sum = SPLIT ? _mm512_add_epi32(_mm512_slli_epi32(high, LOW_BITS), low) : high;
        const __m512i half = _mm512_set1_epi32(1 << (precision - 1));
        const __m512i shifted = _mm512_sra_epi32(_mm512_add_epi32(sum, half), _mm_cvtsi32_si128(precision));
        return _mm512_max_epi32(shifted, _mm512_setzero_si512());
    }
};

constexpr int AT_ONCE = 5;  // output pixels whose 15 bytes are summed in one register
constexpr int ROWS = 4;     // that share what is loaded for them

// Output pixels side by side. All bytes that they need fill at most one register, of which a permutation takes two for each sum.
struct Block {
    int64_t from;        // first byte in a row
    __mmask64 readable;  // bytes of the row from there on
    __mmask16 written;
};

struct Products {
    __m512i places, high, low;  // 32 numbers of 16 bits: two taps of each of 16 sums
};

// rows x (3 * width) bytes, `stride` apart -> rows x (3 * outputs). False if the bytes that a block needs fill no register.
template <bool SPLIT>
bool resize_rows(const Filter &filter, const uint8_t *in, int64_t stride, int64_t rows, int64_t width, uint8_t *out) {
    const int64_t pairs = filter.taps / 2, outputs = filter.first.size();
    std::vector<Block> blocks;
    std::vector<Products> products;
    for (int64_t begin = 0; begin < outputs; begin += AT_ONCE) {
        const int64_t count = std::min<int64_t>(AT_ONCE, outputs - begin), from = filter.first[begin];
        const int64_t readable = std::min<int64_t>(64, 3 * (width - from));
        blocks.push_back({3 * from, ~__mmask64(0) >> (64 - readable), __mmask16((1 << (3 * count)) - 1)});
        for (int64_t p = 0; p < pairs; p++) {
            uint8_t places[64] = {};
            int16_t high[32] = {}, low[32] = {};
            for (int64_t sum = 0; sum < 3 * count; sum++)
                for (int64_t k = 0; k < 2; k++) {
                    const int64_t i = begin + sum / 3, tap = 2 * p + k, place = 3 * (filter.first[i] - from + tap) + sum % 3;
                    high[2 * sum + k] = filter.high[i * filter.taps + tap];
                    low[2 * sum + k] = filter.low[i * filter.taps + tap];
                    if (!high[2 * sum + k] && !low[2 * sum + k]) continue;
                    if (place >= 64) return false;
                    places[4 * sum + 2 * k] = place;
                }
            products.push_back({_mm512_loadu_si512(places), _mm512_loadu_si512(high), _mm512_loadu_si512(low)});
        }
    }
    const __mmask64 low_bytes = 0x5555555555555555;
    for (int64_t y = 0; y < rows; y += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, rows - y);
        const Products *product = products.data();
        uint8_t *to = out + 3 * y * outputs;
        for (const Block &block : blocks) {
            __m512i bytes[ROWS];
            Sums<SPLIT> sums[ROWS];
            for (int64_t r = 0; r < ROWS; r++) {
                const uint8_t *row = in + (y + std::min(r, count - 1)) * stride;
                bytes[r] = _mm512_maskz_loadu_epi8(block.readable, row + block.from);
            }
            for (int64_t p = 0; p < pairs; p++, product++)
                for (int64_t r = 0; r < ROWS; r++)
                    sums[r].add(_mm512_maskz_permutexvar_epi8(low_bytes, product->places, bytes[r]), product->high, product->low);
            for (int64_t r = 0; r < count; r++)
                _mm_mask_storeu_epi8(to + 3 * r * outputs, block.written,
                                     _mm512_cvtusepi32_epi8(sums[r].round(filter.precision)));
            to += 3 * AT_ONCE;
        }
    }
    return true;
}

// height x row bytes, of which `in` has the rows from `above` on -> one row for each of the filter's outputs.
template <bool SPLIT>
void resize_columns(const Filter &filter, const uint8_t *in, int64_t above, int64_t height, int64_t row, uint8_t *out) {
    for (size_t y = 0; y < filter.first.size(); y++, out += row) {
        const int16_t *high = &filter.high[y * filter.taps], *low = &filter.low[y * filter.taps];
        const auto input = [&](int64_t tap) { return in + (std::min(filter.first[y] + tap, height - 1) - above) * row; };
        const auto pair = [](const int16_t *two) {
            int32_t both;
            std::memcpy(&both, two, sizeof both);
            return _mm512_set1_epi32(both);
        };
        int64_t taps = filter.taps;
        while (taps > 2 && !high[taps - 1] && !high[taps - 2] && !low[taps - 1] && !low[taps - 2]) taps -= 2;
        for (int64_t x = 0; x < row; x += 32) {
            const __mmask32 some = ~__mmask32(0) >> (32 - std::min<int64_t>(32, row - x));
            Sums<SPLIT> even, odd;  // of each 128 bits the first four and the last four bytes
            for (int64_t tap = 0; tap < taps; tap += 2) {
                const __m512i one = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, input(tap) + x));
                const __m512i two = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, input(tap + 1) + x));
                even.add(_mm512_unpacklo_epi16(one, two), pair(high + tap), pair(low + tap));
                odd.add(_mm512_unpackhi_epi16(one, two), pair(high + tap), pair(low + tap));
            }
            const __m512i words = _mm512_packus_epi32(even.round(filter.precision), odd.round(filter.precision));
            _mm256_mask_storeu_epi8(out + x, some, _mm512_cvtusepi16_epi8(words));
        }
    }
}

struct Size {
    int64_t height, width;
};

struct Part {
    int64_t top, left, height, width;
};

template <bool SPLIT>
bool resize(Method method, const uint8_t *in, int64_t stride, Size from, Size to, Part part, uint8_t *out) {
    const Filter down(method, from.height, to.height, part.top, part.height);
    int64_t first = part.top, last = part.top + part.height;  // rows that are needed
    if (from.height != to.height) first = down.first.front(), last = std::min(down.first.back() + down.taps, from.height);
    in += first * stride;
    const int64_t rows = last - first;
    std::vector<uint8_t> between(from.height == to.height ? 0 : 3 * rows * part.width);
    uint8_t *across = between.empty() ? out : between.data();
    if (from.width == to.width)
        for (int64_t y = 0; y < rows; y++) std::memcpy(across + 3 * y * part.width, in + y * stride + 3 * part.left, 3 * part.width);
    else if (!resize_rows<SPLIT>({method, from.width, to.width, part.left, part.width}, in, stride, rows, from.width, across))
        return false;
    if (!between.empty()) resize_columns<SPLIT>(down, across, first, from.height, 3 * part.width, out);
    return true;
}

}  // namespace

extern "C" int has_pixel_kernels() { return 1; }

// The part of top, left, height and width of an image that is resized from `from` (height, width) to `to`; its rows are `stride`
// bytes apart. Returns 0 where it cannot: reduced too much, or no memory.
extern "C" int resize_pixels(int method, const uint8_t *in, int64_t stride, const int64_t *from, const int64_t *to,
                             const int64_t *part, uint8_t *out) try {
    const auto run = method == TORCH_BILINEAR ? resize<false> : resize<true>;
    return run(Method(method), in, stride, {from[0], from[1]}, {to[0], to[1]}, {part[0], part[1], part[2], part[3]}, out);
} catch (const std::bad_alloc &) {
    return 0;
}

// Images of height x width pixels, each left to right or mirrored -> float32 of byte * scale - shift, where scale and shift are
// 3 numbers.
extern "C" void normalise_pixels(const uint8_t *in, int64_t images, int64_t height, int64_t width, const bool *mirrored,
                                 const float *scale, const float *shift, float *out) {
    __m512 scales[3], shifts[3];
    uint8_t turned[64] = {};  // 16 pixels from the last to the first
    for (int i = 0; i < 48; i++) {
        scales[i / 16][i % 16] = scale[i % 3];
        shifts[i / 16][i % 16] = shift[i % 3];
        turned[i] = (15 - i / 3) * 3 + i % 3;
    }
    const __m512i turn = _mm512_loadu_si512(turned);
    for (int64_t y = 0; y < images * height; y++, in += 3 * width, out += 3 * width)
        for (int64_t x = 0; x < width; x += 16) {
            const int64_t bytes = 3 * std::min<int64_t>(16, width - x);
            const __mmask64 some = ~__mmask64(0) >> (64 - bytes);
            __m512i pixels;
            if (mirrored[y / height])
                pixels = _mm512_permutexvar_epi8(turn, _mm512_maskz_loadu_epi8(some << (48 - bytes), in + 3 * (width - x - 16)));
            else
                pixels = _mm512_maskz_loadu_epi8(some, in + 3 * x);
            const __m128i parts[] = {_mm512_extracti32x4_epi32(pixels, 0), _mm512_extracti32x4_epi32(pixels, 1),
                                     _mm512_extracti32x4_epi32(pixels, 2)};
            for (int i = 0; i < 3; i++) {
                const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(parts[i]));
                _mm512_mask_storeu_ps(out + 3 * x + 16 * i, __mmask16(some >> (16 * i)),
                                      _mm512_sub_ps(_mm512_mul_ps(values, scales[i]), shifts[i]));
            }
        }
}

#else
extern "C" int has_pixel_kernels() { return 0; }
#endif
