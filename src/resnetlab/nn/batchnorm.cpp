// BN, an addition and ReLU in one function, forward and backward: y = relu(bn(x) + z), on maps in channels_last memory.
//
// A map of `rows` positions with C channels each is contiguous. Inputs and outputs are float32 or bfloat16; statistics,
// weights and their gradients are float32. Sums are taken in float32 over a few dozen numbers and in float64 over those sums.
// Loops over channels have no dependencies, so that the compiler vectorises them for the machine it runs on; narrow maps are
// treated as fewer, longer rows of several positions ("lanes").

#include <algorithm>
#include <cmath>
#include <vector>

#include "registers.h"

constexpr int REGISTERS = 4;
constexpr int STRIP = WIDTH * REGISTERS;  // lanes that are summed together, in registers
constexpr int64_t LANES = 256;            // lanes of a row, at least, unless a map is smaller
constexpr int64_t BLOCK = 64;             // rows that are summed in float32

INLINE float load(float v) { return v; }
INLINE float load(bf16 v) {
    uint32_t u = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
// The gradient of ReLU, which passes it where y is above `lowest`. Both values are loaded before the choice: a load that depends on a
// condition would not be vectorised.
template <typename T> INLINE float pass(T gradient, T y, float lowest) {
    float g = load(gradient), value = load(y);
    return value <= lowest ? 0.0f : g;
}
INLINE void store(float &to, float v) { to = v; }
INLINE void store(bf16 &to, float v) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t u;
    std::memcpy(&u, &v, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// The same for a register of numbers.
INLINE Floats pass_all(Floats gradient, Floats y, float lowest) { return Floats(Words(gradient) & ~Words(y <= lowest)); }

struct Lanes {
    int64_t channels, lanes, rows, rest;  // `rest` lanes after the last full row
    Lanes(int64_t positions, int64_t c) : channels(c) {
        int64_t together = std::max<int64_t>(1, std::min(LANES / c, positions));
        lanes = together * c;
        rows = positions / together;
        rest = positions % together * c;
    }
    template <typename V> std::vector<V> spread(const V *values) const {  // one value of each channel -> one of each lane
        std::vector<V> spread(lanes);
        for (int64_t j = 0; j < lanes; j++) spread[j] = values[j % channels];
        return spread;
    }
};

// Calls strip(first element, number of rows, first lane) for strips of rows, in blocks of rows, and one(element, lane) for the
// numbers of lanes and rows that are left over.
template <typename F, typename G> INLINE void for_strips(const Lanes &shape, F strip, G one) {
    for (int64_t first = 0; first < shape.rows; first += BLOCK) {
        const int64_t count = std::min(BLOCK, shape.rows - first), start = first * shape.lanes;
        int64_t lane = 0;
        for (; lane + STRIP <= shape.lanes; lane += STRIP) strip(start + lane, count, lane);
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = lane; j < shape.lanes; j++) one(start + i * shape.lanes + j, j);
    }
    for (int64_t lane = 0; lane < shape.rest; lane++) one(shape.rows * shape.lanes + lane, lane);
}

template <typename F> INLINE void for_rows(const Lanes &shape, F f) {
    for (int64_t row = 0; row < shape.rows; row++) f(row * shape.lanes, shape.lanes);
    if (shape.rest) f(shape.rows * shape.lanes, shape.rest);
}

INLINE void sum_channels(const Lanes &shape, const std::vector<double> &lanes, std::vector<double> &channels) {
    for (int64_t j = 0; j < shape.lanes; j++) channels[j % shape.channels] += lanes[j];
}

template <typename T>
static void batch_statistics(const T *x, const Lanes &shape, std::vector<double> &mean, std::vector<double> &variance) {
    // relative to the first position, so that a large mean costs no digits
    std::vector<float> shift(shape.channels);
    for (int64_t c = 0; c < shape.channels; c++) shift[c] = std::isfinite(load(x[c])) ? load(x[c]) : 0.0f;
    std::vector<float> base = shape.spread(shift.data());
    std::vector<double> sums(shape.lanes), squares(shape.lanes);
    for_strips(
        shape,
        [&](int64_t start, int64_t count, int64_t lane) __attribute__((always_inline)) {
            Floats s[REGISTERS] = {}, q[REGISTERS] = {}, k[REGISTERS];
            for (int r = 0; r < REGISTERS; r++) k[r] = load_all(base.data() + lane + r * WIDTH);
            for (int64_t i = 0; i < count; i++)
                for (int r = 0; r < REGISTERS; r++) {
                    Floats v = load_all(x + start + i * shape.lanes + r * WIDTH) - k[r];
                    s[r] += v;
                    q[r] += v * v;
                }
            for (int j = 0; j < STRIP; j++) {
                sums[lane + j] += s[j / WIDTH][j % WIDTH];
                squares[lane + j] += q[j / WIDTH][j % WIDTH];
            }
        },
        [&](int64_t at, int64_t lane) __attribute__((always_inline)) {
            float v = load(x[at]) - base[lane];
            sums[lane] += v;
            squares[lane] += v * v;
        });
    mean.assign(shape.channels, 0);
    variance.assign(shape.channels, 0);
    sum_channels(shape, sums, mean);
    sum_channels(shape, squares, variance);
    double n = double(shape.rows) * double(shape.lanes / shape.channels) + double(shape.rest / shape.channels);
    for (int64_t c = 0; c < shape.channels; c++) {
        double m = mean[c] / n, v = variance[c] / n - m * m;
        variance[c] = v < 0 ? 0 : v;  // NaN stays NaN
        mean[c] = m + shift[c];
    }
}

template <typename T>
static void forward(const T *x, const T *z, T *y, const float *weight, const float *bias, float *running_mean,
                    float *running_var, float *mean, float *inverse, int64_t positions, int64_t channels, float momentum,
                    float eps, int relu, int live) {
    Lanes shape(positions, channels);
    std::vector<double> m(running_mean, running_mean + channels), v(running_var, running_var + channels);
    if (live) {
        batch_statistics(x, shape, m, v);
        for (int64_t c = 0; c < channels; c++) {
            running_mean[c] = float((1.0 - momentum) * running_mean[c] + momentum * m[c]);
            running_var[c] = float((1.0 - momentum) * running_var[c] + momentum * v[c] * positions / (positions - 1.0));
        }
    }
    std::vector<float> scale(channels), shift(channels);
    for (int64_t c = 0; c < channels; c++) {
        double inv = 1 / std::sqrt(v[c] + eps);
        mean[c] = float(m[c]);
        inverse[c] = float(inv);
        scale[c] = float(weight[c] * inv);
        shift[c] = float(bias[c] - m[c] * weight[c] * inv);
    }
    std::vector<float> a = shape.spread(scale.data()), b = shape.spread(shift.data());
    const float lowest = relu ? 0.0f : -INFINITY;
    for_rows(shape, [&](int64_t start, int64_t width) {
        const T *__restrict px = x + start, *__restrict pz = z + start;
        const float *__restrict pa = a.data(), *__restrict pb = b.data();
        T *__restrict out = y + start;
        if (z)
            for (int64_t j = 0; j < width; j++) {
                float value = load(px[j]) * pa[j] + pb[j] + load(pz[j]);
                store(out[j], value < lowest ? lowest : value);  // NaN stays NaN
            }
        else
            for (int64_t j = 0; j < width; j++) {
                float value = load(px[j]) * pa[j] + pb[j];
                store(out[j], value < lowest ? lowest : value);
            }
    });
}

// The gradient g counts where y is above `lowest`: 0 with ReLU; without it y is any finite map. That is written to dz, if there is
// one, since the addition passes it on.
template <typename T>
static void backward(const T *g, const T *x, const T *y, T *dx, T *dz, const float *weight, const float *mean,
                     const float *inverse, float *dweight, float *dbias, int64_t positions, int64_t channels, int relu,
                     int live) {
    Lanes shape(positions, channels);
    std::vector<float> mu = shape.spread(mean);
    std::vector<double> lane_sums(shape.lanes), lane_products(shape.lanes), sums(channels), products(channels);
    float lowest = relu ? 0.0f : -INFINITY;
    for_strips(
        shape,
        [&](int64_t start, int64_t count, int64_t lane) __attribute__((always_inline)) {
            Floats s[REGISTERS] = {}, q[REGISTERS] = {}, m[REGISTERS];
            for (int r = 0; r < REGISTERS; r++) m[r] = load_all(mu.data() + lane + r * WIDTH);
            for (int64_t i = 0; i < count; i++)
                for (int r = 0; r < REGISTERS; r++) {
                    const int64_t at = start + i * shape.lanes + r * WIDTH;
                    Floats t = pass_all(load_all(g + at), load_all(y + at), lowest);
                    s[r] += t;
                    q[r] += t * (load_all(x + at) - m[r]);
                    if (dz) store_all(dz + at, t);
                }
            for (int j = 0; j < STRIP; j++) {
                lane_sums[lane + j] += s[j / WIDTH][j % WIDTH];
                lane_products[lane + j] += q[j / WIDTH][j % WIDTH];
            }
        },
        [&](int64_t at, int64_t lane) __attribute__((always_inline)) {
            float t = pass(g[at], y[at], lowest);
            lane_sums[lane] += t;
            lane_products[lane] += t * (load(x[at]) - mu[lane]);
            if (dz) store(dz[at], t);
        });
    sum_channels(shape, lane_sums, sums);
    sum_channels(shape, lane_products, products);
    std::vector<float> scale(channels), slope(channels), offset(channels);
    for (int64_t c = 0; c < channels; c++) {
        dbias[c] = float(sums[c]);
        dweight[c] = float(products[c] * inverse[c]);
        double a = double(weight[c]) * inverse[c];
        scale[c] = float(a);
        slope[c] = float(-a * products[c] * inverse[c] * inverse[c] / positions);
        offset[c] = float(-a * sums[c] / positions);
    }
    if (dz) {  // the gradient as it was written
        g = y = dz;
        lowest = -INFINITY;
    }
    std::vector<float> a = shape.spread(scale.data()), k = shape.spread(slope.data()), b = shape.spread(offset.data());
    for_rows(shape, [&](int64_t start, int64_t width) {
        const T *__restrict pg = g + start, *__restrict px = x + start, *__restrict py = y + start;
        const float *__restrict pa = a.data(), *__restrict pk = k.data(), *__restrict pb = b.data(), *__restrict pm = mu.data();
        T *__restrict out = dx + start;
        if (live)
            for (int64_t j = 0; j < width; j++) {
                float t = pass(pg[j], py[j], lowest);
                store(out[j], t * pa[j] + ((load(px[j]) - pm[j]) * pk[j] + pb[j]));
            }
        else
            for (int64_t j = 0; j < width; j++) store(out[j], pass(pg[j], py[j], lowest) * pa[j]);
    });
}

#define EXPORT(NAME, T)                                                                                                       \
    extern "C" void forward_##NAME(const T *x, const T *z, T *y, const float *weight, const float *bias, float *running_mean, \
                                   float *running_var, float *mean, float *inverse, int64_t positions, int64_t channels,      \
                                   float momentum, float eps, int relu, int live) {                                           \
        forward<T>(x, z, y, weight, bias, running_mean, running_var, mean, inverse, positions, channels, momentum, eps, relu, \
                   live);                                                                                                     \
    }                                                                                                                         \
    extern "C" void backward_##NAME(const T *g, const T *x, const T *y, T *dx, T *dz, const float *weight, const float *mean, \
                                    const float *inverse, float *dweight, float *dbias, int64_t positions, int64_t channels,  \
                                    int relu, int live) {                                                                     \
        backward<T>(g, x, y, dx, dz, weight, mean, inverse, dweight, dbias, positions, channels, relu, live);                 \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bf16)
