/* The passes over rows between a transformer block's matrix products, each reading and writing its arrays once.

   Compiled for one type at a time: T is float, or with -DBF16 sixteen bits of a bfloat16; arithmetic is in fp32. Arrays are
   contiguous. Texts lie one behind the other in `rows` (N, d), text i from starts[i] to starts[i + 1]; `heads` is (texts, H, W, d / H),
   with zeros behind each text. Dropout is drawn from a hash of the position and a seed, so that the backward pass draws the same. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t Int;

#ifdef BF16
typedef uint16_t T;
static inline float load(T x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline T store(float x) { /* rounds to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (T)(x != x ? 0x7fc0 : rounded);
}
#else
typedef float T;
static inline float load(T x) { return x; }
static inline T store(float x) { return x; }
#endif

/* e^x for x <= 0, relative error 2e-7: 2^n times a polynomial (Cephes expf); below -87 as at -87, and NaN where x is not finite.
   The limit is one of integers, since compilers make a branch of one of floats, and no vectors of a loop with branches. */
static inline float exp_of(float x) {
    uint32_t size;
    memcpy(&size, &x, 4);
    size &= 0x7fffffff;
    size = size < 0x42ae0000 ? size : 0x42ae0000;
    float clipped;
    memcpy(&clipped, &size, 4);
    clipped = -clipped;
    int32_t n = (int32_t)(clipped * 1.44269504f - 0.5f);
    float r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power + 0.f * x;
}

/* The probability of a standard normal below x, where bell = e^(-x^2 / 2); absolute error 1e-7 (Abramowitz and Stegun 7.1.26). */
static inline float normal_below(float x, float bell) {
    float a = fabsf(x) * 0.70710678f;
    float t = 1.f / (1.f + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return 0.5f + copysignf(0.5f - 0.5f * p * t * bell, x);
}

/* What dropout leaves of 1 at a position: 0, or 1 / (1 - rate). The finalizer of MurmurHash3. */
typedef struct {
    uint32_t seed, other, limit; /* rate * 2^32; 0 without dropout */
    float kept;
} Drop;

static inline float kept_of(Drop drop, uint32_t position) {
    uint32_t h = (position + drop.seed) * 0x9e3779b1u ^ drop.other;
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    return h < drop.limit ? 0.f : drop.kept;
}

static Drop drop_of(double rate, uint64_t seed) {
    return (Drop){(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)(rate * 4294967296.), (float)(1. / (1. - rate))};
}

/* heads = rows + bias (or rows where bias is null), a head at a time. */
void split(const T *rows, const T *bias, T *heads, const Int *starts, Int texts, Int H, Int W, Int d) {
    Int width = d / H;
#pragma omp parallel for
    for (Int text = 0; text < texts; text++) {
        Int n = starts[text + 1] - starts[text];
        for (Int h = 0; h < H; h++) {
            T *to = heads + (text * H + h) * W * width;
            for (Int i = 0; i < n; i++) {
                const T *from = rows + (starts[text] + i) * d + h * width;
                if (!bias)
                    memcpy(to + i * width, from, width * sizeof(T));
                else
#pragma omp simd
                    for (Int c = 0; c < width; c++)
                        to[i * width + c] = store(load(from[c]) + load(bias[h * width + c]));
            }
            memset(to + n * width, 0, (W - n) * width * sizeof(T));
        }
    }
}

/* The reverse of split; what stands behind a text is left out. */
void merge(const T *heads, T *rows, const Int *starts, Int texts, Int H, Int W, Int d) {
    Int width = d / H;
#pragma omp parallel for
    for (Int text = 0; text < texts; text++)
        for (Int i = 0; i < starts[text + 1] - starts[text]; i++)
            for (Int h = 0; h < H; h++)
                memcpy(rows + (starts[text] + i) * d + h * width, heads + ((text * H + h) * W + i) * width, width * sizeof(T));
}

/* Where a row of an array (texts, H, Q, W) begins, by its strides of the first three. */
static inline Int begin_of(const Int *strides, Int row, Int H, Int Q) {
    return row / (H * Q) * strides[0] + row / Q % H * strides[1] + row % Q * strides[2];
}

/* Scores (texts, H, Q, W) become probabilities over the tokens of their text, and 0 behind it: of softmax(scale scores + bias)
   over what the mask leaves, and 0 in a row that it leaves nothing of. Starts, bias and mask, each with its strides, may be null.
   `dropped`, if not null, becomes what dropout leaves of them. */
void softmax(T *scores, T *dropped, const Int *starts, const T *bias, const Int *of_bias, const uint8_t *mask, const Int *of_mask,
             Int texts, Int H, Int Q, Int W, float scale, double rate, uint64_t seed) {
    Drop drop = drop_of(rate, seed);
#pragma omp parallel for
    for (Int row = 0; row < texts * H * Q; row++) {
        Int text = row / (H * Q), n = starts ? starts[text + 1] - starts[text] : W;
        T *s = scores + row * W;
        float e[W], most = -INFINITY, sum = 0.f;
#pragma omp simd
        for (Int j = 0; j < n; j++)
            e[j] = load(s[j]) * scale;
        if (bias) {
            const T *own = bias + begin_of(of_bias, row, H, Q);
#pragma omp simd
            for (Int j = 0; j < n; j++)
                e[j] += load(own[j]);
        }
        const uint8_t *seen = mask ? mask + begin_of(of_mask, row, H, Q) : 0;
        if (seen)
#pragma omp simd
            for (Int j = 0; j < n; j++)
                e[j] = seen[j] ? e[j] : -3e38f;
#pragma omp simd reduction(max : most)
        for (Int j = 0; j < n; j++)
            most = e[j] > most ? e[j] : most;
#pragma omp simd
        for (Int j = 0; j < n; j++)
            e[j] = exp_of(e[j] - most);
        if (seen)
#pragma omp simd
            for (Int j = 0; j < n; j++)
                e[j] = seen[j] ? e[j] : 0.f;
#pragma omp simd reduction(+ : sum)
        for (Int j = 0; j < n; j++)
            sum += e[j];
        float share = sum == 0.f ? 0.f : 1.f / sum;
#pragma omp simd
        for (Int j = 0; j < n; j++)
            s[j] = store(e[j] * share);
        memset(s + n, 0, (W - n) * sizeof(T));
        if (dropped) {
#pragma omp simd
            for (Int j = 0; j < n; j++)
                dropped[row * W + j] = store(e[j] * share * kept_of(drop, (uint32_t)(row * W + j)));
            memset(dropped + row * W + n, 0, (W - n) * sizeof(T));
        }
    }
}

/* Attention of one query for each row: row i asks the first counts[i] keys of text rows[i], with a bias (H, counts) if not null.
   q and y (N, H, width), keys and values (texts, W, H, width). */
void attend_last(const T *q, const T *keys, const T *values, const T *bias, Int of_bias, const Int *rows, const Int *counts, T *y, Int N,
                 Int H, Int W, Int width) {
#pragma omp parallel for
    for (Int row = 0; row < N; row++) {
        Int n = counts[row], d = H * width; /* all heads of a token in turn, so that memory is read from end to end */
        const T *own = q + row * d, *key = keys + rows[row] * W * d, *value = values + rows[row] * W * d;
        float (*e)[n] = malloc(H * n * sizeof(float)), total[d]; /* of long texts too large for a thread's stack */
        for (Int j = 0; j < n; j++)
            for (Int h = 0; h < H; h++) {
                float score = 0.f;
#pragma omp simd reduction(+ : score)
                for (Int c = 0; c < width; c++)
                    score += load(own[h * width + c]) * load(key[j * d + h * width + c]);
                e[h][j] = score + (bias ? load(bias[h * of_bias + j]) : 0.f);
            }
        for (Int h = 0; h < H; h++) {
            float sum = 0.f, most = -INFINITY;
            for (Int j = 0; j < n; j++)
                most = e[h][j] > most ? e[h][j] : most;
#pragma omp simd reduction(+ : sum)
            for (Int j = 0; j < n; j++) {
                e[h][j] = exp_of(e[h][j] - most);
                sum += e[h][j];
            }
#pragma omp simd
            for (Int j = 0; j < n; j++)
                e[h][j] /= sum;
        }
        memset(total, 0, sizeof total);
        for (Int j = 0; j < n; j++)
            for (Int h = 0; h < H; h++)
#pragma omp simd
                for (Int c = 0; c < width; c++)
                    total[h * width + c] += e[h][j] * load(value[j * d + h * width + c]);
#pragma omp simd
        for (Int c = 0; c < d; c++)
            y[row * d + c] = store(total[c]);
        free(e);
    }
}

/* The place of the largest number of each row, the first of equal ones, and the log of its probability by softmax. */
void likeliest(const T *x, Int *place, float *log_p, Int N, Int d) {
#pragma omp parallel for
    for (Int row = 0; row < N; row++) {
        const T *own = x + row * d;
        float most = -INFINITY, sum = 0.f;
#pragma omp simd reduction(max : most)
        for (Int c = 0; c < d; c++)
            most = load(own[c]) > most ? load(own[c]) : most;
        Int at = 0;
        while (at < d - 1 && load(own[at]) != most)
            at++;
#pragma omp simd reduction(+ : sum)
        for (Int c = 0; c < d; c++)
            sum += exp_of(load(own[c]) - most);
        place[row] = at;
        log_p[row] = -logf(sum);
    }
}

/* From the gradient of the (dropped) probabilities p that of the scores, in place: scale p (g - sum p g). */
void softmax_backward(const T *p, T *grad, T *dropped, Int rows, Int W, float scale, double rate, uint64_t seed) {
    Drop drop = drop_of(rate, seed);
#pragma omp parallel for
    for (Int row = 0; row < rows; row++) {
        const T *own = p + row * W;
        T *g = grad + row * W;
        float by[W], sum = 0.f;
        if (dropped)
#pragma omp simd
            for (Int j = 0; j < W; j++) {
                float kept = kept_of(drop, (uint32_t)(row * W + j));
                by[j] = load(g[j]) * kept;
                dropped[row * W + j] = store(load(own[j]) * kept);
            }
        else
#pragma omp simd
            for (Int j = 0; j < W; j++)
                by[j] = load(g[j]);
#pragma omp simd reduction(+ : sum)
        for (Int j = 0; j < W; j++)
            sum += load(own[j]) * by[j];
#pragma omp simd
        for (Int j = 0; j < W; j++)
            g[j] = store(scale * load(own[j]) * (by[j] - sum));
    }
}

/* What dropout leaves of x; the same of its gradient. */
void dropout(const T *x, T *y, Int N, double rate, uint64_t seed) {
    Drop drop = drop_of(rate, seed);
#pragma omp parallel for simd
    for (Int i = 0; i < N; i++)
        y[i] = store(load(x[i]) * kept_of(drop, (uint32_t)i));
}

/* y = gain x / sqrt(mean x^2 + eps), and 1 / that root (Zhang and Sennrich 2019). */
void rms_norm(const T *x, const T *gain, T *y, float *inverse, Int N, Int d, float eps) {
#pragma omp parallel for
    for (Int row = 0; row < N; row++) {
        const T *own = x + row * d;
        float square = 0.f;
#pragma omp simd reduction(+ : square)
        for (Int c = 0; c < d; c++)
            square += load(own[c]) * load(own[c]);
        float scale = inverse[row] = 1.f / sqrtf(square / d + eps);
#pragma omp simd
        for (Int c = 0; c < d; c++)
            y[row * d + c] = store(load(own[c]) * scale * load(gain[c]));
    }
}

void rms_norm_backward(const T *grad, const T *x, const float *inverse, const T *gain, T *by_x, Int N, Int d) {
#pragma omp parallel for
    for (Int row = 0; row < N; row++) {
        const T *g = grad + row * d, *own = x + row * d;
        float along = 0.f, scale = inverse[row];
#pragma omp simd reduction(+ : along)
        for (Int c = 0; c < d; c++)
            along += load(g[c]) * load(gain[c]) * load(own[c]);
        along *= scale * scale * scale / d;
#pragma omp simd
        for (Int c = 0; c < d; c++)
            by_x[row * d + c] = store(scale * load(g[c]) * load(gain[c]) - along * load(own[c]));
    }
}

/* y = LayerNorm(residual + dropout(x + bias)) and, if not null, what the backward pass needs: z, the rows before gain and shift
   are applied, and 1 / their deviation. */
void add_norm(const T *x, const T *bias, const T *residual, const T *gain, const T *shift, T *y, T *z, float *inverse, Int N, Int d,
              float eps, double rate, uint64_t seed) {
    Drop drop = drop_of(rate, seed);
#pragma omp parallel for
    for (Int row = 0; row < N; row++) {
        float sum[d], mean = 0.f, square = 0.f;
        const T *own = x + row * d, *old = residual + row * d;
        if (drop.limit)
#pragma omp simd reduction(+ : mean)
            for (Int c = 0; c < d; c++) {
                sum[c] = load(old[c]) + (load(own[c]) + load(bias[c])) * kept_of(drop, (uint32_t)(row * d + c));
                mean += sum[c];
            }
        else
#pragma omp simd reduction(+ : mean)
            for (Int c = 0; c < d; c++) {
                sum[c] = load(old[c]) + load(own[c]) + load(bias[c]);
                mean += sum[c];
            }
        mean /= d;
#pragma omp simd reduction(+ : square)
        for (Int c = 0; c < d; c++) {
            sum[c] -= mean;
            square += sum[c] * sum[c];
        }
        float scale = 1.f / sqrtf(square / d + eps);
#pragma omp simd
        for (Int c = 0; c < d; c++)
            y[row * d + c] = store(sum[c] * scale * load(gain[c]) + load(shift[c]));
        if (z) {
            inverse[row] = scale;
#pragma omp simd
            for (Int c = 0; c < d; c++)
                z[row * d + c] = store(sum[c] * scale);
        }
    }
}

/* From the gradient of y those of the residual and, if not null, of x where dropout makes it another. */
void add_norm_backward(const T *grad, const T *z, const float *inverse, const T *gain, T *by_residual, T *by_x, Int N, Int d,
                       double rate, uint64_t seed) {
    Drop drop = drop_of(rate, seed);
#pragma omp parallel for
    for (Int row = 0; row < N; row++) {
        const T *g = grad + row * d, *own = z + row * d;
        float sum = 0.f, along = 0.f;
#pragma omp simd reduction(+ : sum, along)
        for (Int c = 0; c < d; c++) {
            float by = load(g[c]) * load(gain[c]);
            sum += by;
            along += by * load(own[c]);
        }
        sum /= d;
        along /= d;
#pragma omp simd
        for (Int c = 0; c < d; c++)
            by_residual[row * d + c] = store(inverse[row] * (load(g[c]) * load(gain[c]) - sum - load(own[c]) * along));
        if (by_x)
#pragma omp simd
            for (Int c = 0; c < d; c++)
                by_x[row * d + c] = store(load(by_residual[row * d + c]) * kept_of(drop, (uint32_t)(row * d + c)));
    }
}

/* y = GELU(x + bias) = (x + bias) P(normal < x + bias). */
void gelu(const T *x, const T *bias, T *y, Int N, Int d) {
#pragma omp parallel for
    for (Int row = 0; row < N; row++)
#pragma omp simd
        for (Int c = 0; c < d; c++) {
            float u = load(x[row * d + c]) + load(bias[c]);
            y[row * d + c] = store(u * normal_below(u, exp_of(-0.5f * u * u)));
        }
}

void gelu_backward(const T *grad, const T *x, const T *bias, T *by_x, Int N, Int d) {
#pragma omp parallel for
    for (Int row = 0; row < N; row++)
#pragma omp simd
        for (Int c = 0; c < d; c++) {
            float u = load(x[row * d + c]) + load(bias[c]), bell = exp_of(-0.5f * u * u);
            by_x[row * d + c] = store(load(grad[row * d + c]) * (normal_below(u, bell) + u * bell * 0.39894228f));
        }
}
