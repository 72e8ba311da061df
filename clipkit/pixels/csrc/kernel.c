/* From a JPEG's data to the pixels of a crop, in one pass: decode, transform, resample, colour.
 *
 * Every number in front of the crop's last row has to be decoded, for a JPEG has no index; but only the crop's blocks
 * are kept, and each becomes as few pixels as the crop needs: of 1, 2 or 4 along an axis, by the transform of that size
 * over its lowest frequencies. What is left is resampled by the bicubic filter that Pillow has (a = -0.5, widened where
 * it shrinks), at the fractional place of the crop, brightness and colours each at their own resolution, and turned to
 * RGB at the size of the output.
 *
 * All sums are of single floats in a fixed order, so that every machine gives the same pixels: build with
 * -ffp-contract=off and without -ffast-math. Loops over 4, 8 or 16 numbers are there for the compiler to make vectors
 * of.
 */

#include "jpeg_crop.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef CROP
#define CROP crop_plain
#endif

/* As many numbers as a register holds. */
#ifndef WIDTH
#define WIDTH 4
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef float Four __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE16(a, ...)   __builtin_shufflevector(a, a, __VA_ARGS__)
#else
typedef int32_t Order4 __attribute__((vector_size(16)));
#define SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (Order4){__VA_ARGS__})
#define SHUFFLE16(a, ...)   __builtin_shuffle(a, (Bytes){__VA_ARGS__})
#endif
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

/* ---- The data ---------------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t bits;  /* the next ones, from the highest on */
    uint32_t count; /* how many of them are read; its lowest six bits alone mean something */
    const uint8_t *at;
} Stream;

/* At least 56 bits. Reads eight bytes. */
static inline void refill(Stream *stream) {
    uint64_t next;
    memcpy(&next, stream->at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    next = __builtin_bswap64(next);
#endif
    stream->bits |= next >> (stream->count & 63);
    stream->at += (63 - (stream->count & 63)) >> 3;
    stream->count |= 56;
}

static inline void skip(Stream *stream, uint64_t bits) {
    stream->bits <<= bits & 63;
    stream->count -= (uint32_t)bits;
}

/* How many bits are left of `length` bytes; negative where more were taken than there are. */
static inline ptrdiff_t bits_left(const Stream *stream, const uint8_t *bytes, size_t length) {
    return ((ptrdiff_t)length - (stream->at - bytes)) * 8 + (ptrdiff_t)(stream->count & 63);
}

/* The number that begins after `at` bits and has 63 less `shift`, by T.81's EXTEND: negative where the first is 0. */
static inline int number(uint64_t bits, uint64_t at, uint64_t shift) {
    uint64_t own = bits << (at & 63);
    int64_t sign = (int64_t)~own >> 63;
    int64_t magnitude = (int64_t)((own ^ (uint64_t)sign) >> 1 >> (shift & 63));
    return (int)((magnitude ^ sign) - sign);
}

/* An entry for a code of more than LOOKUP bits, 0 where there is none. */
static __attribute__((noinline)) Entry long_code(const Huffman *table, uint64_t bits) {
    int32_t code = (int32_t)(bits >> 48);
    for (int length = LOOKUP + 1; length <= 16; length++)
        if (code < table->limit[length]) return table->symbol[((code >> (16 - length)) + table->offset[length]) & 255];
    return 0;
}

static inline Entry look_up(const Huffman *table, uint64_t bits) {
    Entry entry = table->entry[bits >> (64 - LOOKUP)];
    return UNLIKELY(!entry) ? long_code(table, bits) : entry;
}

/* Read one block; with `store`, its numbers but the first into `block`, which must be zeros and have a 65th place.
 *
 * Returns how far its numbers reach: 0 where there is but the first, -1 where the data are broken. Two numbers are
 * taken at a time where the table has them: all that one step waits for is the entry of the last.
 */
static inline int read_block(Stream *stream, Component *one, int16_t *block, bool store) {
    Stream in = *stream;
    refill(&in);
    Entry entry = look_up(one->dc, in.bits);
    if (UNLIKELY(!entry)) return -1;
    one->dc_value = (int32_t)((uint32_t)one->dc_value + (uint32_t)number(in.bits, ENTRY_AT(entry), ENTRY_SHIFT(entry)));
    skip(&in, ENTRY_BITS(entry));
    const Huffman *ac = one->ac;
    unsigned k = 1, first, second;
    for (;;) {
        refill(&in);
        entry = look_up(ac, in.bits);
        if (UNLIKELY(!entry)) return -1;
        first = k + ENTRY_RUN(entry), second = k + ENTRY_SECOND(entry);
        if (store) block[ZIGZAG[first]] = (int16_t)number(in.bits, ENTRY_AT(entry), ENTRY_SHIFT(entry));
        if (second > 63) break;
        /* Where there is no second, this writes a zero, and the next step writes over it. */
        if (store) block[ZIGZAG[second]] = (int16_t)number(in.bits, ENTRY_SECOND_AT(entry), ENTRY_SECOND_SHIFT(entry));
        k = second + ENTRY_IS_PAIR(entry);
        skip(&in, ENTRY_BITS(entry));
        if (UNLIKELY(k > 63)) {
            *stream = in;
            return 63;
        }
    }
    /* The block ends with the 64th number, or with the first or the second as a mark of its end. What else lies in the
     * entry belongs to the next block. */
    unsigned last = first < 63 ? second - first - 1 : first > 63 ? ENTRY_RUN(entry) : END_OF_BLOCK;
    skip(&in, first < 63 ? ENTRY_BITS(entry) : ENTRY_FIRST_BITS(entry));
    *stream = in;
    if (UNLIKELY(last != END_OF_BLOCK)) return -1;
    return (int)(first > 63 ? k - 1 : first);
}

/* Copy the data from `at` up to the next marker, without the zeros that are stuffed in behind bytes of 0xFF, and PAD
 * zeros behind. Returns where the marker is, 0 where there is none. */
static size_t unstuff(const uint8_t *data, size_t size, size_t at, uint8_t *to, size_t *length) {
    const uint8_t *start = to;
    for (;;) {
        const uint8_t *found = memchr(data + at, 0xFF, size - at);
        if (!found || found + 1 == data + size) return 0;
        size_t part = (size_t)(found - (data + at));
        memcpy(to, data + at, part);
        to += part, at += part;
        if (found[1]) break;
        *to++ = 0xFF;
        at += 2;
    }
    memset(to, 0, PAD);
    *length = (size_t)(to - start);
    return at;
}

/* ---- Blocks to pixels -------------------------------------------------------------------------------------------- */

static inline float level(float x) {
    x = x > 0 ? x : 0;
    return x < 255 ? x : 255;
}

static inline void transpose4(const float *in, size_t in_stride, float *out, size_t out_stride) {
    Four a, b, c, d;
    memcpy(&a, in, 16), memcpy(&b, in + in_stride, 16);
    memcpy(&c, in + 2 * in_stride, 16), memcpy(&d, in + 3 * in_stride, 16);
    Four ab = SHUFFLE4(a, b, 0, 4, 1, 5), cd = SHUFFLE4(c, d, 0, 4, 1, 5);
    Four ba = SHUFFLE4(a, b, 2, 6, 3, 7), dc = SHUFFLE4(c, d, 2, 6, 3, 7);
    a = SHUFFLE4(ab, cd, 0, 1, 4, 5), b = SHUFFLE4(ab, cd, 2, 3, 6, 7);
    c = SHUFFLE4(ba, dc, 0, 1, 4, 5), d = SHUFFLE4(ba, dc, 2, 3, 6, 7);
    memcpy(out, &a, 16), memcpy(out + out_stride, &b, 16);
    memcpy(out + 2 * out_stride, &c, 16), memcpy(out + 3 * out_stride, &d, 16);
}

/* The inverse cosine transform of eight columns, by Arai, Agui and Nakajima (1988); `frequency_scale` has the rest. */
static inline void inverse8(const float *in, float *out) {
    for (int i = 0; i < 8; i++) {
        float sum = in[i] + in[32 + i], difference = in[i] - in[32 + i];
        float outer = in[16 + i] + in[48 + i], inner = (in[16 + i] - in[48 + i]) * 1.414213562f - outer;
        float even0 = sum + outer, even1 = difference + inner, even2 = difference - inner, even3 = sum - outer;
        float middle = in[40 + i] + in[24 + i], turned = in[40 + i] - in[24 + i];
        float edges = in[8 + i] + in[56 + i], tilted = in[8 + i] - in[56 + i];
        float both = (turned + tilted) * 1.847759065f, odd0 = edges + middle;
        float odd1 = both - turned * 2.613125930f - odd0;
        float odd2 = (edges - middle) * 1.414213562f - odd1;
        float odd3 = both - tilted * 1.082392200f - odd2;
        out[i] = even0 + odd0, out[56 + i] = even0 - odd0;
        out[8 + i] = even1 + odd1, out[48 + i] = even1 - odd1;
        out[16 + i] = even2 + odd2, out[40 + i] = even2 - odd2;
        out[24 + i] = even3 + odd3, out[32 + i] = even3 - odd3;
    }
}

static inline void inverse4(const float *in, float *out) {
    for (int i = 0; i < 4; i++) {
        float even0 = in[i] + in[8 + i], even1 = in[i] - in[8 + i];
        float odd0 = 0.9238795325f * in[4 + i] + 0.3826834324f * in[12 + i];
        float odd1 = 0.3826834324f * in[4 + i] - 0.9238795325f * in[12 + i];
        out[i] = even0 + odd0, out[4 + i] = even1 + odd1, out[8 + i] = even1 - odd1, out[12 + i] = even0 - odd0;
    }
}

/* What a frequency is to be multiplied by before the transforms above. */
static float frequency_scale(int log_scale, int frequency) {
    if (log_scale == 3)
        return (float)((frequency ? cos(frequency * 3.14159265358979323846 / 16) * sqrt(2) : 1) / sqrt(8));
    return log_scale == 2 && frequency % 2 ? 0.5f : (float)sqrt(0.125);
}

/* A block as 2^log_scale pixels along each axis, column by column. */
static inline void put_block(const int16_t *block, int reach, const Component *one, int log_scale, float *out) {
    size_t stride = (size_t)one->stride;
    const float *dequant = one->dequant;
    float grey = (float)one->dc_value * dequant[0] + 128.0f, in[64], middle[64], turned[64];
    if (!reach || !log_scale) {
        grey = level(grey);
        for (int x = 0; x < 1 << log_scale; x++)
            for (int y = 0; y < 1 << log_scale; y++) out[(size_t)x * stride + (size_t)y] = grey;
    } else if (log_scale == 3) {
        for (int i = 0; i < 64; i++) in[i] = (float)block[i] * dequant[i];
        in[0] = grey;
        inverse8(in, middle);
        for (int y = 0; y < 8; y += 4)
            for (int x = 0; x < 8; x += 4) transpose4(middle + 8 * y + x, 8, turned + 8 * x + y, 8);
        inverse8(turned, middle);
        for (int x = 0; x < 8; x++)
            for (int y = 0; y < 8; y++) out[(size_t)x * stride + (size_t)y] = level(middle[8 * x + y]);
    } else if (log_scale == 2) {
        for (int row = 0; row < 4; row++)
            for (int i = 0; i < 4; i++) in[4 * row + i] = (float)block[8 * row + i] * dequant[8 * row + i];
        in[0] = grey;
        inverse4(in, middle);
        transpose4(middle, 4, turned, 4);
        inverse4(turned, middle);
        for (int x = 0; x < 4; x++)
            for (int y = 0; y < 4; y++) out[(size_t)x * stride + (size_t)y] = level(middle[4 * x + y]);
    } else {
        float across = (float)block[1] * dequant[1], down = (float)block[8] * dequant[8];
        float both = (float)block[9] * dequant[9];
        out[0] = level(grey + across + down + both), out[stride] = level(grey - across + down - both);
        out[1] = level(grey + across - down - both), out[stride + 1] = level(grey - across - down + both);
    }
}

/* ---- Resampling -------------------------------------------------------------------------------------------------- */

typedef struct {
    int first, last; /* pixels of the plane that are used */
    int taps;
    double begin, step;
    int *start;     /* of each output pixel, from `first` on */
    float *weights; /* [taps][pixels] */
} Resampling;

/* How [begin, begin + extent) of a plane of `limit` pixels becomes `pixels`; the weights come later. */
static Resampling plan(double begin, double extent, int limit, int pixels) {
    double step = extent / pixels, stretch = step > 1 ? step : 1;
    Resampling r = {.first = (int)floor(begin), .last = (int)ceil(begin + extent), .begin = begin, .step = step};
    if (r.last > limit) r.last = limit;
    if (r.first >= r.last) r.first = r.last - 1;
    r.taps = (int)ceil(4 * stretch); /* as many pixels have their centre within the filter, which is 0 at its ends */
    if (r.taps > r.last - r.first) r.taps = r.last - r.first;
    return r;
}

static inline float cubic(float x) {
    x = fabsf(x);
    float near = (1.5f * x - 2.5f) * x * x + 1, far = ((-0.5f * x + 2.5f) * x - 4) * x + 2;
    float outer = x < 2 ? far : 0;
    return x < 1 ? near : outer;
}

/* Keys' cubic convolution (1981) with a = -0.5, as wide as what one output pixel covers, of the crop's pixels alone. */
static void fill_weights(const Resampling *r, int pixels, float *distance, float *sum) {
    float stretch = r->step > 1 ? (float)r->step : 1, inverse = 1 / stretch;
    for (int x = 0; x < pixels; x++) {
        double centre = r->begin + (x + 0.5) * r->step;
        int start = (int)floor(centre - 2 * (double)stretch + 0.5);
        if (start > r->last - r->taps) start = r->last - r->taps;
        if (start < r->first) start = r->first;
        r->start[x] = start - r->first;
        distance[x] = (float)(start + 0.5 - centre);
        sum[x] = 0;
    }
    for (int t = 0; t < r->taps; t++) {
        float *weights = r->weights + (size_t)t * (size_t)pixels;
        for (int x = 0; x < pixels; x++) {
            weights[x] = cubic((distance[x] + (float)t) * inverse);
            sum[x] += weights[x];
        }
    }
    for (int t = 0; t < r->taps; t++) {
        float *weights = r->weights + (size_t)t * (size_t)pixels;
        for (int x = 0; x < pixels; x++) weights[x] /= sum[x];
    }
}

/* One output pixel of many lanes (a multiple of 16) side by side: out[lanes] from in[][lanes]. Where `taps` is known
 * when this is compiled, its weights stay in registers. */
static inline void resample_by(int taps, const float *weights, size_t pixels, const float *in, size_t stride,
                               float *restrict out, size_t lanes) {
    for (size_t lane = 0; lane < lanes; lane += 16) {
        Vector sum[16 / WIDTH] = {0}, part;
        for (int t = 0; t < taps; t++)
            for (size_t i = 0; i < 16 / WIDTH; i++) {
                memcpy(&part, in + (size_t)t * stride + lane + i * WIDTH, sizeof part);
                sum[i] += part * weights[(size_t)t * pixels];
            }
        for (size_t i = 0; i < 16 / WIDTH; i++) memcpy(out + lane + i * WIDTH, &sum[i], sizeof part);
    }
}

static inline void resample(const Resampling *r, size_t pixels, size_t x, const float *in, size_t stride, float *out,
                            size_t lanes) {
    const float *weights = r->weights + x;
    in += (size_t)r->start[x] * stride;
    switch (r->taps) {
    case 4: resample_by(4, weights, pixels, in, stride, out, lanes); break;
    case 5: resample_by(5, weights, pixels, in, stride, out, lanes); break;
    case 6: resample_by(6, weights, pixels, in, stride, out, lanes); break;
    case 7: resample_by(7, weights, pixels, in, stride, out, lanes); break;
    case 8: resample_by(8, weights, pixels, in, stride, out, lanes); break;
    default: resample_by(r->taps, weights, pixels, in, stride, out, lanes);
    }
}

/* ---- Colour ------------------------------------------------------------------------------------------------------ */

/* YCbCr as JFIF has it, or brightness alone, to uint8[pixels][3]. The rows are read up to the next multiple of 16. */
static inline void put_row(const float *luma, const float *blue, const float *red, int pixels, uint8_t *out) {
    for (int first = 0; first < pixels; first += 16) {
        uint32_t packed[16];
        for (int i = 0; i < 16; i++) {
            float y = luma[first + i] + 0.5f, b = blue ? blue[first + i] - 128 : 0, r = red ? red[first + i] - 128 : 0;
            int32_t R = (int32_t)level(y + 1.402f * r), B = (int32_t)level(y + 1.772f * b);
            int32_t G = (int32_t)level(y - 0.344136286f * b - 0.714136286f * r);
            packed[i] = (uint32_t)(R | G << 8 | B << 16);
        }
        uint8_t *to = out + 3 * first;
        for (int i = 0; i < 16 && i < pixels - first; i += 4, to += 12) {
            Bytes four;
            memcpy(&four, packed + i, 16);
            four = SHUFFLE16(four, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 3, 3, 3);
            int many = pixels - first - i;
            if (many >= 4) memcpy(to, &four, 12);
            else memcpy(to, &four, 3 * (size_t)many);
        }
    }
}

/* ---- All of it --------------------------------------------------------------------------------------------------- */

static inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* How many times as many pixels as the output a shrunk plane has at the least, along each axis; of blocks' means twice
 * that. The filter takes some of the frequencies that a smaller plane lacks: photographs differ by 2.2 levels from a
 * full decoding at 1, by 0.8 here. */
#define SPARE 1.5

/* The blocks that a colour needs, and how far they may shrink. */
static void plan_component(const Frame *frame, Component *one, Box box, int pixels, Resampling *across,
                           Resampling *down) {
    double x = (double)one->h / frame->h_max, y = (double)one->v / frame->v_max;
    double least = fmin(box.width * x, box.height * y) / (SPARE * pixels);
    int log = least < 16;
    while (log < 3 && least * (1 << log) < 8) log++;
    one->log_scale = log;
    double scale = (1 << log) / 8.0;
    *across = plan(box.left * x * scale, box.width * x * scale, (int)ceil(ceil(frame->width * x) * scale), pixels);
    *down = plan(box.top * y * scale, box.height * y * scale, (int)ceil(ceil(frame->height * y) * scale), pixels);
    one->first_column = across->first >> log, one->last_column = ((across->last - 1) >> log) + 1;
    one->first_row = down->first >> log, one->last_row = ((down->last - 1) >> log) + 1;
    one->stride = (int)round_up((size_t)(one->last_row - one->first_row) << log, 16) + 16;
    for (int i = 0; i < 64; i++)
        one->dequant[i] = frame->quant[one->quant][i] * frequency_scale(log, i % 8) * frequency_scale(log, i / 8);
}

/* A block of the data: into the plane where the crop takes it. False where the data are broken. */
static inline bool take_block(Stream *in, Component *one, int row, int column) {
    if (row < one->first_row || row >= one->last_row || column < one->first_column || column >= one->last_column)
        return read_block(in, one, NULL, false) >= 0;
    int16_t block[72] = {0};
    int reach = read_block(in, one, block, true), log = one->log_scale;
    if (UNLIKELY(reach < 0)) return false;
    size_t x = (size_t)(column - one->first_column) << log, y = (size_t)(row - one->first_row) << log;
    put_block(block, reach, one, log, one->plane + x * (size_t)one->stride + y);
    return true;
}

/* Read the data down to the last block that the crop takes. False where they are broken: then whoever asked has a
 * decoder that knows what to make of them. */
static inline bool read_blocks(Frame *frame, const uint8_t *data, size_t size, uint8_t *bytes) {
    int rows = 0, all_rows = (frame->height + 8 * frame->v_max - 1) / (8 * frame->v_max);
    int columns = (frame->width + 8 * frame->h_max - 1) / (8 * frame->h_max);
    for (int c = 0; c < frame->components; c++) {
        const Component *one = &frame->component[c];
        int last = (one->last_row + one->v - 1) / one->v;
        if (last > rows) rows = last;
    }
    size_t length, at = unstuff(data, size, frame->scan, bytes, &length);
    if (!at || (!frame->restart_interval && data[at + 1] != 0xD9)) return false;
    Stream in = {0, 0, bytes};
    int left = frame->restart_interval, restart = 0xD0;
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            if (frame->restart_interval && left-- == 0) {
                if (bits_left(&in, bytes, length) > 7 || data[at + 1] != restart) return false;
                if (!(at = unstuff(data, size, at + 2, bytes, &length))) return false;
                in = (Stream){0, 0, bytes};
                left = frame->restart_interval - 1, restart = 0xD0 | ((restart + 1) & 7);
                for (int c = 0; c < frame->components; c++) frame->component[c].dc_value = 0;
            }
            for (int c = 0; c < frame->components; c++) {
                Component *one = &frame->component[c];
                for (int y = row * one->v; y < (row + 1) * one->v; y++)
                    for (int x = column * one->h; x < (column + 1) * one->h; x++)
                        if (!take_block(&in, one, y, x)) return false;
            }
            if (bits_left(&in, bytes, length) < 0) return false;
        }
    return rows < all_rows || (bits_left(&in, bytes, length) < 8 && data[at + 1] == 0xD9);
}

/* The plane's columns become `pixels`, and its pixels come to lie row by row: out[rows][lanes]. */
static inline void narrow(const Component *one, const Resampling *across, const Resampling *down, size_t pixels,
                          float *four, float *out, size_t lanes) {
    size_t stride = (size_t)one->stride, rows = round_up((size_t)(down->last - down->first), 16);
    size_t left = (size_t)(across->first - (one->first_column << one->log_scale));
    const float *corner = one->plane + left * stride + (down->first - (one->first_row << one->log_scale));
    for (size_t x = 0; x < pixels; x += 4) {
        for (size_t i = 0; i < 4 && x + i < pixels; i++)
            resample(across, pixels, x + i, corner, stride, four + i * stride, rows);
        for (size_t y = 0; y < rows; y += 4) transpose4(four + y, stride, out + y * lanes + x, lanes);
    }
}

static size_t plane_floats(const Component *one) {
    size_t columns = (size_t)(one->last_column - one->first_column) << one->log_scale;
    return columns * (size_t)one->stride + 32; /* whole vectors are read from any place */
}

static bool has_room(Memory *memory, size_t bytes) {
    if (memory->size >= bytes) return true;
    free(memory->start);
    memory->start = malloc(bytes);
    memory->size = memory->start ? bytes : 0;
    return memory->start;
}

static inline float *carve(float **free_part, size_t count) {
    float *start = *free_part;
    *free_part += count;
    return start;
}

/* By its bits: the compiler may take for granted that every number is one, and would leave out a comparison. */
static inline bool is_number(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits >> 52 & 0x7FF) != 0x7FF;
}

bool CROP(Frame *frame, const uint8_t *data, size_t size, Box box, int pixels, uint8_t *out, Memory *memory) {
    if (!is_number(box.top) || !is_number(box.left) || !is_number(box.height) || !is_number(box.width)) return false;
    if (!(box.top >= 0 && box.left >= 0 && box.height > 0 && box.width > 0 && box.top + box.height <= frame->height &&
          box.left + box.width <= frame->width))
        return false;
    Resampling across[3], down[3];
    size_t side = (size_t)pixels, lanes = round_up(side, 16), tallest = 0, floats = 0;
    for (int c = 0; c < frame->components; c++) {
        Component *one = &frame->component[c];
        plan_component(frame, one, box, pixels, &across[c], &down[c]);
        if ((size_t)one->stride > tallest) tallest = (size_t)one->stride;
        floats += plane_floats(one) + (size_t)(across[c].taps + down[c].taps) * side + (size_t)one->stride * lanes;
    }
    floats += 5 * lanes + 4 * tallest;
    if (!has_room(memory, floats * sizeof(float) + 6 * side * sizeof(int) + (size - frame->scan) + PAD)) return false;
    float *at = memory->start, *distance = carve(&at, lanes), *sum = carve(&at, lanes);
    float *four = carve(&at, 4 * tallest), *row[3], *narrowed[3];
    for (int c = 0; c < 3; c++) row[c] = carve(&at, lanes);
    for (int c = 0; c < frame->components; c++) {
        Component *one = &frame->component[c];
        one->plane = carve(&at, plane_floats(one));
        narrowed[c] = carve(&at, (size_t)one->stride * lanes);
        across[c].weights = carve(&at, (size_t)across[c].taps * side);
        down[c].weights = carve(&at, (size_t)down[c].taps * side);
    }
    int *place = (int *)at;
    for (int c = 0; c < frame->components; c++) {
        across[c].start = place, place += pixels;
        down[c].start = place, place += pixels;
    }
    if (!read_blocks(frame, data, size, (uint8_t *)place)) return false;
    for (int c = 0; c < frame->components; c++) {
        const Component *one = &frame->component[c];
        if (c == 2 && one->h == one[-1].h && one->v == one[-1].v) {
            across[2] = across[1], down[2] = down[1]; /* both colours lie on the same grid */
        } else {
            fill_weights(&across[c], pixels, distance, sum);
            fill_weights(&down[c], pixels, distance, sum);
        }
        narrow(one, &across[c], &down[c], side, four, narrowed[c], lanes);
    }
    bool grey = frame->components == 1;
    for (size_t y = 0; y < side; y++) {
        for (int c = 0; c < frame->components; c++) resample(&down[c], side, y, narrowed[c], lanes, row[c], lanes);
        put_row(row[0], grey ? NULL : row[1], grey ? NULL : row[2], pixels, out + 3 * y * side);
    }
    return true;
}
