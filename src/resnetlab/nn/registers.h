// A register of float32 numbers, filled from and stored to float32 or bfloat16 numbers in memory. Sums need it: a compiler does
// not keep an array of sums in registers by itself.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // float32 numbers in a register
#else
constexpr int WIDTH = 8;
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct bf16 {
    uint16_t bits;
};

INLINE Floats load_all(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
INLINE Floats load_all(const bf16 *from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return Floats(__builtin_convertvector(h, Words) << 16);
}
INLINE void store_all(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }
INLINE void store_all(bf16 *to, Floats v) {  // to the nearest, ties to even; NaN stays NaN
    Words u = Words(v), nan = Words((u & 0x7fffffff) > 0x7f800000);
    Halves h = __builtin_convertvector((((u + 0x7fff + ((u >> 16) & 1)) >> 16) & ~nan) | (0x7fc0 & nan), Halves);
    std::memcpy(to, &h, sizeof h);
}
