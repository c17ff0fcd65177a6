// Crops of photographs on processors with AVX-512 for bytes (VBMI): torch's antialiased resize of bytes, and normalisation.
//
// The resize is Pillow's, with weights of 16 bits: each output pixel is a weighted mean of the pixels below a triangle, first
// along rows, then along columns, rounded to a byte each time. Pixels are RGB, 3 bytes one after the other.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#pragma GCC optimize("fp-contract=off")  // a product and a sum are rounded one after the other, as torch rounds them

namespace {

// The weights of input pixels first[i] ... first[i] + taps - 1 for output pixel i, in units of 2^-precision.
struct Filter {
    std::vector<int64_t> first;
    std::vector<int16_t> weights;  // (outputs, taps)
    int taps, precision = 0;       // taps are even: two are multiplied at once

    Filter(int64_t inputs, int64_t outputs) : first(outputs) {
        const double scale = double(inputs) / outputs, support = std::max(scale, 1.0), inverse = 1 / support;
        taps = (2 * int(std::ceil(support)) + 2) / 2 * 2;
        std::vector<double> exact(outputs * taps);
        double largest = 0;
        for (int64_t i = 0; i < outputs; i++) {
            const double centre = scale * (i + 0.5);
            first[i] = std::max(int64_t(centre - support + 0.5), int64_t(0));
            const int64_t count = std::min({int64_t(centre + support + 0.5) - first[i], inputs - first[i], int64_t(taps)});
            double *w = &exact[i * taps], total = 0;
            for (int64_t j = 0; j < count; j++) {
                const double distance = std::abs((j + first[i] - centre + 0.5) * inverse);
                total += w[j] = std::max(1 - distance, 0.0);
            }
            for (int64_t j = 0; j < count; j++) largest = std::max(largest, w[j] /= total);
        }
        while (precision < 22 && int(0.5 + largest * (1 << (precision + 1))) < 1 << 15) precision++;
        weights.reserve(exact.size());
        for (double w : exact) weights.push_back(int16_t(0.5 + w * (1 << precision)));
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
    __m512i places, weights;  // 32 numbers of 16 bits: two taps of each of 16 sums
};

// rows x (3 * width) bytes, `stride` apart -> rows x (3 * outputs). False if the bytes that a block needs fill no register.
bool resize_rows(const uint8_t *in, int64_t stride, int64_t rows, int64_t width, int64_t outputs, uint8_t *out) {
    const Filter filter(width, outputs);
    const int64_t pairs = filter.taps / 2;
    std::vector<Block> blocks;
    std::vector<Products> products;
    for (int64_t begin = 0; begin < outputs; begin += AT_ONCE) {
        const int64_t count = std::min<int64_t>(AT_ONCE, outputs - begin), from = filter.first[begin];
        const int64_t readable = std::min<int64_t>(64, 3 * (width - from));
        blocks.push_back({3 * from, ~__mmask64(0) >> (64 - readable), __mmask16((1 << (3 * count)) - 1)});
        for (int64_t p = 0; p < pairs; p++) {
            uint8_t places[64] = {};
            int16_t weights[32] = {};
            for (int64_t sum = 0; sum < 3 * count; sum++)
                for (int64_t k = 0; k < 2; k++) {
                    const int64_t i = begin + sum / 3, tap = 2 * p + k, place = 3 * (filter.first[i] - from + tap) + sum % 3;
                    const int16_t weight = filter.weights[i * filter.taps + tap];
                    if (!weight) continue;
                    if (place >= 64) return false;
                    places[4 * sum + 2 * k] = place;
                    weights[2 * sum + k] = weight;
                }
            products.push_back({_mm512_loadu_si512(places), _mm512_loadu_si512(weights)});
        }
    }
    const __m512i half = _mm512_set1_epi32(1 << (filter.precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(filter.precision);
    const __mmask64 low_bytes = 0x5555555555555555;
    for (int64_t y = 0; y < rows; y += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, rows - y);
        const Products *product = products.data();
        uint8_t *to = out + 3 * y * outputs;
        for (const Block &block : blocks) {
            __m512i bytes[ROWS], sums[ROWS];
            for (int64_t r = 0; r < ROWS; r++) {
                const uint8_t *row = in + (y + std::min(r, count - 1)) * stride;
                bytes[r] = _mm512_maskz_loadu_epi8(block.readable, row + block.from);
                sums[r] = half;
            }
            for (int64_t p = 0; p < pairs; p++, product++)
                for (int64_t r = 0; r < ROWS; r++) {
                    const __m512i two = _mm512_maskz_permutexvar_epi8(low_bytes, product->places, bytes[r]);
                    sums[r] = _mm512_add_epi32(sums[r], _mm512_madd_epi16(two, product->weights));
                }
            for (int64_t r = 0; r < count; r++)
                _mm_mask_storeu_epi8(to + 3 * r * outputs, block.written, _mm512_cvtusepi32_epi8(_mm512_sra_epi32(sums[r], shift)));
            to += 3 * AT_ONCE;
        }
    }
    return true;
}

// height x row bytes -> outputs x row.
void resize_columns(const uint8_t *in, int64_t height, int64_t row, int64_t outputs, uint8_t *out) {
    const Filter filter(height, outputs);
    const __m512i half = _mm512_set1_epi32(1 << (filter.precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(filter.precision);
    for (int64_t y = 0; y < outputs; y++) {
        const int16_t *weights = &filter.weights[y * filter.taps];
        const auto input = [&](int64_t tap) { return in + std::min(filter.first[y] + tap, height - 1) * row; };
        int64_t taps = filter.taps;
        while (taps > 2 && !weights[taps - 1] && !weights[taps - 2]) taps -= 2;
        for (int64_t x = 0; x < row; x += 32) {
            const __mmask32 some = ~__mmask32(0) >> (32 - std::min<int64_t>(32, row - x));
            __m512i low = half, high = half;
            for (int64_t tap = 0; tap < taps; tap += 2) {
                int32_t both;
                std::memcpy(&both, weights + tap, sizeof both);
                const __m512i weight = _mm512_set1_epi32(both);
                const __m512i one = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, input(tap) + x));
                const __m512i two = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, input(tap + 1) + x));
                low = _mm512_add_epi32(low, _mm512_madd_epi16(_mm512_unpacklo_epi16(one, two), weight));
                high = _mm512_add_epi32(high, _mm512_madd_epi16(_mm512_unpackhi_epi16(one, two), weight));
            }
            const __m512i sums = _mm512_packus_epi32(_mm512_sra_epi32(low, shift), _mm512_sra_epi32(high, shift));
            _mm256_mask_storeu_epi8(out + y * row + x, some, _mm512_cvtusepi16_epi8(sums));
        }
    }
}

}  // namespace

extern "C" int has_pixel_kernels() { return 1; }

// height x width pixels, rows `stride` bytes apart -> size x size. Returns 0 where it cannot: too wide, or no memory.
extern "C" int resize_pixels(const uint8_t *in, int64_t stride, int64_t height, int64_t width, int64_t size, uint8_t *out) try {
    if (height == size) return resize_rows(in, stride, height, width, size, out);
    std::vector<uint8_t> between(3 * height * size);
    if (width == size)
        for (int64_t y = 0; y < height; y++) std::memcpy(&between[3 * y * size], in + y * stride, 3 * size);
    else if (!resize_rows(in, stride, height, width, size, between.data()))
        return 0;
    resize_columns(between.data(), height, 3 * size, size, out);
    return 1;
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
