/* What the headers of a JPEG say, and what a crop of it takes: shared by headers.c, which fills it, and kernel.c. */

#ifndef CLIPKIT_JPEG_CROP_H
#define CLIPKIT_JPEG_CROP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How many bits of the data are looked up at once. Ten make a table of 8 KB: that of brightness and that of the colours
 * share the first-level cache with the pixels. With eleven more numbers come in pairs, and nothing is faster. */
#define LOOKUP 10

/* Zeros behind the data, more than an MCU can take (10 blocks of 64 numbers of 26 bits): its end is checked but once.
 */
#define PAD 4096

/* A run that ends the block, in place of a run of zeros. */
#define END_OF_BLOCK 63

/* What the next bits mean: one number of a block, or two where both codes lie within LOOKUP bits. A number is a run of
 * zeros, and some bits of its own behind its code. 0 where the code is longer than LOOKUP bits. Each part has a byte,
 * and those that are counts of shifts need no mask: a shift of 64 bits heeds the lowest six alone. */
typedef uint64_t Entry;
#define ENTRY_BITS(e)         (e)        /* of all that it stands for, codes included */
#define ENTRY_FIRST_BITS(e)   ((e) >> 8) /* of the first number alone; the byte's highest bit: is a pair */
#define ENTRY_IS_PAIR(e)      ((unsigned)((e) >> 15 & 1))
#define ENTRY_AT(e)           ((e) >> 16) /* where the first's own bits begin */
#define ENTRY_SHIFT(e)        ((e) >> 24) /* 63 less their number */
#define ENTRY_SECOND_AT(e)    ((e) >> 32)
#define ENTRY_SECOND_SHIFT(e) ((e) >> 40)
#define ENTRY_SECOND(e)       ((unsigned)((e) >> 48 & 127)) /* how far on the second number is, or would be */
#define ENTRY_RUN(e)          ((unsigned)((e) >> 56))       /* how far on the first is */

typedef struct {
    Entry entry[1 << LOOKUP];
    Entry symbol[256];  /* each code alone, in the order of codes */
    int32_t limit[17];  /* by length: one more than its last code, as 16 bits */
    int32_t offset[17]; /* by length: from a code to its place in `symbol` */
} Huffman;

/* One of the three colours, or the only one. */
typedef struct {
    int id, h, v; /* sampling factors */
    int quant;    /* number of the table of quantisation */
    const Huffman *dc, *ac;
    int log_scale;                                      /* a block becomes 2^log_scale pixels along each axis */
    int first_column, last_column, first_row, last_row; /* the blocks that the crop takes */
    int stride;                                         /* from one column of the plane to the next */
    float *plane;                                       /* those blocks, column by column */
    float dequant[64];                                  /* in the order of a block's rows */
    int32_t dc_value;                                   /* of the block before */
} Component;

typedef struct {
    int height, width;
    int components; /* 1 or 3 */
    int h_max, v_max;
    int restart_interval; /* in MCUs, 0 for none */
    Component component[3];
    size_t scan; /* where the image's data begin */
    uint16_t quant[4][64];
    bool has_quant[4];
    const Huffman *dc[4], *ac[4];
    Huffman own[8]; /* tables that aren't the standard's */
} Frame;

typedef struct {
    double top, left, height, width;
} Box;

/* The order in which a block's numbers come: row * 8 + column, rows being vertical frequencies. Beyond 63 all is waste.
 */
static const uint8_t ZIGZAG[128] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45,
    38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
    64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
    64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
};

void make_standard_tables(void);
bool read_headers(Frame *frame, const uint8_t *data, size_t size);

/* Memory that is kept from one crop to the next: to ask the system for fresh pages takes longer than to fill them. */
typedef struct {
    void *start;
    size_t size;
} Memory;

/* The box of the image as uint8[pixels][pixels][3]. False for damaged data, a box that isn't within
 * the image, and where memory is short. Two builds of kernel.c; both give the same pixels. */
bool crop_plain(Frame *frame, const uint8_t *data, size_t size, Box box, int pixels, uint8_t *out, Memory *memory);
bool crop_avx2(Frame *frame, const uint8_t *data, size_t size, Box box, int pixels, uint8_t *out, Memory *memory);

#endif
