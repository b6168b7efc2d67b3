// Floats as pixels: engine.requests.to_pixels, (rows, channels, area) in about [-1, 1] -> (rows, area, channels) bytes.
#pragma once

EITHER float as_float(float x) { return x; }

#ifdef __CUDACC__
struct Half {
    unsigned short bits;
};
__device__ __forceinline__ float as_float(Half x) { return from_half(x.bits); }
#endif

EITHER unsigned char to_byte(float x) {
    // Two roundings, as numpy does; a fused multiply-add would have one.
    DEVICE_ONLY(x = __fadd_rn(__fmul_rn(x, 127.5f), 128.0f);)
    HOST_ONLY(x = x * 127.5f; x = x + 128.0f;)
    return (unsigned char)fmin(fmax(x, 0.0f), 255.0f);
}

// Pixel i of all rows, in all channels.
template <class T> EITHER void to_pixel(const T* images, unsigned char* pixels, long long i, int channels, int area) {
    for (int c = 0; c < channels; c++)
        pixels[i * channels + c] = to_byte(as_float(images[(i / area * channels + c) * area + i % area]));
}
