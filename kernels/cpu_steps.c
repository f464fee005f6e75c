/* What a CPU step does between its products, in one pass over the numbers each. Compiled by kernels/native.py.

T = tokens of the step, R = rows (requests), N = query heads, K = key/value heads, G = N / K, H = head size, S = tokens
in a block, X = queries of one key/value head: (token, g) pairs. Keys and values lie in blocks [B, S, K, H].

The file includes itself once a number type: NUMBER with READ and WRITE to and from float. All arithmetic is float.
*/

#ifndef NUMBER

#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define PAIRS 64 /* queries taken together: four vectors */
#define KEYS 64  /* keys taken together */
#define MOST_HEAD 256
#define MOST_GROUP 16 /* query heads of a key/value head that a decode row takes at once */
#define STATE 4096    /* numbers of all its query heads together: MOST_GROUP * MOST_HEAD */
#define INLINE static inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(LANES), aligned(4), may_alias));

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    int64_t num_tokens, num_rows, num_heads, num_kv_heads, head_size, rotated, block_size;
    int64_t table_stride, window; /* 0: none */
    int32_t interleaved, num_threads;
    float scale, eps;
    const int64_t *positions_T, *slots_T;
    const int32_t *starts_R1, *lengths_R, *table_RB;
    const float *cos_sin_PH;              /* or null: nothing is rotated */
    void *qkv_TD, *k_cache, *v_cache;
    const void *norm_XH;                  /* or null: heads are not normed */
    void *out_TD;
} Attention;

INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE uint16_t to_bfloat(float x) {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

/* e^x, to 2 units in the last place, between 2^-126 and 2^127 */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float whole = __builtin_rintf(x * 1.44269504f);
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return y * bits_to_float((uint32_t)((int32_t)whole + 127) << 23);
}

INLINE float add_lanes(Vector x) {
    const Half *halves = (const Half *)&x;
    Half half = halves[0] + halves[1];
    const Quarter *quarters = (const Quarter *)&half;
    Quarter four = quarters[0] + quarters[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* One step of a product: the sums of `rows` tokens and 64 outputs, from one input of each (bfloat16: two). */
#define ROWS 6
#define OUTPUTS (4 * LANES)
#define INPUTS 1024 /* whose weights for 64 outputs stay in the core's own cache */
#define CHUNK 48 /* tokens that a piece of work takes through the weights of 64 outputs */

INLINE void step_float32(Vector sums[ROWS][4], const float *x, int64_t stride, const float *weights, const int rows) {
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 4; w++) sums[r][w] += x[r * stride] * *(const Vector *)(weights + w * LANES);
}

INLINE void step_bfloat16(Vector sums[ROWS][4], const uint16_t *x, int64_t stride, const uint16_t *weights,
                          const int rows) {
    for (int r = 0; r < rows; r++) {
        uint32_t both;
        memcpy(&both, x + r * stride, 4);
        for (int w = 0; w < 4; w++) {
            const uint16_t *from = weights + 2 * w * LANES;
#ifdef __AVX512BF16__
            sums[r][w] = (Vector)_mm512_dpbf16_ps((__m512)sums[r][w], (__m512bh)_mm512_set1_epi32((int)both),
                                                  (__m512bh)_mm512_loadu_si512(from));
#else
            Words pairs = *(const Words *)from;
            sums[r][w] += bits_to_float(both << 16) * (Vector)(pairs << 16);
            sums[r][w] += bits_to_float(both & 0xffff0000u) * (Vector)(pairs & 0xffff0000u);
#endif
        }
    }
}

#define NUMBER float
#define AT_ONCE 1
#define NAME(name) name##_float32
#define READ(x) (x)
#define WRITE(x) (x)
#include __FILE__
#undef NUMBER
#undef AT_ONCE
#undef NAME
#undef READ
#undef WRITE

#define NUMBER uint16_t
#define AT_ONCE 2
#define NAME(name) name##_bfloat16
#define READ(x) bits_to_float((uint32_t)(x) << 16)
#define WRITE(x) to_bfloat(x)
#include __FILE__

#else

/* residual += delta (if any); out = residual / sqrt(mean(residual^2) + eps) * weight */
void NAME(rms_norm)(const NUMBER *delta_TD, NUMBER *residual_TD, const NUMBER *weight_D, NUMBER *out_TD,
                    int64_t num_tokens, int64_t width, float eps, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t t = 0; t < num_tokens; t++) {
        NUMBER *x = residual_TD + t * width, *out = out_TD + t * width;
        float sum = 0.0f;
        if (delta_TD) {
            const NUMBER *delta = delta_TD + t * width;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) {
                NUMBER both = WRITE(READ(x[i]) + READ(delta[i]));
                x[i] = both;
                sum += READ(both) * READ(both);
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) sum += READ(x[i]) * READ(x[i]);
        }
        float scale = 1.0f / __builtin_sqrtf(sum / (float)width + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) out[i] = WRITE(READ(x[i]) * scale * READ(weight_D[i]));
    }
}

/* `rows` tokens through inputs [from, to) of 64 outputs; sums of the inputs before wait in `kept` */
INLINE void NAME(tile)(const NUMBER *x_TI, const NUMBER *weights, float *kept, int64_t num_in, int64_t from, int64_t to,
                       const int rows) {
    Vector sums[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 4; w++)
            sums[r][w] = from ? *(Vector *)(kept + r * OUTPUTS + w * LANES) : (Vector){};
    for (int64_t i = from; i < to; i += AT_ONCE) NAME(step)(sums, x_TI + i, num_in, weights + i * OUTPUTS, rows);
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 4; w++) *(Vector *)(kept + r * OUTPUTS + w * LANES) = sums[r][w];
}

/* x W^T + bias. Weights of 64 outputs lie together, input by input (bfloat16: two by two), filled up with zeros. */
void NAME(linear)(const NUMBER *x_TI, const NUMBER *packed, const NUMBER *bias_O, NUMBER *out_TO, int64_t num_tokens,
                  int64_t num_in, int64_t num_out, int32_t num_threads) {
    int64_t panels = (num_out + OUTPUTS - 1) / OUTPUTS, chunks = (num_tokens + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(dynamic, num_tokens < ROWS ? 4 : 1)
    for (int64_t piece = 0; piece < panels * chunks; piece++) {
        int64_t at = piece / chunks * OUTPUTS, first = piece % chunks * CHUNK;
        int64_t tokens = num_tokens - first < CHUNK ? num_tokens - first : CHUNK;
        int64_t count = num_out - at < OUTPUTS ? num_out - at : OUTPUTS;
        const NUMBER *weights = packed + at * num_in, *x = x_TI + first * num_in;
        float kept[CHUNK * OUTPUTS];
        for (int64_t from = 0; from < num_in; from += INPUTS) {
            int64_t to = from + INPUTS < num_in ? from + INPUTS : num_in;
            for (int64_t t = 0; t < tokens; t += ROWS) {
                const NUMBER *x_of = x + t * num_in;
                float *sums = kept + t * OUTPUTS;
                switch (tokens - t) {
                    case 1: NAME(tile)(x_of, weights, sums, num_in, from, to, 1); break;
                    case 2: NAME(tile)(x_of, weights, sums, num_in, from, to, 2); break;
                    case 3: NAME(tile)(x_of, weights, sums, num_in, from, to, 3); break;
                    case 4: NAME(tile)(x_of, weights, sums, num_in, from, to, 4); break;
                    case 5: NAME(tile)(x_of, weights, sums, num_in, from, to, 5); break;
                    default: NAME(tile)(x_of, weights, sums, num_in, from, to, 6);
                }
            }
        }
        for (int64_t t = 0; t < tokens; t++) {
            NUMBER *out = out_TO + (first + t) * num_out + at;
            const float *sums = kept + t * OUTPUTS;
            if (bias_O)
                for (int64_t o = 0; o < count; o++) out[o] = WRITE(sums[o] + READ(bias_O[at + o]));
            else if (count == OUTPUTS)
                for (int64_t o = 0; o < OUTPUTS; o++) out[o] = WRITE(sums[o]);
            else
                for (int64_t o = 0; o < count; o++) out[o] = WRITE(sums[o]);
        }
    }
}

/* out = silu(gate) * up for rows [gate | up] */
void NAME(silu_and_mul)(const NUMBER *both_TX, NUMBER *out_TI, int64_t num_tokens, int64_t width,
                        int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t t = 0; t < num_tokens; t++) {
        const NUMBER *gate = both_TX + 2 * t * width, *up = gate + width;
        NUMBER *out = out_TI + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float x = READ(gate[i]);
            out[i] = WRITE(x / (1.0f + exponential(-x)) * READ(up[i]));
        }
    }
}

/* One token: norm and rotate its q and k heads in place, put k and v into their slot. */
INLINE void NAME(take_in)(const Attention *a, int64_t t) {
    int64_t size = a->head_size, turned = a->num_heads + a->num_kv_heads, half = a->rotated / 2;
    NUMBER *x = (NUMBER *)a->qkv_TD + t * (turned + a->num_kv_heads) * size;
    const float *cosines = a->cos_sin_PH ? a->cos_sin_PH + a->positions_T[t] * a->rotated : 0, *sines = cosines + half;
    for (int64_t n = 0; n < turned; n++) {
        NUMBER *head = x + n * size;
        if (a->norm_XH) {
            const NUMBER *weight = (const NUMBER *)a->norm_XH + n * size;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < size; i++) sum += READ(head[i]) * READ(head[i]);
            float scale = 1.0f / __builtin_sqrtf(sum / (float)size + a->eps);
#pragma omp simd
            for (int64_t i = 0; i < size; i++) head[i] = WRITE(READ(head[i]) * scale * READ(weight[i]));
        }
        if (!cosines) continue;
        if (a->interleaved) {
            for (int64_t i = 0; i < half; i++) {
                float first = READ(head[2 * i]), second = READ(head[2 * i + 1]);
                head[2 * i] = WRITE(first * cosines[i] - second * sines[i]);
                head[2 * i + 1] = WRITE(second * cosines[i] + first * sines[i]);
            }
        } else {
            NUMBER *low = head, *high = head + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = READ(low[i]), second = READ(high[i]);
                low[i] = WRITE(first * cosines[i] - second * sines[i]);
                high[i] = WRITE(second * cosines[i] + first * sines[i]);
            }
        }
    }
    int64_t slot = a->slots_T[t], width = a->num_kv_heads * size;
    if (slot < 0) return;
    memcpy((NUMBER *)a->k_cache + slot * width, x + a->num_heads * size, width * sizeof(NUMBER));
    memcpy((NUMBER *)a->v_cache + slot * width, x + turned * size, width * sizeof(NUMBER));
}

/* Where the keys (or values) [first, first + count) of a row stand for one head, as floats: there, or copied. */
INLINE void NAME(find)(const Attention *a, const void *cache, int64_t row, int64_t first, int64_t count, int64_t head,
                       int64_t size, const float **rows, float *copied) {
    const int32_t *blocks = a->table_RB + row * a->table_stride;
    int64_t block = first / a->block_size, within = first - block * a->block_size, step = a->num_kv_heads * size;
    const NUMBER *base = (const NUMBER *)cache + head * size, *at = base + (blocks[block] * a->block_size + within) * step;
    for (int64_t j = 0; j < count; j++, at += step) {
        if (within++ == a->block_size) {
            within = 1;
            at = base + blocks[++block] * a->block_size * step;
        }
        rows[j] = sizeof(NUMBER) == 4 ? (const float *)at : copied + j * size;
        if (sizeof(NUMBER) != 4)
            for (int64_t i = 0; i < size; i++) copied[j * size + i] = READ(at[i]);
    }
}

/* Where the keys and values [first, first + count) of a row begin, as numbers from the cache's first */
INLINE void NAME(place)(const Attention *a, int64_t row, int64_t first, int64_t count, int64_t *places) {
    const int32_t *blocks = a->table_RB + row * a->table_stride;
    int64_t block = first / a->block_size, within = first - block * a->block_size;
    int64_t step = a->num_kv_heads * a->head_size, at = (blocks[block] * a->block_size + within) * step;
    for (int64_t j = 0; j < count; j++, at += step) {
        if (within++ == a->block_size) {
            within = 1;
            at = blocks[++block] * a->block_size * step;
        }
        places[j] = at;
    }
}

/* One head's key and value at a place */
INLINE void NAME(ask)(const Attention *a, int64_t place, const int64_t size) {
    const char *k = (const char *)((const NUMBER *)a->k_cache + place), *v = (const char *)((const NUMBER *)a->v_cache + place);
    for (int64_t line = 0; line < size * (int64_t)sizeof(NUMBER); line += 64) {
        __builtin_prefetch(k + line, 0, 2);
        __builtin_prefetch(v + line, 0, 2);
    }
}

/* The first key that the last token of a row sees */
INLINE int64_t NAME(begin)(const Attention *a, int64_t length) {
    return a->window && length > a->window ? length - a->window : 0;
}

/* One token of one row, `count` query heads from `g` on of each key/value head of [kv_head, kv_end): from each key a dot
product. While some keys are at work the next ones are asked for, at last those of `next_row`: blocks lie anywhere. */
INLINE void NAME(attend_one)(const Attention *a, int64_t row, int64_t token, int64_t kv_head, int64_t kv_end, int64_t g,
                             int64_t count, const int64_t size, int64_t next_row) {
    int64_t group = a->num_heads / a->num_kv_heads;
    const NUMBER *q = (const NUMBER *)a->qkv_TD + token * (a->num_heads + 2 * a->num_kv_heads) * size;
    NUMBER *out = (NUMBER *)a->out_TD + token * a->num_heads * size;
    float queries[STATE], sums[STATE], most[STATE / LANES], total[STATE / LANES], logits[KEYS], copied[KEYS * MOST_HEAD];
    const float *rows[KEYS];
    int64_t num_heads = (kv_end - kv_head) * count;
    for (int64_t n = 0; n < num_heads; n++) {
        int64_t head = (kv_head + n / count) * group + g + n % count;
        most[n] = -3.0e38f;
        total[n] = 0.0f;
        for (int64_t i = 0; i < size; i++) {
            queries[n * size + i] = READ(q[head * size + i]) * a->scale;
            sums[n * size + i] = 0.0f;
        }
    }
    int64_t length = a->lengths_R[row] - (a->starts_R1[row + 1] - 1 - token); /* the token's own key is its last */
    int64_t ahead[KEYS], num_ahead;
    for (int64_t first = NAME(begin)(a, length); first < length; first += KEYS) {
        int64_t num = length - first < KEYS ? length - first : KEYS;
        int64_t from = first + KEYS, of_row = row, until = length;
        if (from >= length) { /* its last keys: on with the next row */
            of_row = next_row;
            until = next_row < 0 ? 0 : a->lengths_R[next_row];
            from = NAME(begin)(a, until);
        }
        num_ahead = until - from < KEYS ? until - from : KEYS;
        if (num_ahead > 0) NAME(place)(a, of_row, from, num_ahead, ahead);
        for (int64_t n = 0; n < num_heads; n += count) {
            float weights[MOST_GROUP][KEYS];
            NAME(find)(a, a->k_cache, row, first, num, kv_head + n / count, size, rows, copied);
            for (int64_t c = 0; c < count; c++) {
                const float *query = queries + (n + c) * size;
                for (int64_t j = 0; j < num; j++) {
                    if (!c && j < num_ahead) NAME(ask)(a, ahead[j] + (kv_head + n / count) * size, size);
                    Vector sum = *(const Vector *)query * *(const Vector *)rows[j];
                    for (int64_t i = LANES; i < size; i += LANES)
                        sum += *(const Vector *)(query + i) * *(const Vector *)(rows[j] + i);
                    logits[j] = add_lanes(sum);
                }
                float highest = most[n + c], sum = 0.0f;
#pragma omp simd reduction(max : highest)
                for (int64_t j = 0; j < num; j++) highest = logits[j] > highest ? logits[j] : highest;
                float fade = exponential(most[n + c] - highest);
                most[n + c] = highest;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < num; j++) {
                    weights[c][j] = exponential(logits[j] - highest);
                    sum += weights[c][j];
                }
                total[n + c] = total[n + c] * fade + sum;
                for (int64_t i = 0; i < size; i++) sums[(n + c) * size + i] *= fade;
            }
            NAME(find)(a, a->v_cache, row, first, num, kv_head + n / count, size, rows, copied);
            for (int64_t c = 0; c < count; c++)
                for (int64_t i = 0; i < size; i += LANES) {
                    float *sum = sums + (n + c) * size + i;
                    Vector even = *(Vector *)sum, odd = {};
                    int64_t j = 0;
                    for (; j + 2 <= num; j += 2) {
                        even += weights[c][j] * *(const Vector *)(rows[j] + i);
                        odd += weights[c][j + 1] * *(const Vector *)(rows[j + 1] + i);
                    }
                    if (j < num) even += weights[c][j] * *(const Vector *)(rows[j] + i);
                    *(Vector *)sum = even + odd;
                }
        }
    }
    for (int64_t n = 0; n < num_heads; n++) {
        int64_t head = (kv_head + n / count) * group + g + n % count;
        float scale = 1.0f / total[n];
        for (int64_t i = 0; i < size; i++) out[head * size + i] = WRITE(sums[n * size + i] * scale);
    }
}

/* Queries [first, last) of a row, all heads of a key/value head: pairs (token, g) side by side in vectors, so that keys
and values are read number by number and nothing but the queries is turned. `wide`: vectors of pairs. */
INLINE void NAME(attend_many)(const Attention *a, int64_t row, int64_t first, int64_t last, int64_t kv_head,
                              const int wide) {
    int64_t size = a->head_size, group = a->num_heads / a->num_kv_heads, start = a->starts_R1[row];
    int64_t end = a->starts_R1[row + 1], length = a->lengths_R[row];
    int64_t before = length - (end - start) - start; /* token + before: its position */
    int64_t num = (last - first) * group, width = (a->num_heads + 2 * a->num_kv_heads) * size;
    float turned[MOST_HEAD][PAIRS], sums[MOST_HEAD][PAIRS], weights[KEYS][PAIRS];
    float copied[KEYS * MOST_HEAD], place[PAIRS];
    float most[PAIRS], total[PAIRS];
    const float *rows[KEYS + 3];
    for (int64_t x = 0; x < wide * LANES; x++) {
        int64_t token = first + (x < num ? x / group : 0);
        const NUMBER *q = (const NUMBER *)a->qkv_TD + token * width + (kv_head * group + x % group) * size;
        place[x] = (float)(token + before);
        for (int64_t i = 0; i < size; i++) turned[i][x] = READ(q[i]) * a->scale;
    }
    for (int64_t i = 0; i < size; i++) memset(sums[i], 0, wide * LANES * sizeof(float));
    for (int x = 0; x < wide * LANES; x++) {
        most[x] = -3.0e38f;
        total[x] = 0.0f;
    }
    int64_t lowest = first + before, highest = last - 1 + before;
    int64_t begin = a->window && lowest + 1 > a->window ? lowest + 1 - a->window : 0;
    for (int64_t from = begin; from <= highest; from += KEYS) {
        int64_t count = highest + 1 - from < KEYS ? highest + 1 - from : KEYS;
        NAME(find)(a, a->k_cache, row, from, count, kv_head, size, rows, copied);
        for (int64_t j = count; j < (count + 3) / 4 * 4; j++) rows[j] = rows[0];
        for (int64_t j = 0; j < count; j += 4) {
            Vector sum[4][4];
            for (int b = 0; b < 4; b++)
                for (int w = 0; w < wide; w++) sum[b][w] = (Vector){};
            for (int64_t i = 0; i < size; i++)
                for (int b = 0; b < 4; b++)
                    for (int w = 0; w < wide; w++)
                        sum[b][w] += rows[j + b][i] * *(const Vector *)&turned[i][w * LANES];
            for (int b = 0; b < 4; b++)
                for (int w = 0; w < wide; w++) *(Vector *)&weights[j + b][w * LANES] = sum[b][w];
        }
        if (from + count - 1 > lowest || a->window)
            for (int64_t j = 0; j < count; j++) {
                float at = (float)(from + j), oldest = a->window ? (float)a->window : 3.0e38f;
                for (int64_t x = 0; x < wide * LANES; x++)
                    weights[j][x] = at > place[x] || place[x] - at >= oldest ? -3.0e38f : weights[j][x];
            }
        for (int w = 0; w < wide; w++) {
            float top[LANES], fade[LANES], sum[LANES] = {0};
            memcpy(top, most + w * LANES, sizeof(top));
            for (int64_t j = 0; j < count; j++)
                for (int l = 0; l < LANES; l++) {
                    float x = weights[j][w * LANES + l];
                    top[l] = x > top[l] ? x : top[l];
                }
            for (int l = 0; l < LANES; l++) {
                fade[l] = exponential(most[w * LANES + l] - top[l]);
                most[w * LANES + l] = top[l];
            }
            for (int64_t j = 0; j < count; j++) {
                float *of_key = &weights[j][w * LANES];
                for (int l = 0; l < LANES; l++) {
                    float weight = exponential(of_key[l] - top[l]);
                    of_key[l] = weight = of_key[l] <= -3.0e38f ? 0.0f : weight;
                    sum[l] += weight;
                }
            }
            for (int l = 0; l < LANES; l++) total[w * LANES + l] = total[w * LANES + l] * fade[l] + sum[l];
            for (int64_t i = 0; i < size; i++)
                for (int l = 0; l < LANES; l++) sums[i][w * LANES + l] *= fade[l];
        }
        NAME(find)(a, a->v_cache, row, from, count, kv_head, size, rows, copied);
        for (int64_t i = 0; i < size; i += 4) {
            Vector sum[4][4];
            for (int b = 0; b < 4; b++)
                for (int w = 0; w < wide; w++) sum[b][w] = *(Vector *)&sums[i + b][w * LANES];
            for (int64_t j = 0; j < count; j++)
                for (int b = 0; b < 4; b++)
                    for (int w = 0; w < wide; w++)
                        sum[b][w] += rows[j][i + b] * *(const Vector *)&weights[j][w * LANES];
            for (int b = 0; b < 4; b++)
                for (int w = 0; w < wide; w++) *(Vector *)&sums[i + b][w * LANES] = sum[b][w];
        }
    }
    for (int64_t x = 0; x < num; x++) {
        NUMBER *out = (NUMBER *)a->out_TD + ((first + x / group) * a->num_heads + kv_head * group + x % group) * size;
        float scale = 1.0f / total[x];
        for (int64_t i = 0; i < size; i++) out[i] = WRITE(sums[i][x] * scale);
    }
}

static void NAME(attend_queries)(const Attention *a, int64_t row, int64_t first, int64_t last, int64_t kv_head) {
    int64_t pairs = (last - first) * (a->num_heads / a->num_kv_heads);
    if (pairs > 3 * LANES)
        NAME(attend_many)(a, row, first, last, kv_head, 4);
    else if (pairs > 2 * LANES)
        NAME(attend_many)(a, row, first, last, kv_head, 3);
    else if (pairs > LANES)
        NAME(attend_many)(a, row, first, last, kv_head, 2);
    else
        NAME(attend_many)(a, row, first, last, kv_head, 1);
}

static void NAME(attend_token)(const Attention *a, int64_t row, int64_t token, int64_t kv_head, int64_t kv_end,
                               int64_t next_row) {
    int64_t group = a->num_heads / a->num_kv_heads;
    for (int64_t g = 0; g < group; g += MOST_GROUP) {
        int64_t count = group - g < MOST_GROUP ? group - g : MOST_GROUP, at_once = STATE / (count * a->head_size);
        for (int64_t from = kv_head; from < kv_end; from += at_once) {
            int64_t to = from + at_once < kv_end ? from + at_once : kv_end;
            switch (a->head_size) { /* sizes that the compiler knows are unrolled */
                case 32: NAME(attend_one)(a, row, token, from, to, g, count, 32, next_row); break;
                case 64: NAME(attend_one)(a, row, token, from, to, g, count, 64, next_row); break;
                case 128: NAME(attend_one)(a, row, token, from, to, g, count, 128, next_row); break;
                default: NAME(attend_one)(a, row, token, from, to, g, count, a->head_size, next_row);
            }
        }
    }
}

/* Norm, rotate, store, attend. Tokens of no row and rows without context give zeros. */
void NAME(attend)(const Attention *a) {
    int64_t group = a->num_heads / a->num_kv_heads, at_once = PAIRS / group > 0 ? PAIRS / group : 1;
    int64_t covered = a->num_rows ? a->starts_R1[a->num_rows] : 0, width = a->num_heads * a->head_size;
    /* pieces of work: each row in runs of queries, for each key/value head */
    int64_t num_runs = 0;
    for (int64_t r = 0; r < a->num_rows; r++) num_runs += (a->starts_R1[r + 1] - a->starts_R1[r] + at_once - 1) / at_once;
    int32_t runs[num_runs + 1][2];
    int64_t at = 0;
    for (int64_t r = a->num_rows - 1; r >= 0; r--) /* long rows stand last, and are begun first, their ends first */
        for (int64_t n = (a->starts_R1[r + 1] - a->starts_R1[r] + at_once - 1) / at_once - 1; n >= 0; n--) {
            runs[at][0] = (int32_t)r;
            runs[at++][1] = (int32_t)(a->starts_R1[r] + n * at_once);
        }
    int64_t parts = num_runs < 4 * a->num_threads ? a->num_kv_heads : 1, heads = a->num_kv_heads / parts;
#pragma omp parallel num_threads(a->num_threads) if (a->num_threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a->num_tokens; t++) {
            NAME(take_in)(a, t);
            if (t >= covered) memset((NUMBER *)a->out_TD + t * width, 0, width * sizeof(NUMBER));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < num_runs * parts; piece++) {
            int64_t row = runs[piece / parts][0], first = runs[piece / parts][1], end = a->starts_R1[row + 1];
            int64_t kv_head = piece % parts * heads, kv_end = kv_head + heads;
            int64_t last = first + at_once < end ? first + at_once : end, after = piece + a->num_threads * parts;
            int64_t next = after < num_runs * parts ? runs[after / parts][0] : -1;
            if (a->lengths_R[row] == 0) {
                for (int64_t t = first; t < last; t++)
                    memset((NUMBER *)a->out_TD + t * width + kv_head * group * a->head_size, 0,
                           heads * group * a->head_size * sizeof(NUMBER));
            } else if (last - first == 1)
                NAME(attend_token)(a, row, first, kv_head, kv_end, next);
            else
                for (; kv_head < kv_end; kv_head++) NAME(attend_queries)(a, row, first, last, kv_head);
        }
    }
}

#endif
