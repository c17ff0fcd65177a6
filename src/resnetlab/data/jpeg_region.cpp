// Part of a JPEG, decoded by the libjpeg-turbo of this machine: what lies outside is read, but not made into pixels.

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <jpeglib.h>

namespace {

constexpr int64_t MARGIN = 16;  // pixels around the part, into which the interpolation of colours reaches

struct Errors {
    jpeg_error_mgr base;  // first, since libjpeg knows only this part
    jmp_buf leave;
};

[[noreturn]] void leave(j_common_ptr common) { longjmp(reinterpret_cast<Errors *>(common->err)->leave, 1); }

void leave_at_damage(j_common_ptr common, int level) {
    if (level < 0) leave(common);  // a warning: libjpeg would go on with wrong pixels
}

}  // namespace

// Writes the pixels of the rows from `top` and columns from `left` as RGB, (height, width, 3); the part lies within the image.
// Returns 1, or 0 if libjpeg finds damage up to the end of the part, or lacks memory.
extern "C" int decode_jpeg_region(const uint8_t *content, int64_t size, int64_t top, int64_t left, int64_t height, int64_t width,
                                  uint8_t *out) {
    jpeg_decompress_struct jpeg;
    Errors errors;
    uint8_t *volatile row = nullptr;
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = leave_at_damage;
    if (setjmp(errors.leave)) {
        jpeg_destroy_decompress(&jpeg);
        std::free(row);
        return 0;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, content, size);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    const int64_t rows = jpeg.output_height, columns = jpeg.output_width;
    if (top < 0 || left < 0 || height < 1 || width < 1 || top + height > rows || left + width > columns) leave(j_common_ptr(&jpeg));
    const int64_t begin = left > MARGIN ? left - MARGIN : 0;
    const int64_t end = left + width + MARGIN < columns ? left + width + MARGIN : columns;
    JDIMENSION from = begin, count = end - begin;
    jpeg_crop_scanline(&jpeg, &from, &count);  // widens it to whole blocks
    if (!(row = static_cast<uint8_t *>(std::malloc(3 * size_t(count))))) leave(j_common_ptr(&jpeg));
    if (top > MARGIN) jpeg_skip_scanlines(&jpeg, top - MARGIN);
    while (jpeg.output_scanline < top + height) {
        const int64_t y = int64_t(jpeg.output_scanline) - top;
        JSAMPROW line = row;
        jpeg_read_scanlines(&jpeg, &line, 1);
        if (y >= 0) std::memcpy(out + 3 * y * width, row + 3 * (left - from), 3 * width);
    }
    jpeg_destroy_decompress(&jpeg);
    std::free(row);
    return 1;
}
