// A residual block of two 3x3 convolutions, y = relu(x + bn(conv(relu(bn(conv(x)))))), forward and backward in one call each. Maps
// are (B, H, W, C) with equally many channels everywhere; a plain block has no "x +".

#include <cstdint>
#include <new>
#include <vector>

#include "registers.h"

struct Norm {
    const float *weight, *bias;
    float *running_mean, *running_var, *mean, *inverse, *of_weight, *of_bias;
    float momentum, eps;
};
struct Shape {
    int64_t images, height, width, channels;
    int64_t positions() const { return images * height * width; }
};

// The functions of batchnorm.cpp and winograd.cpp, by the type of their first map.
#define OVERLOAD(NAME, T)                                                                                                     \
    extern "C" void forward_##NAME(const T *, const T *, T *, const float *, const float *, float *, float *, float *, float *, \
                                   int64_t, int64_t, float, float, int, int);                                                 \
    extern "C" void backward_##NAME(const T *, const T *, const T *, T *, T *, const float *, const float *, const float *,   \
                                    float *, float *, int64_t, int64_t, int, int);                                            \
    extern "C" int winograd_forward_##NAME(const T *, const float *, T *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t); \
    extern "C" int winograd_backward_##NAME(const T *, const T *, const float *, T *, float *, int64_t, int64_t, int64_t,     \
                                            int64_t, int64_t, int64_t);                                                       \
    template <typename... R> void norm_forward(const T *x, R... rest) { forward_##NAME(x, rest...); }                         \
    template <typename... R> void norm_backward(const T *g, R... rest) { backward_##NAME(g, rest...); }                       \
    template <typename... R> int conv_forward(const T *x, R... rest) { return winograd_forward_##NAME(x, rest...); }          \
    template <typename... R> int conv_backward(const T *x, R... rest) { return winograd_backward_##NAME(x, rest...); }

OVERLOAD(float32, float)
OVERLOAD(bfloat16, bf16)

// Weights (K, 3, 3, C) as (3, 3, C, K).
static std::vector<float> turn(const float *w, int64_t channels) {
    std::vector<float> taps(9 * channels * channels);
    for (int64_t k = 0; k < channels; k++)
        for (int64_t i = 0; i < 9 * channels; i++) taps[i * channels + k] = w[k * 9 * channels + i];
    return taps;
}

// a = conv(x), b = relu(bn(a)), c = conv(b), y = relu(bn(c) + x).
template <typename T>
static bool forward(const T *x, T *a, T *b, T *c, T *y, const float *w1, const float *w2, const Norm *norms, const Shape &s,
                    bool add) {
    const auto conv = [&](const T *from, const float *w, T *to) {
        return conv_forward(from, turn(w, s.channels).data(), to, s.images, s.height, s.width, s.channels, s.channels,
                            int64_t{1});
    };
    const auto norm = [&](const T *from, const T *z, T *to, const Norm &n) {
        norm_forward(from, z, to, n.weight, n.bias, n.running_mean, n.running_var, n.mean, n.inverse, s.positions(),
                     s.channels, n.momentum, n.eps, 1, 1);
    };
    if (!conv(x, w1, a)) return false;
    norm(a, nullptr, b, norms[0]);
    if (!conv(b, w2, c)) return false;
    norm(c, add ? x : nullptr, y, norms[1]);
    return true;
}

// The gradients dx, dw1 and dw2 where that of y is g; `one` and `two` are room for a map, and `dz`, if x is added.
template <typename T>
static bool backward(const T *g, const T *x, const T *a, const T *b, const T *c, const T *y, T *one, T *two, T *dz, T *dx,
                     const float *w1, const float *w2, float *dw1, float *dw2, const Norm *norms, const Shape &s) {
    const auto conv = [&](const T *from, const T *of_out, const float *w, T *of_in, float *dw) {
        return conv_backward(from, of_out, w, of_in, dw, s.images, s.height, s.width, s.channels, s.channels, int64_t{1});
    };
    const auto norm = [&](const T *of_out, const T *from, const T *to, T *of_in, T *of_z, const Norm &n) {
        norm_backward(of_out, from, to, of_in, of_z, n.weight, n.mean, n.inverse, n.of_weight, n.of_bias, s.positions(),
                      s.channels, 1, 1);
    };
    norm(g, c, y, one, dz, norms[1]);
    if (!conv(b, one, w2, two, dw2)) return false;
    norm(two, a, b, one, nullptr, norms[0]);
    if (!conv(x, one, w1, dx, dw1)) return false;
    for (int64_t i = 0; dz && i < s.positions() * s.channels; i += WIDTH) store_all(dx + i, load_all(dx + i) + load_all(dz + i));
    return true;
}

// Both return 0 if there is no memory.
#define EXPORT(NAME, T)                                                                                                       \
    extern "C" int block_forward_##NAME(const T *x, T *a, T *b, T *c, T *y, const float *w1, const float *w2,                 \
                                        const Norm *norms, const Shape *shape, int add) {                                     \
        try {                                                                                                                 \
            return forward(x, a, b, c, y, w1, w2, norms, *shape, add);                                                        \
        } catch (const std::bad_alloc &) {                                                                                    \
            return 0;                                                                                                         \
        }                                                                                                                     \
    }                                                                                                                         \
    extern "C" int block_backward_##NAME(const T *g, const T *x, const T *a, const T *b, const T *c, const T *y, T *one,      \
                                         T *two, T *dz, T *dx, const float *w1, const float *w2, float *dw1, float *dw2,      \
                                         const Norm *norms, const Shape *shape) {                                             \
        try {                                                                                                                 \
            return backward(g, x, a, b, c, y, one, two, dz, dx, w1, w2, dw1, dw2, norms, *shape);                             \
        } catch (const std::bad_alloc &) {                                                                                    \
            return 0;                                                                                                         \
        }                                                                                                                     \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bf16)
