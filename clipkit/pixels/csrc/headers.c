/* The headers of a JPEG (ITU-T T.81, annex B), and the tables that its data are read with.
 *
 * Only what nearly all files on the web are is read here: baseline, eight bits, grey or YCbCr, one scan. All else is
 * refused, and whoever asked goes another way.
 */

#include "jpeg_crop.h"

#include <string.h>

/* The tables of T.81's annex K.3: how many codes of each length, then their symbols, as a DHT segment has them. Most
 * encoders write these, and a table takes as long to make as a small image's rows. */
static const uint8_t STANDARD[4][16 + 162] = {
    {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11},
    {0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11},
    {0,    2,    1,    3,    3,    2,    4,    3,    5,    5,    4,    4,    0,    0,    1,    125,  0x01, 0x02,
     0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71, 0x14, 0x32,
     0x81, 0x91, 0xa1, 0x08, 0x23, 0x42, 0xb1, 0xc1, 0x15, 0x52, 0xd1, 0xf0, 0x24, 0x33, 0x62, 0x72, 0x82, 0x09,
     0x0a, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2a, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39,
     0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x63,
     0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x83, 0x84, 0x85,
     0x86, 0x87, 0x88, 0x89, 0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5,
     0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3, 0xc4, 0xc5,
     0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe1, 0xe2, 0xe3, 0xe4,
     0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa},
    {0,    2,    1,    2,    4,    4,    3,    4,    7,    5,    4,    4,    0,    1,    2,    119,  0x00, 0x01,
     0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22, 0x32, 0x81,
     0x08, 0x14, 0x42, 0x91, 0xa1, 0xb1, 0xc1, 0x09, 0x23, 0x33, 0x52, 0xf0, 0x15, 0x62, 0x72, 0xd1, 0x0a, 0x16,
     0x24, 0x34, 0xe1, 0x25, 0xf1, 0x17, 0x18, 0x19, 0x1a, 0x26, 0x27, 0x28, 0x29, 0x2a, 0x35, 0x36, 0x37, 0x38,
     0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a,
     0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x82, 0x83,
     0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3,
     0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3,
     0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe2, 0xe3,
     0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa},
};
static const int STANDARD_SYMBOLS[4] = {12, 12, 162, 162};
static Huffman standard_tables[4];

/* The table of a DHT segment; false where it isn't one, or where numbers are longer than baseline has them. */
static bool make_table(Huffman *table, const uint8_t *counts, const uint8_t *symbols, bool is_dc) {
    int place = 0;
    uint32_t code = 0;
    memset(table->entry, 0, sizeof table->entry);
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->offset[length] = place - (int)code;
        if (code + counts[length - 1] >= 1u << length) return false; /* no code is all ones */
        for (int i = 0; i < counts[length - 1]; i++, code++, place++) {
            uint64_t size = symbols[place] & 15, run = symbols[place] >> 4, bits = (uint64_t)length + size;
            if (place > 255) return false;
            if (is_dc ? symbols[place] > 11 : size > 10 || (!size && run && run != 15)) return false;
            if (!is_dc && !symbols[place]) run = END_OF_BLOCK;
            Entry entry = bits | bits << 8 | (uint64_t)length << 16 | (63 - size) << 24 | 63ull << 40 |
                          (run + 1) << 48 | run << 56;
            table->symbol[place] = entry;
            if (length > LOOKUP) continue;
            int spare = LOOKUP - length;
            for (uint32_t each = code << spare; each < (code + 1) << spare; each++) table->entry[each] = entry;
        }
        table->limit[length] = (int32_t)(code << (16 - length));
    }
    if (is_dc) return true;
    /* A second number joins where its code lies within the bits looked up; its own bits may lie beyond. */
    static const uint32_t mask = (1 << LOOKUP) - 1;
    Entry single[1 << LOOKUP];
    memcpy(single, table->entry, sizeof single);
    for (uint32_t bits = 0; bits <= mask; bits++) {
        Entry first = single[bits];
        unsigned taken = ENTRY_BITS(first) & 63;
        if (!first || taken >= LOOKUP || ENTRY_RUN(first) == END_OF_BLOCK) continue;
        Entry second = single[bits << taken & mask];
        if (!second || (ENTRY_AT(second) & 63) > LOOKUP - taken) continue;
        table->entry[bits] = (taken + (ENTRY_BITS(second) & 63)) | (first & 0xFF000000FFFF7F00) | 1u << 15 |
                             (taken + (ENTRY_AT(second) & 63)) << 32 | (ENTRY_SHIFT(second) & 63) << 40 |
                             (uint64_t)(ENTRY_RUN(first) + 1 + ENTRY_RUN(second)) << 48;
    }
    return true;
}

void make_standard_tables(void) {
    for (int i = 0; i < 4; i++) make_table(&standard_tables[i], STANDARD[i], STANDARD[i] + 16, i < 2);
}

static bool read_huffman(Frame *frame, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        int which = at[0] & 3, is_dc = !(at[0] & 16), total = 0;
        if (at[0] & 0xEC || end - at < 17) return false;
        for (int i = 1; i <= 16; i++) total += at[i];
        if (total > 256 || end - at < 17 + total) return false;
        const Huffman *table = NULL;
        for (int i = is_dc ? 0 : 2; i < (is_dc ? 2 : 4); i++)
            if (total == STANDARD_SYMBOLS[i] && !memcmp(at + 1, STANDARD[i], 16 + (size_t)total))
                table = &standard_tables[i];
        if (!table) {
            Huffman *own = &frame->own[which + 4 * is_dc];
            if (!make_table(own, at + 1, at + 17, is_dc)) return false;
            table = own;
        }
        (is_dc ? frame->dc : frame->ac)[which] = table;
        at += 17 + total;
    }
    return true;
}

static bool read_quantisation(Frame *frame, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        int wide = *at >> 4, which = *at & 15;
        at++;
        if (wide > 1 || which > 3 || end - at < 64 * (1 + wide)) return false;
        for (int k = 0; k < 64; k++, at += 1 + wide)
            frame->quant[which][ZIGZAG[k]] = wide ? (uint16_t)(at[0] << 8 | at[1]) : at[0];
        frame->has_quant[which] = true;
    }
    return true;
}

static bool read_frame(Frame *frame, const uint8_t *at, const uint8_t *end) {
    if (frame->components || end - at < 6 || at[0] != 8) return false;
    frame->height = at[1] << 8 | at[2], frame->width = at[3] << 8 | at[4], frame->components = at[5];
    if (!frame->height || !frame->width || (at[5] != 1 && at[5] != 3) || end - at != 6 + 3 * at[5]) return false;
    int blocks = 0;
    for (int c = 0; c < frame->components; c++) {
        Component *one = &frame->component[c];
        at += c ? 3 : 6;
        one->id = at[0], one->h = at[1] >> 4, one->v = at[1] & 15, one->quant = at[2];
        if (frame->components == 1)
            one->h = one->v = 1; /* a single colour's blocks come row by row, whatever it says */
        if (one->h < 1 || one->h > 2 || one->v < 1 || one->v > 2 || one->quant > 3) return false;
        if (one->h > frame->h_max) frame->h_max = one->h;
        if (one->v > frame->v_max) frame->v_max = one->v;
        blocks += one->h * one->v;
    }
    return blocks <= 10;
}

static bool read_scan(Frame *frame, const uint8_t *at, const uint8_t *end) {
    if (!frame->components || end - at != 4 + 2 * frame->components || at[0] != frame->components) return false;
    for (int c = 0; c < frame->components; c++) {
        Component *one = &frame->component[c];
        int dc = at[2 + 2 * c] >> 4, ac = at[2 + 2 * c] & 15;
        if (at[1 + 2 * c] != one->id || dc > 3 || ac > 3 || !frame->has_quant[one->quant]) return false;
        one->dc = frame->dc[dc], one->ac = frame->ac[ac], one->dc_value = 0;
        if (!one->dc || !one->ac) return false;
    }
    const uint8_t *selection = end - 3; /* all 64 frequencies, in one go */
    return selection[0] == 0 && selection[1] == 63 && selection[2] == 0;
}

bool read_headers(Frame *frame, const uint8_t *data, size_t size) {
    memset(frame, 0, offsetof(Frame, own));
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return false;
    bool jfif = false, ycc = false;
    for (size_t at = 2;;) {
        if (at + 4 > size || data[at] != 0xFF) return false;
        int marker = data[at + 1];
        size_t length = (size_t)data[at + 2] << 8 | data[at + 3];
        if (length < 2 || length > size - at - 2) return false;
        const uint8_t *begin = data + at + 4, *end = data + at + 2 + length;
        at += 2 + length;
        switch (marker) {
        case 0xDB:
            if (!read_quantisation(frame, begin, end)) return false;
            break;
        case 0xC4:
            if (!read_huffman(frame, begin, end)) return false;
            break;
        case 0xC0:
        case 0xC1:
            if (!read_frame(frame, begin, end)) return false;
            break;
        case 0xDD:
            if (end - begin != 2) return false;
            frame->restart_interval = begin[0] << 8 | begin[1];
            break;
        case 0xE0: jfif |= end - begin >= 14 && !memcmp(begin, "JFIF", 5); break;
        case 0xEE: /* Adobe's says how colours are coded: 1 is YCbCr */
            if (end - begin >= 12 && !memcmp(begin, "Adobe", 5)) {
                if (begin[11] != 1) return false;
                ycc = true;
            }
            break;
        case 0xDA:
            if (!read_scan(frame, begin, end)) return false;
            /* Without a word on the colours, libjpeg goes by the components' names. */
            if (frame->components == 3 && !jfif && !ycc)
                for (int c = 0; c < 3; c++)
                    if (frame->component[c].id != c + 1) return false;
            /* With restarts, what is cut off at the end might not be noticed. */
            if (frame->restart_interval && (data[size - 2] != 0xFF || data[size - 1] != 0xD9)) return false;
            frame->scan = at;
            return true;
        default: /* what applications and people wrote; else another kind of frame, or none that is known */
            if (!(marker > 0xE0 && marker <= 0xEF) && marker != 0xFE) return false;
        }
    }
}
